"""Write the keys of docs/recipe.md, between its two marks, from the code: `python docs/make_recipe.py`; `make docs` runs it."""

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, InstanceOf
from pydantic_core import PydanticUndefined

from groupwise.algorithms import NAMED, PARTS, Algorithm
from groupwise.algorithms.algorithm import FORMULAS
from groupwise.algorithms.named import general_settings
from groupwise.config import Recipe, SftRecipe
from groupwise.plugins import UserFunction
from groupwise.tasks.base import TASKS

PAGE = Path(__file__).parent / "recipe.md"
BEGIN, END = "<!-- the keys, from the code: begin -->\n", "<!-- the keys, from the code: end -->\n"
TASK = '`name` says which task it is, one of those below or a class of yours, `"file.py:Class"`; the other keys are its own.'
NUMBERS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "table", list: "list", Any: "any"}
BOUNDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")} | {
    MinLen: ("length at least", "min_length"),
    MaxLen: ("length at most", "max_length"),
}


def keys() -> str:
    """Every key, table by table."""
    lines = ["## What `groupwise train` reads", "", *_table(Recipe, skip=_tables(Recipe))]
    for name, field in Recipe.model_fields.items():
        for section in _sections(field.annotation):
            lines += ["", f"### [{name}]", "", _first(section), "", *_table(section)]
        if name == "task":
            lines += ["", "### [task]", "", TASK, *_tasks()]
        elif name == "algorithm":
            lines += ["", "### [algorithm]", "", *_algorithm()]
    lines += ["", "## What `groupwise sft` reads", "", "`seed` and `[task]`, as above, and", ""]
    for name, field in SftRecipe.model_fields.items():
        for section in _sections(field.annotation):
            lines += [f"### [{name}] of groupwise sft", "", _first(section), "", *_table(section), ""]
    return "\n".join(lines)


def _tables(recipe: type[BaseModel]) -> list[str]:
    """The keys of a recipe that are tables."""
    return [
        name for name, field in recipe.model_fields.items() if _sections(field.annotation) or get_origin(field.annotation) is dict
    ]


def _tasks() -> Iterator[str]:
    for name, task in TASKS.items():
        yield from ("", f'#### name = "{name}"', "", _first(task), "", *_table(task, skip=("name",)))


def _algorithm() -> Iterator[str]:
    yield "`name` is one of the algorithms below, described in [algorithms.md](algorithms.md), and brings settings of its own,"
    yield 'which `groupwise algorithms NAME` prints. Every other key changes one. A number that may be absent is `"none"`.'
    yield from ("", "| name | what it is | paper |", "|---|---|---|")
    yield from (f"| `{name}` | {_cell(entry.summary)} | {entry.paper} |" for name, entry in NAMED.items())
    yield from ("", "Settings of every algorithm:", "", *_header())
    meanings, defaults = _docstrings(Algorithm), Algorithm()
    for key, kind in general_settings().items():
        formula = f" `{FORMULAS[key]}`" if key in FORMULAS else ""
        yield _row(key, kind, getattr(defaults, key), meanings.get(key, ""), formula, absent='"none"')
    for kind, choices in PARTS.items():
        yield from ("", f"#### algorithm.{kind}", "", f'{_cell(meanings[kind])} Or one of yours, `"file.py:name"`.', "")
        yield from ("| choice | formula |", "|---|---|")
        yield from (f'| `"{name}"` | `{_cell(choice.formula)}` |' for name, choice in choices.items())
        rows = list(_part_settings({name: choice.make for name, choice in choices.items()}))
        if rows:
            yield from ("", "Settings of theirs:", "", *_header(), *rows)


def _part_settings(makers: dict[str, Any]) -> Iterator[str]:
    """A row for each setting of a choice; one row where several have the same."""
    seen: dict[tuple[str, str], list[str]] = {}
    for name, make in makers.items():
        if isinstance(make, type) and is_dataclass(make):
            meanings = _docstrings(make)
            for field in fields(make):
                default = None if field.default is MISSING else field.default
                row = _row(field.name, field.type, default, meanings.get(field.name, ""), "{of}", absent='"none"')
                seen.setdefault((field.name, row), []).append(name)
    for (_, row), names in seen.items():
        yield row.replace("{of}", f" ({', '.join(f'`{name}`' for name in names)})")


def _table(section: type[BaseModel], skip: Iterable[str] = ()) -> list[str]:
    """A section's keys."""
    return [*_header(), *_rows(section, skip)]


def _rows(section: type[BaseModel], skip: Iterable[str] = (), prefix: str = "") -> Iterator[str]:
    """A row for each key; those of a table within the section by dotted names."""
    meanings = _docstrings(section)
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        inner = _sections(field.annotation)
        for kind in inner:
            yield from _rows(kind, prefix=f"{prefix}{name}.")
        if not inner:
            kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            default = field.get_default(call_default_factory=True)
            yield _row(prefix + (field.alias or name), kind, default, meanings.get(name, ""))


def _header() -> list[str]:
    return ["| key | type | default | meaning |", "|---|---|---|---|"]


def _row(key: str, kind: Any, default: Any, meaning: str, more: str = "", absent: str = "left out") -> str:
    if not meaning:
        raise SystemExit(f"{key} has no docstring under its field")
    value = "needed" if default is PydanticUndefined else absent if default is None else f"`{_toml(default)}`"
    return f"| `{key}` | {_cell(_kind(kind))} | {value} | {_cell(meaning)}{more} |"


def _kind(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = ", ".join([_kind(arguments[0]), *(text for bound in arguments[1:] for text in _bounds(bound))])
        return re.sub(r"length at least (\d+), length at most \1\b", r"length \1", words)
    if origin is Literal:
        return " or ".join(f"`{_toml(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments if argument not in (type(None), InstanceOf[UserFunction]))
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        of = _kind(inner[0])
        return f"list of ({of})" if "," in of else f"list of {of}"
    return NUMBERS.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _bounds(bound: Any) -> Iterator[str]:
    """What a field's bound says, in words."""
    for item in getattr(bound, "metadata", ()) or [bound]:  # pydantic's Field keeps its bounds inside
        for sort, (words, name) in BOUNDS.items():
            if isinstance(item, sort):
                yield f"{words} {getattr(item, name)}"


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict) and not value:
        return "{}"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _sections(kind: Any) -> list[type[BaseModel]]:
    """The tables among the alternatives of a type."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [found for found in kinds if isinstance(found, type) and issubclass(found, BaseModel)]


@functools.cache
def _docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a class or of one that it extends."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("groupwise"):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, text in zip(body.body, body.body[1:], strict=False):
                known = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if known and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[field.target.id] = inspect.cleandoc(str(text.value.value))
    return texts


def _first(kind: type) -> str:
    """The first paragraph of a class's docstring, without the table's name that it may begin with."""
    text = re.sub(r"^\[\w+\][^:]*: ", "", (inspect.getdoc(kind) or "").split("\n\n")[0])
    return _cell(text[:1].upper() + text[1:])


def _cell(text: str) -> str:
    """A text for a cell of a table in Markdown."""
    pieces = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(piece if i % 2 else piece.replace("*", "\\*") for i, piece in enumerate(pieces))


def page(old: str) -> str:
    """The page with its keys as the code has them."""
    before, _, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE.name} lacks the marks between which the keys stand")
    return before + BEGIN + "\n" + keys() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
