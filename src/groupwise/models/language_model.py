"""LanguageModel: the one owner of a Hugging Face causal language model, its output layer, its backends and every patch on it."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.files import Digest
from groupwise.kernels.compiled import unavailable
from groupwise.kernels.decode_attention import decode_kernel
from groupwise.kernels.sample import sample_kernel
from groupwise.models import adapters, checkpoint, export
from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.attention.layers import matches
from groupwise.models.backend import Backend, backend_of
from groupwise.models.bfloat16 import Bfloat16
from groupwise.models.blocked_weights import BlockedWeights
from groupwise.models.caches import Caches
from groupwise.models.decoder import Decoder
from groupwise.models.gradients import gradients_in_place
from groupwise.models.head import logits, token_logprobs
from groupwise.models.hidden import checkpointing as checkpointed
from groupwise.models.hidden import completion_hidden, inside_rows
from groupwise.models.loading import causal_model, decoder_of, end_tokens, load_module, stored_dtype
from groupwise.models.padded import NoCache, PaddedCache
from groupwise.models.trials import described, tolerance_in
from groupwise.types import Batch

if TYPE_CHECKING:
    from groupwise.config import LoraSection


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
        self.module = causal_model(module)
        self.outer = module
        """What was given: the module, or a peft model around it."""
        self.decoder = Decoder(decoder_of(self.module), self.config.vocab_size, backend_of(backend))
        self.caches = Caches(self.decoder)
        self._checked = False
        """Whether `check_logits` has accepted it."""
        self.stored_dtype = self.dtype
        """In which it is exported; of a model that was loaded, that of the directory it came from."""
        self.bfloat16 = Bfloat16(self.decoder)
        if self.backend.strict and (reason := self.fallback()):
            raise UserError(f"model.backend = 'kernels': {reason}")

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        backend: str = "auto",
        trust_remote_code: bool = False,
        lora: "LoraSection | None" = None,
        seed: int = 0,
    ) -> "LanguageModel":
        """The model at `path`: a shipped one, a local directory, or a Hugging Face id.

        Args:
            trust_remote_code: run code that comes with the model.
            lora: train new adapters on it, and not the model itself; `seed` is of their random start.

        Raises:
            UserError: there is no such model, it cannot be loaded, its output layer is of an unknown kind, or it has no such
                layers for adapters.
        """
        module = load_module(path, dtype, trust_remote_code=trust_remote_code).to(device)
        model = cls(module if lora is None else adapters.add_adapters(module, lora, seed=seed), backend)
        model.stored_dtype = stored_dtype(path, trust_remote_code=trust_remote_code) or dtype
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
        return end_tokens(getattr(self.module, "generation_config", None), tokenizer)

    @torch.no_grad()
    def check_logits(self) -> None:
        """Refuse a model that cannot be run exactly here.

        Raises:
            UserError: it is no causal decoder, rows of a batch influence each other, steps of generation are not what the whole
                sequence gives, or its logits are not made from its last hidden states in a way that `logits` knows.
        """
        tokens = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        try:
            theirs = self.module(input_ids=tokens, use_cache=False).logits.float()
            ours = logits(self.module, self.decoder.module(input_ids=tokens, use_cache=False).last_hidden_state)
            reason = self.decoder.why_not_causal()
        except Exception as error:  # third-party forwards may raise anything
            raise UserError(f"{self.name} does not run as a causal language model: {described(error)}") from error
        if not torch.isfinite(theirs).all():
            raise UserError(f"the logits of {self.name} are not finite, so its weights are damaged")
        if not matches(ours, theirs, 10 * tolerance_in(self.dtype)):
            raise UserError(f"{self.name} turns hidden states into logits in a way that groupwise does not know")
        if reason is None and not self.decoder.packs():
            reason = self.decoder.why_not_trainable()
        if reason is not None:
            raise UserError(f"{self.name} cannot be trained exactly: {reason}")
        if self.why_not_decoding() is not None:
            self.caches.fallback()
        self._checked = True

    def check_once(self) -> None:
        """`check_logits` before first use, for a module that was given and not loaded."""
        if not self._checked:
            with torch.autocast(self.device.type, enabled=False):
                self.check_logits()

    # --- forward passes

    def completion_hidden(self, batch: Batch, share_prompts: bool) -> Tensor:
        """The last hidden states [N, H] that predict the completion tokens, row after row, without padding."""
        self.check_once()
        return completion_hidden(self.decoder, batch, share_prompts)

    def completion_logprobs(
        self, batch: Batch, *, temperature: float = 1.0, share_prompts: bool = True, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The log-probability of each completion token, and the entropy of the distribution it was drawn from; both within its
        kept set, where the batch has one (sampling replay).

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
        kept = batch.kept_tokens()
        logprobs_N, entropy_N = token_logprobs(self.module, hidden_NH, targets_N, temperature, entropy_gradient, copies, kept)
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
        if dtype is None or dtype == self.dtype:
            return self
        if not self.bfloat16.rounds_to(dtype):
            return self.copy(dtype)
        view = LanguageModel(self.outer, self.backend)
        view.decoder.bf16_step, view._checked = True, self._checked
        return view

    def blocked_weights(self) -> BlockedWeights:
        """A context, to be entered for each decoding step, in which linear layers run on blocked copies of today's weights."""
        return self.caches.blocked_weights(self.module)

    def decoding_cache(
        self,
        prompts: int,
        prompt_length: int,
        rows: int,
        tokens: int,
        *,
        dtype: torch.dtype | None = None,
        fixed: bool | None = None,
    ) -> DecodingCache | PaddedCache | NoCache:
        """An empty cache for so many prompts of up to `prompt_length` tokens, and so many rows of up to `tokens` tokens.

        Args:
            dtype: of keys and values; None: the model's. Transformers' own cache, the fallback, has the model's.
            fixed: run steps of a few fixed sizes, which a GPU captures as graphs; None: on a GPU, without recurrent layers.
        """
        self.check_once()
        return self.caches.new(prompts, prompt_length, rows, tokens, dtype=dtype, fixed=fixed)

    def why_not_decoding(self, cache_dtype: torch.dtype | None = None) -> str | None:
        """Why this model generates on transformers' cache instead of ours, or None; tried once for each device and dtype."""
        return self.caches.why_not_ours(cache_dtype)

    def affordable_rows(self, tokens: int, cache_dtype: torch.dtype | None = None) -> float:
        """The most completions of so many tokens that fit a GPU's free memory beside all else; on other devices no limit.

        `cache_dtype`: of keys and values; None: the model's.
        """
        return self.caches.affordable_rows(tokens, cache_dtype)

    def sampling_kernel(self) -> Any:
        """A function (logits [R, V], uniforms [R]) -> (tokens, log-probabilities) in C++; None to do it in PyTorch."""
        return sample_kernel() if self.backend.sampling_kernel and self.decoder.on_cpu else None

    # --- backends, for people

    def fallback(self, decoding_dtype: torch.dtype | None = None, cache_dtype: torch.dtype | None = None) -> str | None:
        """The first fallback that slows this model down, with its reason; None if there is none.

        `decoding_dtype`: the sampler's, and `cache_dtype`: of its keys and values, if they differ from the model's.
        """
        where = f"{self.name} on {self.device}"
        if not self.decoder.packs():
            return f"{where} runs padded batches through transformers' attention: {self.decoder.reasons['packed']}"
        if reason := self.why_not_decoding(cache_dtype):
            return f"{where} generates {self.caches.fallback().described}: {reason}"
        wanted = self.dtype if decoding_dtype is None or self.bfloat16.rounds_to(decoding_dtype) else decoding_dtype
        if self.backend.attention_kernels and not self._has_kernels(wanted, cache_dtype):
            reason = unavailable("layers") or f"there are no C++ kernels for {wanted} and keys in {cache_dtype or wanted}"
            return f"attention runs in PyTorch instead of C++: {reason}"
        if self.backend.strict and not self.decoder.on_cpu:
            return f"C++ kernels run on a CPU, and the model is on {self.device}"
        return None

    def _has_kernels(self, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> bool:
        """Whether attention in generation runs in C++, or on a GPU, where it does not have to."""
        sizes = {shape.size for shape in self.decoder.shapes.values()}
        return not self.decoder.on_cpu or all(decode_kernel(size, dtype, cache_dtype) for size in sizes)

    def backends(self) -> dict[str, str]:
        """What runs training and decoding, in words, and what falls back to something slower."""
        packed, on_cpu = self.decoder.packs(), self.decoder.on_cpu
        why_not = self.why_not_decoding()
        kernels = self.backend.attention_kernels and self._has_kernels(self.dtype)
        attention, in_pytorch = "attention kernels in C++" if kernels else "PyTorch's attention", "PyTorch's attention"
        on_packed = attention if self.dtype == torch.float32 else in_pytorch
        training = f"packed sequences, {on_packed if on_cpu else 'FlashAttention or flex attention'}"
        if not packed:
            training = "padded batches, transformers' attention: a prompt is run once for each of its completions"
        if why_not is not None:
            decoding = self.caches.fallback().described
        elif on_cpu and self.caches.plans.find() is not None:
            decoding = "one C++ call per step"
        else:
            graphs = "PyTorch's attention" if self.decoder.recurrent else "captured CUDA graphs"
            decoding = f"layer by layer, {attention if on_cpu else graphs}"
        found = {"training": training, "decoding": decoding}
        return found | {f"fallback, {what}": reason for what, reason in self.decoder.reasons.items()}

    # --- weights

    def copy(self, dtype: torch.dtype) -> "LanguageModel":
        """A copy whose parameters have another dtype. Buffers keep theirs: bfloat16 is too coarse for rotary frequencies."""
        module = copy.deepcopy(self.outer)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        copied = LanguageModel(module, self.backend)
        copied._checked = self._checked
        return copied

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

    # --- adapters

    @property
    def adapted(self) -> bool:
        """Whether peft has put adapters on it."""
        return bool(adapters.adapter_layers(self.module))

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within: the base model without its peft adapters; a model without any stays as it is."""
        return adapters.adapters_off(self.module)

    def with_shared_base(self) -> "LanguageModel":
        """Another model with adapters of its own, as these are now, on the same base: no weight of that is copied."""
        return LanguageModel(adapters.with_shared_base(self.outer), self.backend)

    def describe_adapters(self) -> str | None:
        """What adapters it has, in words; None if it has none."""
        return adapters.describe(self.module)

    # --- files

    def save_weights(self, path: Path) -> Digest:
        """Write the weights for a checkpoint, as one safetensors file; of a model with adapters only what is trained."""
        return checkpoint.save_weights(self.module, path)

    def load_weights(self, stem: Path) -> None:
        """Read weights that `save_weights` wrote as STEM.safetensors, or a sharded learner as the files of STEM/.

        Raises:
            UserError, ValueError: adapters of another form, or on another base; weights of another model.
        """
        checkpoint.load_weights(self.module, stem)

    def export(self, directory: Path, tokenizer: Any, *, merge: bool = True) -> dict[str, float]:
        """Write a Hugging Face model directory in the dtype that the model was stored in, tokenizer and settings included.

        Args:
            merge: write adapters merged into the model, whose own weights stay as they are; otherwise the adapters alone.

        Returns:
            {"export/merge_gap": the most by which merging, and rounding to that dtype, moved a logit}; {} without adapters.

        Raises:
            UserError: adapters of a kind that cannot be merged.
        """
        export.write(self, directory, tokenizer, merge=merge)
        return export.gap(self) if merge else {}
