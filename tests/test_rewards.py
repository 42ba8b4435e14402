"""Rewards: in every form, and whatever they do. One that fails is set aside; it is never a zero, and changes nothing else."""

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import groupwise as gw
from groupwise.config import Recipe, Source, load
from groupwise.errors import RunError, UserError
from groupwise.models.loading import character_tokenizer
from groupwise.rewards import remote
from groupwise.rewards.base import Rated
from groupwise.rewards.values import rate_value
from groupwise.tasks.base import build_task
from groupwise.training.collect import Collected, Frontier
from groupwise.training.events import StepDone, Warned
from groupwise.training.loop import Trainer
from groupwise.training.records import RunDirectory
from groupwise.training.setup import prepare
from groupwise.types import Group, Problem, Score, TrainingBatch
from tests.conftest import said

SUMS = "".join(json.dumps({"prompt": f"{i}+2=", "answer": str(i + 2), "level": i % 3}) + "\n" for i in range(1, 30))


def build(tmp_path: Path, code: str = "", **settings: Any) -> Any:
    """A task with this code as mine.py beside its recipe."""
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "data.jsonl").write_text(SUMS)
    return build_task({"name": "dataset", "path": "data.jsonl", **settings}, Source(tmp_path / "recipe.toml", ""))


def scores(task: Any, problem: Problem, texts: list[str]) -> list[Score]:
    return asyncio.run(task.score(problem, [said(text) for text in texts]))


SUM = Problem(id="1+2=", prompt="1+2=", answer="3", metadata={"level": 1})
TALK = Problem(id="t", prompt=({"role": "user", "content": "1+2?"},), answer="3", metadata={"level": 1})

TRL_FORM = """
import asyncio

def seen(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric, **rest):
    log_extra("seen", [[p, c, i, a, l] for p, c, i, a, l in zip(prompts, completions, completion_ids, answer, level)])
    log_metric("step", trainer_state.global_step / trainer_state.max_steps)
    log_metric("unknown", len(rest))
    return [float(len(i)) for i in completion_ids]

async def later(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [None if "?" in text else 1.0 for text in completions]

def few(completions):
    return [2.0] * len(completions)

def column(completions, problem, **kwargs): return [float(p == "x") for p in problem]

class Judge:
    async def __call__(self, prompts, completions, **kwargs): return [0.5 for _ in prompts]
judge = Judge()
"""


def test_trls_signature(tmp_path: Path) -> None:
    """Everything by keyword, once for each completion, as TRL's `_calculate_rewards` passes it."""
    task = build(tmp_path, TRL_FORM, reward="mine.py:seen")
    task.begin_step(3, 10)
    first, second = scores(task, SUM, ["3", "14"])
    assert (first.reward, second.reward) == (1.0, 2.0) and first.correct is None
    assert first.extra["seen"] == ["1+2=", "3", [1], "3", 1] and second.extra["seen"] == ["1+2=", "14", [1, 1], "3", 1]
    assert first.metrics == {"step": 0.3, "unknown": 0}
    (talk,) = scores(task, TALK, ["3"])
    assert talk.extra["seen"][:2] == [[{"role": "user", "content": "1+2?"}], [{"role": "assistant", "content": "3"}]]
    for name, values in (("later", [1.0, None]), ("few", [2.0, 2.0]), ("judge", [0.5, 0.5])):
        found = scores(build(tmp_path, TRL_FORM, reward=f"mine.py:{name}"), SUM, ["a", "?"])
        assert [None if score.failure == "none" else score.reward for score in found] == values
    columned = Problem(id="c", prompt="c", metadata={"problem": "x"})
    assert [score.reward for score in scores(build(tmp_path, TRL_FORM, reward="mine.py:column"), columned, ["a"])] == [1.0]


