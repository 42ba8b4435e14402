"""groupwise at one work: for each line on standard input, one whole step; answers with a line of JSON."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from workloads import WORKS, Work, peak_mib, reward

from groupwise.algorithms import named
from groupwise.learner.local import LocalLearner
from groupwise.models import Backend, LanguageModel, encode_prompt, load_tokenizer
from groupwise.models.loading import load_module
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.training.batching import make_batch
from groupwise.training.credit import CreditAssigner, reward_parts
from groupwise.types import Completion, Group, Problem, Score, TrainingBatch

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "minibatches": 1,
    "warmup_steps": 0,
    "schedule": "constant",
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "checkpointing": False,
    "share_prompts": True,
    "max_bad_updates": 5,
}
"""What a `LearnerSection` has; importing that needs pydantic, which the machines that gpu.sh is for do not have."""


class Step:
    """The loop's own parts: sample, score, batch, credit, update."""

    def __init__(
        self,
        work: Work,
        module: Any,
        tokenizer: Any,
        texts: list[str],
        *,
        sampling: str | Backend = "auto",
        learning: str | Backend = "auto",
        old_logprobs: str = "sampler",
    ) -> None:
        """`sampling`, `learning`: the backends of the sampler and of the learner, on the same module. With `old_logprobs`
        "recompute" the gap between the log-probabilities of the two is reported too."""
        self.work, self.module, self.tokenizer, self.texts = work, module, tokenizer, texts
        self.model = LanguageModel(module, learning)
        self.prompts = [encode_prompt(tokenizer, text, False) for text in texts]
        self.algorithm = named("dapo", overlong_cache=0.0)
        changed = {"micro_batch_tokens": work.micro_batch_tokens, "old_logprobs": old_logprobs, "precision": work.precision}
        settings = SimpleNamespace(**(SETTINGS | changed))
        self.learner = LocalLearner(
            self.model, self.algorithm, settings, updates=1000, temperature=1.0, max_tokens=work.max_tokens
        )
        self.credit = CreditAssigner(self.algorithm, tokenizer, work.max_tokens)
        dtype = None if work.precision == "float32" else getattr(torch, work.precision)
        cache_dtype = None if work.cache_dtype is None else getattr(torch, work.cache_dtype)
        self.sampler = NativeSampler(LanguageModel(module, sampling), tokenizer, dtype=dtype, cache_dtype=cache_dtype)
        self.count = 0
        self.gap: dict[str, float] = {}

    @classmethod
    def load(cls, work: Work, directory: Path, **settings: Any) -> "Step":
        """On what `workloads.make` wrote."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        module = load_module(str(directory), getattr(torch, work.dtype)).to(device)
        if work.lora_rank:
            from groupwise.models.adapters import add_adapters  # which earlier versions lack

            form = SimpleNamespace(rank=work.lora_rank, alpha=2.0 * work.lora_rank, targets=[])
            module = add_adapters(module, form, seed=0)
        texts = json.loads((directory / "prompts.json").read_text())
        return cls(work, module, load_tokenizer(str(directory)), texts, **settings)

    def sample(self) -> list[tuple[Completion, ...]]:
        self.count += 1
        sampling = Sampling(max_tokens=self.work.max_tokens)
        return generate_all(self.sampler, requests(self.prompts, self.work.group_size, sampling, self.count))

    def batch(self, answers: list[tuple[Completion, ...]]) -> TrainingBatch:
        """The completions of each prompt as rows with their advantages."""
        groups = []
        for text, prompt, completions in zip(self.texts, self.prompts, answers, strict=True):
            rewards = [reward(completion.tokens.tolist()) for completion in completions]
            groups.append(
                Group(
                    problem=Problem(id=text, prompt=text),
                    prompt_tokens=prompt,
                    completions=completions,
                    scores=tuple(Score(reward=r, correct=r > 0) for r in rewards),
                )
            )
        batch, metrics = self.learner.compute_logprobs(make_batch(groups, self.algorithm))
        self.gap = {name: value for name, value in metrics.items() if name.startswith("sampler_gap")}
        rewards = reward_parts(groups, self.algorithm, self.work.max_tokens)
        return self.credit.assign(batch, groups, rewards, policy_moved=True)[0]

    def paths(self) -> dict[str, Any]:
        """What runs generation and training, and the first fallback that slows either down, with its reason."""
        sampler, learner = self.sampler.model, self.model
        return {
            "generation": sampler.backends()["decoding"],
            "training": learner.backends()["training"],
            "fallback": sampler.fallback() or learner.fallback(),
            "details": {name: why for name, why in sampler.backends().items() if name.startswith("fallback")},
        }

    def run(self) -> dict[str, float]:
        started = time.perf_counter()
        answers = self.sample()
        generated = time.perf_counter()
        batch = self.batch(answers)
        self.learner.update(batch)
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "generation": generated - started,
            "training": ended - generated,
            "tokens": int(batch.lengths_B.sum()),
            "peak_mib": peak_mib(),
            **self.gap,
        }


def main() -> None:
    work = dataclasses.replace(WORKS["reasoning"], **json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    step = Step.load(work, Path(sys.argv[2]), sampling=work.backend, learning=work.backend)
    step.model.check_logits()
    paths = step.paths()
    print("READY", flush=True)
    for _ in sys.stdin:
        print(json.dumps({**step.run(), "paths": paths}), flush=True)


if __name__ == "__main__":
    main()
