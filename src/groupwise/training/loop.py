"""The training loop."""

import math
import resource
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groupwise.algorithms import Algorithm, adaptive_coefficient, token_log_ratio
from groupwise.algorithms.diagnostics import effective_share, summarise
from groupwise.config import Recipe
from groupwise.errors import RunError, UserError
from groupwise.learner.base import Learner, TokenRecord
from groupwise.learner.critic import Critic
from groupwise.learner.local import LocalLearner
from groupwise.models import load_model
from groupwise.rollouts.base import Sampler
from groupwise.rollouts.native import NativeSampler
from groupwise.seeding import derive
from groupwise.training import checkpoints
from groupwise.training.batching import assign_credit, make_batch, minibatches, reward_parts
from groupwise.training.collect import Collected, Collector, sampling_of
from groupwise.training.display import Display
from groupwise.training.evaluate import Evaluation, evaluate
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready
from groupwise.types import Batch, Group, Metrics


class Interrupted(Exception):
    """The user asked the run to stop; its checkpoint is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with."""

    before: Evaluation
    after: Evaluation
    seconds: float


class Trainer:
    """A run: its parts, and the state that a checkpoint carries."""

    def __init__(self, ready: Ready, run: RunDirectory, display: Display) -> None:
        recipe, algorithm = ready.recipe, ready.algorithm
        self.ready, self.recipe, self.algorithm = ready, recipe, algorithm
        self.run_directory, self.display = run, display
        self.step = 0
        self.history: Mapping[str, Mapping[str, Any]] = {}
        self.kl_coefficient = algorithm.kl_reward
        self.learner: Learner = LocalLearner(
            ready.model,
            algorithm,
            recipe.learner,
            updates=recipe.training.steps * recipe.learner.minibatches,
            temperature=recipe.rollouts.temperature,
            max_tokens=recipe.rollouts.max_tokens,
            reference=load_reference(recipe, algorithm, ready.model),
            critic=load_critic(recipe, algorithm, ready.model),
        )
        dtype = getattr(torch, recipe.rollouts.dtype) if recipe.rollouts.dtype else None
        self.sampler: Sampler = NativeSampler(ready.model, ready.tokenizer, dtype)
        self.collector = Collector(self.sampler, ready.task, ready.tokenizer, recipe, algorithm)
        self.held_out = ready.task.held_out(recipe.training.eval_problems)

    def train(self) -> Result:
        """Every step that is left.

        Raises:
            Interrupted: Ctrl-C came; a checkpoint was written after the step under way.
            RunError: the run cannot go on.
        """
        started = time.monotonic()
        with interruptible() as interrupt:
            before = after = self.evaluate_base() if self.step else self.evaluate()
            if self.step and self.evaluation_is_due():
                after = self.evaluate()
            while self.step < self.recipe.training.steps:
                if interrupt.requested:
                    self.save()
                    raise Interrupted
                self.train_step()
                if self.step % self.recipe.training.checkpoint_every == 0 or self.step == self.recipe.training.steps:
                    self.save()
                if self.evaluation_is_due():
                    after = self.evaluate()
        self.save_model()
        return Result(before=before, after=after, seconds=time.monotonic() - started)

    def evaluation_is_due(self) -> bool:
        return self.step % self.recipe.training.eval_every == 0 or self.step == self.recipe.training.steps

    def tokens_are_due(self) -> bool:
        every = self.recipe.training.tokens_every
        return every > 0 and (self.step % every == 0 or self.step in (1, self.recipe.training.steps))

    def train_step(self) -> None:
        """Rollouts, advantages, updates: one step, recorded."""
        collected = self.collect()
        groups = collected.groups
        batch = make_batch(groups, self.algorithm)
        started = time.perf_counter()
        metrics: Metrics = {}
        records: list[TokenRecord] = []
        self.step += 1
        if batch.mask_BT.any():
            batch, annotated = self.learner.annotate(batch)
            metrics |= {**annotated, "seconds/annotate": time.perf_counter() - started, **self.adapt_kl(batch)}
            batch = self.assign_credit(batch, collected)
            seed = derive(self.recipe.seed, "minibatches", self.step)
            parts = minibatches(batch, self.recipe.learner.minibatches, seed)
            record = records.append if self.tokens_are_due() else None
            metrics |= averaged([self.learner.update(minibatch, record) for minibatch in parts])
            if "entropy" not in metrics and "entropy_updated" in metrics:  # nothing was recomputed before the updates
                metrics["entropy"] = metrics["entropy_updated"]
            self.sampler.load(self.ready.model, self.learner.version)
        else:
            self.display.note(f"step {self.step}: every completion was truncated and filtered; nothing to learn from")
        seconds = time.perf_counter() - started
        metrics |= {
            **rollout_metrics(collected),
            **reward_metrics(groups, self.algorithm, self.recipe.rollouts.max_tokens),
            **advantage_metrics(batch),
            "seconds/rollouts": collected.seconds,
            "seconds/scoring": collected.scoring_seconds,
            "seconds/learner": seconds,
            "memory/peak_mib": peak_mib(),
            "tokens_per_second": int(batch.lengths_B.sum()) / (collected.seconds + seconds),
        }
        self.run_directory.write_metrics(self.step, metrics)
        self.run_directory.write_rollouts(self.step, groups)
        if records:
            self.run_directory.write_tokens(self.step, groups, batch, records, self.ready.tokenizer)
        self.display.update(self.step, metrics)

    def assign_credit(self, batch: Batch, collected: Collected) -> Batch:
        """The batch with its advantages; what the algorithm remembers of each prompt moves on, dropped groups included."""
        settings: dict[str, Any] = {
            "max_tokens": self.recipe.rollouts.max_tokens,
            "kl_coefficient": self.kl_coefficient,
        }
        tokenizer = self.ready.tokenizer
        batch, credit = assign_credit(batch, collected.groups, self.algorithm, tokenizer, history=self.history, **settings)
        if "history" in self.algorithm.needs and collected.dropped:
            dropped = make_batch(collected.dropped, self.algorithm)
            settings["kl_coefficient"] = 0.0  # dropped groups are not run through the learner
            _, credit = assign_credit(dropped, collected.dropped, self.algorithm, tokenizer, history=credit.history, **settings)
        self.history = credit.history
        return batch

    def adapt_kl(self, batch: Batch) -> dict[str, float]:
        """The KL to the reference that the reward is charged for; where there is a target for it, the charge follows."""
        if not self.algorithm.kl_reward or batch.old_logprobs_BT is None or batch.ref_logprobs_BT is None:
            return {}
        kl = float(token_log_ratio(batch.old_logprobs_BT, batch.ref_logprobs_BT, batch.mask_BT)[batch.mask_BT].mean())
        if self.algorithm.kl_target is not None and self.step > 0:
            self.kl_coefficient = adaptive_coefficient(self.kl_coefficient, kl, self.algorithm.kl_target)
        return {"kl_reward/kl": kl, "kl_reward/coefficient": self.kl_coefficient}

    def collect(self) -> Collected:
        """Groups for the next step. A failure here leaves the weights of the last step whole, so they are saved."""
        position = self.collector.state_dict()
        try:
            collected = self.collector.collect(self.step)
            if not collected.groups:
                raise RunError(
                    f"step {self.step + 1}: dynamic sampling found {collected.describe()}. "
                    "Easier or harder problems, or a larger group_size, would give it something to learn from."
                )
        except (UserError, RunError):
            self.collector.load_state_dict(position)
            self.save()
            raise
        if not collected.full:
            self.display.note(f"step {self.step + 1}: dynamic sampling gave up with {collected.describe()}")
        return collected

    def evaluate(self) -> Evaluation:
        """Held-out results of the weights as they are, recorded."""
        recipe = self.recipe
        evaluation = evaluate(
            self.sampler,
            self.ready.task,
            self.ready.tokenizer,
            self.held_out,
            sampling_of(recipe),
            seed=derive(recipe.seed, "evaluation"),
            chat=recipe.model.chat,
        )
        self.run_directory.write_metrics(self.step, {**evaluation.metrics, "eval_problems": float(len(self.held_out))})
        self.display.update(self.step, evaluation.metrics)
        return evaluation

    def evaluate_base(self) -> Evaluation:
        """Held-out results of the weights that a resumed run began with."""
        recipe = self.recipe
        base = load_model(recipe.model.path, self.ready.model.dtype).to(self.ready.model.device)
        return evaluate(
            NativeSampler(base, self.ready.tokenizer),
            self.ready.task,
            self.ready.tokenizer,
            self.held_out,
            sampling_of(recipe),
            seed=derive(recipe.seed, "evaluation"),
            chat=recipe.model.chat,
        )

    def save(self) -> Path:
        state = {
            "step": self.step,
            "collector": self.collector.state_dict(),
            "learner": self.learner.state_dict(),
            "history": self.history,
            "kl_coefficient": self.kl_coefficient,
        }
        keep = self.recipe.training.keep_checkpoints
        return checkpoints.save(self.run_directory.checkpoints, self.step, self.ready.model, state, keep)

    def resume(self, checkpoint: Path) -> None:
        """Take up a run where a checkpoint left it."""
        state = checkpoints.load(checkpoint, self.ready.model)
        self.step = self.display.start = self.display.step = state["step"]
        self.collector.load_state_dict(state["collector"])
        self.learner.load_state_dict(state["learner"])
        self.history, self.kl_coefficient = state["history"], state["kl_coefficient"]
        self.sampler.load(self.ready.model, self.learner.version)
        self.run_directory.rewind(self.step)

    def save_model(self) -> None:
        """A Hugging Face model directory, tokenizer included."""
        self.ready.model.save_pretrained(self.run_directory.model)
        self.ready.tokenizer.save_pretrained(self.run_directory.model)


