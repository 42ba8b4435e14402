"""torchrun starts a program several times. Only `groupwise train` is made for that."""

import os

from groupwise.errors import UserError


def copies() -> int:
    """How many processes torchrun has started of this program, this one included; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def refuse_copies(what: str) -> None:
    """
    Args:
        what: of the program, would be done by each copy by itself.

    Raises:
        UserError: there are several.
    """
    if (count := copies()) > 1:
        raise UserError(
            f"torchrun has started {count} copies of this program, and {what} would run in each of them. "
            "torchrun --nproc-per-node N -m groupwise train RECIPE shards a learner"
        )
