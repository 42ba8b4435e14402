"""`groupwise explore`: one self-contained HTML page that plots the algorithms' closed forms with sliders, and a run's tokens with them."""

import inspect
import math
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from groupwise.algorithms import NAMED, Algorithm, named, theory
from groupwise.errors import UserError
from groupwise.evidence.javascript import to_javascript
from groupwise.evidence.lines import short
from groupwise.evidence.page import asset, embed, embed_script, render, write
from groupwise.evidence.runs import Run
from groupwise.text import shortened, visible

SHOWN_TOKENS, SHOWN_STEPS, SHOWN_REWARDS, SHOWN_CHARACTERS = 400, 40, 64, 200
"""How many tokens of a step the page shows, of how many steps, how many rewards of a group, and characters of a name."""
SAMPLING = ("group_size", "max_tokens", "temperature", "top_p", "top_k", "min_p")
"""Keys of [rollouts] that figures open with."""


def write_explorer(run: Run | None, out: Path) -> None:
    """Write the page.

    Args:
        run: open the figures at its settings, and plot tokens of its recorded steps as dots; None: neither.
        out: the HTML file to write.

    Raises:
        UserError: the run recorded no tokens, or the page cannot be written.
    """
    forms = to_javascript(inspect.getsource(theory), "theory")
    script = "".join([forms, *(asset(name) for name in ("numbers.js", "explorer_plot.js", "explorer_figures.js", "explorer.js"))])
    page = render(
        "explorer.html",
        style=asset("page.css") + asset("explorer.css"),
        script=embed_script(script),
        words=embed(tomllib.loads(asset("explorer_text.toml"))),
        run=embed(None if run is None else shown_run(run)),
    )
    write(out, page)


def shown_run(run: Run) -> dict[str, Any]:
    """What the page shows of a run: its settings, and of evenly spaced recorded steps tokens and a group's rewards.

    Raises:
        UserError: no recorded step can be read.
    """
    recorded = run.token_steps()
    if not recorded:
        raise UserError(
            f"{run.path}: this run recorded no tokens, so none can be plotted; set training.tokens_every above 0 and train again"
        )
    tables = {recorded[i]: run.readable_tokens(recorded[i]) for i in evenly(len(recorded), SHOWN_STEPS)}
    steps = [shown_step(step, table) for step, table in tables.items() if table is not None]
    if not steps:
        raise UserError(f"{run.path}/tokens: none of its files can be read, step {recorded[0]} among them")
    return {
        "name": visible(run.path.resolve().name),
        "algorithm": visible(shortened(run.algorithm, SHOWN_CHARACTERS)),
        "settings": settings(run),
        "recorded": len(recorded),
        "steps": steps,
    }


def settings(run: Run) -> dict[str, Any]:
    """The run's settings that figures read, flat; what its recipe leaves out has the value that its algorithm gives it."""
    own = run.recipe.get("algorithm", {})
    usual: dict[str, Any] = {**Algorithm().settings(), **(named(run.algorithm).settings() if run.algorithm in NAMED else {})}
    sampling = run.recipe.get("rollouts", {})
    found = {**usual, **own, **{key: sampling[key] for key in SAMPLING if key in sampling}}
    words = {key: visible(shortened(value, SHOWN_CHARACTERS)) for key, value in found.items() if isinstance(value, str)}
    return {**words, **{key: value for key, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}}


def shown_step(step: int, table: pa.Table) -> dict[str, Any]:
    """π_old, ratio and π_old/π_rollout of evenly spaced tokens, and the rewards of one group: the first in which they differ."""
    rewards: dict[int, dict[int, float]] = {}
    for token in table.filter(pc.equal(table["position"], 0)).select(["group", "row", "reward"]).to_pylist():
        if token["reward"] is not None and math.isfinite(token["reward"]):
            rewards.setdefault(token["group"], {})[token["row"]] = token["reward"]
    groups = [list(group.values())[:SHOWN_REWARDS] for group in rewards.values()]
    mixed = [group for group in groups if len(set(group)) > 1]
    table = table.filter(pc.and_(pc.is_finite(table["ratio"]), pc.less_equal(table["old_logprob"], 1e-3)))
    places = evenly(len(table), SHOWN_TOKENS)
    old, ratio = (table[name].take(places).to_pylist() for name in ("old_logprob", "ratio"))
    sampler = (
        table["rollout_logprob"].take(places).to_pylist() if "rollout_logprob" in table.column_names else [None] * len(places)
    )
    return {
        "step": step,
        "p": [short(math.exp(value)) for value in old],
        "ratio": [short(value) for value in ratio],
        "weights": [None if b is None or a - b > 100 else short(math.exp(a - b)) for a, b in zip(old, sampler, strict=True)],
        "rewards": [[short(reward) for reward in group] for group in (mixed or groups)[:1]],
    }


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the indices below `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
