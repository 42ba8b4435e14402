"""Attention over packed tokens in groups: no padding through the model, and each prompt's keys read once for its group.

A Hugging Face decoder is run on one flat sequence of tokens, [1, N], with explicit positions; its attention layers call
back (`interface`), and an `Attend` says what each token may look at: `Packed` in training, `Decoding` in generation.

This works for decoders whose attention goes through transformers' attention registry, is full (no sliding window) and
plain (no soft cap, no sinks); `packs` tells. Others take the general path, through padded batches.

On a CPU in float32 it runs on kernels (`groupwise.kernels`), and so do the layers around it (`fused`), in generation in one
call a step (`whole`); in other dtypes, and without a C++ compiler, on PyTorch's (`blocks`, `plain`). On a GPU training goes
through flex attention (`flexible`), and a step of generation is a captured graph (`steps`).
"""

from groupwise.attention.decoding import Decoding, affordable_rows, decodes, slower_path
from groupwise.attention.interface import recomputing, run_packed
from groupwise.attention.packed import Packed, packs
from groupwise.attention.whole import plan

__all__ = ["Decoding", "Packed", "affordable_rows", "decodes", "packs", "plan", "recomputing", "run_packed", "slower_path"]
