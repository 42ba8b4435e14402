"""The figures of the page in Chromium: crosshair, zoom, legends, smoothing, axes, keys, growing data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.evidence.runs_page import report_page
from tests.figure_documents import document
from tests.pages import chromium, illegible, inaccessible, needs_browser, opened

pytestmark = needs_browser
SEEN = "page, tell, plotsOf, groupsOf, movingMean, columnsOfLine, logTicks, linearTicks, coincidences, yRange, onAxis"
OPEN_UP = f"\nObject.assign(globalThis, {{ {SEEN} }});</script>"
"""What tests see of the page's script, which is a module."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages: `one` setting and `three` of three seeds each."""
    out = tmp_path_factory.mktemp("figures")
    for name, settings, seeds in (("one", 1, 1), ("three", 3, 3)):
        page = report_page(document(120, settings=settings, seeds=seeds, figures=12), [])
        head, end, rest = page.rpartition("</script>")
        assert end
        (out / f"{name}.html").write_text(head + OPEN_UP + rest, encoding="utf-8")
    return out


def shown(browser: Any, path: Path, **settings: Any) -> Any:
    """A page with its first figures drawn."""
    page, wrong = opened(browser, path, **{"viewport": {"width": 1024, "height": 900}, "locale": "en-US", **settings})
    page.wait_for_selector("html[data-drawn] .plot-area canvas")
    page.wrong = wrong
    return page


def area(page: Any, figure: str) -> Any:
    found = page.locator(f"#figure-{figure} .plot-area")
    found.scroll_into_view_if_needed()
    page.wait_for_selector(f"#figure-{figure} canvas")
    return found


def tip(page: Any) -> str:
    page.wait_for_selector(".plot-tip:not([hidden])")
    said: str = page.locator(".plot-tip").inner_text()
    return said


def extent(page: Any, group: str) -> Any:
    return page.evaluate("(group) => groupsOf.get(group).zoom", group)


