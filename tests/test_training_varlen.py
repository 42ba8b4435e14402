"""The layout that FlashAttention reads on a GPU, here with a reference in place of its kernels, which tests/test_gpu.py runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models.attention import training_varlen
from groupwise.models.attention.attend import AttentionForm
from groupwise.models.attention.training import PackedAttention
from groupwise.models.attention.training_varlen import VarlenLayout


def reference_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    causal: bool,
    _debug: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """What the kernel computes: sequence by sequence, the last query aligned with the last key."""
    assert queries.dtype == keys.dtype == torch.int32 and isinstance(max_queries, int) and isinstance(max_keys, int)
    assert int(queries.diff().max()) == max_queries and int(keys.diff().max()) == max_keys and (queries.diff() > 0).all()
    assert causal == (window_size_left == -1) and window_size_right == dropout == 0
    times = query.shape[1] // key.shape[1]
    parts = []
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        q = query[q0:q1]
        k, v = (x[k0:k1].repeat_interleave(times, 1) for x in (key, value))
        place = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (place >= 0) & ((place <= window_size_left) | (window_size_left < 0))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    nothing = query.new_zeros(0)
    return torch.cat(parts), query.new_zeros(query.shape[1], len(query)), nothing, nothing, nothing


def reference_flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, *others: Any, **limits: Any
) -> tuple[Tensor, ...]:
    *sequences, _random, _unused = others
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        found, *_ = reference_flash(*inputs, *sequences, False, **limits)
    torch.testing.assert_close(found.detach(), output)
    return torch.autograd.grad(found, inputs, gradient)


def plain_attention(
    inputs: tuple[Tensor, Tensor, Tensor], prompts: list[int], rows: list[tuple[int, int]], scale: float, window: int
) -> Tensor:
    """Each token over its own sequence, spelled out. `rows`: (prompt, tokens) of each completion."""
    query, key, value = inputs
    owner = [(p, i) for p, n in enumerate(prompts) for i in range(n)]
    owner_row = [(p, -1, i) for p, i in owner]
    for r, (p, n) in enumerate(rows):
        owner_row += [(p, r, prompts[p] + i) for i in range(n)]
    outputs = []
    times = query.shape[1] // key.shape[1]
    for t, (p, r, place) in enumerate(owner_row):
        seen = [
            u
            for u, (q, s, other) in enumerate(owner_row)
            if q == p and s in (-1, r) and other <= place and (not window or other > place - window)
        ]
        k, v = (x[seen].repeat_interleave(times, 1) for x in (key, value))
        weights = (torch.einsum("hd,khd->hk", query[t], k) * scale).softmax(-1)
        outputs.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize(("heads", "shared"), [(2, 1), (4, 2)])
@pytest.mark.parametrize(
    "rows",
    [[(0, 4), (0, 3), (2, 5), (1, 1)], [(2, 2), (0, 0), (0, 1), (2, 0)], []],
    ids=["completions", "some empty", "prompts alone"],
)
def test_values_and_gradients_are_those_of_plain_attention(
    rows: list[tuple[int, int]], heads: int, shared: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_varlen, "_flash", reference_flash)
    monkeypatch.setattr(training_varlen, "_flash_backward", reference_flash_backward)
    prompts = [5, 1, 3]
    lengths = torch.tensor(prompts), torch.tensor([p for p, _ in rows]).long(), torch.tensor([n for _, n in rows]).long()
    N = sum(prompts) + sum(n for _, n in rows)
    shapes = (N, heads, 8), (N, heads // shared, 8), (N, heads // shared, 8)
    inputs = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    found = training_varlen.attention(*inputs, VarlenLayout(*lengths, "cpu"), 0.3, window)
    expected = plain_attention(inputs, prompts, rows, 0.3, window)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_packed_attention_takes_it_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PackedAttention([5, 1, 3], torch.tensor([0, 0, 2, 1]), torch.tensor([4, 3, 5, 1]), "cpu")
    query, key, value = torch.randn(22, 4, 16), torch.randn(22, 2, 16), torch.randn(22, 2, 16)
    expected = layout(0, query, key, value, 0.3)
    monkeypatch.setattr(training_varlen, "_flash", reference_flash)
    monkeypatch.setattr(training_varlen, "unsupported", lambda *_: None)
    torch.testing.assert_close(layout(0, query, key, value, 0.3), expected, rtol=1e-4, atol=1e-5)
    assert "varlen" in vars(layout)


def test_the_layout_by_hand() -> None:
    """Prompts of 2 and 1 tokens, then completions of 2 tokens of the second, of none, and of 1 token of the first."""
    layout = VarlenLayout(torch.tensor([2, 1]), torch.tensor([1, 0, 0]), torch.tensor([2, 0, 1]), "cpu")
    assert layout.queries.tolist() == [0, 2, 3, 5, 6]
    assert layout.keys.tolist() == [0, 2, 3, 6, 9]
    assert layout.index_M.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 5]
    assert (layout.max_queries, layout.max_keys) == (2, 3)
    ones_M11 = torch.ones(9, 1, 1)
    assert layout.sum_copies(ones_M11).flatten().tolist() == [2, 2, 2, 1, 1, 1]


def test_what_it_cannot_run_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 2, 16)
    assert "not on cpu" in str(training_varlen.unsupported(x, x, x))

    def on_gpu(size: int = 16, value_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
        def tensor(size: int) -> Any:
            return type("T", (), {"device": torch.device("cuda", 0), "dtype": dtype, "shape": torch.Size((4, 2, size))})()

        return tensor(size), tensor(size), tensor(value_size)

    monkeypatch.setattr(training_varlen, "_unavailable", lambda _: None)
    assert training_varlen.unsupported(*on_gpu()) is None
    assert training_varlen.unsupported(*on_gpu(), AttentionForm(window=3)) is None
    assert "soft cap" in str(training_varlen.unsupported(*on_gpu(), AttentionForm(softcap=3.0)))
    assert "sinks" in str(training_varlen.unsupported(*on_gpu(), AttentionForm(sinks_H=torch.zeros(2))))
    assert "not torch.float32" in str(training_varlen.unsupported(*on_gpu(dtype=torch.float32)))
    assert "one head size" in str(training_varlen.unsupported(*on_gpu(16, 8)))
    assert "multiple of 8" in str(training_varlen.unsupported(*on_gpu(12, 12)))
    assert "up to 256" in str(training_varlen.unsupported(*on_gpu(264, 264)))
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    training_varlen._unavailable.cache_clear()
    assert "compute capability 8.0" in str(training_varlen.unsupported(*on_gpu()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    training_varlen._unavailable.cache_clear()
    assert training_varlen.unsupported(*on_gpu()) is None
    training_varlen._unavailable.cache_clear()
