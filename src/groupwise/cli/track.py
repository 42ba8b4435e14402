"""groupwise track."""

from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import app, console, exit_codes
from groupwise.errors import UserError, nearest


@app.command()
def track(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="TRACKER", help="Where to; by default the trackers of its recipe.")
    ] = None,
) -> None:
    """Send what a run recorded to trackers; what they have already is not sent again."""
    from groupwise.trackers.replay import read_recipe, send_all
    from groupwise.training.trackers import NAMES, check_installed

    with exit_codes():
        for name in to or []:
            if name not in NAMES:
                raise UserError(f"--to {name}: there is no such tracker{nearest(name, NAMES)}")
        _, settings = read_recipe(run)
        trackers = to or [str(name) for name in settings.names if name in NAMES]
        if not trackers:
            raise UserError(f"{run}: its recipe names no tracker; say which one with --to: {', '.join(NAMES)}")
        for name in trackers:
            check_installed(name)
        for name in trackers:
            console.print(f"{name}: {send_all(run, name)} records sent", soft_wrap=True)
