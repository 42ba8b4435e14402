"""Reports of runs that are half-written, damaged, resumed with other settings, or very long."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.config import Recipe, dump
from groupwise.config.effects import BY_ROUNDING, effect
from groupwise.config.loading import apply_override, parse_toml
from groupwise.errors import UserError
from groupwise.evidence.findings import findings
from groupwise.evidence.naming import differences, grouped
from groupwise.evidence.runs import open_run
from groupwise.experiments.ladder import overrides
from tests.pages import data_of

RECIPE = Recipe().model_dump(by_alias=True)


def groupwise(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def with_rate(rate: float) -> dict[str, Any]:
    return {**RECIPE, "learner": {**RECIPE["learner"], "learning_rate": rate}}


def write(path: Path, records: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of forty steps, written by hand."""
    path = tmp_path / "run"
    (path / "rollouts").mkdir(parents=True)
    (path / "tokens").mkdir()
    (path / "recipe.toml").write_text(dump(RECIPE))
    records: list[dict[str, Any]] = [{"step": 0, "eval/pass@1": 0.2, "eval_problems": 100.0}]
    for step in range(1, 41):
        metrics = {"entropy": 0.5, "reward/shaped_spread": 0.4, "utilisation": 0.7, "groups/mixed": 0.5, "grad_norm": 1.0}
        records.append({"step": step, "reward/mean": step / 40, "by_probability/tokens": [1.0] * 11, **metrics})
    records.append({"step": 40, "eval/pass@1": 0.7, "eval_problems": 100.0})
    write(path / "metrics.jsonl", records)
    right = [True] * 3 + [False] * 3
    tokens: dict[str, list[Any]] = {
        **{"group": [0] * 6, "row": [0, 0, 0, 1, 1, 1], "position": [0, 1, 2] * 2, "token": [5] * 6},
        **{"prompt": ["1+1="] * 6, "text": ["2"] * 6, "stop": ["stop"] * 6, "correct": right, "clipped": [False] * 6},
        **{"reward": [float(item) for item in right], "advantage": [1.0 if item else -1.0 for item in right]},
        **{"old_logprob": [-0.5] * 6, "ratio": [1.1] * 6, "entropy": [0.5] * 6},
    }
    pq.write_table(pa.table(tokens), path / "tokens" / "step-000001.parquet")
    return path


def segment(first: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "segment": 0,
        "first_step": first,
        "started": "2026-01-02T03:04:05",
        "groupwise": "1.0",
        "recipe": with_rate(rate),
        **more,
    }


def test_steps_are_not_labelled_with_settings_that_they_were_not_run_with(run: Path, tmp_path: Path) -> None:
    """The learning rate of the recipe holds from step 31 on; the tables of segments and of differing settings say so."""
    (run / "recipe.toml").write_text(dump(with_rate(1e-5)))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    write(run / "segments.jsonl", [segment(1, 1e-4), segment(31, 1e-5)])
    groups = grouped([open_run(run), open_run(other)])
    assert [group.name for group in groups] == ["run · dapo", "other · dapo"]
    found = differences(groups)
    assert found["keys"] == ["learner.learning_rate"]
    assert [row["values"] for row in found["rows"]] == [["0.0001, then 1e-05 from step 31"], ["1e-05"]]
    groupwise("report", str(run))
    shown = data_of(run / "report.html")
    assert shown["differences"]["rows"][0]["values"] == ["0.0001, then 1e-05 from step 31"]
    first, second = shown["segments"]
    assert second["changed"] == ["learner.learning_rate: 0.0001 → 1e-05"] and first["started"] == "2026-01-02 03:04:05"


def test_a_segment_that_a_resume_undid_is_passed_over(run: Path) -> None:
    """Resumed at 31 with 1e-3, then again from 25 with 1e-5: steps 25 to 40 are of the latter, and none is of the former."""
    write(run / "segments.jsonl", [segment(1, 1e-4), segment(31, 1e-3), segment(25, 1e-5)])
    assert open_run(run).course == {"learner.learning_rate": "0.0001, then 1e-05 from step 25"}
    write(run / "segments.jsonl", [segment(1, 1e-4), segment(31, 1e-3), segment(25, 1e-4)])
    assert open_run(run).course == {}


def test_a_resume_that_did_no_step_labels_none(run: Path) -> None:
    (run / "recipe.toml").write_text(dump(with_rate(1e-5)))
    write(run / "segments.jsonl", [segment(1, 1e-4), segment(41, 1e-5)])
    opened = open_run(run)
    assert opened.course == {} and opened.recipe["learner"]["learning_rate"] == 1e-4


