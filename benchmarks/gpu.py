"""groupwise beside TRL with `generate` on one CUDA GPU: Qwen3 of 0.6 and 1.7 billion parameters, random weights, bfloat16.

    python benchmarks/gpu.py --peers DIR      DIR/trl/bin/python has TRL and a CUDA build of PyTorch
    python benchmarks/gpu.py --tiny           the same path in small, on whatever machine this is

Prints what the learner reaches of the GPU's peak rate of products, and decoding of the bound that reading weights and keys
from memory sets.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from run import Report, compare, table
from workloads import Work, parameters

PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12
"""Of an H200: dense bfloat16 products, and memory."""

LOAD = Work(
    prompts=64,
    prompt_tokens=512,
    group_size=16,
    max_tokens=1024,
    dtype="bfloat16",
    micro_batch_tokens=65_536,
    micro_batch_rows=16,
)
WORKS = {
    "0.6B": replace(LOAD, vocabulary=151_936, hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=3072, endless=True),
    "1.7B": replace(LOAD, vocabulary=151_936, hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=6144, endless=True),
}
TINY = {"tiny": Work(prompts=2, prompt_tokens=16, group_size=2, max_tokens=8, dtype="bfloat16", endless=True)}


def limits(work: Work, reports: list[Report]) -> str:
    """How far groupwise is from the GPU's peak in training, and from its memory's rate in generation."""
    trained = work.prompts * (work.prompt_tokens + work.group_size * work.max_tokens)
    flops = 6 * parameters(work) * trained
    training = statistics.median(report["training"] for report in reports)
    rows, mean = work.prompts * work.group_size, work.max_tokens / 2
    key_bytes = 2 * 2 * work.layers * (work.kv_heads or work.heads) * work.head_dim
    step_bytes = 2 * parameters(work) + key_bytes * (rows * mean + work.prompts * work.prompt_tokens)
    bound = work.max_tokens * step_bytes / PEAK_BYTES
    generation = statistics.median(report["generation"] for report in reports)
    return (
        f"Learner: {flops / training / 1e12:.0f} TFLOP/s, {flops / training / PEAK_FLOPS:.0%} of the peak. "
        f"Decoding: {bound / generation:.0%} of the bound by memory ({bound:.1f} s)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="Where TRL's environment is; left out: groupwise alone.")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        raise SystemExit("no CUDA device here; --tiny tries the same path in small")
    console = Console(highlight=False, width=200)
    pythons, scripts = {"groupwise": sys.executable}, {"groupwise": "worker_groupwise.py"}
    if arguments.peers:
        pythons["trl"], scripts["trl"] = str(arguments.peers / "trl" / "bin" / "python"), "worker_trl.py"
    works = TINY if arguments.tiny else WORKS
    for name in arguments.works or works:
        results = compare(works[name], pythons, scripts, arguments.pairs, console)
        console.print("\n".join([f"## {name}", "", *table(works[name], results)[:-1], limits(works[name], results["groupwise"])]))


if __name__ == "__main__":
    main()
