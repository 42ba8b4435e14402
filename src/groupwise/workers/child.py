"""The program of a worker process. It imports the standard library only, so that it starts in some 30 ms. `keeper.py` runs it.

Run as a script, never imported by multiprocessing, whose spawned processes run the user's own script again. Requests come in on
standard input: id and length, then a pickle. Replies go out on what was standard output, as JSON after their length, so that
nothing a user's code made is ever unpickled by the process that trains. What the user's code prints goes to standard error.

Functions run one at a time in the main thread, where signals and `asyncio.run` work; what they return to be awaited runs in an
event loop of a second thread, any number at once. A third thread reads the requests.
"""

import contextlib
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from json import dumps, loads  # by name, since the user's code can put others in their modules
from pickle import loads as unpickle
from typing import Any, BinaryIO

HEADER = struct.Struct(">QQ")
"""Of a request: its id, and the bytes of its pickle."""
LENGTH = struct.Struct(">Q")
"""Of a reply, in bytes."""
PING, CANCEL = b"ping", b"cancel"
"""In place of a pickle: does the event loop still turn, and: nobody waits for this call any longer."""
LARGEST = 4 * 2**20
"""Characters and values that a result may have."""
DEEPEST = 32
"""Lists within lists."""
LONGEST_TEXT = 2000
"""Characters of an exception's text that are passed on."""
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 pathlib is slow to import
NICENESS = 10
"""Of a worker: where cores are few, those who generate keep them."""


class TooLarge(Exception):
    """A result is larger than is passed on."""


class Missing(Exception):
    """A file has no such function."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"there is no function {name!r}")
        self.known = known


class Encoder:
    """Values as JSON holds them: a mapping as {"map": …}, and what is no value, by its type's name, as {"other": name}."""

    def __init__(self) -> None:
        self.left = LARGEST

    def encode(self, value: Any, depth: int = 0) -> Any:
        """
        Raises:
            TooLarge: there are too many values, or they are too long.
        """
        self.spend(1)
        if value is None or type(value) in (bool, float):
            return value
        if isinstance(value, str):
            self.spend(len(value))
            return readable(str.__str__(value))
        if isinstance(value, int):
            return int(value) if abs(value) < 2**63 else _number(value)
        if depth == DEEPEST:
            raise TooLarge(f"lists nested more than {DEEPEST} deep")
        if isinstance(value, Mapping):
            return {"map": {self.encode(str(key)): self.encode(item, depth + 1) for key, item in value.items()}}
        if callable(getattr(value, "tolist", None)):  # arrays and tensors, those without an axis too
            return self.encode(value.tolist(), depth + 1)
        if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
            return [self.encode(item, depth + 1) for item in value]
        return _number(value)

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooLarge(f"the result has more than {LARGEST} characters and values")


def _number(value: Any) -> Any:
    if hasattr(type(value), "__float__") or hasattr(type(value), "__index__"):
        with contextlib.suppress(OverflowError, ValueError, TypeError):
            return float(value)
    return {"other": type(value).__name__}


def decode(value: Any, other: Callable[[str], Any]) -> Any:
    """What `Encoder` encoded; `other` makes something of the type's name of what is no value."""
    if isinstance(value, list):
        return [decode(item, other) for item in value]
    if isinstance(value, dict):
        if "other" in value:
            return other(value["other"])
        return {key: decode(item, other) for key, item in value["map"].items()}
    return value


def readable(text: str) -> str:
    """A text that can be written as UTF-8, which one of lone surrogates cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def text_of(error: BaseException) -> str:
    """An exception's text, which may itself raise."""
    try:
        return readable(str(error))[:LONGEST_TEXT]
    except BaseException as second:  # the user's exception may do anything
        return f"(its text cannot be had: {type(second).__name__})"


