"""How well GPUs are used from 8 to 1,024 of them, synchronously and asynchronously: the simulation behind docs/scaling.md.

    python benchmarks/scaling.py --out DIRECTORY [--batch fixed]

Writes scaling-grows.json or scaling-fixed.json, and scaling.svg and scaling.png of those that are there. Each sampler has 64
rows. A batch has as many completions as all samplers have rows, so that it grows with the cluster, or 2,048 completions whatever
its size. For each number of GPUs and each way of running, the share of learners with the most tokens per second is taken.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import altair as alt
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from groupwise.cluster.planning.lengths import lognormal
from groupwise.cluster.planning.memory import Load, Needs
from groupwise.cluster.planning.rates import Rates, find_gpu
from groupwise.cluster.planning.shape import shape_of
from groupwise.cluster.planning.simulation import Outcome, Setup, Simulation
from groupwise.config import Recipe

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)
CHOSEN_UP_TO = 64
"""GPUs up to which shares are tried; beyond, that of so many is taken."""
GROUP, ROWS, FIXED = 16, 64, 128
"""Completions of a group, rows of a sampler, groups of a batch that does not grow."""
MEAN, VARIATION, MOST = 3000.0, 1.0, 16_384
PROMPT = 300
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"staleness": 0},
    "one step off": {"staleness": 1, "partial": False},
    "asynchronous, staleness 1": {"staleness": 1},
    "asynchronous, staleness 4": {"staleness": 4},
}
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip
"""Of Qwen3 8B."""


def rates_for(prompts: int) -> Rates:
    recipe = Recipe.model_validate(
        {
            "model": {"dtype": "bfloat16"},
            "rollouts": {"sampler": "vllm", "group_size": GROUP, "prompts_per_step": prompts, "max_tokens": MOST},
            "learner": {"minibatches": 1, "micro_batch_tokens": 32_768, "checkpointing": True},
        }
    )
    shape = shape_of(AutoConfig.for_model("qwen3", **SHAPE))
    load = Load(prompts=prompts, group=GROUP, prompt_tokens=PROMPT, longest_prompt=PROMPT, tokens=MEAN, max_tokens=MOST)
    return Rates(shape=shape, recipe=recipe, needs=Needs(), load=load, gpu=find_gpu("h200"))


def simulated(gpus: int, learners: int, mode: dict[str, Any], steps: int, batch: str) -> Outcome:
    samplers = gpus - learners
    prompts = max(1, samplers * ROWS // GROUP) if batch == "grows" else FIXED
    rates = rates_for(prompts)
    setup = Setup(
        samplers=samplers,
        rows=ROWS,
        prompts=prompts,
        group=GROUP,
        window=prompts if mode.get("partial", True) and mode["staleness"] else 1,
        step_seconds=rates.step_seconds,
        prefill_seconds=rates.prefill_seconds(PROMPT),
        learn_seconds=lambda tokens: rates.learn_seconds(tokens, learners),
        publish_seconds=rates.publish_seconds(),
        load_seconds=rates.load_seconds,
        **mode,
    )
    return Simulation(setup, lognormal(MEAN, VARIATION, MOST)).run(steps)


def best(gpus: int, mode: dict[str, Any], steps: int, shares: tuple[float, ...], batch: str) -> dict[str, Any]:
    found = []
    for learners in sorted({max(1, min(gpus - 1, round(share * gpus))) for share in shares}):
        outcome = simulated(gpus, learners, mode, steps + mode["staleness"], batch)
        used = (outcome.sampler_fill * (gpus - learners) + outcome.learner_busy * learners) / gpus
        per_gpu = outcome.tokens / outcome.steps / outcome.seconds / gpus
        found.append(
            {
                "gpus": gpus,
                "learners": learners,
                "step": outcome.seconds,
                "tokens/s/gpu": per_gpu,
                "samplers": outcome.sampler_fill,
                "learner": outcome.learner_busy,
                "all": used,
                "age": outcome.largest_age,
                "under way": outcome.most_under_way,
            }
        )
    return max(found, key=lambda row: row["tokens/s/gpu"])


TITLES = {"grows": "a batch of 64 completions per sampler", "fixed": "a batch of 2,048 completions"}


def draw(out: Path) -> None:
    values = [
        {"GPUs": row["gpus"], "share": row["all"], "rollouts": row["mode"], "batch": title}
        for batch, title in TITLES.items()
        if (out / f"scaling-{batch}.json").is_file()
        for row in json.loads((out / f"scaling-{batch}.json").read_text())
    ]
    colours = alt.Scale(domain=list(MODES), range=["#7f7f7f", "#d98c21", "#4c9bd6", "#1f5fa8"])
    legend = alt.Legend(orient="bottom", columns=2, title=None, labelLimit=300)
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("GPUs:Q", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=list(GPUS), format="d", grid=False)),
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", title="of all GPUs in use")),
            color=alt.Color("rollouts:N", scale=colours, legend=legend),
        )
        .properties(width=320, height=240)
        .facet(column=alt.Column("batch:N", title=None, sort=list(TITLES.values())))
        .configure(background="white")
    )
    lines.save(out / "scaling.svg")
    lines.save(out / "scaling.png", scale_factor=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", choices=list(TITLES), default="grows")
    parser.add_argument("--draw", action="store_true", help="Only draw what is there.")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, file = Console(highlight=False), arguments.out / f"scaling-{arguments.batch}.json"
    if arguments.draw:
        draw(arguments.out)
        return
    rows: list[dict[str, Any]] = []
    shares = dict.fromkeys(MODES, SHARES)
    for gpus in arguments.gpus:
        for name, mode in MODES.items():
            started = time.perf_counter()
            row = best(gpus, mode, arguments.steps, shares[name], arguments.batch)
            if gpus >= CHOSEN_UP_TO:
                shares[name] = (row["learners"] / gpus,)
            rows.append({"mode": name, **row, "simulated in": time.perf_counter() - started})
            console.print(rows[-1])
            file.write_text(json.dumps(rows, indent=1))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    draw(arguments.out)


if __name__ == "__main__":
    main()
