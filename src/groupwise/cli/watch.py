"""groupwise watch."""

import asyncio
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import app, console, exit_codes
from groupwise.errors import UserError

PORT = 8420
LEAST_TOKEN = 16
"""Characters of a token that a user chose."""


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, ladders, or directories of runs, in which new ones appear.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"0 takes a free one. Left out: {PORT}, or a free one.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="GROUPWISE_WATCH_TOKEN", help="Part of the page's address. Left out: random."),
    ] = None,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the page in the browser. Left out: where there is a screen.")
    ] = None,
) -> None:
    """Follow runs on a page of this machine while they go on: figures, findings, events, completions, time left."""
    from groupwise.evidence.following import Following
    from groupwise.evidence.live.hub import Hub
    from groupwise.evidence.live.server import address, listen, make_app, serve
    from groupwise.training.interrupts import STOPS, exit_code

    with exit_codes():
        token = _token(token)
        try:
            listening = listen(host, PORT if port is None else port)
        except UserError:
            if port is not None:
                raise
            listening = listen(host, 0)
        os.nice(10)  # a run on this machine comes first

        def ready() -> None:
            page = address(listening, token)
            console.print(f"watching {', '.join(map(str, runs))} at {page}", soft_wrap=True, highlight=False)
            if show or (show is None and _has_screen()):
                typer.launch(page)

        async def main() -> int:
            hub = Hub(Following(runs))
            return await serve(hub, make_app(hub, token, host, ", ".join(run.name for run in runs)), listening, STOPS, ready)

        number = asyncio.run(main())
    raise typer.Exit(exit_code(number))


def _token(text: str | None) -> str:
    """
    Raises:
        UserError: it cannot be part of an address, or is short.
    """
    if text is None:
        return secrets.token_urlsafe(18)
    if len(text) < LEAST_TOKEN or not all(sign.isascii() and (sign.isalnum() or sign in "-_") for sign in text):
        raise UserError(f"--token: at least {LEAST_TOKEN} letters (a to z), digits, - and _")
    return text


def _has_screen() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
