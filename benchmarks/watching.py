"""A run followed on the live page from its start, killed, resumed: how late its steps are shown, and what it costs.

    python benchmarks/watching.py [--steps 200] [--cost-steps 300] [--made-up-steps 10000] [--look-steps 600,5000,50000]

Aims: every step is shown within 2 seconds of being written, no console error, no request that leaves the page's server, memory
that does not grow, and at most 1 % of a step's time. The cost is measured within runs, by stopping server and browser for some
steps and letting them go on for the next ones in turn. One more run, in which nothing is stopped, shows how exact that is. A run
of made-up steps, up to 50 a second, shows whether the page's memory grows; others, what a look of the server takes.
"""

import argparse
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.pages import chromium, heap, opened
from tests.written import WrittenRun

from groupwise.evidence.document import document
from groupwise.evidence.following import Following
from groupwise.evidence.live.patches import patches
from groupwise.evidence.runs import Run, open_run

TOKEN = "token-of-the-benchmark"
AIM = 2.0
"""Seconds after which a step is to be shown."""
WINDOW, CATCHING_UP = 12, 3
"""Steps for which followers are stopped or go on, and how many of them do not count."""
ALIKE = ["algorithm.dynamic_sampling=false", "learner.learning_rate=1e-9", "rollouts.prompts_per_step=128"]
"""A run of which each step is as long as the next, so that few windows say much; about 0.7 s on two cores."""
SETTINGS = ["training.eval_every=25", "training.eval_problems=50", "training.checkpoint_every=20"]
OBSERVER = """() => {
  window.shownSteps = {};
  const look = () => {
    const step = parseInt((document.querySelector("#tile-progress .value")?.textContent ?? "").replaceAll(",", ""));
    if (step >= 0 && !(step in window.shownSteps)) window.shownSteps[step] = Date.now() / 1000;
  };
  new MutationObserver(look).observe(document.getElementById("tiles"), { childList: true, subtree: true, characterData: true });
  look();
}"""


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "GROUPWISE_WATCH_TOKEN": TOKEN}
    environment.pop("OMP_NUM_THREADS", None)  # as a user starts it
    command = [sys.executable, "-m", "groupwise", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(out: Path, steps: int, more: Sequence[str] = (), recipe: str = "quick") -> "subprocess.Popen[bytes]":
    settings = [part for item in [*SETTINGS, f"training.steps={steps}", *more] for part in ("--set", item)]
    return start("train", recipe, *settings, "--out", out)


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def watched(browser: Any, out: Path, port: int) -> Iterator[tuple[Any, list[str]]]:
    """A page that follows a run."""
    server = start("watch", out, "--port", port, "--no-open")
    try:
        while not listens(port):  # a page that fails to load would be loaded again by the browser, and follow the run too
            if server.poll() is not None:
                raise SystemExit("groupwise watch has ended")
            time.sleep(0.1)
        page, wrong = opened(browser, f"http://127.0.0.1:{port}/{TOKEN}/", viewport={"width": 1400, "height": 1000})
        page.locator("html[data-drawn]").wait_for(state="attached", timeout=60_000)
        page.evaluate(OBSERVER)
        yield page, wrong
        page.context.close()
    finally:
        server.terminate()
        server.wait(20)


def written_steps(out: Path, known: dict[int, float]) -> None:
    """Note when each step was seen in metrics.jsonl, to a tenth of a second."""
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        text, now = metrics.read_text(), time.time()
        for line in text.splitlines():
            if line.startswith('{"step": ') and '"reward/mean"' in line:
                known.setdefault(int(line[9 : line.index(",")]), now)


def follow(page: Any, run: "subprocess.Popen[bytes]", out: Path, known: dict[int, float], heaps: list[int], until: int) -> None:
    """Until the run has ended, or has written step `until`."""
    looked = time.monotonic()
    while run.poll() is None and max(known, default=0) < until:
        written_steps(out, known)
        if time.monotonic() - looked > 10:
            heaps.append(heap(page))
            looked = time.monotonic()
        page.wait_for_timeout(100)
    written_steps(out, known)


def delays(known: dict[int, float], shown: dict[int, float]) -> list[float]:
    """For each step the seconds until the page showed it or a later one."""
    late = {step: min((at for number, at in shown.items() if number >= step), default=float("inf")) for step in known}
    found = {step: max(0.0, late[step] - at) for step, at in known.items()}
    if missed := [f"{step} after {seconds:.1f} s" for step, seconds in found.items() if seconds > AIM]:
        print(f"late: step {', '.join(missed)}; load {os.getloadavg()[0]:.1f}")
    return list(found.values())


def followed(browser: Any, home: Path, steps: int, port: int) -> None:
    out = home / "run"
    known: dict[int, float] = {}
    heaps: list[int] = []
    with watched(browser, out, port) as (page, wrong):
        run = train(out, steps)
        follow(page, run, out, known, heaps, steps // 2)
        run.kill()
        run.wait()
        last = max(known)
        page.wait_for_timeout(3000)
        first = {int(step): at for step, at in page.evaluate("window.shownSteps").items()}
        late = delays(known, first)
        known.clear()
        page.evaluate("window.shownSteps = {}")
        run = start("train", "--resume", out)
        follow(page, run, out, known, heaps, steps + 1)
        page.wait_for_timeout(4000)
        second = {int(step): at for step, at in page.evaluate("window.shownSteps").items()}
        late += delays({step: at for step, at in known.items() if step > last}, second)
        print(f"{len(late)} steps, killed after step {last}, resumed: ", end="")
        print(f"shown after {statistics.median(late):.2f} s, at most {max(late):.2f} s")
        print(f"page says {page.locator('#tile-progress').inner_text()!r}; errors and outside requests: {wrong}")
        print("heap (MB): " + " ".join(f"{size / 1e6:.1f}" for size in heaps[:: max(1, len(heaps) // 12)]), flush=True)


def memory(browser: Any, home: Path, steps: int, port: int) -> None:
    """JavaScript's heap while a page follows a run whose steps are made up, up to 50 a second."""
    run = WrittenRun(home / "made-up", steps=steps)
    run.step()
    heaps = []
    with watched(browser, home / "made-up", port) as (page, wrong):
        for step in range(2, steps + 1):
            run.step()
            page.wait_for_timeout(20)
            if step % max(1, steps // 20) == 0:
                heaps.append(heap(page))
        elements = page.evaluate("document.querySelectorAll('*').length")
    print(f"{steps:,} made-up steps: {elements} elements; errors and outside requests: {wrong}; ", end="")
    print("heap (MB): " + " ".join(f"{size / 1e6:.1f}" for size in heaps), flush=True)


def looks(home: Path, steps: int) -> None:
    """Processor time of a look at a run of so many steps, to which one was added, and of finding what changed on the page."""
    run = WrittenRun(home / f"looks-{steps}", steps=2 * steps)
    for _ in range(steps):
        run.step()
    following, costs = Following([home / f"looks-{steps}"]), []
    following.look()
    following.poll()
    shown = document(following.runs)
    for _ in range(40):
        run.step()
        started = time.process_time()
        following.poll()
        now = document(following.runs)
        patches(shown, now)
        costs.append(time.process_time() - started)
        shown = now
    print(f"a look at {steps:,} steps: {1000 * statistics.median(costs):.0f} ms of a processor", flush=True)


def cost(browser: Any, home: Path, steps: int, port: int) -> None:
    """Runs in which the server and the browser are stopped (SIGSTOP) and go on in turn, every `WINDOW` steps: each window has its
    neighbours to be compared with, so that slow changes of the run and of the machine cancel."""
    for kind in ("server and page", "server", "nothing"):
        out = home / kind.replace(" ", "-")
        with watched(browser, out, port) as (page, _):
            if kind == "server":
                page.close()
                reader = subprocess.Popen(["curl", "-sN", f"http://127.0.0.1:{port}/{TOKEN}/follow"], stdout=subprocess.DEVNULL)
            stopped = followers(kind)
            run = train(out, steps, ["training.eval_every=100000", "training.checkpoint_every=100000", *ALIKE], "default")
            try:
                turns = alternate(run, out, stopped)
            finally:
                run.kill()
                if kind == "server":
                    reader.kill()
                    reader.wait()
            if run.wait():
                raise SystemExit(f"the run beside {kind} has failed: {out}")
        ratios = compared(open_run(out), turns)
        # Of windows with variance v each ratio has 3/2 v, and their mean, in which each window comes with weight 2, 4 v / n.
        error = statistics.stdev(ratios) * (8 / 3 / len(ratios)) ** 0.5
        ratio = math.exp(statistics.fmean(ratios))
        print(
            f"step time with and without {kind}: {ratio:.3f}, standard error {ratio * error:.3f} ({len(ratios)} comparisons)",
            flush=True,
        )


def followers(kind: str) -> list[psutil.Process]:
    """The processes of a follower, which are this one's children."""
    children = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    servers = [child for child in children if "watch" in child.cmdline()]
    return {"server": servers, "nothing": [], "server and page": servers + [c for c in children if "chrom" in c.name()]}[kind]


def alternate(run: "subprocess.Popen[bytes]", out: Path, stopped: Sequence[psutil.Process]) -> list[tuple[int, bool]]:
    """Stop and continue the processes in turn; returns after which steps, and whether they went on."""
    turns = [(0, True)]
    try:
        while run.poll() is None:
            (last, going), now = turns[-1], last_step(out / "metrics.jsonl")
            if now >= last + WINDOW:
                turns.append((now, not going))
                signal_all(stopped, signal.SIGSTOP if going else signal.SIGCONT)
            time.sleep(0.1)
    finally:
        signal_all(stopped, signal.SIGCONT)
    return turns


def signal_all(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def last_step(metrics: Path) -> int:
    """The last in a file, of which only the end is read: this runs beside what is measured."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 10_000))
        found = re.findall(rb'^\{"step": (\d+), .*\}$', file.read(), re.MULTILINE)
    return int(found[-1]) if found else 0


def compared(run: Run, turns: Sequence[tuple[int, bool]]) -> list[float]:
    """Of each window the logarithm of how much longer a step takes where it is followed, against the windows beside it."""
    steps, seconds = run.column("seconds/rollouts")[0], run.column("seconds/rollouts")[1] + run.column("seconds/learner")[1]
    means = []
    for (first, going), (last, _) in pairwise(turns):
        counting = (steps > first + CATCHING_UP) & (steps <= last)
        means.append((going, math.log(seconds[counting].mean())))
    found = []
    for (_, before), (going, here), (_, after) in zip(means[1:], means[2:], means[3:], strict=False):  # the first warms up
        longer = here - (before + after) / 2
        found.append(longer if going else -longer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="that are followed; 0: none")
    parser.add_argument("--cost-steps", type=int, default=300, help="of each of three runs; 0: the cost is not measured")
    parser.add_argument("--made-up-steps", type=int, default=10_000, help="of a run that is made up; 0: none")
    parser.add_argument("--look-steps", default="600,5000,50000", help="lengths of runs that are looked at; empty: none")
    parser.add_argument("--port", type=int, default=8437)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for steps in filter(None, asked.look_steps.split(",")):
            looks(Path(folder), int(steps))
        if asked.steps:
            followed(browser, Path(folder), asked.steps, asked.port)
        if asked.made_up_steps:
            memory(browser, Path(folder), asked.made_up_steps, asked.port)
        if asked.cost_steps:
            cost(browser, Path(folder), asked.cost_steps, asked.port)


if __name__ == "__main__":
    main()
