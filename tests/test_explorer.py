"""The explorer in Chromium: its numbers are Python's, its controls work by key, and its text can be read at every width."""

import inspect
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import groupwise as gw
from groupwise.algorithms import PARTS, theory
from groupwise.cli import app
from groupwise.evidence import explorer as made
from groupwise.evidence.runs import open_run
from tests.pages import chromium, illegible, inaccessible, needs_browser, opened

PUBLISHED = Path(__file__).parent.parent / "docs" / "explorer.html"
WIDTHS = (390, 1024, 1600)


def groupwise(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with settings unlike the defaults, all tokens recorded."""
    run = tmp_path_factory.mktemp("explorer") / "run"
    settings = {
        "training.steps": 3, "training.tokens_every": 1, "training.eval_problems": 20, "training.eval_every": 3,
        "algorithm.name": "dapo", "algorithm.clip_high": 0.37, "algorithm.dual_clip": 3.0, "algorithm.correction": "tis",
        "algorithm.correction_high": 1.7, "rollouts.group_size": 6, "rollouts.temperature": 0.9, "learner.minibatches": 4,
    }  # fmt: skip
    groupwise("train", "quick", *(f"--set={key}={value}" for key, value in settings.items()), "--out", str(run))
    return run


@pytest.fixture(scope="module")
def explorer(browser: Any, run: Path) -> tuple[Any, list[str]]:
    groupwise("explore", str(run), "--out", str(run.parent / "explorer.html"), "--no-open")
    return opened(
        browser, run.parent / "explorer.html", locale="en-US", viewport={"width": 1024, "height": 800}, color_scheme="light"
    )


# --- one source for the formulas --------------------------------------------------------------------------------------


def arguments_of(name: str, draw: random.Random) -> list[Any]:
    """Random arguments of a function of `theory`, by what its parameters are called."""
    rewards = draw.choice([[0.0, 1.0], [-1.0, 0.5, 1.0]])
    settings = {
        key: draw.uniform(0.1, 3) for choice in PARTS["surrogate"].values() for key in inspect.signature(choice.make).parameters
    }
    names = {
        "bounds": [*PARTS["bounds"]],
        "mode": ["sequence_mean", "sequence_sum", "token_mean", "constant"],
        "name": {
            "surrogate": [*PARTS["surrogate"]],
            "group_estimate": ["grpo", "dr_grpo", "maxrl", "lite_ppo", "rloo", "dcpo", "gdpo", "reinforce_pp"],
            "turn_credit": ["group", "process", "turns"],
            "correction_weight": [*PARTS["correction"]],
        }.get(name, [""]),
    }
    count = draw.randint(1, 8)
    values: dict[str, Callable[[], Any]] = {
        **{key: lambda key=key: draw.choice(names[key]) for key in names},
        "advantage": lambda: draw.choice([-1.0, 1.0]),
        "settings": lambda: {
            **settings,
            "low": 0.8,
            "high": draw.choice([1.2, math.inf]),
            "dual_clip": draw.choice([2.0, math.inf]),
        },
        "lengths": lambda: [draw.randint(1, 50) for _ in range(count)],
        "rewards": lambda: draw.choices(rewards, k=count),
        "rest": lambda: draw.choices(rewards, k=draw.randint(0, 6)),
        "group": lambda: [draw.choices(rewards, k=draw.randint(1, 4)) for _ in range(count)],
        "rights": lambda: [draw.randint(0, 4) for _ in range(6)],
        "values": lambda: [draw.uniform(-2, 2) for _ in range(count)],
        "probabilities": lambda: theory.zipf_probabilities(20, 1.1, 1.0),
        "size": lambda: 4,
        "ddof": lambda: draw.choice([0, 1]),
        "eps": lambda: 1e-6,
        "top_k": lambda: draw.randint(0, 25),
        "group_size": lambda: draw.randint(2, 32),
        **dict.fromkeys(("tokens", "count"), lambda: draw.randint(1, 40)),
        **dict.fromkeys(("length", "limit", "cache"), lambda: draw.randint(1, 100)),
    }
    return [values.get(key, lambda: draw.uniform(0.02, 1.5))() for key in inspect.signature(getattr(theory, name)).parameters]


@needs_browser
def test_every_formula_of_the_page_is_pythons_to_nine_digits(explorer: tuple[Any, list[str]]) -> None:
    page, _ = explorer
    functions = [name for name, value in vars(theory).items() if inspect.isfunction(value)]
    assert page.evaluate("Object.keys(theory)") == functions and len(functions) > 25
    draw = random.Random(0)
    calls = [(name, arguments_of(name, draw)) for name in functions for _ in range(60)]
    found = page.evaluate("(calls) => calls.map(([name, values]) => theory[name](...values))", calls)
    for (name, values), value in zip(calls, found, strict=True):
        expected = getattr(theory, name)(*values)
        flat = [*_flat(value)], [*_flat(expected)]
        assert flat[0] == pytest.approx(flat[1], rel=1e-9, abs=1e-9), (name, values)


def _flat(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def test_the_page_has_no_formula_of_its_own() -> None:
    """What the figures take from Math rounds, bounds or takes powers of what `theory` returned."""
    for name in ("numbers.js", "explorer_plot.js", "explorer_figures.js", "explorer.js"):
        assert not {"Math.exp(-", "Math.random", "Math.log1p"} & set(made.asset(name).split())


# --- the figures ------------------------------------------------------------------------------------------------------


def ceiling(v: dict[str, float]) -> tuple[float, float]:
    bound = gw.fixed_bounds(torch.tensor([[math.log(v["q"])]], dtype=torch.float64), v["high"], v["high"])[1]
    return v["q"], min(1.0, float(bound) * v["q"])


def compounding(v: dict[str, float]) -> tuple[float, float]:
    return v["n"], theory.probability_after(v["start"], v["n"], v["first"])


def sequence(v: dict[str, float]) -> tuple[float, float]:
    return v["length"], sum(v["bias"] + v["spread"] * z for z in theory.normal_noise(2048)[: int(v["length"])])


def dynamic(v: dict[str, float]) -> tuple[float, float]:
    bound = gw.dynamic_bounds(torch.tensor([[math.log(v["q"])]], dtype=torch.float64), v["low"], v["high"])[1]
    return v["q"], min(4.0, float(bound))


def overlong(v: dict[str, float]) -> tuple[float, float]:
    penalty = gw.soft_overlong_penalty(torch.tensor([int(v["length"])]), int(v["limit"]), int(min(v["cache"], v["limit"])))
    return v["length"], float(penalty)


def aggregation(v: dict[str, float]) -> tuple[float, float]:
    mask = torch.arange(int(max(v["first"], v["second"]))) < torch.tensor([v["first"], v["second"]])[:, None]
    return v["second"], float(gw.token_weights(mask, "token_mean")[1].sum())


def smoothing(v: dict[str, float]) -> tuple[float, float]:
    history: Any = {}
    size = int(v["size"])
    for visit in range(1, 7):
        right = math.floor(v[f"v{visit}"] * size + 0.5)
        rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
        advantages, history = gw.smoothed_advantages(rewards, torch.zeros(size, dtype=torch.long), ["p"] * size, history)
    assert right > 0, "choose values whose last visit has a right answer"
    return 6, float(advantages[0])


def zero_variance(v: dict[str, float]) -> tuple[float, float]:
    return v["p"], theory.dead_group_probability(v["p"], int(v["size"]))


def correction(v: dict[str, float]) -> tuple[float, float]:
    return v["w"], min(v["w"], v["high"])


MARKED: dict[str, tuple[Callable[[dict[str, float]], tuple[float, float]], dict[str, float]]] = {
    "ceiling": (ceiling, {"high": 0.28, "q": 0.45}),
    "compounding": (compounding, {"start": 0.02, "target": 0.5, "first": 0.1, "second": 0.4, "n": 31}),
    "sequence": (sequence, {"length": 1024, "spread": 0.08, "bias": 0.002, "tokenClip": 0.3, "sequenceClip": 0.001}),
    "dynamic": (dynamic, {"low": 0.1, "high": 0.3, "fixed": 0.4, "q": 0.3}),
    "overlong": (overlong, {"limit": 16384, "cache": 8192, "length": 12800}),
    "aggregation": (aggregation, {"first": 640, "second": 1210, "limit": 1000}),
    "smoothing": (smoothing, {"size": 8, "v1": 0.5, "v2": 0.25, "v3": 0.875, "v4": 0.0, "v5": 0.625, "v6": 0.75}),
    "zero-variance": (zero_variance, {"size": 5, "p": 0.35}),
    "correction": (correction, {"low": 0.3, "high": 1.4, "w": 2.1, "tokens": 3}),
}
"""Figure -> (the library's value where its marker stands, a value to set for each of its sliders)."""


@pytest.fixture(scope="module")
def published(browser: Any) -> tuple[Any, list[str]]:
    return opened(browser, PUBLISHED, locale="en-US", viewport={"width": 900, "height": 800}, color_scheme="light")


def places(page: Any, plot: str) -> tuple[Callable[[float, float], tuple[float, float]], dict[str, float]]:
    """(from values to the plot's coordinates, its box)."""
    data = page.evaluate(f"({{...document.getElementById('{plot}').dataset}})")
    box = {key: float(value) for key, value in data.items()}
    width, height = box["width"] - box["left"] - box["right"], box["height"] - box["top"] - box["bottom"]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - box["x0"]) / (box["x1"] - box["x0"]), (y - box["y0"]) / (box["y1"] - box["y0"])
        return box["left"] + across * width, box["height"] - box["bottom"] - up * height

    return place, box


def centres(page: Any, circles: str) -> list[tuple[float, float]]:
    found = page.locator(circles).evaluate_all("all => all.map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])")
    return [(x, y) for x, y in found]


def markers(page: Any, plot: str) -> list[tuple[float, float]]:
    return centres(page, f"#{plot} .marker")


def points(page: Any, plot: str) -> list[tuple[float, float]]:
    paths = page.locator(f"#{plot} .curve").evaluate_all("all => all.map(p => p.getAttribute('d') ?? '')")
    return [tuple(map(float, point.split(","))) for d in paths for point in d.replace("M", "L").split("L")[1:]]  # type: ignore[misc]


@needs_browser
@pytest.mark.parametrize("name", MARKED)
def test_every_slider_moves_the_marker_and_the_curve_to_the_closed_form(name: str, published: tuple[Any, list[str]]) -> None:
    page, wrong = published
    expected, changes = MARKED[name]
    sliders = page.locator(f"#{name} input[type=range]")
    values = {s.get_attribute("id").removeprefix(f"{name}-"): float(s.input_value()) for s in sliders.all()}
    assert values.keys() == changes.keys()

    def check() -> None:
        place, box = places(page, f"{name}-plot")
        (marker,) = markers(page, f"{name}-plot")
        assert marker == pytest.approx(place(*expected(values)), abs=0.6)
        step = (box["width"] - box["left"] - box["right"]) / 200
        near = min(abs(a - marker[0]) / step + abs(b - marker[1]) / 8 for a, b in points(page, f"{name}-plot"))
        assert near < 1.5, "no curve passes the marker"

    check()
    for key, value in changes.items():
        drawn_before = page.locator(f"#{name}").inner_html()
        page.fill(f"#{name}-{key}", str(value))
        values[key] = value
        check()
        assert page.locator(f"#{name}").inner_html() != drawn_before, f"{key} changes nothing"
    page.click(f"#{name} .reset")
    assert [float(s.input_value()) for s in sliders.all()] != [*changes.values()]
    assert wrong == []


@needs_browser
@pytest.mark.parametrize("name", PARTS["surrogate"])
def test_each_surrogate_is_drawn_for_both_signs(name: str, published: tuple[Any, list[str]]) -> None:
    page, wrong = published
    page.select_option("#surrogate-surrogate", name)
    for old, ratio in ((0.2, 0.6), (0.3, 1.25), (0.3, 2.5)):
        page.fill("#surrogate-old", str(old))
        page.fill("#surrogate-ratio", str(ratio))
        pairs = ("gate", "power", "decay")
        keys = ["divergence_limit", *(f"{pair}_{sign}" for pair in pairs for sign in ("positive", "negative"))]
        settings = {key: float(page.input_value(f"#surrogate-{key}")) for key in keys}
        cap = 5.0 if name == "cispo" else math.inf
        known = {**settings, "ratio_cap": cap, "dual_clip": math.inf, "low": 0.8, "high": 1.28}
        for part, plot in enumerate(("surrogate-objective", "surrogate-gradient")):
            place, box = places(page, plot)
            expected = [theory.surrogate(name, ratio, old, sign, known)[part] for sign in (1.0, -1.0)]
            shown = [place(ratio, value) for value in expected if box["y0"] <= value <= box["y1"]]
            assert len(shown) == 2 and markers(page, plot) == [pytest.approx(place_, abs=0.6) for place_ in shown]
    page.click("#surrogate .reset")
    assert wrong == []


def table(page: Any, figure: str) -> list[list[str]]:
    rows = page.locator(f"#{figure} tbody tr").evaluate_all(
        "all => all.map(row => [...row.cells].map(cell => cell.firstChild.textContent))"
    )
    return [list(row) for row in rows]


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


@needs_browser
def test_rewards_can_be_edited_and_the_table_shows_their_advantages(published: tuple[Any, list[str]]) -> None:
    page, _ = published
    page.fill("#advantages-rewards", "1, 0.5; −1，0 0")
    page.fill("#advantages-rest", "0 0 1")
    names = ["grpo", "dr_grpo", "rloo", "maxrl", "lite_ppo", "reinforce_pp", "dcpo", "gdpo"]
    rewards = [1.0, 0.5, -1.0, 0.0, 0.0]
    for name, row in zip(names, table(page, "advantages"), strict=True):
        by_reward = dict(zip(rewards, theory.group_estimate(rewards, [0.0, 0.0, 1.0], name, 1, 1e-6), strict=True))
        assert [number(cell) for cell in row[1:]] == pytest.approx([by_reward[r] for r in sorted(by_reward)], rel=1e-3), name
    drawn = page.locator("#advantages-plot path.curve").count()
    page.uncheck("#advantages-shown-grpo")
    assert page.locator("#advantages-plot path.curve").count() == drawn - 1
    page.fill("#advantages-rewards", "1, one")
    assert page.get_attribute("#advantages-rewards", "aria-invalid") == "true" and "64 numbers" in page.inner_text("#advantages")
    page.fill("#advantages-rewards", "1, 1, 1")
    assert "zero-variance group" in page.inner_text("#advantages .notes")
    page.click("#advantages .reset")


@needs_browser
@pytest.mark.parametrize("estimator", ["turns", "process", "group"])
def test_credit_for_turns(estimator: str, published: tuple[Any, list[str]]) -> None:
    page, _ = published
    page.select_option("#turns-estimator", estimator)
    group = [[1.0, 0.25], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0]]
    for key, rewards in zip(("first", "second", "third"), group, strict=True):
        page.fill(f"#turns-{key}", ", ".join(map(str, rewards)))
    assert page.locator("#turns-gamma").is_visible() == (estimator == "turns")
    if estimator == "turns":
        page.fill("#turns-gamma", "0.9")
    expected = theory.turn_credit(group, estimator, 0.9, 1, 1e-6)
    _, *columns = zip(*table(page, "turns"), strict=True)
    for column, values in zip(columns, expected, strict=True):
        assert [number(cell) for cell in column[: len(values)]] == pytest.approx(values, rel=1e-3, abs=1e-4)
        assert set(column[len(values) :]) <= {"–"}
    page.click("#turns .reset")