def load_reference(recipe: Recipe, algorithm: Algorithm, policy: Any) -> Any:
    """The frozen model that a KL term compares with, or None."""
    if not algorithm.needs_reference:
        return None
    return load_model(recipe.model.path, policy.dtype).to(policy.device).requires_grad_(False)


def load_critic(recipe: Recipe, algorithm: Algorithm, policy: Any) -> Critic | None:
    """A second copy of the base model with a scalar head, where the algorithm has a critic."""
    if "critic" not in algorithm.needs:
        return None
    model = load_model(recipe.model.path, policy.dtype).to(policy.device)
    return Critic(model, updates=recipe.training.steps * recipe.learner.minibatches, **recipe.critic.model_dump())


def averaged(updates: Sequence[Metrics]) -> Metrics:
    """Metrics of a step's updates: their mean, the largest of `_max`, the last of what only counts up; sums of sums."""
    scalars: dict[str, list[float]] = {}
    sums: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            if isinstance(value, list):
                sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(value)), value, strict=True)]
            elif math.isfinite(value):
                scalars.setdefault(name, []).append(value)
            else:
                scalars.setdefault(name, [])
    result: Metrics = {}
    for name, values in scalars.items():
        if name.endswith("_max"):
            result[name] = max(values, default=math.nan)
        elif name in ("learning_rate", "skipped_updates"):
            result[name] = values[-1]
        else:
            result[name] = sum(values) / len(values) if values else math.nan
    return {**result, **(summarise(sums) if sums else {}), **sums}


