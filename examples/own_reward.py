"""A reward of your own on data of your own: short sums in a JSON-lines file, right answers rewarded, long ones less."""

import json
import tempfile
from pathlib import Path

import groupwise as gw


def reward(problem: gw.Problem, completions: list[str]) -> list[dict[str, float]]:
    """One mapping per completion: the reward is the sum, and each part is recorded by its name."""
    return [{"right": float(text.split("\n")[-1] == problem.answer), "short": -0.002 * len(text)} for text in completions]


if __name__ == "__main__":
    data = Path(tempfile.mkdtemp()) / "sums.jsonl"
    lines = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(1, 20) for b in range(1, 20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = gw.train(
        {
            "task": {"name": "dataset", "path": str(data), "reward": f"{__file__}:reward", "correct_above": 0.5},
            "rollouts": {"group_size": 8, "prompts_per_step": 16, "max_tokens": 16},
            "training": {"steps": 6, "eval_problems": 30, "eval_every": 6},
        }
    )
    print("reward of the first and the last step:", run.values("reward/mean")[0], run.values("reward/mean")[-1])
