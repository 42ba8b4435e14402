"""LanguageModel: the one owner of a Hugging Face causal language model, its output layer, its backends and every patch on it."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.errors import UserError
from groupwise.kernels.compiled import unavailable
from groupwise.kernels.decode_attention import decode_kernel
from groupwise.kernels.sample import sample_kernel
from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.attention.decoding_step import PlanFinder
from groupwise.models.attention.layers import head_size, matches
from groupwise.models.backend import Backend, backend_of
from groupwise.models.bfloat16 import Bfloat16, rounded_weights
from groupwise.models.blocked_weights import BlockedWeights, blocked_forwards
from groupwise.models.decoder import Decoder, tolerance_in
from groupwise.models.gradients import gradients_in_place
from groupwise.models.head import logits, token_logprobs
from groupwise.models.hidden import checkpointing as checkpointed
from groupwise.models.hidden import completion_hidden, inside_rows
from groupwise.models.loading import load_module
from groupwise.models.padded import PaddedCache
from groupwise.models.patches import is_observed
from groupwise.types import Batch

ROWS_SHARE = 0.6
"""Share of a GPU's free memory for the KV cache of completions; the rest is for that of prompts, and for activations."""


class LanguageModel:
    """A Hugging Face causal language model, and how it runs here.

    Nothing outside this package touches the module. It is patched only inside `running()`, inside `blocked_weights()` and during
    packed forward passes, and restored afterwards.
    """

    def __init__(self, module: Any, backend: str | Backend = "auto") -> None:
        """Take over a module.

        Args:
            module: a transformers causal language model, or a peft model around one.
            backend: "auto", "kernels", "torch", "transformers", or a `Backend`; a recipe's `model.backend`.

        Raises:
            UserError: hooks, a replaced forward or torch.compile on the module would be bypassed, or the backend is strict and
                cannot be used.
        """
        self.module = _causal_model(module)
        self.outer = module
        """What was given: the module, or a peft model around it."""
        self.decoder = Decoder(self.module.base_model, self.config.vocab_size, backend_of(backend))
        self._plans = PlanFinder(self.decoder)
        self._decoding: dict[tuple[torch.device, torch.dtype], str | None] = {}
        self.bfloat16 = Bfloat16(self.decoder)
        if self.backend.strict and (reason := self.fallback()):
            raise UserError(f"model.backend = 'kernels': {reason}")

    @classmethod
    def load(
        cls, path: str, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", backend: str = "auto"
    ) -> "LanguageModel":
        """The model at `path`: a shipped one, a local directory, or a Hugging Face id.

        Raises:
            UserError: there is no such model, it cannot be loaded, or its output layer is of an unknown kind.
        """
        model = cls(load_module(path, dtype).to(device), backend)
        model.check_logits()
        return model

    # --- what it is

    @property
    def backend(self) -> Backend:
        """What may run it; set when the model is made."""
        return self.decoder.backend

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def config(self) -> Any:
        """The transformers configuration of the text model."""
        return self.module.config.get_text_config()

    @property
    def name(self) -> str:
        """The class of the module, as transformers calls it."""
        return type(self.module).__name__

    def parameters(self) -> Iterable[Tensor]:
        """All parameters; the trainable ones require gradients."""
        parameters: Iterable[Tensor] = self.module.parameters()
        return parameters

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def end_tokens(self, tokenizer: Any) -> set[int]:
        """Tokens that end a completion: the tokenizer's, and those of the generation settings; chat models may have several."""
        configured = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return {tokenizer.eos_token_id, *(token for token in more if token is not None)}

    @torch.no_grad()
    def check_logits(self) -> None:
        """Refuse a model whose logits are not made from its last hidden states in a way that `logits` knows.

        Raises:
            UserError: they are not.
        """
        tokens = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        theirs = self.module(input_ids=tokens, use_cache=False).logits.float()
        ours = logits(self.module, self.decoder.module(input_ids=tokens, use_cache=False).last_hidden_state)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
            raise UserError(f"{self.name} turns hidden states into logits in a way that groupwise does not know")

    # --- forward passes

    def completion_hidden(self, batch: Batch, share_prompts: bool) -> Tensor:
        """The last hidden states [N, H] that predict the completion tokens, row after row, without padding."""
        return completion_hidden(self.decoder, batch, share_prompts)

    def completion_logprobs(
        self, batch: Batch, *, temperature: float = 1.0, share_prompts: bool = True, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The log-probability of each completion token, and the entropy of the distribution it was drawn from.

        Args:
            batch: the rows.
            temperature: logits are divided by it, as the sampler's were.
            share_prompts: run each prompt once, its gradient flowing from every completion, instead of once per row.
            entropy_gradient: whether the entropy is differentiable.

        Returns:
            (logprobs_BT, entropy_BT), float32, in nats; 0 after a row's end.
        """
        hidden_NH = self.completion_hidden(batch, share_prompts)
        inside_BT = inside_rows(batch)
        targets_N = batch.tokens_BT[inside_BT]
        copies = self.bfloat16.copies
        logprobs_N, entropy_N = token_logprobs(self.module, hidden_NH, targets_N, temperature, entropy_gradient, copies)
        zeros_BT = torch.zeros(batch.tokens_BT.shape, device=logprobs_N.device)
        return zeros_BT.masked_scatter(inside_BT, logprobs_N), zeros_BT.masked_scatter(inside_BT, entropy_N)

    def logits(self, hidden_RH: Tensor, temperature: float = 1.0) -> Tensor:
        """The logits over the temperature [R, V], in float32 or wider."""
        return logits(self.module, hidden_RH, temperature)

    @contextmanager
    def running(self, *, precision: str = "float32", checkpointing: bool = False) -> Iterator[None]:
        """Within: forward passes as the learner runs them.

        Args:
            precision: "bfloat16" runs matmuls in it; weights and gradients keep their dtype. Without our kernels
                (`bfloat16.why_not`), through torch.autocast, which runs attention in it too.
            checkpointing: keep only each layer's input for the backward pass and compute the rest again.

        With gradients enabled, those of the vocabulary's matrices are added to `parameter.grad` in place.
        """
        training, bf16 = torch.is_grad_enabled(), precision == "bfloat16"
        ours = bf16 and self.bfloat16.why_not() is None
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16 and not ours),
            self.bfloat16.running() if ours else nullcontext(),
            gradients_in_place(self.module) if training else nullcontext(),
            checkpointed(self.decoder) if training and checkpointing else nullcontext(),
        ):
            yield

    # --- decoding

    def in_dtype(self, dtype: torch.dtype | None) -> "LanguageModel":
        """For generating in another dtype: in bfloat16, where our kernels can, a view of the same float32 weights, of which
        each rollout makes rounded copies; else a copy of the model."""
        if dtype in (None, self.dtype):
            return self
        if dtype != torch.bfloat16 or self.bfloat16.why_not() is not None:
            return self.copy(dtype)
        view = LanguageModel(self.outer, self.backend)
        view.decoder.bf16_step = True
        return view

    def blocked_weights(self) -> BlockedWeights:
        """A context, to be entered for each decoding step, in which linear layers run on blocked copies of today's weights."""
        if not (self.backend.blocked_weights and self.decoder.on_cpu):
            return BlockedWeights([])
        if self.decoder.bf16_step:
            return BlockedWeights(*rounded_weights(self.decoder, self.module.get_output_embeddings()))
        only_head = self.decoder.compiled or (self.decoder.packs() and self._plans.find() is not None)
        head = [self.module.get_output_embeddings()]
        # torch.compile must see the original forwards, and a step in one call has blocked copies of its own.
        return BlockedWeights(list(blocked_forwards(head if only_head else list(self.module.modules()))))

    def decoding_cache(
        self, prompts: int, prompt_length: int, rows: int, tokens: int, *, fixed: bool | None = None
    ) -> DecodingCache | PaddedCache:
        """An empty KV cache for so many prompts of up to `prompt_length` tokens, and so many rows of up to `tokens` tokens.

        `fixed`: run steps of a few fixed sizes, which a GPU captures as graphs; left out: on a GPU.
        """
        if not (self.decoder.packs() and self.why_not_decoding() is None):
            return PaddedCache(self.decoder.module)
        fixed = not self.decoder.on_cpu if fixed is None else fixed
        return DecodingCache(self.decoder, self._plans, prompts, prompt_length, rows, tokens, fixed=fixed)

    def why_not_decoding(self) -> str | None:
        """Why this model cannot decode with a `DecodingCache` although it packs, or None; tried once on a GPU."""
        if self.decoder.on_cpu:
            return None
        key = (self.device, self.dtype)
        if key not in self._decoding:
            self._decoding[key] = self.decoding_trial(fixed=True)
        return self._decoding[key]

    @torch.inference_mode()
    def decoding_trial(self, *, fixed: bool) -> str | None:
        """Check decoding against full forward passes: two prompts with two rows each, one of which leaves after the first step.

        Returns the reason for a failure, or None.
        """
        prompts = [torch.arange(n, device=self.device) % self.config.vocab_size for n in (3, 5)]
        tokens_R = prompts[1][:4]
        try:
            cache = DecodingCache(self.decoder, self._plans, 2, 5, 4, 2, fixed=fixed)
            cache.prefill(prompts, [2, 2])
            cache.step(tokens_R)
            order_R = cache.keep(torch.tensor([False, True, True, True], device=self.device))
            ours = cache.step(tokens_R[order_R])
        except Exception as error:  # third-party forwards and GPU drivers may raise anything
            return f"decoding steps fail in it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for hidden, row in zip(ours, order_R.tolist(), strict=True):
            tokens = torch.cat([prompts[row // 2], tokens_R[row].repeat(2)])
            theirs = self.decoder.module(input_ids=tokens[None], use_cache=False).last_hidden_state[0, -1]
            if not matches(hidden, theirs, tolerance_in(theirs.dtype)):
                return "decoding steps and full forward passes give different hidden states"
        return None

    def affordable_rows(self, tokens: int) -> float:
        """The most completions of so many tokens whose KV cache fits `ROWS_SHARE` of a GPU's free memory; else no limit."""
        if self.device.type != "cuda":
            return math.inf
        config = self.decoder.config
        reserved = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + reserved
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        row_bytes = 2 * config.num_hidden_layers * heads * head_size(config) * tokens * self.dtype.itemsize
        return ROWS_SHARE * float(free / row_bytes)

    def sampling_kernel(self) -> Any:
        """A function (logits [R, V], uniforms [R]) -> (tokens, log-probabilities) in C++; None to do it in PyTorch."""
        return sample_kernel() if self.backend.sampling_kernel and self.decoder.on_cpu else None

    # --- backends, for people

    def fallback(self, decoding_dtype: torch.dtype | None = None) -> str | None:
        """The first fallback that slows this model down, with its reason; None if there is none.

        `decoding_dtype`: the sampler's, if it differs from the model's.
        """
        wanted = decoding_dtype or self.dtype
        where = f"{self.name} on {self.device}"
        if not self.decoder.packs():
            return f"{where} runs padded batches through transformers' attention: {self.decoder.reasons['packed']}"
        if reason := self.why_not_decoding():
            return f"{where} generates in padded batches through transformers' attention: {reason}"
        if (
            self.decoder.on_cpu
            and self.backend.attention_kernels
            and decode_kernel(head_size(self.decoder.config), wanted) is None
        ):
            reason = unavailable("layers") or f"there are no C++ kernels for {wanted}"
            return f"attention runs in PyTorch instead of C++: {reason}"
        if self.backend.strict and not self.decoder.on_cpu:
            return f"C++ kernels run on a CPU, and the model is on {self.device}"
        return None

    def backends(self) -> dict[str, str]:
        """What runs training and decoding, in words, and what falls back to something slower."""
        packed, on_cpu = self.decoder.packs(), self.decoder.on_cpu
        kernels = self.backend.attention_kernels and decode_kernel(head_size(self.decoder.config), torch.float32) is not None
        attention = "attention kernels in C++" if kernels else "PyTorch's attention"
        training = (
            f"packed sequences, {attention if on_cpu else 'flex attention'}"
            if packed
            else "padded batches, transformers' attention"
        )
        one_call = packed and on_cpu and self._plans.find() is not None
        if one_call:
            decoding = "one C++ call per step"
        elif packed and self.why_not_decoding() is None:
            decoding = f"layer by layer, {attention if on_cpu else 'captured CUDA graphs'}"
        else:
            decoding = "padded batches, transformers' attention"
        found = {"training": training, "decoding": decoding}
        return found | {f"fallback, {what}": reason for what, reason in self.decoder.reasons.items()}

    # --- weights

    def copy(self, dtype: torch.dtype) -> "LanguageModel":
        """A copy whose parameters have another dtype. Buffers keep theirs: bfloat16 is too coarse for rotary frequencies."""
        module = copy.deepcopy(self.outer)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        return LanguageModel(module, self.backend)

    @torch.no_grad()
    def copy_weights_from(self, other: "LanguageModel") -> None:
        """Take over the values of another model of the same architecture."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            if mine is not theirs:
                mine.copy_(theirs)

    def freeze(self) -> "LanguageModel":
        """Make no parameter require a gradient; returns the model."""
        self.module.requires_grad_(False)
        return self

    def compile(self) -> None:
        """Run the decoder through torch.compile from now on; its layers then stay as transformers has them."""
        self.decoder.module.compile(dynamic=True)
        self.decoder.compiled = True

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within: the base model without its peft adapters; a model without any stays as it is."""
        layers = [
            layer for layer in self.module.modules() if hasattr(layer, "enable_adapters") and hasattr(layer, "disable_adapters")
        ]
        layers = [layer for layer in layers if layer is not self.module and not layer.disable_adapters]
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, required in trained:
                parameter.requires_grad_(required)  # which peft changes when it switches adapters

    def save_weights(self, path: Path) -> None:
        """Write the weights alone, as one safetensors file."""
        save_model(self.module, str(path))

    def load_weights(self, path: Path) -> None:
        """Read weights that `save_weights` wrote.

        Raises:
            Exception: whatever safetensors and torch say of a file that is damaged or of another model.
        """
        load_model(self.module, str(path), device=str(self.device))

    def export(self, directory: Path, tokenizer: Any) -> None:
        """Write a Hugging Face model directory, tokenizer included."""
        self.outer.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _causal_model(module: Any) -> Any:
    """The transformers model in what was given.

    Raises:
        UserError: it is none, or forward hooks or a replaced forward on it would be bypassed, since only its decoder and output
            layer are called.
    """
    if hasattr(module, "_orig_mod"):
        raise UserError("torch.compile(model) hides the model's layers; give the model itself and set model.compile = true")
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            "peft's prompt learning changes the model's inputs, which groupwise gives to its decoder itself; use LoRA"
        )
    if not isinstance(inner, PreTrainedModel):
        raise UserError(f"{type(module).__name__} is not a transformers causal language model")
    for outer in {id(module): module, id(inner): inner}.values():
        if is_observed(outer):
            raise UserError(
                f"forward hooks or a replaced forward on {type(outer).__name__} would be bypassed: groupwise calls its decoder "
                f"(model.{inner.base_model_prefix}) and its output layer; attach them there"
            )
        if outer._compiled_call_impl is not None:
            raise UserError("model.compile() would be bypassed; compile the decoder instead: set model.compile = true")
    return inner
