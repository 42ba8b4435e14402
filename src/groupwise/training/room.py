"""Room on the disk for a checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

from groupwise.errors import RunError
from groupwise.files import DiskError
from groupwise.training import checkpoints
from groupwise.training.events import Warned


class Room:
    """Writes the checkpoints that are due. Where the disk is full the run goes on, and it is tried again after the next step."""

    def __init__(self, run: Path, save: Callable[[], object], say: Callable[[Warned], None]) -> None:
        """`run`: its directory; `save`: writes a checkpoint of it as it is; `say`: records what went wrong."""
        self.run, self.save, self.say = run, save, say
        self.owed = False
        """Whether a checkpoint is due that could not be written."""
        self._since = 0
        """The step whose checkpoint it is."""
        self._nearly_full = False

    def write(self, step: int, *, last: bool) -> bool:
        """Write the checkpoint of a step. Returns whether it is written.

        Raises:
            RunError: it is not, and there is no next step; or that of an earlier step was not either, and the run has none.
        """
        there = checkpoints.listed(self.run / "checkpoints")
        newest = there[max(there)] if there else None
        needed = 0 if newest is None else sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.run).free
        problem = self._try() if free >= needed else f"{_size(free)} are free, and a checkpoint takes {_size(needed)}"
        if problem is not None and last:
            raise RunError(f"the last checkpoint, of step {step}, cannot be written: {problem}")
        if problem is not None and self.owed and step > self._since and newest is None:
            raise RunError(f"no checkpoint can be written, and the run has none yet: {problem}")
        if problem is not None and not self.owed:
            self._since = step
            self._warn(step, f"no checkpoint of step {step}: {problem}. It is tried again after the next step")
        elif problem is None and free < 2 * needed and not self._nearly_full:
            self._warn(step, f"the disk is nearly full: {_size(free)} were free, and a checkpoint takes {_size(needed)}")
        self.owed, self._nearly_full = problem is not None, free < 2 * needed
        return problem is None

    def _try(self) -> str | None:
        """Why it cannot be written."""
        try:
            self.save()
        except DiskError as error:
            return str(error)
        return None

    def _warn(self, step: int, text: str) -> None:
        advice = f"Make room where {self.run} is, or lower training.keep_checkpoints."
        self.say(Warned(step=step, name="disk_low", text=text, advice=advice))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
