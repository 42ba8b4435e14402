"""What every command shares: the application, its consoles, options, and how errors become exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from groupwise.errors import RunError, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on rewards that can be checked: GRPO, DAPO, GSPO, DCPO and their family.",
)
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in learner.learning_rate=1e-4.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; by default a new directory under runs/.")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors that have a message become that message and an exit code."""
    try:
        yield
    except UserError as error:
        complaints.print(Text(f"error: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(2) from error
    except RunError as error:
        complaints.print(Text(f"the run failed: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    except OSError as error:  # a full disk, a file that cannot be written
        complaints.print(Text(f"the run failed: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        complaints.print("interrupted", style="yellow")
        raise typer.Exit(130) from error