def reward_metrics(groups: Sequence[Group], algorithm: Algorithm, max_tokens: int) -> dict[str, float]:
    """Of the groups that were kept: the reward that advantages are made of, its spread, and its parts by name."""
    parts = {f"reward/part/{name}": values_B for name, values_B in reward_parts(groups, algorithm, max_tokens).items()}
    rewards_B = torch.stack(list(parts.values())).sum(0)
    scores = [score for group in groups for score in group.scores]
    for name in dict.fromkeys(name for score in scores for name in score.components):
        parts[f"reward/part/task/{name}"] = torch.tensor([score.components.get(name, 0.0) for score in scores])
    return {
        "reward/shaped_mean": float(rewards_B.mean()),
        "reward/shaped_spread": float(rewards_B.std(correction=0)),
        **{name: float(values_B.mean()) for name, values_B in parts.items()},
    }


def advantage_metrics(batch: Batch) -> dict[str, float]:
    """How many completions teach, how evenly, and how many were taken out of the loss."""
    advantages_B = torch.where(batch.mask_BT, batch.advantages_BT, 0).abs().amax(1)
    return {
        "utilisation": float((advantages_B != 0).float().mean()),
        "utilisation/effective": effective_share(advantages_B),
        "dropped/filtered": float((~batch.mask_BT.any(1)).sum()),
    }


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Of everything that was generated, whether it was kept or not; of what was kept, where nothing was generated."""
    seen = collected.seen or collected.groups
    completions = [completion for group in seen for completion in group.completions]
    finished = [len(completion.tokens) for completion in completions if completion.stop == "stop"]
    scores = [score for group in seen for score in group.scores]
    outcomes = [group.outcome for group in seen]
    shares = {name: outcomes.count(name) / len(seen) for name in ("all_correct", "all_wrong", "mixed")}
    return {
        "train/pass_rate": sum(score.correct for score in scores) / len(scores),
        "reward/mean": sum(score.reward for score in scores) / len(scores),
        **{f"groups/{name}": share for name, share in shares.items()},
        "groups/dead": 1 - shares["mixed"],
        "groups/kept": float(len(collected.groups)),
        "rollouts/completions": float(sum(len(group.completions) for group in collected.seen)),
        "rollouts/rounds": float(collected.rounds),
        "groups/reused": float(collected.reused),
        "groups/too_old": float(collected.too_old),
        "dropped/uniform": float(sum(group.outcome != "mixed" for group in collected.dropped)),
        "dropped/surplus": float(sum(group.outcome == "mixed" for group in collected.dropped)),
        "length/mean": sum(len(completion.tokens) for completion in completions) / len(completions),
        "length/finished": sum(finished) / len(finished) if finished else math.nan,
        "length/truncated": sum(completion.stop == "length" for completion in completions) / len(completions),
    }


def peak_mib() -> float:
    """The most memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


@dataclass(slots=True)
class Interrupt:
    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The first Ctrl-C (or SIGTERM) is noted, to be acted on when the step is over; the second acts at once."""
    interrupt = Interrupt()

    def note(signum: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
