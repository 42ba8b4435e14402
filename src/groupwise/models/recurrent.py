"""Recurrent layers (linear attention, state space models, short convolutions) over packed sequences.

Such a layer is given rows instead of the packed sequence, each with the states after the tokens before it: a prompt begins with
none, and each of its completions with those that the prompt ends with. The layer's own forward runs, which takes and returns its
states through the methods of transformers' `Cache`; `States` has these methods and keeps the tensors, with their graph.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.compiled import unavailable
from groupwise.kernels.recurrent import PackedSequences, recurrent_kernels
from groupwise.models.attention.attend import current_attend
from groupwise.models.attention.layers import matches
from groupwise.models.attention.training_padded import by_length, ragged
from groupwise.models.patches import Forwards, has_own_forward
from groupwise.models.recurrent_forward import KernelForward, fits
from groupwise.models.trials import described


class States:
    """The states of one recurrent layer for R rows, with the methods of transformers' `Cache` that such a layer calls."""

    def __init__(self) -> None:
        self.conv: dict[int, Tensor] = {}
        """The last inputs of its convolutions, [R, channels, width]."""
        self.recurrent: dict[int, Tensor] = {}
        """Its recurrent states, [R, ...]."""

    def select(self, index: Tensor) -> "States":
        """Copies of these rows' states."""
        chosen = States()
        chosen.conv = {i: state.index_select(0, index) for i, state in self.conv.items()}
        chosen.recurrent = {i: state.index_select(0, index) for i, state in self.recurrent.items()}
        return chosen

    def keep(self, order: Tensor) -> None:
        """Drop rows: row i becomes what row `order[i]` was, where all but the rows that move into freed slots stay in place."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        for states in (self.conv, self.recurrent):
            for i, state in states.items():
                if len(moved):
                    state[moved] = state[order[moved]]
                states[i] = state[: len(order)]

    @staticmethod
    def cat(parts: "list[States]") -> "States":
        """The states of the rows of all parts."""
        joined = States()
        joined.conv = {i: torch.cat([part.conv[i] for part in parts]) for i in parts[0].conv}
        joined.recurrent = {i: torch.cat([part.recurrent[i] for part in parts]) for i in parts[0].recurrent}
        return joined

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.conv.values(), *self.recurrent.values()]

    # --- what transformers' layers call

    def get_conv_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int | None = None, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Append inputs [R, channels, T]; returns the earlier ones and these, at least as many as the kernel is wide."""
        before = self.conv.get(state_idx)
        width = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        every = conv_states if before is None else torch.cat([before, conv_states], -1)
        every = torch.nn.functional.pad(every, (max(0, width - every.shape[-1]), 0))
        self.conv[state_idx] = every[..., -width:]
        return every

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int | None = None, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.conv or self.recurrent)

    def is_recording_past(self, layer_idx: int | None = None) -> bool:
        return False


class _PackedStates(States):
    """For a forward pass over packed sequences as one row: it begins with no states, and keeps those after each prompt."""

    def __init__(self, layout: PackedSequences) -> None:
        super().__init__()
        self._layout = layout

    def get_conv_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return None

    def get_recurrent_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return None

    @torch.no_grad()
    def _keep(self, inputs_NC: Tensor, width: int) -> Tensor:
        last_PK = self._layout.last(width)
        inputs_PKC = inputs_NC[last_PK.clamp(min=0)].masked_fill_((last_PK < 0)[..., None], 0)
        return inputs_PKC.transpose(1, 2).contiguous()

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int | None = None, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        self.conv[state_idx] = self._keep(conv_states[0].t(), conv_kernel_size or conv_states.shape[-1])
        return conv_states


