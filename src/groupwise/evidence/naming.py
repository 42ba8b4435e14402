"""Short names for runs and for the settings that they are grouped by, and in what the settings differ."""

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from groupwise.algorithms import NAMED, named
from groupwise.config import Recipe, dump
from groupwise.config.effects import HARMLESS
from groupwise.config.trees import flat
from groupwise.evidence.history import value_text
from groupwise.evidence.ladders import ladder_of
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Differences
from groupwise.text import visible

LONGEST_SETTING, LONGEST_RUN, LONGEST_TITLE = 40, 28, 90
"""Characters of the name of a setting, of a run's directory in its name, and of a page's title."""
LONGEST_VALUE, MOST_KEYS = 200, 60
"""Characters of a value in the table of differing settings, and how many settings it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in their seed only."""

    id: str
    """The same whichever other runs there are."""
    name: str
    """Short, and different from those of the other groups."""
    runs: Sequence[Run]


def grouped(runs: Iterable[Run]) -> list[Group]:
    """The runs by setting, in the order in which they come; a directory that is given twice is one run, not two seeds.

    Runs of one ladder (`groupwise ablate`) are grouped by its rungs, and called by their names.
    """
    runs = list({run.resolved: run for run in runs}.values())
    keys: list[Hashable]
    if ladder := ladder_of(runs):
        keys = [Path(run.resolved).parent for run in runs]
        groups = _by_key(keys, runs)
        names = [ladder.rungs[ladder.rung(members[0])] for members in groups.values()]
    else:
        keys = [json.dumps(tree, sort_keys=True, default=str) for tree in map(_setting, runs)]
        groups = _by_key(keys, runs)
        names = _names(list(groups.values()))
    names = _distinct([cut(visible(name), LONGEST_SETTING) for name in names])
    return [
        Group(id=_id("s", str(key)), name=name, runs=members) for (key, members), name in zip(groups.items(), names, strict=True)
    ]


def _by_key(keys: Sequence[Hashable], runs: Sequence[Run]) -> dict[Hashable, list[Run]]:
    groups: dict[Hashable, list[Run]] = {}
    for key, run in zip(keys, runs, strict=True):
        groups.setdefault(key, []).append(run)
    return groups


def _setting(run: Run) -> dict[str, Any]:
    """What decides which runs differ in their seed only: dotted keys and values, and what was changed on the way.

    Keys that a recipe of an earlier version lacks have the value that they have now where nobody sets them.
    """
    own: dict[str, Any] = run.recipe.get("algorithm", {})
    usual = named(run.algorithm).settings() if run.algorithm in NAMED else {}
    usual = {key: "none" if value is None else list(value) if isinstance(value, tuple) else value for key, value in usual.items()}
    algorithm = flat({"algorithm": {**usual, **own, "name": run.algorithm}})
    others = flat({key: value for key, value in run.recipe.items() if key != "algorithm"})
    tree = {"algorithm.name": run.algorithm, **_defaults(), **others, **algorithm, **run.course}
    return {key: value for key, value in tree.items() if value is not None and _tells(key)}


@cache
def _defaults() -> dict[str, Any]:
    """The settings of a recipe that sets nothing, but for the algorithm's."""
    return {
        key: value
        for key, value in flat(tomllib.loads(dump(Recipe().model_dump(by_alias=True)))).items()
        if not key.startswith("algorithm.")
    }


