"""Attention over packed sequences in PyTorch: rows padded for its flash kernel, and two softmaxes merged by their log-sum-exp.

The fallback of `kernels.packed_attention`: without a C++ compiler, and in other dtypes than float32. Here `lse` is the
log-sum-exp of a query's scores. The flash kernel knows neither sliding windows nor soft caps nor sinks: with any of them
`masked_attention` computes all scores.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groupwise.models.attention.attend import AttentionForm

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SIMILAR, SHORT = 0.7, 8
"""Rows share a padded kernel call when the shorter has at least this share of the longer's tokens, minus a few."""

CHUNK_SCORES = 1 << 19
"""`masked_attention` computes at most so many scores of each head at once."""


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys as attention over their union.

    Each is (output [..., D], normalised within its set; log-sum-exp of the set's scores [...]).
    """
    share = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0], second[0], share.to(first[0].dtype))


class PaddedBlocks:
    """The three blocks of attention: prompts to themselves, completions to themselves, completions to their prompts."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """Arguments as of `kernels.packed_attention.PackedRows`."""
        self.prompt_tokens = int(prompt_lengths.sum())
        self.prompts = PaddedLayout(ragged(prompt_lengths, 0), device)
        rows_RT = ragged(lengths_R, self.prompt_tokens)
        self.rows = [PaddedLayout(rows_RT[rows, : int(lengths_R[rows].max())], device) for rows in by_length(lengths_R)]
        members = [rows_RT[prompts_R == p] for p in range(len(prompt_lengths))]
        tokens = [rows[rows >= 0] for rows in members]
        self.groups = PaddedLayout(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1), device)
        self.prompt_bias = _padding_bias(self.prompts.inside, device)


class PaddedLayout:
    """Packed tokens as padded rows [R, T] and back, around one call of an attention kernel."""

    def __init__(self, index_RT: Tensor, device: Any) -> None:
        """`index_RT`: the packed index of each position of the rows, -1 for padding."""
        self.shape = tuple(index_RT.shape)
        inside = index_RT >= 0
        self.full = bool(inside.all())
        self.inside = inside.to(device)
        self.index = index_RT.clamp(min=0).flatten().to(device)
        flat = index_RT.flatten()
        kept = (flat >= 0).nonzero()[:, 0]
        order = flat[kept].argsort()
        self.back = kept[order].to(device)
        """Of each packed token, its index among the padded positions; in packed order."""
        self.tokens = flat[kept][order].to(device)
        """The packed tokens that are in some row."""

    def rows(self, flat_NHD: Tensor) -> Tensor:
        """[R, H, T, D] (or [R, H, T] from [N, H]), 0 in the padding."""
        rows = flat_NHD.index_select(0, self.index).view(*self.shape, *flat_NHD.shape[1:])
        if not self.full:
            rows.masked_fill_(~self.inside.view(*self.shape, *[1] * (flat_NHD.dim() - 1)), 0)
        return rows.transpose(1, 2)

    def flat(self, rows: Tensor) -> Tensor:
        """The tokens of [R, H, T, ...] in packed order, [n, H, ...]."""
        return rows.transpose(1, 2).flatten(0, 1).index_select(0, self.back)


class PaddedBlockAttention(torch.autograd.Function):
    """The keys of a prompt meet the queries of all its completions in one matmul.

    The backward pass of a block needs only the merged output and the merged log-sum, since they give the block's
    softmax weights; so no block's own output is kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PaddedBlocks, scale: float) -> Tensor:
        n = layout.prompt_tokens
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        if n:
            q, k, v = layout.prompts.rows(query), layout.prompts.rows(key), layout.prompts.rows(value)
            o, s = _flash(q, *_repeat(q, k, v), 0.0, True, scale=scale)
            output[:n], lse[:n] = layout.prompts.flat(o), layout.prompts.flat(s)
        if n < len(query):
            for rows in layout.rows:
                q, k, v = rows.rows(query), rows.rows(key), rows.rows(value)
                o, s = _flash(q, *_repeat(q, k, v), 0.0, True, scale=scale)
                output[rows.tokens], lse[rows.tokens] = rows.flat(o), rows.flat(s)
            if n:
                q, k, v = layout.groups.rows(query), layout.prompts.rows(key), layout.prompts.rows(value)
                o, s = _flash(_fold(q, k), k, v, 0.0, False, attn_mask=layout.prompt_bias, scale=scale)
                of_prompt = layout.groups.flat(_unfold(o, q)), layout.groups.flat(_unfold(s, q))
                output[n:] = merge((output[n:], lse[n:]), of_prompt)
                lse[n:] = torch.logaddexp(lse[n:], of_prompt[1])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        gradient, layout, scale = gradients[0].contiguous(), ctx.layout, ctx.scale
        n = layout.prompt_tokens
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

        for rows in [layout.prompts, *layout.rows]:
            if len(rows.tokens):
                q, k, v, o, s, g = (rows.rows(x) for x in (query, key, value, output, lse, gradient))
                dq, dk, dv = _flash_backward(g, q, *_repeat(q, k, v), o, s, 0.0, True, scale=scale)
                d_query[rows.tokens] = rows.flat(dq)
                d_key[rows.tokens] = rows.flat(_sum_repeats(dk, k))
                d_value[rows.tokens] = rows.flat(_sum_repeats(dv, v))
        if 0 < n < len(query):
            q, o, s, g = (layout.groups.rows(x) for x in (query, output, lse, gradient))
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
    """Query heads that share a key-value head, as more queries of that head: [R, H, T, ...] to [R, K, (H / K) T, ...]."""
    return x if x.shape[1] == key.shape[1] else torch.unflatten(x, 1, (key.shape[1], -1)).flatten(2, 3)


def _unfold(x: Tensor, query: Tensor) -> Tensor:
    H, T = query.shape[1:3]
    return x if x.shape[1] == H else torch.unflatten(x, 2, (-1, T)).flatten(1, 2)


def _padding_bias(inside_PL: Tensor, device: Any) -> Tensor | None:
    """What to add to scores so that padded keys get no attention, [P, 1, 1, L]; None where there is no padding."""
    if bool(inside_PL.all()):
        return None
    return torch.zeros(inside_PL.shape, device=device).masked_fill(~inside_PL, -torch.inf)[:, None, None]


def by_length(lengths_R: Tensor) -> list[Tensor]:
    """Rows (int64 [r] each) in sets of similar length, so that little is padded; rows without a token are in none."""
    order = lengths_R.argsort(descending=True)
    sets: list[list[int]] = []
    longest = 0
    for row, length in zip(order.tolist(), lengths_R[order].tolist(), strict=True):
        if length > 0:
            if not sets or length < SIMILAR * longest - SHORT:
                sets.append([])
                longest = length
            sets[-1].append(row)
    return [torch.tensor(rows) for rows in sets]


def ragged(lengths_R: Tensor, offset: int) -> Tensor:
    """Packed indices [R, T] of rows that follow each other from `offset`; -1 after a row's end."""
    ends_R = lengths_R.cumsum(0)
    position_T = torch.arange(int(lengths_R.max()) if len(lengths_R) else 0)
    index_RT = offset + (ends_R - lengths_R)[:, None] + position_T
    return torch.where(position_T < lengths_R[:, None], index_RT, -1)


class QueryChunk(NamedTuple):
    """Consecutive queries of one row or several, and the keys that some of them see."""

    queries_RT: Tensor
    """The packed index of each query, 0 for padding."""
    keys_RS: Tensor
    visible_RTS: Tensor
    """Which queries see which keys. A padded query sees some too, since the softmax over none would be NaN."""


class QueryChunks:
    """All queries, in chunks of a moderate number of scores."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, window: int, device: Any) -> None:
        """Arguments as of `kernels.packed_attention.PackedRows`, and the sliding window of attention or 0."""
        lengths = [*prompt_lengths.tolist(), *lengths_R.tolist()]
        own = torch.split(torch.arange(sum(lengths)), lengths)
        prompts, rows = own[: len(prompt_lengths)], own[len(prompt_lengths) :]
        # Each sequence and how many of its tokens are no queries of this row but of its prompt.
        sequences = [(prompt, 0) for prompt in prompts]
        sequences += [(torch.cat([prompts[p], row]), len(prompts[p])) for p, row in zip(prompts_R.tolist(), rows, strict=True)]
        blocks = [block for sequence, start in sequences for block in _query_blocks(sequence, start, window)]
        self.chunks: list[QueryChunk] = []
        order: list[Tensor] = []
        for taken in _together(blocks):
            queries_RT, keys_RS, query_positions_RT, key_positions_RS = (
                torch.nn.utils.rnn.pad_sequence([block[i] for block in taken], batch_first=True, padding_value=-1)
                for i in range(4)
            )
            distance_RTS = query_positions_RT[:, :, None] - key_positions_RS[:, None]
            visible_RTS = (distance_RTS >= 0) & (key_positions_RS >= 0)[:, None]
            if window:
                visible_RTS &= distance_RTS < window
            visible_RTS |= (queries_RT < 0)[:, :, None]
            self.chunks.append(QueryChunk(*(x.to(device) for x in (queries_RT.clamp(min=0), keys_RS.clamp(min=0), visible_RTS))))
            order.append(queries_RT.flatten())
        flat = torch.cat(order) if order else torch.zeros(0, dtype=torch.long)
        kept = (flat >= 0).nonzero()[:, 0]
        self.back = kept[flat[kept].argsort()].to(device)
        """Of each packed token, its index among the padded queries of all chunks."""


Block = tuple[Tensor, Tensor, Tensor, Tensor]
"""Some queries of a row and the keys that they see: the packed indices of both, and their positions in the sequence."""


def _query_blocks(sequence: Tensor, start: int, window: int) -> list[Block]:
    """The queries of a sequence from the token `start` on, in blocks of at most CHUNK_SCORES scores."""
    size = max(1, CHUNK_SCORES // max(1, len(sequence)))
    position = torch.arange(len(sequence))
    blocks = []
    for first in range(start, len(sequence), size):
        queries = slice(first, min(first + size, len(sequence)))
        keys = slice(max(0, first - window + 1) if window else 0, queries.stop)
        blocks.append((sequence[queries], sequence[keys], position[queries], position[keys]))
    return blocks


def _together(blocks: list[Block]) -> list[list[Block]]:
    """Blocks of similar sizes, as many as have CHUNK_SCORES scores once they are padded."""
    chunks: list[list[Block]] = []
    queries = keys = 0
    for block in sorted(blocks, key=lambda block: (len(block[1]), len(block[0])), reverse=True):
        queries, keys = max(queries, len(block[0])), max(keys, len(block[1]))
        if not chunks or (len(chunks[-1]) + 1) * queries * keys > CHUNK_SCORES:
            chunks.append([])
            queries, keys = len(block[0]), len(block[1])
        chunks[-1].append(block)
    return chunks


def masked_attention(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, layout: QueryChunks, scale: float, form: AttentionForm
) -> Tensor:
    """Attention of any form, [N, H, D], by the formula; differentiable. The backward pass computes a chunk's scores again."""
    outputs = [
        checkpoint(
            _masked_chunk,
            query_NHD,
            key_NKD,
            value_NKD,
            chunk,
            scale,
            form.softcap,
            form.sinks_H,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for chunk in layout.chunks
    ]
    return torch.cat(outputs).index_select(0, layout.back) if outputs else query_NHD


def _masked_chunk(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, chunk: QueryChunk, scale: float, softcap: float, sinks_H: Tensor | None
) -> Tensor:
    """The output of a chunk's queries, padding included, [R T, H, D]. Computed in float32 at least."""
    dtype, K = query_NHD.dtype, key_NKD.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(query_NHD.device.type, enabled=False):
        query_RTKSD = torch.unflatten(query_NHD[chunk.queries_RT].to(wide), 2, (K, -1))
        key_RSKD, value_RSKD = (x[chunk.keys_RS].to(wide) for x in (key_NKD, value_NKD))
        scores = torch.einsum("rtkhd,rskd->rkhts", query_RTKSD, key_RSKD) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~chunk.visible_RTS[:, None, None], -torch.inf)
        if sinks_H is not None:
            sinks = sinks_H.to(wide).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : chunk.keys_RS.shape[1]]
        output = torch.einsum("rkhts,rskd->rtkhd", weights, value_RSKD)
    return output.flatten(2, 3).flatten(0, 1).to(dtype)
