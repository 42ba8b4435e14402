"""LoRA beside full training, groupwise beside TRL with peft: time and memory of a step, all four in turn in one run.

    python benchmarks/lora.py [--works reasoning wide] [--pairs 5] [--trl PYTHON]

Prints Markdown: medians, and ratios of seconds per useful token and of peak memory.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from peers import Peer, Report, compare, median, per_token, ratio
from rich.console import Console
from workloads import WORKS, Work, scaled

RANK = 16
LORA_WORKS: dict[str, Work] = {
    "reasoning": scaled(WORKS["reasoning"], 0.25),
    # Weights, their gradients and moments are most of the memory: 135 million parameters and few tokens.
    "wide": Work(
        prompts=4,
        prompt_tokens=32,
        group_size=4,
        max_tokens=32,
        endless=True,
        hidden=1024,
        layers=8,
        heads=16,
        mlp=4096,
    ),
}
PARTS = {"step": "seconds", "generation": "generation", "training": "training", "memory": "peak_mib"}
PAIRS = {
    "TRL / groupwise, full": ("trl full", "groupwise full"),
    "TRL / groupwise, LoRA": ("trl LoRA", "groupwise LoRA"),
    "full / LoRA, groupwise": ("groupwise full", "groupwise LoRA"),
    "full / LoRA, TRL": ("trl full", "trl LoRA"),
}


def table(name: str, work: Work, results: dict[str, list[Report]]) -> list[str]:
    lines = [f"### {name}", "", "| | s/step | generation s | training s | ms/token | peak MiB |", "|---|---|---|---|---|---|"]
    for peer, reports in results.items():
        seconds = (f"{median(reports, key):.2f}" for key in ("seconds", "generation", "training"))
        cells = peer, *seconds, f"{1e3 * per_token(reports, 'seconds'):.2f}", f"{median(reports, 'peak_mib'):,.0f}"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| | " + " | ".join(PARTS) + " |", "|---|---|---|---|---|"]
    for label, (one, other) in PAIRS.items():
        ratios = (f"{ratio(results[one], results[other], key):.2f}" for key in PARTS.values())
        lines.append("| " + " | ".join((label, *ratios)) + " |")
    count = len(next(iter(results.values())))
    return [*lines, "", f"{work.prompts} prompts x {work.group_size}, rank {RANK}; {count} turns of each; medians.", ""]


def peers(trl: str) -> dict[str, Peer]:
    pythons = {"groupwise": (sys.executable, "worker_groupwise.py"), "trl": (trl, "worker_trl.py")}
    forms = {"full": {}, "LoRA": {"lora_rank": RANK}}
    return {f"{name} {form}": Peer(*how, settings) for form, settings in forms.items() for name, how in pythons.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", choices=LORA_WORKS, default=list(LORA_WORKS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default=str(Path(__file__).parent.parent / ".bench" / "trl" / "bin" / "python"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    for name in arguments.works:
        console.print(f"[bold]{name}[/bold]")
        work = replace(LORA_WORKS[name], threads=arguments.threads)
        print("\n".join(table(name, work, compare(work, peers(arguments.trl), arguments.pairs, console))), flush=True)


if __name__ == "__main__":
    main()
