"""What every command shares: the application, its consoles, options, and how errors become exit codes."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from groupwise.copies import copies, refuse_copies
from groupwise.errors import RunError, UserError, first_line
from groupwise.training.failures import place
from groupwise.training.output import make_console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on rewards that can be checked: GRPO, DAPO, GSPO, DCPO and their family.",
)
console = make_console("stdout")
complaints = make_console("stderr")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"groupwise {version('groupwise')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version_asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options without a command. Typer takes the help of the application from `app`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name need not be Unicode, and is printed all the same
            stream.reconfigure(errors="backslashreplace")
    if copies() > 1 and context.invoked_subcommand != "train":
        if os.environ.get("RANK", "0") != "0":
            raise typer.Exit(2)  # the first one says it
        with exit_codes():
            refuse_copies(f"groupwise {context.invoked_subcommand}")


Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in learner.learning_rate=1e-4.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; by default a new directory under runs/.")]


LONGEST_LINE, MOST_LINES = 2000, 40
"""What of a message is printed, which may quote a file of thousands of characters."""


def _cut(text: str) -> str:
    lines = text.splitlines()
    kept = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…" for line in lines[:MOST_LINES]]
    return "\n".join([*kept, *([f"… {len(lines) - MOST_LINES:,} more lines"] if len(lines) > MOST_LINES else [])])


@contextmanager
def exit_codes(*, as_json: bool = False) -> Iterator[None]:
    """Errors that have a message become that message and an exit code; with `as_json` also {"error": ...} on standard output."""
    try:
        yield
    except (UserError, RunError, OSError) as error:  # OSError: a full disk, a file that cannot be written
        wrong, message = isinstance(error, UserError), _cut(str(error))
        complaints.print(f"{'error' if wrong else 'the run failed'}: {message}", style="red", soft_wrap=True)
        if as_json:
            typer.echo(json.dumps({"error": message}))
        raise typer.Exit(2 if wrong else 1) from error
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, SystemExit) as error:  # a bug, or code of the user's in a place where nobody expected it to fail
        if os.environ.get("GROUPWISE_TRACEBACK"):
            raise
        text = (
            f"unexpected {type(error).__name__}: {first_line(error)} ({place(error)}). GROUPWISE_TRACEBACK=1 shows the traceback"
        )
        complaints.print(text, style="red", soft_wrap=True)
        if as_json:
            typer.echo(json.dumps({"error": text}))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        complaints.print("interrupted", style="yellow")
        raise typer.Exit(130) from error
