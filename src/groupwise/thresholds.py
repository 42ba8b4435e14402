"""From which values on a run counts as unhealthy: the events of a running one and the findings of its report agree on them."""

ENTROPY_LEFT = 0.2
"""Of the first steps' entropy; below it the entropy has collapsed."""
SOLVED = 0.9
"""A pass rate above which certainty, and groups that are all correct, are what was wanted."""
LARGEST_GAP = 0.02
"""Nats between the sampler's and the learner's log-probabilities of a token, on average, that rounding to bfloat16 explains."""
EVERYWHERE_USED = 0.6
"""Share of completions with an advantage, above which zero-variance groups are no loss: a critic, a history or rewards of steps
give them one."""
