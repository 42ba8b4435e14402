"""Which groups are worth an update."""

import torch
from torch import Tensor

from groupwise.algorithms.advantages import group_sums


def mixed_groups(correct_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """DAPO's condition 0 < #correct < G (arXiv 2503.14476, equation 11), bool [B]: True where the row's group has both outcomes.

    Args:
        correct_B: bool [B]. Decide on correctness, not on a shaped reward: a length penalty would let groups through
            that are all correct.
        group_ids_B: int [B].
    """
    ids, group_B = torch.unique(group_ids_B, return_inverse=True)
    right = group_sums(correct_B.double(), group_B, len(ids))
    wrong = group_sums(1 - correct_B.double(), group_B, len(ids))
    return ((right > 0) & (wrong > 0))[group_B]
