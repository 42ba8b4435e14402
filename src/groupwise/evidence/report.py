"""`groupwise report`: one self-contained HTML page about one run, or one that compares several."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from groupwise.evidence.completions import embedded
from groupwise.evidence.document import document
from groupwise.evidence.page import write
from groupwise.evidence.runs import Run
from groupwise.evidence.runs_page import report_page
from groupwise.evidence.shapes import Document

READING_BYTES = 3_000_000
"""About how many bytes of a page completions take, at most."""


def write_page(runs: Sequence[Run], out: Path) -> Document:
    """Write the page about `runs` to `out`; returns what it is drawn from, for the terminal."""
    reading = embedded(runs, READING_BYTES)
    shown = document(runs)  # after it, since it also names the completions that cannot be read
    write(out, report_page(shown, reading))
    return shown


def as_text(shown: Document) -> list[Text]:
    """Each finding as a line for the terminal, with its setting where there are several."""
    colours = {"unhealthy": "red", "watch": "yellow", "healthy": "green"}
    names = {setting["id"]: f"{setting['name']}: " if len(shown["settings"]) > 1 else "" for setting in shown["settings"]}
    return [
        Text.assemble(
            (item["kind"], colours[item["kind"]]), f"  {names[item['setting']]}{item['title']['en']}: {item['text']['en']}"
        )
        for item in shown["findings"]
    ]
