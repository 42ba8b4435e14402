"""Recurrent layers: each kernel against its formula in float64, and packed sequences and generation against each row alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.kernels import recurrent as kernels
from groupwise.kernels.recurrent import PackedSequences
from tests.conftest import need_kernels

PROMPTS, COMPLETIONS = torch.tensor([5, 1, 37]), torch.tensor([4, 20, 0, 1, 33])
OF_PROMPT = torch.tensor([0, 2, 1, 1, 2])


def close(ours: Tensor, wide: Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(ours.double(), wide.double(), rtol=1e-5, atol=tolerance * float(wide.abs().max()) + 1e-30)


def with_gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """The output, and the gradient of a random sum of it with respect to each input."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    given = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), given)]


def rows_of(flat: Tensor) -> list[Tensor]:
    return list(torch.split(flat, [*PROMPTS.tolist(), *COMPLETIONS.tolist()]))


def one_by_one(run: Any, *inputs: Tensor) -> Tensor:
    """A recurrence `run(state or None, inputs of a sequence) -> (outputs, state)` over the packed sequences."""
    sequences = list(zip(*map(rows_of, inputs), strict=True))
    outputs, states = [], []
    for sequence in sequences[: len(PROMPTS)]:
        output, state = run(None, *sequence)
        outputs.append(output)
        states.append(state)
    for prompt, sequence in zip(OF_PROMPT.tolist(), sequences[len(PROMPTS) :], strict=True):
        outputs.append(run(states[prompt], *sequence)[0])
    return torch.cat(outputs)


