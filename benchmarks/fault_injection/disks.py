"""Disks that are full, read-only, over quota, or fail: from one file operation on, or at it alone; then there is room again."""

import errno
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_injection.checks import Reference, differences, lost, said_once
from fault_injection.kills import points
from fault_injection.preload import Fault, Operation
from fault_injection.server import Outcome, Server

ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT, "forbidden": errno.EACCES, "broken": errno.EIO}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One trial."""

    kind: str
    """Of ERRORS."""
    file: str
    """What the operation is about, with the numbers of steps left out."""
    fault: Fault
    resumed: bool
    """Whether it strikes a run that is resumed, and not one that begins."""

    def __str__(self) -> str:
        return f"{self.fault} ({self.file}) of the {'resumed run' if self.resumed else 'run'}"


def kind_of(one: Operation) -> str:
    """A name for operations of the same kind on the same file of whichever step: "rename checkpoints/step-N"."""
    parts = [part.rstrip("0123456789") + "N" if part[-1:].isdigit() else part for part in Path(one.place).parts]
    names = [part if not part.startswith("step-0") else f"step-N{Path(part).suffix}" for part in parts]
    return f"{one.name} {'/'.join('.tmp' if name.startswith('.tmp') else name for name in names)}"


def plan(reference: Reference, rng: random.Random) -> list[Disk]:
    """Each kind of operation on each kind of file, in a run and in its resume, struck by an error of each kind."""
    trials = []
    for resumed, done in ((False, reference.operations), (True, reference.resuming)):
        places: dict[str, list[int]] = {}
        for at in points(done):
            if done[at].name != "close":
                places.setdefault(kind_of(done[at]), []).append(at)
        for file, where in places.items():
            for kind, error in ERRORS.items():
                fault = Fault(
                    action="fail", at=rng.choice(where), error=error, half=rng.random() < 0.3, lasting=rng.random() < 0.7
                )
                trials.append(Disk(kind=kind, file=file, fault=fault, resumed=resumed))
    return trials


def carry_out(server: Server, reference: Reference, trial: Disk, run: Path) -> tuple[str, list[str]]:
    """Let the disk fail, then go on with room again; how it first ended, and what is wrong."""
    shutil.rmtree(run, ignore_errors=True)
    begin = ["train", reference.recipe, "--out", run]
    resume = ["train", "--resume", run]
    if trial.resumed:
        shutil.copytree(reference.halfway, run)
    outcome = server.run(resume if trial.resumed else begin, run, trial.fault)
    problems, ended = said_once(outcome), f"ended {outcome.code}"
    if outcome.code != 0:  # a failure to remove what is no longer needed may be passed over
        problems += lost(run, reference.halfway if trial.resumed else None, outcome.operations[: trial.fault.at])
        outcome = go_on(server, run, begin)
        if outcome.code != 0:
            return ended, [*problems, f"with room again: exit code {outcome.code}: {outcome.output.strip()[-200:]}"]
        problems += said_once(outcome)
    found = differences(run, reference)
    said = " ".join(outcome.output.split())
    if "no checkpoint of step" in said or "cannot be tidied up" in said:  # then others than usual are kept, besides the last
        last = max(name for name in reference.files if name.startswith("checkpoints/step-")).split("/")[1]
        found = {name: text for name, text in found.items() if not name.startswith("checkpoints/") or last in name}
    return ended, problems + list(found.values())


def go_on(server: Server, run: Path, begin: Sequence[str | Path]) -> Outcome:
    """Resume; where nothing was written yet, begin again."""
    begun = (run / "recipe.toml").is_file()
    return server.run(["train", "--resume", run] if begun else begin, run)


def may_mount() -> bool:
    """Whether this process may make file systems of its own, in a mount namespace."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        return subprocess.run(command, capture_output=True).returncode == 0


def really_full(library: Path, reference: Reference, folder: Path, mebibytes: int) -> list[str]:
    """A run on a file system of so many MiB, that then grows, and is read-only for a while; what is wrong.

    The file system is a tmpfs in a mount namespace of the server's: nothing else sees it, and it ends with the server.
    """
    place = folder / "disk"
    place.mkdir(parents=True)
    mount = f'mount -t tmpfs -o size={mebibytes}m none "$0" && exec "$@"'
    with Server(library, [reference.recipe], folder / "server", ("unshare", "-m", "sh", "-c", mount, str(place))) as server:
        pid = str(server.process.pid)
        seen = Path(f"/proc/{pid}/root{place}/run")
        begin = ["train", reference.recipe, "--out", place / "run"]

        def remount(options: str) -> None:
            subprocess.run(["nsenter", "-t", pid, "-m", "mount", "-o", f"remount,{options}", place], check=True)

        full = server.run(begin, place / "run")
        problems = said_once(full) + ([] if full.code in (1, 2) else [f"full: exit code {full.code}"])
        remount("ro")
        refused = server.run(["train", "--resume", place / "run"], place / "run")
        problems += said_once(refused) + ([] if refused.code in (1, 2) else [f"read-only: exit code {refused.code}"])
        remount("rw,size=256m")
        begun = (seen / "recipe.toml").is_file()
        done = server.run(["train", "--resume", place / "run"] if begun else begin, place / "run")
        if done.code != 0:
            return [*problems, f"with room again: exit code {done.code}: {done.output.strip()[-200:]}"]
        return problems + list(differences(seen, reference).values())
