"""A recurrent layer's own forward, with functions of ours in place of transformers' convolutions and recurrences.

A layer's forward calls them by name. It is run with globals of its own, in which the names stand for ours: neither transformers
nor the module is changed, and whoever else calls the layer gets what was there. Ours in turn call what was there where the C++
kernels do not serve (other dtypes, other devices, a trial with another result), except that a step of Mamba2 clamps its time step
as the scan over many tokens does.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from groupwise.kernels.recurrent import (
    PackedSequences,
    convolve,
    convolve_step,
    mamba2_step,
    recurrence,
    recurrence_kernels,
    recurrence_step,
)

Original = Callable[..., Any]


class KernelForward:
    """The forward of one layer: (hidden states [R, T, H], `cache_params=` or `past_key_values=` with the layer's states)."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kernels = False
        """Whether C++ kernels may run."""
        self.layout: PackedSequences | None = None
        """Of the packed sequences that are under way."""
        own = inspect.unwrap(type(module).forward)
        self._globals: dict[str, Any] = own.__globals__
        # Hooks of accelerate on a convolution are called by a decorator of the forward.
        hooked = any(hasattr(child, "_hf_hook") for child in module.children())
        self._originals = {} if hooked else {name: self._globals[name] for name in _FUNCTIONS if name in self._globals}
        ours = {name: partial(_FUNCTIONS[name], self, original) for name, original in self._originals.items()}
        self._own = FunctionType(own.__code__, {**self._globals, **ours}, own.__name__, own.__defaults__, own.__closure__)
        self._own.__kwdefaults__ = own.__kwdefaults__

    @property
    def intact(self) -> bool:
        """Whether transformers' functions are those that ours stand in for: somebody may have put others there since."""
        found = self._originals
        return bool(found) and all(self._globals.get(name) is original for name, original in found.items())

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.intact:
            return self._own(self.module, *arguments, **named)
        return type(self.module).forward(self.module, *arguments, **named)

    @contextmanager
    def running(self, *, kernels: bool, layout: PackedSequences | None = None) -> Iterator[None]:
        """Within: calls may use kernels, and run the sequences of `layout`, packed as one row."""
        before = self.kernels, self.layout
        self.kernels, self.layout = kernels, layout
        try:
            yield
        finally:
            self.kernels, self.layout = before

    def steps(self, *tensors: Tensor | None) -> bool:
        """Whether a step of these tensors runs on kernels."""
        given = [x for x in tensors if x is not None]
        return self.kernels and not torch.is_grad_enabled() and all(map(fits, given))


def fits(x: Tensor) -> bool:
    """Whether kernels take the tensor."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check(*tensors: Tensor | None) -> None:
    if not all(fits(x) for x in tensors if x is not None):
        raise TypeError("recurrent kernels take float32 on the CPU")


def _need_kernel(size: int, *, delta: bool, per_row: bool) -> None:
    if not recurrence_kernels(size, delta, per_row):
        raise NotImplementedError(f"there is no kernel for heads of {size}, or it does not compile")


def _silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"a convolution with {activation}")
    return activation is not None


def _convolution(
    at: KernelForward,
    original: Original,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **more: Any,
) -> Tensor:
    if at.layout is None:
        output: Tensor = original(hidden_states, weight, bias, activation=activation, **more)
        return output
    _check(hidden_states, weight, bias)
    return convolve(hidden_states[0].t(), weight, bias, at.layout, silu=_silu(activation)).t()[None]


def _convolution_step(
    at: KernelForward,
    original: Original,
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    narrow = conv_state.shape[-1] == weight.shape[-1] and hidden_states.shape[-1] == 1
    if not (narrow and at.steps(hidden_states, weight, bias, conv_state) and conv_state.is_contiguous()):
        output: Tensor = original(hidden_states, conv_state, weight, bias, activation)
        return output
    return convolve_step(hidden_states[..., 0], weight, bias, conv_state, silu=_silu(activation))[..., None]


def _delta_rule(
    at: KernelForward,
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **more: Any,
) -> Any:
    """The gated delta rule, and Kimi's, whose decays are of each row of the state."""
    if at.layout is None:
        return original(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **more)
    _need_kernel(value.shape[3], delta=True, per_row=g.dim() == 4)
    _check(query, key, value, g, beta)
    form: dict[str, Any] = {"scale": key.shape[3] ** -0.5, "epsilon": 1e-6 if use_qk_l2norm_in_kernel else 0.0, "delta": True}
    output, states = recurrence(query[0], key[0], value[0], g[0], beta[0], at.layout, **form)
    return output[None], states


def _delta_rule_step(
    at: KernelForward,
    original: Original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **more: Any,
) -> Any:
    fitting = at.steps(query, key, value, g, beta, initial_state) and initial_state.is_contiguous() and query.shape[1] == 1
    if not (fitting and recurrence_kernels(value.shape[3], True, g.dim() == 4)):
        named = {"g": g, "beta": beta, "initial_state": initial_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return original(query, key, value, **named, **more)
    form: dict[str, Any] = {"scale": key.shape[3] ** -0.5, "epsilon": 1e-6 if use_qk_l2norm_in_kernel else 0.0, "delta": True}
    output = recurrence_step(query[:, 0], key[:, 0], value[:, 0], g[:, 0], beta[:, 0], initial_state, **form)
    return output[:, None], initial_state


def _mamba2(
    at: KernelForward,
    original: Original,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **more: Any,
) -> Any:
    if at.layout is None:
        named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        return original(hidden_states, dt, A, B, C, chunk_size, **named, **more)
    _need_kernel(hidden_states.shape[3], delta=False, per_row=False)
    _check(hidden_states, dt, A, B, C, D, dt_bias)
    dt = _time_step(dt, dt_bias, dt_softplus, dt_limit)
    inputs = C[0], B[0], hidden_states[0], (dt * A)[0], dt[0]
    output, states = recurrence(*inputs, at.layout, scale=1.0, epsilon=0.0, delta=False)
    if D is not None:
        output = torch.addcmul(output, hidden_states[0], D[:, None])
    return output[None], states.transpose(2, 3).contiguous()


def _mamba2_step(
    at: KernelForward,
    original: Original,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **more: Any,
) -> Tensor:
    # transformers clamps in the scan only.
    limits = getattr(at.module, "time_step_limit", (0.0, float("inf")))
    if not at.steps(state, hidden_states, dt, A, B, C, D, dt_bias) or not state.is_contiguous():
        dt = _time_step(dt, dt_bias, dt_softplus, limits)
        output: Tensor = original(state, hidden_states, dt, A, B, C, D, z=z, dt_softplus=False, **more)
        return output
    # Time steps, A and D are the same in all of a head.
    dt_RH = _time_step(dt[..., 0], None if dt_bias is None else dt_bias[..., 0], dt_softplus, limits)
    output = mamba2_step(hidden_states, dt_RH, A[:, 0, 0], B, C, None if D is None else D[:, 0], state)
    return output if z is None else output * torch.nn.functional.silu(z)


def _time_step(dt: Tensor, bias: Tensor | None, positive: bool, limits: tuple[float, float]) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return torch.clamp(softplus(dt) if positive else dt, *limits)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _delta_rule_step,
    "chunk_kimi_delta_attention": _delta_rule,
    "recurrent_kimi_delta_attention": _delta_rule_step,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_selective_state_update": _mamba2_step,
}
"""What transformers calls them, in every model that has them."""
