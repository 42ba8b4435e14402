"""What tests of pages share: Chromium, and what is wrong with how a page reads."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. While it is open an event loop runs in this thread, and asyncio.run() fails: close it with the module."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, **settings: Any) -> tuple[Any, list[str]]:
    """Open a file in the browser; returns the page and a list that collects console errors and network requests."""
    page = browser.new_context(**settings).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    page.goto(path.as_uri())
    return page, wrong


def data_of(path: Path, id: str = "document") -> Any:
    """What a report is drawn from: its document, or with "reading" its completions."""
    found = re.search(rf'<script type="text/plain" id="{id}">([^<]*)</script>', path.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def illegible(page: Any, smallest: float = 13) -> list[str]:
    """Texts below a size in CSS pixels, cut off (by the page, a plot, a box or a list), or drawn over one another."""
    script = (Path(__file__).parent / "illegible.js").read_text(encoding="utf-8")
    found: list[str] = page.evaluate(script.split("\n", 1)[1], smallest)
    return found


def inaccessible(page: Any) -> list[str]:
    """The serious and critical findings of axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{item['id']}: {node['html'][:200]}"
        for item in found
        if item["impact"] in ("serious", "critical")
        for node in item["nodes"]
    ]