@needs_browser
def test_truncation_shows_what_is_kept(published: tuple[Any, list[str]]) -> None:
    page, _ = published
    for key, value in (("exponent", 1.3), ("temperature", 0.8), ("top_k", 20), ("top_p", 0.7), ("min_p", 0.02)):
        page.fill(f"#truncation-{key}", str(value))
    before = theory.zipf_probabilities(50, 1.3, 0.8)
    after = theory.truncated_probabilities(before, 20, 0.7, 0.02)
    kept, mass = page.locator("#truncation dd").all_inner_texts()[:2]
    assert int(kept) == sum(p > 0 for p in after) < 20
    assert number(mass) == pytest.approx(sum(p for p, left in zip(before, after, strict=True) if left > 0), rel=1e-3)
    page.click("#truncation .reset")


# --- a run ------------------------------------------------------------------------------------------------------------


@needs_browser
def test_the_page_opens_at_the_runs_settings(explorer: tuple[Any, list[str]]) -> None:
    page, wrong = explorer
    expected = {
        "surrogate-surrogate": "clip", "surrogate-bounds": "fixed", "surrogate-clip_low": 0.2, "surrogate-clip_high": 0.37,
        "surrogate-dual_clip": 3, "ceiling-high": 0.37, "compounding-first": 0.37, "dynamic-fixed": 0.37, "dynamic-high": 0.2,
        "smoothing-size": 6, "zero-variance-size": 6, "truncation-temperature": 0.9, "truncation-top_p": 1,
        "correction-high": 1.7,
    }  # fmt: skip
    for key, value in expected.items():
        found = page.input_value(f"#{key}")
        assert (found if isinstance(value, str) else float(found)) == value, key
    assert page.inner_text("#run-name") == "run · dapo"
    assert "uses GRPO." in page.inner_text("#advantages .notes") and "TIS" in page.inner_text("#correction .notes")
    assert float(page.input_value("#overlong-limit")) == open_run(page_run(page)).recipe["rollouts"]["max_tokens"]
    assert wrong == []


