"""Where settings came from, so that a message can name the file, the line and the nearest known key."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from groupwise.errors import UserError, nearest, short

MOST_FINDINGS = 20
"""How many wrong keys one message names."""


class Source:
    """Where a tree of settings came from, so that a message can name the file and the line."""

    def __init__(self, path: Path, text: str, overrides: Sequence[str] = (), given: Iterable[str] = ()) -> None:
        """`overrides`: from --set; `given`: keys whose values came from Python."""
        self.path, self.text, self.overrides, self.given = path, text, tuple(overrides), tuple(given)

    def changed(self, table: str) -> set[str]:
        """The keys of a table that did not come from the file."""
        keys = [*(override.partition("=")[0].strip() for override in self.overrides), *self.given]
        return {key.removeprefix(f"{table}.") for key in keys if key.startswith(f"{table}.")}

    def place(self, key: str) -> str:
        """ "recipe.toml, line 3, learner.minibatch", or the --set that the key came from."""
        for override in self.overrides:
            if override.partition("=")[0].strip() == key:
                return f"--set {override}"
        if key in self.given:
            return f"{key}, given from Python"
        table = item = ""
        seen: Counter[str] = Counter()
        for number, line in enumerate(self.text.split("\n"), start=1):
            if header := re.match(r"\s*(\[+)\s*([^\]]+?)\s*\]", line):
                table = item = header[2]
                if header[1] == "[[":  # an item of a list of tables, by its index
                    item, seen[table] = f"{table}[{seen[table]}]", seen[table] + 1
                if key in (table, item):
                    return f"{self.path}, line {number}, [{key}]"
                continue
            entry = re.match(r"\s*([\w.-]+)\s*=", line)
            if entry and key in {f"{name}.{entry[1]}".lstrip(".") for name in (table, item)}:
                return f"{self.path}, line {number}, {key}"
        return f"{self.path}, {key}"

    def inside(self, table: str, item: str) -> "Source":
        """The same source for an item of a list of tables, such as task.sources[1], whose keys are spelled as those of `table`,
        and come from there where the item has none."""
        return _ItemSource(self, table, item)

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.place(key)}: {message}")


class _ItemSource(Source):
    def __init__(self, whole: Source, table: str, item: str) -> None:
        super().__init__(whole.path, whole.text, whole.overrides, whole.given)
        self.table, self.item = table, item

    def place(self, key: str) -> str:
        shared = super().place(key)
        if not key.startswith(f"{self.table}."):
            return shared
        own = super().place(self.item + key.removeprefix(self.table))
        unknown = own == f"{self.path}, {self.item}{key.removeprefix(self.table)}"
        return shared if unknown and shared != f"{self.path}, {key}" else own


def explain(error: ValidationError, kind: Any, source: Source, prefix: str = "") -> UserError:
    """pydantic's findings as one message, each with its place, and the nearest known key for an unknown one."""
    lines = []
    for finding in error.errors()[:MOST_FINDINGS]:
        location = [str(part) for part in finding["loc"]]
        if kind.model_fields.get(location[0]) and not _is_table(kind.model_fields[location[0]].annotation):
            location = location[:1]  # below a value are only its place in a list and pydantic's names of alternatives
        key = prefix + ".".join(location)
        if finding["type"] == "extra_forbidden":
            message = f"unknown key{nearest(location[-1], _known_keys(kind, location[:-1]))}"
        else:
            message = f"{finding['msg'][0].lower()}{finding['msg'][1:]}, not {short(finding['input'])}"
        lines.append(str(source.error(key, message)))
    if error.error_count() > MOST_FINDINGS:
        lines.append(f"and {error.error_count() - MOST_FINDINGS:,} more that are wrong")
    return UserError("\n".join(dict.fromkeys(lines)))


def _is_table(annotation: Any) -> bool:
    return _table(annotation) is not None


def _table(annotation: Any) -> Any:
    """The table that a field holds, always or unless it is None; None if it holds another value."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_keys(kind: Any, location: Iterable[str]) -> list[str]:
    for part in location:
        if part.isdecimal():  # a place in a list of tables
            continue
        kind = _table(kind.model_fields[part].annotation)
    return [field.alias or name for name, field in kind.model_fields.items()]
