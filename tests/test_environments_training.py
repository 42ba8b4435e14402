"""Conversations in training: rows of several turns are exact, runs repeat and resume bit for bit, and the shipped tasks learn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import groupwise as gw
from groupwise.algorithms import NAMED, soft_overlong_penalty
from groupwise.config import EnvironmentSection, Source
from groupwise.environments.find import find_environments
from groupwise.models import Chat, LanguageModel, load_module, load_tokenizer
from groupwise.rollouts.base import Sampling
from groupwise.rollouts.episodes import Episodes
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.jobs import KeptCompletions
from groupwise.rollouts.native import NativeSampler
from groupwise.tasks.tools import SearchTask
from groupwise.training.batching import make_batch
from groupwise.training.credit import CreditAssigner, reward_parts, step_positions, turn_positions
from groupwise.types import Completion, Group, LogprobBatch, Problem, Score, Turn, VersionSpan, upgrade
from tests.pages import data_of
from tests.test_cli import run
from tests.test_training import metrics_of, weights

SHORT = ["training.steps=2", "training.checkpoint_every=1", "training.eval_problems=6", "rollouts.prompts_per_step=4"]


def settings(*values: str) -> list[str]:
    return [item for value in (*SHORT, *values) for item in ("--set", value)]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return LanguageModel(load_module("tools-base"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tools-base")


@pytest.fixture(scope="module")
def searches(base: LanguageModel, tokenizer: Any) -> list[Group]:
    """Four groups of searches by the shipped base."""
    task, chat = SearchTask(), Chat.build(tokenizer)
    environments = find_environments(EnvironmentSection(), task, Source(Path("recipe.toml"), ""))
    assert environments is not None
    rollouts = Rollouts(
        sampler=NativeSampler(base, tokenizer),
        task=task,
        chat=chat,
        sampling=Sampling(max_tokens=200),
        episodes=Episodes(environments, EnvironmentSection(), chat),
    )
    return rollouts.groups([task.problem(i, 0) for i in range(4)], 4, seed=3)[0]


def test_learner_and_sampler_agree_on_rows_of_several_turns(base: LanguageModel, searches: list[Group]) -> None:
    batch = make_batch(searches, gw.named("gspo_token", advantage="turns"))
    assert batch.mask_BT.sum() < batch.lengths_B.sum()
    with torch.no_grad():
        for shared in (False, True):
            logprobs_BT, _ = base.completion_logprobs(batch, share_prompts=shared)
            gap_BT = (logprobs_BT - batch.rollout_logprobs_BT)[batch.mask_BT].abs()
            assert gap_BT.max() < 1e-5 and gap_BT.mean() < 1e-6


def test_continued_turns_run_only_their_own_tokens(base: LanguageModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    take = KeptCompletions.take

    def spy(self: KeptCompletions, request: Any) -> Any:
        kept = take(self, request)
        if request.continues is not None:
            found.append((len(request.prompt), len(kept.prefix) if kept is not None else 0))
        return kept

    monkeypatch.setattr(KeptCompletions, "take", spy)
    task, chat = SearchTask(), Chat.build(tokenizer)
    environments = find_environments(EnvironmentSection(), task, Source(Path("recipe.toml"), ""))
    assert environments is not None
    episodes = Episodes(environments, EnvironmentSection(), chat)
    sampler = NativeSampler(base, tokenizer)
    rollouts = Rollouts(sampler=sampler, task=task, chat=chat, sampling=Sampling(max_tokens=200), episodes=episodes)
    rollouts.groups([task.problem(i, 0) for i in range(4)], 4, seed=3)
    assert len(found) > 20
    # What the tool said, its frame, and the token that ended the turn before; never an earlier turn.
    assert all(0 < prompt - kept < 40 for prompt, kept in found)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_no_gradient_through_tokens_of_others(searches: list[Group], name: str) -> None:
    """Exactly none, and log-probabilities there change nothing."""
    algorithm = gw.named(name)
    batch = make_batch(searches, algorithm)
    mask_BT, ids_B = batch.mask_BT, batch.group_ids_B
    old_BT = -torch.rand(mask_BT.shape)
    logprobs_BT = (old_BT + 0.1 * torch.randn(mask_BT.shape)).requires_grad_()
    advantages_B = torch.randn(len(batch))
    weights_BT = algorithm.aggregation(mask_BT, group_ids_B=ids_B, max_length=200)

    def loss_of(values_BT: torch.Tensor, old_BT: torch.Tensor) -> torch.Tensor:
        others: dict[str, Any] = {"ref_logprobs_BT": old_BT if algorithm.beta else None, "rollout_logprobs_BT": old_BT}
        return gw.policy_loss(algorithm, values_BT, old_BT, advantages_B, mask_BT, weights_BT=weights_BT, **others)[0]

    loss = loss_of(logprobs_BT, old_BT)
    loss.backward()
    assert logprobs_BT.grad is not None
    assert (logprobs_BT.grad[~mask_BT] == 0).all()
    assert logprobs_BT.grad[mask_BT].abs().sum() > 0
    noise_BT = torch.where(mask_BT, 0, 5 * torch.randn(mask_BT.shape))
    assert torch.equal(loss_of(logprobs_BT + noise_BT, old_BT - noise_BT), loss)


def test_ratios_of_sequences_leave_others_tokens_out(searches: list[Group]) -> None:
    batch = make_batch(searches, gw.named("gspo"))
    old_BT, logprobs_BT = -torch.rand(2, *batch.mask_BT.shape)
    ratio_BT = gw.sequence_log_ratio(logprobs_BT, old_BT, batch.mask_BT)
    for row, mask in enumerate(batch.mask_BT):
        alone = gw.sequence_log_ratio(logprobs_BT[row, mask][None], old_BT[row, mask][None], torch.ones(1, int(mask.sum())) > 0)
        assert torch.allclose(ratio_BT[row, mask], alone[0])
    weights_BT = gw.token_weights(batch.mask_BT, "constant", max_length=200)
    assert torch.allclose(weights_BT, batch.mask_BT.to(weights_BT) / (len(batch) * 200))


def conversation(lead: int = 0) -> Group:
    """One completion "ab", "XY" of a tool, "cd" in single-character tokens, after `lead` tokens that are only its own."""
    spans = [("assistant", 2), ("tool", 2), ("assistant", 2)]
    turns, start = [Turn(role="user", start=0, end=lead)] if lead else [], lead
    for role, length in spans:
        turns.append(
            Turn(role=role, start=start, end=start + length, reward=0.25 if role == "assistant" and start == lead else None)
        )
        start += length
    mask = torch.tensor([False] * lead + [role == "assistant" for role, length in spans for _ in range(length)])
    completion = Completion(
        text="?" * lead + "abXYcd",
        tokens=torch.arange(2, 2 + start),
        logprobs=torch.zeros(start),
        mask=mask,
        stop="stop",
        versions=(VersionSpan(0, start, 0),),
        turns=tuple(turns),
    )
    score = Score(reward=1.25, steps=((lead + 2, 1.0), (lead + 6, 0.0)))
    return Group(problem=Problem(id="p", prompt="p"), prompt_tokens=torch.tensor([1]), completions=(completion,), scores=(score,))


class Characters:
    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "x" * len(tokens)


def test_positions_of_steps_and_turns() -> None:
    assert step_positions([conversation()], Characters()) == [([1.0, 0.0], [1, 5])]
    assert step_positions([conversation(lead=3)], Characters()) == [([1.0, 0.0], [4, 8])]
    rewards = torch.tensor([1.25])
    assert turn_positions([conversation()], rewards) == [([0.25, 1.0], [1, 5])]
    assert turn_positions([conversation(lead=3)], rewards) == [([0.25, 1.0], [4, 8])]


def test_overlong_penalty_leaves_the_prompt_out() -> None:
    algorithm = gw.named("dapo", overlong_cache=0.5, dynamic_sampling=False)
    for lead in (0, 3):
        parts = reward_parts([conversation(lead)], algorithm, 8)
        assert torch.equal(parts["overlong"], soft_overlong_penalty(torch.tensor([6]), 8, 4))


def test_credit_reaches_the_turns(searches: list[Group]) -> None:
    algorithm = gw.named("gspo_token", advantage="turns")
    batch = make_batch(searches, algorithm)
    assigner = CreditAssigner(algorithm, None, 200)
    rewards = reward_parts(searches, algorithm, 200)
    with_logprobs = upgrade(LogprobBatch, batch, old_logprobs_BT=batch.rollout_logprobs_BT)
    training, _ = assigner.assign(with_logprobs, searches, rewards, policy_moved=False)
    completions = [completion for group in searches for completion in group.completions]
    for row, completion in enumerate(completions):
        for turn in completion.said:
            assert len(set(training.advantages_BT[row, turn.start : turn.end].tolist())) == 1
    assert (training.advantages_BT[~batch.mask_BT] == 0).all()
    firsts = torch.tensor([training.advantages_BT[row, completion.said[0].start] for row, completion in enumerate(completions)])
    assert torch.allclose(firsts.view(4, 4).sum(1), torch.zeros(4), atol=1e-5)  # the first turns of a group are compared
    gained = [sum(turn.reward or 0.0 for turn in completion.said) for completion in completions]
    scores = [score for group in searches for score in group.scores]
    found = [score.components["outcome"] for score in scores]
    assert all(abs(sum_ - 1) < 1e-9 for sum_, right in zip(gained, found, strict=True) if right)
    assert [score.reward for score in scores] == pytest.approx([a + b for a, b in zip(gained, found, strict=True)])


@pytest.mark.parametrize("recipe", ["search", "calculator"])
def test_same_bits_also_across_a_resume(tmp_path: Path, recipe: str) -> None:
    for name in ("one", "two"):
        result = run("train", recipe, "--out", tmp_path / name, *settings())
        assert result.exit_code == 0, result.output
    one, cut = weights(tmp_path / "one"), tmp_path / "two"
    assert all(torch.equal(value, weights(cut)[key]) for key, value in one.items())
    shutil.rmtree(cut / "checkpoints" / "step-000002")
    shutil.rmtree(cut / "model")
    resumed = run("train", "--resume", cut)
    assert resumed.exit_code == 0, resumed.output
    assert all(torch.equal(value, weights(cut)[key]) for key, value in one.items())
    rollouts = [(tmp_path / name / "rollouts" / "step-000002.txt").read_text() for name in ("one", "two")]
    assert rollouts[0] == rollouts[1] and "[tool]" in rollouts[0] and "[assistant" in rollouts[0]

    rows = [row for row in metrics_of(cut) if "loss" in row]
    assert all(row["sampler_gap_mean"] < 1e-5 for row in rows)
    assert {"turns/mean", "turns/truncated", "tools/calls", "tools/errors", "tools/unread"} <= rows[0].keys()
    assert any("eval/tools/calls" in row for row in metrics_of(cut))
    table = pq.read_table(cut / "tokens" / "step-000001.parquet").to_pylist()
    assert {row["role"] for row in table} == {"assistant", "tool"}
    assert all(row["trained"] == (row["role"] == "assistant") for row in table)
    assert all((row["rollout_logprob"] is None) == (row["role"] == "tool") for row in table)
    turns = [row["turn"] for row in table if row["row"] == 0]
    assert turns == sorted(turns) and turns[0] == 0
    report = run("report", cut, "--out", tmp_path / "report.html")
    assert report.exit_code == 0, report.output
    assert "turns" in [figure["id"] for figure in data_of(tmp_path / "report.html")["figures"]]
    read = [step for step in data_of(tmp_path / "report.html", "reading") if step["source"] == "tokens"]
    completions = [completion for step in read for group in step["groups"] for completion in group["completions"]]
    assert {turn["role"] for completion in completions for turn in completion["turns"]} == {"assistant", "tool"}


GAME = '''
import asyncio
from typing import Any


class Game:
    """Say the secret word of the row."""

    def __init__(self):
        self.turn_reward = None

    def reset(self, word: str, **row: Any) -> str:
        self.word, self.asked = word, 0
        return " with care"

    def ask(self) -> str:
        """Ask for the word."""
        self.asked += 1
        self.turn_reward = 0.5
        return self.word

    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        return float(self.asked)


def shout(text: str) -> str:
    """Say it loudly.

    Args:
        text: What to say.
    """
    return text.upper()
'''


def test_a_class_and_a_tool_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "go {i}", "word": "{i}"}}\n' for i in range(20)))
    recipe = """