def page_run(page: Any) -> Path:
    return Path(page.url.removeprefix("file://")).parent / "run"


@needs_browser
def test_another_recorded_step_can_be_chosen(explorer: tuple[Any, list[str]]) -> None:
    page, wrong = explorer
    assert page.locator("#step option").all_inner_texts() == ["1", "2", "3"]
    seen = set()
    for step in (1, 2, 3):
        page.select_option("#step", label=str(step))
        shown = made.shown_step(step, open_run(page_run(page)).tokens(step))
        assert f"{len(shown['p'])} tokens of step {step}" in page.inner_text("#dots")
        place, _ = places(page, "ceiling-plot")
        dots = page.locator("#ceiling-plot .dot").evaluate_all(
            "all => all.map(d => [+d.getAttribute('cx'), +d.getAttribute('cy')])"
        )
        expected = [place(p, min(1, p * ratio)) for p, ratio in zip(shown["p"], shown["ratio"], strict=True)]
        assert dots == [pytest.approx(dot, abs=0.01) for dot in expected]
        assert page.locator("#correction-plot .dot").count() > 50
        rewards = [number(part) for part in page.input_value("#advantages-rewards").split(",")]
        assert rewards == pytest.approx(shown["rewards"][0], rel=1e-3) and f"step {step}" in page.inner_text("#advantages .notes")
        seen.add(json.dumps(dots))
    assert len(seen) == 3 and wrong == []


