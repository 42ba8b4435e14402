"""What the training loop asks of a task, and how a recipe's [task] becomes one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError
from torch import Tensor

from groupwise.config import Source, explain
from groupwise.environments.hosting import Lent
from groupwise.errors import nearest
from groupwise.models import Chat
from groupwise.plugins import is_reference
from groupwise.tasks.arithmetic import ArithmeticTask
from groupwise.tasks.dataset import DatasetTask
from groupwise.tasks.mixture import MixtureTask
from groupwise.tasks.reasoning_gym import ReasoningGymTask
from groupwise.tasks.tools import CalculatorTask, SearchTask
from groupwise.tasks.user import UserTask
from groupwise.types import Completion, Demonstration, Problem, Score


class Task(Protocol):
    @property
    def name(self) -> str: ...

    def problem(self, position: int, seed: int) -> Problem:
        """The training problem at a position of an endless stream that `seed` names."""
        ...

    def held_out(self, count: int) -> list[Problem]:
        """At most `count` problems that are never trained on, the same for every run."""
        ...

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> Sequence[Score]:
        """A score for each completion of a problem.

        Any number of groups may be scored at once, while others are generated in the same thread: what computes for long, or
        waits, must do so elsewhere and be awaited.
        """
        ...

    def model_dump(self) -> dict[str, Any]:
        """Its settings, from which `build_task` makes it again."""
        ...

    def demonstration(self, position: int, seed: int) -> Demonstration:
        """The supervised example at a position of an endless stream."""
        ...


@runtime_checkable
class FollowsTraining(Protocol):
    """A task whose scores may depend on how far training has come."""

    def begin_step(self, step: int, steps: int) -> None:
        """`step` training steps of `steps` are done."""
        ...


@runtime_checkable
class TakesEnvironments(Protocol):
    """A task whose rewards may be called with the environments of the completions."""

    async def score_episodes(
        self, problem: Problem, completions: Sequence[Completion], environments: Lent | None
    ) -> Sequence[Score]:
        """As `Task.score`; `environments`: the instance in which each completion came about; None: of no class."""
        ...

    def takes_environments(self) -> Mapping[str, bool]:
        """The rewards that take environments, by name, and whether each needs them."""
        ...


TASKS: dict[str, Any] = {
    "arithmetic": ArithmeticTask,
    "calculator": CalculatorTask,
    "dataset": DatasetTask,
    "reasoning-gym": ReasoningGymTask,
    "search": SearchTask,
}
"""Name -> a pydantic model of the task's settings that is a `Task`."""


def build_task(settings: dict[str, Any], source: Source, *, environment: bool = False) -> Task:
    """The task that a recipe's [task] describes.

    Args:
        settings, source: the table, and where it was written.
        environment: whether an environment class rewards completions, so that a dataset that names no reward has none.

    Raises:
        UserError: an unknown task, key or value, or data that cannot be read.
    """
    settings = {"name": ArithmeticTask().name, **settings}
    name = settings["name"]
    if environment and name == "dataset" and not {"reward", "preset"} & settings.keys():
        settings["reward"] = []
    if not environment and settings.get("reward") == []:
        raise source.error("task.reward", "names no reward")
    if is_reference(name):
        return UserTask.build(settings, source)
    if name == "dataset" and "sources" in settings:
        return MixtureTask.build(settings, source)
    if not isinstance(name, str) or name not in TASKS:
        raise source.error("task.name", f"there is no task {name!r}{nearest(str(name), TASKS)}")
    try:
        task: Task = TASKS[name].model_validate(settings)
    except ValidationError as error:
        raise explain(error, TASKS[name], source, "task.") from error
    if isinstance(task, DatasetTask | ReasoningGymTask):
        task.open(source, base=Path(source.path).parent)
    return task


def datasets_of(task: Task) -> list[DatasetTask]:
    """The datasets that a task draws from."""
    return task.tasks if isinstance(task, MixtureTask) else [task] if isinstance(task, DatasetTask) else []


def sandboxes_of(task: Task) -> list[str]:
    """The boxes that a task's rewards run programs in, and what of the kernel confines these."""
    asked = [task] if isinstance(task, ReasoningGymTask) else datasets_of(task)
    return sorted({box.describe() for item in asked for box in item.boxes()})


def limit_prompts(task: Task, chat: Chat, source: Source, encode: Callable[[Problem], Tensor] | None = None) -> None:
    """Leave out the problems whose prompts, as the model reads them, are longer than the task's `max_prompt_tokens`.

    Args:
        encode: int64 [L], a problem's prompt with the tools in it; left out: there are none.

    Raises:
        UserError: none is left, or a system prompt needs a chat template.
    """
    encode = encode or (lambda problem: chat.encode(problem.prompt))
    for number, dataset in enumerate(datasets_of(task)):
        place = source.inside("task", f"task.sources[{number}]") if isinstance(task, MixtureTask) else source
        if dataset.system_prompt and not chat.template:
            raise place.error("task.system_prompt", "needs a chat template, which is not used here")
        dataset.limit_prompts(encode, place)
