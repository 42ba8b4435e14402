"""What bfloat16 saves on this machine: a step in float32 and in bfloat16, in turn, each in a process of its own.

    python benchmarks/bfloat16.py [--works reasoning vocabulary] [--pairs 5] [--threads 2]

Prints Markdown: ratios above 1 mean that bfloat16 is faster. The gap is that between the log-probabilities of the sampler and of
the learner, in nats per token, over one step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from peers import Report, Worker, median
from worker_groupwise import Step
from workloads import WORKS, Work, make

PRECISIONS = "float32", "bfloat16"


def measure(work: Work, pairs: int, directory: Path) -> dict[str, list[Report]]:
    """The turns of each, after one to warm up."""
    results: dict[str, list[Report]] = {precision: [] for precision in PRECISIONS}
    with ExitStack() as stack:
        workers = {p: Worker(sys.executable, "worker_groupwise.py", replace(work, precision=p), directory) for p in PRECISIONS}
        for worker in workers.values():
            stack.callback(worker.close)
        for turn in range(pairs + 1):
            for precision, worker in workers.items():
                report = worker.turn()
                if turn:
                    results[precision].append(report)
                time.sleep(0.5)  # for the threads of the one to go to sleep before the other's turn
    return results


def gap(work: Work, directory: Path) -> Report:
    return Step.load(work, directory, old_logprobs="recompute").run()


def ratios(results: dict[str, list[Report]], key: str) -> list[float]:
    """Of seconds per useful token, pair by pair: completions end by themselves, so no two runs have equally many."""
    pairs = zip(*(results[precision] for precision in PRECISIONS), strict=True)
    return [(slow[key] / slow["tokens"]) / (fast[key] / fast["tokens"]) for slow, fast in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", default=["reasoning", "vocabulary"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| | s/step | generation s | training s | peak MiB | gap, mean | gap, largest |")
    print("|---|---|---|---|---|---|---|")
    lines = []
    for name in arguments.works:
        with tempfile.TemporaryDirectory() as directory:
            work = replace(WORKS[name], threads=arguments.threads)
            make(work, Path(directory))
            results = measure(work, arguments.pairs, Path(directory))
            for precision, reports in results.items():
                found = gap(replace(work, precision=precision), Path(directory))
                seconds = (f"{median(reports, key):.2f}" for key in ("seconds", "generation", "training"))
                gaps = (f"{found[f'sampler_gap_{which}']:.1e}" for which in ("mean", "max"))
                cells = f"{name}, {precision}", *seconds, f"{median(reports, 'peak_mib'):,.0f}", *gaps
                print("| " + " | ".join(cells) + " |", flush=True)
        parts = []
        for part, key in (("step", "seconds"), ("generation", "generation"), ("training", "training")):
            found_ratios = ratios(results, key)
            middle, lowest, highest = statistics.median(found_ratios), min(found_ratios), max(found_ratios)
            parts.append(f"{part} {middle:.2f} ({lowest:.2f} to {highest:.2f})")
        lines.append(f"{name}, float32 over bfloat16: {', '.join(parts)}; {arguments.pairs} pairs, medians")
    print("\n" + "\n\n".join(lines))


if __name__ == "__main__":
    main()