@pytest.mark.parametrize("name", ["gspo", "dcpo", "cispo", "sapo", "gmpo", "vespo", "rloo", "ppo", "dr_grpo"])
@needs_browser
def test_runs_of_other_algorithms(name: str, browser: Any, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    start, end = recipe.index("[algorithm]"), recipe.index("\n[", recipe.index("[algorithm]"))
    (tmp_path / "run" / "recipe.toml").write_text(f'{recipe[:start]}[algorithm]\nname = "{name}"\n\n{recipe[end:]}')
    (tmp_path / "run" / "segments.jsonl").unlink()  # which has the settings that the run had
    groupwise("explore", str(tmp_path / "run"), "--out", str(tmp_path / "x.html"), "--no-open")
    page, wrong = opened(browser, tmp_path / "x.html", viewport={"width": 390, "height": 800}, locale="en-US")
    settings = gw.named(name).settings()
    assert page.input_value("#surrogate-surrogate") == settings["surrogate"]
    for key in ("clip_low", "clip_high", "ratio_cap", "dual_clip", "gate_positive", "divergence_limit"):
        if settings.get(key) is not None:
            control = "cispo_cap" if (name, key) == ("cispo", "ratio_cap") else key
            assert float(page.input_value(f"#surrogate-{control}")) == pytest.approx(settings[key]), key
    own = {"gspo": "GRPO", "dcpo": "DCPO", "rloo": "RLOO", "dr_grpo": "Dr.GRPO", "ppo": ""}.get(name, "GRPO")
    assert page.inner_text("#advantages .notes").startswith(f"The run uses {own}." if own else "The rewards")
    assert illegible(page) == [] and wrong == []
    page.context.close()


HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><!--\u202e{step} $x_{0}$ \x07'
    + "x" * 1_000_000
)


