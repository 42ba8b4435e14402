"""What each token counts in the loss: weights fixed for a whole optimiser step, before micro-batches are cut."""

import torch
from torch import Tensor

from groupwise.algorithms.advantages import group_sums


def token_weights(mask_BT: Tensor, mode: str, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """Weights w such that loss = (w * token_loss).sum().

    Args:
        mask_BT: bool [B, T], every row of the optimiser step.
        mode: with n rows that have a trained token, of |o_i| trained tokens each,
            "sequence_mean": 1 / (n |o_i|) (GRPO, arXiv 2402.03300, equation 3);
            "token_mean": 1 / sum |o_i| over the optimiser step (DAPO's code);
            "prompt_token_mean": 1 / (prompts * tokens of the prompt's group) (DAPO, arXiv 2503.14476, equation 8, literally);
            "sequence_sum": 1 / |o_i| (DCPO's OTM loss, arXiv 2509.02333, section 3.3);
            "constant": 1 / (n max_length) (Dr.GRPO, arXiv 2503.20783).
        group_ids_B: int [B]; needed by "prompt_token_mean".
        max_length: needed by "constant"; T when left out.

    Returns:
        float64 [B, T], 0 where masked. A row without a trained token does not count as a sequence.

    Raises:
        ValueError: an unknown mode, or a missing argument.
    """
    mask = mask_BT.double()
    lengths_B1 = mask.sum(1, keepdim=True)
    rows = (lengths_B1 > 0).sum().clamp(min=1)
    if mode == "sequence_mean":
        return mask / lengths_B1.clamp(min=1) / rows
    if mode == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if mode == "sequence_sum":
        return mask / lengths_B1.clamp(min=1)
    if mode == "constant":
        return mask / (rows * (max_length or mask_BT.shape[1]))
    if mode == "prompt_token_mean":
        if group_ids_B is None:
            raise ValueError("the aggregation prompt_token_mean needs group_ids_B")
        ids, group_B = torch.unique(group_ids_B, return_inverse=True)
        tokens = group_sums(lengths_B1[:, 0], group_B, len(ids))
        return mask / tokens[group_B].clamp(min=1)[:, None] / (tokens > 0).sum().clamp(min=1)
    raise ValueError(f"unknown aggregation {mode!r}")
