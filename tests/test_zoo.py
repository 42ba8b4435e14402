"""A third of the zoo, every mechanism among it: each model is exact or refused with the reason, on the path that is promised.

The whole of it: `python -m tests.matrix`.
"""

from pathlib import Path

import pytest
import torch

from tests.matrix import Examination, difference, gradient_difference, random_batch
from tests.zoo import ZOO, build, perturb

CHOSEN = [name for name, member in ZOO.items() if member.ci]


@pytest.mark.parametrize("name", CHOSEN)
def test_is_exact_or_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    outcome = Examination(name).run(tmp_path)
    assert outcome.sound, "\n".join(outcome.details())
    assert outcome.as_expected, f"{outcome.path}, expected {outcome.expected}"
    assert outcome.path != "refused" or len(outcome.refusal) > 20


def test_the_third_is_small_and_has_every_path() -> None:
    assert len(CHOSEN) <= 25
    assert len({member.model_type for member in ZOO.values()}) >= 75
    assert {ZOO[name].expected for name in CHOSEN} == {"fast", "general", "refused"}


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "mamba2"])
def test_models_of_the_zoo_are_far_from_flat_and_leave_nothing_at_its_start(name: str) -> None:
    module = build(name)
    for key, parameter in module.named_parameters():
        assert parameter.numel() == 1 or float(parameter.std()) > 0, f"{key} is constant"
    tokens = random_batch().tokens_BT[1:2]
    probabilities = torch.softmax(module(input_ids=tokens).logits[0].float(), -1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean() / torch.tensor(64.0).log()
    assert 0.3 < float(entropy) < 0.9
    again = build(name)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), again.parameters(), strict=True))
    perturb(again)
    assert not any(torch.equal(one, other) for one, other in zip(module.parameters(), again.parameters(), strict=True))


def test_an_error_of_any_kind_is_seen() -> None:
    """The comparisons themselves: a wrong element, a NaN, a gradient that is missing."""
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")
    module = torch.nn.Linear(2, 1, bias=False)
    assert gradient_difference(module, {"weight": torch.tensor([[0.0, 4.0]])}) == (1.0, "weight")
    module.weight.grad = torch.tensor([[0.0, 3.0]])
    assert gradient_difference(module, {"weight": torch.tensor([[0.0, 4.0]])}) == (0.25, "weight")
    module.weight.grad[0, 0] = float("nan")
    assert gradient_difference(module, {"weight": torch.tensor([[0.0, 4.0]])})[0] == float("inf")
