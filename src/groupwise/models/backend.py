"""Which code runs a model's forward and backward passes, as a value that a person can set and see."""

from dataclasses import dataclass

from groupwise.errors import UserError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What may be used; what cannot be on this machine or for this model falls back to the next simpler way, with a reason."""

    strict: bool = False
    """Refuse a model whose attention cannot run on packed sequences in C++, instead of falling back."""
    packed: bool = True
    """Sequences are concatenated without padding, and each prompt is run once for its group. Otherwise padded batches go
    through transformers' own attention."""
    attention_kernels: bool = True
    """Attention in C++ on a CPU; otherwise in PyTorch."""
    layer_kernels: bool = True
    """RMSNorm, RoPE, SwiGLU and recurrent layers in C++ on a CPU, and PyTorch's fused RMSNorm on a GPU; otherwise as transformers
    has them."""
    one_call_step: bool = True
    """A decoding step through all layers in one C++ call on a CPU; otherwise layer by layer."""
    blocked_weights: bool = True
    """While decoding on a CPU, linear layers run on copies of their weights in a blocked layout."""
    sampling_kernel: bool = True
    """The next token is drawn in C++ on a CPU; otherwise in PyTorch."""


_IN_PYTORCH = {
    "attention_kernels": False,
    "layer_kernels": False,
    "one_call_step": False,
    "blocked_weights": False,
    "sampling_kernel": False,
}
BACKENDS = {
    "auto": Backend(),
    "kernels": Backend(strict=True),
    "torch": Backend(**_IN_PYTORCH),
    "transformers": Backend(packed=False, **_IN_PYTORCH),
}
"""The values of `model.backend` in a recipe."""


def backend_of(choice: str | Backend) -> Backend:
    """The backend that a name means, or the given one.

    Raises:
        UserError: there is no backend of that name.
    """
    if isinstance(choice, Backend):
        return choice
    if choice not in BACKENDS:
        raise UserError(f"there is no backend {choice!r}{nearest(choice, BACKENDS)}")
    return BACKENDS[choice]
