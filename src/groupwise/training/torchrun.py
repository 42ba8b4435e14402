"""`torchrun --nproc-per-node N -m groupwise train RECIPE`: the learner is sharded over the processes that torchrun starts.

Process 0 is the run: it samples, with a whole copy of the weights, scores, and leads the learner. The others learn with it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import typer

from groupwise.copies import copies
from groupwise.errors import RunError, UserError
from groupwise.learner.following import Leader
from groupwise.learner.processes import ManyRanks
from groupwise.learner.sharded import build
from groupwise.models import LanguageModel
from groupwise.rollouts.base import LocalSampler
from groupwise.training.algorithm import build_algorithm
from groupwise.training.processes import check_devices, has_processes
from groupwise.training.records import RunDirectory
from groupwise.training.session import Launch
from groupwise.training.setup import Ready, load_for_training
from groupwise.types import Metrics


@dataclass(frozen=True, slots=True)
class Sharded:
    """The leader of a sharded learner, and a sampler in this process with a whole copy of the policy."""

    learner: Leader
    sampler: LocalSampler
    copy: LanguageModel

    def bring_weights(self) -> None:
        self.learner.give_weights(self.copy)
        self.sampler.load(self.copy, self.learner.version)

    def restart_learner(self) -> None:
        raise RunError("torchrun has started its processes, this one too, and ends all of them")

    def notes(self) -> list[str]:
        return []

    def metrics(self) -> Metrics:
        return {}


ANNOUNCED = "the learner is sharded over the processes of torchrun; the first one samples, and the others wait meanwhile"


@contextmanager
def led() -> Iterator[Launch | None]:
    """Within: what launches a run over the processes of torchrun; None where it has not started this one.

    Processes but the first do not get there: they take part in the run of the first, and exit with its code.
    """
    if copies() == 1:
        yield None
        return
    ranks = ManyRanks.join()
    if ranks.rank:
        _follow(ranks)
    code = 1
    try:
        yield partial(_launched, ranks)
        code = 0
    except (typer.Exit, SystemExit) as leaving:
        code = getattr(leaving, "exit_code", getattr(leaving, "code", 1))
        raise
    finally:
        ranks.end(code)


def _follow(ranks: ManyRanks) -> None:
    """Take part in the run of process 0.

    Raises:
        SystemExit: when that ends.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # which reach all: it is for process 0 to end the run
        signal.signal(number, signal.SIG_IGN)
    try:
        order = ranks.order()
    except RuntimeError:  # process 0 has ended
        os._exit(1)
    if isinstance(order, int):
        raise SystemExit(order)
    recipe, source = order
    algorithm = build_algorithm(recipe.algorithm, source)
    build(recipe, algorithm, partial(load_for_training, recipe, source, algorithm, ranks.size), ranks)


@contextmanager
def _launched(ranks: ManyRanks, ready: Ready, directory: RunDirectory) -> Iterator[Sharded]:
    """
    Raises:
        UserError: the recipe asks for processes of its own, or the model cannot be sharded.
    """
    recipe, source = ready.recipe, ready.source
    if ready.model is None or has_processes(recipe):
        raise UserError(
            "torchrun and [cluster] both start processes: leave out cluster.learners and cluster.samplers, or torchrun"
        )
    check_devices(recipe, source)
    ranks.order((recipe, source))
    leader = build(recipe, ready.algorithm, partial(load_for_training, recipe, source, ready.algorithm, ranks.size), ranks)
    yield Sharded(leader, ready.make_sampler(ready.model), ready.model)
