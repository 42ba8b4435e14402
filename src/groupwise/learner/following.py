"""One process leads a sharded learner, and the others do what it does."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from groupwise.errors import Diverged, LearnerLost, RunError, UserError, first_line, text_of
from groupwise.files import Digest, DiskError
from groupwise.learner.base import TokenRecord
from groupwise.learner.processes import ManyRanks
from groupwise.learner.updates import Update
from groupwise.models import LanguageModel
from groupwise.types import Batch, LogprobBatch, TrainingBatch

if TYPE_CHECKING:
    from groupwise.learner.sharded import ShardedLearner


OF_FILES = ("save", "load", "publish", "export")
"""Methods that write or read files, which may take long."""
KINDS: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in (DiskError, UserError)}
LOST = ("onnection", "ocket", "imed out", "Broken pipe", "NCCL")
"""In what gloo and NCCL say of another process that has ended or does not answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process reports of what it was asked for."""

    kind: str = ""
    """Of the error that it met; empty: of none."""
    text: str = ""
    """What the error says."""
    files: Mapping[str, Digest] | None = None
    """What it wrote for a checkpoint."""

    @classmethod
    def of(cls, name: str, result: Any, error: BaseException | None) -> "Outcome":
        """Of a call of the method `name`."""
        if error is not None:
            return cls(type(error).__name__, text_of(error))
        return cls(files=result if name == "save" else None)

    def raised(self, rank: int) -> Exception:
        """The error, as one of this process."""
        return KINDS.get(self.kind, RunError)(f"process {rank} of the learner: {self.text}")


def attempt(learner: "ShardedLearner | None", name: str, arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """Call a method; returns its result, and what it raised if the processes are still in step after it.

    They are where all of them see the same (`Diverged`), and where each works `by_itself`.

    Raises:
        Exception: anything else: the others may be waiting for this process in the middle of a forward pass.
    """
    try:
        return getattr(learner, name)(*arguments), None
    except Diverged as error:
        return None, error
    except Alone as error:
        return None, error.__cause__


class Alone(Exception):
    """What went wrong while no process waited for another; its cause says it."""


@contextmanager
def by_itself() -> Iterator[None]:
    """Within: a process reads or writes files, and exchanges nothing with the others.

    Raises:
        Alone: anything went wrong.
    """
    try:
        yield
    except Exception as error:  # reading damaged files may raise anything
        raise Alone from error


def follow(learner: "ShardedLearner | None", ranks: ManyRanks) -> int:
    """Do what process 0 does, until it says to end. Returns the exit code. `learner`: None where making it has failed, so that
    there is only the end to wait for."""
    try:
        while True:
            order = ranks.order()
            if isinstance(order, int):
                ranks.leave()
                return order
            name, arguments = order
            if name == "update":
                arguments = (arguments[0], _forget if arguments[1] else None)
            result, error = attempt(learner, name, arguments)
            ranks.gather(Outcome.of(name, result, error), patient=name in OF_FILES)
    except Exception as error:  # out of memory, a lost connection, or a fault of ours: none can go on without the others
        give_up(ranks, error)


def give_up(ranks: ManyRanks, error: Exception) -> NoReturn:
    """End this process, which is not the first, after leaving word of why."""
    if not is_lost(error):
        known = isinstance(error, UserError | RunError)
        ranks.say_failed(str(error) if known else f"{type(error).__name__}: {first_line(error)}")
        if not known:
            traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)  # without waiting for exchanges that will not end


def explained(ranks: ManyRanks, error: BaseException) -> RunError:
    """Why another process has ended, given what an exchange with it failed with."""
    if failed := ranks.failure():
        return RunError(failed)  # what a process says of itself would happen again
    said = first_line(error).rpartition("] ")[2].split(". ")[0]  # without where in gloo's source it is, and its advice
    return LearnerLost(f"a process of the learner has ended or does not answer: {said}")  # and can be replaced


def is_lost(error: BaseException) -> bool:
    """Whether an exchange failed since another process has ended or does not answer."""
    return isinstance(error, RuntimeError) and any(word in text_of(error) for word in LOST)


def _forget(record: TokenRecord) -> None:
    """Process 0 has the records of all."""


class Leader:
    """The `Learner` of process 0, whose calls all processes carry out."""

    def __init__(self, learner: "ShardedLearner", ranks: ManyRanks) -> None:
        self._learner, self._ranks = learner, ranks
        self.lost: str | None = None
        """Why the processes cannot go on; None: they can."""

    @property
    def version(self) -> int:
        """Optimiser updates taken."""
        return self._learner.version

    def begin_step(self) -> None:
        """See `Learner.begin_step`."""
        self._everywhere("begin_step")

    def take_back(self) -> bool:
        """See `Learner.take_back`."""
        return self.lost is None and bool(self._everywhere("take_back"))

    def compute_logprobs(self, batch: Batch) -> tuple[LogprobBatch, dict[str, float]]:
        """See `Learner.compute_logprobs`."""
        found: tuple[LogprobBatch, dict[str, float]] = self._everywhere("compute_logprobs", batch)
        return found

    def update(self, minibatch: TrainingBatch, record: Callable[[TokenRecord], None] | None = None) -> Update:
        """See `Learner.update`."""
        found: Update = self._everywhere("update", minibatch, record is not None, own=(minibatch, record))
        return found

    def probe(self, tokens: Tensor) -> Tensor:
        """See `Learner.probe`."""
        found: Tensor = self._everywhere("probe", tokens)
        return found

    def publish(self, directory: Path) -> None:
        """See `Learner.publish`."""
        self._everywhere("publish", directory)

    def save(self, directory: Path) -> Mapping[str, Digest]:
        """See `Learner.save`. All processes write into the directory, which all of them must see."""
        found: Mapping[str, Digest] = self._everywhere("save", directory)
        return found

    def load(self, directory: Path) -> None:
        """See `Learner.load`."""
        self._everywhere("load", directory)

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        """See `Learner.export`."""
        found: dict[str, float] = self._everywhere("export", directory, None, own=(directory, tokenizer))
        return found

    def give_weights(self, to: LanguageModel) -> None:
        """Copy the trained weights to a model of this process that is not sharded."""
        self._everywhere("give_weights", own=(to,))

    def close(self, code: int = 0) -> None:
        """Let the other processes exit with a code; the learner is gone then."""
        self.lost = self.lost or "it was closed"
        self._ranks.end(code)

    def _everywhere(self, name: str, *arguments: Any, own: tuple[Any, ...] | None = None) -> Any:
        """Have a method called on all processes; `own`: the arguments on this one, if they differ."""
        if self.lost is not None:
            raise LearnerLost(f"the learner's processes have ended: {self.lost}")
        try:
            self._ranks.order((name, arguments))
            result, error = attempt(self._learner, name, arguments if own is None else own)
            outcomes = self._ranks.gather(Outcome.of(name, result, error), patient=name in OF_FILES)
        except BaseException as error:  # an interrupt too: the others are in the middle of it
            if not is_lost(error):
                self.lost = f"{type(error).__name__}: {first_line(error)}"
                self._ranks.leave()
                raise
            reason = explained(self._ranks, error)
            self.lost = str(reason)
            self._ranks.leave()
            raise reason from error
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome.kind:
                raise outcome.raised(rank)
        if name == "save":
            return {file: digest for outcome in outcomes for file, digest in (outcome.files or {}).items()}
        return result
