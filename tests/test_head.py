"""The output layer in blocks: its values and gradients are those of a plain log-softmax, and it never holds much."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models import head
from groupwise.models.head import LogitShape, token_logprobs

N, H, V = 7, 5, 23


class Wrapped(torch.nn.Module):
    """An output layer that is not a plain matrix."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


def model_of(layer: torch.nn.Module, **settings: float) -> Any:
    config = SimpleNamespace(vocab_size=V, **settings)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, get_output_embeddings=lambda: layer)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of a few logits; returns the sizes of those that were held."""
    sizes: list[int] = []
    original = LogitShape.__call__

    def measured(self: LogitShape, scores: Tensor) -> Tensor:
        sizes.append(scores.numel())
        return original(self, scores)

    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 4 * V})
    monkeypatch.setattr(head, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(LogitShape, "__call__", measured)
    return sizes


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("settings", [{}, {"logit_scale": 0.3}, {"logits_scaling": 4.0, "final_logit_softcapping": 2.0}])
def test_values_and_gradients_are_those_of_a_plain_log_softmax(
    settings: dict[str, float], wrapped: bool, small_blocks: list[int]
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(H, V).double()
    hidden, targets = 3 * torch.randn(N, H, dtype=torch.float64), torch.randint(V, (N,))
    by_logprobs, by_entropy = torch.randn(2, N, dtype=torch.float64)

    def gradients(logprobs: Tensor, entropy: Tensor, inputs: Tensor) -> list[Tensor]:
        loss = (logprobs * by_logprobs + entropy * by_entropy).sum()
        return [logprobs, entropy, *torch.autograd.grad(loss, [inputs, layer.weight, layer.bias])]

    inputs = hidden.clone().requires_grad_()
    model = model_of(Wrapped(layer) if wrapped else layer, **settings)
    ours = gradients(*token_logprobs(model, inputs, targets, 0.7, entropy_gradient=True), inputs)

    scores = layer(inputs) * settings.get("logit_scale", 1.0) / settings.get("logits_scaling", 1.0)
    cap = settings.get("final_logit_softcapping")
    logprobs_NV = torch.log_softmax((cap * torch.tanh(scores / cap) if cap else scores) / 0.7, -1)
    plain = gradients(logprobs_NV[range(N), targets], -(logprobs_NV.exp() * logprobs_NV).sum(-1), inputs)

    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert max(small_blocks) <= 4 * V < N * V


def test_large_scores_lose_nothing() -> None:
    """Two tokens at 1000 and 999, the rest far below: p = sigmoid(1), entropy = log(1 + e^-1) + e^-1 / (1 + e^-1)."""
    layer = torch.nn.Linear(1, V, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1000.0, 999.0, *[-1000.0] * (V - 2)])[:, None])
    logprobs, entropy = token_logprobs(model_of(layer), torch.ones(2, 1), torch.tensor([0, 1]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([-0.313262, -1.313262]))
    torch.testing.assert_close(entropy, torch.tensor([0.582203, 0.582203]))


def test_the_gradient_in_bfloat16_does_not_lose_more_with_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, hidden, targets = torch.nn.Linear(64, 4096, bias=False), torch.randn(32, 64), torch.randint(4096, (32,))

    def gradient(rough: bool, at_once: int) -> Tensor:
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": at_once})
        inputs = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            logprobs, _ = token_logprobs(model_of(layer), inputs, targets, 1.0)
        found: Tensor = torch.autograd.grad(logprobs.sum(), inputs)[0]
        return found

    exact = gradient(False, 2**22)
    errors = [float((gradient(True, size) - exact).norm() / exact.norm()) for size in (2**22, 32 * 16)]
    assert errors[1] < 1.5 * errors[0] < 0.02


def test_the_entropy_has_no_gradient_unless_asked_for() -> None:
    layer = torch.nn.Linear(H, V)
    logprobs, entropy = token_logprobs(model_of(layer), torch.randn(N, H), torch.zeros(N, dtype=torch.long), 1.0)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_no_tokens_at_all() -> None:
    layer = torch.nn.Linear(H, V)
    logprobs, entropy = token_logprobs(model_of(layer), torch.zeros(0, H), torch.zeros(0, dtype=torch.long), 1.0)
    assert logprobs.shape == entropy.shape == (0,)
