"""Whole runs with code of the user's that misbehaves in the second step.

python -m tests.misbehaviour_runs       runs all of them, and prints how many held
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import groupwise
from tests.misbehaviour_matrix import MARK, left_after

RECIPE = """
extends = "quick"
[task]
{task}
[algorithm]
name = "grpo"
{algorithm}
[rollouts]
group_size = 4
prompts_per_step = 4
max_failed_groups = 3
{rollouts}
[learner]
minibatches = 1
[training]
steps = 2
eval_problems = 2
checkpoint_every = 1
"""
CODE = '''
import json, os, signal, sys, time
from pathlib import Path
import groupwise as gw
def later():
    """Whether the first step is over."""
    return Path("run/checkpoints/step-000001").is_dir()
def timed(completions, trainer_state, **kwargs):
    if trainer_state.global_step >= 1: ACT
    return [float(len(text)) for text in completions]
def surrogate(terms):
    if later(): ACT
    return -terms.log_ratio_BT.exp() * terms.advantages_BT, __import__("torch").zeros_like(terms.mask_BT)
def sampler(settings, model, tokenizer):
    from groupwise.rollouts.samplers import native
    found = native(settings, model, tokenizer)
    class Mine:
        def __getattr__(self, name): return getattr(found, name)
        def load(self, weights, version): found.load(weights, version)
        async def generate(self, request):
            if later(): ACT
            return await found.generate(request)
    return Mine()
class Task:
    def problem(self, position, seed):
        if later(): ACT
        return gw.Problem(id=str(position), prompt=f"{position % 9}+1=", answer="1")
    def held_out(self, count): return [self.problem(position, 0) for position in range(count)]
    def score(self, problem, completions):
        return [gw.Score(reward=float(len(c.text))) for c in completions]
'''
REWARD = {"task": 'name = "dataset"\npath = "data.jsonl"\nreward = "mine.py:timed"\nreward_timeout = 2.0'}
PART = {"algorithm": 'surrogate = "mine.py:surrogate"\nbounds = "none"'}
RUNS: dict[str, tuple[dict[str, str], str, int, str]] = {
    "a reward hangs": (REWARD, "time.sleep(600)", 1, "4 timeout; the first: mine.py:timed: no result within 2 s"),
    "a reward leaves": (REWARD, "sys.exit(0)", 1, "mine.py:timed: SystemExit: 0"),
    "a reward ends its process": (REWARD, "os._exit(0)", 1, "mine.py:timed: its process ended with exit code 0"),
    "a reward kills its parent": (REWARD, "os.kill(os.getppid(), 9); time.sleep(9)", 1, "4 died"),
    "a reward forks": (REWARD, "os.fork()", 0, ""),
    "a reward closes everything": (REWARD, "os.closerange(0, 99)", 1, "4 died"),
    "a part leaves": (PART, "sys.exit(0)", 1, "algorithm.surrogate = "),
    "a part interrupts": (PART, "raise KeyboardInterrupt", 1, "KeyboardInterrupt (mine.py, line"),
    "a part forks": (PART, "os.fork()", 0, ""),
    "a part changes the dtype": (PART, "import torch; torch.set_default_dtype(torch.float64)", 1, "torch's default dtype"),
    "a part closes the output": (PART, "os.close(1)", 1, "descriptor 1, which is standard output"),
    "a sampler leaves": ({"rollouts": 'sampler = "mine.py:sampler"'}, "sys.exit(0)", 1, "generate(): SystemExit: 0"),
    "a task leaves": ({"task": 'name = "mine.py:Task"'}, "sys.exit(0)", 1, "mine.py:Task: problem("),
}


def wrong_with(name: str, home: Path) -> str:
    """What is wrong with a run of that name; nothing if it held."""
    settings, act, code, message = RUNS[name]
    (home / "r.toml").write_text(RECIPE.format(**{"task": "", "algorithm": "", "rollouts": "", **settings}))
    (home / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)))
    (home / "mine.py").write_text(CODE.replace("ACT", act))
    command = [sys.executable, "-m", "groupwise", "train", "r.toml", "--out", "run"]
    environment = {**os.environ, MARK: name, "PYTHONPATH": str(Path(groupwise.__file__).parent.parent)}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240, check=False)
    said = done.stdout + done.stderr
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "reward/mean" in line]
    held = {
        f"exit code {code}": done.returncode == code,
        "the message": message in " ".join(said.split()),
        "no traceback": "Traceback" not in said,
        "each step once": steps == ([1, 2] if code == 0 else [1]),
        "a checkpoint": (home / "run" / "checkpoints" / "step-000001").is_dir(),
        "no process": not left_after(name),
    }
    missed = [what for what, good in held.items() if not good]
    return f"missing: {', '.join(missed)}: exit code {done.returncode}, steps {steps}: {said}" if missed else ""


def main() -> None:
    held = 0
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            wrong = wrong_with(name, Path(folder))
        held += not wrong
        print(f"{name}: {wrong or 'held'}", flush=True)
    print(f"held {held} of {len(RUNS)}")


if __name__ == "__main__":
    main()
