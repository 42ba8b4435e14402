"""Learners in processes of their own, for tests that kill them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.cluster.learner_process import TOKEN
from groupwise.learner.remote import RemoteLearner

SECRET = "of this test"


@dataclass
class LearnerProcess:
    """One learner of a recipe, started again when it is asked for."""

    recipe: Path
    timeout: float = 20.0
    log: Path = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    learner: RemoteLearner = field(init=False)
    starts: int = 0

    def __post_init__(self) -> None:
        self.log = self.recipe.with_suffix(".log")
        self.learner = RemoteLearner(self.start(), SECRET, timeout=self.timeout, failure=self.failure)

    def start(self) -> str:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [sys.executable, "-m", "groupwise.cluster.learner_process", str(self.recipe), "--port", str(port)]
        with self.log.open("ab") as log:
            environment: Mapping[str, Any] = {**os.environ, TOKEN: SECRET}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.starts += 1
        return f"http://127.0.0.1:{port}"

    def restart(self) -> None:
        self.stop()
        self.learner.connect(self.start())

    def failure(self) -> str | None:
        status = self.process.poll()
        return None if status is None else f"exit status {status}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