[model]
path = "tools-base"
[task]
name = "dataset"
path = "rows.jsonl"
reward = "game.py:unused"
[environment]
class = "game.py:Game"
tools = ["game.py:shout"]
max_turns = 3
[algorithm]
name = "grpo"
[rollouts]
group_size = 2
prompts_per_step = 2
max_tokens = 60
[learner]
minibatches = 1
[training]
steps = 1
eval_problems = 2
"""
    (tmp_path / "my.toml").write_text(recipe.replace('reward = "game.py:unused"\n', 'answer_key = "word"\n'))
    checked = run("check", tmp_path / "my.toml")
    assert checked.exit_code == 0, checked.output
    assert "shout(text: string), ask()" in checked.stdout
    result = run("train", tmp_path / "my.toml", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    resolved = (tmp_path / "run" / "recipe.toml").read_text()
    assert f'class = "{tmp_path}/game.py:Game"' in resolved and f'"{tmp_path}/game.py:shout"' in resolved
    assert run("eval", tmp_path / "run").exit_code == 0


class Ones:
    """An environment of the test's own."""

    def reset(self, **row: Any) -> None:
        self.asked = 0

    def ask(self) -> str:
        """Ask."""
        self.asked += 1
        return "1"

    def get_reward(self) -> float:
        return float(self.asked)


