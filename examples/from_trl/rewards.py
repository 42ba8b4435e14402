"""Two rewards in TRL's form; the TRL script and the groupwise recipe use this file as it is."""

import re


def right(completions, solution, **kwargs):
    """1.0 where the last number of the completion is the solution."""
    numbers = [re.findall(r"-?\d+", completion) for completion in completions]
    return [float(bool(found) and found[-1] == expected) for found, expected in zip(numbers, solution, strict=True)]


def brevity(completion_ids, **kwargs):
    """Up to 1.0 for a short completion; None, not applicable, for an empty one."""
    return [1.0 - len(ids) / 32 if len(ids) > 1 else None for ids in completion_ids]
