"""Reading recipe files: what they extend, overrides, and the checked tree."""

import codecs
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
from groupwise.errors import UserError, nearest, short
from groupwise.text import toml_text

MOST_BYTES = 4 * 2**20
"""A recipe is read and searched by lines in Python, which takes seconds for a file of this size."""
MAX_DEPTH = 64
"""How deep tables and lists may be nested; what checks and writes them does so recursively."""
DEEP = f"tables and lists are nested more than {MAX_DEPTH} levels deep"


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
    if not is_file(Path(name)):
        raise UserError(
            f"no recipe {short(str(name), 300)}: neither a file nor a shipped recipe{nearest(str(name), shipped_recipes())}"
        )
    return Path(name)


def is_file(path: Path) -> bool:
    """Whether a path is a file's; one that cannot be, such as a name that is too long, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_sft(path: Path) -> bool:
    """Whether a recipe is for `groupwise sft`: it, or what it extends, has an [sft] table.

    Raises:
        UserError: see `read_tree`.
    """
    return "sft" in read_tree(path)[0]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: has more than {MOST_BYTES // 2**20} MiB, so it is not a file of settings")
    return data.removeprefix(codecs.BOM_UTF8)


def read_toml(path: Path, text: str | None = None) -> tuple[dict[str, Any], str]:
    """The tree and the text of a TOML file; the text may be given instead.

    Raises:
        UserError: it cannot be read, is not TOML, or holds what could not be written again; see `unwritable`.
    """
    try:
        text = _read(path).decode() if text is None else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        tree = parse_toml(text)
    except ValueError as error:
        long = re.search(r"\d{4301}", text)  # Python names no line for these
        line = f", line {text.count(chr(10), 0, long.start()) + 1}" if long and "(at line" not in str(error) else ""
        raise UserError(f"{path}{line}: {error}") from error
    if wrong := unwritable(tree):
        raise Source(path, text).error(*wrong)
    return tree, text


def parse_toml(text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is not TOML, is nested too deep, or has an integer of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(DEEP) from error
    except ValueError as error:  # Python's limit for the digits of an integer
        raise ValueError("an integer has thousands of digits; TOML's have 64 bits") from error


def unwritable(value: Any, key: str = "", depth: int = 0) -> tuple[str, str] | None:
    """The dotted key of a setting that could not be written down again, and why; None: there is none. It is an integer of more
    than 64 bits, text that is not Unicode, or nested too deep."""
    if depth > MAX_DEPTH:
        return key, DEEP
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return key, f"an integer of {value.bit_length():,} bits; TOML's have 64"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return key, f"a text is not Unicode: {value[error.start]!r}"
    if isinstance(value, dict):
        inner = [(item, f"{key}.{name}".removeprefix(".") if depth < 4 else key) for name, item in value.items()]
        inner += [(name, key) for name in value]
    else:
        inner = [(item, key) for item in value] if isinstance(value, list | tuple) else []
    return next((found for item, place in inner if (found := unwritable(item, place, depth + 1))), None)


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
    if wrong := unwritable(tree):
        raise source.error(*wrong)
    section = tree.get("algorithm", {})
    if not isinstance(section, dict):
        raise source.error("algorithm", f"expected a table, not {short(section)}; an algorithm is chosen by algorithm.name")
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
    tree, text = read_toml(path, text)
    base = tree.pop("extends", None)
    if base is None:
        return tree, text
    source = Source(path, text)
    if not isinstance(base, str):
        raise source.error("extends", f"expected a shipped recipe's name or a file, not {short(base)}")
    beside = path.parent / base
    try:
        found = beside if is_file(beside) else find_recipe(base)
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
        raise UserError(f"--set {override[:200]}: expected key=value, as in --set learner.learning_rate=1e-4")
    try:
        parsed = parse_toml(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    except ValueError as error:
        raise UserError(f"--set {override[:200]}: {error}") from error
    set_key(tree, key.strip(), parsed, place=f"--set {override[:200]}")


def set_key(tree: dict[str, Any], key: str, value: Any, *, place: str) -> None:
    """Set a dotted key of `tree`; `place` is named in the message if that cannot be done."""
    *tables, last = key.split(".")
    if len(tables) > MAX_DEPTH:
        raise UserError(f"{place}: tables are nested more than {MAX_DEPTH} levels deep")
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
