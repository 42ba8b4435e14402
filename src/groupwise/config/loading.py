"""Reading recipe files: what they extend, overrides, and the checked tree."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from groupwise.config.sections import Recipe, SftRecipe
from groupwise.config.source import Source, explain
from groupwise.errors import UserError, nearest
from groupwise.text import toml_text


def shipped_recipes() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in (files("groupwise") / "recipes").iterdir())


def find_recipe(name: str | Path | None) -> Path:
    """The file that a recipe argument means: a path, a shipped recipe's name, or nothing for the embedded default.

    Raises:
        UserError: there is no such file and no such shipped recipe.
    """
    if name is None:
        name = "default"
    if str(name) in shipped_recipes():
        return Path(str(files("groupwise") / "recipes" / f"{name}.toml"))
    try:
        found = Path(name).is_file()
    except OSError:  # a name too long to be a file's
        found = False
    if not found:
        raise UserError(f"no recipe {str(name)!r}: neither a file nor a shipped recipe{nearest(str(name), shipped_recipes())}")
    return Path(name)


def is_sft(path: Path) -> bool:
    """Whether a recipe is for `groupwise sft`: it has an [sft] table."""
    return re.search(r"^\s*\[sft\]", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


Tree = TypeVar("Tree", Recipe, SftRecipe)


def load(
    path: Path,
    kind: type[Tree],
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    text: str | None = None,
) -> tuple[Tree, Source]:
    """Read a recipe file and what it extends, apply `--set key=value` overrides (values in TOML, or bare strings), check it.

    `changes`: values by dotted key from Python, applied last. With another algorithm.name the file's [algorithm] is dropped.
    `text`: instead of what the file holds.

    Raises:
        UserError: one message with a line for each thing that is wrong.
    """
    tree, text = read_tree(path, text=text)
    source = Source(path, text, overrides, changes or ())
    name_before = _algorithm_name(tree)
    for override in overrides:
        apply_override(tree, override)
    for key, value in (changes or {}).items():
        set_key(tree, key, value, place=key)
    section = tree.get("algorithm", {})
    if not isinstance(section, dict):
        raise source.error("algorithm", f"expected a table, not {section!r}; an algorithm is chosen by algorithm.name")
    if _algorithm_name(tree) != name_before:  # another algorithm starts from its own defaults
        tree["algorithm"] = {key: value for key, value in section.items() if key in source.changed("algorithm")}
    try:
        return kind.model_validate(tree), source
    except ValidationError as error:
        raise explain(error, kind, source) from error


def _algorithm_name(tree: dict[str, Any]) -> Any:
    section = tree.get("algorithm")
    return section.get("name") if isinstance(section, dict) else None


def read_tree(path: Path, seen: tuple[Path, ...] = (), text: str | None = None) -> tuple[dict[str, Any], str]:
    """A recipe file's tree, laid over that of the recipe that it `extends`: a file beside it, or a shipped one; and its text,
    which may be given instead.

    Raises:
        UserError: it cannot be read, or it extends itself.
    """
    try:
        text = path.read_text(encoding="utf-8") if text is None else text
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    base = tree.pop("extends", None)
    if base is None:
        return tree, text
    source = Source(path, text)
    if not isinstance(base, str):
        raise source.error("extends", f"expected a shipped recipe's name or a file, not {base!r}")
    beside = path.parent / base
    try:
        found = beside if beside.is_file() else find_recipe(base)
    except UserError as error:
        raise source.error("extends", str(error)) from error
    if found.resolve() in seen or found.resolve() == path.resolve():
        raise source.error("extends", f"{base!r} extends this file in turn")
    base_tree = read_tree(found, (*seen, path.resolve()))[0]
    old, new = base_tree.get("task"), tree.get("task")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name"):
        del base_tree["task"]  # another task has other keys
    return merge_trees(base_tree, tree), text


def merge_trees(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of `tree` from "key=value"."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"--set {override}: expected key=value, as in --set learner.learning_rate=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    set_key(tree, key.strip(), parsed, place=f"--set {override}")


def set_key(tree: dict[str, Any], key: str, value: Any, *, place: str) -> None:
    """Set a dotted key of `tree`; `place` is named in the message if that cannot be done."""
    *tables, last = key.split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{place}: {name} is a value, not a table")
    tree[last] = value


def dump(tree: dict[str, Any]) -> str:
    """TOML text of a tree of settings; a setting that is None is left out."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return value

    return toml_text(tomli_w.dumps(without_none(tree)))
