"""`groupwise explore`: one self-contained HTML page that plots the algorithms' closed forms with sliders, and a run's tokens with them."""

import math
from pathlib import Path

import pyarrow.compute as pc

from groupwise.errors import UserError
from groupwise.evidence.page import asset, embed, render, write
from groupwise.evidence.runs import Run

SHOWN_TOKENS = 400


def write_explorer(run: Run | None, out: Path) -> None:
    """Write the page.

    Args:
        run: plot the tokens of the middle one of its recorded steps as dots; None: no dots.
        out: the HTML file to write.

    Raises:
        UserError: the run recorded no tokens, or the page cannot be written.
    """
    page = render(
        "explorer.html",
        style=asset("page.css"),
        script=asset("explorer.js"),
        tokens=embed([] if run is None else token_points(run)),
    )
    write(out, page)


def token_points(run: Run) -> list[dict[str, float]]:
    """π_old and ratio of evenly spaced tokens of the middle recorded step."""
    steps = run.token_steps()
    if not steps:
        raise UserError(
            f"{run.path}: this run recorded no tokens, so none can be plotted; set training.tokens_every above 0 and train again"
        )
    tables = (run.readable_tokens(step) for step in sorted(steps, key=lambda step: abs(steps.index(step) - len(steps) // 2)))
    table = next((table for table in tables if table is not None), None)
    if table is None:
        raise UserError(f"{run.path}: none of its token files can be read: {'; '.join(run.left_out)}")
    table = table.filter(pc.and_(pc.is_valid(table["ratio"]), pc.is_valid(table["old_logprob"])))
    every = max(1, len(table) // SHOWN_TOKENS)
    pairs = zip(table["old_logprob"].to_pylist()[::every], table["ratio"].to_pylist()[::every], strict=True)
    return [{"p": float(f"{math.exp(old):.4g}"), "ratio": float(f"{ratio:.4g}")} for old, ratio in pairs]
