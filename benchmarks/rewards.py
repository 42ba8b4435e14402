"""What rewards cost a step: slow ones beside generation, and those that compute in worker processes.

    python benchmarks/rewards.py

Each row is one step's rollouts, 256 completions in 32 groups of 8, of a Llama of random weights (4 layers, width 256) whose
completions are up to 320 tokens long. The last completion's reward can only begin when it has been generated, so the least that a
step can take is generation and one reward.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from groupwise.config import Source
from groupwise.models import Chat, LanguageModel
from groupwise.models.loading import character_tokenizer, new_module
from groupwise.rollouts.base import Sampling
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.native import NativeSampler
from groupwise.tasks.base import build_task

CODE = """
import asyncio, time

def nothing(completions, **_):
    return [0.0] * len(completions)

async def judge(completions, **_):
    await asyncio.sleep(1.0)
    return [0.0] * len(completions)

async def judge_each(completions, **_):
    async def one(text):
        await asyncio.sleep(1.0)
        return 0.0
    return list(await asyncio.gather(*map(one, completions)))

def sleeper(completions, **_):
    time.sleep(1.0)
    return [0.0] * len(completions)

def computes(completions, **_):
    end = time.process_time() + 0.05 * len(completions)
    while time.process_time() < end:
        sum(range(1000))
    return [0.0] * len(completions)
"""


LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "code.py").write_text(CODE)
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+{j}=", "answer": "x"}}\n' for i in range(9) for j in range(9)))
    tokenizer = character_tokenizer("".join(map(chr, range(33, 273))))
    model = LanguageModel(new_module(LLAMA, tokenizer, seed=0))
    sampling = Sampling(max_tokens=options.tokens)
    sampler = NativeSampler(model, tokenizer)

    def rollouts(reward: str, workers: int) -> tuple[float, float, int]:
        """Seconds until everything is scored, those of generation alone, and tokens."""
        settings = {"name": "dataset", "path": str(folder / "data.jsonl"), "reward": f"{folder}/code.py:{reward}"}
        task = build_task({**settings, "reward_workers": workers}, Source(folder / "recipe.toml", ""))
        problems = [task.problem(i, 0) for i in range(32)]
        made = Rollouts(sampler=sampler, task=task, chat=Chat.build(tokenizer, False, "", {}), sampling=sampling)
        replace(made, sampling=Sampling(max_tokens=1)).groups(problems, 8, 0)  # all processes are started before the clock is
        started = time.perf_counter()
        groups, waited = made.groups(problems, 8, seed=1)
        seconds = time.perf_counter() - started
        assert all(score.failure is None for group in groups for score in group.scores)
        return seconds, seconds - waited, sum(len(c.tokens) for group in groups for c in group.completions)

    table: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    cases = [("nothing", 2), ("judge", 2), ("judge_each", 2), ("sleeper", 32), ("sleeper", 2), ("computes", 2)]
    rollouts("nothing", 2)
    for turn in range(options.turns):
        for case in cases if turn % 2 == 0 else cases[::-1]:
            table.setdefault(case, []).append(rollouts(*case))
            print(turn, *case, *(f"{value:.2f}" for value in table[case][-1]), flush=True)
    print(f"{sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for (reward, workers), found in table.items():
        total, generation = (statistics.median(one[i] for one in found) for i in (0, 1))
        tokens = found[0][2]
        speed = f"{tokens / generation:7,.0f} tok/s"
        print(f"{reward:<11} {workers:>2} workers: all {total:6.2f} s, generation {generation:6.2f} s ({speed})", flush=True)


if __name__ == "__main__":
    main()
