"""Sliding windows, soft caps and sinks, and KV caches in other dtypes: each implementation of attention against the formula."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from groupwise.kernels.decode_attention import decode_kernel
from groupwise.models.attention import training, training_flex, training_padded
from groupwise.models.attention.attend import AttentionForm
from groupwise.models.attention.decoding_torch import StepLayout, attend_newest
from groupwise.models.attention.training import PackedAttention
from tests.conftest import need_kernels

SCALE = 0.3
WINDOWS, SOFTCAPS, SINKS = (0, 1, 6, 20, 1000), (0.0, 2.0), (False, True)
"""The prompts below have 5, 1, 40 tokens: windows end in the completion, in the prompt, and beyond it."""
FORMS = list(itertools.product(WINDOWS, SOFTCAPS, SINKS))
SHAPES = [(4, 4, 8), (2, 2, 16), (6, 2, 20), (3, 1, 64), (3, 3, 128)]
"""Query heads, how many share a key-value head, head size."""
FEW = [(0, 0.0, False), (6, 2.0, True), (20, 0.0, True), (1000, 2.0, False)]
CASES = [(SHAPES[2], *form) for form in FORMS] + [(shape, *form) for shape in SHAPES if shape != SHAPES[2] for form in FEW]
"""Every form at one shape, and a few at the others. In PyTorch the shape makes no difference."""
RAGGED = ([5, 1, 40], [2, 0, 0, 1, 2, 2], [7, 1, 33, 0, 20, 16])


def newest(query_HD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, form: AttentionForm) -> Tensor:
    """The output [H, D] of a sequence's last token.

    softmax(q k s) v, "Attention is all you need", section 3.2.1, over the window's tokens (Mistral 7B, section 2); scores
    c tanh(x / c) as in Gemma 2, section 2; a sink is one more logit in the softmax's denominator (gpt-oss, section 2.2).
    """
    H, T = len(query_HD), keys_KTD.shape[1]
    seen = slice(max(0, T - form.window) if form.window else 0, T)
    outputs = []
    for h in range(H):
        k = h // (H // len(keys_KTD))
        scores = SCALE * keys_KTD[k, seen] @ query_HD[h]
        if form.softcap:
            scores = form.softcap * torch.tanh(scores / form.softcap)
        if form.sinks_H is not None:
            scores = torch.cat([scores, form.sinks_H[h : h + 1]])
        outputs.append(scores.softmax(0)[: T - seen.start] @ values_KTD[k, seen])
    return torch.stack(outputs)


def packed(
    rows: tuple[list[int], list[int], list[int]], query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
) -> Tensor:
    prompts, group_ids, lengths = rows
    own = torch.split(torch.arange(len(query)), [*prompts, *lengths])
    before = [own[0][:0] for _ in prompts] + [own[p] for p in group_ids]
    outputs = []
    for prefix, row in zip(before, own, strict=True):
        for i, token in enumerate(row.tolist()):
            seen = torch.cat([prefix, row[: i + 1]])
            outputs.append(newest(query[token], key[seen].transpose(0, 1), value[seen].transpose(0, 1), form))
    return torch.stack(outputs)


Attention = Callable[..., Tensor]


@pytest.fixture(params=["kernel", "padded", "flex"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """(rows, query, key, value, form) -> output, by each of the implementations."""
    if request.param == "kernel":
        need_kernels()
        monkeypatch.setattr(training, "masked_attention", None)
        monkeypatch.setattr(training, "PaddedBlockAttention", None)

    device = "cuda" if request.param == "flex" and torch.cuda.is_available() else "cpu"
    if request.param == "flex" and device == "cpu":  # where PyTorch refuses the backward pass; uncompiled it is right
        torch._dynamo.reset()
        monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)

    def attend(rows: Any, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm) -> Tensor:
        prompts, group_ids, lengths = rows[0], *(torch.tensor(x, dtype=torch.long) for x in rows[1:])
        layout = PackedAttention(prompts, group_ids, lengths, device, kernels=request.param == "kernel")
        if request.param == "flex":
            query, key, value = (x.to(device) for x in (query, key, value))
            form = replace(form, sinks_H=None if form.sinks_H is None else form.sinks_H.to(device))
            return training_flex.attention(query, key, value, layout.block_mask(form.window), SCALE, form).cpu()
        return layout(3, query, key, value, SCALE, form)

    return attend


def random_form(window: int, softcap: float, sinks: bool, heads: int) -> AttentionForm:
    return AttentionForm(window=window, softcap=softcap, sinks_H=torch.randn(heads) if sinks else None)


@pytest.mark.parametrize(
    ("attention", "shape", "window", "softcap", "sinks"),
    [("kernel", *case) for case in CASES]
    + [("padded", *case) for case in CASES[: len(FORMS)]]
    + [("flex", (6, 2, 32), *form) for form in FORMS],
    indirect=["attention"],
)
def test_training_is_the_formula(
    attention: Attention, shape: tuple[int, int, int], window: int, softcap: float, sinks: bool
) -> None:
    heads, shared, size = shape
    N = sum(RAGGED[0] + RAGGED[2])
    inputs = [torch.randn(N, heads, size), *(torch.randn(N, heads // shared, size) for _ in range(2))]
    weights, form = torch.randn(N, heads, size), random_form(window, softcap, sinks, heads)
    found, expected = (
        gradients(f, dtype, inputs, form, weights) for f, dtype in ((attention, torch.float32), (packed, torch.float64))
    )
    assert len(found) == 4 + sinks
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-6 * max(1.0, float(other.abs().max())))


def gradients(attend: Attention, dtype: torch.dtype, inputs: list[Tensor], form: AttentionForm, weights: Tensor) -> list[Tensor]:
    """The output and its gradients in queries, keys, values, and the sinks if there are any."""
    leaves = [x.to(dtype).requires_grad_() for x in (*inputs, *([] if form.sinks_H is None else [form.sinks_H]))]
    form = AttentionForm(window=form.window, softcap=form.softcap, sinks_H=leaves[3] if len(leaves) == 4 else None)
    output = attend(RAGGED, *leaves[:3], form)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.mark.parametrize("window", [0, 20])
def test_a_strong_sink_takes_all_and_a_weak_one_nothing(attention: Attention, window: int) -> None:
    N = sum(RAGGED[0] + RAGGED[2])
    query, key, value = torch.randn(N, 2, 16), torch.randn(N, 1, 16), torch.randn(N, 1, 16)
    sinks_H = torch.tensor([200.0, -200.0])
    output = attention(RAGGED, query, key, value, AttentionForm(window=window, sinks_H=sinks_H))
    plain = attention(RAGGED, query, key, value, AttentionForm(window=window))
    assert output[:, 0].abs().max() < 1e-30
    torch.testing.assert_close(output[:, 1], plain[:, 1])


def test_far_scores_are_capped(attention: Attention) -> None:
    """Scores around 10,000 either way are equal under a cap of 1 but for their sign, and their gradients vanish."""
    rows: Any = ([2], [0, 0], [3, 1])
    key, query, value = torch.zeros(6, 1, 8), torch.zeros(6, 1, 8), torch.randn(6, 1, 8)
    key[:, 0, 0] = torch.tensor([4e4, 5e4, -5e4, 3e4, 6e4, -4e4])
    query[:, 0, 0] = 1
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = attention(rows, *leaves, AttentionForm(softcap=1.0))
    up, down = torch.tensor([1.0, -1.0]).exp().tolist()
    of_last_but_one = torch.tensor([up, up, down, up, up]) / (4 * up + down)
    torch.testing.assert_close(output[4, 0], of_last_but_one @ value[:5, 0])
    d_query, d_key, d_value = torch.autograd.grad(output.sum(), leaves)
    assert d_query.abs().max() == d_key.abs().max() == 0 and d_value.isfinite().all()


@pytest.mark.parametrize("window", [0, 50])
def test_training_is_the_same_bits_with_any_number_of_threads(window: int) -> None:
    need_kernels()
    rows = ([3, 30], [i % 2 for i in range(14)], [45] * 14)
    N = sum(rows[0] + rows[2])
    inputs = [*(torch.randn(N, heads, 16) for heads in (4, 2, 2)), torch.randn(4)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in inputs]
            layout = PackedAttention(rows[0], torch.tensor(rows[1]), torch.tensor(rows[2]), "cpu")
            output = layout(0, *leaves[:3], SCALE, AttentionForm(window=window, softcap=3.0, sinks_H=leaves[3]))
            found.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("scores", [1, 300, 5000])
def test_masked_attention_in_small_chunks(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_padded, "CHUNK_SCORES", scores)
    N = sum(RAGGED[0] + RAGGED[2])
    inputs = [torch.randn(N, 4, 8, dtype=torch.float64), *(torch.randn(N, 2, 8, dtype=torch.float64) for _ in range(2))]
    form = AttentionForm(window=12, softcap=2.0, sinks_H=torch.randn(4, dtype=torch.float64))
    layout = PackedAttention(RAGGED[0], *map(torch.tensor, RAGGED[1:]), "cpu")
    assert all(chunk.visible_RTS.numel() <= max(scores, 60) for chunk in layout.query_chunks(12).chunks)
    torch.testing.assert_close(layout(0, *inputs, SCALE, form), packed(RAGGED, *inputs, form), rtol=1e-12, atol=1e-12)


def test_masked_attention_in_bfloat16() -> None:
    N = sum(RAGGED[0] + RAGGED[2])
    inputs = [torch.randn(N, heads, 16).bfloat16() for heads in (4, 2, 2)]
    form = AttentionForm(window=12, softcap=2.0, sinks_H=torch.randn(4))
    layout = PackedAttention(RAGGED[0], *map(torch.tensor, RAGGED[1:]), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        output = layout(0, *inputs, SCALE, form)
    assert output.dtype == torch.bfloat16
    expected = packed(RAGGED, *(x.double() for x in inputs), AttentionForm(window=12, softcap=2.0, sinks_H=form.sinks_H.double()))  # type: ignore[union-attr]
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_layout_is_made_once_for_a_window_and_not_at_all_for_one_that_hides_nothing() -> None:
    layout = PackedAttention([3], torch.tensor([0]), torch.tensor([4]), "cpu", kernels=False)
    assert layout.block_mask(2) is layout.block_mask(2) and layout.query_chunks(2) is layout.query_chunks(2)
    inputs = [torch.randn(7, 1, 4) for _ in range(3)]
    assert torch.equal(layout(0, *inputs, SCALE, AttentionForm(window=7)), layout(0, *inputs, SCALE))
    assert layout._query_chunks.keys() == {2}


@dataclass
class Cached:
    """Three prompts of 1, 40 and 130 tokens with 21, 1 and 6 rows, in an order that is not theirs."""

    heads: int
    shared: int
    size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype

    def __post_init__(self) -> None:
        K, D = self.heads // self.shared, self.size
        self.lengths_P = torch.tensor([1, 40, 130])
        self.prompt_R = torch.tensor([0] * 21 + [1] + [2] * 6)[torch.randperm(28)]
        self.written_R = torch.randint(1, 30, (28,))
        self.order_R = self.prompt_R.argsort(stable=True)
        self.starts_P = torch.tensor([0, 21, 22, 28])
        self.prompt_keys, self.prompt_values = (torch.randn(4, K, 131, D).to(self.cache_dtype) for _ in range(2))
        self.row_cache = torch.randn(2, 30, K, 31, D).to(self.cache_dtype)
        self.query = torch.randn(28, self.heads, D).to(self.dtype)
        self.key, self.value = (torch.randn(28, K, D).to(self.dtype) for _ in range(2))

    def step(self, compiled: bool, form: AttentionForm) -> tuple[Tensor, Tensor]:
        """The outputs, and the cache of the rows thereafter."""
        row_cache, new = self.row_cache.clone(), (self.query, self.key, self.value)
        caches = row_cache, self.prompt_keys, self.prompt_values
        if not compiled:
            slot_R = torch.empty_like(self.prompt_R)
            slot_R[self.order_R] = torch.arange(28) - self.starts_P[self.prompt_R[self.order_R]]
            at = StepLayout(self.written_R, self.prompt_R, slot_R + 21 * self.prompt_R, self.lengths_P, 21, 30)
            return attend_newest(at, *caches, *new, SCALE, form), row_cache
        kernel = decode_kernel(self.size, self.dtype, self.cache_dtype)
        assert kernel is not None
        output = torch.empty_like(self.query)
        layout = self.written_R, self.lengths_P, self.prompt_R, self.order_R, self.starts_P
        sizes = self.heads, 30, 3, self.heads // self.shared, 31, 131, 21, form.window
        kernel(*new, output, form.sinks_H, *caches, *layout, SCALE, form.softcap, *sizes)
        return output, row_cache

    def expected(self, form: AttentionForm) -> Tensor:
        outputs = []
        wide = AttentionForm(
            window=form.window, softcap=form.softcap, sinks_H=None if form.sinks_H is None else form.sinks_H.double()
        )
        for row, (prompt, written) in enumerate(zip(self.prompt_R.tolist(), self.written_R.tolist(), strict=True)):
            keys, values = (
                torch.cat([of_prompt[prompt, :, : self.lengths_P[prompt]], of_row[row, :, : written - 1], new[row][:, None]], 1)
                for of_prompt, of_row, new in (
                    (self.prompt_keys, self.row_cache[0], self.key.to(self.cache_dtype)),
                    (self.prompt_values, self.row_cache[1], self.value.to(self.cache_dtype)),
                )
            )
            outputs.append(newest(self.query[row].double(), keys.double(), values.double(), wide))
        return torch.stack(outputs)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("compiled", "shape", "window", "softcap", "sinks"),
    [(True, *case) for case in CASES] + [(False, *case) for case in CASES[: len(FORMS)]],
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_decoding_step_is_the_formula(
    compiled: bool,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    window: int,
    softcap: float,
    sinks: bool,
) -> None:
    """With the keys and values as they are in the cache, so that only the output is rounded."""
    if compiled:
        need_kernels()
    cached, form = Cached(*shape, *dtypes), random_form(window, softcap, sinks, shape[0])
    output, row_cache = cached.step(compiled, form)
    tolerance = 1e-5 if dtypes[0] == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), cached.expected(form), rtol=tolerance, atol=tolerance)
    rows = torch.arange(28)
    for part, new in enumerate((cached.key, cached.value)):
        cached.row_cache[part, rows, :, cached.written_R - 1] = new.to(dtypes[1])
    assert torch.equal(row_cache, cached.row_cache), "the newest keys and values are written, and nothing else"


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_decoding_is_the_same_bits_with_any_number_of_threads(cache_dtype: torch.dtype) -> None:
    need_kernels()
    cached, form = Cached(4, 2, 64, torch.float32, cache_dtype), random_form(20, 3.0, True, 4)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cached.step(True, form)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_values_that_half_precision_rounds_oddly() -> None:
    """Ties, subnormal numbers, infinities and NaN go to the cache and back as PyTorch's conversions do."""
    need_kernels()
    values = torch.tensor([1.00048828125, 1.00146484375, 65519.0, 65520.0, -1e-7, 6e-8, 2.9e-8, 0.0, -0.0, torch.inf, torch.nan])
    for dtype in (torch.float16, torch.bfloat16):
        cached = Cached(1, 1, 64, torch.float32, dtype)
        cached.value[:] = values.repeat(6)[:64]
        row_cache = cached.step(True, AttentionForm())[1]
        found = row_cache[1, torch.arange(28), :, cached.written_R - 1]
        torch.testing.assert_close(found, cached.value.to(dtype), rtol=0, atol=0, equal_nan=True)
        cached.written_R[:] = 1
        cached.prompt_values[:] = 0
        cached.key[:] = 100 * cached.query  # nearly all weight on the newest token
        output = cached.step(True, AttentionForm(window=1))[0]
        torch.testing.assert_close(output, cached.value.to(dtype).float(), rtol=1e-6, atol=0, equal_nan=True)


def test_steps_of_any_form_need_no_synchronisation() -> None:
    """Or they could not be captured as a CUDA graph. With tensors that hold no numbers, whatever asks for one raises."""
    cached, form = Cached(4, 2, 16, torch.float32, torch.float16), random_form(20, 3.0, True, 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, value in list(vars(cached).items()):
            if isinstance(value, Tensor) and name not in ("order_R", "starts_P"):
                setattr(cached, name, mode.from_tensor(value))
        at = StepLayout(cached.written_R, cached.prompt_R, cached.prompt_R, cached.lengths_P, 21, 30)
        caches = cached.row_cache, cached.prompt_keys, cached.prompt_values
        fake = AttentionForm(window=form.window, softcap=form.softcap, sinks_H=mode.from_tensor(form.sinks_H))
        assert attend_newest(at, *caches, cached.query, cached.key, cached.value, SCALE, fake).shape == (28, 4, 16)


def test_dtypes_that_the_decoding_kernel_cannot_run_in() -> None:
    assert decode_kernel(16, torch.float16) is None
    assert decode_kernel(16, torch.bfloat16, torch.float16) is None
    assert decode_kernel(16, torch.float64) is None
