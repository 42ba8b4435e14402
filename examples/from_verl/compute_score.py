"""A reward in verl's form, called for each completion."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1.0 where the last number of the completion is the answer."""
    numbers = re.findall(r"-?\d+", solution_str)
    right = bool(numbers) and numbers[-1] == ground_truth
    return {"score": float(right), "acc": right}
