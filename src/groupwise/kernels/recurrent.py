"""Linear recurrences (gated delta rule, Mamba2) and causal convolutions over packed sequences, and steps of one token.

PyTorch runs them on padded rows in chunks, as some dozen operations that each read and write tensors larger than the inputs.
Here (recurrence.cpp, recurrent.cpp) each head goes through its tokens one after another, with its state in the processor's cache,
which is also as exact as the formula itself. Everything here is float32 on the CPU.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.compiled import function, library

_CHUNK = 16
"""Tokens between the states that are kept for the backward pass; the same as in recurrence.cpp."""


@functools.cache
def recurrent_kernels() -> Any:
    """The functions of recurrent.cpp; None if it cannot be compiled."""
    loaded = library("recurrent")
    if loaded is None:
        return None
    counts = {"mamba2_step": (8, 0, 8), "convolve": (5, 0, 5), "convolve_backward": (8, 0, 5)}
    counts |= {"convolve_step": (5, 0, 5)}
    functions: dict[str, Callable[..., None]] = {name: function(loaded, name, *count) for name, count in counts.items()}
    return SimpleNamespace(**functions)


@functools.cache
def recurrence_kernels(value_size: int, delta: bool, per_row: bool) -> Any:
    """The functions of recurrence.cpp for values of so many elements a head; None if there are none, or no compiler.

    `delta`: for the delta rule; `per_row`: with a decay of each row of the state.
    """
    columns = next((columns for columns in (64, 32, 16, 8, 4) if value_size % columns == 0), None)
    if columns is None:
        return None
    loaded = library("recurrence", f"-DCOLUMNS={columns}", f"-DDELTA={int(delta)}", f"-DPER_ROW={int(per_row)}")
    if loaded is None:
        return None
    counts = {"recurrence": (12, 2, 8), "recurrence_backward": (15, 2, 8)}
    functions: dict[str, Callable[..., None]] = {name: function(loaded, name, *count) for name, count in counts.items()}
    return SimpleNamespace(**functions)


class PackedSequences:
    """P prompts and then R completions, packed without padding; a completion goes on where its prompt ends."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor) -> None:
        """`prompts_R`: the prompt of each completion; `lengths_R`: its tokens."""
        ends = torch.nn.functional.pad(torch.cat([prompt_lengths, lengths_R]).cumsum(0), (1, 0))
        P = len(prompt_lengths)
        self.prompts = _Sequences(ends[: P + 1].contiguous(), None)
        self.completions = _Sequences(ends[P:].contiguous(), prompts_R.contiguous())
        self._sources: dict[int, Tensor] = {}

    def sources(self, width: int) -> Tensor:
        """For each token the index of the token `width - 1` before it in its sequence, and so on up to itself; -1: none."""
        if width not in self._sources:
            first_N1 = self.prompts.of_token()[1]
            own_N1, start_N1 = self.completions.of_token()
            back_K = torch.arange(width - 1, -1, -1)
            of_prompts = self._back(self.prompts.tokens[:, None], first_N1, back_K)
            tokens = self.completions.tokens[:, None]
            beyond = back_K - (tokens - start_N1)  # so many tokens before the first one of the completion
            assert self.completions.initial_of is not None
            prompts_N1 = self.completions.initial_of[own_N1]
            of_prompt = self._back(self.prompts.ends[prompts_N1 + 1], self.prompts.ends[prompts_N1], beyond)
            of_completions = torch.where(beyond <= 0, tokens - back_K, of_prompt)
            self._sources[width] = torch.cat([of_prompts, of_completions]).contiguous()
        return self._sources[width]

    @staticmethod
    def _back(tokens: Tensor, first: Tensor, count: Tensor) -> Tensor:
        return torch.where(tokens - count >= first, tokens - count, -1)

    def last(self, width: int) -> Tensor:
        """For each prompt the indices of its last tokens, as `sources`."""
        return self._back(self.prompts.ends[1:, None], self.prompts.ends[:-1, None], torch.arange(width, 0, -1))


