"""Diagnostics are what plain loops find, and add up over any cut."""

import math

import pytest
import torch

from groupwise.algorithms import named, policy_loss
from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES, diagnose, effective_share, summarise
from groupwise.algorithms.surrogates import Terms


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(8, 40, generator=generator, dtype=torch.float64) ** 3
    new = (old + 0.3 * torch.randn(8, 40, generator=generator, dtype=torch.float64)).clamp(max=0)
    mask = torch.arange(40) < torch.tensor([40, 1, 7, 16, 3, 0, 33, 12])[:, None]
    return new, old, torch.randn(8, 1, generator=generator, dtype=torch.float64).expand(8, 40), mask


def sums_of(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def examine(terms: Terms, clipped: torch.Tensor) -> None:
        found.update(diagnose(terms, clipped))

    policy_loss(named("dapo"), new, old, advantages, mask, examine=examine)
    return found


def test_diagnostics_are_those_of_plain_loops() -> None:
    new, old, advantages, mask = batch()
    found = sums_of(new, old, advantages, mask)
    tokens, low, high, probability = ([0.0] * (len(PROBABILITY_EDGES) + 1) for _ in range(4))
    rows, mean_square, sum_square = ([0.0] * (len(LENGTH_EDGES) + 1) for _ in range(3))
    for i in range(8):
        ratios = []
        for t in range(40):
            if mask[i, t]:
                p, ratio, a = math.exp(old[i, t]), math.exp(new[i, t] - old[i, t]), float(advantages[i, t])
                k = sum(p >= edge for edge in PROBABILITY_EDGES)
                tokens[k] += 1
                if ratio < 1 - 0.2 and a < 0:
                    low[k] += 1
                if ratio > 1 + 0.28 and a > 0:
                    high[k] += 1
                    probability[k] += p
                ratios.append(float(new[i, t] - old[i, t]))
        if ratios:
            k = sum(len(ratios) >= edge for edge in LENGTH_EDGES)
            rows[k] += 1
            mean_square[k] += (sum(ratios) / len(ratios)) ** 2
            sum_square[k] += sum(ratios) ** 2
    expected = {
        "by_probability/tokens": tokens,
        "by_probability/clipped_low": low,
        "by_probability/clipped_high": high,
        "by_probability/clipped_high_probability": probability,
        "by_length/rows": rows,
        "by_length/mean_square": mean_square,
        "by_length/sum_square": sum_square,
    }
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, rel=1e-10), name
    assert sum(high) > 3 and sum(low) > 3

    whole = summarise({name: value.flatten().tolist() for name, value in found.items()})
    differences = (new - old)[mask]
    assert whole["spread/token"] == pytest.approx(float(differences.std(correction=0)), rel=1e-10)
    assert whole["clip/high_probability"] == pytest.approx(sum(probability) / sum(high), rel=1e-10)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    new, old, advantages, mask = batch(1)
    whole = sums_of(new, old, advantages, mask)
    parts = [sums_of(new[rows], old[rows], advantages[rows], mask[rows]) for rows in (slice(0, 3), slice(3, 8))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_effective_share_by_hand() -> None:
    """Four rows: equal |A| on two of them is a half; 3 and 1 are (3 + 1)^2 / (4 * 10) = 0.4; none is 0."""
    assert effective_share(torch.tensor([1.0, -1.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert effective_share(torch.tensor([3.0, -1.0, 0.0, 0.0])) == pytest.approx(0.4)
    assert effective_share(torch.zeros(4)) == 0
