"""Every named algorithm on the embedded task with an equal budget of rollouts: what it learns, what a step costs.

    python benchmarks/algorithms.py --seeds 3 --runs runs/algorithms

A run that is already there is not repeated. Prints a table in Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from groupwise.algorithms.algorithm import NAMED

BUDGET = 40 * 16 * 16
"""Completions generated for training."""


def run(name: str, seed: int, directory: Path) -> Path:
    """Train unless it was done; the peak memory of the process is written beside the metrics."""
    out = directory / f"{name}-{seed}"
    if not (out / "model").exists():
        code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module('groupwise', run_name='__main__')"
        command = [sys.executable, "-c", code, "groupwise", "train", name, "--out", str(out), "--set", f"seed={seed}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        (out / "peak_memory_mib.json").write_text(json.dumps(usage.ru_maxrss / 1024))
    return out


def summary(out: Path) -> dict[str, float]:
    """Held-out pass@1 at the start and within the budget, and the costs of a step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    spent, scores = {0: 0.0}, {}
    for row in rows:
        if "loss" in row:
            spent[row["step"]] = spent[row["step"] - 1] + row["rollouts/completions"]
        if "eval/pass@1" in row:
            scores[row["step"]] = row["eval/pass@1"]
    steps = [row for row in rows if "loss" in row]
    within = [step for step in scores if spent[step] <= BUDGET]
    return {
        "base": scores[0],
        "score": scores[max(within)],
        "steps": max(within),
        "entropy": steps[max(within) - 1]["entropy"],
        "clipped": statistics.mean(row["clip_fraction"] for row in steps[: max(within)]),
        "learner": statistics.median(row["seconds/learner"] for row in steps),
        "memory": json.loads((out / "peak_memory_mib.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    arguments = parser.parse_args()
    wanted = [(name, seed) for seed in range(arguments.seeds) for name in NAMED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread of torch each
        list(pool.map(lambda item: run(*item, arguments.runs), wanted))
    print("| algorithm | pass@1, each seed | mean | steps | entropy | clipped | learner s/step | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in NAMED:
        found = [summary(arguments.runs / f"{name}-{seed}") for seed in range(arguments.seeds)]
        scores = [item["score"] for item in found]
        mean = {key: statistics.mean(item[key] for item in found) for key in found[0]}
        each = " ".join(f"{score:.3f}" for score in scores)
        print(
            f"| {name} | {each} | {mean['score']:.3f} | {mean['steps']:.0f} | {mean['entropy']:.3f} | "
            f"{mean['clipped']:.4f} | {mean['learner']:.2f} | {mean['memory']:.0f} |"
        )


if __name__ == "__main__":
    main()
