"""groupwise beside TRL, `generate` and vLLM: the same model, prompts and count of useful tokens, in turn, in one run.

    make bench

Every peer is a process of its own that waits between its turns. Writes RESULTS.md and RESULTS.png beside this file.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import altair as alt
import torch
from rich.console import Console
from workloads import WORKS, Work, make, parameters

HERE = Path(__file__).parent
Report = dict[str, float]


class Worker:
    """A peer that runs one turn for each line it is sent."""

    def __init__(self, python: str, script: str, work: Work, directory: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(asdict(work)), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def turn(self) -> Report:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            line = line.removeprefix("REPORT ")
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def workers(pythons: dict[str, str], scripts: dict[str, str], work: Work) -> Iterator[dict[str, Worker]]:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make(work, Path(directory))
        found = {name: Worker(pythons[name], script, work, Path(directory)) for name, script in scripts.items()}
        for worker in found.values():
            stack.callback(worker.close)
        yield found


def compare(
    work: Work, pythons: dict[str, str], scripts: dict[str, str], pairs: int, console: Console
) -> dict[str, list[Report]]:
    """`pairs` turns of each, one after the other, after a turn each to warm up."""
    results: dict[str, list[Report]] = {name: [] for name in scripts}
    with workers(pythons, scripts, work) as found:
        for turn in range(pairs + 1):
            for name, worker in found.items():
                report = worker.turn()
                console.print(f"  {name:<10} {report['seconds']:7.2f} s  {report['tokens'] / report['generation']:8.0f} tok/s")
                if turn:
                    results[name].append(report)
                time.sleep(0.5)  # for the threads of the one to go to sleep before the other's turn
    return results


def plot(results: dict[str, dict[str, list[Report]]], path: Path) -> None:
    """Every turn as a dot: seconds for a thousand useful tokens, by work and part."""
    rows = [
        {"work": work, "part": part, "peer": peer, "seconds": 1000 * report[part] / report["tokens"]}
        for work, peers in results.items()
        for peer, reports in peers.items()
        for report in reports
        for part in ("generation", "training")
        if part in report
    ]
    order = ["groupwise", "trl", "generate", "vllm"]
    chart = (
        alt.Chart(alt.Data(values=rows), width=220, height=110)
        .mark_circle(size=50, opacity=0.7)
        .encode(
            x=alt.X("seconds:Q", scale=alt.Scale(type="log"), title="seconds per 1,000 tokens"),
            y=alt.Y("peer:N", sort=order, title=None),
            color=alt.Color("peer:N", sort=order, legend=None),
            row=alt.Row("work:N", sort=list(results), title=None),
            column=alt.Column("part:N", title=None),
        )
    )
    chart.save(path, scale_factor=1.5)


def median(reports: list[Report], key: str) -> float:
    return statistics.median(report[key] for report in reports)


def per_token(reports: list[Report], key: str) -> float:
    """Median seconds for a useful token: completions end by themselves, so no two runs have equally many."""
    return statistics.median(report[key] / report["tokens"] for report in reports)


def ceiling(work: Work) -> dict[str, float]:
    """GFLOP/s of fp32 matrix products of the model's own shape on this machine, now, and useful tokens/s at that rate."""
    a, b = torch.randn(256, work.hidden), torch.randn(work.hidden, work.mlp)
    for _ in range(50):
        a @ b
    started = time.perf_counter()
    for _ in range(500):
        a @ b
    rate = 500 * 2 * 256 * work.hidden * work.mlp / (time.perf_counter() - started)
    return {"gflops": rate / 1e9, "tokens_per_second": rate / (2 * parameters(work))}


