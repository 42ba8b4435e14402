"""Reports name the fault of runs made to fail, and the pages are checked in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.evidence.findings import findings
from groupwise.evidence.naming import grouped, run_names
from groupwise.evidence.records import RENAMED, Records
from groupwise.evidence.runs import Run, open_run
from groupwise.evidence.statistics import interval
from tests.pages import chromium, needs_browser, opened

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def test_intervals_by_hand() -> None:
    """Three values with mean 2 and standard deviation 1: the half-width is 4.303 / sqrt(3) = 2.484."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, round(found.half, 3)) == (2.0, 2.484)
    assert str(interval([0.5])) == "0.500"
    assert str(interval([0.4, 0.6])) == "0.500"


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
    groups = grouped(open_run(path) for path in healthy)
    assert {group.name: len(group.runs) for group in groups} == {"dapo": 2, "grpo": 1}
    assert list(run_names(groups).values()) == ["dapo-0 · dapo", "dapo-1 · dapo", "grpo-0 · grpo"]


@needs_browser
def test_a_report_is_self_contained(healthy: list[Path], browser: Any, tmp_path: Path) -> None:
    page_path = tmp_path / "report.html"
    output = groupwise("report", *map(str, healthy), "--out", str(page_path))
    assert "dapo: It learned, in 2 of 2 runs" in output or "dapo: It learned, in 1 of 2 runs" in output
    assert page_path.stat().st_size < 5_000_000
    page, wrong = opened(browser, page_path, color_scheme="dark", viewport={"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.dataset.drawn === '1'", timeout=20_000)
    assert page.locator("h1").inner_text() == "dapo | grpo"
    assert page.locator(".tile").count() == 6 and page.locator("#summary tbody tr").count() >= 2
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.click("#language")
    assert page.locator("#findings h2").inner_text() == "诊断" and page.locator("#contents a").count() >= 4
    page.click("#recipes summary >> nth=0")
    assert "[algorithm]" in page.locator("#recipes pre").inner_text()
    assert wrong == []


def test_figures_as_png(healthy: list[Path], tmp_path: Path) -> None:
    groupwise("report", str(healthy[0]), "--format", "png", "--out", str(tmp_path))
    written = {path.name for path in tmp_path.iterdir()}
    assert {"accuracy.png", "entropy.png", "clip-by-probability.png", "spread-length.png"} <= written
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_an_unhealthy_run_gets_the_finding_that_names_its_fault(tmp_path: Path) -> None:
    """From its training to its report; tests/test_findings.py has the recorded metrics of twelve such runs."""
    settings = ["algorithm.name=grpo", "algorithm.beta=0.0", "algorithm.clip_low=1e-4", "algorithm.clip_high=1e-4"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    groupwise("train", "quick", *QUICK, *overrides, "--out", str(tmp_path / "run"))
    found = findings(open_run(tmp_path / "run"))
    assert "Many tokens are clipped" in [finding.title.en for finding in found if finding.kind == "unhealthy"], found


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
    return Run(path=Path("made"), recipe=recipe, steps=Records(steps), evaluations=Records(evaluations))


def titles(run: Run) -> set[str]:
    return {finding.title.en for finding in findings(run)}


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
    assert titles(Run(path=Path("made"), recipe={}, steps=Records(), evaluations=Records())) == {"No step was recorded"}
    not_clipped = made(**{"entropy": [0.5] * 4 + [0.01] * 6, "by_probability__clipped_high": [0.0] * 11})
    text = next(finding.text.en for finding in findings(not_clipped) if finding.title.en == "Entropy fell")
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
        (tmp_path / ladder / "ladder.toml").write_text('rungs = [{ name = "Same" }]')
        (tmp_path / ladder / "plan.json").write_text("{}")
    runs = [open_run(tmp_path / ladder / "1-same" / "seed-0") for ladder in ("one", "two")]
    assert [group.name for group in grouped(runs[:1])] == ["Same"]
    (group,) = grouped([*runs, runs[0]])
    assert group.name == "dapo" and len(group.runs) == 2
    assert list(run_names([group]).values()) == ["one/1-same/seed-0 · dapo", "two/1-same/seed-0 · dapo"]


def test_a_damaged_file_and_a_path_that_cannot_be_written_are_reported(healthy: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(healthy[0], run)
    assert "--out" in groupwise("report", str(run), "--out", str(tmp_path), code=2)
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
    assert re.search(r"\| \+ clip-higher \| 2 \| [\d.]+ \| [+-][\d.]+ \|", table) and "| 38 | +8 |" in table
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
