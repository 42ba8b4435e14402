"""The page about runs as HTML: with its data inside (the report), or to be filled by a server (the live page)."""

import base64
import gzip
from collections.abc import Sequence
from typing import Any

from groupwise.evidence.page import asset, embed, embed_script, render
from groupwise.evidence.phrases import texts
from groupwise.evidence.shapes import Document, StepToRead
from groupwise.text import json_line

PARTS = ("core", "summary", "comparing", "plots", "reader", "live")
"""Parts of the page: a script each, a style sheet each, and a table of words each."""
SCRIPTS = {
    "plots": ("plots_data", "plots_style", "plots_canvas", "plots_figure", "plots_pointer", "plots"),
    "reader": ("reader_data", "reader_tokens", "reader_groups", "reader"),
    "live": ("live", "live_runs"),
}
"""Parts whose script is several files, in the order in which they are read."""


def report_page(document: Document, reading: Sequence[StepToRead]) -> str:
    """A page that needs no server."""
    return _page(document["title"], live=False, document=packed(document), reading=packed(list(reading)))


def live_page(title: str) -> str:
    """A page that asks the server it came from."""
    return _page(title, live=True)


def _page(title: str, **values: Any) -> str:
    names = [name for part in (*PARTS, "main") for name in SCRIPTS.get(part, (part,))]
    scripts = [asset("uplot/uPlot.iife.min.js"), asset("numbers.js"), *(asset(f"page/{name}.js") for name in names)]
    own = [asset(f"page/{part}.css") for part in PARTS if part != "core"]  # the core's is page.css
    styles = [asset("page.css"), asset("uplot/uPlot.min.css"), *own]
    return render(
        "page.html",
        title=title,
        style="\n".join(styles),
        script=embed_script("\n".join(scripts)),
        words=embed({part: texts(part) for part in PARTS}),
        **values,
    )


def packed(value: Any) -> str:
    """JSON as base64 of gzip, which no element can be ended by; the page unpacks it."""
    return base64.b64encode(gzip.compress(json_line(value, (",", ":")).encode(), compresslevel=6, mtime=0)).decode()