class RecurrentForward:
    """How one recurrent layer runs: over rows without padding on their left, over packed sequences, and one token of each row.

    The latter two run on C++ kernels where a trial has shown that they compute what the layer's own forward does.
    """

    def __init__(self, module: Any, argument: str, kernels: bool) -> None:
        """`argument`: the name under which the layer takes its states; `kernels`: whether C++ kernels may be used."""
        self.module, self._argument, self._kernels = module, argument, kernels
        self.own = KernelForward(module)
        self.reason: str | None = None
        """Why it does not run on kernels; None: it does, or has not been tried."""
        self._tried = False

    def __call__(self, rows_RTH: Tensor, states: States) -> Tensor:
        """The output [R, T, H] of rows after their states, which are replaced."""
        with self.own.running(kernels=rows_RTH.shape[1] == 1 and self.on_kernels(rows_RTH)):
            return self._run(rows_RTH, states)

    def packed(self, hidden_NH: Tensor, layout: PackedSequences) -> tuple[Tensor, States]:
        """The output [N, H] of packed sequences, and the states after each prompt; only where `on_kernels`."""
        states = _PackedStates(layout)
        with self.own.running(kernels=True, layout=layout):
            return self._run(hidden_NH[None], states)[0], states

    def unpatched(self, *arguments: Any, **named: Any) -> Any:
        """The layer as transformers calls it, for one of its own caches."""
        hidden = arguments[0] if arguments else named["hidden_states"]
        with self.own.running(kernels=self.on_kernels(hidden)):
            return self.own(*arguments, **named)

    def _run(self, rows_RTH: Tensor, states: States) -> Tensor:
        output: Tensor = self.own(rows_RTH, **{self._argument: states})
        return output

    def on_kernels(self, hidden: Tensor) -> bool:
        """Whether C++ kernels run this input; tried at the first one that they fit."""
        if not (self._kernels and fits(hidden) and self.own.intact) or torch.is_autocast_enabled("cpu"):
            return False
        if not self._tried:
            self._tried = True
            self.reason = self._trial(hidden.shape[-1])
        return self.reason is None

    @torch.inference_mode(False)
    def _trial(self, size: int) -> str | None:
        """Why kernels do not give what the layer's own forward gives for two prompts and their completions; None if they do."""
        if recurrent_kernels() is None:
            return unavailable("recurrent")
        lengths = torch.tensor([5, 2]), torch.tensor([0, 0, 1]), torch.tensor([4, 1, 7])
        random = torch.Generator().manual_seed(0)
        hidden_NH, weights_NH = torch.randn(2, sum(int(x.sum()) for x in lengths[::2]), size, generator=random)
        rows, layout = RecurrentRows(*lengths, "cpu"), PackedSequences(*lengths)
        try:
            found: list[list[Tensor]] = []
            for run in (partial(rows.run_apart, self._rows), partial(self.packed, layout=layout)):
                inputs = hidden_NH.clone().requires_grad_()
                with torch.enable_grad():
                    output, states = run(inputs)
                    gradient = torch.autograd.grad((output * weights_NH).sum(), inputs)[0]
                steps = self._steps(weights_NH[:2, None], states, kernels=bool(found))
                found.append([x.detach() for x in (output, gradient, *states.tensors(), *steps)])
        except Exception as error:  # a third-party forward may do anything with what it is called with
            return described(error)
        same = all(matches(ours, theirs) or not (ours.any() or theirs.any()) for theirs, ours in zip(*found, strict=True))
        return None if same else f"{type(self.module).__name__} computes something else than our kernels"

    def _rows(self, rows_RTH: Tensor, states: States) -> Tensor:
        with self.own.running(kernels=False):
            return self._run(rows_RTH, states)

    @torch.no_grad()
    def _steps(self, rows_R1H: Tensor, states: States, kernels: bool) -> list[Tensor]:
        """Two steps after these states: the outputs, and the states then."""
        after = states.select(torch.arange(len(rows_R1H)))
        with self.own.running(kernels=kernels):
            outputs = [self._run(rows_R1H * size, after) for size in (1, 2)]
        return [*outputs, *after.tensors()]


def recurrent_layers(decoder: Any, kernels: bool) -> list[RecurrentForward]:
    """The decoder's recurrent layers; `kernels`: whether C++ kernels may run them."""
    found = {module: name for module in decoder.modules() if (name := _cache_argument(module))}
    # A decoder layer takes the cache only to hand it on to the layer inside.
    inner = [module for module in found if not any(other in found for other in module.modules() if other is not module)]
    return [RecurrentForward(module, found[module], kernels) for module in inner]


