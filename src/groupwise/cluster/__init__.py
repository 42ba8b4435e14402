"""A run in several processes: samplers and the learner in processes of their own, started, watched and restarted."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupwise.config import Recipe
    from groupwise.training.session import Launch


def launch_of(recipe: "Recipe") -> "Launch":
    """What starts the learner and the samplers of a recipe."""
    from groupwise.training.processes import has_processes
    from groupwise.training.session import in_process

    if not has_processes(recipe):
        return in_process
    from groupwise.cluster.launch import launch

    return launch
