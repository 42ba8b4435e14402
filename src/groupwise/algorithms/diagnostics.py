"""What a loss did to its tokens: where its clip cut, and how far ratios have spread. Sums, so that parts of a batch add up."""

import math

import torch
from torch import Tensor

from groupwise.algorithms.ratios import token_log_ratio
from groupwise.algorithms.surrogates import Terms

PROBABILITY_EDGES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99)
"""Bins of pi_old: below the first, between each two, above the last."""
LENGTH_EDGES = tuple(2**i for i in range(1, 16))
"""Bins of a row's trained tokens: 1, 2 to 3, 4 to 7 and so on."""


@torch.no_grad()
def diagnose(terms: Terms, clipped_BT: Tensor) -> dict[str, Tensor]:
    """Sums over trained tokens and rows.

    Returns:
        by_probability/tokens, /clipped_low, /clipped_high, /clipped_high_probability: [bins of pi_old], the last a sum of
        pi_old; by_length/rows, /mean_square, /sum_square: [bins of length], of each row's mean and summed log ratio
        of tokens, squared; log_ratio/sum and log_ratio/square, scalars.
    """
    mask_BT = terms.mask_BT
    log_ratio_BT = token_log_ratio(terms.logprobs_BT, terms.old_logprobs_BT, mask_BT).double()
    probability_N = terms.old_logprobs_BT[mask_BT].double().exp()
    bins_N = torch.bucketize(probability_N, probability_N.new_tensor(PROBABILITY_EDGES), right=True)
    clipped_N, above_N = clipped_BT[mask_BT], terms.log_ratio_BT[mask_BT] > 0

    def by_probability(weights_N: Tensor) -> Tensor:
        return torch.bincount(bins_N, weights_N.double(), minlength=len(PROBABILITY_EDGES) + 1)

    lengths_R = mask_BT.sum(1)
    rows = lengths_R > 0
    lengths_R, sums_R = lengths_R[rows], log_ratio_BT.sum(1)[rows]
    bins_R = torch.bucketize(lengths_R, lengths_R.new_tensor(LENGTH_EDGES), right=True)

    def by_length(weights_R: Tensor) -> Tensor:
        return torch.bincount(bins_R, weights_R, minlength=len(LENGTH_EDGES) + 1)

    return {
        "by_probability/tokens": by_probability(torch.ones_like(probability_N)),
        "by_probability/clipped_low": by_probability(clipped_N & ~above_N),
        "by_probability/clipped_high": by_probability(clipped_N & above_N),
        "by_probability/clipped_high_probability": by_probability(probability_N * (clipped_N & above_N)),
        "by_length/rows": by_length(torch.ones_like(sums_R)),
        "by_length/mean_square": by_length((sums_R / lengths_R) ** 2),
        "by_length/sum_square": by_length(sums_R**2),
        "log_ratio/sum": log_ratio_BT.sum(),
        "log_ratio/square": (log_ratio_BT**2).sum(),
    }


def summarise(sums: dict[str, list[float]]) -> dict[str, float]:
    """Scalars from what `diagnose` found, added up: NaN where there is nothing to average.

    Returns:
        clip/high_probability, the mean pi_old of up-clipped tokens; spread/token, the standard deviation of tokens' log
        ratios; spread/sequence and spread/product, the root mean squares of rows' mean and summed log ratios.
    """
    tokens, rows = sum(sums["by_probability/tokens"]), sum(sums["by_length/rows"])
    clipped_high = sum(sums["by_probability/clipped_high"])
    if not tokens:
        return {}
    mean = sums["log_ratio/sum"][0] / tokens
    return {
        "clip/high_probability": sum(sums["by_probability/clipped_high_probability"]) / clipped_high
        if clipped_high
        else math.nan,
        "spread/token": math.sqrt(max(0.0, sums["log_ratio/square"][0] / tokens - mean**2)),
        "spread/sequence": math.sqrt(sum(sums["by_length/mean_square"]) / rows),
        "spread/product": math.sqrt(sum(sums["by_length/sum_square"]) / rows),
    }


def effective_share(advantages_B: Tensor) -> float:
    """How many rows carry the signal, as a share: (sum |A|)^2 / (B sum A^2).

    The share of rows with A != 0 where their |A| are equal, and less where a few of them outweigh the others.
    """
    squares = float((advantages_B**2).sum())
    return float(advantages_B.abs().sum()) ** 2 / (len(advantages_B) * squares) if squares else 0.0
