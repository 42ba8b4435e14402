"""A Hugging Face decoder (a causal model without its output layer), and how its forward pass runs here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models.attention.attend import PLAIN, Attend, AttentionForm
from groupwise.models.attention.latent import latent_forwards, latent_layers
from groupwise.models.attention.layers import LayerForward, TrialAttend, layer_forwards, matches
from groupwise.models.attention.registry import attending, run_packed
from groupwise.models.attention.training import PackedAttention
from groupwise.models.backend import Backend
from groupwise.models.patches import Forwards, has_own_forward, is_compiled
from groupwise.models.recurrent import RecurrentForward, packed_forwards, recurrent_layers
from groupwise.models.trials import (
    LENGTHS,
    TrialRows,
    described,
    first_trained,
    no_constants,
    small_windows,
    tolerance_in,
    trial_rows,
)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What an attention layer keeps of each token."""

    kv_heads: int
    size: int
    """Of a head of keys, and of values."""


class Decoder:
    """Runs packed sequences through a decoder's layers with our attention, where a trial has shown that it computes the same."""

    def __init__(self, module: Any, vocab_size: int, backend: Backend) -> None:
        self.module, self.vocab_size, self.backend = module, vocab_size, backend
        self.compiled = is_compiled(module)
        """Whether torch.compile must see its layers as they are, so that no kernel of ours replaces them."""
        self.reasons: dict[str, str] = {}
        """What does not run in the fastest way, and why."""
        self.shapes: dict[int, HeadShape] = {}
        """What each attention layer keeps of a token in generation, by its index; see `find_shapes`."""
        self.repeated = False
        """Whether attention layers run more than once in a forward pass, so that their keys have no one place in a cache."""
        self.state_elements = 0
        """Numbers in the states of all recurrent layers, for one row."""
        self.compresses = True
        """Whether layers of latent attention have a compressed KV cache in generation."""
        self.linears: Forwards = ()
        """Forwards of linear layers that are patched in as well, while they run in bfloat16."""
        self.bf16_step = False
        """Whether a decoding step runs its matmuls in bfloat16."""
        self.kept_dtype: torch.dtype | None = None
        """In which a sharded decoder's weights are kept; while it runs they may be gathered in another. None: ask the module."""
        self._layers: list[LayerForward] | None = None
        self._tried: tuple[torch.device, torch.dtype] | None = None
        self._packs = False

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.kept_dtype or self.module.dtype
        return dtype

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def recurrent(self) -> list[RecurrentForward]:
        """Its recurrent layers."""
        return recurrent_layers(self.module, kernels=self.backend.layer_kernels)

    @cached_property
    def latent(self) -> list[Any]:
        """Its layers of latent attention."""
        return latent_layers(self.module)

    @cached_property
    def position_limit(self) -> int | None:
        """The most tokens of a sequence where RoPE changes with the longest sequence of a batch; None: it does not.

        Beyond it (dynamic NTK, LongRoPE) a token's frequencies depend on the other rows, and on tokens that follow it.
        """
        limits = [limit for module in self.module.modules() if (limit := _fixed_until(module)) is not None]
        return min(limits, default=None)

    def layers(self) -> list[LayerForward]:
        """Layers that run on our kernels, found by trial once."""
        if not self.backend.layer_kernels or self.compiled:
            return []
        if self._layers is None:
            with self.exact(), attending(self.module, TrialAttend()):
                self._layers, reasons = layer_forwards(self.module)
            if reasons:
                more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
                self.reasons["layers"] = reasons[0] + more
        return self._layers

    def forwards(self, *, generating: bool = False) -> Forwards:
        """The forwards to patch in while packed sequences run, in training or in generation."""
        layers = [(layer.module, layer.forward) for layer in self.layers() if layer.usable]
        latent = latent_forwards(self.latent) if generating and self.compresses else ()
        return [
            *packed_forwards(self.recurrent),
            *layers,
            *self.linears,
            *latent,
        ]  # a layer that is in two of them runs the later

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within: nothing is rounded to bfloat16. For trials, which may run while a sampler decodes or a learner trains."""
        before = self.linears, self.bf16_step
        self.linears, self.bf16_step = (), False
        try:
            yield
        finally:
            self.linears, self.bf16_step = before

    def check_length(self, tokens: int) -> None:
        """Refuse sequences whose RoPE would depend on the rest of their batch.

        Raises:
            UserError: a sequence of so many tokens is one.
        """
        if self.position_limit is not None and tokens > self.position_limit:
            raise UserError(
                f"a sequence of {tokens} tokens exceeds {self.position_limit}: beyond it this model's RoPE (dynamic NTK or "
                "LongRoPE) depends on the longest sequence of a batch, and so would log-probabilities"
            )

    def run_packed(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, *, generating: bool = False) -> Tensor:
        """The last hidden states [N, H] of packed tokens (int64 [N]) at their positions in their sequences (int64 [N]).

        `generating`: attention layers with a compressed KV cache give `attend` its entries instead of keys and values.
        """
        return run_packed(self.module, tokens_N, positions_N, attend, self.forwards(generating=generating))

    def packed_attention(self, prompt_lengths: list[int], group_ids_R: Tensor, lengths_R: Tensor) -> PackedAttention:
        """An `Attend` over prompts and completions; see there."""
        kernels = self.backend.attention_kernels
        return PackedAttention(prompt_lengths, group_ids_R, lengths_R, self.device, kernels=kernels)

    @torch.no_grad()
    def find_shapes(self) -> None:
        """Note what each attention layer keeps of a token in generation."""
        prompt = self.trial_rows().prompts[0]
        nothing = torch.zeros(0, dtype=torch.long)
        recorder = _Recorder(self.packed_attention([len(prompt)], nothing, nothing))
        self.run_packed(prompt, torch.arange(len(prompt), device=self.device), recorder, generating=True)
        self.shapes, self.repeated, self.state_elements = recorder.shapes, recorder.repeated, recorder.state_elements

    # --- trials

    def trial_rows(self, *, with_padding: bool = False) -> TrialRows:
        """Prompts and completions to try the decoder on."""
        pad_token = getattr(self.config.get_text_config(), "pad_token_id", None)
        limit = self.position_limit
        return trial_rows(self.vocab_size, pad_token, self.device, limit, with_padding=with_padding)

    @torch.no_grad()
    def alone(self, tokens: Tensor) -> Tensor:
        """The hidden states [N, H] of one sequence in a forward pass of its own."""
        hidden_1NH: Tensor = self.module(input_ids=tokens[None], use_cache=False).last_hidden_state
        return hidden_1NH[0]

    @torch.no_grad()
    def why_not_causal(self) -> str | None:
        """Why a row of a batch, padded on its right, is not what it is alone, so that no batch is exact; None if it is."""
        trial = self.trial_rows(with_padding=True)
        rows = [trial.row(i) for i in range(len(trial.completions))]
        width = max(map(len, rows))
        # Padding differs from row to row and is no special token, so that whatever reads it shows.
        tokens_RL = torch.stack([torch.cat([row, row.flip(0).repeat(width)])[:width] for row in rows])
        with self.exact(), small_windows(self.module), no_constants(self.module):
            together = self.module(input_ids=tokens_RL, use_cache=False).last_hidden_state
            for row, ours in zip(rows, together, strict=True):
                theirs = self.alone(row)
                if not matches(ours[: len(row)], theirs, tolerance_in(theirs.dtype)):
                    return "a token's hidden state depends on later tokens or on other rows of its batch"
        return None

    @torch.inference_mode(False)
    def why_not_trainable(self) -> str | None:
        """Why its own backward pass cannot be taken, which the fallback would take; None if it can, or nothing is trained."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not trained:
            return None
        with self.exact(), torch.enable_grad():
            hidden = self.module(input_ids=self.trial_rows().row(0)[None], use_cache=False).last_hidden_state
            try:
                gradients = torch.autograd.grad(hidden.float().square().sum(), trained, allow_unused=True)
            except RuntimeError as error:  # third-party forwards may write in place what the backward pass needs
                return f"its backward pass fails: {described(error)}"
        finite = all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        return None if finite else "its gradients are not finite"

    def packs(self) -> bool:
        """Whether packed sequences can run, tried against the decoder's own forward once per device and dtype."""
        if self._tried != (self.device, self.dtype):
            self._layers = None  # kernels are of one device
            for what in ("packed", "layers", "recurrent layers"):
                self.reasons.pop(what, None)
            with self.exact():
                reason = self._why_not_packed()
                if reason is not None and self._layers:
                    # Each layer is right by itself, but the decoder may call it in another way than its trial did.
                    self._layers, self.reasons["layers"] = [], f"with our kernels, {reason}"
                    reason = self._why_not_packed()
            self._packs = reason is None
            if reason is not None:
                self.reasons["packed"] = reason
            if found := [layer.reason for layer in self.recurrent if layer.reason is not None]:
                self.reasons["recurrent layers"] = f"they run on padded rows through transformers: {found[0]}"
            self._tried = (self.device, self.dtype)  # only now: a trial that is interrupted is made again
        # A recurrent layer's forward over one row would run on from sequence to sequence.
        if self._packs and any(has_own_forward(layer.module) for layer in self.recurrent):
            self.reasons["packed"] = "somebody has replaced the forward of a recurrent layer"
            return False
        return self._packs

    @torch.inference_mode(False)  # tensors of inference mode have no gradients
    def _why_not_packed(self) -> str | None:
        if not self.backend.packed:
            return "the backend is set to padded batches"
        if self.device.type not in LENGTHS:
            return f"there is no packed attention for the device {self.device.type!r}"
        self.layers()  # tried with windows as they are
        with small_windows(self.module), no_constants(self.module):
            return self._trial()

    def _trial(self) -> str | None:
        """Why two prompts with two completions each do not run packed as each row does alone; None if they do."""
        trial = self.trial_rows()
        lengths = [len(prompt) for prompt in trial.prompts]
        attention = self.packed_attention(lengths, trial.prompt_R, torch.tensor([len(row) for row in trial.completions]))
        tokens_N = torch.cat([*trial.prompts, *trial.completions])

        def packed() -> list[Tensor]:
            prompts, completions = self._split(self.run_packed(tokens_N, attention.positions_N, attention), trial)
            return [torch.cat([prompts[int(p)], row]) for p, row in zip(trial.prompt_R, completions, strict=True)]

        def apart() -> list[Tensor]:
            rows = [trial.row(i) for i in range(len(trial.completions))]
            return [self.module(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]

        try:
            ours = self._rows_and_gradient(packed)
        except Exception as error:  # third-party forwards and GPU compilers may raise anything
            return f"packed sequences fail in it: {described(error)}"
        try:
            theirs = self._rows_and_gradient(apart)
        except Exception as error:  # a third-party backward pass may fail where ours does not
            return f"its own backward pass fails: {described(error)}"
        same = (matches(one, other, tolerance_in(other.dtype)) for one, other in zip(ours, theirs, strict=False))
        if len(ours) == len(theirs) and all(same):
            return None
        return "packed sequences give other hidden states or gradients than rows of their own"

    @staticmethod
    def _split(hidden_NH: Tensor, trial: TrialRows) -> tuple[list[Tensor], list[Tensor]]:
        pieces = torch.split(hidden_NH, [len(tokens) for tokens in (*trial.prompts, *trial.completions)])
        return list(pieces[: len(trial.prompts)]), list(pieces[len(trial.prompts) :])

    def _rows_and_gradient(self, run: Any) -> list[Tensor]:
        """The hidden states of each row, and the gradient of the first trained parameter, most often the embedding."""
        with (
            torch.inference_mode(False),
            first_trained(self.module) as trained,
            torch.set_grad_enabled(bool(trained)),
            torch.autocast(self.device.type, enabled=False),
        ):
            rows = run()
            # Weights that differ between tokens and between elements: the sum over a normalised state would be constant.
            sums = [(row.float() * torch.linspace(-1, 1, row.numel(), device=row.device).view(row.shape)).sum() for row in rows]
            gradients = torch.autograd.grad(torch.stack(sums).sum(), trained, allow_unused=True) if trained else ()
            return [*(row.detach() for row in rows), *(gradient for gradient in gradients if gradient is not None)]


class _Recorder:
    """An `Attend` that notes what it is called with."""

    def __init__(self, attention: PackedAttention) -> None:
        self._attention = attention
        self.shapes: dict[int, HeadShape] = {}
        self.repeated = False
        self.state_elements = 0

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        self.repeated = self.repeated or layer in self.shapes
        self.shapes[layer] = HeadShape(key_NKD.shape[1], key_NKD.shape[2])
        return self._attention(layer, query_NHD, key_NKD, value_NKD, scale, form)

    def mix(self, layer: Any, forward: RecurrentForward, hidden_NH: Tensor) -> Tensor:
        output_NH, states = self._attention.recurrent_rows.run(forward, hidden_NH)
        self.state_elements += sum(state[0].numel() for state in (*states.conv.values(), *states.recurrent.values()))
        return output_NH


ORIGINAL = "original_max_position_embeddings"


def _fixed_until(rotary: Any) -> int | None:
    """The length up to which a rotary embedding's frequencies are fixed; None: always, or the module is none."""
    kinds = getattr(rotary, "rope_type", None)
    if kinds is None:
        return None
    if not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        return None
    config = rotary.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    of_types = [value for value in parameters.values() if isinstance(value, dict)]  # where layers of each type have their own
    for holders in (of_types, [parameters], [vars(config)]):
        if limits := [holder[ORIGINAL] for holder in holders if holder.get(ORIGINAL)]:
            return int(min(limits))
    return int(getattr(rotary, "original_max_seq_len", None) or config.max_position_embeddings)
