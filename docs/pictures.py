"""Draw docs/images/report-wide-light.png and report-narrow-dark.png anew, from runs.

    python docs/pictures.py RUN...

Needs Chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from groupwise.evidence.report import write_page
from groupwise.evidence.runs import open_run

IMAGES = Path(__file__).parent / "images"
PICTURES = {
    "report-wide-light.png": ({"width": 1280, "height": 2700}, "light"),
    "report-narrow-dark.png": ({"width": 390, "height": 1700}, "dark"),
}


def main() -> None:
    runs = [open_run(Path(path)) for path in sys.argv[1:]]
    if not runs:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        path = Path(folder) / "report.html"
        write_page(runs, path)
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        for name, (view, scheme) in PICTURES.items():
            page = browser.new_context(viewport=view, color_scheme=scheme, locale="en-GB").new_page()
            page.goto(path.as_uri())
            page.locator("html[data-drawn]").wait_for(state="attached")
            page.wait_for_timeout(1500)  # until the figures in view are drawn
            page.screenshot(path=IMAGES / name)
        browser.close()


if __name__ == "__main__":
    main()