@needs_browser
def test_hostile_text_of_a_run_is_shown_as_text(browser: Any, run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=hacked=1>\u202e$x$ {step}"
    shutil.copytree(run, hostile)
    (hostile / "segments.jsonl").unlink()  # which has the settings that the run had
    text = json.dumps(HOSTILE)
    recipe = (hostile / "recipe.toml").read_text().replace('name = "dapo"', f"name = {text}", 1)
    for key in ("surrogate", "bounds", "correction"):
        old = {"surrogate": "clip", "bounds": "fixed", "correction": "tis"}[key]
        recipe = recipe.replace(f'{key} = "{old}"', f"{key} = {text}", 1)
    (hostile / "recipe.toml").write_text(
        recipe.replace("group_size = 6", "group_size = 1000000").replace("correction_high = 1.7", "correction_high = inf")
    )
    groupwise("explore", str(hostile), "--out", str(tmp_path / "x.html"), "--no-open")
    page, wrong = opened(browser, tmp_path / "x.html", viewport={"width": 390, "height": 800}, locale="en-US")
    assert page.evaluate("window.hacked") is None and page.locator("img, #run-name > *").count() == 0
    assert "</script>" in page.inner_text("#run-name") and "</script>" in page.inner_text("#surrogate .notes")
    assert "\\u202e" in page.inner_text("#run-name") and len(page.inner_text("#run-name")) < 300
    assert not {"\u202e", "\x07"} & set(page.inner_text("main"))
    assert float(page.input_value("#correction-high")) == 2
    assert illegible(page) == [] and wrong == []
    page.context.close()


# --- reading and operating it -----------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_no_text_is_small_cut_off_or_covered(width: int, locale: str, browser: Any, run: Path, explorer: Any) -> None:
    for path in (PUBLISHED, run.parent / "explorer.html"):
        page, wrong = opened(browser, path, viewport={"width": width, "height": 900}, locale=locale, color_scheme="dark")
        assert page.get_attribute("html", "data-theme") == "dark"
        assert page.get_attribute("html", "lang") == {"en-US": "en", "zh-CN": "zh-Hans"}[locale]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert illegible(page) == []
        assert page.locator("svg[role=img]").count() == 14
        scrolling = "all => all.filter(box => box.scrollWidth > box.clientWidth).length"
        assert page.locator(".scroll").evaluate_all(scrolling) == 0, "a table hides a column"
        for surrogate in PARTS["surrogate"] if width == 390 and path == PUBLISHED else ():
            page.select_option("#surrogate-surrogate", surrogate)
            assert illegible(page) == []
        assert curves_outside(page) == [] and wrong == []
        page.context.close()


def curves_outside(page: Any) -> list[str]:
    """Plots with a curve, dot or marker outside their axes."""
    found = []
    for plot in page.locator("svg[role=img]").evaluate_all("all => all.map(svg => svg.id)"):
        _, box = places(page, plot)
        circles = page.locator(f"#{plot} circle").evaluate_all(
            "all => all.map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
        )
        drawn = points(page, plot)
        assert drawn, plot
        right, bottom = box["width"] - box["right"], box["height"] - box["bottom"]
        if not all(
            box["left"] - 0.1 <= x <= right + 0.1 and box["top"] - 0.1 <= y <= bottom + 0.1 for x, y in [*drawn, *circles]
        ):
            found.append(plot)
    return found


@needs_browser
def test_curves_stay_inside_their_plots_wherever_the_sliders_are(browser: Any) -> None:
    page, wrong = opened(browser, PUBLISHED, viewport={"width": 1024, "height": 900}, locale="en-US")
    draw = random.Random(0)
    sliders = page.locator("input[type=range]")
    move = (
        "(all, at) => all.forEach((e, i) => {e.value = +e.min + at[i] * (e.max - e.min); e.dispatchEvent(new Event('input')); })"
    )
    for _ in range(6):
        sliders.evaluate_all(move, [draw.choice([0, 1, draw.random()]) for _ in range(sliders.count())])
        for select in page.locator("#panels select").all():
            if not select.is_visible():
                continue
            select.select_option(draw.choice(select.locator("option").evaluate_all("all => all.map(option => option.value)")))
        assert curves_outside(page) == [] and illegible(page) == []
        assert "NaN" not in page.inner_text("main") and "undefined" not in page.inner_text("main")
    assert wrong == []
    page.context.close()


@needs_browser
def test_the_check_of_legibility_finds_what_it_is_for(browser: Any, tmp_path: Path) -> None:
    plain = '<!doctype html><meta name="viewport" content="width=device-width"><body style="font: 16px sans-serif">'
    words, picture = "word " * 100, '<svg width="60" height="40" style="overflow: visible">'
    faults = {
        "9 px: small": '<p style="font-size: 9px">small</p>',
        "beyond the page: long": f'<p style="white-space: nowrap">long {words}</p>',
        "cut off: cut": f'<p style="overflow: hidden; width: 60px; white-space: nowrap">cut {words}</p>',
        "cut off by its plot: tick": f'{picture}<text x="50" y="20">tick</text></svg>',
        "cut off in a list: an option": '<select style="width: 60px; font: inherit"><option>an option that is long</select>',
        "overlap: over | under": '<p style="margin: 0">over</p><p style="margin: -14px 0">under</p>',
    }
    for name, html in faults.items():
        (tmp_path / "page.html").write_text(plain + html)
        page, _ = opened(browser, tmp_path / "page.html", viewport={"width": 390, "height": 700})
        assert [item for item in illegible(page) if item.startswith(name)], name
        page.context.close()
    (tmp_path / "page.html").write_text(plain + "<h1>title</h1><p>text<sub>sub</sub> and<br>more</p>")
    page, _ = opened(browser, tmp_path / "page.html", viewport={"width": 390, "height": 700})
    assert illegible(page) == []
    page.evaluate("document.body.append(document.createElement('button'))")
    assert any("button" in item for item in inaccessible(page)), "axe would not notice a button without a name"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: str, browser: Any, explorer: Any, run: Path) -> None:
    page, _ = opened(browser, run.parent / "explorer.html", viewport={"width": 1024, "height": 900}, color_scheme=scheme)
    assert inaccessible(page) == []
    page.context.close()


