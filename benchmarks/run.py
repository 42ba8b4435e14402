"""groupwise beside TRL, `generate` and vLLM: the same model, prompts and count of useful tokens, in turn, in one run.

    make bench

Every peer is a process of its own that waits between its turns. Writes RESULTS.md and RESULTS.png beside this file. Other
comparisons: families.py (model families), lengths.py (long completions, dtypes of the KV cache), pairs.py (two versions of
groupwise).
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import altair as alt
import torch
from peers import HERE, Peer, Report, compare, median, per_token, ratio, slope, workers
from rich.console import Console
from workloads import WORKS, Work, parameters


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
            f"{ratio(reports, ours, 'seconds'):.2f}" if whole else "",
            f"{ratio(reports, ours, 'generation'):.2f}",
            f"{ratio(reports, ours, 'training'):.2f}" if whole else "",
            f"{ratio(reports, ours, 'peak_mib'):.2f}",
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
            with workers(work, {"groupwise": Peer(python, "worker_groupwise.py")}) as found:
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
        peers = {name: Peer(pythons[name], script) for name, script in scripts.items()}
        results[name] = compare(WORKS[name], peers, arguments.pairs, console)
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
