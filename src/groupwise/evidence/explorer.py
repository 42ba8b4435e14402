"""`groupwise explore`: the closed forms to play with, as one page that works from disk, with tokens of a run laid over them."""

import math
from pathlib import Path

import pyarrow.compute as pc

from groupwise.errors import UserError
from groupwise.evidence.page import asset, embed, render, write
from groupwise.evidence.runs import Run

SHOWN_TOKENS = 400


def write_explorer(run: Run | None, out: Path) -> None:
    """Write the page; `run` gives the tokens of a step in its middle, None leaves them out.

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
    """Old probability and ratio of tokens, evenly picked."""
    steps = run.token_steps()
    if not steps:
        raise UserError(
            f"{run.path}: no tokens were recorded (training.tokens_every), so there is nothing to lay over the figures"
        )
    table = run.tokens(steps[len(steps) // 2])
    table = table.filter(pc.is_valid(table["ratio"]))
    every = max(1, len(table) // SHOWN_TOKENS)
    pairs = zip(table["old_logprob"].to_pylist()[::every], table["ratio"].to_pylist()[::every], strict=True)
    return [{"p": float(f"{math.exp(old):.4g}"), "ratio": float(f"{ratio:.4g}")} for old, ratio in pairs]
