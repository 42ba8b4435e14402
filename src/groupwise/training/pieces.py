"""The parts of a run that may live in other processes, and how new weights get from the one to the other."""

from dataclasses import dataclass
from typing import Protocol

from groupwise.learner.base import Learner
from groupwise.learner.local import LocalLearner
from groupwise.rollouts.base import LocalSampler, Sampler
from groupwise.training.setup import Ready
from groupwise.types import Metrics


class Pieces(Protocol):
    """A learner and what samples, wherever they run."""

    @property
    def learner(self) -> Learner: ...

    @property
    def sampler(self) -> Sampler: ...

    def bring_weights(self) -> None:
        """Sample with the learner's weights, as they are now, from now on."""
        ...

    def restart_learner(self) -> None:
        """End what is left of the learner's processes, and start them again. `learner` stays the object that it is, and learns
        from the base model, as when a run begins. Samplers keep running.

        Raises:
            RunError: they cannot be started, or had to be too often.
        """
        ...

    def notes(self) -> list[str]:
        """What became of the processes since the last call, for people: faults, restarts."""
        ...

    def metrics(self) -> Metrics:
        """Numbers about the processes since the last call, for the step that was just done; names begin with "cluster/"."""
        ...


@dataclass(frozen=True, slots=True)
class InProcess:
    """Both in this process, where the sampler takes the weights from the learner's own tensors."""

    learner: LocalLearner
    sampler: LocalSampler

    @classmethod
    def of(cls, ready: Ready) -> "InProcess":
        """
        Raises:
            UserError: there is not enough memory to train the model, or the user's sampler cannot be made.
        """
        learner = ready.make_learner()
        return cls(learner, ready.make_sampler(learner.weights()))

    def bring_weights(self) -> None:
        self.sampler.load(self.learner.weights(), self.learner.version)

    def restart_learner(self) -> None:
        raise AssertionError("a learner in this process ends with it")

    def notes(self) -> list[str]:
        return []

    def metrics(self) -> Metrics:
        return {}
