"""What the papers say: pure functions of tensors, and the algorithms they compose.

Imports torch and the standard library only.

Shapes in names: B completions, T completion tokens (right-padded).
"""

from groupwise.algorithms.advantages import (
    decoupled_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    process_advantages,
    smoothed_advantages,
    turn_advantages,
    whiten,
)
from groupwise.algorithms.aggregation import token_weights
from groupwise.algorithms.algorithm import PARTS, Algorithm
from groupwise.algorithms.allocation import Candidates
from groupwise.algorithms.clipping import dynamic_bounds, exponential_bounds, fixed_bounds
from groupwise.algorithms.credit import Credit, Outcomes
from groupwise.algorithms.kl import k1, k2, k3
from groupwise.algorithms.loss import policy_loss
from groupwise.algorithms.named import NAMED, named
from groupwise.algorithms.part import OwnPart, Part
from groupwise.algorithms.ratios import sequence_log_ratio, sequence_token_log_ratio, token_log_ratio
from groupwise.algorithms.selection import Results, mixed_groups
from groupwise.algorithms.shaping import adaptive_coefficient, soft_overlong_penalty
from groupwise.algorithms.surrogates import Terms

__all__ = [
    "NAMED",
    "PARTS",
    "Algorithm",
    "Candidates",
    "Credit",
    "Outcomes",
    "OwnPart",
    "Part",
    "Results",
    "Terms",
    "adaptive_coefficient",
    "decoupled_advantages",
    "dynamic_bounds",
    "exponential_bounds",
    "fixed_bounds",
    "gae",
    "group_advantages",
    "k1",
    "k2",
    "k3",
    "leave_one_out_advantages",
    "mixed_groups",
    "named",
    "policy_loss",
    "process_advantages",
    "sequence_log_ratio",
    "sequence_token_log_ratio",
    "smoothed_advantages",
    "soft_overlong_penalty",
    "token_log_ratio",
    "token_weights",
    "turn_advantages",
    "whiten",
]
