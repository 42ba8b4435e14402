"""Programs a second through each kind of box that this machine can build.

    python benchmarks/sandbox.py [--programs 1000]

Each program reads a number and prints the next one; six run at once, as the reward `code` runs them. "Alone" is one after
another, each in a box that was started ahead, as for a completion with several tests.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

from groupwise.rewards.boxes import Kind, Limits
from groupwise.rewards.sandbox import Box, why_not
from groupwise.rewards.warm import WAITING

PROGRAM = "print(int(input()) + 1)"
LIMITS = Limits(seconds=60.0)
AT_ONCE = 6


def seconds(run: Callable[[str], str], programs: int, at_once: int) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        said = list(pool.map(run, map(str, range(programs))))
    assert said == [f"{number + 1}\n" for number in range(programs)]
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    programs = parser.parse_args().programs
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before\n")
    print("| box | confined by | programs | s | programs/s | alone, programs/s |\n|---|---|---|---|---|---|")
    for kind in get_args(Kind):
        if reason := why_not(kind):
            print(f"| {kind} | not here: {reason} | | | | |")
            continue
        box = Box(kind)

        def run(given: str, box: Box = box) -> str:
            return WAITING.run(box, PROGRAM, given, LIMITS).stdout

        took = seconds(run, programs, AT_ONCE)
        few = max(1, programs // 10)
        alone = few / seconds(run, few, 1)
        how = box.describe().partition(" with ")[2]
        print(f"| {kind} | {how} | {programs:,} | {took:.1f} | {programs / took:.1f} | {alone:.1f} |")
    WAITING.close()
    print(f"\nload average {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
