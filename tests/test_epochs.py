"""Epochs over a rollout batch (GRPO's mu): more updates from the same rollouts, as a loop written out would take them."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.config import Recipe, load
from groupwise.models import load_tokenizer
from groupwise.seeding import derive
from groupwise.training.batching import make_batch, minibatches
from groupwise.training.loop import Trainer
from groupwise.training.records import RunDirectory
from groupwise.training.setup import prepare
from groupwise.types import Group
from tests.test_cli import run
from tests.test_training import assigned, make_group, metrics_of, with_logprobs

EPOCHS, MINIBATCHES, STEPS, RATE = 3, 2, 2, 3e-4
RECIPE = f"""
[algorithm]
name = "grpo"
beta = 0.0
[task]
name = "arithmetic"
grades = [1, 2]
[rollouts]
epochs = {EPOCHS}
prompts_per_step = 9
group_size = 6
max_tokens = 12
[learner]
minibatches = {MINIBATCHES}
learning_rate = {RATE}
schedule = "linear"
[training]
steps = {STEPS}
eval_problems = 4
tokens_every = 1
"""


def row_logprobs(module: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    logits = module(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(tokens)), tokens]


def plain_step(module: Any, adam: Any, groups: list[Group], step: int) -> int:
    """GRPO, row by row: `EPOCHS` passes, ratios against the policy before the first update. Returns how many updates it took."""
    with torch.no_grad():
        old = [[row_logprobs(module, group.prompt_tokens, row.tokens) for row in group.completions] for group in groups]
    shuffler, done = random.Random(derive(0, "minibatches", step)), 0
    for _ in range(EPOCHS):
        order = list(range(len(groups)))
        shuffler.shuffle(order)
        half = len(order) // 2
        for part in (order[:half], order[half:]):
            assert any(groups[g].outcome == "mixed" for g in part), "a minibatch without gradient shows nothing"
            losses = []
            for g in part:
                rewards = torch.tensor([score.reward for score in groups[g].scores])
                spread = rewards.std() + 1e-6
                for row, completion in enumerate(groups[g].completions):
                    advantage = (rewards[row] - rewards.mean()) / spread
                    ratio = (row_logprobs(module, groups[g].prompt_tokens, completion.tokens) - old[g][row]).exp()
                    losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())
            adam.param_groups[0]["lr"] = RATE * (1 - ((step - 1) * EPOCHS * MINIBATCHES + done) / (STEPS * EPOCHS * MINIBATCHES))
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            adam.step()
            done += 1
    return done


def test_the_weights_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Two steps of three epochs of two updates: order, old log-probabilities and the learning rate's schedule."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe, source = load(tmp_path / "recipe.toml", Recipe)
    directory = RunDirectory(tmp_path / "run", load_tokenizer(recipe.model.path))
    directory.create({})
    trainer = Trainer(prepare(recipe, source), directory)
    module = copy.deepcopy(trainer.learner.weights().module)
    start = copy.deepcopy(module.state_dict())
    adam = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    collect, seen = trainer.collector.collect, list[Any]()
    trainer.collector.collect = lambda step: seen.append(collect(step)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    for step in range(1, STEPS + 1):
        trainer.train_step()
        assert plain_step(module, adam, seen[-1].groups, step) == EPOCHS * MINIBATCHES
        assert trainer.learner.version == step * EPOCHS * MINIBATCHES
        ours, plain = trainer.learner.weights().module.state_dict(), module.state_dict()
        moved = sum(float((plain[name] - start[name]).square().sum()) for name in plain) ** 0.5
        apart = sum(float((plain[name] - ours[name]).square().sum()) for name in plain) ** 0.5
        assert apart < 1e-3 * moved


def test_each_epoch_has_every_group_once_in_an_order_of_its_own() -> None:
    groups = [make_group([1, 0], [2, 3], [False, False], prompt=f"{i}+1=") for i in range(8)]
    batch = assigned(groups, named("grpo"), with_logprobs(make_batch(groups, named("grpo"))))
    parts = [tuple(part.rows_B.tolist()) for part in minibatches(batch, 4, seed=0, epochs=3)]
    assert len(parts) == 12
    epochs = [parts[i : i + 4] for i in (0, 4, 8)]
    assert all(sorted(row for part in epoch for row in part) == list(range(16)) for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    assert epochs[0] == [tuple(part.rows_B.tolist()) for part in minibatches(batch, 4, seed=0)]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dapo"])
def test_a_run_of_two_steps(tmp_path: Path, algorithm: str) -> None:
    """Metrics are over all updates: twice the tokens are measured, and the second epoch is off-policy."""

    def trained(epochs: int) -> list[dict[str, Any]]:
        out = tmp_path / str(epochs)
        more = [f"algorithm.name={algorithm}", f"rollouts.epochs={epochs}", "learner.minibatches=1", "training.steps=2"]
        more += ["training.eval_problems=4", "learner.schedule=linear"]
        result = run("train", "quick", "--out", out, *(part for item in more for part in ("--set", item)))
        assert result.exit_code == 0, result.output
        return [row for row in metrics_of(out) if "loss" in row]

    once, twice = trained(1), trained(2)
    assert twice[0]["tokens/measured"] == 2 * once[0]["tokens/measured"]
    assert twice[0]["ratio_max"] > 1.001 > once[0]["ratio_max"] - 1e-4
    # The rate of the last update of each step: of updates 0 to 3 the second and the fourth, and of 0 and 1 each.
    assert [row["learning_rate"] for row in twice] == pytest.approx([3e-4 * 3 / 4, 3e-4 * 1 / 4])
    assert [row["learning_rate"] for row in once] == pytest.approx([3e-4, 3e-4 / 2])


def test_check_counts_the_updates(tmp_path: Path) -> None:
    result = run("check", "quick", "--set", "rollouts.epochs=3")
    assert result.exit_code == 0 and "12 updates" in result.stdout
