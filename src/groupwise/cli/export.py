"""groupwise export."""

from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import app, console, exit_codes


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's directory, finished or not.")],
    checkpoint: Annotated[str, typer.Option(help="Which: newest, best (by held-out score), or a step.")] = "newest",
    out: Annotated[Path, typer.Option("--out", help="The model directory to make.")] = ...,  # type: ignore[assignment]
) -> None:
    """Write the model of a run's checkpoint as a Hugging Face directory."""
    from groupwise.training.export import export_checkpoint

    with exit_codes():
        found, gap = export_checkpoint(run, checkpoint, out)
        if gap is not None:
            console.print(f"merging the adapters moved logits by at most {gap:.2g}", soft_wrap=True)
        console.print(f"the model of {run}, step {found.step}, is in {out}", soft_wrap=True)
