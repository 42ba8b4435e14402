"""policy_loss: an algorithm and tensors in, a loss to minimise and its metrics out."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.algorithms.algorithm import Algorithm
from groupwise.algorithms.kl import k3
from groupwise.algorithms.masks import keep_all
from groupwise.algorithms.ratios import bounded_exp, sequence_log_ratio, token_log_ratio
from groupwise.algorithms.surrogates import Terms


def policy_loss(
    algorithm: Algorithm,
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    group_ids_B: Tensor | None = None,
    ref_logprobs_BT: Tensor | None = None,
    rollout_logprobs_BT: Tensor | None = None,
    weights_BT: Tensor | None = None,
    entropy_BT: Tensor | None = None,
    examine: Callable[[Terms, Tensor], None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The algorithm's loss on a batch, or on a part of one whose token weights were fixed beforehand.

    Args:
        algorithm: what to compute.
        logprobs_BT: float [B, T], log pi_theta of the sampled tokens, in nats. The loss is differentiable in it, and in
            `entropy_BT`.
        old_logprobs_BT: float [B, T], the policy that the ratio is taken against.
        advantages: float [B] or [B, T].
        mask_BT: bool [B, T], True where a token is trained on. What the other tensors hold elsewhere is never read.
        group_ids_B: int [B]; needed where `weights_BT` is left out and the aggregation counts by prompt.
        ref_logprobs_BT: float [B, T], the reference; needed where beta > 0.
        rollout_logprobs_BT: float [B, T], as the sampler returned them; needed where the algorithm corrects for mismatch or has
            a mask.
        weights_BT: float [B, T], from `token_weights` over the whole optimiser step; left out: this batch is the whole step,
            and T is the max_length of the aggregation "constant".
        entropy_BT: float [B, T]; needed where there is an entropy bonus.
        examine: called with the terms of the loss and with clipped_BT, for diagnostics of single tokens.

    Returns:
        (loss, metrics): a scalar, and detached scalars over the trained tokens of this batch; see `token_metrics`. kl_ref,
        correction_mean and masked_fraction are there where a reference, a correction or a mask is used.

    Raises:
        ValueError: something needed is missing, or a log-probability or an advantage of a trained token is not finite.
    """
    given = _checked(
        mask_BT,
        logprobs_BT=(logprobs_BT, "the loss"),
        old_logprobs_BT=(old_logprobs_BT, "the loss"),
        advantages=(advantages if advantages.dim() == 2 else advantages[:, None], "the loss"),
        ref_logprobs_BT=(ref_logprobs_BT, "beta above 0" if algorithm.beta > 0 else None),
        rollout_logprobs_BT=(rollout_logprobs_BT, _reader_of_rollouts(algorithm)),
        entropy_BT=(entropy_BT, "an entropy bonus" if algorithm.entropy_bonus else None),
    )
    if weights_BT is None:
        weights_BT = algorithm.aggregation(mask_BT, group_ids_B=group_ids_B, max_length=None)
    terms = _terms(algorithm, given, mask_BT)
    token_loss_BT, clipped_BT = algorithm.surrogate(terms)
    metrics = token_metrics(terms, clipped_BT)
    if examine is not None:
        examine(terms, clipped_BT & mask_BT)
    token_loss_BT, of_terms = _with_other_terms(algorithm, token_loss_BT, terms, given)
    loss = (weights_BT.to(terms.logprobs_BT.dtype) * torch.where(mask_BT, token_loss_BT, 0)).sum()
    return loss, {**metrics, **of_terms}


def _reader_of_rollouts(algorithm: Algorithm) -> str | None:
    """What reads the sampler's log-probabilities."""
    if algorithm.corrects_mismatch:
        return "an importance-sampling correction"
    return f"the mask {algorithm.choice('mask')}" if algorithm.needs_rollout_logprobs else None


def _terms(algorithm: Algorithm, given: dict[str, Tensor], mask_BT: Tensor) -> Terms:
    logprobs_BT, old_BT = given["logprobs_BT"], given["old_logprobs_BT"].detach()
    low_BT, high_BT = algorithm.bounds(old_BT)
    return Terms(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=old_BT,
        log_ratio_BT=algorithm.ratio(logprobs_BT, old_BT, mask_BT),
        advantages_BT=given["advantages"].to(logprobs_BT.dtype).detach(),
        low_BT=low_BT,
        high_BT=high_BT,
        mask_BT=mask_BT,
    )


