"""verl's compute_score as a reward of groupwise: called for all completions of a problem at once."""

from compute_score import compute_score


def reward(problem, completions):
    """The columns of a row that are neither prompt nor answer are in problem.metadata."""
    source, extra = problem.metadata["data_source"], problem.metadata.get("extra_info")
    scores = [compute_score(source, text, problem.answer, extra) for text in completions]
    return [float(score["score"] if isinstance(score, dict) else score) for score in scores]
