"""A learner in another process has died: it is started again, and the run goes on from its last checkpoint, as a resume does.

Whatever samples and scores keeps running. Steps after the checkpoint are done again, with the same groups: what they recorded is
removed first, so that the run's history holds every step once.
"""

from typing import TYPE_CHECKING

from groupwise.errors import LearnerLost, RunError
from groupwise.training import checkpoints
from groupwise.training.checkpoints import Checkpoint, name_of
from groupwise.training.segments import metrics_at, read_segments

if TYPE_CHECKING:
    from groupwise.training.loop import Trainer


IN_A_ROW = 10
"""How often the learner may die before the run gets further: then something at that place kills it."""


class Deaths:
    """Of the learner, counted since the run last got further."""

    def __init__(self) -> None:
        self.count, self.furthest = 0, -1

    def note(self, step: int) -> int:
        """One more, in or after this step; returns how many there were in a row."""
        self.count = 1 if step > self.furthest else self.count + 1
        self.furthest = max(self.furthest, step)
        return self.count


def recover(trainer: "Trainer", lost: LearnerLost) -> None:
    """Start the learner again, and take the run up from its newest checkpoint that is whole; without one, from the beginning.

    Raises:
        RunError: the learner cannot be started, or had to be too often.
        UserError: the run has checkpoints, and none is whole.
    """
    reached, run = trainer.step, trainer.run_directory
    restart(trainer, lost)
    checkpoint, damaged = checkpoints.newest(run.checkpoints)
    if checkpoint is None and damaged:
        raise checkpoints.refusal(run.checkpoints, damaged)
    take_up(trainer, checkpoint)
    metrics = metrics_at(read_segments(run.path)[0], checkpoint) if checkpoint else []
    problem = run.rewind(trainer.step, damaged, trainer.store, metrics)
    trainer.watch.catch_up(run.metrics.path)
    for number, reason in damaged.items():
        trainer.warn(f"{name_of(number)} is passed over: {reason}", name="checkpoint_damaged")
    if problem is not None:
        trainer.warn(problem, name="records_damaged")
    trainer.warn(f"the learner was started again; {_where(checkpoint, reached)}", kind="note", name="learner_restarted")


def take_up(trainer: "Trainer", checkpoint: Checkpoint | None) -> None:
    """Load what a checkpoint holds, as often as the learner dies over it.

    Raises:
        RunError: the learner cannot be started again, or had to be too often.
        UserError: the checkpoint does not fit the run.
    """
    while True:
        try:
            return trainer.resume(checkpoint)
        except LearnerLost as lost:
            restart(trainer, lost)


def restart(trainer: "Trainer", lost: LearnerLost) -> None:
    """Start a learner again that has died, and say so.

    Raises:
        RunError: it cannot be started, or had to be too often.
    """
    if trainer.deaths.note(trainer.step) > IN_A_ROW:
        raise RunError(f"{lost}. The learner died {IN_A_ROW + 1} times in a row and the run did not get further")
    trainer.warn(str(lost), name="learner_lost")
    try:
        trainer.pieces.restart_learner()
    except RunError as error:
        raise RunError(f"{lost}; it cannot be started again: {error}") from error


def _where(checkpoint: Checkpoint | None, reached: int) -> str:
    """From where the run goes on that had begun the step `reached`."""
    step = checkpoint.step if checkpoint else 0
    there = f"the run goes on from {name_of(step)}" if step else "there is no checkpoint, so the run begins again"
    if reached == step:
        return there
    return (
        f"{there}: step {reached} is done again"
        if reached == step + 1
        else f"{there}: steps {step + 1} to {reached} are done again"
    )
