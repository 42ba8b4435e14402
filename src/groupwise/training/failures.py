"""What ended a run, as one message: errors of the library's own as they are, anything else with where it was raised."""

import sysconfig
import traceback
from pathlib import Path

import groupwise
from groupwise.errors import RunError, UserError, first_line, is_out_of_memory

OURS = str(Path(groupwise.__file__).parent)
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def explain(error: BaseException, what: str) -> RunError | UserError:
    """The error that a person is shown. `what`: was being done."""
    if isinstance(error, RunError | UserError):
        return error
    if is_out_of_memory(error):
        return RunError(
            f"{what}: out of memory: {first_line(error)}. Fewer rows at once (rollouts.max_rows), a shorter rollouts.max_tokens, "
            "a smaller rollouts.group_size or model.dtype = 'bfloat16' take less"
        )
    return RunError(f"{what}: {type(error).__name__}: {first_line(error)} ({place(error)})")


def place(error: BaseException) -> str:
    """The user's line that an exception passed last, else the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((OURS, *LIBRARIES, "<"))]
    if not frames:
        return "no line is known"
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"


def traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as own:  # the text of a user's exception may raise anything
        return f"cannot be formatted: {type(own).__name__}"