@dataclass(frozen=True)
class _Sequences:
    ends: Tensor
    """Where each begins, and where the last one ends, int64 [S + 1]."""
    initial_of: Tensor | None
    """The prompt whose last state each begins with, int64 [S]; None: they begin with zero."""

    @cached_property
    def chunks(self) -> Tensor:
        """The number of chunks before each sequence, and of all, int64 [S + 1]."""
        return torch.nn.functional.pad(((self.ends.diff() + _CHUNK - 1) // _CHUNK).cumsum(0), (1, 0))

    @property
    def tokens(self) -> Tensor:
        return torch.arange(int(self.ends[0]), int(self.ends[-1]))

    def of_token(self) -> tuple[Tensor, Tensor]:
        """The sequence of each token, and that sequence's first token, int64 [n, 1] each."""
        own_N1 = torch.repeat_interleave(torch.arange(len(self.ends) - 1), self.ends.diff())[:, None]
        return own_N1, self.ends[own_N1]


def recurrence(
    query_NKD: Tensor,
    key_NKD: Tensor,
    value_NHE: Tensor,
    log_decay: Tensor,
    beta_NH: Tensor,
    layout: PackedSequences,
    *,
    scale: float,
    epsilon: float,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a state S [D, E] for each of H heads; groups of H / K of them share queries and keys.

    For each token S = decay S, then S = S + key (beta u)^T, and the output is S^T query; u is the value, or with the delta rule
    what it differs from S^T key. (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks"; Dao and Gu 2024, "Mamba2".)

    Args:
        log_decay: [N, H], or [N, H, D] for a decay of each row of the state; at most 0.
        scale: what queries are multiplied with.
        epsilon: queries and keys are divided by sqrt(|x|^2 + epsilon); 0: they are not.
        delta: whether it is the delta rule.

    Returns:
        (output [N, H, E], the states after each prompt [P, H, D, E], without a gradient).
    """
    query_NKD, key_NKD, value_NHE = (_rows(x) for x in (query_NKD, key_NKD, value_NHE))
    settings = recurrence_kernels(value_NHE.shape[2], delta, log_decay.dim() == 3), scale, epsilon
    arguments = query_NKD, key_NKD, value_NHE, log_decay.contiguous(), beta_NH.contiguous()
    output, states = _Recurrence.apply(*arguments, layout, settings)  # type: ignore[no-untyped-call]
    return output, states


def recurrence_step(
    query_RKD: Tensor,
    key_RKD: Tensor,
    value_RHE: Tensor,
    log_decay: Tensor,
    beta_RH: Tensor,
    state_RHDE: Tensor,
    *,
    scale: float,
    epsilon: float,
    delta: bool,
) -> Tensor:
    """One token of each row, as `recurrence`; returns its output [R, H, E] and replaces the (contiguous) state in place."""
    R = len(query_RKD)
    arguments = *(_rows(x) for x in (query_RKD, key_RKD, value_RHE)), log_decay.contiguous(), beta_RH.contiguous()
    output = value_RHE.new_empty(value_RHE.shape)
    pointers = torch.arange(R + 1), None, state_RHDE, state_RHDE, None, None
    kernels = recurrence_kernels(value_RHE.shape[2], delta, log_decay.dim() == 3)
    kernels.recurrence(*arguments, output, *pointers, *_numbers(arguments, R, scale, epsilon))
    return output


def _rows(x: Tensor) -> Tensor:
    """The same tensor [N, H, D], its heads side by side; tokens may be strided, as in a slice of a fused projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _numbers(inputs: Sequence[Tensor], sequences: int, scale: float, epsilon: float) -> tuple[float, ...]:
    """What the C++ functions take after the pointers; `inputs` begin with queries, keys and values."""
    query, key, value = inputs[:3]
    sizes = sequences, *key.shape[1:2], value.shape[1], key.shape[2], value.shape[2]
    strides = query.stride(0), key.stride(0), value.stride(0)
    return scale, epsilon, *sizes, *strides


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        layout: PackedSequences,
        settings: tuple[Any, float, float],
    ) -> tuple[Tensor, Tensor]:
        inputs, (kernels, scale, epsilon) = (query, key, value, log_decay, beta), settings
        training = any(ctx.needs_input_grad)
        output, kept, initial = value.new_empty(value.shape), [], None
        for part in (layout.prompts, layout.completions):
            state_shape = value.shape[1], key.shape[2], value.shape[2]
            states = value.new_empty(len(part.ends) - 1, *state_shape)
            before = value.new_empty(int(part.chunks[-1]) if training else 0, *state_shape)
            pointers = part.ends, part.initial_of, initial, states, before if training else None, part.chunks
            kernels.recurrence(*inputs, output, *pointers, *_numbers(inputs, len(states), scale, epsilon))
            kept.append(before)
            initial = states if initial is None else initial
        assert initial is not None
        ctx.save_for_backward(*inputs, *kept)
        ctx.layout, ctx.settings = layout, settings
        ctx.mark_non_differentiable(initial)
        return output, initial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, of_prompts, of_completions = ctx.saved_tensors
        layout, (kernels, scale, epsilon), d_output = ctx.layout, ctx.settings, d_output.contiguous()
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]]
        gradients += [torch.zeros_like(x) for x in inputs[3:]]
        d_states = d_output.new_zeros(len(layout.prompts.ends) - 1, *of_prompts.shape[1:])
        for part, kept in ((layout.completions, of_completions), (layout.prompts, of_prompts)):
            of_part = d_states if part is layout.prompts else d_states.new_zeros(len(part.ends) - 1, *d_states.shape[1:])
            pointers = kept, part.chunks, part.ends, of_part
            numbers = _numbers(inputs, len(of_part), scale, epsilon)
            kernels.recurrence_backward(d_output, *inputs, *pointers, *gradients, *numbers)
            if part.initial_of is not None:
                d_states.index_add_(0, part.initial_of, of_part)
        return *gradients, None, None


def mamba2_step(
    x_RHP: Tensor, dt_RH: Tensor, A_H: Tensor, B_RGN: Tensor, C_RGN: Tensor, D_H: Tensor | None, state_RHPN: Tensor
) -> Tensor:
    """One token of Mamba2 for each row: S = e^(dt A) S + dt x B^T, and the output S C + D x [R, H, P]; S is replaced in place."""
    x_RHP, B_RGN, C_RGN, dt_RH = _rows(x_RHP), _rows(B_RGN), _rows(C_RGN), dt_RH.contiguous()
    output = x_RHP.new_empty(x_RHP.shape)
    sizes = *x_RHP.shape[:2], B_RGN.shape[1], x_RHP.shape[2], B_RGN.shape[2], *(x.stride(0) for x in (x_RHP, B_RGN, C_RGN))
    skip = None if D_H is None else D_H.contiguous()
    recurrent_kernels().mamba2_step(state_RHPN, x_RHP, dt_RH, dt_RH * A_H, B_RGN, C_RGN, skip, output, *sizes)
    return output


def convolve(x_NC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, layout: PackedSequences, *, silu: bool) -> Tensor:
    """A depthwise causal convolution over packed sequences, with silu or without, [N, C]."""
    x_NC = x_NC if x_NC.stride(1) == 1 else x_NC.contiguous()
    output: Tensor = _Convolution.apply(x_NC, weight_CK, bias_C, layout.sources(weight_CK.shape[1]), silu)  # type: ignore[no-untyped-call]
    return output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CK: Tensor, bias: Tensor | None, sources: Tensor, silu: bool) -> Tensor:
        weight_KC, output = weight_CK.t().contiguous(), x.new_empty(x.shape)
        recurrent_kernels().convolve(x, weight_KC, bias, sources, output, int(silu), *sources.shape, x.shape[1], x.stride(0))
        ctx.save_for_backward(x, weight_KC, bias, sources)
        ctx.silu = silu
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_KC, bias, sources = ctx.saved_tensors
        d_x, d_weight = x.new_zeros(x.shape), torch.zeros_like(weight_KC)
        d_bias = None if bias is None else torch.zeros_like(bias)
        numbers = int(ctx.silu), *sources.shape, x.shape[1], x.stride(0)
        recurrent_kernels().convolve_backward(d_output.contiguous(), x, weight_KC, bias, sources, d_x, d_weight, d_bias, *numbers)
        return d_x, d_weight.t(), d_bias, None, None


def convolve_step(x_RC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, state_RCK: Tensor, *, silu: bool) -> Tensor:
    """One token of a causal convolution for each row, [R, C]; the last K inputs in the (contiguous) state are moved in place."""
    x_RC = x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()
    output = x_RC.new_empty(x_RC.shape)
    sizes = *state_RCK.shape, x_RC.stride(0)
    recurrent_kernels().convolve_step(state_RCK, x_RC, weight_CK.contiguous(), bias_C, output, int(silu), *sizes)
    return output
