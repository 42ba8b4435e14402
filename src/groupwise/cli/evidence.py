"""groupwise report and explore."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from groupwise.cli.common import app, console, exit_codes


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; several are compared.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page, or with --format png the directory.")] = None,
    form: Annotated[Literal["html", "png"], typer.Option("--format", help="One page, or each figure as a picture.")] = "html",
) -> None:
    """Draw what runs recorded, and say what is the matter with them."""
    from groupwise.evidence.report import as_text, write_page, write_pictures
    from groupwise.evidence.runs import open_run

    with exit_codes():
        opened = [open_run(run) for run in runs]
        home = runs[0] if len(runs) == 1 else Path()
        if form == "png":
            written = write_pictures(opened, out or home / "figures")
            console.print(f"{len(written)} figures in {out or home / 'figures'}", soft_wrap=True)
            return
        page = out or home / "report.html"
        for line in as_text(write_page(opened, page)):
            console.print(line, soft_wrap=True)
        console.print(f"written: {page}", soft_wrap=True)


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
        write_explorer(open_run(run) if run else None, out)
        console.print(f"written: {out}", soft_wrap=True)
        if show:
            typer.launch(str(out))