def test_several_rewards_are_summed_by_weight(tmp_path: Path) -> None:
    code = (
        "def short(problem, completions): return [-len(text) for text in completions]\n"
        "def some(completions, **_): return [None if 'x' in text else {'a': 1.0, 'b': 0.5} for text in completions]\n"
        "def bad(completions, **_): return [float('nan') if 'n' in text else 0.0 for text in completions]\n"
    )
    rewards = ["exact", "mine.py:short", "mine.py:some", "mine.py:bad"]
    task = build(tmp_path, code, reward=rewards, reward_weights=[1.0, 0.1, 2.0, 1.0])
    right, other, failed = scores(task, SUM, ["3", "xx", "n"])
    assert right.reward == pytest.approx(1 - 0.1 + 2 * 1.5) and right.correct is True and right.verdict is None
    assert right.components == {"exact": 1.0, "short": -1.0, "some.a": 1.0, "some.b": 0.5, "bad": 0.0}
    assert right.weights == {"short": 0.1, "some.a": 2.0, "some.b": 2.0}
    assert sum(right.weights.get(name, 1) * value for name, value in right.components.items()) == pytest.approx(right.reward)
    assert other.reward == pytest.approx(-0.2) and "some.a" not in other.components and other.correct is False
    assert failed.failure == "not finite" and math.isnan(failed.reward) and "mine.py:bad" in failed.detail
    assert [item.rpartition("/")[2] for item in task.model_dump()["reward"]] == rewards
    with pytest.raises(UserError, match=r"task.reward_weights: 1 weights for 2 rewards"):
        build(tmp_path, reward=["exact", "math"], reward_weights=[1.0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, Rated(reward=1.0)),
        (True, Rated(reward=1.0)),
        (None, Rated()),
        ({"a": 1.0, "b": -0.5}, Rated(reward=0.5, components={"a": 1.0, "b": -0.5})),
        ({"a": 1.0, "b": None}, Rated(reward=1.0, components={"a": 1.0})),
        ({"a": None}, Rated()),
        ({"reward": 2.0, "steps": [[3, 1.0], [9, 0]]}, Rated(reward=2.0, steps=((3, 1.0), (9, 0.0)))),
        (math.inf, "not finite"),
        ({"a": math.nan}, "not finite"),
        ({"a": 1e308, "b": 1e308}, "not finite"),
        ("1.0", "wrong type"),
        ([1.0], "wrong type"),
        (10**400, "not finite"),
        ({"a": 10**400}, "not finite"),
        ({"reward": 1.0, "steps": [[10**400, 1.0]]}, "wrong type"),
        ({"a": {"b": 1.0}}, "wrong type"),
        ({"reward": 1.0, "steps": [[11, 1.0]]}, "wrong type"),
        ({"reward": 1.0, "steps": [[5, 1.0], [4, 1.0]]}, "wrong type"),
        ({"reward": 1.0, "steps": [3]}, "wrong type"),
        ({"reward": 1.0, "steps": [[3, math.nan]]}, "wrong type"),
    ],
)
def test_values_by_hand(value: Any, expected: Rated | str) -> None:
    found = rate_value(value, 10)
    assert found.failure == expected if isinstance(expected, str) else found == expected


def test_values_that_cannot_be_shown() -> None:
    """An integer of more digits than Python writes, and objects nested deeper than its stack."""
    nested: dict[str, Any] = {}
    for _ in range(2000):
        nested = {"a": nested}
    assert [rate_value(value, 10).failure for value in (10**9000, nested)] == ["not finite", "wrong type"]
    assert rate_value({"reward": 1.0, "steps": [[10**9000, 1.0]]}, 10).failure == "wrong type"


