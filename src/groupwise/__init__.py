"""groupwise: language models trained on rewards that can be checked, with the group-relative family of algorithms.

Train from a recipe with `groupwise.train`, or put a loop together from its pieces: an algorithm (`named`, `policy_loss` and the
functions it is made of), a model (`LanguageModel`), a sampler (`NativeSampler`) and a learner (`LocalLearner`).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from groupwise.algorithms import *  # noqa: F403
from groupwise.algorithms import __all__ as _of_algorithms
from groupwise.errors import RunError as RunError
from groupwise.errors import UserError as UserError

if TYPE_CHECKING:
    from groupwise.api import train as train

_LAZY = {
    "train": "groupwise.api",
    "LanguageModel": "groupwise.models",
    "encode_prompt": "groupwise.models",
    "load_tokenizer": "groupwise.models",
    "NativeSampler": "groupwise.rollouts.native",
    "Request": "groupwise.rollouts.base",
    "Sampling": "groupwise.rollouts.base",
    "generate_all": "groupwise.rollouts.driver",
    "requests": "groupwise.rollouts.base",
    "LearnerSection": "groupwise.config",
    "LocalLearner": "groupwise.learner.local",
    "Run": "groupwise.evidence.runs",
    "open_run": "groupwise.evidence.runs",
    "Group": "groupwise.types",
    "Problem": "groupwise.types",
    "Score": "groupwise.types",
    "make_batch": "groupwise.training.batching",
    "minibatches": "groupwise.training.batching",
    "CreditAssigner": "groupwise.training.credit",
    "reward_parts": "groupwise.training.credit",
}
"""Imported when they are first used: transformers takes seconds to import, and a loop of one's own needs no more than it and
PyTorch, while recipes and runs need all dependencies."""

__all__ = [*_of_algorithms, *_LAZY, "RunError", "UserError"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # the metadata is there only once groupwise is installed
        return version("groupwise")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'groupwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
