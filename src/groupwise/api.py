"""`groupwise.train`: a run from Python, as `groupwise train` does it."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groupwise.algorithms import PARTS, OwnPart
from groupwise.config.trees import flat
from groupwise.copies import refuse_copies
from groupwise.evidence.runs import Run, open_run
from groupwise.plugins import UserFunction


def train(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train a model, and return what the run recorded.

    Args:
        recipe: a TOML file, the name of a shipped recipe, a mapping of the same form laid over the embedded default, or None for
            that default as it is.
        out: where to write; by default a new directory under runs/.
        resume: go on with the run in this directory instead.
        quiet: show no progress.
        overrides: settings by table, as in `learner={"learning_rate": 1e-5}`, or by dotted key, as in
            `**{"learner.learning_rate": 1e-5}`. Parts of the algorithm may be Python functions or dataclasses of yours, and
            rewards functions or other callable objects.

    Raises:
        UserError: the recipe is wrong; the message names the place. Or torchrun has started several copies of the program.
        RunError: the run failed on its way; what was reached is saved.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and what was reached is saved; at the second one at once.
    """
    from groupwise.cluster import launch_of
    from groupwise.training import session
    from groupwise.training.output import make_console

    refuse_copies("groupwise.train()")
    changes = flat(recipe) if isinstance(recipe, Mapping) else {}
    changes |= flat(overrides)
    plan = session.plan(
        None if isinstance(recipe, Mapping) else recipe,
        changes={key: _own_code(key, value) for key, value in changes.items()},
        out=None if out is None else Path(out),
        resume=None if resume is None else Path(resume),
    )
    session.run(plan, make_console(quiet=quiet), launch=launch_of(plan.recipe))
    return open_run(plan.path)


def _own_code(key: str, value: Any) -> Any:
    """A part or reward given as a Python object, with the name by which the run's recipe can find it again."""
    table, _, kind = key.partition(".")
    if table == "environment":
        return [_own_tool(item) for item in value] if isinstance(value, list | tuple) else _own_tool(value)
    if key == "task.reward" and isinstance(value, list | tuple):
        return [_own_code(key, item) for item in value]
    if key == "task.reward" and callable(value):
        return UserFunction(value, _reference(value))
    if table != "algorithm" or kind not in PARTS or not callable(value):
        return value
    return OwnPart(target=value, reference=_reference(value))


def _own_tool(value: Any) -> Any:
    """An environment class or a tool given as a Python object, with its name."""
    return UserFunction(value, _reference(value)) if callable(value) else value


def _reference(value: Callable[..., Any]) -> str:
    """ "file.py:name" where it has one; a part typed into a notebook has none, and its run can only be resumed there."""
    named = value if hasattr(value, "__qualname__") else type(value)
    try:
        file = inspect.getsourcefile(named)
    except TypeError:
        file = None
    return f"{file or named.__module__}:{named.__qualname__}"
