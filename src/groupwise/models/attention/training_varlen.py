"""Attention over packed sequences on a GPU in bfloat16 and float16: FlashAttention over sequences of different lengths.

All sequences run in one kernel call, without a mask and without compiling anything. The keys and values of a completion's prompt
are copied in front of its own; in the backward pass their gradients are summed over the copies in float32. The kernels are those
behind `torch.nn.attention.varlen.varlen_attn`, called directly so that the copies are not kept for the backward pass, and because
before PyTorch 2.12 that function does not say whether query heads may share a key-value head, which the kernels allow.
"""

import functools
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.models.attention.attend import PLAIN, AttentionForm

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
"""The largest head size of FlashAttention."""
OLDEST = (8, 0)
"""The compute capability from which on FlashAttention 2 runs."""


def unsupported(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, form: AttentionForm = PLAIN) -> str | None:
    """Why `attention` cannot run on these tensors, which must have one dtype; None if it can."""
    if query_NHD.device.type != "cuda":
        return f"FlashAttention runs on a GPU, not on {query_NHD.device.type}"
    if query_NHD.dtype not in DTYPES:
        return f"FlashAttention needs bfloat16 or float16, not {query_NHD.dtype}"
    if form.softcap or form.sinks_H is not None:
        return "PyTorch's FlashAttention has neither a soft cap nor sinks"
    size = query_NHD.shape[2]
    if key_NKD.shape != value_NKD.shape or key_NKD.shape[2] != size:
        return f"FlashAttention needs one head size, not {size}, {key_NKD.shape[2]} and {value_NKD.shape[2]}"
    if size % 8 or size > LARGEST_HEAD:
        return f"FlashAttention needs a head size that is a multiple of 8, up to {LARGEST_HEAD}, not {size}"
    return _unavailable(query_NHD.device)


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a CUDA device at all; None if they can."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no FlashAttention"
    if torch.cuda.get_device_capability(device) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"FlashAttention needs compute capability {oldest}, which {torch.cuda.get_device_name(device)} does not have"
    for kernel in (_flash, _flash_backward):
        arguments = {argument.name for argument in kernel.default._schema.arguments}
        if missing := {"scale", "window_size_left", "window_size_right"} - arguments:
            return f"FlashAttention of PyTorch {torch.__version__} does not take {', '.join(sorted(missing))}"
    return None


class VarlenLayout:
    """The layout as FlashAttention reads it: S sequences, each a prompt, or a completion behind a copy of its prompt.

    Completions without a token are in no sequence.
    """

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """Arguments as of `kernels.packed_attention.PackedRows`."""
        ends_P = prompt_lengths.cumsum(0)
        queries_S = torch.cat([prompt_lengths, lengths_R])
        first_S = queries_S.cumsum(0) - queries_S
        prefix_S = torch.cat([torch.zeros_like(prompt_lengths), prompt_lengths[prompts_R]])
        prompt_S = torch.cat([torch.zeros_like(prompt_lengths), (ends_P - prompt_lengths)[prompts_R]])
        kept_S = queries_S > 0
        queries_S, first_S, prefix_S, prompt_S = (x[kept_S] for x in (queries_S, first_S, prefix_S, prompt_S))
        keys_S = prefix_S + queries_S
        ends_S = keys_S.cumsum(0)
        first, prefix, prompt, start = (x.repeat_interleave(keys_S) for x in (first_S, prefix_S, prompt_S, ends_S - keys_S))
        position_M = torch.arange(int(keys_S.sum())) - start
        index_M = torch.where(position_M < prefix, prompt + position_M, first + position_M - prefix)
        self._copies_N = torch.bincount(index_M, minlength=int(queries_S.sum()))
        self.index_M = index_M.to(device)
        """The packed token of each key."""
        self.queries, self.keys = _boundaries(queries_S).to(device), _boundaries(keys_S).to(device)
        """Where each sequence's queries and keys begin, and the last one's end, int32 [S + 1]."""
        self.max_queries, self.max_keys = int(queries_S.max()), int(keys_S.max())

    def gather(self, x_NKD: Tensor) -> Tensor:
        """Keys or values of the packed tokens, once for each sequence that reads them, [M, K, D]."""
        return x_NKD.index_select(0, self.index_M)

    def sum_copies(self, x_MKD: Tensor) -> Tensor:
        """Gradients of the gathered keys or values, summed for each packed token, [N, K, D]; the same every time."""
        order_M, starts_N = self._bags
        sums = torch.nn.functional.embedding_bag(order_M, x_MKD.flatten(1), starts_N, mode="sum")
        return sums.view(-1, *x_MKD.shape[1:])

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """The keys sorted by packed token, and where each token's begin."""
        starts_N = self._copies_N.cumsum(0) - self._copies_N
        return self.index_M.argsort(stable=True), starts_N.to(self.index_M.device)


def attention(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, layout: VarlenLayout, scale: float, window: int = 0
) -> Tensor:
    """The attention output of each token, [N, H, D]; differentiable. `unsupported` must return None for these tensors.

    `window`: a token sees the last so many tokens of its sequence, itself included; 0: all.
    """
    output: Tensor = _Attention.apply(query_NHD, key_NKD, value_NKD, layout, scale, window)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float, window: int) -> Tensor:
        output, log_sum_exp, *random, _ = _flash(
            query, layout.gather(key), layout.gather(value), *_sequences(layout, window), False, **_limits(scale, window)
        )
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *random)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp, *random = ctx.saved_tensors
        layout: VarlenLayout = ctx.layout
        gathered = layout.gather(key), layout.gather(value)
        sequences, limits = _sequences(layout, ctx.window), _limits(ctx.scale, ctx.window)
        d_query, d_key, d_value = _flash_backward(
            gradient.contiguous(), query, *gathered, output, log_sum_exp, *sequences, *random, **limits
        )
        return d_query, layout.sum_copies(d_key), layout.sum_copies(d_value), None, None, None


def _sequences(layout: VarlenLayout, window: int) -> tuple[Any, ...]:
    """Boundaries and lengths of the sequences, no dropout, and whether all tokens before a token are seen."""
    return layout.queries, layout.keys, layout.max_queries, layout.max_keys, 0.0, window == 0


def _limits(scale: float, window: int) -> dict[str, Any]:
    """The scale, and how far before and after itself a token sees; -1: without limit."""
    return {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}


def _boundaries(lengths_S: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)
