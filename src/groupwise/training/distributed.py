"""The parts of a run in several processes: a learner here or elsewhere, and samplers elsewhere."""

import shutil
import uuid
from pathlib import Path

from torch import Tensor

from groupwise.files import DiskError
from groupwise.learner.base import Learner
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.probe import Probe
from groupwise.rollouts.servers import Published
from groupwise.types import Metrics

KEPT = 2
"""Published weights that stay on the disk: the newest, and those before, which a sampler may be reading."""
LONGEST_PROBE = 64
"""Tokens."""


class Distributed:
    """`Pieces` that publish weights in a directory which all processes see."""

    def __init__(
        self, learner: Learner, fleet: Fleet, weights: Path, *, prompt: Tensor, max_tokens: int, tolerance: float
    ) -> None:
        """
        Args:
            weights: an empty directory for published weights.
            prompt: int64 [L], of a problem; the samplers show on it that they have the learner's weights.
            max_tokens: completion tokens that prompts leave room for.
            tolerance: nats, see `Probe.tolerance`.
        """
        self.learner, self.sampler = learner, fleet
        self.weights = weights
        length = min(LONGEST_PROBE, len(prompt) + max_tokens - 1)
        self._text = prompt.repeat(-(-length // len(prompt)))[:length]
        self._tolerance = tolerance
        self._run, self._serial = uuid.uuid4().hex[:6], 0
        self._probed: list[Tensor] = []
        self._published: list[Path] = []

    def bring_weights(self) -> None:
        """Publish the learner's weights, and have every sampler load them.

        Raises:
            DiskError: they cannot be written.
            RunError: they cannot be loaded, or a sampler has others.
        """
        self._serial += 1
        version = self.learner.version
        id = f"{self._serial:06d}-v{version}-{self._run}"
        directory = self.weights / id
        try:
            self.learner.publish(directory)
        except DiskError as error:
            raise DiskError(f"{error}. cluster.weights may name a directory with more room") from error
        self._published.append(directory)
        logprobs = self.learner.probe(self._text)
        probe = Probe(tokens=self._text, logprobs=logprobs, others=tuple(self._probed), tolerance=self._tolerance)
        self.sampler.load(Published(directory=directory, id=id, version=version), probe)
        self._probed = [logprobs]
        while len(self._published) > KEPT:
            shutil.rmtree(self._published.pop(0), ignore_errors=True)

    def metrics(self) -> Metrics:
        return self.sampler.metrics()
