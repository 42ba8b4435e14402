"""A run's learner and samplers as its recipe asks for them: started, joined, and ended with the run."""

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from groupwise.cluster.layout import LEARNER, learner_piece, sampler_name, sampler_pieces
from groupwise.cluster.local import LocalLauncher, visible_gpus
from groupwise.cluster.piece import Launcher, Piece
from groupwise.cluster.weights import weights_directory
from groupwise.config import Recipe, dump
from groupwise.errors import RunError
from groupwise.learner.base import Learner
from groupwise.learner.remote import RemoteLearner
from groupwise.rollouts.attending import Limits
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.probe import tolerance_in
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Dialect, Unavailable
from groupwise.training import checkpoints
from groupwise.training.distributed import Distributed
from groupwise.training.pieces import Pieces
from groupwise.training.processes import addresses, check_gpus, learns_elsewhere, uses_gpus
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, resolved
from groupwise.types import Metrics

LOGS, RECIPE = "logs", "recipe.toml"
"""In the run's directory, and beside the published weights: the settings, for the processes."""


class Supervisor:
    """Restarts the pieces of a run, counts how often, and keeps what is to be said of it."""

    def __init__(self, launcher: Launcher, most: int) -> None:
        """`most`: restarts, of all pieces together."""
        self.launcher, self.most = launcher, most
        self.restarted = 0
        self._notes: deque[str] = deque()
        self._lock = threading.Lock()

    def tell(self, text: str) -> None:
        """Keep a note; from any thread."""
        self._notes.append(text)

    def notes(self) -> list[str]:
        """What there is to say since the last call."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def restart_piece(self, name: str) -> str:
        """Start a piece again; returns its address.

        Raises:
            RunError: it cannot be started, or the pieces were restarted too often.
        """
        with self._lock:
            if self.restarted == self.most:
                last = self.launcher.failure(name) or f"{name} did not answer"
                raise RunError(f"the run's processes were restarted {self.most} times (cluster.max_restarts); now {last}")
            self.restarted += 1
        return self.launcher.restart(name)

    # --- what the fleet asks (`Restarts`)

    async def restart(self, index: int, reason: str) -> str:
        try:
            return await asyncio.to_thread(self.restart_piece, sampler_name(index))
        except OSError as error:
            raise Unavailable(str(error)) from error

    def ended(self, index: int) -> str | None:
        return self.launcher.failure(sampler_name(index))


class Launched(Distributed):
    """The pieces of a run, some of which this process has started."""

    def __init__(
        self, ready: Ready, learner: Learner, fleet: Fleet, weights: Path, *, tolerance: float, supervisor: Supervisor
    ) -> None:
        prompt, most = ready.prompt(ready.problem), ready.recipe.rollouts.max_tokens
        super().__init__(learner, fleet, weights, prompt=prompt, max_tokens=most, tolerance=tolerance)
        self.supervisor = supervisor
        self._learner_restarts = 0

    def restart_learner(self) -> None:
        """See `Pieces.restart_learner`."""
        assert isinstance(self.learner, RemoteLearner)
        self._learner_restarts += 1
        self.learner.connect(self.supervisor.restart_piece(LEARNER))

    def notes(self) -> list[str]:
        """See `Pieces.notes`."""
        return self.supervisor.notes()

    def metrics(self) -> Metrics:
        """See `Pieces.metrics`."""
        restarts, self._learner_restarts = self._learner_restarts, 0
        return {**super().metrics(), "cluster/learner_restarts": float(restarts)}


@contextmanager
def launch(ready: Ready, directory: RunDirectory) -> Iterator[Pieces]:
    """Start what a recipe wants in other processes; see `session.Launch`.

    Raises:
        UserError: there are too few GPUs, or what a process is started with is wrong.
        RunError: a process cannot be started.
    """
    recipe = ready.recipe
    with ExitStack() as closing:
        weights = closing.enter_context(weights_directory(recipe, directory.path))
        settings, token = weights / RECIPE, secrets.token_hex(16)
        settings.write_text(dump(resolved(ready)))
        samplers = sampler_pieces(recipe, settings)
        learner = learner_piece(recipe, settings, token) if learns_elsewhere(recipe) else None
        launcher = make_launcher(ready, [*([learner] if learner else []), *samplers], directory.path / LOGS)
        closing.callback(launcher.stop)
        supervisor = Supervisor(launcher, recipe.cluster.max_restarts)
        learns = launcher.start(learner) if learner else None  # first, so that it gets the first GPUs
        at = [launcher.start(piece) for piece in samplers] or addresses(recipe)
        fleet = Fleet(
            at,
            connector(ready),
            limits=Limits(timeout=recipe.cluster.timeout, max_restarts=recipe.cluster.max_restarts),
            restarts=supervisor if samplers else None,
            partial=recipe.cluster.partial,
            most_rows=recipe.rollouts.max_rows,
            tell=supervisor.tell,
        )
        closing.enter_context(fleet)
        if learns is None:
            policy: Learner = ready.make_learner()
        else:
            timeout = recipe.cluster.timeout
            policy = RemoteLearner(learns, token, timeout=timeout, failure=lambda: launcher.failure(LEARNER))
        pieces = Launched(ready, policy, fleet, weights, tolerance=tolerance_of(recipe), supervisor=supervisor)
        if not checkpoints.listed(directory.checkpoints):  # from which the run would go on, and bring their weights
            pieces.bring_weights()
        yield pieces


def make_launcher(ready: Ready, pieces: Sequence[Piece], logs: Path) -> Launcher:
    """What starts these pieces.

    Raises:
        UserError: there are too few GPUs for them, or Ray is not there.
    """
    recipe = ready.recipe
    if recipe.cluster.launcher == "ray":
        from groupwise.cluster.ray import RayLauncher

        return RayLauncher(logs, pieces, recipe.cluster.ray_address)
    gpus = visible_gpus() if uses_gpus(recipe) else []
    check_gpus(recipe, ready.source, len(gpus))
    return LocalLauncher(logs, gpus if learns_elsewhere(recipe) else gpus[1:])  # the first one is this process's


def connector(ready: Ready) -> Callable[[str], Dialect]:
    """Makes the client of a sampler at an address."""
    return lambda address: NativeServer(address, ready.tokenizer)


def tolerance_of(recipe: Recipe) -> float:
    """Nats by which a sampler's log-probabilities may differ from the learner's, given what each computes in."""
    rollouts, model = recipe.rollouts, recipe.model
    names = {model.dtype, recipe.learner.precision, rollouts.dtype or model.dtype, rollouts.cache_dtype or model.dtype}
    return tolerance_in(*(getattr(torch, name) for name in names))
