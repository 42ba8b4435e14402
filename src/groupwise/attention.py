"""Attention over packed tokens in groups: no padding through the model, and each prompt's keys read once for its group.

A Hugging Face decoder is run on one flat sequence of tokens, [1, N], with explicit positions; its attention layers call
back here, and an `Attend` says what each token may look at. Wherever a completion looks at its prompt and at itself, two
partial softmaxes are merged by their logarithms of sums, so the prompt's keys are never copied for a row.

This works for decoders whose attention goes through transformers' attention registry, is full (no sliding window) and
plain (no soft cap, no sinks), on a CPU; `packs` tells. Others take the general path, through padded batches.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "groupwise"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


LIKE_LENGTH, SHORT = 0.7, 8
"""Rows share a padded kernel call when the shorter has at least this share of the longer's tokens, less a few."""


class Attend(Protocol):
    def __call__(self, layer: int, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> Tensor:
        """What each of N tokens gathers, [N, H, D]; K key-value heads serve H query heads."""
        ...


_attend: ContextVar[Attend] = ContextVar("groupwise_attend")


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **extra: Any
) -> tuple[Tensor, None]:
    """The form that transformers calls; anything that changes plain attention is refused, and found out by `packs`."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not torch.compiler.is_compiling():
        return _run(module.layer_idx, query, key, value, scale), None
    run = _outside_graph if torch.is_grad_enabled() else _in_graph
    return run(module.layer_idx, query, key, value, scale), None


def _run(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return _attend.get()(layer, query[0], key[0], value[0], scale)[None]


_outside_graph = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
"""With gradients the graph breaks here, since the attention has its own backward pass."""
_in_graph = torch.library.custom_op("groupwise::attend", _run, mutates_args=())
"""Without gradients, one node of the graph; what it writes is the cache, which the graph knows nothing of."""


@_in_graph.register_fake
def _(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.transpose(1, 2).new_empty(query.transpose(1, 2).shape)


AttentionInterface.register(NAME, _interface)


@contextmanager
def attending(decoder: Any, attend: Attend) -> Iterator[None]:
    """Run the decoder's attention layers through `attend`."""
    config = decoder.config
    before = config._attn_implementation
    token = _attend.set(attend)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _attend.reset(token)


