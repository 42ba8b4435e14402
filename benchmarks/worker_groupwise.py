"""groupwise at one work: for each line on standard input, one whole step; answers with a line of JSON."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from workloads import WORKS, Work, peak_mib, reward

from groupwise.algorithms import named
from groupwise.config import LearnerSection
from groupwise.learner.local import LocalLearner
from groupwise.models import Backend, LanguageModel, encode_prompt, load_tokenizer
from groupwise.models.loading import load_module
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.training.batching import make_batch
from groupwise.training.credit import CreditAssigner, reward_parts
from groupwise.types import Group, Problem, Score


class Step:
    """The loop's own parts: sample, score, batch, credit, update."""

    def __init__(
        self,
        work: Work,
        directory: Path,
        *,
        sampling: str | Backend = "auto",
        learning: str | Backend = "auto",
        old_logprobs: Literal["sampler", "recompute"] = "sampler",
    ) -> None:
        """`sampling`, `learning`: the backends of the sampler and of the learner, on the same module."""
        self.work = work
        device = "cuda" if torch.cuda.is_available() else "cpu"
        module = load_module(str(directory), getattr(torch, work.dtype)).to(device)
        self.model = LanguageModel(module, learning)
        self.tokenizer = load_tokenizer(str(directory))
        self.texts = json.loads((directory / "prompts.json").read_text())
        self.prompts = [encode_prompt(self.tokenizer, text, False) for text in self.texts]
        self.algorithm = named("dapo", overlong_cache=0.0)
        settings = LearnerSection(
            learning_rate=1e-6,
            minibatches=1,
            old_logprobs=old_logprobs,
            micro_batch_tokens=work.micro_batch_tokens,
            precision=work.precision,
        )
        self.learner = LocalLearner(
            self.model, self.algorithm, settings, updates=1000, temperature=1.0, max_tokens=work.max_tokens
        )
        self.credit = CreditAssigner(self.algorithm, self.tokenizer, work.max_tokens)
        dtype = None if work.precision == "float32" else getattr(torch, work.precision)
        self.sampler = NativeSampler(LanguageModel(module, sampling), self.tokenizer, dtype=dtype)
        self.count = 0

    def run(self) -> dict[str, float]:
        self.count += 1
        started = time.perf_counter()
        sampling = Sampling(max_tokens=self.work.max_tokens)
        answers = generate_all(self.sampler, requests(self.prompts, self.work.group_size, sampling, self.count))
        generated = time.perf_counter()
        groups = []
        for i, text in enumerate(self.texts):
            rewards = [reward(completion.tokens.tolist()) for completion in answers[i]]
            groups.append(
                Group(
                    problem=Problem(id=text, prompt=text),
                    prompt_tokens=self.prompts[i],
                    completions=answers[i],
                    scores=tuple(Score(reward=r, correct=r > 0) for r in rewards),
                )
            )
        batch, metrics = self.learner.compute_logprobs(make_batch(groups, self.algorithm))
        rewards = reward_parts(groups, self.algorithm, self.work.max_tokens)
        training, _ = self.credit.assign(batch, groups, rewards, policy_moved=True)
        self.learner.update(training)
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "generation": generated - started,
            "training": ended - generated,
            "tokens": int(batch.lengths_B.sum()),
            "peak_mib": peak_mib(),
            **{name: value for name, value in metrics.items() if name.startswith("sampler_gap")},
        }


def main() -> None:
    work = dataclasses.replace(WORKS["reasoning"], **json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    step = Step(work, Path(sys.argv[2]))
    for _ in sys.stdin:
        print(json.dumps(step.run()), flush=True)


if __name__ == "__main__":
    main()
