"""The learner in this process, on one device."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.algorithms import Algorithm, policy_loss
from groupwise.algorithms.diagnostics import diagnose
from groupwise.algorithms.surrogates import Terms
from groupwise.attention import packs
from groupwise.config import LearnerSection
from groupwise.errors import DIVERGED, RunError
from groupwise.learner.base import TokenRecord
from groupwise.learner.critic import Critic
from groupwise.learner.logprobs import completion_logprobs, running
from groupwise.learner.optimiser import Optimiser
from groupwise.types import Batch, Metrics


class LocalLearner:
    """A `Learner` for a Hugging Face causal language model."""

    def __init__(
        self,
        model: Any,
        algorithm: Algorithm,
        settings: LearnerSection,
        *,
        updates: int,
        temperature: float,
        max_tokens: int,
        reference: Any = None,
        critic: Critic | None = None,
    ) -> None:
        """`updates`: how many the schedule spans. `reference` (a frozen model) and `critic`: where the algorithm needs one."""
        self.model, self.reference, self.critic = model, reference, critic
        self.algorithm, self.settings = algorithm, settings
        self.temperature, self.max_tokens = temperature, max_tokens
        self.optimiser = Optimiser(
            model,
            learning_rate=settings.learning_rate,
            updates=updates,
            warmup_steps=settings.warmup_steps,
            schedule=settings.schedule,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            max_bad_updates=settings.max_bad_updates,
        )

    @property
    def version(self) -> int:
        return self.optimiser.version

    def annotate(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        if self.settings.old_logprobs == "recompute":
            old_BT, entropy_BT = self._logprobs(self.model, batch)
            gap_N = (old_BT - batch.rollout_logprobs_BT).abs()[batch.mask_BT]
            metrics = {
                "sampler_gap_max": float(gap_N.max()),
                "sampler_gap_mean": float(gap_N.mean()),
                "entropy": float(entropy_BT[batch.mask_BT].mean()),
            }
        else:
            old_BT, metrics = batch.rollout_logprobs_BT, {}
        ref_BT = self._logprobs(self.reference, batch)[0] if self.reference is not None else None
        values_BT = self._values(self.critic, batch) if self.critic is not None else None
        for name, found in (("the policy", old_BT), ("the reference", ref_BT), ("the critic", values_BT)):
            if found is not None and not torch.isfinite(found).all():
                raise RunError(f"{name} gives numbers that are not finite; {DIVERGED}")
        return replace(batch, old_logprobs_BT=old_BT, ref_logprobs_BT=ref_BT, values_BT=values_BT), metrics

    @torch.no_grad()
    def _logprobs(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] under `model`."""
        whole = torch.zeros(batch.tokens_BT.shape), torch.zeros(batch.tokens_BT.shape)
        for rows, part in self._micro_batches(model, batch):
            for whole_BT, values in zip(whole, self._forward(model, part), strict=True):
                whole_BT[rows, : values.shape[1]] = values.cpu()
        return whole

    @torch.no_grad()
    def _values(self, critic: Critic, batch: Batch) -> Tensor:
        values_BT = torch.zeros(batch.tokens_BT.shape)
        for rows, part in self._micro_batches(critic.model, batch):
            values = critic.values(part, self.settings)
            values_BT[rows, : values.shape[1]] = values.cpu()
        return values_BT

    def _forward(self, model: Any, part: Batch) -> tuple[Tensor, Tensor]:
        with running(model, self.settings):
            return completion_logprobs(
                model,
                part,
                temperature=self.temperature,
                share_prompts=self.settings.share_prompts,
                entropy_gradient=self.algorithm.entropy_bonus != 0,
            )

    def _micro_batches(self, model: Any, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        packed = self.settings.share_prompts and packs(model)
        for rows in cut_rows(batch, self.settings.micro_batch_tokens, padded=not packed):
            yield rows, batch.select(rows).to(self.model.device)

    def update(self, minibatch: Batch, record: Callable[[TokenRecord], None] | None = None) -> Metrics:
        # The weights are fixed here, before the cut, so that the gradient does not depend on it.
        weights_BT = self.algorithm.part("aggregation")(
            minibatch.mask_BT, group_ids_B=minibatch.group_ids_B, max_length=self.max_tokens
        )
        minibatch = replace(minibatch, weights_BT=weights_BT)
        totals, sums = Totals(), dict[str, Tensor]()
        teaching_B = (minibatch.advantages_BT != 0).any(1) | (not self.algorithm.zero_advantage_is_idle)
        idle = int(minibatch.mask_BT[~teaching_B].sum())
        totals.add({name: torch.zeros(()) for name in ("loss", "clip_fraction", "clip_fraction_low", "clip_fraction_high")}, idle)
        taught = minibatch.select(teaching_B.nonzero()[:, 0]) if teaching_B.any() else None
        for _, part in self._micro_batches(self.model, taught) if taught is not None else ():
            logprobs_BT, entropy_BT = self._forward(self.model, part)
            if not torch.isfinite(logprobs_BT).all():
                totals.add({"loss": logprobs_BT.new_tensor(float("nan"))}, 0)
                continue
            assert part.old_logprobs_BT is not None
            loss, metrics = policy_loss(
                self.algorithm,
                logprobs_BT,
                part.old_logprobs_BT,
                part.advantages_BT,
                part.mask_BT,
                ref_logprobs_BT=part.ref_logprobs_BT,
                rollout_logprobs_BT=part.rollout_logprobs_BT,
                weights_BT=part.weights_BT,
                entropy_BT=entropy_BT,
                examine=partial(_examine, sums, record, part, entropy_BT.detach()),
            )
            loss.backward()  # type: ignore[no-untyped-call]
            trained = int(part.mask_BT.sum())
            metrics["entropy_updated"] = (entropy_BT.detach() * part.mask_BT).sum() / max(trained, 1)
            totals.add({"loss": loss.detach(), **metrics}, trained)
        results = totals.result()
        results |= self.optimiser.step(results["loss"])
        results["idle_tokens"] = float(idle)
        if self.critic is not None:
            parts = (part for _, part in self._micro_batches(self.critic.model, minibatch))
            results |= self.critic.update(parts, int(minibatch.mask_BT.sum()), self.settings)
        return {**results, **{name: value.flatten().tolist() for name, value in sums.items()}}

    def state_dict(self) -> dict[str, Any]:
        state = {"policy": self.optimiser.state_dict()}
        return state if self.critic is None else {**state, "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["policy"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])


def _examine(
    sums: dict[str, Tensor],
    record: Callable[[TokenRecord], None] | None,
    part: Batch,
    entropy_BT: Tensor,
    terms: Terms,
    clipped_BT: Tensor,
) -> None:
    """Add a part's diagnostics to `sums`, and hand its tokens to `record`."""
    for name, value in diagnose(terms, clipped_BT).items():
        sums[name] = sums[name] + value if name in sums else value
    if record is not None and part.rows_B is not None:
        logprobs_BT = terms.logprobs_BT.detach()
        found = {"logprob": logprobs_BT, "low": terms.low_BT, "high": terms.high_BT, "clipped": clipped_BT, "entropy": entropy_BT}
        record({"rows_B": part.rows_B.cpu(), **{name: value.expand_as(logprobs_BT).cpu() for name, value in found.items()}})


class Totals:
    """Metrics of a batch from those of its parts: losses summed, the largest of `_max`, token-weighted means of the rest."""

    def __init__(self) -> None:
        self._parts: list[tuple[dict[str, Tensor], int]] = []

    def add(self, metrics: dict[str, Tensor], tokens: int) -> None:
        self._parts.append((metrics, tokens))

    def result(self) -> dict[str, float]:
        return {name: self._combine(name) for name in dict.fromkeys(name for metrics, _ in self._parts for name in metrics)}

    def _combine(self, name: str) -> float:
        values = [(float(metrics[name]), count) for metrics, count in self._parts if name in metrics]
        if name == "loss":
            return sum(value for value, _ in values)
        if name.endswith("_max"):
            return max(value for value, _ in values)
        return sum(value * count for value, count in values) / max(1, sum(count for _, count in values))


def cut_rows(batch: Batch, tokens: int, *, padded: bool) -> Iterator[Tensor]:
    """Rows (int64 [R]) of each micro-batch: groups kept together, at most `tokens` tokens each (one row at least).

    Args:
        batch: what to cut.
        tokens: the budget.
        padded: whether every row costs as much as the longest, its prompt included; else each costs its own length, and
            a prompt once for its rows.
    """
    rows: list[int] = []
    prompts: set[int] = set()
    longest = packed = 0
    for row in torch.argsort(batch.group_ids_B, stable=True).tolist():
        prompt, length = int(batch.group_ids_B[row]), int(batch.lengths_B[row])
        prompt_length = len(batch.prompts[prompt])
        cost = length if prompt in prompts else length + prompt_length
        whole = (len(rows) + 1) * max(longest, prompt_length + length) if padded else packed + cost
        if rows and whole > tokens:
            yield torch.tensor(rows)
            rows, prompts, longest, packed, cost = [], set(), 0, 0, length + prompt_length
        rows.append(row)
        prompts.add(prompt)
        longest, packed = max(longest, prompt_length + length), packed + cost
    yield torch.tensor(rows)