def describe_error(error: BaseException) -> str:
    """Type, text and the line that raised."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        file, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        if file != __file__ and not file.startswith("<frozen"):
            place = f" ({os.path.basename(file)}, line {line})"  # noqa: PTH119 pathlib takes as long to import as all the rest
        traceback = traceback.tb_next
    text = text_of(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def load_file(path: str, name: str) -> Any:
    """The object `name` of a file, whose folder can be imported from.

    The file runs once, whether it is loaded here or imported by another of the user's files, so that a reward that imports an
    environment's class has the class of the instances.

    Raises:
        Missing: the file has none of that name.
    """
    import importlib.util

    folder, file = os.path.split(path)
    plain_name = file.removesuffix(".py")
    module_name = f"groupwise_user_{plain_name}"
    known = [sys.modules[key] for key in (module_name, plain_name) if key in sys.modules]
    module = next((item for item in known if getattr(item, "__file__", None) == path), None)
    if module is None:
        if folder not in sys.path and not folder.startswith(PACKAGE):  # whose modules are no user's to import by their bare names
            sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        sys.modules.setdefault(plain_name, module)
    if not callable(getattr(module, name, None)):
        raise Missing(name, [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")])
    return getattr(module, name)


def describe(target: Any) -> dict[str, Any]:
    """What a caller must know of a function: its parameters, and whether it is to be awaited."""
    import functools
    import inspect

    function = target
    while isinstance(function, functools.partial):
        function = function.func
    called = None if isinstance(function, type) else type(function).__call__
    awaited = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
    try:
        found = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {"awaited": awaited, "parameters": None}
    parameters = [{"name": item.name, "kind": item.kind.name, "required": item.default is item.empty} for item in found]
    return {"awaited": awaited, "parameters": parameters}


class Worker:
    """Targets and instances of this process, and the calls under way."""

    def __init__(self, replies: BinaryIO) -> None:
        self.replies = replies
        self.pid = os.getpid()
        self.errors = os.dup(2)
        self.writing = threading.Lock()
        self.targets: dict[str, Any] = {}
        self.instances: dict[int, Any] = {}
        self.waiting: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.loop: Any = None
        self.tasks: dict[int, Any] = {}

    # --- operations: each takes the request's fields

    def load(self, key: str, file: str, name: str, value: bytes, **_: Any) -> None:
        if key not in self.targets:
            self.targets[key] = load_file(file, name) if file else unpickle(value)

    def describe(self, target: str, **_: Any) -> dict[str, Any]:
        return describe(self.targets[target])

    def call(self, target: str, args: Any, kwargs: dict[str, Any], handles: dict[str, Any], **_: Any) -> Any:
        instances = {name: [self.instances[handle] for handle in listed] for name, listed in handles.items()}
        return self.targets[target](*args, **kwargs, **instances)

    def new(self, target: str, args: Any, kwargs: dict[str, Any], number: int, **_: Any) -> int:
        self.instances[number] = self.targets[target](*args, **kwargs)
        return number

    def method(self, handle: int, name: str, args: Any, kwargs: dict[str, Any], **_: Any) -> Any:
        return getattr(self.instances[handle], name)(*args, **kwargs)

    def drop(self, handle: int | None, **_: Any) -> None:
        if handle is None:
            self.instances.clear()
        else:
            self.instances.pop(handle, None)

    # --- requests and replies

    def reply(self, number: int, **fields: Any) -> None:
        if os.getpid() != self.pid:  # a process that the user's code forked, and which came back as if it were this one
            os._exit(0)
        data = dumps({"id": number, **fields}).encode()
        with self.writing:
            self.replies.write(LENGTH.pack(len(data)) + data)
            self.replies.flush()

    def serve(self, requests: BinaryIO) -> None:
        """Until the other end is closed."""
        threading.Thread(target=self.read, args=(requests,), daemon=True).start()
        while True:
            self.handle(*self.waiting.get())

    def read(self, requests: BinaryIO) -> None:
        """Pass requests to the main thread, and what concerns the event loop to that."""
        try:
            while len(header := requests.read(HEADER.size)) == HEADER.size:
                number, length = HEADER.unpack(header)
                payload = requests.read(length)
                if payload == PING:
                    self.on_loop(self.pong, number)
                elif payload == CANCEL:
                    self.on_loop(self.cancel, number)
                else:
                    self.waiting.put((number, payload))
        finally:  # the user's code can also have raised something in this thread
            os.killpg(0, signal.SIGKILL)

    def on_loop(self, action: Callable[[int], Any], number: int) -> None:
        if self.loop is None:
            action(number)
        else:
            self.loop.call_soon_threadsafe(action, number)

    def pong(self, number: int) -> None:
        self.succeed(number, None, False, Logs())

    def cancel(self, number: int) -> None:
        if number in self.tasks:
            self.tasks[number].cancel()

    def handle(self, number: int, payload: bytes) -> None:
        """Run a request, and reply; what it returns to be awaited is left to the event loop."""
        logs = Logs()
        mend_streams(self.errors)
        try:
            request = unpickle(payload)
            if request["clock"] == "called":
                self.reply(number, began="called")
            if request["logs"]:
                request["kwargs"] = {**request["kwargs"], "log_extra": logs.extra, "log_metric": logs.metric}
            if request["cpu_limit"]:
                signal.setitimer(signal.ITIMER_VIRTUAL, request["cpu_limit"])  # whose signal ends the process
            value = getattr(self, request["operation"])(**request, number=number)
            awaitable = hasattr(value, "__await__")
        except BaseException as error:  # the user's code may raise anything, SystemExit too
            self.fail(number, error)
            return
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if awaitable:
            self.start_loop()
            self.loop.call_soon_threadsafe(self.start_task, number, value, request["text"], logs)
        else:
            self.succeed(number, value, request["text"], logs)

    def start_loop(self) -> None:
        if self.loop is None:
            import asyncio

            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start_task(self, number: int, awaitable: Any, text: bool, logs: "Logs") -> None:
        self.tasks[number] = self.loop.create_task(self.finish(number, awaitable, text, logs))

    async def finish(self, number: int, awaitable: Any, text: bool, logs: "Logs") -> None:
        self.reply(number, began="awaited")
        try:
            value = await awaitable
        except BaseException as error:  # the user's code may raise anything, SystemExit too
            self.fail(number, error)
        else:
            self.succeed(number, value, text, logs)
        finally:
            del self.tasks[number]

    def succeed(self, number: int, value: Any, text: bool, logs: "Logs") -> None:
        encoder = Encoder()
        try:
            result = encoder.encode(str(value) if text else value)
            logged = {"extra": encoder.encode(logs.columns), "metrics": encoder.encode(logs.values)}
        except BaseException as error:  # as may the objects that it returned
            self.fail(number, error, "too large" if isinstance(error, TooLarge) else "bad result")
        else:
            self.reply(number, value=result, **logged)

    def fail(self, number: int, error: BaseException, failure: str = "raised") -> None:
        known = error.known if isinstance(error, Missing) else None
        detail = text_of(error) if isinstance(error, TooLarge) else describe_error(error)
        self.reply(number, failure=failure, detail=detail, text=text_of(error), known=known)


def mend_streams(errors: int) -> None:
    """Open standard output and standard error again, where an earlier call closed them; `errors`: a copy of the latter."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(errors, number)
        if getattr(getattr(sys, name, None), "closed", True):
            setattr(sys, name, open(number, "w", buffering=1, errors="replace", closefd=False))  # noqa: SIM115


class Logs:
    """What a reward logs: TRL's `log_extra` and `log_metric`."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self.values: dict[str, list[Any]] = {}

    def extra(self, column: str, values: Iterable[Any]) -> None:
        self.columns.setdefault(column, []).extend(values)

    def metric(self, name: str, value: Any) -> None:
        self.values.setdefault(name, []).append(value)


def main() -> None:
    os.nice(NICENESS)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.path[:] = loads(sys.argv[1])
    sys.argv[1:] = []
    Worker(replies).serve(requests)


if __name__ == "__main__":
    main()
