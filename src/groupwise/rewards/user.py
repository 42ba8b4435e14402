"""The user's own reward function, in TRL's form or in ours.

TRL's: called with keywords only, `prompts`, `completions`, `completion_ids`, the dataset's other columns, `trainer_state`,
`log_extra` and `log_metric`; of these it is given what it names, or everything if it takes `**kwargs`. Ours:
`reward(problem, completions)`. Both return a list with a number, a mapping of numbers, or None for each completion, and both may
be asynchronous.

One that names `environments` is called with the environment instances of the completions, in the process where these live.
`**kwargs` do not ask for them, unlike in TRL: a reward that does not read them shall not be loaded in each of these processes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from groupwise.environments.hosting import ENVIRONMENTS, Lent
from groupwise.errors import UserError
from groupwise.rewards.base import Progress, Rated, all_failed
from groupwise.rewards.values import rate_values, with_logs
from groupwise.types import Completion, Problem
from groupwise.workers import Pool, Reply, Target, Threads, WorkerError
from groupwise.workers.child import describe

TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
"""The arguments that TRL gives each reward beside the dataset's columns."""
LOGS = {"log_extra", "log_metric"}
NOT_COLUMNS = {"prompt", "completion", "completion_ids"}
"""Columns that TRL does not pass on."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a function is called."""

    ours: bool
    named: frozenset[str]
    """The parameters that it names."""
    takes_all: bool
    """It has `**kwargs`."""
    needs_environments: bool
    """It cannot be called without `environments`."""

    @classmethod
    def of(cls, description: Mapping[str, Any], name: str) -> "Form":
        """From what `describe` says of a function.

        Raises:
            UserError: it can be called in neither form.
        """
        parameters = description["parameters"] or []
        named = [item["name"] for item in parameters if item["kind"] in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
        takes_all = any(item["kind"] == "VAR_KEYWORD" for item in parameters)
        required = [item["name"] for item in parameters if item["required"] and not item["kind"].startswith("VAR_")]
        needs = ENVIRONMENTS in required
        if [name for name in required if name != ENVIRONMENTS] == ["problem", "completions"] and not takes_all:
            return cls(ours=True, named=frozenset(named), takes_all=False, needs_environments=needs)
        if "completions" in named or takes_all:
            return cls(ours=False, named=frozenset(named), takes_all=takes_all, needs_environments=needs)
        listed = ", ".join(item["name"] for item in parameters)
        raise UserError(
            f"{name}({listed}): a reward is called as reward(problem, completions), or as TRL calls it, by keyword: "
            "prompts, completions, completion_ids, environments, columns of the dataset, trainer_state, log_extra, log_metric"
        )

    def select(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the function takes."""
        return {name: value for name, value in arguments.items() if self.takes_all or name in self.named}

    @property
    def logs(self) -> bool:
        return not self.ours and (self.takes_all or bool(self.named & LOGS))


Call = Callable[..., Awaitable[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReward:
    """A function of the user's."""

    name: str
    place: str
    """What a person is told that it is."""
    form: Form
    call: Call
    """Calls it with args, kwargs, logs and environments, in a worker process or in a thread."""
    answer_key: str
    """The dataset's column with the answer."""
    prompt_key: str

    async def rate(
        self, problem: Problem, completions: Sequence[Completion], progress: Progress, environments: Lent | None = None
    ) -> Sequence[Rated]:
        texts = [completion.text for completion in completions]
        lent = environments if ENVIRONMENTS in self.form.named else None
        try:
            if self.form.ours:
                reply = await self.call(_plain(problem), texts, kwargs={}, logs=False, environments=lent)
            else:
                arguments = self.form.select(self.arguments(problem, completions, progress))
                if lent is not None:
                    arguments.pop(ENVIRONMENTS, None)  # a column of that name, which counts for less in TRL too
                reply = await self.call(kwargs=arguments, logs=self.form.logs, environments=lent)
        except WorkerError as error:
            return all_failed(len(texts), error.kind, f"{self.place}: {error.detail}")
        rated = with_logs(rate_values(reply.value, [len(text) for text in texts]), reply)
        return [_named(one, self.place) for one in rated]

    def arguments(self, problem: Problem, completions: Sequence[Completion], progress: Progress) -> dict[str, Any]:
        """What TRL passes: everything once for each completion."""
        n = len(completions)
        columns = columns_of(problem, self.prompt_key, self.answer_key)
        return {
            **{key: [value] * n for key, value in columns.items()},
            "prompts": [prompt_of(problem)] * n,
            "completions": [said(problem, completion) for completion in completions],
            "completion_ids": [completion.tokens.tolist() for completion in completions],
            "trainer_state": SimpleNamespace(global_step=progress.step, max_steps=progress.steps),
        }


def columns_of(problem: Problem, prompt_key: str, answer_key: str) -> dict[str, Any]:
    """The columns of a problem's row, without those that TRL keeps to itself."""
    columns = {prompt_key: prompt_of(problem), answer_key: problem.answer, **problem.metadata}
    return {key: value for key, value in columns.items() if key not in NOT_COLUMNS}


def prompt_of(problem: Problem) -> Any:
    """A text, or a list of messages."""
    return problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt]


def said(problem: Problem, completion: Completion) -> Any:
    """A completion in the form of its prompt: a text, or a list of messages."""
    if isinstance(problem.prompt, str):
        return completion.text
    return [dict(message) for message in completion.messages] or [{"role": "assistant", "content": completion.text}]


def _plain(problem: Problem) -> SimpleNamespace:
    """A problem's fields in an object that a worker process knows without importing torch."""
    fields = {"id": problem.id, "prompt": prompt_of(problem), "answer": problem.answer, "text": problem.text}
    return SimpleNamespace(**fields, metadata=dict(problem.metadata))


def _named(rated: Rated, place: str) -> Rated:
    """With the reward's place before what a person reads of a failure."""
    if rated.failure is None:
        return rated
    return Rated(failure=rated.failure, detail=f"{place}: {rated.detail}", extra=rated.extra)


def in_processes(pool: Pool, target: Target, *, limit: float, shared: bool) -> Call:
    """Calls of a function in the pool's worker processes, asynchronous ones in one process; with environments, in theirs."""

    async def call(*args: Any, kwargs: Mapping[str, Any], logs: bool, environments: Lent | None = None) -> Reply:
        if environments is not None:
            return await environments.call(target, *args, kwargs=kwargs, limit=limit, logs=logs)
        return await pool.call(target, *args, kwargs=kwargs, limit=limit, shared=shared, logs=logs)

    return call


def in_threads(threads: Threads, function: Callable[..., Any], *, limit: float) -> Call:
    """Calls of a function that cannot be pickled, in threads of this process."""

    async def call(*args: Any, kwargs: Mapping[str, Any], logs: bool, environments: Lent | None = None) -> Reply:
        if environments is not None:
            raise WorkerError("raised", "it takes environments, and cannot be pickled, so as to be called where these live")

        def wait() -> Reply:
            return threads.call(function, *args, kwargs=kwargs, limit=limit, logs=logs)

        return await asyncio.get_running_loop().run_in_executor(None, wait)

    return call


def form_in_this_process(function: Callable[..., Any], name: str) -> Form:
    return Form.of(describe(function), name)
