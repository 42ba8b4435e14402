"""A run's learner and samplers as its recipe asks for them: started, joined, and ended with the run."""

import asyncio
import re
import secrets
import shlex
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from groupwise.cluster.layout import LEARNER, learner_piece, sampler_name, sampler_pieces
from groupwise.cluster.local import LocalLauncher, visible_gpus
from groupwise.cluster.piece import EXITED, Launcher, Piece
from groupwise.cluster.planning.shape import shape_of
from groupwise.cluster.weights import weights_directory
from groupwise.config import Recipe, dump
from groupwise.errors import RunError, UserError
from groupwise.learner.base import Learner
from groupwise.learner.remote import RemoteLearner
from groupwise.models import load_config
from groupwise.models.loading import stored_end_tokens
from groupwise.rollouts.attending import Limits
from groupwise.rollouts.detected import DetectedServer
from groupwise.rollouts.driver import wait_for
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.probe import tolerance_in
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Dialect, Refused, Unavailable
from groupwise.rollouts.vllm import VllmServer
from groupwise.training import checkpoints
from groupwise.training.distributed import Distributed
from groupwise.training.pieces import Pieces
from groupwise.training.processes import addresses, check_gpus, gpus_per_sampler, learns_elsewhere, sampler_kind, uses_gpus
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, resolved
from groupwise.types import Metrics

RECIPE = "recipe.toml"
"""Beside the published weights: the settings, for the processes."""


LOOKS = 0.2
"""Seconds between two looks whether a server answers."""
STARTS = 16
"""Samplers that are started at a time."""
DYING = 1.0
"""Seconds within which the end of a process is known."""
MOST_EXITS = 3
"""How often in a row a piece may end with an exit status of its own, which starting it again hardly changes."""


