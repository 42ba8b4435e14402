"""How many files and connections this process may have open."""

import errno
import resource

MOST = 65_536
"""Enough for a connection per request; some programs that a process starts close as many as it may have."""


def allow_many() -> None:
    """Raise the limit to what this user may have: a usual one, 1,024, is too low for a connection per request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def ran_out(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is that there are too many."""
    while error is not None and not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        error = error.__cause__ or error.__context__
    return error is not None
