"""TRL's scripts beside their recipes: the same completions give TRL's rewards, advantages, loss and gradients.

The scripts run as they are in an environment with TRL 1.16 (`make .bench/trl/.ready`); only their sampling is replaced, by
completions that are written here.
"""

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from groupwise.algorithms import policy_loss
from groupwise.config import Recipe, load
from groupwise.models import new_module
from groupwise.rollouts.base import Request
from groupwise.training.batching import make_batch, minibatches
from groupwise.training.credit import CreditAssigner, reward_parts
from groupwise.training.setup import Ready, prepare
from groupwise.types import Batch, Completion, Group, TrainingBatch, VersionSpan

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "from_trl"
TRL = ROOT / ".bench" / "trl"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

HERE = (TRL / ".ready").exists()
pytestmark = pytest.mark.skipif(not HERE, reason="needs TRL in an environment of its own: make .bench/trl/.ready")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with its family's chat template, as TRL's wheel holds it, and the scripts' data."""
    home = tmp_path_factory.mktemp("trl")
    tokenizer = tokenizer_of(next(TRL.glob("lib/python3*/site-packages/trl/chat_templates/qwen3.jinja")).read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    settings = {"model_type": "qwen3", "num_key_value_heads": 2, "max_position_embeddings": 2048, **sizes}
    new_module(settings, tokenizer, seed=3).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    write(home / "single_turn.jsonl", [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in (1, 2)])
    chats = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Say {i}."}] for i in (1, 2)]
    write(home / "conversation.jsonl", [{"prompt": chat} for chat in chats])
    goods = [("apple", 40), ("onion", 30)]
    rows = [{"prompt": [{"role": "user", "content": f"Buy an {n}."}], "item": n, "price": price} for n, price in goods]
    write(home / "tools.jsonl", rows)
    write(home / "state.jsonl", rows)
    return home


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer_of(template: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["system user assistant tool name arguments function the price of an item coins"], trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found.chat_template = template
    return found


def turns(name: str, tokenizer: Any) -> list[list[list[int]]]:
    """For each of the 8 completions the token ids of its turns."""

    def said(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    def call(function: str, **arguments: Any) -> list[int]:
        return said("<tool_call>\n" + json.dumps({"name": function, "arguments": arguments}) + "\n</tool_call>")

    if name == "single_turn":
        return [[said(text)] for text in ("2", "so 2", "4 or 3", "", "4", "5 4", "4 5", "it is four")]
    if name == "conversation":
        return [[said(text)] for text in ("aaa", "bcd", "hello", "oh", "x", "eee", "a b", "zz")]
    rows = []
    for item in ("apple", "onion"):
        asked = call("look_up", item=item)
        rows += [
            [said("no")],
            [asked, said("ok")],
            [asked, call("discount", percent=10), said("done")],
            [call("look_up", item="pear"), call("steal"), said("sorry")],
        ]
    return rows


class Script:
    """A sampler that says what is written, to the groups of these questions."""

    def __init__(self, rows: list[list[list[int]]], questions: list[str], tokenizer: Any) -> None:
        self.tokenizer, self.questions = tokenizer, questions
        self.rows = [[list[int](), row] for row in rows]
        """What each row has read and said, and what it will say."""

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        await asyncio.sleep(0)
        prompt = request.prompt.tolist()
        if request.continues is None:
            group = next(i for i, text in enumerate(self.questions) if text in self.tokenizer.decode(prompt))
            chosen = list(range(group * request.n, (group + 1) * request.n))
        else:
            begun = [(i, so_far) for i, (so_far, left) in enumerate(self.rows) if so_far and left]
            chosen = [next(i for i, so_far in begun if so_far == prompt[: len(so_far)])]
        completions = []
        for i in chosen:
            ids = self.rows[i][1].pop(0)
            self.rows[i][0] = [*prompt, *ids]
            completions.append(self.completion(ids))
        return tuple(completions)

    def completion(self, ids: list[int]) -> Completion:
        return Completion(
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
            tokens=torch.tensor(ids),
            logprobs=torch.zeros(len(ids)),
            mask=torch.ones(len(ids), dtype=torch.bool),
            stop="stop",
            versions=(VersionSpan(0, len(ids), 0),),
            handle=1,
        )

    def load(self, weights: Any, version: int) -> None: ...


@dataclass
class Theirs:
    tensors: dict[str, Tensor]
    said: dict[str, Any]


def theirs(home: Path, name: str, rows: list[list[list[int]]]) -> Theirs:
    """What TRL makes of the completions in one step of its script."""
    (home / f"{name}.json").write_text(json.dumps(rows))
    arguments = [home / f"out-{name}", home / f"{name}.json", SCRIPTS / f"{name}_trl.py", home / "model", home / f"{name}.jsonl"]
    done = subprocess.run(
        [TRL / "bin" / "python", ROOT / "tests" / "trl_recorder.py", *arguments],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = home / f"out-{name}"
    return Theirs(load_file(str(out / "recorded.safetensors")), json.loads((out / "said.json").read_text()))


def ready(home: Path, name: str) -> Ready:
    overrides = [f'model.path="{home / "model"}"', f'task.path="{home / f"{name}.jsonl"}"', "task.held_out_share=0.01"]
    return prepare(*load(SCRIPTS / f"{name}.toml", Recipe, overrides))


def ours(made: Ready, problems: Sequence[Any], rows: list[list[list[int]]]) -> tuple[list[Group], TrainingBatch, Tensor, Any]:
    """The groups, the batch with its advantages, the loss, and the module with its gradients."""
    questions = [p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"] for p in problems]
    rollouts = made.rollouts(Script(rows, questions, made.tokenizer))
    groups, _ = rollouts.groups(problems, 4, seed=0)
    learner = made.make_learner()
    batch, _ = learner.compute_logprobs(make_batch(groups, made.algorithm))
    limit = made.recipe.rollouts.max_tokens
    credit = CreditAssigner(made.algorithm, made.tokenizer, limit)
    rewards = reward_parts(groups, made.algorithm, limit)
    training, _ = credit.assign(batch, groups, rewards, policy_moved=False)
    (minibatch,) = minibatches(training, 1, seed=0)
    logprobs_BT, _ = made.model.completion_logprobs(minibatch)
    weights_BT = made.algorithm.aggregation(minibatch.mask_BT, group_ids_B=minibatch.group_ids_B, max_length=limit)
    loss, _ = policy_loss(
        made.algorithm,
        logprobs_BT,
        minibatch.old_logprobs_BT,
        minibatch.advantages_BT,
        minibatch.mask_BT,
        weights_BT=weights_BT,
    )
    loss.backward()
    return groups, training, loss.detach(), made.model.module


def sequences(batch: Batch) -> list[tuple[list[int], list[int], list[bool]]]:
    """(prompt, completion, which of its tokens are trained on) of each row."""
    return [
        (
            batch.prompts[int(batch.group_ids_B[i])].tolist(),
            batch.tokens_BT[i, :length].tolist(),
            batch.mask_BT[i, :length].tolist(),
        )
        for i, length in enumerate(batch.lengths_B.tolist())
    ]


def their_sequences(recorded: dict[str, Tensor]) -> list[tuple[list[int], list[int], list[bool]]]:
    mask = recorded["completion_mask"] * recorded.get("tool_mask", torch.ones_like(recorded["completion_mask"]))
    found = []
    for i in range(len(mask)):
        prompt = recorded["prompt_ids"][i][recorded["prompt_mask"][i].bool()]
        inside = recorded["completion_mask"][i].bool()
        found.append((prompt.tolist(), recorded["completion_ids"][i][inside].tolist(), mask[i][inside].bool().tolist()))
    return found


@pytest.mark.parametrize("name", ["single_turn", "conversation", "tools", "state"])
def test_the_same_completions_give_trls_rewards_advantages_loss_and_gradients(home: Path, name: str) -> None:
    made = ready(home, name)
    problems = in_order(made, home / f"{name}.jsonl")
    groups, batch, loss, module = ours(made, problems, turns(name, made.tokenizer))
    peer = theirs(home, name, turns(name, made.tokenizer))
    recorded = peer.tensors
    # The same tokens, those of tools masked.
    assert sequences(batch) == their_sequences(recorded)
    if name in ("tools", "state"):
        assert any(not all(mask) for _, _, mask in sequences(batch))
        messages = [list(completion.messages) for group in groups for completion in group.completions]
        assert [[m["role"] for m in row] for row in messages] == [[m["role"] for m in row] for row in peer.said["completions"]]
        contents = [[m["content"] for m in row if m["role"] == "tool"] for row in messages]
        assert contents == [[m["content"] for m in row if m["role"] == "tool"] for row in peer.said["completions"]]
    # The same rewards and advantages.
    rewards = torch.tensor([score.reward for group in groups for score in group.scores])
    weights = torch.tensor(made.recipe.task.get("reward_weights", [1.0]))
    torch.testing.assert_close(rewards, (recorded["rewards"] * weights).nansum(1), atol=1e-6, rtol=1e-6)
    first_BT = batch.mask_BT & (batch.mask_BT.cumsum(1) == 1)
    torch.testing.assert_close(batch.advantages_BT[first_BT], recorded["advantages"], atol=1e-5, rtol=1e-5)
    # The same loss and gradients.
    assert float(loss) == pytest.approx(float(recorded["loss"]), abs=1e-6)
    gradients = {key.removeprefix("grad."): value for key, value in recorded.items() if key.startswith("grad.")}
    mine = dict(module.named_parameters())
    assert gradients.keys() == mine.keys() and len(gradients) > 20
    largest = max(float(value.abs().max()) for value in gradients.values())
    assert largest > 1e-3
    for key, value in gradients.items():
        torch.testing.assert_close(mine[key].grad, value, atol=1e-5 * largest, rtol=1e-4, msg=key)


def in_order(made: Ready, path: Path) -> list[Any]:
    """The task's problems in the order of the file, as TRL reads them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    known = {json.dumps(list(p.prompt) if not isinstance(p.prompt, str) else p.prompt): p for p in all_problems(made)}
    return [known[json.dumps(row["prompt"])] for row in rows]


def all_problems(made: Ready) -> list[Any]:
    return [*made.task.held_out(10), *(made.task.problem(i, 0) for i in range(10))]
