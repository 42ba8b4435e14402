"""The watch over a run, on made-up metrics: each event once, when it is due, with what to do; and none of a healthy run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from groupwise.config import Recipe
from groupwise.training.display import Display
from groupwise.training.events import Warned
from groupwise.training.events_file import EventsFile
from groupwise.training.watch import Watch

HEALTHY: dict[str, Any] = {
    "reward/mean": 0.5,
    "train/pass_rate": 0.5,
    "entropy": 0.5,
    "skipped_updates": 0.0,
    "groups/zero_variance": 0.4,
    "groups/all_correct": 0.2,
    "groups/all_wrong": 0.2,
    "utilisation": 0.5,
    "dropped/zero_variance": 0.0,
    "sampler_gap_mean": 1e-6,
    "seconds/rollouts": 20.0,
    "seconds/scoring": 0.0,
    "seconds/learner": 10.0,
}
Series = list[dict[str, Any]]


def watched(series: Series, **settings: Any) -> list[tuple[int, str]]:
    """(step, name) of every event."""
    watch = Watch(Recipe.model_validate(settings))
    found = [event for i, metrics in enumerate(series, start=1) for event in watch.look(i, {**HEALTHY, **metrics})]
    assert all(event.advice and event.text for event in found)
    return [(event.step, event.name) for event in found]


def constant(count: int, **metrics: Any) -> Series:
    return [{name.replace("__", "/"): value for name, value in metrics.items()}] * count


def falling(name: str, start: float, end: float, count: int) -> Series:
    """Geometric."""
    return [{name: start * (end / start) ** (i / (count - 1))} for i in range(count)]


def test_a_healthy_run_is_silent() -> None:
    learns = [
        {
            "entropy": 0.5 - 0.03 * math.sqrt(i),
            "train/pass_rate": min(0.95, 0.3 + 0.01 * i),
            "groups/zero_variance": min(0.95, 0.2 + 0.01 * i),
            "seconds/learner": 30.0 if i == 0 else 5.0 + i % 3,  # the first step compiles
        }
        for i in range(100)
    ]
    assert watched(learns) == []


def test_skipped_updates() -> None:
    series = [*constant(3), *constant(12, skipped_updates=2.0), *constant(30, skipped_updates=3.0)]
    # At step 4 two were skipped, at step 16 one more: said again, for ten steps had passed without.
    assert watched(series) == [(4, "nonfinite_update")]
    series = [*constant(3), *constant(25, skipped_updates=2.0), *constant(30, skipped_updates=3.0)]
    assert watched(series) == [(4, "nonfinite_update"), (29, "nonfinite_update")]
    assert watched(constant(3, skipped_updates=1.0)) == [(1, "nonfinite_update")]


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (falling("entropy", 1.0, 0.05, 40), [(32, "entropy_collapse")]),
        (falling("entropy", 0.004, 0.0007, 60), [(58, "entropy_collapse")]),  # not by 80 %, yet to nothing
        ([{**m, "train/pass_rate": 0.95} for m in falling("entropy", 1.0, 0.01, 40)], []),  # sure, and rightly so
        ([{**m, "reward/mean": 0.2 + 0.02 * i} for i, m in enumerate(falling("entropy", 1.0, 0.01, 40))], []),  # still learns
        ([*constant(5), *(constant(1, entropy=0.12) + constant(14, entropy=0.06)) * 3], [(17, "entropy_collapse")]),  # once
    ],
)
def test_entropy_collapse(series: Series, expected: list[tuple[int, str]]) -> None:
    assert watched(series) == []  # while groups still differ
    found = watched([{"groups/zero_variance": 0.85, **metrics} for metrics in series])
    assert [name for _, name in found] == [name for _, name in expected]
    assert all(abs(step - at) <= 3 for (step, _), (at, _) in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"groups__zero_variance": 0.95, "groups__all_wrong": 0.9, "utilisation": 0.05}, [(15, "zero_variance")]),
        ({"groups__zero_variance": 0.95, "utilisation": 1.0, "dropped__zero_variance": 60.0}, [(15, "zero_variance")]),
        ({"groups__zero_variance": 0.95, "utilisation": 0.9}, []),  # a critic gives them advantages
        ({"groups__zero_variance": 0.95, "train__pass_rate": 0.97, "utilisation": 0.05}, []),  # solved
        ({"groups__zero_variance": 0.85, "utilisation": 0.1}, []),
    ],
)
def test_zero_variance(metrics: dict[str, float], expected: list[tuple[int, str]]) -> None:
    assert watched([*constant(5), *constant(30, **metrics)]) == expected
    assert watched([*constant(5), *constant(9, **metrics), *constant(5)]) == []


def test_the_gap_between_sampler_and_learner() -> None:
    drifts = [{"sampler_gap_mean": 0.001 * 1.2**i} for i in range(40)]
    assert [name for _, name in watched(drifts)] == ["sampler_gap"]
    assert watched(drifts, rollouts={"max_age": 1}) == []  # older weights differ by design
    assert watched(constant(40, sampler_gap_mean=0.03)) == []  # bfloat16's own level
    assert watched(falling("sampler_gap_mean", 0.03, 0.2, 40))[0][1] == "sampler_gap"
    assert watched(constant(40, sampler_gap_mean=math.nan)) == []


def test_a_slow_step() -> None:
    series = [*constant(1, seconds__learner=300.0), *constant(9), *constant(1, seconds__scoring=400.0, seconds__rollouts=420.0)]
    assert watched([*series, *constant(9), *series[-1:]]) == [(11, "slow_step"), (21, "slow_step")]
    short = [{"seconds/rollouts": 0.1, "seconds/learner": 0.1}] * 10
    assert watched([*short, {"seconds/rollouts": 5.0, "seconds/learner": 0.1}]) == []  # seconds that nobody misses
    watch = Watch(Recipe())
    events = [event for i, metrics in enumerate(series) for event in watch.look(i, {**HEALTHY, **metrics})]
    assert "task.reward_timeout" in events[0].advice


def test_out_of_memory_says_both_budgets() -> None:
    halved = [*constant(3), *constant(5, micro_batch_tokens=2048.0), *constant(1), *constant(5, micro_batch_tokens=512.0)]
    assert watched(halved) == [(4, "out_of_memory"), (10, "out_of_memory")]
    watch = Watch(Recipe())
    (event,) = watch.look(1, {**HEALTHY, "micro_batch_tokens": 2048.0})
    assert "4096" in event.text and "learner.micro_batch_tokens = 2048" in event.advice
    assert watched([*constant(2), *constant(2, rollouts__max_rows=256.0)]) == [(3, "out_of_memory")]


def test_a_resumed_run_says_what_an_uninterrupted_one_says(tmp_path: Path) -> None:
    series = [{**HEALTHY, "entropy": 0.5 * 0.9**i, "skipped_updates": float(i > 20), "loss": math.nan} for i in range(40)]
    series = [{**metrics, "groups/zero_variance": 0.85} for metrics in series]
    whole = watched(series)
    assert {name for _, name in whole} == {"entropy_collapse", "nonfinite_update"}
    for stop in (1, 3, 19, 21, 30):
        lines = [json.dumps({"step": 0, "eval/pass@1": 0.1})]
        for i, metrics in enumerate(series[:stop], start=1):
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            lines.append(json.dumps({"step": i, **finite}))
        path = tmp_path / f"{stop}.jsonl"
        path.write_text("\n".join(lines))
        resumed = Watch(Recipe())
        resumed.catch_up(path)
        later = [event for i, metrics in enumerate(series[stop:], start=stop + 1) for event in resumed.look(i, metrics)]
        assert [(event.step, event.name) for event in later] == [item for item in whole if item[0] > stop]


def test_the_first_step_of_a_resumed_process_is_not_slow(tmp_path: Path) -> None:
    """It compiles and fills caches. One that is slow later is, and the first ones do not count as usual."""
    path, watch = tmp_path / "metrics.jsonl", Watch(Recipe())
    path.write_text("".join(json.dumps({"step": i, **HEALTHY}) + "\n" for i in range(1, 21)))
    watch.catch_up(path)
    slow = {**HEALTHY, "seconds/learner": 400.0}
    assert watch.look(21, slow) == [] and watch.look(22, HEALTHY) == []
    assert [event.name for event in watch.look(23, slow)] == ["slow_step"]
    early = Watch(Recipe())
    assert [event for i in range(1, 5) for event in early.look(i, slow if i in (1, 4) else HEALTHY)] == []


def test_values_that_are_no_numbers_stop_no_resume(tmp_path: Path) -> None:
    path, watch = tmp_path / "metrics.jsonl", Watch(Recipe())
    bad: list[Any] = ["x", [1], {"a": 1}, None, 10**400, True]
    lines = [json.dumps({"step": i, **HEALTHY, name: value}) for i, value in enumerate(bad, start=1) for name in HEALTHY]
    path.write_bytes("\n".join([*lines, '{"reward/mean": 1}', "[" * 100_000, "\ud800"]).encode(errors="surrogatepass"))
    watch.catch_up(path)
    assert watch.steps > 60
    watch.look(100, HEALTHY)


# --- where events go


def test_events_are_lines_of_json_also_after_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventsFile(path)
    file.record(Warned(step=3, text="a\nb", name="slow_step", advice="do this"))
    path.write_bytes(path.read_bytes() + b'{"step": 4, "te')
    EventsFile(path).record(Warned(step=5, text="x", kind="fault", name="failed", traceback="Traceback"))
    lines = path.read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[2])
    assert len(lines) == 3 and {"step", "time", "kind", "name", "text", "advice"} == set(first)
    assert (first["text"], first["kind"], first["name"], first["advice"]) == ("a\nb", "warning", "slow_step", "do this")
    assert (last["step"], last["kind"], last["traceback"]) == (5, "fault", "Traceback")
    EventsFile(tmp_path / "gone" / "events.jsonl").record(Warned(step=1, text="x"))  # a disk that cannot be written stops no run


def test_the_display_shows_advice_once_and_takes_no_text_for_markup() -> None:
    console = Console(record=True, width=200, force_terminal=False)
    display = Display(console, 10)
    for step in (1, 2):
        display.record(Warned(step=step, text="[/bold] of [red]x", name="slow_step", advice="Do this."))
    display.record(Warned(step=3, text="the end", kind="fault", name="failed"))
    display.note("a [/] b")
    shown = console.export_text().splitlines()
    assert shown == ["step 1: [/bold] of [red]x. Do this.", "step 2: [/bold] of [red]x", "a [/] b"]
