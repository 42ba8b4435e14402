"""groupwise watch, and groupwise train --watch."""

import asyncio
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import app, console, exit_codes
from groupwise.errors import UserError

PORT = 8420
TOKEN = "GROUPWISE_WATCH_TOKEN"
"""The environment variable that sets the token in the page's address; others would see an option in the list of processes."""
LEAST_TOKEN = 16
"""Characters of a token that a user chose."""
NICE = 5
"""Gives way to a run on the same machine, and is not starved by it: steps are to be shown within two seconds."""
PATIENCE = 5.0
"""Seconds that the page's server has to end."""


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, ladders, or directories of runs, in which new ones appear.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"0 takes a free one. Left out: {PORT}, or a free one.")
    ] = None,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the page in the browser. Left out: where there is a screen.")
    ] = None,
) -> None:
    """Follow runs on a page of this machine while they go on: figures, findings, events, completions, time left."""
    from groupwise.evidence.following import Following
    from groupwise.evidence.live.hub import Hub
    from groupwise.evidence.live.server import address, listen, make_app, serve
    from groupwise.evidence.reading import load_arrow
    from groupwise.training.interrupts import STOPS, exit_code

    with exit_codes():
        token = _token(os.environ.get(TOKEN))
        try:
            listening = listen(host, PORT if port is None else port)
        except UserError:
            if port is not None:
                raise
            listening = listen(host, 0)
        load_arrow()
        os.nice(NICE)

        def ready(closing: ExitStack) -> None:
            page = address(listening, token)
            console.print(f"watching {', '.join(map(str, runs))} at {page}", soft_wrap=True, highlight=False)
            if show or (show is None and _has_screen()):
                typer.launch(closing.enter_context(_leading_to(page)))

        async def main() -> int:
            hub = Hub(Following(runs))
            app = make_app(hub, token, host, ", ".join(run.name for run in runs))
            with ExitStack() as closing:
                return await serve(hub, app, listening, STOPS, partial(ready, closing))

        number = asyncio.run(main())
    raise typer.Exit(exit_code(number))


@contextmanager
def watched(run: Path) -> Iterator[None]:
    """Within: a process of its own serves the page about a run, and the console says where. The run does not wait for it and
    goes on without it; it ends with this process, however that ends, after it has sent the page the last step."""
    others = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # of torchrun, whose process it is not
    environment = {key: value for key, value in os.environ.items() if key not in others}
    process = subprocess.Popen(
        [sys.executable, "-m", "groupwise.experiments.child", str(os.getpid()), "watch", str(run), "--no-open"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # Ctrl-C in the terminal is for the run, which may finish its step
    )
    threading.Thread(target=_say, args=(process,), daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _say(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        console.print(line.rstrip(), soft_wrap=True)


@contextmanager
def _leading_to(address: str) -> Iterator[str]:
    """A file of this user's alone that leads a browser to an address: an argument of its process would be seen by others."""
    with tempfile.TemporaryDirectory(prefix="groupwise-watch-") as private:
        path = Path(private) / "open.html"
        path.write_text(f'<meta http-equiv="refresh" content="0; url={address}">')
        yield path.as_uri()


def _token(text: str | None) -> str:
    """
    Raises:
        UserError: it cannot be part of an address, or is short.
    """
    if text is None:
        return secrets.token_urlsafe(18)
    if len(text) < LEAST_TOKEN or not all(sign.isascii() and (sign.isalnum() or sign in "-_") for sign in text):
        raise UserError(f"{TOKEN}: at least {LEAST_TOKEN} letters (a to z), digits, - and _")
    return text


def _has_screen() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
