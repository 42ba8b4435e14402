"""The command line. Exit codes: 0 done, 1 a run failed, 2 the input is wrong, 130 interrupted, 143 asked to stop."""

import io
import sys

from groupwise.cli import (  # each adds its commands to the application
    ablate,
    algorithms,
    data,
    evaluate,
    evidence,
    export,
    init,
    ledger,
    plan,
    serve,
    track,
    train,
    watch,
)
from groupwise.cli.common import app as app
from groupwise.training.output import close_outputs

__all__ = [
    "ablate",
    "algorithms",
    "app",
    "data",
    "evaluate",
    "evidence",
    "export",
    "init",
    "ledger",
    "main",
    "plan",
    "serve",
    "track",
    "train",
    "watch",
]


def main() -> None:
    """The command `groupwise`. What its streams cannot take any more does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:  # a terminal that lacks a letter shows its code
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        close_outputs()
