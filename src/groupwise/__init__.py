"""groupwise: language models trained on rewards that can be checked, with the group-relative family of algorithms."""

from groupwise.algorithms import *  # noqa: F403
from groupwise.algorithms import __all__ as __all__
