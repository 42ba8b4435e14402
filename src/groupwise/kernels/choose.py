"""One token for each row, drawn from the softmax of its scores in three readings of them: choose.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.kernels.compiled import function, library


def choose_kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """A function (scores [R, V], uniforms [R] in [0, 1)) -> (tokens [R], their log-probabilities [R]); None where there is none.

    Scores are float32 on the CPU, uniforms float64. The token is V where a row's scores are no distribution.
    """
    kernels = library("choose")
    if kernels is None:
        return None
    kernel = function(kernels, "choose", tensors=4, numbers=0, sizes=2)

    def choose(scores_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
        scores_RV, uniforms_R = scores_RV.contiguous(), uniforms_R.contiguous()
        tokens_R, logprobs_R = torch.empty_like(uniforms_R, dtype=torch.long), torch.empty_like(uniforms_R, dtype=torch.float32)
        kernel(scores_RV, uniforms_R, tokens_R, logprobs_R, *scores_RV.shape)
        return tokens_R, logprobs_R

    return choose