class Supervisor:
    """Restarts the pieces of a run, counts how often, and keeps what is to be said of it."""

    def __init__(self, launcher: Launcher, most: int) -> None:
        """`most`: restarts, of all pieces together."""
        self.launcher, self.most = launcher, most
        self.restarted = 0
        self._exits: Counter[str] = Counter()
        """Of pieces since new weights were last brought: how often each ended with an exit status of its own."""
        self.begun = False
        """Whether the samplers have sampled with weights that were brought to them."""
        self._notes: deque[str] = deque()
        self._lock = threading.Lock()

    def tell(self, text: str) -> None:
        """Keep a note; from any thread."""
        self._notes.append(text)

    def begin(self) -> None:
        """The pieces work: what they ended with before no longer counts."""
        with self._lock:
            self.begun = True
            self._exits.clear()

    def notes(self) -> list[str]:
        """What there is to say since the last call."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def restart_piece(self, name: str) -> str:
        """Start a piece again; returns its address.

        Raises:
            RunError: it cannot be started, or the pieces were restarted too often.
        """
        with self._lock:
            failure = self._failure(name)
            self._exits[name] += failure is not None and EXITED in failure
            if failure is not None and self._exits[name] == (MOST_EXITS if self.begun else 1):
                raise RunError(failure)
            if self.restarted == self.most:
                last = failure or f"{name} did not answer"
                raise RunError(f"the run's processes were restarted {self.most} times (cluster.max_restarts); now {last}")
            self.restarted += 1
        reason = short_of(failure) if failure else f"{name} does not answer"
        self.tell(f"{reason}, and is started again")
        return self.launcher.restart(name)

    def _failure(self, name: str) -> str | None:
        """What a piece ended with, which is known a moment after its connections broke; None: it still runs."""
        deadline = time.monotonic() + DYING
        while (failure := self.launcher.failure(name)) is None and time.monotonic() < deadline:
            time.sleep(DYING / 20)
        return failure

    # --- what the fleet asks (`Restarts`)

    async def restart(self, index: int, reason: str) -> str:
        try:
            return await asyncio.to_thread(self.restart_piece, sampler_name(index))
        except OSError as error:
            raise Unavailable(str(error)) from error

    def ended(self, index: int) -> str | None:
        failure = self.launcher.failure(sampler_name(index))
        return failure and short_of(failure)


def short_of(failure: str) -> str:
    """What became of a piece, without the end of its log."""
    return failure.partition("; ")[0]


class Launched(Distributed):
    """The pieces of a run, some of which this process has started."""

    def __init__(
        self, ready: Ready, learner: Learner, fleet: Fleet, weights: Path, *, tolerance: float, supervisor: Supervisor
    ) -> None:
        prompt, most = ready.prompt(ready.problem), ready.recipe.rollouts.max_tokens
        super().__init__(learner, fleet, weights, prompt=prompt, max_tokens=most, tolerance=tolerance)
        self.supervisor = supervisor
        self._learner_restarts = 0

    def bring_weights(self) -> None:
        """See `Pieces.bring_weights`."""
        super().bring_weights()
        self.supervisor.begin()

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
        UserError: there are too few GPUs, what a process is started with is wrong, or a server at an address is of another kind.
        RunError: a process cannot be started.
    """
    recipe = ready.recipe
    with ExitStack() as closing:
        weights = closing.enter_context(weights_directory(recipe, directory.path, weights_size(ready)))
        settings, token = weights / RECIPE, secrets.token_hex(16)
        settings.write_text(dump(resolved(ready)))
        samplers = sampler_pieces(recipe, settings)
        learner = learner_piece(recipe, settings, token) if learns_elsewhere(recipe) else None
        launcher = make_launcher(ready, [*([learner] if learner else []), *samplers], directory.logs)
        closing.callback(launcher.stop)
        supervisor = Supervisor(launcher, recipe.cluster.max_restarts)
        learns = launcher.start(learner) if learner else None  # first, so that it gets the first GPUs
        with ThreadPoolExecutor(STARTS) as starting:
            at = list(starting.map(launcher.start, samplers)) or addresses(recipe)
        connect = connector(ready)
        for address in addresses(recipe):
            try:
                wait_for(await_answer(connect(address), address, recipe.cluster.timeout))
            except Refused as error:
                raise ready.source.error("rollouts.sampler", str(error)) from error
        fleet = Fleet(
            at,
            connect,
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
            with told_of(settings, ready):
                pieces.bring_weights()
        yield pieces


def weights_size(ready: Ready) -> int:
    """Bytes of the weights that are published; 0: not known."""
    model = ready.recipe.model
    if ready.model is not None:
        count = ready.model.num_parameters()
    else:
        count = 0
        with suppress(UserError):  # where the sizes of a model cannot be read, a run does not need them
            config = load_config(model.path, trust_remote_code=model.trust_remote_code)
            count = shape_of(config, trust_remote_code=model.trust_remote_code).parameters
    return count * int(getattr(torch, model.dtype).itemsize)


async def await_answer(server: Dialect, address: str, limit: float) -> None:
    """Wait for a server that runs already.

    Raises:
        Refused: it is no server to sample from, or lacks what that needs.
        RunError: it has not answered within so many seconds.
    """
    problem: Exception = TimeoutError("it does not answer")
    try:
        async with asyncio.timeout(limit):
            while True:
                try:
                    await server.health()
                    return
                except Unavailable as error:
                    problem = error
                await asyncio.sleep(LOOKS)
    except TimeoutError:
        raise RunError(f"no sampler has answered at {address} for {limit:g} s (cluster.timeout): {problem}") from problem
    finally:
        await server.close()


@contextmanager
def told_of(settings: Path, ready: Ready) -> Iterator[None]:
    """Within: what a process finds wrong with its copy of the settings is said of the recipe that the user wrote.

    Raises:
        UserError: that.
    """
    try:
        yield
    except UserError as error:
        found = re.fullmatch(rf"{re.escape(str(settings))}, (?:line \d+, )?([\w.]+): (.*)", str(error), re.DOTALL)
        if found is None:
            raise
        raise ready.source.error(found[1], found[2]) from error


def make_launcher(ready: Ready, pieces: Sequence[Piece], logs: Path) -> Launcher:
    """What starts these pieces.

    Raises:
        UserError: there are too few GPUs for them, or Ray or vLLM is not there.
    """
    recipe = ready.recipe
    if recipe.cluster.launcher == "ray":
        from groupwise.cluster.ray import RayLauncher

        launcher = RayLauncher(logs, pieces, recipe.cluster.ray_address)
        if recipe.cluster.ray_address and recipe.model.device == "auto" and not uses_gpus(recipe) and (there := launcher.gpus()):
            launcher.stop()
            text = f"'auto' finds no GPU on this machine, and the Ray cluster has {there:g}: set it to 'cuda', or to 'cpu'"
            raise ready.source.error("model.device", text)
        return launcher
    if sampler_kind(recipe) == "vllm" and shutil.which(program := shlex.split(recipe.cluster.vllm)[0]) is None:
        raise ready.source.error("cluster.vllm", f"there is no program {program!r} that can be run")
    gpus = visible_gpus() if uses_gpus(recipe) else []
    check_gpus(recipe, ready.source, len(gpus))
    return LocalLauncher(logs, gpus if learns_elsewhere(recipe) else gpus[1:])  # the first one is this process's


def connector(ready: Ready) -> Callable[[str], Dialect]:
    """Makes the client of a sampler at an address."""
    path, kind = ready.recipe.model.path, sampler_kind(ready.recipe)
    packs = kind == "vllm" and gpus_per_sampler(ready.recipe) == 0
    ends = stored_end_tokens(path, ready.tokenizer, trust_remote_code=ready.recipe.model.trust_remote_code)

    def native(address: str) -> Dialect:
        return NativeServer(address, ready.tokenizer)

    def vllm(address: str) -> Dialect:
        return VllmServer(address, ready.tokenizer, ends, packs=packs)

    def detected(address: str) -> Dialect:
        return DetectedServer(address, native=native, vllm=vllm)

    return vllm if kind == "vllm" else detected if kind == "addresses" else native


def tolerance_of(recipe: Recipe) -> float:
    """Nats by which a sampler's log-probabilities may differ from the learner's, given what each computes in."""
    rollouts, model = recipe.rollouts, recipe.model
    names = {model.dtype, recipe.learner.precision, rollouts.dtype or model.dtype, rollouts.cache_dtype or model.dtype}
    return tolerance_in(*(getattr(torch, name) for name in names))