def test_one_tooltip_tells_every_line_of_a_group_at_the_crosshair(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    box = area(page, "rewards").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    lines = tip(page).splitlines()
    assert lines[0].startswith("Step ") and "Reward by component" in lines and "Held-out results" in lines
    step = int(lines[0].split()[1])
    figure = next(figure for figure in document(120, figures=12)["figures"] if figure["id"] == "rewards")
    values = {line["label"]["en"]: line["values"][list(line["steps"]).index(step)] for line in figure["lines"]}
    told = lines[lines.index("Reward by component") + 1 :][:3]
    assert [line.split()[-1] for line in told] == sorted(values, key=lambda name: -(values[name] or 0))  # highest first
    for line in told:
        assert float(line.split()[0]) == pytest.approx(values[line.split()[-1]], rel=1e-3)
    assert page.locator("#figure-accuracy .crosshair").is_visible()
    page.mouse.move(2, 2)
    page.wait_for_selector(".plot-tip", state="hidden")
    assert not page.wrong


def test_zoom_is_shared_by_a_group_and_goes_back(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    box = area(page, "rewards").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.up()
    low, high = extent(page, "learning")
    assert 0 < low < high < 120 and extent(page, "health") is None
    page.wait_for_function("plotsOf.get('accuracy').range.x[0] === groupsOf.get('learning').zoom[0]")
    page.keyboard.press("+")  # the figure has the focus since it was dragged in
    assert extent(page, "learning")[1] - extent(page, "learning")[0] < high - low
    page.keyboard.press("0")
    assert extent(page, "learning") is None
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function("groupsOf.get('learning').zoom !== null")
    page.get_by_role("button", name="Reset zoom").click()
    assert extent(page, "learning") is None and page.get_by_role("button", name="Reset zoom").is_disabled()


def test_keys_move_the_crosshair_and_a_screen_reader_is_told(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    plot = area(page, "rewards")
    plot.focus()
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("End", 120), ("ArrowLeft", 119), ("Home", 1)):
        page.keyboard.press(key)
        page.wait_for_function(f"document.activeElement.getAttribute('aria-valuenow') === '{step}'")
        assert tip(page).splitlines()[0] == f"Step {step}"
    assert "total" in plot.get_attribute("aria-valuetext")
    page.keyboard.press("Escape")
    page.wait_for_selector(".plot-tip", state="hidden")
    for figure in ("clip-by-probability", "ratio", "spread-by-length"):
        area(page, figure).focus()
        page.keyboard.press("ArrowRight")
        assert tip(page)
    assert not page.wrong


def test_fingers_point_and_zoom(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html", viewport={"width": 390, "height": 800}, has_touch=True)
    box = area(page, "rewards").bounding_box()
    touch = page.context.new_cdp_session(page)

    def send(kind: str, *places: float) -> None:
        points = [{"x": box["x"] + x, "y": box["y"] + 90, "id": i} for i, x in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", 150)
    send("touchEnd")
    assert tip(page).startswith("Step ")
    send("touchStart", 150, 200)
    for away in (10, 20, 40):
        send("touchMove", 150 - away, 200 + away)
    send("touchEnd")
    page.wait_for_function("groupsOf.get('learning').zoom !== null")
    low, high = extent(page, "learning")
    assert 0.3 < (high - low) / 120 < 0.5  # the fingers are 2.6 times as far apart
    assert not page.wrong


def test_a_legend_hides_what_it_stands_for_in_every_figure(browser: Any, written: Path) -> None:
    page = shown(browser, written / "three.html")
    keys = page.locator("#group-learning ~ .keys button.key")
    assert keys.count() == 3 and page.locator("#figure-rewards .keys button.key svg").count() == 3
    keys.nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("[...plotsOf.get('rewards').shown].filter(Boolean).length === 6")
    assert page.locator("[data-key='setting s1'][aria-pressed='false']").count() == 4  # in each group
    assert page.evaluate("document.activeElement.dataset.key") == "setting s1"
    page.locator("#figure-rewards .keys button.key").first.click()
    page.wait_for_function("[...plotsOf.get('rewards').shown].filter(Boolean).length === 4")
    assert "95% interval of the mean over 3 seeds" in page.locator("#figure-accuracy").inner_text()
    strokes = page.locator("#figure-rewards .keys line").evaluate_all("all => all.map((one) => one.style.strokeDasharray)")
    assert len(strokes) == len(set(strokes)) == 3


def test_what_was_noted_is_marked_in_every_figure_of_steps(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    for id in ("groups", "rewards"):
        page.locator(f"#figure-{id}").scroll_into_view_if_needed()
        page.wait_for_function(f"plotsOf.get('{id}').marks.map(({{ step }}) => step).join() === '60,61'")
    box = area(page, "rewards").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    assert "entropy_low" in tip(page)
    page.evaluate("page.data.marks = [{ step: 30, text: 'later' }]; tell('marks')")
    page.wait_for_function("plotsOf.get('rewards').marks[0].step === 30")
    assert not page.wrong


def test_axes_and_smoothing(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    page.get_by_role("button", name="completions", exact=True).click()
    box = area(page, "rewards").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 80)  # away from what was noted
    head, *_, row = tip(page).splitlines()[:3]
    step = int(row.rsplit(" ", 1)[1])
    assert head == f"{64 * step:,} completions"
    page.get_by_role("button", name="time", exact=True).click()
    assert page.locator("#figure-rewards .axis-title.across").inner_text() == "time (s)"
    seconds = page.evaluate(
        """() => {
          const runs = page.data.runs, setting = page.data.settings[0].id;
          page.data.runs = [{ id: "own", setting, clock: { steps: [0, 10], completions: [0, 1], seconds: [0, 50] } }];
          const found = ["own", null].map((run) => onAxis({ run, setting }, [5], "seconds")[0]);
          page.data.runs = runs;
          return found;
        }"""
    )
    assert seconds[0] == 25 != seconds[1], "a run is drawn on its own clock, a mean on that of its setting"
    page.get_by_role("button", name="step", exact=True).click()
    page.locator("#smoothing").fill("2")
    assert page.locator("#smoothing-said").inner_text() == "mean of 5 steps"
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + 80)
    assert "smoothed" in tip(page)
    assert page.evaluate("[...movingMean([1, 2, 3, 10], [1, 2, 6, 8], 3)]") == [1.5, 3, 4, 8]
    assert page.evaluate("[...movingMean([1, 2, 3], [1, NaN, 3], 3)].map(Number.isNaN)") == [False, True, False]
    spiky = "[1e300, ...Array.from({ length: 200 }, (_, i) => 1 / (i + 1))]"
    assert page.evaluate(f"movingMean(Array.from({{ length: 201 }}, (_, i) => i), {spiky}, 3)[150]") == pytest.approx(
        1 / 150, rel=1e-4
    )
    page.locator("#figure-rewards").get_by_role("button", name="log").click()
    page.wait_for_function("plotsOf.get('rewards').u?.scales.y.distr === 3")
    area(page, "gradient")
    page.wait_for_function("plotsOf.get('gradient').leftOut > 0")
    left_out = page.evaluate("plotsOf.get('gradient').columns[0].y.filter((value) => value <= 0).length")
    assert f"leaves out {left_out} values of at most 0" in page.locator("#figure-gradient").inner_text()
    assert page.locator("#figure-dropped").inner_text() == "Discarded data: groups of zero variance = 0"
    assert page.evaluate("logTicks(0.0007, 300, 150, 24).map(({ label }) => label)") == ["0.001", "0.01", "0.1", "1", "10", "100"]
    assert page.evaluate("linearTicks(0, 3e-5, 3, false, false).map(({ label }) => label)") == ["0", "1×10⁻⁵", "2×10⁻⁵", "3×10⁻⁵"]
    assert page.evaluate("logTicks(0.004, 2, 150, 24, true).map(({ label }) => label)") == [
        "1%", "3%", "10%", "30%", "100%",
    ]  # fmt: skip


def test_the_interval_of_a_single_evaluation_is_a_bar(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    area(page, "accuracy")
    page.evaluate(
        """() => {
          const [line] = page.data.figures.find((figure) => figure.id === "accuracy").lines;
          Object.assign(line, { steps: [0, 5, 10], values: [0.5, null, 0.5], low: [0.1, null, 0.4], high: [0.9, null, 0.6] });
          tell("figures");
        }"""
    )
    colours = """() => {
      const { u } = plotsOf.get("accuracy");
      const at = (x, y) => [...u.ctx.getImageData(u.valToPos(10, "x", true) + x, u.valToPos(y, "y", true), 1, 1).data].join();
      return { beside: at(-40, 0.45), inside: at(-2, 0.42), above: at(-2, 0.7) };
    }"""
    page.wait_for_function(f"plotsOf.get('accuracy').columns[0].x.length === 3 && ({colours})().inside !== ({colours})().beside")
    found = page.evaluate(colours)
    assert found["above"] == found["beside"] != found["inside"]


def test_lines_are_wide_where_another_covers_them_and_nowhere_else(browser: Any, written: Path) -> None:
    """Of a line of 100 points: covered from 40 to 60, crossed at 80. A line that ended before has no say in the height."""
    page = shown(browser, written / "one.html")
    found = page.evaluate(
        """() => {
          const x = Float64Array.from({ length: 100 }, (_, i) => i), y = x.map(() => 0);
          const other = x.map((i) => (i < 40 || i > 60 ? i - 80 : 0));
          const columns = (x, y) => ({ x, y, mean: null, low: null, high: null });
          const [lower, upper] = coincidences([columns(x, y), columns(x, other)], { low: -80, high: 20 }, false, 0.001);
          const short = { ...columns(x.slice(0, 50), x.slice(0, 50)), low: y.slice(0, 50), high: y.slice(0, 50) };
          return {
            covered: [...x].filter((i) => lower[0][i] === 0), several: lower[1].some((value) => value === value), upper,
            range: yRange([columns(x, y), short], 70, 90, false), bandless: yRange([short], 10, 20, true).bandless,
          };
        }"""
    )
    assert found["covered"] == list(range(40, 61)) and not found["several"] and found["upper"] is None
    assert (found["range"]["low"], found["range"]["high"], found["bandless"]) == (0, 0, 12)


def test_long_runs_are_smoothed_until_something_else_is_chosen(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    head, _, rest = report_page(document(4000, figures=10), []).rpartition("</script>")
    path.write_text(head + OPEN_UP + rest, encoding="utf-8")
    page = shown(browser, path)
    assert page.locator("#smoothing-said").inner_text() == "mean of 201 steps"
    said = (
        "Of every 8 steps, the lowest and the highest value are drawn, pale; "
        "the line over them is the mean of all values within about 201 steps."
    )
    assert page.get_by_text(said).count() == 2  # once in each group that has such lines
    thin = "{ steps: [1, 8, 9, 16], values: [0, 1, 0, 5], means: [0.1, 0.1, 0.3, 0.3], low: null, high: null }"
    assert page.evaluate(f"[...columnsOfLine({thin}, 'step', 101).mean]") == pytest.approx([0.2] * 4)
    page.locator("#smoothing").fill("0")
    page.evaluate("tell('figures')")
    assert page.locator("#smoothing-said").inner_text() == "off"


def test_the_tooltip_stays_in_the_window(browser: Any, written: Path) -> None:
    page = shown(browser, written / "three.html", has_touch=True)
    page.set_viewport_size({"width": 390, "height": 844})
    inside = """() => { const { left, top, right, bottom } = document.querySelector(".plot-tip").getBoundingClientRect();
      return left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight; }"""
    for figure in ("accuracy", "rewards", "groups"):
        area(page, figure).tap()
        assert tip(page) and page.evaluate(inside)
    for size in ({"width": 390, "height": 500}, {"width": 900, "height": 320}):
        page.set_viewport_size(size)
        page.locator("#figure-rewards .plot-area").focus()
        page.keyboard.press("End")
        assert "0" in tip(page)
        page.wait_for_function(inside)
    assert page.locator("#figure-rewards .wide-button").is_visible()
    page.set_viewport_size({"width": 390, "height": 500})
    assert not page.locator("#figure-rewards .wide-button").is_visible()


def test_growing_data_keeps_zoom_hidden_lines_and_what_is_pointed_at(browser: Any, written: Path) -> None:
    page = shown(browser, written / "one.html")
    page.locator("#figure-rewards .keys button.key").first.click()
    box = area(page, "rewards").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.up()
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # what is zoomed is drawn
    before, told = extent(page, "learning"), tip(page)
    page.evaluate(
        """() => {
          const figure = page.data.figures.find(({ id }) => id === "rewards");
          for (const line of figure.lines) Object.assign(line, { steps: [...line.steps, 121], values: [...line.values, 0.5] });
          page.changedFigures = new Set(["rewards"]);
          tell("figures");
        }"""
    )
    page.wait_for_function("plotsOf.get('rewards').columns[0].x.length === 121")
    assert extent(page, "learning") == before and tip(page) == told
    assert page.evaluate("groupsOf.get('learning').extent[1]") == 121
    assert page.evaluate("plotsOf.get('rewards').shown") == [False, True, True]
    page.locator("#figure-rewards .keys button.key").nth(1).focus()
    page.evaluate("for (const { clock } of page.data.settings) clock.seconds[1] += 1; tell('settings', 'runs', 'figures')")
    assert page.evaluate("document.activeElement.dataset.key") == "label rewards 1"
    page.evaluate("page.data.figures = page.data.figures.filter(({ id }) => id !== 'groups'); tell('figures')")
    page.wait_for_selector("#figure-groups", state="detached")
    assert not page.wrong


@pytest.mark.parametrize(
    ("name", "width", "locale", "scheme"), [("one", 390, "zh-CN", "dark"), ("three", 1600, "en-US", "light")]
)
def test_figures_can_be_read_and_used_by_everybody(
    browser: Any, written: Path, name: str, width: int, locale: str, scheme: str
) -> None:
    page = shown(browser, written / f"{name}.html", viewport={"width": width, "height": 900}, locale=locale, color_scheme=scheme)
    for details in page.locator("details:has(.scroll)").all()[:3]:
        details.locator("summary").click()
    page.wait_for_selector("#figures td")
    page.evaluate("scrollTo(0, 0)")  # where the table of contents, which stays in view, covers nothing
    assert illegible(page) == [] and inaccessible(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.wrong
