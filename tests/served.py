"""Samplers in processes of their own (`groupwise serve`), for tests that kill them."""

import json
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.launcher import Launcher, Running


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Quiet(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: object) -> None:
        """The client has gone."""


@contextmanager
def answering(answers: Mapping[str, tuple[int, Any]]) -> Iterator[tuple[str, Counter[str]]]:
    """A server that answers each path with this status and JSON, others with 404, the status 0 by closing the connection, and
    -1 never; gives its address, and how often each path was asked for."""
    asked: Counter[str] = Counter()
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            asked[self.path] += 1
            status, value = answers.get(self.path, (404, None))
            if status < 0:
                ended.wait()
            if status <= 0:
                self.close_connection = True
                return
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            ended.set()
            server.shutdown()
            thread.join()


class Servers:
    """Servers of one model, forked from a process that has imported everything. They can be restarted
    (`groupwise.rollouts.attending.Restarts`)."""

    def __init__(self, launcher: Launcher, model: str, logs: Path) -> None:
        self.launcher, self.model, self.logs = launcher, model, logs
        self.running: dict[int, Running] = {}
        self.addresses: dict[int, str] = {}
        self.reasons: list[tuple[int, str]] = []
        """Of each restart: which server, and why."""

    def alive(self, count: int) -> list[str]:
        """The addresses of so many, of which those that are dead, or not there yet, are started. They may not answer yet."""
        self.reasons.clear()
        for index in range(count):
            if index not in self.running or self.running[index].code is not None:
                self.start(index)
        return [self.addresses[index] for index in range(count)]

    def start(self, index: int, port: int | None = None) -> str:
        """Start one; `port`: None takes a free one."""
        port = port or free_port()
        self.running[index] = self.launcher.start(["serve", self.model, "--port", port], self.logs / f"server{index}.log")
        self.addresses[index] = f"http://127.0.0.1:{port}"
        return self.addresses[index]

    def send(self, index: int, number: int) -> None:
        self.running[index].send(number)

    def kill(self, index: int) -> None:
        """Also if it is frozen; returns when it has ended."""
        with suppress(ProcessLookupError):
            self.send(index, signal.SIGKILL)
        self.running[index].ends(20)

    async def restart(self, index: int, reason: str) -> str:
        self.reasons.append((index, reason))
        self.kill(index)
        return self.start(index)

    def ended(self, index: int) -> str | None:
        code = self.running[index].code
        return None if code is None else f"exit code {code}"

    def close(self) -> None:
        for index in self.running:
            self.kill(index)
