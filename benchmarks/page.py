"""How fast the page about runs is in Chromium: of one run of 100,000 steps, and of a ladder of 30 runs.

    python benchmarks/page.py [--steps 100000] [--runs 30]

The runs are made up. Aims: a page below 8 MB that opens within 2 seconds, and more than 30 frames a second while the pointer
moves over a figure and while it zooms.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.page_runs import write_run
from tests.pages import chromium, frames, heap, opened

from groupwise.evidence.report import write_page
from groupwise.evidence.runs import open_run

VIEW = {"width": 1600, "height": 1000}


def one_run(home: Path, steps: int) -> list[Path]:
    return [write_run(home / "run", steps=steps)]


def ladder(home: Path, runs: int) -> list[Path]:
    """Settings of three seeds, of 500 steps each."""
    return [
        write_run(home / f"{i // 3}-{i % 3}", seed=i % 3, steps=500, sections={"algorithm": {"clip_high": 0.2 + 0.01 * (i // 3)}})
        for i in range(runs)
    ]


def opening_seconds(browser: Any, path: Path) -> float:
    """From the address to the first frame with everything in view drawn; a new browser context has nothing cached."""
    started = time.monotonic()
    page, wrong = opened(browser, path, viewport=VIEW)
    page.locator("html[data-drawn]").wait_for(state="attached", timeout=120_000)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.monotonic() - started
    assert wrong == [], wrong
    page.context.close()
    return seconds


def moving(page: Any, box: dict[str, float]) -> None:
    for i in range(150):
        page.mouse.move(box["x"] + box["width"] * (0.1 + 0.8 * (i % 75) / 75), box["y"] + box["height"] / 2)


def zooming(page: Any, box: dict[str, float]) -> None:
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.keyboard.down("Control")
    for i in range(60):
        page.mouse.wheel(0, -60 if i < 40 else 120)
    page.keyboard.up("Control")


def per_second(page: Any, act: Callable[[Any, dict[str, float]], None]) -> str:
    """Frames per second over the first figures, all of whose group are in view."""
    page.locator("#figures figure").first.scroll_into_view_if_needed()
    canvas = page.locator("#figures figure canvas").first
    canvas.wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    with frames(page) as found:
        act(page, box)
    slowest = statistics.quantiles(found, n=20)[-1]
    return f"{1000 * len(found) / sum(found):.0f} frames/s (19 of 20 frames within {slowest:.0f} ms, longest {max(found):.0f} ms)"


def measure(browser: Any, name: str, runs: list[Path], out: Path) -> None:
    started = time.process_time()
    write_page([open_run(run) for run in runs], out)
    made = time.process_time() - started
    seconds = statistics.median(opening_seconds(browser, out) for _ in range(3))
    page, wrong = opened(browser, out, viewport=VIEW)
    page.locator("html[data-drawn]").wait_for(state="attached", timeout=120_000)
    print(f"{name}: made in {made:.1f} s of CPU, {out.stat().st_size / 1e6:.2f} MB, opens in {seconds:.2f} s", flush=True)
    print(
        f"  pointer: {per_second(page, moving)}\n  zoom: {per_second(page, zooming)}\n  heap {heap(page) / 1e6:.0f} MB",
        flush=True,
    )
    assert wrong == [], wrong
    page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=30)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        home = Path(folder)
        measure(browser, f"{asked.steps:,} steps", one_run(home / "one", asked.steps), home / "one.html")
        measure(browser, f"{asked.runs} runs", ladder(home / "ladder", asked.runs), home / "ladder.html")


if __name__ == "__main__":
    main()
