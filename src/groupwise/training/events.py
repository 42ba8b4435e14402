"""What happens in a run, and who is told of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from groupwise.learner.base import TokenRecord
from groupwise.training.evaluate import Evaluation
from groupwise.training.ledger import Entry
from groupwise.types import Batch, Group, Metrics, TrainingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A training step is over."""

    step: int
    """Counted from 1."""
    metrics: Metrics
    groups: Sequence[Group]
    """The groups that were trained on."""
    batch: Batch | TrainingBatch
    """Their completions as rows; a TrainingBatch unless none of them had a trained token."""
    tokens: Sequence[TokenRecord] = field(default_factory=list)
    """What the updates made of each token, on steps on which tokens are recorded."""
    parts: Sequence[Mapping[str, float]] = ()
    """Of each completion, in the order of the groups, what the reward that it was trained on is the sum of; empty: not known."""
    entry: Entry | None = None
    """What became of which groups; None: they have no positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Held-out problems were tried with the weights as they were after `step`."""

    step: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something that a person should know."""

    step: int
    text: str
    """What was seen."""
    kind: Literal["note", "warning", "fault"] = "warning"
    """A fault is what the run ended with."""
    name: str = ""
    """What it is, for programs: "resumed", "entropy_collapse"."""
    advice: str = ""
    """What to do about it."""
    traceback: str = ""
    """Of a fault: where it was raised."""


Event = StepDone | Evaluated | Warned


class Recorder(Protocol):
    """One destination of a run's events: its directory, the terminal, a tracker."""

    def record(self, event: Event) -> None:
        """Take note of an event. Kinds of events that it does not know are to be passed over."""
        ...
