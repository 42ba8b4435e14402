"""Nested settings by dotted keys."""

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key; a table without keys has none."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings in which two trees differ, by dotted key: [old, new]; None: left out. 1, 1.0 and true are not the same."""
    before, now = flat(old), flat(new)
    pairs = {key: [before.get(key), now.get(key)] for key in [*before, *(key for key in now if key not in before)]}
    return {key: [one, other] for key, (one, other) in pairs.items() if type(one) is not type(other) or one != other}
