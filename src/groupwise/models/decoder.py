"""A Hugging Face decoder (a causal model without its output layer), and how its forward pass runs here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.models.attention.attend import Attend
from groupwise.models.attention.layers import LayerForward, layer_forwards, matches, trial_attention
from groupwise.models.attention.registry import attending, run_packed
from groupwise.models.attention.training import PackedAttention
from groupwise.models.backend import Backend
from groupwise.models.patches import Forwards, is_compiled

TRIAL_LENGTHS = {"cpu": (2, 4), "cuda": (100, 200)}
"""Tokens of a prompt and of a completion on trial: few, but on a GPU enough for flex attention to take its training kernels."""


class Decoder:
    """Runs packed sequences through a decoder's layers with our attention, where a trial has shown that it computes the same."""

    def __init__(self, module: Any, vocab_size: int, backend: Backend) -> None:
        self.module, self.vocab_size, self.backend = module, vocab_size, backend
        self.compiled = is_compiled(module)
        """Whether torch.compile must see its layers as they are, so that no kernel of ours replaces them."""
        self.reasons: dict[str, str] = {}
        """What does not run in the fastest way, and why."""
        self.linears: Forwards = ()
        """Forwards of linear layers that are patched in as well, while they run in bfloat16."""
        self.bf16_step = False
        """Whether a decoding step runs its matmuls in bfloat16."""
        self._layers: list[LayerForward] | None = None
        self._tried: tuple[torch.device, torch.dtype] | None = None
        self._packs = False

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def layers(self) -> list[LayerForward]:
        """Layers that run on our kernels, found by trial once."""
        if not (self.backend.layer_kernels and self.on_cpu) or self.compiled:
            return []
        if self._layers is None:
            with attending(self.module, trial_attention):
                self._layers, reasons = layer_forwards(self.module)
            if reasons:
                more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
                self.reasons["layers"] = reasons[0] + more
        return self._layers

    def forwards(self) -> Forwards:
        """The forwards to patch in while packed sequences run."""
        return [*((layer.module, layer.forward) for layer in self.layers() if layer.usable), *self.linears]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within: nothing is rounded to bfloat16, as trials need it, which may be held while a sampler decodes."""
        linears, self.linears = self.linears, ()
        try:
            yield
        finally:
            self.linears = linears

    def run_packed(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """The last hidden states [N, H] of packed tokens (int64 [N]) at their positions in their sequences (int64 [N])."""
        return run_packed(self.module, tokens_N, positions_N, attend, self.forwards())

    def packed_attention(self, prompt_lengths: list[int], group_ids_R: Tensor, lengths_R: Tensor) -> PackedAttention:
        """An `Attend` over prompts and completions; see there."""
        kernels = self.backend.attention_kernels
        return PackedAttention(prompt_lengths, group_ids_R, lengths_R, self.device, kernels=kernels)

    def packs(self) -> bool:
        """Whether packed sequences can run, tried against the decoder's own forward once per device and dtype."""
        if self._tried != (self.device, self.dtype):
            self._tried = (self.device, self.dtype)
            with self.exact():
                reason = self._why_not_packed()
                if reason is not None and self._layers:
                    # Each layer is right by itself, but the decoder may call it in another way than its trial did.
                    self._layers, self.reasons["layers"] = [], f"with our kernels, {reason}"
                    reason = self._why_not_packed()
            self._packs = reason is None
            if reason is not None:
                self.reasons["packed"] = reason
        return self._packs

    def _why_not_packed(self) -> str | None:
        if not self.backend.packed:
            return "the backend is set to padded batches"
        if self.device.type not in TRIAL_LENGTHS:
            return f"there is no packed attention for the device {self.device.type!r}"
        types = set(getattr(self.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if types != {"full_attention"}:
            return f"its layers are not all full attention: {', '.join(sorted(map(str, types)))}"
        return self._trial()

    @torch.inference_mode(False)  # tensors of inference mode have no gradients
    def _trial(self) -> str | None:
        """Why one prompt with one completion does not run packed as it does in one row; None if it does."""
        prompt, row = TRIAL_LENGTHS[self.device.type]
        tokens = torch.arange(prompt + row, device=self.device) % self.vocab_size
        attention = self.packed_attention([prompt], torch.tensor([0]), torch.tensor([row]))
        try:
            ours = self._output_and_gradient(lambda: self.run_packed(tokens, attention.positions_N, attention))
        except Exception as error:  # third-party forwards and GPU compilers may raise anything
            return f"packed sequences fail in it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        theirs = self._output_and_gradient(lambda: self.module(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
        if all(matches(one, other, tolerance_in(other.dtype)) for one, other in zip(ours, theirs, strict=True)):
            return None
        return "packed sequences give other hidden states than rows of their own"

    def _output_and_gradient(self, run: Any) -> list[Tensor]:
        """The output, and on a GPU the gradient of one parameter too: flex attention has a kernel of its own for it."""
        trained = [p for p in self.module.parameters() if p.requires_grad and self.tries_gradient()][:1]
        with torch.inference_mode(False), torch.set_grad_enabled(bool(trained)), torch.autocast(self.device.type, enabled=False):
            output = run()
            weighted = output.float() * torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
            return [output.detach(), *(torch.autograd.grad(weighted.sum(), trained) if trained else ())]

    def tries_gradient(self) -> bool:
        """Whether a trial includes the backward pass."""
        return not self.on_cpu


def tolerance_in(dtype: torch.dtype) -> float:
    """How near two ways of computing the same hidden states come in a dtype, relative to the largest."""
    return max(1e-3, 10 * torch.finfo(dtype).eps)
