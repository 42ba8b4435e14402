"""Sampling one token per row from the softmax of its logits, in three passes over the logits: sample.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.kernels.compiled import function, library


def sample_kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """A function (logits [R, V], uniforms [R] in [0, 1)) -> (tokens [R], log-probabilities [R]); None if it cannot be compiled.

    Logits are float32 on the CPU, uniforms float64. Where a row's logits define no distribution (NaN, +inf, or all -inf) the
    token is V and the log-probability is undefined.
    """
    kernels = library("sample")
    if kernels is None:
        return None
    kernel = function(kernels, "sample", tensors=4, numbers=0, sizes=2)

    def sample(logits_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
        logits_RV, uniforms_R = logits_RV.contiguous(), uniforms_R.contiguous()
        tokens_R, logprobs_R = torch.empty_like(uniforms_R, dtype=torch.long), torch.empty_like(uniforms_R, dtype=torch.float32)
        kernel(logits_RV, uniforms_R, tokens_R, logprobs_R, *logits_RV.shape)
        return tokens_R, logprobs_R

    return sample
