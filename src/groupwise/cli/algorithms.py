"""groupwise algorithms."""

from typing import Annotated, Any

import typer
from rich.table import Table

from groupwise.algorithms import NAMED, PARTS, Algorithm, named
from groupwise.algorithms.algorithm import FORMULAS
from groupwise.cli.common import app, console, exit_codes
from groupwise.errors import UserError


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="One of them.")] = None,
    diff: Annotated[str | None, typer.Option("--diff", help="Show what differs from this one.")] = None,
) -> None:
    """List the algorithms, or show one: its parts, their formulas, its settings."""
    with exit_codes():
        try:
            if name is None:
                if diff is not None:
                    raise UserError("--diff compares with the algorithm named before it: groupwise algorithms dapo --diff grpo")
                console.print(_all_algorithms())
            else:
                console.print(_one_algorithm(named(name), named(diff) if diff else None))
        except ValueError as error:
            raise UserError(str(error)) from error


def _all_algorithms() -> Table:
    table = Table("name", "what it is", "paper")
    for name, entry in NAMED.items():
        table.add_row(name, entry.summary, entry.paper)
    return table


def _one_algorithm(algorithm: Algorithm, other: Algorithm | None) -> Table:
    """Its settings with their formulas; only what differs, side by side, where there is another."""
    columns = [algorithm] if other is None else [other, algorithm]
    settings = [column.settings() for column in columns]
    table = Table("setting", *(column.name for column in columns), title=NAMED[algorithm.name].summary, show_lines=True)
    for key in dict.fromkeys(key for column in settings for key in column):
        if other is None or settings[0].get(key, _UNUSED) != settings[1].get(key, _UNUSED):
            table.add_row(key, *(_explained(key, column.get(key, _UNUSED)) for column in settings))
    return table


_UNUSED: str = "not used"


def _explained(key: str, value: Any) -> str:
    if isinstance(value, str) and value == _UNUSED:
        return value
    if key in PARTS:
        return f"{value}\n{PARTS[key][value].formula}"
    text = {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
    return f"{text}\n{FORMULAS[key]}" if key in FORMULAS and value else str(text)
