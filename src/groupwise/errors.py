"""The two ways a command can end badly, each with one clear message."""

import reprlib

from groupwise.algorithms.part import nearest as nearest


class UserError(Exception):
    """The user's input is wrong: exit code 2. The message names the place, what was wrong and the nearest right thing."""


class RunError(Exception):
    """A run failed on its way, for a reason that is not the user's input: exit code 1."""


class Diverged(RunError):
    """Numbers are not finite. All processes of a learner see it alike, and none waits for another."""


class LearnerLost(RunError):
    """The learner's process has ended or no longer answers; what it had in memory is gone."""


def short(value: object, most: int = 80) -> str:
    """`repr` of a value for a message, cut to about `most` characters, however long or deeply nested it is."""
    cutter = reprlib.Repr()
    cutter.maxlevel, cutter.maxstring, cutter.maxother, cutter.maxlong = 4, most, most, most
    text = cutter.repr(value)
    return text if len(text) <= 2 * most else f"{text[:most]}…"


DIVERGED = "the weights have diverged: a lower learning rate or more warm-up may help"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated: of a GPU, or of the machine, which PyTorch reports as a
    RuntimeError like any other."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in text_of(error) for text in ALLOCATION_FAILED)


ALLOCATION_FAILED = (
    "DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "out of memory",
    "_STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN and their like
)  # fmt: skip


def text_of(error: BaseException) -> str:
    """What an exception says. That of a user's may raise anything instead."""
    try:
        return str(error)
    except BaseException as own:  # also sys.exit(): an error is being explained, and this is no reason to leave
        return f"its text raises {type(own).__name__}"


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and not without end."""
    lines = text_of(error).splitlines()
    return f"{lines[0]:.500}" if lines else "no text"
