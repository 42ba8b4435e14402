"""The keys of [task] that say how completions are rewarded, and the rewards that they name."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr

from groupwise.config import Source
from groupwise.environments.hosting import ENVIRONMENTS, Lent
from groupwise.errors import UserError, nearest
from groupwise.models.reward_model import RewardModel
from groupwise.plugins import UserFunction, find_file, is_reference
from groupwise.rewards.base import Progress, Reward
from groupwise.rewards.checkers import CHECKERS, SLOW_CHECKERS, TIME_LIMIT, CheckerReward
from groupwise.rewards.model import ModelReward
from groupwise.rewards.remote import RemoteReward
from groupwise.rewards.scoring import Rewards
from groupwise.rewards.user import Call, Form, FunctionReward, form_in_this_process, in_processes, in_threads
from groupwise.types import Completion, Problem, Score
from groupwise.workers import Pool, Target, Threads, WorkerError, wait_elsewhere

FEWEST_WORKERS, MOST_WORKERS = 4, 8
"""Worker processes that are started when they are needed, unless `reward_workers` says how many."""
REQUESTS = 32
"""Requests to a server at once, unless it does."""
MODEL, HTTP = "model:", ("http://", "https://")


def _checked(value: Any) -> Any:
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | UserFunction) for item in listed):
        raise ValueError("expected a reward, or a list of rewards")
    return value


def _written(value: Any) -> Any:
    """As a recipe can hold it."""
    if isinstance(value, list):
        return [_written(item) for item in value]
    return value.reference if isinstance(value, UserFunction) else value


class RewardSettings(BaseModel):
    """How a task rewards completions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    reward: Annotated[Any, BeforeValidator(_checked), PlainSerializer(_written)] = "exact"
    """One or a list of: "exact", "last_line", "math", "boxed", "gsm8k", "dapo", "final", "countdown", "code",
    "code-in-processes"; a function of yours, "file.py:function", in TRL's form or taking (problem, completions); a reward model,
    "model:" and a directory or Hugging Face id; a server, "http://…". Left out beside an environment class: none, its
    get_reward() says what a conversation earns."""
    reward_weights: list[float] = []
    """What each reward counts in the sum; left out: 1."""
    correct_above: float | None = None
    """A completion counts as correct when its reward is above this. Left out: the reward of a checker says what is right; where
    there is none the reward is graded, no completion is right or wrong, and what is measured is the mean reward."""
    reward_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a reward may take for the completions of one problem; those are set aside then."""
    reward_workers: Annotated[int, Field(ge=0)] = 0
    """Processes in which rewards compute, or requests that a server is sent at once; 0: as many processes as there are cores, at
    least 4 and at most 8, and 32 requests. Each of several sources has its own."""

    _rewards: Rewards | None = PrivateAttr(default=None)

    @property
    def listed(self) -> list[str | UserFunction]:
        return self.reward if isinstance(self.reward, list) else [self.reward]

    @property
    def needs_answer(self) -> bool:
        """Whether a problem without an answer cannot be scored."""
        return any(name in {**CHECKERS, **SLOW_CHECKERS} for name in self.listed if isinstance(name, str))

    def open_rewards(self, source: Source, base: Path, *, prompt_key: str, answer_key: str) -> None:
        """Find the rewards, load them where they will run, and write files as absolute paths.

        Raises:
            UserError: there is no such reward, or it cannot be called.
        """
        weights = self.reward_weights or [1.0] * len(self.listed)
        if len(weights) != len(self.listed):
            raise source.error("task.reward_weights", f"{len(weights)} weights for {len(self.listed)} rewards")
        builder = _Builder.make(self, base, prompt_key, answer_key)
        try:
            found = [builder.build(item) for item in self.listed]
        except UserError as error:
            raise source.error("task.reward", str(error)) from error
        references = [written for _, written in found]
        self.reward = references if isinstance(self.reward, list) else references[0]
        rewards = [reward for reward, _ in found]
        self._rewards = Rewards(rewards=rewards, weights=weights, correct_above=self.correct_above)

    def begin_step(self, step: int, steps: int) -> None:
        """Tell the rewards how far training has come: `step` steps of `steps` are done."""
        assert self._rewards is not None, "open_rewards() was not called"
        self._rewards.progress = Progress(step, steps)

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        return await self.score_episodes(problem, completions, None)

    async def score_episodes(self, problem: Problem, completions: Sequence[Completion], environments: Lent | None) -> list[Score]:
        """Score completions; `environments`: the instances in which they came about, for rewards that take them."""
        assert self._rewards is not None, "open_rewards() was not called"
        return await self._rewards.score(problem, completions, environments)

    def takes_environments(self) -> Mapping[str, bool]:
        """The rewards that take `environments`, and whether each needs them."""
        assert self._rewards is not None, "open_rewards() was not called"
        found = [reward for reward in self._rewards.rewards if isinstance(reward, FunctionReward)]
        return {reward.place: reward.form.needs_environments for reward in found if ENVIRONMENTS in reward.form.named}


def described(pool: Pool, target: Target, place: str) -> Mapping[str, Any]:
    """What a worker that loads a function finds of it; see `Pool.describe`.

    Raises:
        UserError: it cannot be loaded, or there is none of that name.
    """
    try:
        return wait_elsewhere(pool.describe(target))
    except WorkerError as error:
        if error.known is not None:
            raise UserError(f"{place}: there is no function {target.name!r}{nearest(target.name, error.known)}") from error
        raise UserError(f"{place}: {error.detail}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Builder:
    """Makes rewards from what a recipe names."""

    pool: Pool
    """For the user's functions."""
    checkers: Pool
    """For answers that are compared by math-verify: in processes in which no code of the user's has run."""
    threads: Threads
    base: Path
    limit: float
    requests: int
    keys: dict[str, str]

    @classmethod
    def make(cls, settings: RewardSettings, base: Path, prompt_key: str, answer_key: str) -> "_Builder":
        workers = settings.reward_workers or min(MOST_WORKERS, max(FEWEST_WORKERS, os.cpu_count() or 1))
        return cls(
            pool=Pool(workers),
            checkers=Pool(workers),
            threads=Threads(workers),
            base=base,
            limit=settings.reward_timeout,
            requests=settings.reward_workers or REQUESTS,
            keys={"prompt_key": prompt_key, "answer_key": answer_key},
        )

    def build(self, item: str | UserFunction) -> tuple[Reward, str | UserFunction]:
        """A reward, and how a recipe names it from anywhere.

        Raises:
            UserError: there is none.
        """
        if isinstance(item, UserFunction):
            return self.of_object(item), item
        if item in CHECKERS or item in SLOW_CHECKERS:
            return CheckerReward(item, self.in_worker), item
        if item.startswith(HTTP):
            name = item.partition("://")[2].partition("/")[0].partition("@")[2] or item.partition("://")[2].partition("/")[0]
            return RemoteReward(name=name, url=item, limit=self.limit, concurrency=self.requests, **self.keys), item
        if item.startswith(MODEL):
            path = item.removeprefix(MODEL)
            directory = next((p for p in (self.base / path, Path(path)) if p.is_dir()), None)
            path = path if directory is None else str(directory.resolve())
            return ModelReward(Path(path).name, RewardModel.load(path)), MODEL + path
        if is_reference(item):
            return self.in_file(item)
        known = [*CHECKERS, *SLOW_CHECKERS]
        forms = 'a function of yours is written "file.py:function", a reward model "model:PATH", a server "http://…"'
        raise UserError(f"there is no reward {item!r}{nearest(item, known)}; {forms}")

    async def in_worker(self, target: Target, *args: Any) -> Any:
        return (await self.checkers.call(target, *args, limit=self.limit, cpu_limit=TIME_LIMIT)).value

    def in_file(self, reference: str) -> tuple[Reward, str]:
        path, name = find_file(reference, self.base)
        return self.in_pool(Target.in_file(path, name), str(path)), f"{path}:{name}"

    def of_object(self, given: UserFunction) -> Reward:
        """By value in a worker process; what cannot be pickled runs in a thread of this one."""
        try:
            target = Target.of(given.function)
        except ValueError:
            name = getattr(given.function, "__name__", type(given.function).__name__)
            call = in_threads(self.threads, given.function, limit=self.limit)
            return self.function(name, name, form_in_this_process(given.function, name), call)
        return self.in_pool(target, given.reference)

    def in_pool(self, target: Target, place: str) -> Reward:
        description = described(self.pool, target, place)
        call = in_processes(self.pool, target, limit=self.limit, shared=description["awaited"])
        shown = f"{Path(target.file).name}:{target.name}" if target.file else target.name
        return self.function(target.name, shown, Form.of(description, shown), call)

    def function(self, name: str, place: str, form: Form, call: Call) -> Reward:
        return FunctionReward(name=name, place=place, form=form, call=call, **self.keys)
