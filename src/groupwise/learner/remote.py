"""The learner of another process, through its server (`groupwise.learner.serving`)."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
from torch import Tensor

from groupwise.errors import LearnerLost
from groupwise.files import Digest
from groupwise.learner import wire
from groupwise.learner.base import TokenRecord
from groupwise.learner.updates import Update
from groupwise.state import from_bytes, to_bytes
from groupwise.types import Batch, LogprobBatch, TrainingBatch, upgrade

START_LIMIT = 600.0
"""Seconds in which the server of a process that was just started must answer: it imports PyTorch, maybe from a slow disk."""
LOOKS = 0.1
"""Seconds between two looks whether it does."""
DYING = 2.0
"""Seconds in which what ended a process becomes known, after its connections broke."""


class RemoteLearner:
    """A `Learner` in another process. Directories are those of a file system that both see.

    A call may take as long as it likes, as long as the process answers that it is at work. Every method raises `LearnerLost`
    where it has ended, or has not answered for `timeout` seconds. The methods may be called from several threads.
    """

    def __init__(
        self, address: str, token: str, *, timeout: float = 60.0, failure: Callable[[], str | None] = lambda: None
    ) -> None:
        """
        Args:
            address: "http://host:port". Nothing has to answer there yet: the first call waits for it.
            token: the server's secret.
            timeout: seconds of silence that mean that the process is gone.
            failure: what the process ended with; None while it runs, or where that is not known.
        """
        self.token, self.timeout, self.failure = token, timeout, failure
        self._version: int | None = None
        self._client = httpx.Client()
        self.connect(address)

    def connect(self, address: str) -> None:
        """Speak to the process at this address from now on: the one before is gone."""
        self._client.close()
        self.address, self._version, self._answers = address, None, False
        headers = {"Authorization": f"Bearer {self.token}"}
        # No proxy of the environment: that is for the world outside.
        self._client = httpx.Client(base_url=address, headers=headers, timeout=self.timeout, trust_env=False)

    # --- the methods of a Learner

    @property
    def version(self) -> int:
        """Optimiser updates taken."""
        if self._version is None:
            self._call("version")
        assert self._version is not None  # every answer has it
        return self._version

    def begin_step(self) -> None:
        """See `Learner.begin_step`."""
        self._call("begin_step")

    def take_back(self) -> bool:
        """See `Learner.take_back`."""
        return bool(self._call("take_back"))

    def compute_logprobs(self, batch: Batch) -> tuple[LogprobBatch, dict[str, float]]:
        """See `Learner.compute_logprobs`."""
        found = self._call("compute_logprobs", batch=wire.batch_tree(batch))
        return upgrade(LogprobBatch, batch, **found["tensors"]), found["metrics"]

    def update(self, minibatch: TrainingBatch, record: Callable[[TokenRecord], None] | None = None) -> Update:
        """See `Learner.update`."""
        found = self._call("update", minibatch=wire.batch_tree(minibatch), recorded=record is not None)
        if record is not None:
            for item in found["records"]:
                record(item)
        return wire.update_of(found["update"])

    def publish(self, directory: Path) -> None:
        """See `Learner.publish`."""
        self._call("publish", directory=str(directory.absolute()))

    def probe(self, tokens: Tensor) -> Tensor:
        """See `Learner.probe`."""
        found: Tensor = self._call("probe", tokens=tokens)
        return found

    def save(self, directory: Path) -> Mapping[str, Digest]:
        """See `Learner.save`."""
        return wire.digests_of(self._call("save", directory=str(directory.absolute())))

    def load(self, directory: Path) -> None:
        """See `Learner.load`."""
        self._call("load", directory=str(directory.absolute()))

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        """See `Learner.export`; the learner's process has its own copy of the recipe's tokenizer."""
        found: dict[str, float] = self._call("export", directory=str(directory.absolute()))
        return found

    # --- the network

    def health(self) -> dict[str, Any]:
        """What the process does: `busy_with` (None: nothing), for how many `seconds`, `calls_done`, `pid`.

        Raises:
            LearnerLost: it does not answer.
        """
        found: dict[str, Any] = self._request("GET", "/health").json()
        return found

    def _call(self, name: str, **arguments: Any) -> Any:
        """What a method of the other side's learner returns, or raises."""
        self._await_start()
        wait = {"wait": str(self.timeout / 4)}
        response = self._request("POST", f"/calls/{name}", params=wait, content=to_bytes(arguments))
        while response.status_code == 202:
            response = self._request("GET", f"/calls/{response.json()['call']}", params=wait)
        answer = from_bytes(response.content)
        if "error" in answer:
            raise wire.error_of(answer["error"])
        self._version = answer["version"]
        return answer["result"]

    def _await_start(self) -> None:
        """Wait until the server of a process that may have just been started answers."""
        deadline = time.monotonic() + START_LIMIT
        while not self._answers:
            try:
                self._answers = self._client.get("/health").is_success
            except httpx.TransportError as error:
                if (reason := self.failure()) is not None:
                    raise LearnerLost(f"the learner has ended before it began: {reason}") from error
            if not self._answers:
                if time.monotonic() > deadline:
                    raise LearnerLost(f"the learner does not answer at {self.address} {START_LIMIT:.0f} s after its start")
                time.sleep(LOOKS)

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, **content).raise_for_status()
        except httpx.TimeoutException as error:
            silent = f"the learner at {self.address} has not answered for {self.timeout:g} s (cluster.timeout)"
            raise LearnerLost(silent) from error
        except httpx.HTTPError as error:
            raise LearnerLost(self._why(error)) from error

    def _why(self, error: httpx.HTTPError) -> str:
        """What became of a process whose connection broke."""
        deadline = time.monotonic() + DYING
        while (reason := self.failure()) is None and time.monotonic() < deadline:
            time.sleep(LOOKS)
        return f"the learner is gone: {reason or f'{self.address}: {type(error).__name__}: {error}'}"