@pytest.mark.parametrize(
    ("code", "reward", "message"),
    [
        ("def f(text): return 1", "mine.py:f", r"task.reward: mine.py:f\(text\): a reward is called as reward\(problem"),
        ("def good(problem, completions): pass", "mine.py:god", r"no function 'god'; did you mean 'good'\?"),
        ("1 / 0", "mine.py:f", r"mine.py: ZeroDivisionError: division by zero \(mine.py, line 1\)"),
        ("", "acme/judge", r"no reward 'acme/judge'; known: boxed, .*a reward model \"model:PATH\""),
        ("", "model:acme", r"no model 'acme'"),
        ("", "http://127.0.0.1:99999999/x", r"task.reward: 'http://127.0.0.1:99999999/x' is no URL of a server"),
        ("", "http://[::1/x", r"task.reward: 'http://\[::1/x' is no URL: Invalid port"),
        ("", "http:///x", r"task.reward: 'http:///x' is no URL of a server"),
        ("", [], r"task.reward: names no reward"),
        ("", 3, r"task.reward: value error, expected a reward"),
    ],
)
def test_what_is_no_reward_is_refused(tmp_path: Path, code: str, reward: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, code, reward=reward)


@pytest.mark.parametrize(
    ("reward", "answer", "text", "expected"),
    [
        ("gsm8k", "1,005", "#### 1005", 1.0),
        ("gsm8k", " $72. ", "#### 72", 1.0),
        ("gsm8k", "72", "#### " + "7" * 5000, 0.0),
        ("gsm8k", "72", "#### 0." + "7" * 5000, 0.0),
        ("gsm8k", "72 apples", "no number", "gsm8k: the answer '72 apples' is no number"),
        ("gsm8k", "1/0", "#### 1", "gsm8k: the answer '1/0' is no number"),
        (
            "countdown",
            "12",
            "no expression",
            'countdown: the answer \'12\' is not JSON of the form {"nums": [1, 2], "target": 3}',
        ),
        ("countdown", '{"nums": [[1]], "target": 1}', "<answer>1</answer>", "countdown: the answer"),
        ("countdown", '{"nums": [1]}', "<answer>1</answer>", "countdown: the answer"),
        ("code", "5", "```python\n1\n```", "code: "),
    ],
)
def test_whatever_answers_and_completions_hold(tmp_path: Path, reward: str, answer: str, text: str, expected: Any) -> None:
    """A checker cannot stop the run: what cannot be judged is a failure that says why."""
    (score,) = scores(build(tmp_path, reward=reward), Problem(id="p", prompt="p", answer=answer), [text])
    if isinstance(expected, float):
        assert score.failure is None and score.reward == expected
    else:
        assert score.failure == "raised" and score.detail.startswith(expected)