def linear_attention(
    state: Tensor | None, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, scale: float, epsilon: float, delta: bool
) -> tuple[Tensor, Tensor]:
    """Yang, Kautz and Hatamizadeh 2024, equation 10, token by token; without `delta` Dao and Gu 2024, equation 1."""
    H = value.shape[1]
    if epsilon:
        query, key = (x / (x.square().sum(-1, keepdim=True) + epsilon).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(H // x.shape[1], 1) for x in (query * scale, key))
    S = query.new_zeros(H, key.shape[2], value.shape[2]) if state is None else state
    outputs = [value[:0]]
    for q, k, v, log_decay, b in zip(query, key, value, g, beta, strict=True):
        S = S * log_decay.exp().reshape(H, -1, 1)
        u = v - torch.einsum("hde,hd->he", S, k) if delta else v
        S = S + k[:, :, None] * (b[:, None] * u)[:, None]
        outputs.append(torch.einsum("hde,hd->he", S, q)[None])
    return torch.cat(outputs), S


def inputs_of(K: int, H: int, D: int, E: int, per_row: bool, N: int) -> list[Tensor]:
    torch.manual_seed(0)
    g = -torch.nn.functional.softplus(torch.randn(N, H, *([D] if per_row else []))) * torch.logspace(-2, 1.5, N).view(
        -1, 1, *([1] if per_row else [])
    )
    return [torch.randn(N, K, D), torch.randn(N, K, D), torch.randn(N, H, E), g[torch.randperm(N)], torch.rand(N, H)]


FORMS = [
    (1, 1, 8, 8, True, False),
    (2, 4, 8, 16, True, False),
    (3, 3, 64, 64, True, False),
    (1, 2, 24, 96, True, False),
    (2, 2, 16, 32, True, True),
    (1, 4, 16, 24, False, False),
    (2, 4, 64, 128, False, False),
]


@pytest.mark.parametrize(("K", "H", "D", "E", "delta", "per_row"), FORMS)
def test_recurrence_is_its_formula(K: int, H: int, D: int, E: int, delta: bool, per_row: bool) -> None:
    need_kernels()
    settings: dict[str, Any] = {"scale": D**-0.5, "epsilon": 1e-6 if delta else 0.0, "delta": delta}
    layout = PackedSequences(PROMPTS, OF_PROMPT, COMPLETIONS)
    inputs = inputs_of(K, H, D, E, per_row, int(PROMPTS.sum() + COMPLETIONS.sum()))
    if not delta:
        inputs[0], inputs[1] = inputs[0] / D**0.5, inputs[1] / D**0.5
    ours = with_gradients(lambda *x: kernels.recurrence(*x, layout, **settings)[0], *inputs)
    formula = lambda state, *x: linear_attention(state, *x, **settings)  # noqa: E731
    wide = with_gradients(lambda *x: one_by_one(formula, *x), *(x.double() for x in inputs))
    for one, other in zip(ours, wide, strict=True):
        close(one, other)


@pytest.mark.parametrize(("K", "H", "D", "E", "delta", "per_row"), FORMS)
def test_steps_go_on_where_prompts_end(K: int, H: int, D: int, E: int, delta: bool, per_row: bool) -> None:
    need_kernels()
    settings: dict[str, Any] = {"scale": D**-0.5, "epsilon": 1e-6, "delta": delta}
    inputs = inputs_of(K, H, D, E, per_row, 12)
    layout = PackedSequences(torch.tensor([6, 6]), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    _, states = kernels.recurrence(*inputs, layout, **settings)
    wide = linear_attention(None, *(x[:6].double() for x in inputs), **settings)[1]
    close(states[0], wide)
    rows, before = states[[0, 0]], states.clone()
    after = inputs_of(K, H, D, E, per_row, 8)
    for t in range(4):
        output = kernels.recurrence_step(*(x[2 * t : 2 * t + 2] for x in after), rows, **settings)
        expected, wide = linear_attention(wide, *(x[2 * t : 2 * t + 1].double() for x in after), **settings)
        close(output[:1], expected)
    close(rows[0], wide)
    assert torch.equal(states, before)
    assert not torch.allclose(rows[0], rows[1])


def convolution(state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    every = torch.cat([x.new_zeros(K, x.shape[1]) if state is None else state, x])
    terms = [every[k + 1 : k + 1 + len(x)] * weight[:, k] for k in range(K)]
    z = sum(terms) if bias is None else sum(terms) + bias
    return z * torch.sigmoid(z) if silu else z, every[len(every) - K :]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("C", "K"), [(5, 4), (130, 3), (64, 2)])
def test_convolution_is_its_formula(silu: bool, biased: bool, C: int, K: int) -> None:
    need_kernels()
    layout = PackedSequences(PROMPTS, OF_PROMPT, COMPLETIONS)
    torch.manual_seed(0)
    N = int(PROMPTS.sum() + COMPLETIONS.sum())
    inputs = [torch.randn(N, C), torch.randn(C, K), torch.randn(C) if biased else None]
    ours = with_gradients(lambda *x: kernels.convolve(*x, layout, silu=silu), *inputs)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return one_by_one(lambda state, rows: convolution(state, rows, weight, bias, silu), x)

    wide = with_gradients(formula, *(None if x is None else x.double() for x in inputs))
    for one, other in zip(ours, wide, strict=True):
        close(one, other)
    state = torch.randn(3, C, K)
    x, weight, bias = torch.randn(3, C), *inputs[1:]
    assert weight is not None
    expected, moved = convolution(state[1].t(), x[1:2], weight, bias, silu)
    close(kernels.convolve_step(x, weight, bias, state, silu=silu)[1:2], expected)
    assert torch.equal(state[1], moved.t())


@pytest.mark.parametrize("skip", [True, False])
def test_mamba2_step_is_its_formula(skip: bool) -> None:
    need_kernels()
    torch.manual_seed(0)
    R, H, G, P, N = 3, 4, 2, 12, 20
    x, dt, A, B, C = torch.randn(R, H, P), torch.rand(R, H), -torch.rand(H) * 3, torch.randn(R, G, N), torch.randn(R, G, N)
    D, state = torch.randn(H) if skip else None, torch.randn(R, H, P, N)
    wide = state.double() * (dt * A).double().exp()[..., None, None]
    wide = wide + (dt[..., None] * x).double()[..., None] * B.repeat_interleave(2, 1).double()[:, :, None]
    expected = torch.einsum("rhpn,rhn->rhp", wide, C.repeat_interleave(2, 1).double())
    close(kernels.mamba2_step(x, dt, A, B, C, D, state), expected if D is None else expected + x * D[:, None])
    close(state, wide)
