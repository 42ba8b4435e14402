"""What findings say, in both languages, and that recorded runs of known health are judged rightly."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupwise.evidence.findings import findings
from groupwise.evidence.held_out import change
from groupwise.evidence.history import Segment
from groupwise.evidence.records import Records
from groupwise.evidence.runs import Run, open_run

RECORDED = sorted((Path(__file__).parent / "recorded_runs").glob("*.json.gz"))


@pytest.mark.parametrize("path", RECORDED, ids=[path.name.removesuffix(".json.gz") for path in RECORDED])
def test_runs_made_to_be_healthy_or_not_are_called_what_they_are(path: Path, tmp_path: Path) -> None:
    """Recorded by benchmarks/verdicts.py, which says how each was made."""
    recorded = json.loads(gzip.decompress(path.read_bytes()))
    for name in ("recipe.toml", "metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_text(recorded[name])
    found = findings(open_run(tmp_path))
    told = [(item.kind, item.title.en) for item in found]
    if recorded["healthy"]:
        assert any(title in recorded["titles"] for _, title in told) and "unhealthy" not in dict(told), told
    else:
        assert any(title in recorded["titles"] and kind != "healthy" for kind, title in told), told
    assert all(re.search("[\u4e00-\u9fff]", item.title.zh) and "{" not in item.title.zh + item.text.zh for item in found)


def test_there_are_twelve_of_each_with_graded_rewards_among_both() -> None:
    kinds = [json.loads(gzip.decompress(path.read_bytes())) for path in RECORDED]
    for healthy in (True, False):
        names = [item["name"] for item in kinds if item["healthy"] is healthy]
        assert len(names) == 12 and sum(name.startswith("graded") for name in names) >= 5
    assert sum(path.stat().st_size for path in RECORDED) < 400_000


def run(scores: list[float], problems: int = 200, deviation: float = 0.0, steps: int = 20, **metrics: Any) -> Run:
    """A run that recorded these held-out scores, of a graded reward where it has a deviation between problems."""
    key = "eval/reward" if deviation else "eval/pass@1"
    usual: dict[str, Any] = {"reward/mean": 0.5, "approx_kl": 0.01, "entropy": 0.4, "length/mean": 10.0, "length/truncated": 0.0}
    if not deviation:
        usual["train/pass_rate"] = 0.5
    columns = {name: value if isinstance(value, list) else [value] * steps for name, value in (usual | metrics).items()}
    rows = [{"step": i + 1, **{name: values[i] for name, values in columns.items()}} for i in range(steps)]
    tried = [
        {"step": 10 * i, key: score, "eval/reward_std": deviation, "eval_problems": float(problems)}
        for i, score in enumerate(scores)
    ]
    return Run(path=Path("made"), recipe={"algorithm": {"name": "grpo"}}, steps=Records(rows), evaluations=Records(tried))


def told(made: Run) -> dict[str, str]:
    return {item.title.en: item.kind for item in findings(made)}


@pytest.mark.parametrize(
    ("scores", "problems", "deviation", "verdict"),
    [
        ([0.4, 0.6], 200, 0.0, "rose"),  # 95 % interval of the change: 1.96 sqrt(0.24 / 200 * 2) = 0.096
        ([0.4, 0.45], 200, 0.0, "level"),  # a rise of 0.146 cannot be ruled out, one of 0.15 can
        ([0.4, 0.6], 25, 0.0, "open"),  # ± 0.26
        ([0.9, 0.6], 200, 0.0, "fell"),
        ([0.9, 0.6, 0.7], 200, 0.0, "fell"),  # the first was the best: nothing was gained that could fall
        ([0.3, 0.9, 0.5], 200, 0.0, "fell from peak"),
        ([0.3, 0.9, 0.78], 200, 0.0, "rose"),  # a fifth of what was gained went again
        ([0.0, 0.0], 200, 0.0, "level"),
        ([10.0, 10.5], 100, 5.0, "level"),  # ± 1.39: a rise of half a standard deviation, 2.5, would have been seen
        ([10.0, 11.0], 20, 5.0, "open"),  # ± 3.1
        ([10.0, 30.0, 20.0], 100, 5.0, "fell from peak"),
    ],
)
def test_a_change_of_held_out_results_by_hand(scores: list[float], problems: int, deviation: float, verdict: str) -> None:
    found = change(run(scores, problems, deviation))
    assert found is not None and found.verdict == verdict


def test_chance_alone_is_called_a_rise_or_a_fall_in_no_more_than_one_run_in_twenty() -> None:
    """Results of a policy that does not change, on independent problems at every evaluation: 2, 10 and 100 evaluations."""
    draw = np.random.default_rng(0)
    for evaluations in (2, 10, 100):
        for problems, rate in ((100, 0.5), (200, 0.1), (50, 0.8)):
            scores = draw.binomial(problems, rate, (400, evaluations)) / problems
            verdicts = [found.verdict for row in scores.tolist() if (found := change(run(row, problems))) is not None]
            fell = sum(verdict in ("fell", "fell from peak") for verdict in verdicts) / len(verdicts)
            assert fell < 0.06 and verdicts.count("rose") / len(verdicts) < 0.05, (evaluations, problems, rate)


def test_large_updates_are_unhealthy_where_they_do_harm() -> None:
    assert told(run([0.4, 0.8], approx_kl=0.1))["The updates are large"] == "watch"
    assert told(run([0.4, 0.2], approx_kl=0.1))["The updates are too large"] == "unhealthy"
    assert told(run([0.4, 0.4], approx_kl=0.1))["The updates are too large"] == "unhealthy"
    assert told(run([0.4, 0.8], approx_kl=2.0))["The updates are too large"] == "unhealthy"
    assert told(run([0.4], approx_kl=0.1))["The updates are large"] == "watch"  # nothing to compare yet
    assert told(run([0.4, 0.8], skipped_updates=[0.0] * 10 + [5.0] * 10))["The updates are too large"] == "unhealthy"


def test_skipped_updates_are_held_against_all_updates() -> None:
    made = run([0.4, 0.8], skipped_updates=3.0)
    assert "The updates are too large" in told(made)  # 3 of 20
    made.recipe["learner"] = {"minibatches": 16}
    assert told(made)["A few updates were skipped"] == "watch"  # 3 of 320
    unknown = run([0.4, 0.8], skipped_updates=1.0, approx_kl=None)
    (found,) = [item for item in findings(unknown) if "skipped" in item.title.en]
    assert "KL" not in found.text.en and found.text.en.startswith("Updates skipped")


def test_an_evaluation_of_few_problems_is_as_noisy_as_it_is() -> None:
    """0.2 of 10 problems, 0.35 of 1,000: ± 1.96 √(0.286 · 0.714 / 14) = ± 0.237 and ± 0.030."""
    made = run([0.2, 0.35])
    made.evaluations.append(0, {"eval/pass@1": 0.2, "eval_problems": 10.0})
    made.evaluations.append(10, {"eval/pass@1": 0.35, "eval_problems": 1000.0})
    found = change(made)
    assert found is not None and found.noise == pytest.approx(0.2385, abs=1e-3) and found.verdict == "open"


def test_evaluations_of_other_problems_are_not_compared() -> None:
    made = replace(run([0.8, 0.9, 0.4]), segments=[_segment(1), _segment(11, **{"task.grades": ([1], [3])})])
    assert "Accuracy fell after its peak" not in told(made) and change(made) is None
    harmless = replace(made, segments=[_segment(1), _segment(11, **{"learner.learning_rate": (1e-4, 1e-5)})])
    assert "Accuracy fell after its peak" in told(harmless)
    begun = replace(made, segments=[_segment(1), _segment(21, **{"task.grades": ([1], [3])})])
    assert "Accuracy fell after its peak" in told(begun), "the other problems were not tried yet"


def _segment(first: int, **changed: Any) -> Segment:
    return Segment(first_step=first, started="", version="", changed=changed, recipe={})


def test_entropy_that_rises_is_unhealthy_unless_results_improve() -> None:
    rises = [0.2] * 10 + [0.8] * 10
    assert told(run([0.4, 0.8], entropy=rises))["Entropy rose"] == "watch"
    assert told(run([0.4, 0.4], entropy=rises))["Entropy rose"] == "unhealthy"
    rewards = [0.1 + 0.01 * (i % 3) for i in range(10)] + [0.5 + 0.01 * (i % 3) for i in range(10)]
    assert told(run([0.4], entropy=rises, **{"reward/mean": rewards}))["Entropy rose"] == "watch"


def test_truncation_that_does_no_harm_is_not_called_unhealthy() -> None:
    many = {"length/truncated": 1.0}
    assert told(run([0.4, 0.6], **many, **{"train/pass_rate": 0.05})) == {
        "Many completions are truncated": "unhealthy",
        "It learned": "healthy",
    }
    assert told(run([0.4, 0.6], **many, **{"train/pass_rate": 0.5})) == {
        "It learned": "healthy"
    }  # half of the truncated are right
    assert told(run([1.0, 2.0], deviation=1.0, **many))["Many completions are truncated"] == "watch"
    assert told(run([1.0, 1.0], deviation=1.0, **many))["Many completions are truncated"] == "unhealthy"
    grows = {"length/truncated": [0.3] * 5 + [0.9] * 15, "train/pass_rate": 0.05}
    assert told(run([0.4, 0.4], **grows))["Many completions are truncated"] == "unhealthy"
    from_few = {"length/truncated": [0.1] * 5 + [0.9] * 15, "train/pass_rate": 0.05}
    assert told(run([0.4, 0.4], **from_few))["More and more completions are truncated"] == "unhealthy"
    falls = {"length/truncated": [0.9] * 15 + [0.3] * 5, "train/pass_rate": 0.4}
    assert told(run([0.1, 0.6], **falls))["Many completions are truncated"] == "watch"


def test_a_limit_that_the_policy_learned_to_stay_below() -> None:
    shorter = {"length/truncated": [0.3] * 10 + [0.1] * 10}
    assert told(run([0.15, 0.05], **shorter))["Many completions were truncated at first"] == "unhealthy"
    assert told(run([0.15, 0.15], **shorter))["Many completions were truncated at first"] == "watch"
    assert told(run([0.15, 0.6], **shorter)) == {"It learned": "healthy"}


def test_completions_that_could_not_be_scored() -> None:
    for failed, expected in ((60.0, "unhealthy"), (5.0, "watch"), (0.5, None)):
        made = run([0.4, 0.8], **{"rollouts/completions": 128.0, "failed/not finite": failed})
        assert told(made).get("Many completions could not be scored") == expected


def test_a_sampler_with_other_weights_is_unhealthy() -> None:
    assert told(run([0.4, 0.8], sampler_gap_mean=0.05))["Sampler and learner log-probabilities differ"] == "watch"
    assert told(run([0.4, 0.8], sampler_gap_mean=1.0))["Sampler and learner log-probabilities differ"] == "unhealthy"


def test_a_run_that_has_just_begun_is_not_called_unhealthy_for_what_may_pass() -> None:
    first = {"approx_kl": 0.8, "reward/shaped_spread": 0.0, "train/pass_rate": 0.0, "length/truncated": 0.9, "utilisation": 0.0}
    for steps, kind, updates in ((4, "watch", "The updates are large"), (5, "unhealthy", "The updates are too large")):
        kinds = told(run([0.0], steps=steps, **first))
        symptoms = (updates, "No completion was ever right", "Many completions are truncated")
        assert [kinds[title] for title in symptoms] == [kind] * 3


def test_a_run_under_way_has_not_learned_yet() -> None:
    made = run([0.4, 0.4])
    assert "It did not learn" in told(made)
    made.recipe["training"] = {"steps": 1000}
    assert "It has not learned yet" in told(made)
