"""What tests of pages share: Chromium, and what is wrong with how a page reads."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
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


def opened(browser: Any, path: Path | str, **settings: Any) -> tuple[Any, list[str]]:
    """Open a file, or a page at an address, in the browser; returns the page and a list that collects console errors, dialogs,
    and requests that leave the file or the address."""
    page = browser.new_context(**settings).new_page()
    page.add_init_script(path=Path(__file__).parent / "drawn_texts.js")
    address = path if isinstance(path, str) else path.as_uri()
    own = ("file:", "data:", "blob:") if isinstance(path, Path) else ("data:", "blob:", address)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(address)
    return page, wrong


def data_of(path: Path, id: str = "document") -> Any:
    """What a report is drawn from: its document, or with "reading" its completions."""
    found = re.search(rf'<script type="text/plain" id="{id}">([^<]*)</script>', path.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def illegible(page: Any, smallest: float = 13) -> list[str]:
    """Texts below a size in CSS pixels, cut off (by the page, a plot, a box or a list), or drawn over one another; also those on
    canvases of pages that `opened` opened."""
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


def heap(page: Any) -> int:
    """Bytes of JavaScript's heap after a garbage collection (Chromium)."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    used = int(session.send("Runtime.getHeapUsage")["usedSize"])
    session.detach()
    return used


@contextmanager
def frames(page: Any) -> Iterator[list[float]]:
    """Milliseconds between the frames that the page drew within; they are in the list afterwards."""
    found: list[float] = []
    page.evaluate("""() => {
      const times = window.frameTimes = [];
      const next = (now) => { times.push(now); if (window.frameTimes === times) requestAnimationFrame(next); };
      requestAnimationFrame(next);
    }""")
    yield found
    times = page.evaluate("() => { const times = window.frameTimes; window.frameTimes = null; return times; }")
    found += [after - before for before, after in pairwise(times)]