def test_python_objects(tmp_path: Path) -> None:
    changes = {
        "rollouts": {"group_size": 2, "prompts_per_step": 2, "max_tokens": 40},
        "training": {"steps": 1, "eval_problems": 2},
    }
    made = gw.train("calculator", out=tmp_path / "run", quiet=True, environment={"class": Ones, "max_turns": 2}, **changes)
    assert json.loads(made.path.joinpath("metrics.jsonl").read_text().splitlines()[0])["eval/turns/mean"] <= 2
    assert "class = " in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("environment.class=game.py:Gam", "there is no function 'Gam'; did you mean 'Game'?"),
        ("environment.class=Game", "environment.class"),
        ("environment.tools=['game.py:Game']", "Game is a class, and tools are functions"),
        ("environment.max_turns=0", "environment.max_turns"),
        ("environment.clas=game.py:Game", "unknown key; did you mean 'class'?"),
        ("model.chat=false", "chat template"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str) -> None:
    (tmp_path / "game.py").write_text(GAME)
    monkeypatch.chdir(tmp_path)
    result = run("check", "calculator", "--set", change)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_calculator_is_learnt(tmp_path: Path) -> None:
    result = run(
        "train", "calculator", "--out", tmp_path / "run", "--set", "training.steps=8", "--set", "training.eval_problems=100"
    )
    assert result.exit_code == 0, result.output
    rates = [row["eval/pass@1"] for row in metrics_of(tmp_path / "run") if "eval/pass@1" in row]
    calls = [row["eval/tools/calls"] for row in metrics_of(tmp_path / "run") if "eval/tools/calls" in row]
    assert rates[0] < 0.4 and rates[-1] > 0.7
    assert calls[0] < 0.5 and calls[-1] > 0.7
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")