def packed_forwards(layers: list[RecurrentForward]) -> Forwards:
    """The forwards to patch in while packed sequences run."""
    return [(layer.module, partial(_mix, layer)) for layer in layers]


def cached_forwards(layers: list[RecurrentForward]) -> Forwards:
    """The forwards to patch in while rows run on a cache of transformers."""
    return [(layer.module, layer.unpatched) for layer in layers]


def _cache_argument(module: Any) -> str | None:
    """The name under which a recurrent layer takes its states; None for other modules."""
    if not hasattr(module, "layer_idx") or has_own_forward(module):
        return None
    parameters = inspect.signature(module.forward).parameters
    if "cache_params" in parameters:
        return "cache_params"
    convolves = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    return "past_key_values" if convolves and "past_key_values" in parameters else None


def _mix(layer: RecurrentForward, hidden_states: Tensor, **_: Any) -> Tensor:
    run = _outside_graph if torch.compiler.is_compiling() else _run_layer
    return run(layer, hidden_states)


def _run_layer(layer: RecurrentForward, hidden_states: Tensor) -> Tensor:
    return current_attend.get().mix(layer.module, layer, hidden_states[0])[None]


_outside_graph = torch.compiler.disable(_run_layer)  # type: ignore[no-untyped-call]
"""A compiled graph breaks here: the layout of the sequences and their states are nothing to compile."""


class RecurrentRows:
    """Prompts and their completions, packed, as rows without padding on their left."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """`prompts_R`: the prompt of each completion; `lengths_R`: its tokens. They follow the prompts in the packed sequence."""
        self._packed = PackedSequences(prompt_lengths, prompts_R, lengths_R)
        self._of_prompts: list[Tensor] = []
        index_PL, index_RT = ragged(prompt_lengths, 0), ragged(lengths_R, int(prompt_lengths.sum()))
        tokens = []
        # A state runs on through padding, so prompts of one length are run together.
        for length in sorted(set(prompt_lengths.tolist())):
            self._of_prompts.append((prompt_lengths == length).nonzero()[:, 0].to(device))
            tokens.append(index_PL[prompt_lengths == length, :length])
        self._prompt_order = torch.cat(self._of_prompts).argsort()
        self._starts: list[Tensor] = []
        for rows in by_length(lengths_R):
            # Layers take a single token for a step of generation, which writes to its states in place.
            longest = max(2, int(lengths_R[rows].max()))
            index = torch.nn.functional.pad(index_RT[rows], (0, 2), value=-1)[:, :longest]
            self._starts.append(prompts_R[rows].to(device))
            tokens.append(index)
        self._shapes = [tuple(index.shape) for index in tokens]
        flat = torch.cat([index.flatten() for index in tokens])
        self._gather = [index.clamp(min=0).flatten().to(device) for index in tokens]
        kept = (flat >= 0).nonzero()[:, 0]
        self._back = kept[flat[kept].argsort()].to(device)

    def run(self, forward: RecurrentForward, hidden_NH: Tensor) -> tuple[Tensor, States]:
        """The layer's output [N, H] for the packed tokens, and its states after each prompt."""
        if forward.on_kernels(hidden_NH):
            return forward.packed(hidden_NH, self._packed)
        return self.run_apart(forward, hidden_NH)

    def run_apart(self, forward: Callable[[Tensor, States], Tensor], hidden_NH: Tensor) -> tuple[Tensor, States]:
        """The same on padded rows: prompts of equal length together, then completions of similar length."""
        outputs: list[Tensor] = []
        inputs = [
            hidden_NH.index_select(0, gather).view(*shape, -1) for gather, shape in zip(self._gather, self._shapes, strict=True)
        ]
        after: list[States] = []
        for rows_RTH in inputs[: len(self._of_prompts)]:
            after.append(States())
            outputs.append(forward(rows_RTH, after[-1]))
        states = States.cat(after).select(self._prompt_order)
        for rows_RTH, prompts in zip(inputs[len(self._of_prompts) :], self._starts, strict=True):
            outputs.append(forward(rows_RTH, states.select(prompts)))
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self._back), states
