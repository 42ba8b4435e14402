"""A learner in another process has died: it is started again, and the run goes on from its last checkpoint, as a resume does.

Whatever samples and scores keeps running. Steps after the checkpoint are done again, with the same groups: what they recorded is
removed first, so that the run's history holds every step once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from groupwise.errors import LearnerLost
from groupwise.training import checkpoints
from groupwise.training.checkpoints import Checkpoint, name_of
from groupwise.training.pieces import Pieces
from groupwise.training.segments import metrics_at, read_segments

if TYPE_CHECKING:
    from groupwise.training.loop import Trainer


def recover(trainer: "Trainer", lost: LearnerLost) -> None:
    """Start the learner again, and take the run up from its newest checkpoint that is whole; without one, from the beginning.

    Raises:
        RunError: the learner cannot be started, or had to be too often.
        UserError: the run has checkpoints, and none is whole.
    """
    trainer.warn(str(lost), name="learner_lost", advice="Its own log says more: see RUN/logs.")
    reached, run = trainer.step, trainer.run_directory
    trainer.pieces.restart_learner()
    checkpoint, damaged = checkpoints.newest(run.checkpoints)
    if checkpoint is None and damaged:
        raise checkpoints.refusal(run.checkpoints, damaged)
    persistently(trainer.pieces, lambda: trainer.resume(checkpoint))
    metrics = metrics_at(read_segments(run.path)[0], checkpoint) if checkpoint else []
    problem = run.rewind(trainer.step, damaged, trainer.store, metrics)
    trainer.watch.catch_up(run.metrics.path)
    for number, reason in damaged.items():
        trainer.warn(f"{name_of(number)} is passed over: {reason}", name="checkpoint_damaged")
    if problem is not None:
        trainer.warn(problem, name="records_damaged")
    trainer.warn(f"the learner was started again; {_where(checkpoint, reached)}", kind="note", name="learner_restarted")


def persistently(pieces: Pieces, work: Callable[[], None]) -> None:
    """Do what can be done again, until the learner lives through it.

    Raises:
        RunError: the learner cannot be started, or had to be too often.
    """
    while True:
        try:
            return work()
        except LearnerLost:
            pieces.restart_learner()


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
