"""What a learner must know of the processes that it is sharded over. In a single one, there is nothing to do."""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import Tensor

from groupwise.models import LanguageModel

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Run(Protocol):
    """Runs a function that calls a network."""

    def __call__(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> Result: ...


class Ranks(Protocol):
    """The processes of a learner, as each of them sees them. What they are asked for, all of them must ask for, in one order."""

    rank: int
    """Which of them this one is, from 0."""
    size: int
    """How many there are."""

    def shard(self, model: LanguageModel, network: Any, precision: str) -> Run:
        """Slice the network of a model over the processes, unless it is already, and return what has to run whatever calls it.

        Raises:
            UserError: the model cannot be sharded.
        """
        ...

    def settle(self, network: Any) -> None:
        """After the last backward pass before an update: make the gradients those that a single process would have."""
        ...

    def gather(self, item: Item) -> list[Item]:
        """What each process gives, in their order."""
        ...

    def collect(self, item: Item) -> list[Item]:
        """The same on process 0; nothing on the others."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU."""
        ...


class OneRank:
    """There is one process."""

    rank, size = 0, 1

    def shard(self, model: LanguageModel, network: Any, precision: str) -> Run:
        return call

    def settle(self, network: Any) -> None:
        pass

    def gather(self, item: Item) -> list[Item]:
        return [item]

    def collect(self, item: Item) -> list[Item]:
        return [item]

    def total(self, tensor: Tensor) -> Tensor:
        return tensor


def call(function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
    return function(*arguments, **keywords)


ONE_RANK = OneRank()