def _tells(key: str) -> bool:
    """Whether runs that differ in this setting are not seeds of one."""
    return key != "seed" and (key == "training.eval_every" or not key.startswith(HARMLESS))


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The algorithm's name where that tells the settings apart, else with the settings that differ, if these are short; else the name of
    the only run's directory, or a number.
    """
    runs = [members[0] for members in groups]
    trees = [_setting(run) for run in runs]
    told = []
    for run, tree in zip(runs, trees, strict=True):
        keys = _differing([other for other in trees if other["algorithm.name"] == run.algorithm])
        told.append(", ".join([run.algorithm, *(f"{key.split('.', 1)[-1]} {_short(tree[key])}" for key in keys if key in tree)]))
    if max(map(len, told), default=0) <= LONGEST_SETTING and len(set(told)) == len(told):
        return told
    seen, several = Counter[str](), Counter(run.algorithm for run in runs)
    single = [members[0] for members in groups if len(members) == 1]
    directories = dict(zip(map(run_id, single), _directories(single), strict=True))
    names = []
    for run in runs:
        seen[run.algorithm] += 1
        if several[run.algorithm] == 1:
            names.append(run.algorithm)
        elif run_id(run) in directories:
            names.append(_of_run(directories[run_id(run)], run.algorithm))
        else:
            names.append(f"{run.algorithm} {seen[run.algorithm]}")
    return names


def _short(value: Any) -> str:
    """0.21, not 0.21000000000000002."""
    return value_text(float(f"{value:.12g}") if isinstance(value, float) else value)


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({str(tree.get(key)) for tree in trees}) > 1]


def run_id(run: Run) -> str:
    """The same for the same directory."""
    return _id("r", run.resolved)


def run_names(groups: Iterable[Group]) -> dict[str, str]:
    """By id: the directory's name, with those above it where that is needed to tell runs apart, and the setting's: "run1 · dapo"."""
    ids, names = [], []
    for group in groups:
        for run, directory in zip(group.runs, short_names(group.runs), strict=True):
            ids.append(run_id(run))
            names.append(group.name if group.name.startswith(_of_run(directory, "")) else _of_run(directory, group.name))
    return dict(zip(ids, _distinct(names), strict=True))


def short_names(runs: Sequence[Run]) -> list[str]:
    """The names of runs among those of their setting: of their directories, with those above them where that is needed."""
    return [cut(visible(name), LONGEST_RUN) for name in _directories(runs)]


def _of_run(directory: str, setting: str) -> str:
    return f"{cut(visible(directory), LONGEST_RUN)} · {setting}"


def _directories(runs: Sequence[Run]) -> list[str]:
    paths = [Path(run.resolved) for run in runs]
    named_so = Counter(path.name for path in paths)
    return [_apart(path, paths) if named_so[path.name] > 1 else path.name for path in paths]


def _apart(path: Path, others: Iterable[Path]) -> str:
    """The shortest end of a path that no other path has."""
    others = [other for other in others if other != path]
    for parts in range(2, len(path.parts)):
        end = path.parts[-parts:]
        if all(other.parts[-parts:] != end for other in others):
            return "/".join(end)
    return path.as_posix()


def differences(groups: Sequence[Group]) -> Differences:
    """The settings in which the groups differ, and those that were changed on the way, as text."""
    trees = [_setting(group.runs[0]) for group in groups]
    shown = list(dict.fromkeys([*_differing(trees), *(key for group in groups for key in group.runs[0].course)]))[:MOST_KEYS]
    rows = [[_value(tree[key]) if key in tree else "–" for key in shown] for tree in trees]
    return {
        "keys": [cut(visible(key), LONGEST_VALUE) for key in shown],
        "rows": [{"setting": group.id, "values": row} for group, row in zip(groups, rows, strict=True)],
    }


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    return cut(visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)), LONGEST_VALUE)


def title(groups: Sequence[Group]) -> str:
    """What a page about them is called: a ladder's title, the run's name where there is one, else the settings'."""
    names = list(run_names(groups).values())
    if len(names) == 1:
        return names[0]
    if (ladder := ladder_of(run for group in groups for run in group.runs)) and ladder.title:
        return cut(visible(ladder.title), LONGEST_TITLE)
    joined = " | ".join(group.name for group in groups)
    return joined if len(joined) <= LONGEST_TITLE else f"{joined[:LONGEST_TITLE].rsplit(' | ', 1)[0]} | … ({len(groups)})"


def cut(text: str, most: int) -> str:
    """At most so many characters, from the start and the end, where names often differ."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where one is there already."""
    found: dict[str, None] = {}
    for name in names:
        number, shown = 1, name
        while shown in found:
            number += 1
            shown = f"{name} ({number})"
        found[shown] = None
    return list(found)


def _id(kind: str, text: str) -> str:
    return kind + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=5).hexdigest()