def test_segments_without_whole_recipes_say_what_changed(run: Path) -> None:
    first, second = (
        {"first_step": 1},
        {"first_step": 11, "changed": {"rollouts.group_size": [16, 8], "training.keep_checkpoints": [2, 3]}},
    )
    write(run / "segments.jsonl", [first, second])
    assert open_run(run).course == {"rollouts.group_size": "16, then 8 from step 11"}


def test_events_are_listed_and_findings_agree_with_them(run: Path) -> None:
    collapse = {"kind": "warning", "name": "entropy_collapse", "text": "entropy fell to <0.01>", "advice": "raise clip_high"}
    write(
        run / "events.jsonl", [{"step": 12, **collapse}, {"step": 14, **collapse}, {"step": 3, "kind": "note", "text": "resumed"}]
    )
    found = {finding.title.en: finding for finding in findings(open_run(run))}["Warnings were noted while it ran"]
    assert found.kind == "watch" and found.text.en == "Entropy fell to <0.01> (step 12 and 1 more). Raise clip_high."
    groupwise("report", str(run))
    noted = data_of(run / "report.html")["events"]
    assert [(event["step"], event["kind"]) for event in noted] == [(3, "note"), (12, "warning"), (14, "warning")]
    assert noted[1]["text"] == "entropy fell to <0.01>" and noted[1]["advice"] == "raise clip_high"


def test_settings_that_a_resume_may_change_without_another_result_split_no_seeds(run: Path, tmp_path: Path) -> None:
    """What the trainer calls harmless, or rounding, on a resume is no other setup in a report; with the cosine schedule more
    steps are another learning rate at each."""
    longer = {**RECIPE["training"], "steps": 80, "keep_checkpoints": 9}

    def label(schedule: str) -> list[str]:
        learner = {**RECIPE["learner"], "schedule": schedule}
        rounded = {**learner, "micro_batch_tokens": 999}
        other = {**RECIPE, "seed": 1, "learner": rounded, "training": longer}
        (run / "recipe.toml").write_text(dump({**other, "seed": 0}))
        segments = [
            {"first_step": 1, "recipe": {**RECIPE, "learner": learner}},
            {"first_step": 21, "recipe": {**other, "seed": 0}},
        ]
        write(run / "segments.jsonl", segments)
        second = tmp_path / f"second-{schedule}"
        shutil.copytree(run, second)
        (second / "recipe.toml").write_text(dump(other))
        write(second / "segments.jsonl", [{"first_step": 1, "recipe": other}])
        return [group.name for group in grouped([open_run(run), open_run(second)])]

    assert label("constant") == ["dapo"]
    assert len(label("cosine")) == 2


def test_the_trainer_and_the_report_ask_one_table(run: Path) -> None:
    for key, value in {
        "training.eval_every": 7,
        "model.compile": True,
        "training.eval_problems": 3,
        "learner.learning_rate": 1.0,
    }.items():
        table, name = key.split(".")
        new = {**RECIPE, table: {**RECIPE[table], name: value}}
        write(run / "segments.jsonl", [{"first_step": 1, "recipe": RECIPE}, {"first_step": 21, "recipe": new}])
        assert (key in open_run(run).course) == (effect(key, new) not in ("", BY_ROUNDING))


