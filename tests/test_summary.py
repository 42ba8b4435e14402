"""The top of the page about runs: names, tiles and tables, and that its parts fit together."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import groupwise
from groupwise.config import Recipe, dump
from groupwise.evidence.comparing import contrasts
from groupwise.evidence.document import LONGEST_RECIPE, document
from groupwise.evidence.headline import duration
from groupwise.evidence.naming import differences, grouped, run_names, title
from groupwise.evidence.runs import Run, open_run
from groupwise.evidence.runs_page import report_page
from groupwise.evidence.shapes import Tile

RECIPE = Recipe().model_dump(by_alias=True)
TEMPLATES = Path(groupwise.__file__).parent / "evidence" / "templates"


def made(
    path: Path,
    last: float | None = 0.7,
    *,
    key: str = "eval/pass@1",
    first: float = 0.2,
    steps: int = 40,
    scores: Sequence[tuple[int, float]] = (),
    rewards: float = 0.0,
    **settings: Any,
) -> Run:
    """A run of so many of forty steps, evaluated before the first, as `scores` say, and after the last unless `last` is None.

    Args:
        rewards: by which the reward rises in each step; 0: it stays 0.5.
        settings: dotted with two underscores.
    """
    tree = json.loads(json.dumps(RECIPE))
    for name, value in {"training__steps": 40, **settings}.items():
        *tables, name = name.split("__")
        (tree[tables[0]] if tables else tree)[name] = value
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(dump(tree))
    measured = {"reward/mean": 0.5, "tokens_per_second": 1000.0, "seconds/rollouts": 3.0, "seconds/learner": 2.0}
    records = [{"step": step, "rollouts/completions": 8.0, **measured} for step in range(1, steps + 1)]
    if rewards:
        records = [record | {"reward/mean": rewards * record["step"]} for record in records]
    found = [(0, first), *scores, *([] if last is None else [(steps, last)])]
    evaluated = [{"step": step, key: score, "eval_problems": 100.0, "eval/reward_std": 0.5} for step, score in found]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*evaluated, *records]))
    return open_run(path)


def tile_of(runs: list[Run], id: str) -> Tile:
    return next(tile for tile in document(runs)["tiles"] if tile["id"] == id)


def test_settings_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    dapo, again = made(tmp_path / "a"), made(tmp_path / "b", seed=1, training__keep_checkpoints=9)
    (group,) = grouped([dapo, again])
    assert (group.name, len(group.runs)) == ("dapo", 2)
    rates = [dapo, again, made(tmp_path / "c", learner__learning_rate=0.1 + 0.2), made(tmp_path / "d", algorithm__name="grpo")]
    usual = RECIPE["learner"]["learning_rate"]
    groups = grouped(rates)
    assert [group.name for group in groups] == [f"dapo, learning_rate {usual:g}", "dapo, learning_rate 0.3", "grpo"]
    keys = differences(groups)["keys"]
    assert keys[:2] == ["algorithm.name", "learner.learning_rate"]
    assert "algorithm.dynamic_sampling" in keys, "what an algorithm's name stands for"
    assert list(run_names(groups).values())[2:] == ["c · dapo, learning_rate 0.3", "d · grpo"]
    groups = grouped([dapo, made(tmp_path / "e", model__system_prompt="Think. " * 30)])
    assert [group.name for group in groups] == ["a · dapo", "e · dapo"] and title(groups) == "a · dapo | e · dapo"
    assert list(run_names(groups).values()) == ["a · dapo", "e · dapo"]
    assert [group.name for group in grouped([dapo, again, *groups[1].runs])] == ["dapo 1", "e · dapo"]
    assert grouped([dapo])[0].id == grouped(rates)[0].id, "the id of a setting depends on no other run"


def test_recipes_of_earlier_versions_are_no_other_setting(tmp_path: Path) -> None:
    new, old = made(tmp_path / "new"), made(tmp_path / "old", seed=1)
    tree = tomllib.loads((old.path / "recipe.toml").read_text())
    del tree["rollouts"]["min_p"], tree["trackers"]
    (old.path / "recipe.toml").write_text(dump(tree))
    assert len(grouped([new, open_run(old.path)])) == 1


def test_runs_of_a_ladder_have_its_title_and_the_names_of_its_rungs(tmp_path: Path) -> None:
    ladder = tmp_path / "ladder"
    rungs = ((1, "grpo"), (2, "clip-higher"))
    runs = [made(ladder / f"{i}-{name}" / f"seed-{seed}", seed=seed) for i, name in rungs for seed in (0, 1)]
    (ladder / "ladder.toml").write_text('title = "One or two?"\nrungs = [{ name = "GRPO" }, { name = "+ clip-higher" }]')
    assert [group.name for group in grouped(runs)] == ["dapo"], "a ladder has a plan"
    (ladder / "plan.json").write_text("{}")
    groups = grouped(runs)
    assert [group.name for group in groups] == ["GRPO", "+ clip-higher"] and title(groups) == "One or two?"
    assert list(run_names(groups).values())[1:3] == ["seed-1 · GRPO", "seed-0 · + clip-higher"]


def test_other_runs_beside_a_ladder_are_not_seeds_of_one_setting(tmp_path: Path) -> None:
    (tmp_path / "ladder.toml").write_text('rungs = [{ name = "GRPO" }]')
    (tmp_path / "plan.json").write_text("{}")
    runs = [made(tmp_path / "runs" / name, algorithm__name=name) for name in ("grpo", "dapo")]
    assert [group.name for group in grouped(runs)] == ["grpo", "dapo"]
    assert [(first.name, second.name) for first, second in contrasts(grouped(runs))] == [("grpo", "dapo")]


def test_the_score_says_how_sure_it_is(tmp_path: Path) -> None:
    runs = [made(tmp_path / f"seed-{seed}", 0.5 + 0.1 * seed, seed=seed) for seed in range(3)]
    one, two, three = (tile_of(runs[:count], "score") for count in (1, 2, 3))
    assert one["value"]["en"] == "20.0% → 50.0%" and "one evaluation (100 problems)" in one["detail"]["en"]
    assert two["value"]["en"] == "20.0% → 55.0%" and "2 seeds (50.0% · 60.0%): too few" in two["detail"]["en"]
    detail = three["detail"]["en"]  # 4.30 × 0.1 / √3
    assert detail.startswith("±\N{NO-BREAK SPACE}24.8\N{NO-BREAK SPACE}points") and "over 3 seeds" in detail
    assert "3 个种子" in three["detail"]["zh"]
    other = made(tmp_path / "other", 0.9, learner__learning_rate=1e-5)
    best = tile_of([*runs, other], "score")
    assert best["value"]["en"] == "20.0% → 90.0%" and best["label"]["en"] == "Best held-out pass@1"
    assert "the other setting: 60.0%" in best["detail"]["en"]
    rows = document([*runs, other])["summary"]
    assert [(row["runs"], row["after"], row["completions"]) for row in rows] == [
        (["seed-0", "seed-1", "seed-2"], "60.0% ± 24.8%", "320"),
        (["other"], "90.0%", "320"),
    ]
    assert rows[0]["seconds"] == duration(40 * 5.0).as_json()
    assert tile_of([*runs, other], "time")["value"]["en"] == "3 min 20 s"


def test_what_some_runs_of_a_setting_show_is_said_of_them(tmp_path: Path) -> None:
    scores = [0.1, 0.7, 0.7]
    several = [made(tmp_path / f"seed-{seed}", score, seed=seed) for seed, score in enumerate(scores)]
    found = {finding["title"]["en"]: finding["text"] for finding in document(several)["findings"]}
    learned = found["It learned, in 2 of 3 runs"]
    assert learned["en"].startswith("seed-1: ") and learned["zh"].startswith("seed-1：")
    other = made(tmp_path / "other", 0.1, algorithm__name="grpo")
    health = tile_of([*several, other], "health")["detail"]["en"]
    title = next(item["title"]["en"] for item in document([*several, other])["findings"] if item["kind"] != "healthy")
    assert health == f"2 of 2 settings; dapo: {title}" and title.endswith("in 1 of 3 runs")


def test_before_and_after_are_of_the_same_runs(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", 0.5), made(tmp_path / "b", 0.5, seed=1), made(tmp_path / "c", None, first=0.9, seed=2)]
    assert tile_of(runs, "score")["value"]["en"] == "20.0% → 50.0%"
    (row,) = document(runs)["summary"]
    assert (row["before"], row["after"], row["seeds"]) == ("20.0%", "50.0%", 3)


def test_an_interval_of_a_share_ends_at_0_and_1(tmp_path: Path) -> None:
    runs = [made(tmp_path / f"seed-{seed}", last, seed=seed) for seed, last in enumerate((0.1, 0.1, 0.9))]
    (row,) = document(runs)["summary"]
    assert row["after"].replace("\N{NO-BREAK SPACE}", " ") == "36.7% (0.0% – 100.0%)"
    assert "0.0%\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}100.0%" in tile_of(runs, "score")["detail"]["en"]


def test_no_setting_is_best_where_scores_are_of_other_problems(tmp_path: Path) -> None:
    easy, hard = made(tmp_path / "easy", 0.9, task__grades=[1]), made(tmp_path / "hard", 0.4, task__grades=[3])
    score = tile_of([easy, hard], "score")
    assert score["label"]["en"] == "Held-out pass@1" and "other problems" in score["detail"]["en"]
    assert score["value"]["en"].split() == ["40.0%", "–", "90.0%"]


def test_the_best_setting_is_that_at_the_last_step_that_all_were_evaluated_after(tmp_path: Path) -> None:
    done = made(tmp_path / "done", 0.9, scores=[(20, 0.4)])
    begun = made(tmp_path / "begun", None, steps=20, scores=[(20, 0.6)], learner__learning_rate=1e-5)
    score = tile_of([done, begun], "score")
    assert score["value"]["en"] == "20.0% → 60.0%" and "after step 20" in score["detail"]["en"]


@pytest.mark.parametrize(("steps", "value", "detail"), [
    (1, "0.01", "one step so far"), (2, "0.01 → 0.02", "the first and the last step"),
    (5, "0.015 → 0.045", "means of the first 2 and the last 2 steps"),
    (40, "0.02 → 0.38", "means of the first 3 and the last 5 steps"),
])  # fmt: skip
def test_rewards_at_both_ends_are_of_different_steps(tmp_path: Path, steps: int, value: str, detail: str) -> None:
    tile = tile_of([made(tmp_path / "a", None, steps=steps, rewards=0.01)], "reward")
    assert (tile["value"]["en"], tile["detail"]["en"]) == (value, detail)


def test_what_was_not_recorded_is_no_zero(tmp_path: Path) -> None:
    run = made(tmp_path / "a")
    lines = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    kept = [{key: value for key, value in line.items() if "rollouts" not in key and "learner" not in key} for line in lines]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (row,) = document([open_run(run.path)])["summary"]
    assert (row["completions"], row["seconds"]) == ("–", "–")


def test_tiles_of_a_run_that_says_little(tmp_path: Path) -> None:
    begun = made(tmp_path / "begun", None)
    assert tile_of([begun], "score")["value"]["en"] == "20.0%"
    graded = made(tmp_path / "graded", 0.9, key="eval/reward")
    score = tile_of([graded], "score")
    assert score["value"]["en"] == "0.2 → 0.9"
    assert score["detail"]["en"].startswith("0.801\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}0.999")  # ± 1.984 × 0.5 / √100
    (begun.path / "metrics.jsonl").write_text("")
    tiles = {tile["id"]: tile for tile in document([open_run(begun.path)])["tiles"]}
    assert list(tiles) == ["health", "progress"] and tiles["progress"]["value"]["en"] == "0 / 40"


@pytest.mark.parametrize(
    ("seconds", "en", "zh"),
    [
        (0.123, "0.12 s", "0.12 秒"), (9.97, "10 s", "10 秒"), (59.4, "59 s", "59 秒"), (59.6, "1 min 0 s", "1 分 0 秒"),
        (3599.7, "1 h 0 min", "1 小时 0 分钟"), (7261, "2 h 1 min", "2 小时 1 分钟"), (86_390, "1 d 0 h", "1 天 0 小时"),
    ],
)  # fmt: skip
def test_durations(seconds: float, en: str, zh: str) -> None:
    assert duration(seconds).as_json() == {"en": en, "zh": zh}


def test_long_and_hostile_settings_stay_short_and_visible(tmp_path: Path) -> None:
    prompt = "\u202e\x1b[31m</script><b>" * 50_000
    runs = [made(tmp_path / "a\u202eb", model__system_prompt=prompt), made(tmp_path / "c", algorithm__name="\u202e" * 100)]
    for run in runs:
        note = {"step": 3, "kind": "warn\u202eing", "name": "x", "text": "\x1b[31m" * 9000, "advice": "</script>"}
        (run.path / "events.jsonl").write_text(json.dumps(note))
    found = document([open_run(run.path) for run in runs])
    text = json.dumps(found, ensure_ascii=False)
    assert len(text) < 200_000 and not set("\u202e\x1b") & set(text)
    assert all(len(run["recipe"]) < 5 * LONGEST_RECIPE and len(run["name"]) < 200 for run in found["runs"])
    page = report_page(found, [])
    assert page.count("</script>") == page.count("<script"), "only the page's own scripts end"


def test_no_two_scripts_of_the_page_declare_one_name() -> None:
    """They are one module."""
    names: Counter[str] = Counter()
    for path in [*(TEMPLATES / "page").glob("*.js"), TEMPLATES / "numbers.js"]:
        names.update(re.findall(r"^(?:async )?(?:function\*?|const|let|class) (\w+)", path.read_text("utf-8"), re.M))
    assert len(names) > 50 and not [name for name, count in names.items() if count > 1]
