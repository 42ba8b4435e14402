"""groupwise ledger."""

from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import app, console, exit_codes
from groupwise.errors import RunError, UserError


@app.command()
def ledger(run: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Say what became of a run's groups, and verify that each was used up exactly once."""
    from groupwise.training.ledger import LEDGER, check_run, describe, read_entries

    with exit_codes():
        found = read_entries(run)
        if found is None:
            raise UserError(f"{run}: no {LEDGER} in it, so not a run, or one of an earlier version")
        for line in describe(found):
            console.print(line, soft_wrap=True)
        if problems := check_run(run):
            raise RunError(f"{run / LEDGER}: " + "\n  ".join(["the records contradict each other:", *problems]))
        console.print("each group was used up exactly once, or is under way", style="green")
