"""How groupwise's step grows with the length of completions, with keys and values of several dtypes while it generates.

    python benchmarks/lengths.py

For each length, a step with each dtype in turn: seconds, memory, their exponents, and one step of 4,096 tokens. Writes LENGTHS.md
beside this file. The gap is that between the log-probabilities of the sampler and of the learner, which runs in float32, in nats
per token, on a model with wider weights, whose logits are far from flat.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peers import HERE, Peer, Report, line_of, slope, turns
from rich.console import Console
from worker_groupwise import Step
from workloads import Work, make

BASE = Work(prompts=4, prompt_tokens=64, group_size=16, max_tokens=64, endless=True)
"""That of the growth table in run.py."""
WIDE = {"initializer_range": 1.4 / BASE.hidden**0.5}
LENGTHS = (64, 128, 256, 512, 1024)
LONGEST = 4096
DTYPES = ("float32", "bfloat16", "float16")
Found = dict[str, dict[int, Report]]
"""By dtype and length."""


def measure(base: Work, length: int, dtypes: Sequence[str], pairs: int, console: Console) -> dict[str, Report]:
    """Steps of this length with each dtype in turn: of each the fastest of `pairs` after one to warm up; that one for 0 pairs."""
    console.print(f"[bold]{length:,} tokens[/bold]")
    peers = {dtype: Peer(sys.executable, "worker_groupwise.py", {"cache_dtype": dtype}) for dtype in dtypes}
    reports: dict[str, list[Report]] = {dtype: [] for dtype in dtypes}
    for turn, dtype, report in turns(replace(base, max_tokens=length), peers, pairs):
        if "error" in report:
            raise SystemExit(f"{dtype}, {length} tokens: {report['error']}")
        if reason := report["paths"]["fallback"]:
            raise SystemExit(f"{dtype}, {length} tokens: not on the fast path: {reason}")
        console.print(line_of(dtype, report))
        if turn or not pairs:
            reports[dtype].append(report)
    return {dtype: min(of, key=lambda report: report["seconds"]) for dtype, of in reports.items()}


def gap(base: Work, length: int, dtype: str) -> Report:
    """Of one group of about 4,096 tokens, but at least four completions."""
    rows = max(4, 4096 // length)
    work = replace(base, prompts=1, group_size=rows, max_tokens=length, cache_dtype=dtype, architecture=WIDE)
    with tempfile.TemporaryDirectory() as directory:
        make(work, Path(directory))
        return Step.load(work, Path(directory), old_logprobs="recompute").run()


def write(out: Path, base: Work, found: Found, gaps: Found, longest: int) -> None:
    lines = [
        "# Long completions",
        "",
        f"{base.prompts} prompts of {base.prompt_tokens} tokens, {base.group_size} completions each, all of the same length;"
        f" fp32, {base.threads} threads, PyTorch {torch.__version__}; keys and values in the first column's dtype while groupwise"
        " generates. `python benchmarks/lengths.py` measures again. The dtypes ran in turn; the fastest turn of each counts.",
    ]
    if longest:
        lines[-1] += f" Exponents are fitted without the one step of {longest:,} tokens."
    for key, label in (("seconds", "Seconds of a step"), ("generation", "Of generation"), ("training", "Of training")):
        lines += ["", *table(label, found, key, ".2f", without=longest)]
    lines += ["", *table("Peak MiB", found, "peak_mib", ",.0f", without=longest)]
    lines += [
        "",
        *table("Gap, mean", gaps, "sampler_gap_mean", ".1e"),
        "",
        *table("Gap, largest", gaps, "sampler_gap_max", ".1e"),
    ]
    lines += ["", *faster(found)]
    out.write_text("\n".join(lines) + "\n")


def table(label: str, found: Found, key: str, form: str, *, without: int | None = None) -> list[str]:
    """A row for each dtype; if `without` is given, its last cell is the exponent fitted to all other lengths."""
    lengths = list(next(iter(found.values())))
    columns = [label, *(f"{length:,}" for length in lengths), *(["exponent"] if without is not None else [])]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for dtype, of in found.items():
        cells = [dtype, *(format(of[length][key], form) for length in lengths)]
        if without is not None:
            fitted = [length for length in lengths if length != without]
            cells.append(f"{slope(fitted, [of[length][key] for length in fitted]):.2f}" if len(fitted) > 1 else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def faster(found: Found) -> list[str]:
    """What a narrower dtype gains, where float32 ran too."""
    lines = []
    for dtype, of in found.items():
        if dtype != "float32" and "float32" in found:
            each = [f"{found['float32'][length]['seconds'] / report['seconds']:.2f}" for length, report in of.items()]
            lines.append(f"Steps, float32 over {dtype}, by length: {', '.join(each)}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--longest", type=int, default=LONGEST, help="One step of it; 0: none.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--pairs", type=int, default=2, help="Turns of each dtype at each length.")
    parser.add_argument("--prompts", type=int, default=BASE.prompts)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "LENGTHS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, base = Console(highlight=False), replace(BASE, prompts=arguments.prompts, threads=arguments.threads)
    found: Found = {dtype: {} for dtype in arguments.dtypes}
    gaps: Found = {dtype: {} for dtype in arguments.dtypes}
    for length in [*arguments.lengths, *([arguments.longest] if arguments.longest else [])]:
        pairs = 0 if length == arguments.longest else arguments.pairs
        for dtype, report in measure(base, length, arguments.dtypes, pairs, console).items():
            found[dtype][length] = report
        write(arguments.out, base, found, gaps, arguments.longest)  # should the rest not finish
        for dtype in arguments.dtypes:
            gaps[dtype][length] = gap(base, length, dtype)
            console.print(f"  {dtype:<10} gap {gaps[dtype][length]['sampler_gap_mean']:.1e} nats")
        write(arguments.out, base, found, gaps, arguments.longest)
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
