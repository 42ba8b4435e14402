"""Two versions of groupwise at the same works, in turn: what a change costs or gains.

    git worktree add ../old COMMIT
    python benchmarks/pairs.py ../old . --works reasoning short --pairs 5

Each version runs its own benchmarks/worker_groupwise.py with its own src/, in this environment, on one model and its prompts.
Ratios are of seconds per useful token, old over new: above 1, the new version is faster, or takes less memory.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from peers import Peer, Report, compare, median, per_token, ratio
from rich.console import Console
from workloads import WORKS, scaled

PARTS = {"step": "seconds", "generation": "generation", "training": "training", "memory": "peak_mib"}


def peer(checkout: Path) -> Peer:
    """The worker of a checkout.

    Raises:
        SystemExit: it would import another groupwise.
    """
    found = Peer(sys.executable, checkout / "benchmarks" / "worker_groupwise.py", source=checkout / "src")
    code = "import groupwise; print(groupwise.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(found.source)}, capture_output=True, text=True, check=False
    )
    if not Path(done.stdout.strip()).is_relative_to(checkout):
        raise SystemExit(f"{checkout}: its worker imports {done.stdout.strip() or done.stderr.strip()}")
    return found


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def row(name: str, results: dict[str, list[Report]]) -> str:
    """The medians' ratios, and between which values those of single pairs lay."""
    old, new = results["old"], results["new"]
    cells = [name, f"{median(old, 'seconds'):.2f}", f"{median(new, 'seconds'):.2f}"]
    for key in PARTS.values():
        each = [ratio([one], [other], key) for one, other in zip(old, new, strict=True)]
        cells.append(f"{ratio(old, new, key):.2f} ({min(each):.2f} to {max(each):.2f})")
    cells += [f"{1 / per_token(reports, 'generation'):,.0f}" for reports in (old, new)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=["reasoning", "short"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="Where to write the table as well.")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    checkouts = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    peers = {name: peer(checkout) for name, checkout in checkouts.items()}
    columns = ["", "s/step: old", "new", *(f"{part}: old / new" for part in PARTS), "generation tok/s: old", "new"]
    lines = [
        f"Old: {commit(checkouts['old'])}; new: {commit(checkouts['new'])}. {arguments.pairs} pairs in turn, medians; in "
        "brackets the least and the largest of single pairs.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for name in arguments.works:
        console.print(f"[bold]{name}[/bold]")
        lines.append(row(name, compare(scaled(WORKS[name], arguments.scale), peers, arguments.pairs, console)))
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