@pytest.mark.parametrize("damage", ["", "[learner\nlearning_", "\x00" * 50, None], ids=["empty", "cut short", "nulls", "missing"])
def test_segments_say_the_settings_where_the_recipe_cannot(damage: str | None, run: Path) -> None:
    write(run / "segments.jsonl", [segment(1, 1e-4)])
    whole = (run / "recipe.toml").read_bytes()
    (run / "recipe.toml").unlink()
    if damage is not None:
        (run / "recipe.toml").write_text(damage)
    opened = open_run(run)
    assert opened.recipe["learner"]["learning_rate"] == 1e-4
    (line,) = opened.left_out
    assert line.startswith("recipe.toml: ") and line.endswith("; the settings are those that segments.jsonl holds")
    assert str(run) not in line
    findings(opened)
    (run / "segments.jsonl").unlink()
    if damage != "":
        with pytest.raises(UserError, match="recipe"):  # nothing says what was trained
            open_run(run)
    (run / "recipe.toml").write_bytes(whole)
    assert list(open_run(run).left_out) == []


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "a line that is no object": ("metrics.jsonl", b"5\nnull\n[1]\n", "metrics.jsonl, line 43 and 2 more: not a JSON object"),
    "deep nesting": ("metrics.jsonl", b"[" * 10_000 + b"\n", "not a JSON object"),
    "thousands of digits": ("metrics.jsonl", b'{"step": ' + b"9" * 5000 + b"}\n", "not a JSON object"),
    "a step that is text": ("metrics.jsonl", b'{"step": "1", "reward/mean": 1}\n', "has no step"),
    "a negative step": ("metrics.jsonl", b'{"step": -1, "reward/mean": 1}\n', "has no step"),
    "a step beyond all": ("metrics.jsonl", b'{"step": 1e300, "reward/mean": 1}\n', "has no step"),
    "not UTF-8": ("metrics.jsonl", b'{"step": 3, "x\xff": 1}\n', "not a JSON object"),
    "a metric that is text": ("metrics.jsonl", b'{"step": 41, "reward/mean": 1, "entropy": "high"}\n', "'entropy' is not what"),
    "bins of another number": ("metrics.jsonl", b'{"step": 41, "reward/mean": 1, "by_probability/tokens": [1]}\n', "by_prob"),
    "an event that is none": ("events.jsonl", b"{}\n", "events.jsonl, line 1: has no step"),
    "a segment that is none": ("segments.jsonl", b"null\n", "segments.jsonl, line 1: not a JSON object"),
    "tokens cut short": ("tokens/step-000001.parquet", b"", "tokens/step-000001.parquet: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_left_out_and_named(name: str, run: Path) -> None:
    file, added, said = DAMAGE[name]
    before = (run / file).read_bytes() if (run / file).exists() else b""
    (run / file).write_bytes(before + added if added else before[:-20])
    opened = open_run(run)
    for step in opened.token_steps():
        opened.readable_tokens(step)
    findings(opened)
    assert any(said in line for line in opened.left_out)
    assert opened.evaluations[-1]["eval/pass@1"] == 0.7


def test_a_report_of_all_damage_at_once_says_what_it_left_out(run: Path) -> None:
    for file, added, _ in DAMAGE.values():
        before = (run / file).read_bytes() if (run / file).exists() else b""
        (run / file).write_bytes(before + added if added else before[:-20])
    output = groupwise("report", str(run))
    assert f"left out of {run}: metrics.jsonl, line 43" in output and "step-000001.parquet: cannot be read" in output
    assert any("metrics.jsonl, line 43" in line for line in data_of(run / "report.html")["left_out"])


def test_a_last_line_that_a_kill_cut_short_is_no_damage(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    assert list(open_run(run).left_out) == []


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("", "recipe.toml: is empty"),
        ("[algorithm]\nname = 5\n", "algorithm.name = 5"),
        ("learner = 2\n", "learner = 2"),
        ("[training]\neval_problems = 'many'\n", "training.eval_problems = 'many'"),
    ],
)
def test_settings_that_cannot_be_meant_are_left_out(recipe: str, said: str, run: Path) -> None:
    (run / "recipe.toml").write_text(recipe)
    opened = open_run(run)
    findings(opened)
    grouped([opened])
    assert any(said in line for line in opened.left_out)


def test_settings_of_later_versions_stay(run: Path) -> None:
    (run / "recipe.toml").write_text(dump({**RECIPE, "future": {"warp": 9}}))
    opened = open_run(run)
    assert list(opened.left_out) == [] and opened.recipe["future"] == {"warp": 9}


def test_a_run_that_has_just_begun(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "No step was recorded" in groupwise("report", str(run))
    shutil.rmtree(run / "rollouts")
    assert "not a run directory" in groupwise("report", str(run), code=2)


def test_a_report_of_many_steps_is_small_and_soon_there(run: Path) -> None:
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    write(run / "metrics.jsonl", ({**record, "step": step, "reward/mean": step % 7} for step in range(1, 10_001)))
    began = time.monotonic()
    groupwise("report", str(run))
    assert time.monotonic() - began < 30
    assert (run / "report.html").stat().st_size < 5_000_000


def test_a_ladders_values_reach_the_recipe_as_they_are_written() -> None:
    """Tables, dates, numbers that are not finite and text with quotes, through `--set`."""
    text = """
    table = { enable_thinking = false, "a b" = [1, 2.5, { c = "x" }] }
    when = 1979-05-27T07:32:00Z
    words = ["\\"quoted\\"", "line\\nline", "日本 🙂", "\\u007f"]
    small = 1e-05
    none = inf
    """
    values, tree = parse_toml(text), dict[str, Any]()
    for override in overrides(values):
        apply_override(tree, override)
    assert tree == values
