"""The page about runs as a whole, in Chromium: every text legible in both languages and themes at three widths, every control
reached by keys, and texts of users that attack it shown and nothing more; the offline page, and the live one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.evidence.report import write_page
from groupwise.evidence.runs import open_run
from tests.hostile_texts import harms
from tests.page_runs import hostile_runs, write_run
from tests.pages import chromium, illegible, inaccessible, needs_browser, opened
from tests.served import free_port
from tests.test_live import TOKEN, watching

pytestmark = needs_browser
WIDTHS = (390, 1024, 1600)
TALL = 9000
"""Pixels in which the whole page is in view: figures out of view are not drawn."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of five runs of two settings, one with enough seeds for intervals."""
    home = tmp_path_factory.mktemp("usual")
    names = {"grpo": 3, "dapo": 2}
    runs = [
        write_run(home / f"{name}-{seed}", seed=seed, steps=40, sections={"algorithm": {"name": name}}, notes=["Entropy fell."])
        for name, seeds in names.items()
        for seed in range(seeds)
    ]
    write_page([open_run(run) for run in runs], home / "page.html")
    return home / "page.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hostile_runs(tmp_path_factory.mktemp("hostile"))


def drawn(page: Any) -> None:
    """Wait until the page has drawn what is in view."""
    page.locator("html[data-drawn]").wait_for(state="attached", timeout=60_000)
    settled(page)


def settled(page: Any) -> None:
    """Wait until a change has been drawn: a size is noticed in one frame, and drawn in the next."""
    page.evaluate("""() => new Promise((done) => {
      let left = 4;
      const next = () => (left-- ? requestAnimationFrame(next) : done());
      next();
    })""")


def faults(page: Any) -> list[str]:
    beyond = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return illegible(page) + ([f"{beyond} px wider than the screen"] if beyond > 0 else [])


def test_what_is_wrong_with_texts_on_a_canvas_is_found(browser: Any, tmp_path: Path) -> None:
    """At two device pixels for each of CSS; texts that cross without touching are no fault."""
    (
        tmp_path / "page.html"
    ).write_text("""<body style="margin: 0"><canvas width="400" height="400" style="width: 200px"></canvas><script>
        const brush = document.querySelector("canvas").getContext("2d");
        brush.font = "26px sans-serif";
        brush.fillText("gone", 50, 100); brush.clearRect(0, 0, 400, 400);
        brush.fillText("good", 50, 100); brush.fillText("over", 60, 105); brush.fillText("edge", 380, 200);
        for (const x of [100, 140]) {
          brush.setTransform(Math.SQRT1_2, -Math.SQRT1_2, Math.SQRT1_2, Math.SQRT1_2, x, 300);
          brush.fillText("oblique", 0, 0);
        }
        brush.resetTransform();
        brush.font = "20px sans-serif"; brush.fillText("small", 200, 50);
        </script>""")
    page, _ = opened(browser, tmp_path / "page.html", viewport={"width": 800, "height": 600})
    found = ["10 px in a plot: small", "cut off by its plot: edge", "overlap: good | over"]
    assert sorted(illegible(page)) == found


def test_every_text_is_legible(usual: Path, browser: Any) -> None:
    page, wrong = opened(browser, usual, viewport={"width": WIDTHS[0], "height": TALL}, locale="en-GB", color_scheme="light")
    drawn(page)
    found = {}
    for language in ("en", "zh-Hans"):
        for theme in ("light", "dark"):
            state = page.evaluate("[document.documentElement.lang, document.documentElement.dataset.theme]")
            assert state == [language, theme]
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": TALL})
                settled(page)
                found[language, theme, width] = faults(page)
            page.click("#theme")
        page.click("#language")
    assert {key: texts for key, texts in found.items() if texts} == {}
    figures = page.locator("figure").count()
    canvases = page.evaluate("[...drawnTexts].filter(([canvas, texts]) => canvas.isConnected && texts.length).length")
    assert canvases >= figures >= 10
    assert wrong == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_for_those_who_cannot_see(theme: str, usual: Path, browser: Any) -> None:
    page, _ = opened(browser, usual, viewport={"width": 1024, "height": TALL}, color_scheme=theme)
    drawn(page)
    assert inaccessible(page) == []


def test_every_control_is_reached_by_keys(usual: Path, browser: Any) -> None:
    page, _ = opened(browser, usual, viewport={"width": 1024, "height": TALL}, locale="en-GB", color_scheme="light")
    drawn(page)
    controls = page.evaluate("""() => {
      const found = [...document.querySelectorAll("a[href], button, select, input, textarea, summary, [tabindex='0']")];
      const shown = found.filter((one) => one.checkVisibility({ visibilityProperty: true }));
      const usable = shown.filter((one) => !one.disabled && one.tabIndex >= 0);
      usable.forEach((one, i) => { one.dataset.number = i; });
      return usable.length;
    }""")
    reached = set()
    for _ in range(controls + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("Number(document.activeElement.dataset.number ?? -1)"))
    assert set(range(controls)) - reached == set() and controls > 30
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.focus("#language")
    page.keyboard.press("Space")
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"


def check_harmless(page: Any, wrong: list[str]) -> None:
    """Nothing of a user's text ran, became an element, or made the page wider than the screen."""
    assert wrong == []
    assert not harms(page.locator("body").inner_text().replace("\t", " "))
    assert page.evaluate(
        "window.owned === undefined && !document.querySelector('body :is(img, iframe, style, link, main script)')"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [390, 1600])
def test_hostile_texts_are_shown_and_nothing_more(width: int, hostile: list[Path], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page([open_run(run) for run in hostile], path)
    assert not harms(path.read_text(encoding="utf-8").split("<style>")[0]) and path.stat().st_size < 8_000_000
    page, wrong = opened(browser, path, viewport={"width": width, "height": 900})
    drawn(page)
    check_harmless(page, wrong)
    read_everything(page, wrong)


def read_everything(page: Any, wrong: list[str]) -> None:
    """Choose the other kinds of completions in turn."""
    groups = page.locator("#completions .group")
    groups.first.wait_for(state="attached", timeout=60_000)
    source = page.locator("#completions select").nth(1)
    others = source.locator("option:not(:checked)").evaluate_all("options => options.map((option) => option.value)")
    assert len(others) == 2
    for value in others:
        groups.evaluate_all("groups => groups.forEach((group) => { group.dataset.old = 1; })")
        source.select_option(value)
        page.locator("#completions .group:not([data-old])").first.wait_for(state="attached", timeout=60_000)
        settled(page)
        check_harmless(page, wrong)


def test_hostile_texts_on_the_live_page(hostile: list[Path], browser: Any) -> None:
    port = free_port()
    with watching(*hostile, "--port", str(port)):
        page, wrong = opened(browser, f"http://127.0.0.1:{port}/{TOKEN}/", viewport={"width": 1024, "height": 900})
        drawn(page)
        check_harmless(page, wrong)
        read_everything(page, wrong)
        page.goto("about:blank")  # follows no longer
