"""The ladders that `groupwise ablate` writes: which runs are of one, and what its rungs are called."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.config import read_toml
from groupwise.errors import UserError
from groupwise.evidence.runs import Run

LONGEST_NAME = 80
"""Characters of a rung's name in the name of its directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderOfRuns:
    """The ladder that runs are of."""

    title: str
    """Empty: it has none."""
    cumulative: bool
    rungs: Sequence[str]
    """Names, in its order."""

    def rung(self, run: Run) -> int:
        """The place of a run's rung in the ladder, from 0."""
        return self.directories.index(run.path.resolve().parent.name)

    @property
    def directories(self) -> list[str]:
        return [rung_directory(place, name) for place, name in enumerate(self.rungs)]


def rung_directory(place: int, name: str) -> str:
    """What the directory of a rung's runs is called."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return f"{place + 1}-{slug[:LONGEST_NAME]}"


def ladder_of(runs: Iterable[Run]) -> LadderOfRuns | None:
    """The ladder that all the runs are of: two directories above them, with their own directories' parents as rungs. None: there is none,
    or its ladder.toml cannot be read.
    """
    places = [run.path.resolve() for run in runs]
    homes = {place.parent.parent for place in places}
    if len(homes) != 1 or not all((home / name).is_file() for home in homes for name in ("plan.json", "ladder.toml")):
        return None
    try:
        tree: Any = read_toml(homes.pop() / "ladder.toml")[0]
    except UserError:  # damaged: the runs can be read all the same
        return None
    rungs = [rung.get("name") for rung in tree["rungs"] if isinstance(rung, dict)] if isinstance(tree.get("rungs"), list) else []
    title = tree.get("title")
    found = LadderOfRuns(
        title=title if isinstance(title, str) else "",
        cumulative=tree.get("cumulative") is True,
        rungs=[name if isinstance(name, str) else "" for name in rungs],
    )
    return found if {place.parent.name for place in places} <= set(found.directories) else None
