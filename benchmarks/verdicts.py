"""Are runs judged rightly? Twelve healthy ones and twelve with a fault made on purpose are trained, and their findings read.

    python benchmarks/verdicts.py --out runs/verdicts                          # about ten minutes on two cores
    python benchmarks/verdicts.py --out runs/verdicts --record tests/recorded_runs

What each may be called stood here before it was run, but for three titles that were added when rules were revised after the first
campaign: that there are too few held-out problems to tell, of the healthy "four steps with a KL penalty" and "noisy evaluations",
and that many completions were truncated at first, of "token limit too low". The problems, rewards or settings of some runs were
changed then too, where what was to be shown did not happen. `--record` keeps what the findings read of each, for the tests.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.config import dump
from groupwise.evidence.finding import Finding
from groupwise.evidence.findings import findings
from groupwise.evidence.runs import open_run

PARTS = Path(__file__).parent / "verdict_parts.py"
Settings = Mapping[str, Mapping[str, Any]]
QUICK: Settings = {
    "task": {"name": "arithmetic", "grades": [1, 2]},
    "algorithm": {"name": "grpo", "beta": 0.0},
    "rollouts": {"group_size": 8, "prompts_per_step": 16, "max_tokens": 32},
    "learner": {"learning_rate": 3e-4, "minibatches": 4},
    "training": {"steps": 20, "eval_every": 10, "eval_problems": 200, "tokens_every": 0},
}


def data(reward: str | Sequence[str], name: str = "sums", **more: Any) -> dict[str, Any]:
    return {"task": {"name": "dataset", "path": f"{name}.jsonl", "reward": reward, "grades": None, **more}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and what it may be called."""

    healthy: bool
    titles: tuple[str, ...]
    """Of a healthy run: one of these is to be found, and nothing unhealthy. Of an unhealthy one: one of these, not as healthy."""
    settings: Settings = field(default_factory=dict)


LEARNED = ("It learned",)
OPEN = "Too few held-out problems to tell whether it learned"
ALSO = {"four steps with a KL penalty": ("It did not learn", OPEN), "noisy evaluations": (OPEN,)}
"""What else these healthy runs may be called: they show little."""
HEALTHY: dict[str, Settings] = {
    "dapo": {"algorithm": {"name": "dapo", "beta": None}},
    "ppo with a critic": {"algorithm": {"name": "ppo", "beta": None}, "critic": {"learning_rate": 3e-4}},
    "calls a tool": {
        "model": {"path": "tools-base"},
        "task": {"name": "calculator", "grades": None},
        "algorithm": {"name": "gspo_token", "advantage": "turns", "beta": None},
        "rollouts": {"max_tokens": 96, "prompts_per_step": 12},
        "learner": {"minibatches": 2},
        "training": {"steps": 12, "eval_every": 6, "eval_problems": 100},
    },
    "four steps with a KL penalty": {"algorithm": {"beta": 0.04}, "training": {"steps": 4, "eval_every": 2}},
    "solves its problems": {
        "task": {"grades": [1]},
        "algorithm": {"name": "dapo", "beta": None},
        "training": {"steps": 40, "eval_every": 20},
    },
    "noisy evaluations": {"training": {"steps": 40, "eval_every": 1, "eval_problems": 25}},
    "answers of one token": {
        **data("exact", "digits"),
        "rollouts": {"max_tokens": 1},
        "training": {"steps": 30, "eval_every": 10},
    },
    "graded: a length": {**data("verdict_parts.py:ends_at_nine"), "algorithm": {"name": "dapo", "beta": None}},
    "graded: near the answer": {**data("verdict_parts.py:near", "chains"), "learner": {"learning_rate": 1e-4}},
    "graded: certain of the best": {**data("verdict_parts.py:sevens"), "training": {"steps": 40, "eval_every": 20}},
    "graded: varied": {**data("verdict_parts.py:varied"), "training": {"steps": 30, "eval_every": 10}},
    "graded: learns to be short": {**data("verdict_parts.py:short", "chains"), "rollouts": {"max_tokens": 6}},
}
UNHEALTHY: dict[str, tuple[tuple[str, ...], Settings]] = {
    "learning rate too high": (
        ("The updates are too large",),
        {"learner": {"learning_rate": 1e-2, "max_bad_updates": 1000}},
    ),
    "clip bounds too tight": (("Many tokens are clipped",), {"algorithm": {"clip_low": 1e-4, "clip_high": 1e-4}}),
    "token limit too low": (
        ("Many completions are truncated", "Many completions were truncated at first"),
        {"task": {"grades": [3, 4]}, "rollouts": {"max_tokens": 3}},
    ),
    "problems too hard": (("No completion was ever right", "Most groups have zero variance"), data("last_line", "products")),
    "brevity outweighs the answer": (
        ("It got worse", "Accuracy fell after its peak"),
        data(["last_line", "verdict_parts.py:brevity"], "chains", reward_weights=[1.0, 0.3]),
    ),
    "entropy bonus too high": (("Entropy rose",), {"algorithm": {"entropy_bonus": 1.0}}),
    "sampler keeps its weights": (
        ("Sampler and learner log-probabilities differ",),
        {"rollouts": {"sampler": "verdict_parts.py:stale"}},
    ),
    "graded: looks for a tag": (("Every completion gets the same reward",), data("verdict_parts.py:looks_for_a_tag")),
    "graded: noise": (("It did not learn",), data("verdict_parts.py:noise", "chains")),
    "graded: longer is better": (
        ("More and more completions are truncated",),
        {**data("verdict_parts.py:long"), "training": {"steps": 40, "eval_every": 20}},
    ),
    "graded: stuck at the easy part": (
        ("Entropy fell", "Most groups have zero variance"),
        {
            **data("verdict_parts.py:easy_part", "products"),
            "learner": {"learning_rate": 1e-3},
            "training": {"steps": 40, "eval_every": 20},
        },
    ),
    "graded: not a number": (
        ("Many completions could not be scored", "Warnings were noted while it ran"),
        data("verdict_parts.py:not_a_number", "chains"),
    ),
}
CASES = {
    name: Case(healthy=True, titles=LEARNED + ALSO.get(name, ()), settings=settings) for name, settings in HEALTHY.items()
} | {name: Case(healthy=False, titles=titles, settings=settings) for name, (titles, settings) in UNHEALTHY.items()}


