"""Rewards that take `environments`, as in TRL: they read the very instances that the conversations changed."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Recipe, Source, load
from groupwise.environments.find import Found, kind_of
from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.models import Chat, new_module
from groupwise.plugins import UserFunction
from groupwise.rewards.settings import RewardSettings
from groupwise.tasks.mixture import MixtureTask
from groupwise.training.setup import Ready, prepare, resolved
from groupwise.types import Completion, Group, Problem
from tests.test_environments import END, Scripted, call, converse
from tests.test_environments import chat as chat

COUNTER = '''
"""As in TRL's documentation of environments: the reward reads an attribute of the instance."""


class Counter:
    def reset(self, start, **kwargs):
        self.counter, self.score = start, 0.0

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        self.score = self.counter / 2
        return self.counter

    def _doubled(self):
        return 2 * self.counter


class Paid(Counter):
    def get_reward(self):
        return 100.0


class Unmade(Counter):
    made = 0

    def __init__(self):
        Unmade.made += 1
        self.number = Unmade.made
        if self.number == 2:
            raise RuntimeError("no room")

    def reset(self, start, **kwargs):
        super().reset(start)
        if self.number == 3:
            raise RuntimeError("no start")
'''

REWARDS = """
import asyncio, os, time
from counter import Counter

def of_state(completions, environments, **kwargs):
    return [environment.score for environment in environments]

async def later(environments, completions, log_extra, log_metric, **kwargs):
    await asyncio.sleep(0.01)
    log_extra("counter", [environment.counter for environment in environments])
    log_metric("mean", sum(environment.counter for environment in environments) / len(environments))
    return [10.0 * environment.counter for environment in environments]

def of_class(completions, environments, start, **kwargs):
    return [float(isinstance(e, Counter)) + s for e, s in zip(environments, start)]

def ours(problem, completions, environments):
    return [environment._doubled() + len(text) / 100 for environment, text in zip(environments, completions)]

def optional(completions, environments=None, **kwargs):
    return [float(environments is None) for _ in completions]

def by_kwargs(completions, **kwargs):
    return [float("environments" in kwargs) for _ in completions]

def raises(completions, environments, **kwargs):
    return [environment.points for environment in environments]

def short(completions, environments, **kwargs):
    return [1.0]

def partly(completions, environments, **kwargs):
    return [None if environment.counter == 7 else float("nan") for environment in environments]

def hangs(completions, environments, **kwargs):
    time.sleep(60)

async def waits(completions, environments, **kwargs):
    await asyncio.sleep(60)

def dies(completions, environments, **kwargs):
    os._exit(1)
"""

PROBLEM = Problem(id="p", prompt="go", answer="", metadata={"start": 5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "counter.py").write_text(COUNTER)
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def rewarded(base: Path, *rewards: Any, **settings: Any) -> RewardSettings:
    task = RewardSettings(reward=list(rewards), **settings)
    task.open_rewards(Source(Path("recipe.toml"), ""), base, prompt_key="prompt", answer_key="answer")
    return task


def kind(base: Path, name: str = "Counter") -> Kind:
    return kind_of(Found.of(f"counter.py:{name}", base), [])


def says(i: int, n: int) -> str:
    """The i-th of a group adds i + 1, twice."""
    return f"done{END}" if n == 2 else call("increment", step=i + 1)


def scored(chat: Chat, made: Kind, task: RewardSettings, n: int = 3, say: Callable[[int, int], str] = says, **more: Any) -> Group:
    return converse(chat, made, say, n=n, task=task, problem=PROBLEM, **more)[0]


def rewards_of(group: Group) -> list[float]:
    assert [score.failure for score in group.scores] == [None] * len(group.scores), group.scores
    return [score.reward for score in group.scores]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("of_state", [3.5, 4.5, 5.5]),
        ("later", [70.0, 90.0, 110.0]),
        ("ours", [14.04, 18.04, 22.04]),
        ("of_class", [6.0, 6.0, 6.0]),  # the class that the rewards' file imports is that of the instances
        ("optional", [0.0, 0.0, 0.0]),
        ("by_kwargs", [0.0, 0.0, 0.0]),
    ],
)
def test_a_reward_in_a_file_reads_what_tools_changed(chat: Chat, folder: Path, reward: str, expected: list[float]) -> None:
    task = rewarded(folder, f"rewards.py:{reward}")
    if reward == "ours":  # the text of a conversation is all of it, what tools said included
        group = scored(chat, kind(folder), task)
        expected = [2 * c + len(item.text) / 100 for c, item in zip((7, 9, 11), group.completions, strict=True)]
    else:
        group = scored(chat, kind(folder), task)
    assert rewards_of(group) == pytest.approx(expected)
    if reward == "later":
        assert [score.extra["counter"] for score in group.scores] == [7, 9, 11]
        assert group.scores[0].metrics == {"mean": 9.0}


def test_several_rewards_and_get_reward_together(chat: Chat, folder: Path) -> None:
    task = rewarded(folder, "rewards.py:of_state", "rewards.py:later", "rewards.py:by_kwargs", reward_weights=[2.0, 1.0, 1.0])
    group = scored(chat, kind(folder), task)
    assert rewards_of(group) == [77.0, 99.0, 121.0]
    assert group.scores[0].components == {"of_state": 3.5, "later": 70.0, "by_kwargs": 0.0}
    assert rewards_of(scored(chat, kind(folder, "Paid"), task)) == [100.0] * 3
    both = scored(chat, kind(folder, "Paid"), task, task_reward=True)
    assert rewards_of(both) == [177.0, 199.0, 221.0]
    assert both.scores[1].components == {"of_state": 4.5, "later": 90.0, "by_kwargs": 0.0, "environment": 100.0}


def object_of(value: Any) -> UserFunction:
    return UserFunction(value, "here:value")


def test_python_objects(chat: Chat, folder: Path) -> None:
    class Counter:
        """A class that only this function knows."""

        def reset(self, start: int, **row: Any) -> None:
            self.counter = start

        async def increment(self, step: int) -> int:
            """
            Increment the internal counter.

            Args:
                step: Value to add to the counter.
            """
            await asyncio.sleep(0)
            self.counter += step
            return self.counter

    def of_state(completions: Any, environments: Any, **_: Any) -> list[float]:
        assert all(isinstance(environment, Counter) for environment in environments)
        return [float(environment.counter) for environment in environments]

    async def later(completions: Any, environments: Any, **_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return of_state(completions, environments)

    lock = threading.Lock()

    def unpicklable(completions: Any, environments: Any, **_: Any) -> list[float]:
        with lock:
            return of_state(completions, environments)

    made = kind_of(Found.of(object_of(Counter), folder), [])
    group = scored(chat, made, rewarded(folder, object_of(of_state), object_of(later)))
    assert rewards_of(group) == [14.0, 18.0, 22.0]
    group = scored(chat, made, rewarded(folder, object_of(unpicklable)))
    assert {score.failure for score in group.scores} == {"raised"} and "cannot be pickled" in group.scores[0].detail


@pytest.mark.parametrize(
    ("reward", "cause", "detail"),
    [
        ("raises", "raised", "AttributeError: 'Counter' object has no attribute 'points'"),
        ("short", "wrong count", "1"),
        ("hangs", "timeout", "no result within 0.5 s"),
        ("waits", "timeout", "no result within 0.5 s"),
        ("dies", "died", "its process ended"),
    ],
)
def test_a_reward_that_fails_sets_its_group_aside(chat: Chat, folder: Path, reward: str, cause: str, detail: str) -> None:
    task = rewarded(folder, f"rewards.py:{reward}", reward_timeout=0.5)
    group = scored(chat, kind(folder), task)
    assert [score.failure for score in group.scores] == [cause] * 3
    assert detail in group.scores[0].detail and f"rewards.py:{reward}" in group.scores[0].detail
    # What they did to their process concerns no other group.
    assert rewards_of(scored(chat, kind(folder), rewarded(folder, "rewards.py:of_state"))) == [3.5, 4.5, 5.5]


def test_each_completion_is_judged_for_itself(chat: Chat, folder: Path) -> None:
    group = scored(chat, kind(folder), rewarded(folder, "rewards.py:partly"))
    assert [score.failure for score in group.scores] == ["none", "not finite", "not finite"]


def test_conversations_that_are_set_aside_are_not_passed(chat: Chat, folder: Path) -> None:
    """The second instance is not made and the third not reset: the first's and the fourth's stand in their places."""
    seen: list[int] = []

    class Task(RewardSettings):
        async def score_episodes(self, problem: Problem, completions: Sequence[Completion], environments: Any) -> Any:
            seen.append(len(completions))
            return await super().score_episodes(problem, completions, environments)

    task = Task(reward="rewards.py:of_state")
    task.open_rewards(Source(Path("recipe.toml"), ""), folder, prompt_key="prompt", answer_key="answer")
    group = scored(chat, kind(folder, "Unmade"), task, n=4)
    assert [score.failure for score in group.scores] == [None, "raised", "raised", None]
    assert [score.reward for score in group.scores if score.failure is None] == [3.5, 6.5]
    assert seen == [2]


RECIPE = """
[model]
path = "MODEL"
[task]
name = "dataset"
path = "rows.jsonl"
REWARD
[environment]
class = "counter.py:Counter"
max_turns = 3
[algorithm]
name = "grpo"
[rollouts]
group_size = 3
prompts_per_step = 2
max_tokens = 400
[learner]
minibatches = 1
"""


def ready(folder: Path, chat: Chat, reward: str, changes: Mapping[str, str] = {}) -> Ready:
    """A recipe on a tiny model; its rows have no answer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 2048, **sizes}
    new_module(settings, chat.tokenizer, seed=3).save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    rows = "".join(f'{{"prompt": "go {i}", "start": {i}}}\n' for i in range(20))
    (folder / "rows.jsonl").write_text(rows)
    text = RECIPE.replace("REWARD", reward).replace("MODEL", str(folder / "model"))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "my.toml").write_text(text)
    return prepare(*load(folder / "my.toml", Recipe))


def test_a_recipe_of_a_class_without_get_reward(folder: Path, chat: Chat) -> None:
    made = ready(folder, chat, 'reward = "rewards.py:of_state"')
    problems = [made.task.problem(i, 0) for i in range(2)]
    rollouts = made.rollouts(Scripted(made.tokenizer, lambda i, n: says(i % 3, n)))
    groups, _ = rollouts.groups(problems, 3, seed=0)
    starts = [problem.metadata["start"] for problem in problems]
    assert [rewards_of(group) for group in groups] == [[(start + 2 * (i + 1)) / 2 for i in range(3)] for start in starts]
    assert resolved(made)["task"]["reward"] == f"{folder}/rewards.py:of_state"


def test_sources_with_rewards_of_their_own(folder: Path, chat: Chat) -> None:
    sources = """
[[task.sources]]
path = "rows.jsonl"
reward = "rewards.py:of_state"
[[task.sources]]
path = "more.jsonl"
reward = "rewards.py:by_kwargs"
"""
    (folder / "more.jsonl").write_text("".join(f'{{"prompt": "stop {i}", "start": {i}}}\n' for i in range(20)))
    made = ready(folder, chat, sources, {'path = "rows.jsonl"\n\n': ""})
    assert isinstance(made.task, MixtureTask) and made.task.takes_environments() == {"rewards.py:of_state": True}
    problems = sorted((made.task.problem(i, 0) for i in range(2)), key=lambda problem: problem.source)
    rollouts = made.rollouts(Scripted(made.tokenizer, lambda i, n: says(i % 3, n)))
    groups, _ = rollouts.groups(problems, 3, seed=0)
    start = problems[0].metadata["start"]
    assert rewards_of(groups[0]) == [(start + 2 * (i + 1)) / 2 for i in range(3)]
    assert rewards_of(groups[1]) == [0.0] * 3


NO_CLASS = {'class = "counter.py:Counter"\n': "", "max_turns = 3\n": ""}


def test_what_can_never_be_scored_is_refused_before_training(folder: Path, chat: Chat) -> None:
    with pytest.raises(UserError, match=r"task.reward: rewards\.py:of_state takes environments, and there is no env"):
        ready(folder, chat, 'reward = ["rewards.py:by_kwargs", "rewards.py:of_state"]', NO_CLASS)
    with pytest.raises(UserError, match=r"scoring fails: .*rewards.py:raises: AttributeError: .*'points'"):
        ready(folder, chat, 'reward = "rewards.py:raises"')
    ready(folder, chat, 'reward = "rewards.py:optional"', NO_CLASS)


def test_a_column_named_environments(folder: Path, chat: Chat) -> None:
    """Without a class it is a column as any other; with one the instances take its place, as in TRL."""
    (folder / "rewards.py").write_text(
        "def reward(completions, environments, **kwargs): return [float(isinstance(e, str)) for e in environments]"
    )
    columns = PROBLEM.metadata | {"environments": "text"}
    problem = Problem(id="p", prompt="go", answer="", metadata=columns)
    task = rewarded(folder, "rewards.py:reward")
    group, _ = converse(chat, kind(folder), says, n=2, task=task, problem=problem)
    assert rewards_of(group) == [0.0, 0.0]
    scores = asyncio.run(task.score(problem, group.completions))
    assert [score.reward for score in scores] == [1.0, 1.0]
