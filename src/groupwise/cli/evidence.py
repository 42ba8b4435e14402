"""groupwise report and explore."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from groupwise.cli.common import app, console, exit_codes

if TYPE_CHECKING:
    from groupwise.evidence.runs import Run

SHOWN_LEFT_OUT = 10
"""How many lines about what could not be read of a run are printed."""


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs or of ladders; several runs are compared.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The page, or with --format png the directory.")] = None,
    form: Annotated[Literal["html", "png"], typer.Option("--format", help="One page, or each figure as a picture.")] = "html",
) -> None:
    """Draw what runs recorded, and say what is the matter with them."""
    from groupwise.evidence.naming import grouped
    from groupwise.evidence.pictures import write_pictures
    from groupwise.evidence.places import expanded
    from groupwise.evidence.report import as_text, write_page
    from groupwise.evidence.runs import open_run
    from groupwise.evidence.verdicts import as_text as compared

    with exit_codes():
        opened = [open_run(run) for run in expanded(runs)]
        home = runs[0] if len(runs) == 1 else Path()
        if form == "png":
            written = write_pictures(opened, out or home / "figures")
            _note(opened)
            console.print(f"{len(written)} figures in {out or home / 'figures'}", soft_wrap=True)
            return
        page = out or home / "report.html"
        for line in as_text(write_page(opened, page)):
            console.print(line, soft_wrap=True)
        for line in compared(grouped(opened)):
            console.print(line, soft_wrap=True)
        _note(opened)
        console.print(f"written: {page}", soft_wrap=True)


def _note(runs: "list[Run]") -> None:
    """What of the runs could not be read."""
    for run in runs:
        lines = list(run.left_out)
        for line in lines[:SHOWN_LEFT_OUT]:
            console.print(Text(f"left out of {run.path}: {line}"), style="yellow", soft_wrap=True)
        if len(lines) > SHOWN_LEFT_OUT:
            console.print(f"and {len(lines) - SHOWN_LEFT_OUT} more", style="yellow")


@app.command()
def explore(
    run: Annotated[Path | None, typer.Argument(help="A run whose settings the figures open at, with its tokens as dots.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where to write the page.")] = Path("explorer.html"),
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """The mechanisms as interactive figures, in a browser."""
    from groupwise.evidence.explorer import write_explorer
    from groupwise.evidence.runs import open_run

    with exit_codes():
        opened = open_run(run) if run else None
        write_explorer(opened, out)
        _note([opened] if opened else [])
        console.print(f"written: {out}", soft_wrap=True)
        if show:
            typer.launch(str(out))