def recipe(case: Case) -> dict[str, dict[str, Any]]:
    """The quick recipe, changed; None takes a key out."""
    tables = {name: {**QUICK.get(name, {}), **case.settings.get(name, {})} for name in dict.fromkeys([*QUICK, *case.settings])}
    return {name: {key: value for key, value in table.items() if value is not None} for name, table in tables.items()}


def problems() -> dict[str, list[tuple[str, int]]]:
    """The data of each name: prompts and answers."""
    few = range(1, 20)
    return {
        "sums": [(f"{a}+{b}=", a + b) for a in few for b in few],
        "digits": [(f"{a}-{b}=", a - b) for a in few for b in few if 0 <= a - b <= 9],
        "chains": [(f"{a}+{b}-{c}+{a}=", 2 * a + b - c) for a in few for b in few for c in few],
        "products": [(f"{a}*{b}=", a * b) for a in range(101, 999, 37) for b in range(103, 999, 41)],
    }


def train(name: str, case: Case, out: Path, seed: int) -> float:
    """Train a run; returns its seconds."""
    home = out / name.replace(" ", "-").replace(":", "")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    shutil.copy(PARTS, home)
    for table, rows in problems().items():
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
        (home / f"{table}.jsonl").write_text("\n".join(lines) + "\n")
    (home / "recipe.toml").write_text(dump({"seed": seed, **recipe(case)}))
    began = time.perf_counter()
    with (home / "log").open("w") as log:
        command = [sys.executable, "-m", "groupwise", "train", str(home / "recipe.toml"), "--out", str(home / "run")]
        subprocess.run(command, stdout=log, stderr=log, check=False)
    return time.perf_counter() - began


def right(case: Case, found: Sequence[Finding]) -> bool:
    """Whether a run is called what it is."""
    named = any(item.title.en in case.titles and (case.healthy or item.kind != "healthy") for item in found)
    return named and not (case.healthy and any(item.kind == "unhealthy" for item in found))


def record(name: str, case: Case, run: Path, directory: Path) -> int:
    """Keep what findings read of a run, numbers with four digits; returns the file's bytes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {
        "name": name,
        "healthy": case.healthy,
        "titles": case.titles,
        "recipe.toml": (run / "recipe.toml").read_text(),
        "metrics.jsonl": "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in lines),
        "events.jsonl": (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else "",
    }
    path = directory / f"{run.parent.name}.json.gz"
    text = json.dumps(kept).replace(f"{run.parent.resolve()}/", "")  # where it was trained is nobody's business
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path.stat().st_size


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", action="store_true", help="Read runs that are there already.")
    parser.add_argument("--record", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    good, size = 0, 0
    for name in arguments.only:
        case = CASES[name]
        run = arguments.out / name.replace(" ", "-").replace(":", "") / "run"
        seconds = 0.0 if arguments.judge else train(name, case, arguments.out, arguments.seed)
        found = findings(open_run(run))
        good += right(case, found)
        print(
            f"{'ok   ' if right(case, found) else 'WRONG'} {'healthy' if case.healthy else 'unhealthy'}  {name} ({seconds:.0f} s)"
        )
        for item in found:
            print(f"        {item.kind}: {item.title.en}: {item.text.en}", flush=True)
        if arguments.record:
            arguments.record.mkdir(parents=True, exist_ok=True)
            size += record(name, case, run, arguments.record)
    print(f"{good} of {len(arguments.only)} are judged rightly" + (f"; {size:,} bytes recorded" if arguments.record else ""))


if __name__ == "__main__":
    main()
