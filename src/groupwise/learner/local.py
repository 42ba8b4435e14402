"""The learner in this process, on one device."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from groupwise.algorithms import Algorithm, Terms, policy_loss
from groupwise.algorithms.diagnostics import diagnose
from groupwise.errors import DIVERGED, Diverged
from groupwise.files import Digest
from groupwise.learner.base import TokenRecord
from groupwise.learner.critic import Critic
from groupwise.learner.micro_batches import Budget
from groupwise.learner.optimiser import Optimiser
from groupwise.learner.probing import probe
from groupwise.learner.ranks import ONE_RANK, Ranks
from groupwise.learner.updates import TokenMetrics, Update
from groupwise.models import LanguageModel, published
from groupwise.models.shards import Stored
from groupwise.state import read_state, write_state
from groupwise.types import Batch, LogprobBatch, TrainingBatch, WeightedBatch, upgrade

if TYPE_CHECKING:
    from groupwise.config import LearnerSection, Recipe

Rows = TypeVar("Rows", bound=Batch)


class LocalLearner:
    """A `Learner` for a Hugging Face causal language model."""

    def __init__(
        self,
        model: LanguageModel,
        algorithm: Algorithm,
        settings: "LearnerSection",
        *,
        updates: int,
        temperature: float,
        max_tokens: int,
        reference: LanguageModel | None = None,
        critic: Critic | None = None,
        merge_adapters: bool = True,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """`settings`: a `LearnerSection`, or anything with its attributes. `updates`: how many the schedule spans. `ranks`: the
        processes that the learner is sharded over.

        `reference` (a frozen model) and `critic`: where the algorithm needs one. Without a reference, that of a model with
        adapters is the model with its adapters off. `merge_adapters`: whether the exported model has them merged.
        """
        if reference is None and algorithm.needs_reference and model.adapted:
            reference = model
        self.model, self.reference, self.critic, self.ranks = model, reference, critic, ranks
        sharded = dict.fromkeys(one for one in (model, reference) if one is not None)
        self._runs = {one: ranks.shard(one, one.module, settings.precision) for one in sharded}
        self.merge_adapters = merge_adapters
        self.algorithm, self.settings = algorithm, settings
        self.budget = Budget(settings.micro_batch_tokens, fixed=ranks.size > 1)
        self.temperature, self.max_tokens = temperature, max_tokens
        self.optimiser = Optimiser(
            model.parameters(),
            learning_rate=settings.learning_rate,
            updates=updates,
            warmup_steps=settings.warmup_steps,
            schedule=settings.schedule,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            max_bad_updates=settings.max_bad_updates,
        )
        self.begin_step()

    @classmethod
    def build(cls, recipe: "Recipe", algorithm: Algorithm, model: LanguageModel, ranks: Ranks = ONE_RANK) -> Self:
        """The learner of a recipe, with a frozen copy of the base model as reference, and another with a value head as critic,
        where the algorithm needs them. With adapters all of them share one base, and the critic has adapters of its own; over
        several processes, the critic has a sharded copy of the base."""
        updates = recipe.training.steps * recipe.rollouts.epochs * recipe.learner.minibatches
        settings, precision = recipe.model, recipe.learner.precision

        def base() -> LanguageModel:
            return LanguageModel.load(
                settings.path,
                dtype=model.dtype,
                device=model.device,
                backend=settings.backend,
                trust_remote_code=settings.trust_remote_code,
            )

        # Each model is sharded before the next one is loaded, but for those that have a base in common.
        of_critic = model.with_shared_base() if model.adapted and "critic" in algorithm.needs else None
        ranks.shard(model, model.module, precision)
        critic = reference = None
        if "critic" in algorithm.needs:
            critic = Critic(of_critic or base(), recipe.critic, recipe.learner, updates=updates, ranks=ranks)
        if algorithm.needs_reference and not model.adapted:
            reference = base().freeze()
        return cls(
            model,
            algorithm,
            recipe.learner,
            updates=updates,
            temperature=recipe.rollouts.temperature,
            max_tokens=recipe.rollouts.max_tokens,
            reference=reference,
            critic=critic,
            merge_adapters=settings.lora is None or settings.lora.export == "merged",
            ranks=ranks,
        )

    @property
    def version(self) -> int:
        """Optimiser updates taken."""
        return self.optimiser.version

    def weights(self) -> LanguageModel:
        """The policy: a view, whose weights change with the next update."""
        return self.model

    # --- steps

    def begin_step(self) -> None:
        """See `Learner.begin_step`."""
        self._step_began = [optimiser.position for optimiser in self._optimisers]

    def take_back(self) -> bool:
        """See `Learner.take_back`."""
        undone = [one.back_to(position) for one, position in zip(self._optimisers, self._step_began, strict=True)]
        return all(undone)

    @property
    def _optimisers(self) -> list[Optimiser]:
        return [self.optimiser] if self.critic is None else [self.optimiser, self.critic.optimiser]

    # --- before the first update

    def compute_logprobs(self, batch: Batch) -> tuple[LogprobBatch, dict[str, float]]:
        """See `Learner.compute_logprobs`. Metrics are means over all trained tokens."""
        mask_BT = batch.mask_BT
        if self.settings.old_logprobs == "recompute":
            old_BT, entropy_BT = self._logprobs(self.model, batch)
            gap_N = (old_BT - batch.rollout_logprobs_BT).abs()[mask_BT]
            metrics = {"sampler_gap_max": float(gap_N.max()), "sampler_gap_mean": float(gap_N.mean())}
        else:
            # Nothing is recomputed: minus the log-probability of a sampled token is an unbiased estimate of the entropy.
            old_BT, entropy_BT, metrics = batch.rollout_logprobs_BT, -batch.rollout_logprobs_BT, {}
        metrics["entropy"] = float(entropy_BT[mask_BT].mean())
        ref_BT = self._reference_logprobs(self.reference, batch) if self.reference is not None else None
        values_BT = None
        if self.critic is not None:
            values_BT = self.budget.fit(partial(self._values, self.critic, batch), self.critic.optimiser.clear)
        for name, found in (("the policy", old_BT), ("the reference", ref_BT), ("the critic", values_BT)):
            if found is not None and not torch.isfinite(found).all():
                raise Diverged(f"{name} gives numbers that are not finite; {DIVERGED}")
        return upgrade(LogprobBatch, batch, old_logprobs_BT=old_BT, ref_logprobs_BT=ref_BT, values_BT=values_BT), metrics

    def _reference_logprobs(self, reference: LanguageModel, batch: Batch) -> Tensor:
        # The reference is not truncated: within the policy's kept sets it would agree with any policy sure of a token, and the
        # KL could not hold it.
        with reference.adapters_off() if reference is self.model else nullcontext():
            return self._logprobs(reference, replace(batch, kept=()))[0]

    def _logprobs(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [B, T] under `model`."""
        return self.budget.fit(partial(self._logprobs_in_parts, model, batch), self.optimiser.clear)

    @torch.no_grad()
    def _logprobs_in_parts(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        found = torch.zeros(batch.tokens_BT.shape), torch.zeros(batch.tokens_BT.shape)
        with model.bfloat16.held():
            for rows, part, counts in self._micro_batches(model, batch):
                for found_BT, values in zip(found, self._forward(model, part), strict=True):
                    if counts:
                        found_BT[rows, : values.shape[1]] = values.cpu()
        logprobs, entropies = map(self.ranks.total, found)
        return logprobs, entropies

    @torch.no_grad()
    def _values(self, critic: Critic, batch: Batch) -> Tensor:
        values_BT = torch.zeros(batch.tokens_BT.shape)
        for rows, part, counts in self._micro_batches(critic.model, batch):
            values = critic.values(part)
            if counts:
                values_BT[rows, : values.shape[1]] = values.cpu()
        return self.ranks.total(values_BT)

    def _forward(self, model: LanguageModel, part: Batch) -> tuple[Tensor, Tensor]:
        return self._runs[model](self._forward_pass, model, part)

    def _forward_pass(self, model: LanguageModel, part: Batch) -> tuple[Tensor, Tensor]:
        with model.running(precision=self.settings.precision, checkpointing=self.settings.checkpointing):
            return model.completion_logprobs(
                part,
                temperature=self.temperature,
                share_prompts=self.settings.share_prompts,
                entropy_gradient=self.algorithm.entropy_bonus != 0,
            )

    def _micro_batches(self, model: LanguageModel, batch: Rows) -> Iterator[tuple[Tensor, Rows, bool]]:
        """Those of this process: their rows in the batch, the rows as a batch, and whether they count."""
        packed = self.settings.share_prompts and model.decoder.packs()
        for rows, counts in self.budget.cut(batch, padded=not packed, rank=self.ranks.rank, ranks=self.ranks.size):
            yield rows, batch.select(rows).to(self.model.device), counts

    # --- updates

    def update(self, minibatch: TrainingBatch, record: Callable[[TokenRecord], None] | None = None) -> Update:
        """See `Learner.update`. Completions that can add nothing to the gradient are not run."""
        # Token weights are fixed before the cut, so that the gradient does not depend on it.
        weights_BT = self.algorithm.aggregation(minibatch.mask_BT, group_ids_B=minibatch.group_ids_B, max_length=self.max_tokens)
        batch = upgrade(WeightedBatch, minibatch, weights_BT=weights_BT)
        run_B = (batch.advantages_BT != 0).any(1) | (not self.algorithm.zero_advantage_is_idle)
        run = batch.select(run_B.nonzero()[:, 0]) if run_B.any() else None
        found, sums, records = self.budget.fit(partial(self._gradient, run, record is not None), self.optimiser.clear)
        if record is not None:
            for item in records:
                record(item)
        self.ranks.settle(self.model.module)
        step = self.optimiser.step(found.loss)
        of_critic = {}
        if self.critic is not None:
            of_critic = self.budget.fit(partial(self._update_critic, self.critic, minibatch), self.critic.optimiser.clear)
        halved = {"micro_batch_tokens": float(self.budget.tokens)} if self.budget.tokens != self.budget.asked else {}
        return Update(
            tokens=found.tokens,
            skipped_tokens=int(minibatch.mask_BT[~run_B].sum()),
            means=found.means(),
            largest=found.largest,
            step={"loss": found.loss, "grad_norm": step.grad_norm, **of_critic},
            latest={"learning_rate": step.learning_rate, "skipped_updates": float(step.skipped), **halved},
            sums={name: value.flatten().tolist() for name, value in sums.items()},
        )

    def _gradient(self, batch: WeightedBatch | None, recorded: bool) -> tuple[TokenMetrics, dict[str, Tensor], list[TokenRecord]]:
        """Leave the gradient of a minibatch with the parameters. Returns metrics, diagnostics, if asked those of each token."""
        found, sums, records = TokenMetrics(), dict[str, Tensor](), list[TokenRecord]()
        if batch is not None:
            with self.model.bfloat16.held():
                for _, part, counts in self._micro_batches(self.model, batch):
                    if counts:
                        self._accumulate(part, found, sums, records.append if recorded else None)
                    else:
                        self._add_nothing(self._forward(self.model, part)[0])
        sums = {name: value.cpu() for name, value in sums.items()}
        merged, total = self._merged(self.ranks.gather((found, sums)))
        return merged, total, [record for part in self.ranks.collect(records) for record in part]

    @staticmethod
    def _merged(
        found: list[tuple[TokenMetrics, dict[str, Tensor]]],
    ) -> tuple[TokenMetrics, dict[str, Tensor]]:
        """What all processes have found, as if one had."""
        metrics, sums = found[0]
        for other, more in found[1:]:
            metrics.merge(other)
            for name, value in more.items():
                sums[name] = sums[name] + value if name in sums else value
        return metrics, sums

    def _update_critic(self, critic: Critic, minibatch: TrainingBatch) -> dict[str, float]:
        found = self._micro_batches(critic.model, minibatch)
        parts = (part if counts else replace(part, mask_BT=torch.zeros_like(part.mask_BT)) for _, part, counts in found)
        return critic.update(parts, int(minibatch.mask_BT.sum()))

    def _accumulate(
        self,
        part: WeightedBatch,
        found: TokenMetrics,
        sums: dict[str, Tensor],
        record: Callable[[TokenRecord], None] | None,
    ) -> None:
        """Forward and backward pass of a micro-batch: adds to the gradients, the metrics and the diagnostics."""
        logprobs_BT, entropy_BT = self._forward(self.model, part)
        if not torch.isfinite(logprobs_BT).all():
            found.add(float("nan"), {}, 0)  # the optimiser then skips the update
            self._add_nothing(logprobs_BT)
            return
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
        tokens = int(part.mask_BT.sum())
        metrics["entropy_updated"] = (entropy_BT.detach() * part.mask_BT).sum() / max(tokens, 1)
        found.add(float(loss.detach()), metrics, tokens)

    def _add_nothing(self, logprobs_BT: Tensor) -> None:
        """A backward pass that other processes take part in."""
        if self.ranks.size > 1:
            (0 * logprobs_BT.sum()).backward()  # type: ignore[no-untyped-call]

    # --- state

    def save(self, directory: Path) -> dict[str, Digest]:
        """Write the policy's weights, and the state of the optimisers and the critic."""
        weights = self.model.save_weights(directory / "model.safetensors")
        return {"model.safetensors": weights, **write_state(directory / "learner", self.state_dict())}

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, be it that of a sharded learner."""
        state: dict[str, Any] = read_state(directory / "learner", Stored(directory / "learner").read())
        self.model.load_weights(directory / "model")
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """All but the policy's weights."""
        state: dict[str, Any] = {"policy": self.optimiser.state_dict(), "budget": self.budget.state_dict()}
        return state | ({} if self.critic is None else {"critic": self.critic.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["policy"])
        if "budget" in state:  # of earlier versions none was saved, since it could not change
            self.budget.load_state_dict(state["budget"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def publish(self, directory: Path) -> None:
        """See `Learner.publish`."""
        published.publish(self.model, directory)

    def probe(self, tokens: Tensor) -> Tensor:
        """See `Learner.probe`."""
        with torch.no_grad():
            return self._runs[self.model](probe, self.model, tokens, precision=self.settings.precision)

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        """See `Learner.export`."""
        return self.model.export(directory, tokenizer, merge=self.merge_adapters)


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
    if record is not None:
        logprobs_BT = terms.logprobs_BT.detach()
        found = {"logprob": logprobs_BT, "low": terms.low_BT, "high": terms.high_BT, "clipped": clipped_BT, "entropy": entropy_BT}
        record({"rows_B": part.rows_B.cpu(), **{name: value.expand_as(logprobs_BT).cpu() for name, value in found.items()}})
