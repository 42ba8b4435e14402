"""Reports name the fault of runs made to fail, and the pages are checked in a real browser."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import groupwise as gw
from groupwise.algorithms import theory
from groupwise.cli import app
from groupwise.evidence.findings import findings
from groupwise.evidence.reading import RENAMED
from groupwise.evidence.runs import Run, by_setting, open_run
from groupwise.evidence.statistics import interval, paired

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
QUICK = ["--set", "training.eval_problems=100", "--set", "training.eval_every=6", "--set", "training.steps=12"]


def groupwise(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small runs: two seeds of DAPO and one of GRPO."""
    home = tmp_path_factory.mktemp("healthy")
    runs = [home / "dapo-0", home / "dapo-1", home / "grpo-0"]
    for run in runs:
        name, seed = run.name.split("-")
        groupwise("train", "quick", *QUICK, "--set", f"seed={seed}", "--set", f"algorithm.name={name}", "--out", str(run))
    return runs


@pytest.fixture(scope="module")  # while playwright is open an event loop runs in this thread, and asyncio.run() of others fails
def browser() -> Iterator[Any]:
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


def test_intervals_by_hand() -> None:
    """Three values with mean 2 and standard deviation 1: the half-width is 4.30 / sqrt(3) = 2.483."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, round(found.half, 3)) == (2.0, 2.483)
    assert str(interval([0.5])) == "0.500"
    shared_noise = paired([1.0, 5.0, 9.0], [2.0, 6.1, 9.9])
    assert shared_noise.excludes_zero and round(shared_noise.mean, 3) == 1.0


def test_metrics_and_tokens_of_a_run(healthy: list[Path]) -> None:
    run = open_run(healthy[0])
    assert [record["step"] for record in run.steps] == list(range(1, 13))
    last = run.steps[-1]
    for name in (
        "spread/token",
        "spread/sequence",
        "utilisation/effective",
        "reward/part/task",
        "reward/part/overlong",
        "length/finished",
    ):
        assert isinstance(last[name], float), name
    assert last["utilisation"] <= 1 and last["utilisation/effective"] <= last["utilisation"] + 1e-9
    assert run.token_steps() == [1, 12]
    table = pq.read_table(healthy[0] / "tokens" / "step-000012.parquet").to_pylist()
    run_rows = [token for token in table if token["ratio"] is not None]
    assert run_rows and {token["row"] for token in table} == set(range(16 * 8))
    for token in run_rows[:500]:
        assert token["ratio"] == pytest.approx(2.718281828 ** (token["logprob"] - token["old_logprob"]), rel=1e-4)
        outside = (token["ratio"] > token["high"] and token["advantage"] > 0) or (
            token["ratio"] < token["low"] and token["advantage"] < 0
        )
        assert token["clipped"] == outside
    assert sum(last["by_probability/tokens"]) == len(run_rows)


def test_metric_names_of_earlier_versions_are_read(healthy: list[Path], tmp_path: Path) -> None:
    run, old = open_run(healthy[0]), tmp_path / "old"
    old.mkdir()
    shutil.copy(healthy[0] / "recipe.toml", old)
    lines = (healthy[0] / "metrics.jsonl").read_text()
    for earlier, name in RENAMED.items():
        assert f'"{name}"' in lines
        lines = lines.replace(f'"{name}"', f'"{earlier}"')
    (old / "metrics.jsonl").write_text(lines)
    assert open_run(old).steps == run.steps


def test_runs_are_grouped_by_the_settings_that_differ(healthy: list[Path]) -> None:
    groups = by_setting([open_run(path) for path in healthy])
    assert {name: len(runs) for name, runs in groups.items()} == {"dapo": 2, "grpo": 1}


@needs_browser
def test_a_report_is_self_contained(healthy: list[Path], browser: Any, tmp_path: Path) -> None:
    page_path = tmp_path / "report.html"
    output = groupwise("report", *map(str, healthy), "--out", str(page_path))
    assert "It learned, in 2 of 2 runs" in output or "It learned, in 1 of 2 runs" in output
    assert page_path.stat().st_size < 5_000_000
    page, wrong = opened(browser, page_path, color_scheme="dark", viewport={"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.dataset.drawn === 'dark'", timeout=20_000)
    assert page.locator("figure svg").count() == page.locator("figure").count() >= 15
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("#theme")
    page.wait_for_function("document.documentElement.dataset.drawn === 'light'")
    tokens = page.locator(".tokens span")
    before = tokens.nth(0).get_attribute("style")
    page.select_option("#quantity", "entropy")
    assert tokens.count() > 50 and tokens.nth(0).get_attribute("style") != before
    assert wrong == []


def test_figures_as_png(healthy: list[Path], tmp_path: Path) -> None:
    groupwise("report", str(healthy[0]), "--format", "png", "--out", str(tmp_path))
    written = {path.name for path in tmp_path.iterdir()}
    assert {"accuracy.png", "entropy.png", "clip-by-probability.png", "spread-length.png"} <= written
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


UNHEALTHY: dict[str, tuple[list[str], str]] = {
    "learning rate 30x": (["learner.learning_rate=1e-2", "learner.max_bad_updates=1000"], "The updates are too large"),
    "clip tiny": (["algorithm.clip_low=1e-4", "algorithm.clip_high=1e-4"], "Many tokens are clipped"),
    "limit too short": (["rollouts.max_tokens=3", "algorithm.overlong_cache=0.0"], "Many completions are truncated"),
}


@pytest.mark.parametrize("fault", UNHEALTHY)
def test_an_unhealthy_run_gets_the_finding_that_names_its_fault(fault: str, tmp_path: Path) -> None:
    settings, title = UNHEALTHY[fault]
    overrides = [part for setting in ["algorithm.name=grpo", "algorithm.beta=0.0", *settings] for part in ("--set", setting)]
    groupwise("train", "quick", *QUICK, *overrides, "--out", str(tmp_path / "run"))
    found = findings(open_run(tmp_path / "run"))
    assert title in [finding.title for finding in found if finding.kind == "unhealthy"], found


def test_a_constant_reward_is_reported(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}+1="}) for i in range(30)))
    (tmp_path / "always.py").write_text("def one(problem, completions):\n    return [1.0 for _ in completions]\n")
    recipe = tmp_path / "recipe.toml"
    task = "[task]\nname='dataset'\npath='data.jsonl'\nreward='always.py:one'\n[algorithm]\nname='grpo'\nbeta=0.0\n"
    sizes = "[rollouts]\ngroup_size=4\nprompts_per_step=4\nmax_tokens=8\n[training]\nsteps=3\neval_problems=3\n"
    recipe.write_text(task + sizes)
    groupwise("train", str(recipe), "--out", str(tmp_path / "run"))
    output = groupwise("report", str(tmp_path / "run"))
    assert "Every completion gets the same reward" in output


def made(**changes: Any) -> Run:
    """A healthy run of ten steps, made up, with some metrics changed: to one value, or to a list of one value per step."""
    metrics: dict[str, Any] = {
        "train/pass_rate": 0.6, "reward/shaped_spread": 0.4, "reward/shaped_mean": 0.2, "approx_kl": 1e-3, "entropy": 0.4,
        "groups/zero_variance": 0.3, "groups/all_correct": 0.2, "groups/all_wrong": 0.1, "utilisation": 0.7,
        "length/truncated": 0.01, "length/mean": 12.0, "skipped_updates": 0.0, "sampler_gap_mean": 1e-6, "spread/token": 0.1,
        "by_probability/tokens": [100.0] * 11, "by_probability/clipped_low": [1.0] * 11,
        "by_probability/clipped_high": [1.0] * 11,
    }  # fmt: skip
    recipe = changes.pop("recipe", {"algorithm": {"name": "grpo"}})
    scores = changes.pop("scores", [0.3, 0.6, 0.8])
    for name, value in changes.items():
        metrics[name.replace("__", "/")] = value
    steps = [
        {
            "step": i + 1,
            **{k: v[i] if isinstance(v, list) and not k.startswith("by_") else v for k, v in metrics.items() if v is not None},
        }
        for i in range(10)
    ]
    evaluations = [{"step": 5 * i, "eval/pass@1": score, "eval_problems": 500.0} for i, score in enumerate(scores)]
    return Run(path=Path("made"), recipe=recipe, steps=steps, evaluations=evaluations)


def titles(run: Run) -> set[str]:
    return {finding.title for finding in findings(run)}


def test_a_healthy_run_is_called_healthy(healthy: list[Path]) -> None:
    assert titles(made()) == {"It learned"}
    for path in healthy:
        assert not [finding for finding in findings(open_run(path)) if finding.kind == "unhealthy"]


def test_rules_stay_silent_where_they_do_not_apply() -> None:
    old = made(**{"reward__shaped_spread": None})
    assert "Every completion gets the same reward" not in titles(old)
    no_right = made(**{"reward__shaped_spread": 0.0, "train__pass_rate": 0.0, "utilisation": 0.0, "scores": [0.0, 0.0]})
    assert "No completion was ever right" in titles(no_right) and "Every completion gets the same reward" not in titles(no_right)
    signal_from_all = made(recipe={"algorithm": {"name": "dcpo"}}, groups__zero_variance=0.8, utilisation=0.99)
    assert "Most groups have zero variance" not in titles(signal_from_all)
    assert "Most groups have zero variance" in titles(made(groups__zero_variance=0.8, utilisation=0.2))
    dynamic_bounds = made(recipe={"algorithm": {"name": "dcpo"}}, **{"by_probability__clipped_high": [50.0] * 11})
    assert "Many tokens are clipped" not in titles(dynamic_bounds)
    assert "There was little to learn" in titles(made(scores=[1.0, 1.0]))
    assert "It got worse" in titles(made(scores=[0.9, 0.84])) and "Accuracy fell after its peak" in titles(
        made(scores=[0.3, 0.9, 0.5])
    )
    assert not titles(made(scores=[0.6, 0.63, 0.66, 0.61])) & {"Accuracy fell after its peak", "It got worse"}
    assert "A few updates were skipped" in titles(made(skipped_updates=1.0))
    looping = made(**{"length__truncated": [0.0] * 3 + [0.9] * 7})
    assert "More and more completions are truncated" in titles(looping)
    assert "Sampler and learner log-probabilities differ" not in titles(
        made(recipe={"rollouts": {"top_p": 0.9, "sampler": "mine.py:Mine"}}, sampler_gap_mean=0.3)
    )
    assert "Sampler and learner log-probabilities differ" in titles(
        made(recipe={"rollouts": {"top_p": 0.9}}, sampler_gap_mean=0.3)
    )
    assert titles(Run(path=Path("made"), recipe={}, steps=[], evaluations=[])) == {"No step was recorded"}
    not_clipped = made(**{"entropy": [0.5] * 4 + [0.01] * 6, "by_probability__clipped_high": [0.0] * 11})
    text = next(finding.text for finding in findings(not_clipped) if finding.title == "Entropy fell")
    assert "clip-higher" not in text


def test_runs_of_every_kind_can_be_reported(tmp_path: Path) -> None:
    """A critic, a reference model, step rewards, masked truncated completions, and a run that records no tokens."""
    kinds = {
        "ppo": ["algorithm.name=ppo"], "kl": ["algorithm.name=grpo"], "process": ["algorithm.name=grpo_process"],
        "masked": ["algorithm.overlong_filter=true", "rollouts.max_tokens=4"],
        "sampler": ["learner.old_logprobs=sampler", "training.tokens_every=0"],
    }  # fmt: skip
    for name, settings in kinds.items():
        overrides = [f"--set={setting}" for setting in ["training.steps=2", "training.eval_problems=10", *settings]]
        groupwise("train", "quick", *overrides, "--out", str(tmp_path / name))
    groupwise("report", *(str(tmp_path / name) for name in kinds), "--out", str(tmp_path / "all.html"))
    masked = pq.read_table(tmp_path / "masked" / "tokens" / "step-000002.parquet").to_pylist()
    left_out = [token for token in masked if not token["trained"]]
    assert left_out and all(token["ratio"] is None and token["clipped"] is None for token in left_out)
    assert all(record["entropy"] > 0 for record in open_run(tmp_path / "sampler").steps)


def test_rungs_of_the_same_name_in_two_ladders_are_not_grouped_by_name(healthy: list[Path], tmp_path: Path) -> None:
    for ladder in ("one", "two"):
        shutil.copytree(healthy[0], tmp_path / ladder / "1-same" / "seed-0")
        (tmp_path / ladder / "ladder.toml").write_text("")
    runs = [open_run(tmp_path / ladder / "1-same" / "seed-0") for ladder in ("one", "two")]
    assert list(by_setting(runs[:1])) == ["same"]
    assert list(by_setting([*runs, runs[0]])) == ["dapo"] and len(by_setting([*runs, runs[0]])["dapo"]) == 2


def test_a_damaged_file_and_a_path_that_cannot_be_written_are_reported(healthy: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(healthy[0], run)
    assert "--out" in groupwise("report", str(run), "--out", str(tmp_path), code=2)
    assert "--out" in groupwise("explore", "--no-open", "--out", str(run / "recipe.toml" / "x.html"), code=2)
    (run / "tokens" / "step-000012.parquet").write_bytes(b"PAR1")
    assert "step-000012.parquet: cannot be read" in groupwise("report", str(run))


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    assert "no recipe.toml" in groupwise("report", str(tmp_path), code=2)
    (tmp_path / "recipe.toml").write_text("seed = 1")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    output = groupwise("report", str(tmp_path))
    assert "metrics.jsonl, line 2: not a JSON object" in output and "No step was recorded" in output


LADDER = """
title = "Two rungs"
recipe = "quick"
cumulative = true
[set]
"training.steps" = 2
"training.eval_problems" = 20
"task.grades" = [1]
[[rungs]]
name = "GRPO"
set = { "algorithm.name" = "grpo" }
paper = 30
[[rungs]]
name = "+ clip-higher"
set = { "algorithm.clip_high" = 0.28 }
paper = 38
"""


def test_a_ladder_runs_every_rung_and_resumes(tmp_path: Path) -> None:
    ladder, out = tmp_path / "two.toml", tmp_path / "out"
    ladder.write_text(LADDER)
    output = groupwise("ablate", str(ladder), "--seeds", "2", "--jobs", "2", "--out", str(out))
    assert "4 runs, 4 of them to do" in output
    table = (out / "ladder.md").read_text()
    assert re.search(r"\| \+ clip-higher \| 2 \| [\d.]+ ± [\d.]+ \| [+-][\d.]+ ± [\d.]+", table) and "| 38 | +8 |" in table
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    second = open_run(out / "2-clip-higher" / "seed-1")
    assert second.seed == 1 and second.recipe["algorithm"]["clip_high"] == 0.28
    shutil.rmtree(out / "2-clip-higher" / "seed-1")
    assert "4 runs, 1 of them to do" in groupwise("ablate", str(ladder), "--seeds", "2", "--out", str(out))
    ladder.write_text(LADDER.replace("0.28", "0.3"))
    assert "another ladder" in groupwise("ablate", str(ladder), "--out", str(out), code=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"algorithm.clip_high" = 0.28', '"algorithm.clip_hi" = 0.28'), "clip_high"),
        (('name = "+ clip-higher"', 'name = "GRPO"'), "two are called 'GRPO'"),
        (('recipe = "quick"', 'recipe = "quik"'), "did you mean 'quick'?"),
        (("cumulative", "cumulativ"), "did you mean 'cumulative'?"),
    ],
)
def test_an_invalid_ladder_is_refused_before_anything_runs(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    ladder = tmp_path / "wrong.toml"
    ladder.write_text(LADDER.replace(*change))
    assert message in groupwise("ablate", str(ladder), "--out", str(tmp_path / "out"), code=2)
    assert not (tmp_path / "out").exists()


def noise(count: int) -> list[float]:
    """The explorer's pseudo-random normal numbers: Lehmer's generator, then the Box-Muller transform."""
    state, numbers = 12345, []
    for _ in range(count):
        pair = []
        for _ in range(2):
            state = state * 16807 % 2147483647
            pair.append(state / 2147483647)
        numbers.append(math.sqrt(-2 * math.log(pair[0])) * math.cos(2 * math.pi * pair[1]))
    return numbers


def ceiling(v: dict[str, float]) -> tuple[float, float]:
    bound = gw.fixed_bounds(torch.tensor([[math.log(v["q"])]], dtype=torch.float64), v["high"], v["high"])[1]
    return v["q"], min(1.0, float(bound) * v["q"])


def compounding(v: dict[str, float]) -> tuple[float, float]:
    return v["n"], theory.probability_after(v["start"], v["n"], v["first"])


def sequence(v: dict[str, float]) -> tuple[float, float]:
    return v["length"], sum(v["bias"] + v["spread"] * z for z in noise(2048)[: int(v["length"])])


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


PANELS: dict[str, tuple[Callable[[dict[str, float]], tuple[float, float]], dict[str, float]]] = {
    "ceiling": (ceiling, {"high": 0.28, "q": 0.45}),
    "compounding": (compounding, {"start": 0.02, "target": 0.5, "first": 0.1, "second": 0.4, "n": 31}),
    "sequence": (sequence, {"length": 1024, "spread": 0.08, "bias": 0.002, "tokenClip": 0.3, "sequenceClip": 0.001}),
    "dynamic": (dynamic, {"low": 0.1, "high": 0.3, "fixed": 0.4, "q": 0.3}),
    "overlong": (overlong, {"limit": 16384, "cache": 8192, "length": 12800}),
    "aggregation": (aggregation, {"first": 640, "second": 1210, "limit": 1000}),
    "smoothing": (smoothing, {"size": 8, "v1": 0.5, "v2": 0.25, "v3": 0.875, "v4": 0.0, "v5": 0.625, "v6": 0.75}),
    "zero-variance": (zero_variance, {"size": 5, "p": 0.35}),
}
"""Panel id -> (the library's closed form for the panel's marker, a value to set for each of its sliders)."""


@pytest.fixture(scope="module")
def explorer(browser: Any, healthy: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    groupwise("explore", str(healthy[0]), "--out", str(path), "--no-open")
    return opened(browser, path, locale="en-US", viewport={"width": 900, "height": 800})


@needs_browser
@pytest.mark.parametrize("name", PANELS)
def test_every_slider_moves_the_marker_and_the_curve_to_the_closed_form(name: str, explorer: tuple[Any, list[str]]) -> None:
    page, wrong = explorer
    expected, changes = PANELS[name]
    sliders = page.locator(f"#{name} input[type=range]")
    values = {s.get_attribute("id").removeprefix(f"{name}-"): float(s.input_value()) for s in sliders.all()}
    assert values.keys() == changes.keys()

    def check() -> None:
        x, y = expected(values)
        box = {
            key: float(value) for key, value in page.evaluate(f"({{...document.querySelector('#{name} svg').dataset}})").items()
        }
        px = box["left"] + (x - box["x0"]) / (box["x1"] - box["x0"]) * (box["width"] - box["left"] - box["right"])
        py = (
            box["height"]
            - box["bottom"]
            - (y - box["y0"]) / (box["y1"] - box["y0"]) * (box["height"] - box["top"] - box["bottom"])
        )
        marker = page.locator(f"#{name} .marker")
        assert float(marker.get_attribute("cx")) == pytest.approx(px, abs=0.6)
        assert float(marker.get_attribute("cy")) == pytest.approx(py, abs=0.6)
        points = [
            tuple(map(float, point.split(",")))
            for d in page.locator(f"#{name} .curve").evaluate_all("paths => paths.map(p => p.getAttribute('d'))")
            for point in re.split("[ML]", d)[1:]
        ]
        step = (box["width"] - box["left"] - box["right"]) / 200
        assert min(abs(a - px) / step + abs(b - py) / 8 for a, b in points) < 1.5  # a curve passes the marker

    check()
    for key, value in changes.items():
        drawn_before = page.locator(f"#{name}").inner_html()
        page.fill(f"#{name}-{key}", str(value))
        values[key] = value
        check()
        assert page.locator(f"#{name}").inner_html() != drawn_before, f"{key} changes nothing"
    assert wrong == []


@needs_browser
def test_the_explorer_has_two_languages_and_takes_keys_and_dragging(explorer: tuple[Any, list[str]]) -> None:
    page, _ = explorer
    assert "tokens of your run" in page.inner_text("#run") and page.locator("#ceiling .dot").count() > 50
    page.click("#language")
    assert "裁剪上界" in page.inner_text("#ceiling h2") and "通过率" in page.inner_text("#zero-variance p")
    page.click("#language")
    page.focus("#zero-variance-size")
    before = page.input_value("#zero-variance-size")
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#zero-variance-size")) == float(before) + 1
    page.locator("#ceiling svg").scroll_into_view_if_needed()
    box = page.locator("#ceiling svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert 0.6 < float(page.input_value("#ceiling-q")) < 0.8
    theme = page.get_attribute("html", "data-theme")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != theme


@needs_browser
def test_the_explorer_fits_a_phone(browser: Any) -> None:
    published = Path(__file__).parent.parent / "docs" / "explorer.html"
    page, wrong = opened(browser, published, viewport={"width": 360, "height": 740}, color_scheme="dark", locale="zh-CN")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.get_attribute("html", "data-theme") == "dark" and page.get_attribute("html", "lang") == "zh"
    assert wrong == []


def test_the_published_explorer_is_up_to_date(tmp_path: Path) -> None:
    groupwise("explore", "--out", str(tmp_path / "explorer.html"), "--no-open")
    published = Path(__file__).parent.parent / "docs" / "explorer.html"
    assert (tmp_path / "explorer.html").read_text() == published.read_text(), "run: groupwise explore --out docs/explorer.html"
