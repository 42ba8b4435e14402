"""A tool for the task `calculator`."""

from groupwise.tasks.arithmetic import parse


def calculate(expression: str) -> int:
    """Evaluate an arithmetic expression.

    Args:
        expression: Integers of at most nine digits, joined by + - *, without spaces.
    """
    found = parse(expression)
    if found is None:
        raise ValueError(f"not an expression: {expression}")
    return found.value()