def test_rollouts_that_are_not_unicode_are_written(tmp_path: Path) -> None:
    """A sampler of one's own may return half of a surrogate pair."""
    directory = RunDirectory(tmp_path, None)
    (tmp_path / "rollouts").mkdir()
    completion = said("\\ \ud800")
    score = Score(reward=1.0, correct=True)
    group = Group(problem=SUM, prompt_tokens=torch.tensor([1]), completions=(completion,), scores=(score,))
    directory.write_rollouts(1, [group])
    line, _ = (tmp_path / "rollouts" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()
    assert completion.text in json.loads(line).values()
    assert "\\ud800" in (tmp_path / "rollouts" / "step-000001.txt").read_text(encoding="utf-8")


def test_many_groups_wait_at_once(tmp_path: Path) -> None:
    """40 groups in one judge at the same time, and 2 in a function that blocks: each waits until the others have come."""
    code = (
        "import asyncio, os, time\nfrom pathlib import Path\nhere = []\n"
        "async def judge(completions, **_):\n    here.append(1)\n"
        "    while len(here) < 40:\n        await asyncio.sleep(0.01)\n    return [1.0] * len(completions)\n"
        f"folder = Path({str(tmp_path / 'here')!r})\n"
        "def blocking(completions, **_):\n    folder.mkdir(exist_ok=True)\n    (folder / str(os.getpid())).touch()\n"
        "    while len(list(folder.iterdir())) < 2:\n        time.sleep(0.01)\n    return [1.0] * len(completions)\n"
    )

    async def many(task: Any, count: int) -> list[float]:
        scores = await asyncio.gather(*(task.score(SUM, [said("3")]) for _ in range(count)))
        return [score.reward for (score,) in scores]

    limit = {"reward_timeout": 60.0}
    assert asyncio.run(many(build(tmp_path, code, reward="mine.py:judge", **limit), 40)) == [1.0] * 40
    assert asyncio.run(many(build(tmp_path, code, reward="mine.py:blocking", reward_workers=2, **limit), 8)) == [1.0] * 8


# --- through real runs


def trainer_of(tmp_path: Path, name: str, seed: int = 0, **task: Any) -> tuple[Trainer, list[Any]]:
    """A trainer of two small steps of GRPO on the sums, and the list of its events."""
    changes = {
        "seed": seed,
        "task": {"name": "dataset", "path": str(tmp_path / "data.jsonl"), **task},
        "algorithm.name": "grpo",
        "rollouts.group_size": 6,
        "rollouts.prompts_per_step": 4,
        "rollouts.max_tokens": 8,
        "training.steps": 2,
        "training.eval_problems": 2,
        "learner.minibatches": 1,
    }
    (tmp_path / "empty.toml").write_text("")
    recipe, source = load(tmp_path / "empty.toml", Recipe, (), changes)
    ready, directory = prepare(recipe, source), RunDirectory(tmp_path / name, None)
    directory.create({})
    events: list[Any] = []

    class Listener:
        def record(self, event: Any) -> None:
            events.append(event)

    trainer = Trainer(ready, directory, [Listener()])
    trainer.recorders.remove(directory)
    return trainer, events


GOOD = """
import asyncio, os, sys, time

def value(text): return (len(text) * 7 + sum(map(ord, text)) * 3) % 11 / 10

def good(prompts, completions, **_): return [value(text) for text in completions]

def bad(prompts, completions, **_):
    rewards = good(prompts, completions)
    if int(prompts[0].partition("+")[0]) % 3 == 0:
        misbehave(rewards)
        rewards = returned(rewards)
    return rewards

async def never(): return 1.0
def misbehave(rewards): pass
def returned(rewards): return rewards
"""

WAYS: dict[str, tuple[str, str | None]] = {
    "raises": ("def misbehave(rewards): raise ValueError('no')", "raised"),
    "hangs": ("def misbehave(rewards): time.sleep(600)", "timeout"),
    "gives NaN": ("def misbehave(rewards): rewards[2] = float('nan')", "not finite"),
    "gives infinity": ("def misbehave(rewards): rewards[2] = float('inf')", "not finite"),
    "gives None": ("def misbehave(rewards): rewards[2] = None", "none"),
    "gives too few": ("def misbehave(rewards): rewards.pop()", "wrong count"),
    "gives a text": ("def misbehave(rewards): rewards[2] = 'good'", "wrong type"),
    "is slow now and then": ("def misbehave(rewards):\n    if max(rewards) > 0.8: time.sleep(600)", "timeout"),
    "prints": ("def misbehave(rewards): print('x' * 300000); os.write(1, b'y'); sys.stdout.flush()", None),
    "ends its process": ("def misbehave(rewards): os._exit(3)", "died"),
    "gives a huge output": ("def returned(rewards): return rewards * 10**6", "too large"),
    "awaits nothing": ("def misbehave(rewards): rewards[2] = never()", "wrong type"),
}


def misbehaving_seed(tmp_path: Path) -> int:
    """A seed whose first problem, on which a reward is tried, is no multiple of 3, while others of the first step are."""
    task = build(tmp_path, GOOD, reward="mine.py:good")
    firsts = {seed: [int(task.problem(i, seed).id.partition("+")[0]) % 3 for i in range(4)] for seed in range(20)}
    return next(seed for seed, left in firsts.items() if left[0] != 0 and left.count(0) == 2)


def without_failures(groups: list[Group]) -> list[Group]:
    """The groups as if the completions that failed had never been sampled."""
    found = []
    for group in groups:
        pairs = [(c, s) for c, s in zip(group.completions, group.scores, strict=True) if s.failure is None]
        completions, left = zip(*pairs, strict=True)
        found.append(Group(problem=group.problem, prompt_tokens=group.prompt_tokens, completions=completions, scores=left))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_reward_does_only_its_completions_are_set_aside(tmp_path: Path, way: str) -> None:
    code, cause = WAYS[way]
    seed = misbehaving_seed(tmp_path)
    (tmp_path / "mine.py").write_text(GOOD + code + "\n")
    options = {"reward": f"{tmp_path}/mine.py:bad", "reward_timeout": 3.0}
    trainer, events = trainer_of(tmp_path, "run", seed, **options)
    trainer.train_step()
    done = next(event for event in events if isinstance(event, StepDone))
    failed = {name: value for name, value in done.metrics.items() if name.startswith("failed/")}
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert set(failed) == ({f"failed/{cause}"} if cause else set())
    assert bool(warnings) == bool(cause) and all("mine.py:bad" in text or cause == "none" for text in warnings)
    assert len(done.groups) == 4 and all(group.scored for group in done.groups)  # failed groups were drawn again

    assert isinstance(done.batch, TrainingBatch)
    of_rows = cause is not None and "rewards[2]" in code
    assert any(len(group.scored) == 5 for group in done.groups) == of_rows
    every = [score for group in done.groups for score in group.scores]
    for row, score in enumerate(every):
        assert (score.failure is not None) == bool(not done.batch.mask_BT[row].any())
        if score.failure is not None:
            assert not done.batch.advantages_BT[row].any()
    for group, rows in zip(done.groups, torch.arange(len(every)).split(6), strict=True):
        rewards = [score.reward for score in group.scores if score.failure is None]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        expected = [(reward - mean) / (spread + 1e-6) if spread else 0.0 for reward in rewards]
        kept = [row for row, score in zip(rows.tolist(), group.scores, strict=True) if score.failure is None]
        assert done.batch.advantages_BT[kept, 0].tolist() == pytest.approx(expected, abs=1e-5)

    other, _ = trainer_of(tmp_path, "other", seed, reward=f"{tmp_path}/mine.py:good")
    groups = without_failures(list(done.groups))
    other.collect = lambda: Collected(groups=groups, seen=groups, rounds=1, frontier=Frontier(begun=len(groups)))  # type: ignore[method-assign]
    other.train_step()
    pairs = zip(trainer.learner.weights().module.parameters(), other.learner.weights().module.parameters(), strict=True)
    assert max(float((one - two).detach().abs().max()) for one, two in pairs) < 2e-6


def test_a_run_whose_rewards_all_fail_stops_and_can_go_on(tmp_path: Path) -> None:
    build(tmp_path)
    code = "def late(completions, trainer_state, **_):\n    share = trainer_state.global_step / trainer_state.max_steps\n"
    code += "    if share == 0.5: raise ValueError('away')\n"
    (tmp_path / "mine.py").write_text(code + "    return [float(len(text)) for text in completions]\n")
    recipe = {
        "task": {"name": "dataset", "path": str(tmp_path / "data.jsonl"), "reward": f"{tmp_path}/mine.py:late"},
        "rollouts": {"group_size": 4, "prompts_per_step": 2, "max_tokens": 4, "max_failed_groups": 3},
        "training": {"steps": 2, "eval_problems": 2, "eval_every": 2},
        "learner": {"minibatches": 1},
        "algorithm": {"name": "grpo"},
    }
    with pytest.raises(RunError, match=r"failed for every completion of 3 groups in a row: 4 raised; .*ValueError: away"):
        gw.train(recipe, out=tmp_path / "run", quiet=True)
    (tmp_path / "mine.py").write_text("def late(completions, **_): return [float(len(text)) for text in completions]\n")
    run = gw.train(resume=tmp_path / "run", quiet=True)
    assert len(run.values("reward/mean")) == 2


def test_python_objects_as_rewards(tmp_path: Path) -> None:
    """A function, an object, and one that cannot be pickled and so runs in a thread of this process."""
    (tmp_path / "data.jsonl").write_text(SUMS)
    offset, called = 0.25, []
    lock = threading.Lock()

    class Scaled:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [self.by * len(text) + offset for text in completions]

    def locked(problem: Any, completions: list[str]) -> list[float]:
        with lock:
            called.append(problem.answer)
        return [1.0 for _ in completions]

    recipe = {
        "task": {"name": "dataset", "path": str(tmp_path / "data.jsonl"), "reward": [Scaled(0.5), locked]},
        "rollouts": {"group_size": 4, "prompts_per_step": 2, "max_tokens": 4},
        "training": {"steps": 1, "eval_problems": 2},
        "learner": {"minibatches": 1},
    }
    run = gw.train(recipe, out=tmp_path / "run", quiet=True)
    assert called and run.values("reward/part/task/locked") == [1.0]
    mean, scaled = run.values("reward/mean")[0], run.values("reward/part/task/Scaled")[0]
    assert mean == pytest.approx(scaled + 1.0, abs=0.3) and "Scaled" in (run.path / "recipe.toml").read_text()


def test_a_hanging_object_in_a_thread_is_given_up(tmp_path: Path) -> None:
    from groupwise.plugins import UserFunction

    event = threading.Event()

    def wait(completions: list[str], **_: Any) -> list[float]:
        event.wait(30)
        return [1.0 for _ in completions]

    (task,) = [build(tmp_path, reward=UserFunction(wait, "x:wait"), reward_timeout=0.3)]
    (score,) = scores(task, SUM, ["3"])
    assert score.failure == "timeout"
    event.set()
    assert scores(task, SUM, ["3"])[0].reward == 1.0


def test_rewards_of_steps_reach_process_supervision(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def stepped(completions, **_):\n"
        "    return [{'reward': 1.0, 'steps': [[len(t) // 2, 0.0], [len(t), float(len(t) % 3)]]} for t in completions]\n"
    )
    recipe = {
        "task": {"name": "dataset", "path": str(tmp_path / "data.jsonl"), "reward": f"{tmp_path}/mine.py:stepped"},
        "algorithm": {"name": "grpo_process"},
        "rollouts": {"group_size": 6, "prompts_per_step": 2, "max_tokens": 8},
        "training": {"steps": 1, "eval_problems": 2},
        "learner": {"minibatches": 1},
    }
    run = gw.train(recipe, out=tmp_path / "run", quiet=True)
    assert run.values("utilisation")[0] > 0


# --- a reward model


def classifier(path: Path, head: bool = True) -> Any:
    tokenizer = character_tokenizer("0123456789+=?ab:\n")
    tokenizer.chat_template = "{% for m in messages %}{{ 'a:' if m.role == 'user' else 'b:' }}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    (LlamaForSequenceClassification if head else LlamaForCausalLM)(config).save_pretrained(path)
    return tokenizer


def test_a_reward_model(tmp_path: Path) -> None:
    """Equal to the classifier's own output, one text at a time, without padding."""
    tokenizer = classifier(tmp_path / "judge")
    task = build(tmp_path, reward="model:judge")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge", num_labels=1).eval()
    texts = ["3", "14", "5+5+5", ""] * 5

    def alone(text: str) -> float:
        with torch.no_grad():
            return float(module(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits)

    assert [s.reward for s in scores(task, SUM, texts)] == pytest.approx([alone("1+2=" + text) for text in texts], abs=1e-5)
    assert scores(task, TALK, ["3"])[0].reward == pytest.approx(alone("a:1+2?\nb:3\n"), abs=1e-5)
    classifier(tmp_path / "base", head=False)
    with pytest.raises(UserError, match=r"task.reward: .*base' is no reward model with one output: .* lack score.weight"):
        build(tmp_path, reward="model:base")


# --- over HTTP


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Starts servers that answer with the given (status, body, headers, seconds), the last one for ever."""
    running = []

    def start(*answers: tuple[int, Any, dict[str, str], float]) -> tuple[str, list[Any]]:
        left, asked = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, body, headers, seconds = left.pop(0) if len(left) > 1 else left[0]
                time.sleep(seconds)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # of a client that has given up
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        running.append(http)
        return f"http://127.0.0.1:{http.server_port}/rewards", asked

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


OK = (200, {"rewards": [1.0, None]}, {}, 0.0)


def test_a_remote_reward(tmp_path: Path, server: Any) -> None:
    url, asked = server(OK)
    task = build(tmp_path, reward=url)
    task.begin_step(2, 5)
    first, second = scores(task, SUM, ["3", "4"])
    assert first.reward == 1.0 and second.failure == "none"
    columns = {"level": 1, "answer": "3"}
    assert asked == [{"prompt": "1+2=", "completions": ["3", "4"], "columns": columns, "step": 2}]


@pytest.mark.parametrize("first", [(500, "broken", {}, 0.0), (503, "", {}, 0.0), (429, "", {"retry-after": "1"}, 0.0)])
def test_a_remote_reward_is_asked_again(tmp_path: Path, server: Any, first: Any) -> None:
    url, asked = server(first, first, OK)
    started = time.monotonic()
    assert scores(build(tmp_path, reward=url), SUM, ["3", "4"])[0].reward == 1.0
    assert len(asked) == 3 and time.monotonic() - started > (2.0 if first[0] == 429 else 0.7)


@pytest.mark.parametrize(
    ("answer", "failure", "detail", "tries"),
    [
        ((500, "broken", {}, 0.0), "unreachable", "HTTP 500: .*broken", 3),
        ((200, {}, {}, 9.0), "timeout", "no answer within 1.5 s", 1),
        ((400, "no such judge", {}, 0.0), "raised", "HTTP 400: .*no such judge", 1),
        ((200, b"<html>", {}, 0.0), "wrong type", "not JSON: '<html>'", 1),
        ((200, [1.0, 2.0], {}, 0.0), "wrong type", 'no "rewards"', 1),
        ((200, {"rewards": [1.0]}, {}, 0.0), "wrong count", "1 values for 2 completions", 1),
        ((200, b'{"rewards": [NaN, NaN]}', {}, 0.0), "not finite", "nan", 1),
        ((200, b'{"rewards": [1' + b"0" * 400 + b", 1" + b"0" * 400 + b"]}", {}, 0.0), "not finite", "hundreds of digits", 1),
        ((200, b"[" * 100_000, {}, 0.0), "wrong type", "not JSON", 1),
        ((200, b"not zipped", {"content-encoding": "gzip"}, 0.0), "wrong type", "DecodingError", 1),
        ((429, "", {"retry-after": "\u00b2"}, 0.0), "unreachable", "HTTP 429", 3),
        ((200, b" " * 5_000_000, {}, 0.0), "too large", "more than", 1),
    ],
)
def test_a_remote_reward_that_fails(tmp_path: Path, server: Any, answer: Any, failure: str, detail: str, tries: int) -> None:
    url, asked = server(answer)
    found = scores(build(tmp_path, reward=url, reward_timeout=1.5), SUM, ["3", "4"])
    assert [score.failure for score in found] == [failure] * 2 and len(asked) == tries
    assert re.search(detail, found[0].detail)


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.1)
    found = scores(build(tmp_path, reward="http://127.0.0.1:9/x", reward_timeout=0.5), SUM, ["3"])
    assert found[0].failure == "unreachable" and "ConnectError" in found[0].detail


def test_requests_at_once_are_bounded(tmp_path: Path, server: Any) -> None:
    url, asked = server((200, {"rewards": [1.0]}, {}, 0.3))
    task = build(tmp_path, reward=url, reward_workers=4)

    async def many() -> float:
        started = time.monotonic()
        await asyncio.gather(*(task.score(SUM, [said("3")]) for _ in range(12)))
        return time.monotonic() - started

    assert 0.85 < asyncio.run(many()) < 2.5 and len(asked) == 12