def recomputing(decoder: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch's checkpoint: what surrounds a layer's first run, and its second, in the backward pass."""
    attend = _attend.get(None)
    return nullcontext(), nullcontext() if attend is None else attending(decoder, attend)


def run_packed(decoder: Any, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
    """The last hidden states [N, H] of flat tokens."""
    with attending(decoder, attend):
        output = decoder(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False)
    hidden_NH: Tensor = output.last_hidden_state[0]
    return hidden_NH


def packs(model: Any) -> bool:
    """Whether this model's attention can run here: tried on a few tokens against the model's own forward."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.device.type != "cpu" or layers != {"full_attention"} or getattr(model, "_groupwise_packs", None) is False:
        return False
    if not hasattr(model, "_groupwise_packs"):
        model._groupwise_packs = _trial(model)
    return bool(model._groupwise_packs)


@torch.no_grad()
def _trial(model: Any) -> bool:
    decoder = model.base_model
    tokens = torch.arange(6, device=model.device) % model.config.get_text_config().vocab_size
    layout = Packed([2], torch.tensor([0]), torch.tensor([4]), model.device)
    try:
        ours = run_packed(decoder, tokens, layout.positions_N, layout)
    except (NotImplementedError, AttributeError, LookupError, TypeError, RuntimeError, ValueError):
        return False  # whatever a stranger's forward makes of a flat batch
    theirs = decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    close = max(1e-3, 10 * torch.finfo(theirs.dtype).eps)
    return bool(torch.allclose(ours, theirs, rtol=close, atol=close * float(theirs.abs().max())))


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys as attention over their union.

    Each is (output [..., D], normalised within its set; log of the sum of exponentials of the set's scores [...]).
    """
    share = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0], second[0], share.to(first[0].dtype))


class Packed:
    """Attention in training: prompts first, then completions, all flat; a completion looks at its prompt and at itself.

    The keys of a prompt are multiplied once with the queries of all its completions.
    """

    def __init__(self, prompt_lengths: list[int], group_ids_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """The layout of P prompts and R completions, of `lengths_R` tokens each, whose prompts `group_ids_R` names."""
        prompts_P, groups_R, lengths_R = torch.tensor(prompt_lengths), group_ids_R.cpu(), lengths_R.cpu()
        self.prompt_tokens = int(prompts_P.sum())
        self.prompts = Layout(_ragged(prompts_P, 0), device)
        rows_RT = _ragged(lengths_R, self.prompt_tokens)
        self.rows = [Layout(rows_RT[rows, : int(lengths_R[rows].max())], device) for rows in _by_length(lengths_R)]
        members = [rows_RT[groups_R == p] for p in range(len(prompt_lengths))]
        tokens = [rows[rows >= 0] for rows in members]
        self.groups = Layout(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1), device)
        self.prompt_bias = _padding_bias(self.prompts.inside, device)
        positions = [torch.arange(n) for n in prompt_lengths]
        starts = prompts_P[groups_R].tolist()
        positions += [start + torch.arange(n) for start, n in zip(starts, lengths_R.tolist(), strict=True)]
        self.positions_N = torch.cat(positions).to(device)

    def __call__(self, layer: int, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> Tensor:
        # Under autocast the norms of queries and keys, and only they, come in float32.
        query, key, value = (x.transpose(0, 1).contiguous().to(value_KND.dtype) for x in (query_HND, key_KND, value_KND))
        output_NHD: Tensor = _PackedAttention.apply(query, key, value, self, scale)  # type: ignore[no-untyped-call]
        return output_NHD


class Layout:
    """Flat tokens as padded rows and back, for the time of an attention kernel."""

    def __init__(self, index_RT: Tensor, device: Any) -> None:
        """`index_RT`: flat index of each place, -1 for padding."""
        self.shape = tuple(index_RT.shape)
        inside = index_RT >= 0
        self.full = bool(inside.all())
        self.inside = inside.to(device)
        self.index = index_RT.clamp(min=0).flatten().to(device)
        flat = index_RT.flatten()
        places = (flat >= 0).nonzero()[:, 0]
        order = flat[places].argsort()
        self.back = places[order].to(device)
        """Where each flat token lies among the places, in the order of flat tokens."""
        self.tokens = flat[places][order].to(device)
        """The flat tokens that have a place."""

    def rows(self, flat_NHD: Tensor) -> Tensor:
        """[R, H, T, D] (or [R, H, T] from [N, H]), 0 in the padding."""
        rows = flat_NHD.index_select(0, self.index).view(*self.shape, *flat_NHD.shape[1:])
        if not self.full:
            rows.masked_fill_(~self.inside.view(*self.shape, *[1] * (flat_NHD.dim() - 1)), 0)
        return rows.transpose(1, 2)

    def flat(self, rows: Tensor) -> Tensor:
        """The tokens of [R, H, T, ...] in flat order, [n, H, ...]."""
        return rows.transpose(1, 2).flatten(0, 1).index_select(0, self.back)


class _PackedAttention(torch.autograd.Function):
    """Three blocks of attention: prompts in themselves, completions in themselves, completions in their prompts.

    The backward pass of a block needs only the merged output and the merged log-sum, since they give the block's
    softmax weights; so no block's own output is kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Packed, scale: float) -> Tensor:
        n = layout.prompt_tokens
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        if n:
            q, k, v = layout.prompts.rows(query), layout.prompts.rows(key), layout.prompts.rows(value)
            o, s = _flash(q, *_repeat(q, k, v), 0.0, True, scale=scale)
            output[:n], sums[:n] = layout.prompts.flat(o), layout.prompts.flat(s)
        if n < len(query):
            for rows in layout.rows:
                q, k, v = rows.rows(query), rows.rows(key), rows.rows(value)
                o, s = _flash(q, *_repeat(q, k, v), 0.0, True, scale=scale)
                output[rows.tokens], sums[rows.tokens] = rows.flat(o), rows.flat(s)
            if n:
                q, k, v = layout.groups.rows(query), layout.prompts.rows(key), layout.prompts.rows(value)
                o, s = _flash(_fold(q, k), k, v, 0.0, False, attn_mask=layout.prompt_bias, scale=scale)
                of_prompt = layout.groups.flat(_unfold(o, q)), layout.groups.flat(_unfold(s, q))
                output[n:] = merge((output[n:], sums[n:]), of_prompt)
                sums[n:] = torch.logaddexp(sums[n:], of_prompt[1])
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        gradient, layout, scale = gradients[0].contiguous(), ctx.layout, ctx.scale
        n = layout.prompt_tokens
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

        for rows in [layout.prompts, *layout.rows]:
            if len(rows.tokens):
                q, k, v, o, s, g = (rows.rows(x) for x in (query, key, value, output, sums, gradient))
                dq, dk, dv = _flash_backward(g, q, *_repeat(q, k, v), o, s, 0.0, True, scale=scale)
                d_query[rows.tokens] = rows.flat(dq)
                d_key[rows.tokens] = rows.flat(_sum_repeats(dk, k))
                d_value[rows.tokens] = rows.flat(_sum_repeats(dv, v))
        if 0 < n < len(query):
            q, o, s, g = (layout.groups.rows(x) for x in (query, output, sums, gradient))
            k, v = layout.prompts.rows(key), layout.prompts.rows(value)
            folded = [_fold(x, k) for x in (g, q)]
            dq, dk, dv = _flash_backward(
                *folded, k, v, _fold(o, k), _fold(s, k), 0.0, False, attn_mask=layout.prompt_bias, scale=scale
            )
            d_query[n:] += layout.groups.flat(_unfold(dq, q))
            d_key[:n] += layout.prompts.flat(dk)
            d_value[:n] += layout.prompts.flat(dv)
        return d_query, d_key, d_value, None, None


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [R, K, T, D] once for each query head [R, H, T, D]."""
    times = query.shape[1] // key.shape[1]
    return (key, value) if times == 1 else (key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def _sum_repeats(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient if gradient.shape == like.shape else torch.unflatten(gradient, 1, (like.shape[1], -1)).sum(2)


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """Query heads that share a key-value head as more queries of it: [R, H, T, ...] to [R, K, (H / K) T, ...]."""
    return x if x.shape[1] == key.shape[1] else torch.unflatten(x, 1, (key.shape[1], -1)).flatten(2, 3)


def _unfold(x: Tensor, query: Tensor) -> Tensor:
    H, T = query.shape[1:3]
    return x if x.shape[1] == H else torch.unflatten(x, 2, (-1, T)).flatten(1, 2)


def _padding_bias(inside_PL: Tensor, device: Any) -> Tensor | None:
    """What to add to scores so that padded keys count for nothing, [P, 1, 1, L]; None where there are none."""
    if bool(inside_PL.all()):
        return None
    return torch.zeros(inside_PL.shape, device=device).masked_fill(~inside_PL, -torch.inf)[:, None, None]


def _by_length(lengths_R: Tensor) -> list[Tensor]:
    """Rows (int64 [r] each) in sets of like length, so that little is padded; rows without a token are in none."""
    order = lengths_R.argsort(descending=True)
    sets: list[list[int]] = []
    longest = 0
    for row, length in zip(order.tolist(), lengths_R[order].tolist(), strict=True):
        if length > 0:
            if not sets or length < LIKE_LENGTH * longest - SHORT:
                sets.append([])
                longest = length
            sets[-1].append(row)
    return [torch.tensor(rows) for rows in sets]


def _ragged(lengths_R: Tensor, offset: int) -> Tensor:
    """Flat indices [R, T] of rows that follow each other from `offset`; -1 after a row's end."""
    ends_R = lengths_R.cumsum(0)
    place_T = torch.arange(int(lengths_R.max()) if len(lengths_R) else 0)
    index_RT = offset + (ends_R - lengths_R)[:, None] + place_T
    return torch.where(place_T < lengths_R[:, None], index_RT, -1)


class Decoding:
    """Attention and cache in generation: a prompt's keys kept once for its group, a row's own in a buffer that is never copied.

    Rows and prompts lie without gaps; what leaves is filled with the last one.
    """

    def __init__(self, config: Any, prompts: int, prompt_length: int, rows: int, tokens: int, like: Tensor) -> None:
        """Room for so many prompts and rows at once; `like` gives dtype and device."""
        # Zeros, not what memory held: a padded place counts for nothing, but nothing times NaN is NaN.
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        self.prompt_cache = like.new_zeros(layers, 2, prompts, heads, prompt_length, size)
        self.row_cache = like.new_zeros(layers, 2, rows, heads, tokens, size)
        self.lengths_P = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each prompt."""
        self.prompt_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """The prompt of each row."""
        self.written_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each row whose keys are in the cache, the one being run included."""

    def prefill(self, decoder: Any, prompts: list[Tensor], group_size: int) -> Tensor:
        """Take in prompts with `group_size` rows each; returns the last hidden state of each prompt [p, H]."""
        lengths = [len(prompt) for prompt in prompts]
        nothing = torch.zeros(0, dtype=torch.long)
        layout = Packed(lengths, nothing, nothing, prompts[0].device)
        first = len(self.lengths_P)

        def attend(layer: int, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> Tensor:
            for cache, new in zip(self.prompt_cache[layer], (key_KND, value_KND), strict=True):
                cache[first : first + len(prompts), :, : max(lengths)] = layout.prompts.rows(new.transpose(0, 1))
            return layout(layer, query_HND, key_KND, value_KND, scale)

        hidden_NH = run_packed(decoder, torch.cat(prompts), layout.positions_N, attend)
        self.lengths_P = torch.cat([self.lengths_P, self.lengths_P.new_tensor(lengths)])
        new_rows = torch.arange(first, first + len(prompts), device=hidden_NH.device).repeat_interleave(group_size)
        self.prompt_R = torch.cat([self.prompt_R, new_rows])
        self.written_R = torch.cat([self.written_R, torch.zeros_like(new_rows)])
        self._place()
        return hidden_NH[self.lengths_P[first:].cumsum(0) - 1]

    def step(self, decoder: Any, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H]."""
        positions_R = self.lengths_P[self.prompt_R] + self.written_R
        self.written_R = self.written_R + 1
        self.longest = int(self.written_R.max())
        inside_RT = torch.arange(self.longest, device=tokens_R.device) < self.written_R[:, None]
        self.row_bias = _padding_bias(inside_RT, tokens_R.device)
        rows: Any = slice(len(tokens_R)) if self.row_bias is None else torch.arange(len(tokens_R), device=tokens_R.device)
        self.newest = (rows, slice(None), self.longest - 1 if self.row_bias is None else self.written_R - 1)
        return run_packed(decoder, tokens_R, positions_R, self)

    def __call__(self, layer: int, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> Tensor:
        R, P, K = len(self.prompt_R), len(self.lengths_P), len(key_KND)
        keys, values = self.row_cache[layer]
        keys[self.newest] = key_KND.transpose(0, 1)
        values[self.newest] = value_KND.transpose(0, 1)
        query_RHD = query_HND.transpose(0, 1)
        own = _flash(
            torch.unflatten(query_RHD, 1, (K, -1)),
            keys[:R, :, : self.longest],
            values[:R, :, : self.longest],
            attn_mask=self.row_bias,
            scale=scale,
        )
        keys, values = (cache[:P, :, : self.prompt_length] for cache in self.prompt_cache[layer])
        query = self.groups.rows(query_RHD)
        of_prompt = _flash(_fold(query, keys), keys, values, attn_mask=self.prompt_bias, scale=scale)
        return merge(
            (own[0].flatten(1, 2), own[1].flatten(1, 2)),
            (self.groups.flat(_unfold(of_prompt[0], query)), self.groups.flat(_unfold(of_prompt[1], query))),
        )

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows, and prompts that lose their last. Returns which row now lies in each place, int64 [r]."""
        order_R = self._fill(keep_R, self.row_cache)
        self.written_R, self.prompt_R = self.written_R[order_R], self.prompt_R[order_R]
        used_P = torch.zeros(len(self.lengths_P), dtype=torch.bool, device=keep_R.device)
        used_P[self.prompt_R] = True
        order_P = self._fill(used_P, self.prompt_cache)
        place_P = torch.empty_like(self.lengths_P)
        place_P[order_P] = torch.arange(len(order_P), device=keep_R.device)
        self.lengths_P, self.prompt_R = self.lengths_P[order_P], place_P[self.prompt_R]
        if len(order_R):
            self._place()
        return order_R

    @staticmethod
    def _fill(keep: Tensor, cache: Tensor) -> Tensor:
        """Move kept entries from the end into the places of dropped ones; returns the old place of each."""
        count = int(keep.sum())
        holes = (~keep[:count]).nonzero()[:, 0]
        movers = keep[count:].nonzero()[:, 0] + count
        cache[:, :, holes] = cache[:, :, movers]
        order = torch.arange(count, device=keep.device)
        order[holes] = movers
        return order

    def _place(self) -> None:
        """Which rows' queries meet which prompt's keys; anew whenever rows come or go."""
        P = len(self.lengths_P)
        self.prompt_length = int(self.lengths_P.max())
        inside_PL = torch.arange(self.prompt_length, device=self.lengths_P.device) < self.lengths_P[:, None]
        self.prompt_bias = _padding_bias(inside_PL, self.lengths_P.device)
        counts_P = torch.bincount(self.prompt_R, minlength=P)
        order_R = self.prompt_R.argsort(stable=True)
        index_PG = _ragged(counts_P, 0)
        self.groups = Layout(torch.where(index_PG >= 0, order_R[index_PG.clamp(min=0)], -1), self.prompt_R.device)