@needs_browser
def test_every_control_is_reached_and_moved_by_keys(browser: Any) -> None:
    page, wrong = opened(browser, PUBLISHED, viewport={"width": 1024, "height": 900}, locale="en-US")
    wanted = "[...document.querySelectorAll('a, button, input, select, [tabindex=\"0\"]')].filter(e => e.checkVisibility())"
    page.evaluate(f"window.reached = new Set(); window.wanted = {wanted}")
    for _ in range(page.evaluate("wanted.length") + 2):
        page.keyboard.press("Tab")
        page.evaluate("reached.add(document.activeElement)")
    assert page.evaluate("wanted.filter(e => !reached.has(e)).map(e => e.outerHTML)") == []
    for slider in page.locator("input[type=range]:visible").all():
        before = slider.input_value()
        slider.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight") if slider.input_value() != before else page.keyboard.press("ArrowLeft")
        assert slider.input_value() != before, slider.get_attribute("id")
    page.focus("#surrogate-surrogate")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#surrogate-surrogate") == "policy_gradient"
    page.focus("#theme")
    theme = page.get_attribute("html", "data-theme")
    page.keyboard.press("Enter")
    assert page.get_attribute("html", "data-theme") != theme and wrong == []
    page.context.close()


@needs_browser
def test_the_explorer_has_two_languages_and_takes_dragging(published: tuple[Any, list[str]]) -> None:
    page, wrong = published
    page.click("#language")
    assert "裁剪上界" in page.inner_text("#ceiling h2") and "通过率" in page.inner_text("#zero-variance p")
    page.click("#language")
    page.locator("#ceiling-plot").scroll_into_view_if_needed()
    box = page.locator("#ceiling-plot").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert 0.6 < float(page.input_value("#ceiling-q")) < 0.8 and wrong == []


