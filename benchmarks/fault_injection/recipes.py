"""Six small recipes, under a second each in the fork server, that between them use everything a checkpoint holds."""

from pathlib import Path

COMMON = """seed = 3

[model]
path = "{model}"

[task]
{task}

[algorithm]
{algorithm}

[rollouts]
group_size = 4
prompts_per_step = {prompts}
max_tokens = {tokens}
{rollouts}

[learner]
learning_rate = 1e-3
schedule = "linear"
minibatches = 2

[training]
steps = 7
eval_every = 2
eval_problems = 6
checkpoint_every = {checkpoint_every}
keep_checkpoints = 2
tokens_every = 1
{more}
"""
ARITHMETIC = 'name = "arithmetic"\ngrades = [1, 2]\nproblems = 24'
DEFAULTS = {
    "model": "arithmetic-base",
    "task": ARITHMETIC,
    "prompts": "4",
    "tokens": "12",
    "rollouts": "",
    "checkpoint_every": "2",
    "more": "",
}
RECIPES = {
    "GRPO": {"algorithm": 'name = "grpo"', "checkpoint_every": "1"},
    "DAPO, surplus": {"algorithm": 'name = "dapo"', "rollouts": "max_age = 2"},
    "DCPO": {"algorithm": 'name = "dcpo"', "task": ARITHMETIC.replace("24", "6")},
    "PPO": {"algorithm": 'name = "ppo"', "more": "\n[critic]\nlearning_rate = 1e-3"},
    "LoRA": {"algorithm": 'name = "grpo"', "more": "\n[model.lora]\nrank = 4\nalpha = 8"},
    "tools": {
        "algorithm": 'name = "gspo_token"\nadvantage = "turns"',
        "model": "tools-base",
        "task": 'name = "calculator"',
        "prompts": "3",
        "tokens": "48",
    },
}
"""Name -> what differs from the others."""


def write_recipes(folder: Path) -> dict[str, Path]:
    """Write each recipe as a file; name -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name.split(',')[0].lower()}.toml" for name in RECIPES}
    for name, path in paths.items():
        path.write_text(COMMON.format(**{**DEFAULTS, **RECIPES[name]}))
    return paths