def _with_other_terms(
    algorithm: Algorithm, token_loss_BT: Tensor, terms: Terms, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate loss masked and times its importance-sampling correction, plus the KL penalty, minus the entropy bonus; and
    metrics."""
    metrics = {}
    old_BT, mask_BT = terms.old_logprobs_BT, terms.mask_BT
    if algorithm.corrects_mismatch:
        correction_BT = algorithm.correction(old_BT, given["rollout_logprobs_BT"].detach(), mask_BT)
        token_loss_BT = token_loss_BT * correction_BT
        metrics["correction_mean"] = _mean(correction_BT, mask_BT)
    if algorithm.mask is not keep_all:
        keep_BT = algorithm.mask(terms, given["rollout_logprobs_BT"].detach())
        token_loss_BT = torch.where(keep_BT, token_loss_BT, 0)
        metrics["masked_fraction"] = _mean((~keep_BT).to(token_loss_BT.dtype), mask_BT)
    if algorithm.beta > 0:
        kl_BT = algorithm.kl(terms.logprobs_BT, given["ref_logprobs_BT"].detach())
        metrics["kl_ref"] = _mean(kl_BT.detach(), mask_BT)
        if algorithm.kl_ratio_weighted:
            kl_BT = kl_BT * bounded_exp(token_log_ratio(terms.logprobs_BT, old_BT, mask_BT))
        token_loss_BT = token_loss_BT + algorithm.beta * kl_BT
    if algorithm.entropy_bonus:
        token_loss_BT = token_loss_BT - algorithm.entropy_bonus * given["entropy_BT"]
    return token_loss_BT, metrics


LARGEST = frozenset({"ratio_max", "sequence_ratio_max"})
"""Metrics that are the largest value over tokens, not a mean: how those of parts of a batch are combined."""


def _checked(mask_BT: Tensor, **inputs: tuple[Tensor | None, str | None]) -> dict[str, Tensor]:
    """The inputs that something needs, each given as (values, what needs it), with 0 where masked.

    So nothing that stands there, a NaN included, reaches the loss or its gradient.
    """
    if mask_BT.dtype != torch.bool:
        raise ValueError(f"mask_BT is {mask_BT.dtype}; it says which tokens are trained on, so it must be bool")
    found = {}
    for name, (values_BT, reason) in inputs.items():
        if reason is None:
            continue
        if values_BT is None:
            raise ValueError(f"{reason} needs {name}, which was not given")
        found[name] = torch.where(mask_BT, values_BT, 0)
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"{name} holds a value that is not finite at a trained token")
    return found


def _mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


@torch.no_grad()
def token_metrics(terms: Terms, clipped_BT: Tensor) -> dict[str, Tensor]:
    """Detached scalars over the trained tokens.

    Returns:
        clip_fraction: share of tokens whose gradient the clip changed; clip_fraction_low and _high: of them, those with a ratio
        below and above 1; ratio_mean and ratio_max of tokens; sequence_ratio_max: the largest geometric mean of a row's ratios;
        approx_kl: k3's estimate of KL(pi_old || pi_theta).
    """
    mask_BT = terms.mask_BT
    log_ratio_BT = token_log_ratio(terms.logprobs_BT, terms.old_logprobs_BT, mask_BT)
    ratio_BT = bounded_exp(log_ratio_BT)
    sequence_BT = bounded_exp(sequence_log_ratio(terms.logprobs_BT, terms.old_logprobs_BT, mask_BT))
    clipped_BT = clipped_BT & mask_BT
    above_BT = terms.log_ratio_BT > 0
    largest = torch.zeros((), dtype=ratio_BT.dtype, device=ratio_BT.device)
    return {
        "clip_fraction": _mean(clipped_BT.to(ratio_BT.dtype), mask_BT),
        "clip_fraction_low": _mean((clipped_BT & ~above_BT).to(ratio_BT.dtype), mask_BT),
        "clip_fraction_high": _mean((clipped_BT & above_BT).to(ratio_BT.dtype), mask_BT),
        "ratio_mean": _mean(ratio_BT, mask_BT),
        "ratio_max": torch.where(mask_BT, ratio_BT, largest).max() if mask_BT.numel() else largest,
        "sequence_ratio_max": torch.where(mask_BT, sequence_BT, largest).max() if mask_BT.numel() else largest,
        "approx_kl": _mean(k3(terms.old_logprobs_BT, terms.logprobs_BT), mask_BT),
    }