@needs_browser
def test_signs_of_mathematics_are_typeset(published: tuple[Any, list[str]]) -> None:
    page, _ = published
    ticks = page.locator("svg[role=img] text").all_text_contents()
    assert any(tick.startswith("−") for tick in ticks) and not any("-" in tick or "e" in tick for tick in ticks)
    assert (
        page.locator("#ceiling dt sub").first.inner_text() == "old"
        and "_{" not in page.inner_text("main")
        and "$" not in page.inner_text("main")
    )
    dashes = "all => all.map(line => getComputedStyle(line).strokeDasharray)"
    assert page.locator("#ceiling .swatch line").evaluate_all(dashes) == page.locator("#ceiling-plot path.curve").evaluate_all(
        dashes
    )
    assert page.locator("#ceiling .swatch line").evaluate_all(dashes)[1] != "none"


def test_every_word_of_the_page_is_used() -> None:
    script = made.asset("explorer_figures.js") + made.asset("explorer.js")
    for figure, entries in made.tomllib.loads(made.asset("explorer_text.toml")).items():
        for key in entries:
            stem = key.removeprefix("formula_").removeprefix("weights_")
            assert f'"{stem}"' in script or (figure, key[0]) == ("smoothing", "v"), f"{figure}.{key}"


def test_a_run_without_tokens_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tokens"))
    assert "training.tokens_every" in groupwise("explore", str(tmp_path / "run"), "--no-open", code=2)
    assert "--out" in groupwise("explore", "--no-open", "--out", str(run / "recipe.toml" / "x.html"), code=2)


def test_a_damaged_step_is_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for step, left in ((2, [1, 3]), (1, [3])):
        (tmp_path / "run" / "tokens" / f"step-{step:06d}.parquet").write_bytes(b"PAR1")
        assert [shown["step"] for shown in made.shown_run(open_run(tmp_path / "run"))["steps"]] == left
    (tmp_path / "run" / "tokens" / "step-000003.parquet").write_bytes(b"")
    assert "none of its files can be read" in groupwise("explore", str(tmp_path / "run"), "--no-open", code=2)


def test_the_published_explorer_is_up_to_date(tmp_path: Path) -> None:
    groupwise("explore", "--out", str(tmp_path / "explorer.html"), "--no-open")
    assert (tmp_path / "explorer.html").read_text() == PUBLISHED.read_text(), "run: groupwise explore --out docs/explorer.html"
    assert PUBLISHED.stat().st_size < 120_000