def table(work: Work, results: dict[str, list[Report]]) -> list[str]:
    ours = results["groupwise"]
    lines = [
        "| | s/step | generation tok/s | training s | peak MiB | step: theirs / ours | generation | training | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, reports in results.items():
        whole = "training" in reports[0]
        cells = [
            name,
            f"{median(reports, 'seconds'):.2f}" if whole else "",
            f"{1 / per_token(reports, 'generation'):,.0f}",
            f"{median(reports, 'training'):.2f}" if whole else "",
            f"{median(reports, 'peak_mib'):,.0f}",
            f"{per_token(reports, 'seconds') / per_token(ours, 'seconds'):.2f}" if whole else "",
            f"{per_token(reports, 'generation') / per_token(ours, 'generation'):.2f}",
            f"{per_token(reports, 'training') / per_token(ours, 'training'):.2f}" if whole else "",
            f"{median(reports, 'peak_mib') / median(ours, 'peak_mib'):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    limit = ceiling(work)
    rate = 1 / per_token(ours, "generation")
    lines.append("")
    lines.append(
        f"Ceiling: matrix products of this shape run at {limit['gflops']:.0f} GFLOP/s, which would be "
        f"{limit['tokens_per_second']:,.0f} tok/s in generation; groupwise is at {rate / limit['tokens_per_second']:.0%} of it. "
        f"{len(ours)} pairs; medians; ratios are of seconds per useful token."
    )
    return lines


def growth(python: str, console: Console) -> list[str]:
    """Time and memory of groupwise's step as one size grows, each in a process of its own; the exponents fitted."""
    base = Work(prompts=4, prompt_tokens=64, group_size=16, max_tokens=64, endless=True)
    axes: dict[str, list[Work]] = {
        "group size": [replace(base, group_size=g) for g in (4, 16, 64)],
        "length": [replace(base, max_tokens=t) for t in (64, 256, 1024)],
        "vocabulary": [replace(base, vocabulary=v) for v in (1_000, 16_000, 152_000)],
    }
    lines = ["| grows | sizes | seconds | peak MiB | time's exponent | memory's exponent |", "|---|---|---|---|---|---|"]
    for name, works in axes.items():
        key = {"group size": "group_size", "length": "max_tokens", "vocabulary": "vocabulary"}[name]
        sizes, seconds, memory = [], [], []
        for work in works:
            with workers({"groupwise": python}, {"groupwise": "worker_groupwise.py"}, work) as found:
                reports = [found["groupwise"].turn() for _ in range(3)][1:]
            sizes.append(getattr(work, key))
            seconds.append(min(report["seconds"] for report in reports))
            memory.append(reports[-1]["peak_mib"])
            console.print(f"  {name} {sizes[-1]}: {seconds[-1]:.2f} s, {memory[-1]:.0f} MiB")
        cells = [
            ", ".join(f"{x:,}" for x in sizes),
            ", ".join(f"{x:.2f}" for x in seconds),
            ", ".join(f"{x:.0f}" for x in memory),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {slope(sizes, seconds):.2f} | {slope(sizes, memory):.2f} |")
    return lines


def slope(sizes: list[Any], values: list[float]) -> float:
    """Of the line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", nargs="+", default=[*WORKS, "growth"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(".bench"), help="Where the peers' environments are.")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    pythons = {name: str(arguments.peers / name / "bin" / "python") for name in ("trl", "vllm")}
    pythons |= {"groupwise": sys.executable, "generate": pythons["trl"]}
    lines = ["# Results", "", "Two CPU cores, fp32, PyTorch " + torch.__version__ + ". `make bench` measures again."]
    results: dict[str, dict[str, list[Report]]] = {}
    for name in arguments.works:
        console.print(f"[bold]{name}[/bold]")
        lines += ["", f"## {name}", ""]
        if name == "growth":
            lines += growth(sys.executable, console)
            continue
        scripts = {"groupwise": "worker_groupwise.py", "trl": "worker_trl.py"}
        if name != "vocabulary":
            scripts |= {"generate": "worker_generate.py", "vllm": "worker_vllm.py"}
        results[name] = compare(WORKS[name], pythons, scripts, arguments.pairs, console)
        lines += table(WORKS[name], results[name])
        arguments.out.write_text("\n".join(lines) + "\n")
    if results:
        picture = arguments.out.with_suffix(".png")
        plot(results, picture)
        lines += ["", f"![Seconds for 1,000 useful tokens, every turn]({picture.name})"]
    arguments.out.write_text("\n".join(lines) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
