"""Learners in processes of their own, for tests that kill them. As a program: a run whose learner is one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.cluster.learner_process import TOKEN
from groupwise.cluster.local import HostedProcess
from groupwise.cluster.piece import free_port
from groupwise.config import dump
from groupwise.errors import LearnerLost, RunError
from groupwise.learner.remote import RemoteLearner
from groupwise.models import LanguageModel
from groupwise.training import session
from groupwise.training.output import make_console
from groupwise.training.pieces import Pieces
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, resolved
from groupwise.types import Metrics

SECRET = "of this test"


@dataclass
class LearnerProcess:
    """The learner of a recipe, which is started again when it is asked for."""

    recipe: Path
    timeout: float = 20.0
    processes: int = 1
    starts: int = 0
    process: HostedProcess = field(init=False)
    learner: RemoteLearner = field(init=False)

    def __post_init__(self) -> None:
        self.learner = RemoteLearner(self.start(), SECRET, timeout=self.timeout, failure=self.failure)

    def start(self) -> str:
        port = free_port("127.0.0.1")
        several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m"]
        command = [sys.executable, "-m", *(several if self.processes > 1 else [])]
        command += ["groupwise.cluster.learner_process", str(self.recipe), "--port", str(port)]
        with self.recipe.with_suffix(".log").open("ab") as log:
            self.process = HostedProcess(command, {TOKEN: SECRET}, log)
        self.starts += 1
        return f"http://127.0.0.1:{port}"

    def restart(self) -> None:
        self.stop()
        self.learner.connect(self.start())

    def failure(self) -> str | None:
        status = self.process.status()
        return None if status is None else f"exit status {status}"

    def stop(self) -> None:
        self.process.end(at_once=True)
        self.process.wait()

    def send(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the one process that learns, or starts those that do."""
        pid = self.process.keeper.pid
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), number)

    def strike(self, doing: str, number: int = signal.SIGKILL) -> threading.Thread:
        """Send a signal as soon as the process is busy with a call of this name."""

        def watch() -> None:
            with suppress(LearnerLost):
                while self.learner.health()["busy_with"] != doing:
                    time.sleep(0.001)
            self.send(number)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread


@dataclass
class Apart:
    """`Pieces` whose learner is a process, and whose sampler is in this one, which reads what the learner publishes."""

    ready: Ready
    place: Path
    host: LearnerProcess
    most: int = 10
    published: int = 0

    def __post_init__(self) -> None:
        self.learner, self.sampler = self.host.learner, self.ready.make_sampler(self.ready.model)

    def bring_weights(self) -> None:
        self.published += 1
        directory = self.place / f"{self.published:06d}-{self.host.starts}-v{self.learner.version}"
        self.learner.publish(directory)
        model = LanguageModel.load(str(directory), dtype=self.ready.model.dtype, device=self.ready.model.device)
        self.sampler.load(model, self.learner.version)

    def restart_learner(self) -> None:
        if self.host.starts > self.most:
            raise RunError(f"the learner was started {self.host.starts} times")
        self.host.restart()

    def notes(self) -> list[str]:
        return []

    def metrics(self) -> Metrics:
        return {"cluster/learner_restarts": self.host.starts - 1.0}


def launcher(place: Path, strikes: Any = None, timeout: float = 20.0, most: int = 10) -> session.Launch:
    """A `Launch` that keeps what it needs in `place`. `strikes`: is given the pieces."""

    @contextmanager
    def launch(ready: Ready, directory: RunDirectory) -> Iterator[Pieces]:
        place.mkdir(exist_ok=True)
        recipe = place / "recipe.toml"
        recipe.write_text(dump(resolved(ready)))
        host = LearnerProcess(recipe, timeout)
        try:
            pieces = Apart(ready, place, host, most)
            if strikes is not None:
                strikes(pieces)
            yield pieces
        finally:
            host.stop()

    return launch


if __name__ == "__main__":
    run = Path(sys.argv[1])
    plan = session.plan(resume=run) if run.exists() else session.plan(overrides=sys.argv[2:], out=run)
    session.run(plan, make_console(quiet=False), launch=launcher(run.with_name(f"{run.name}-pieces-{os.getpid()}")))
