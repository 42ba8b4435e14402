"""Chat templates, which are programs that come with a model: run in the sandbox of transformers, with a limit of time and size.

The sandbox of Jinja keeps a template from everything outside of it, but not from computing for ever or filling the memory. Here
every loop, call, filter, operator and output of a template passes a check (`Limited`), in the process and thread that renders it:
the time is what this thread computed, so that a busy machine stops no template, and sizes are checked before a result is made.
The text of a template that stays within the limits is the same.
"""

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from groupwise.errors import UserError
from groupwise.models.template_sizes import CHECKED_FILTERS, CHECKED_METHODS, LARGEST, REMOVED, TooLarge, power, times, weight

SECONDS = 2.0
"""Of computing, for one rendering; a conversation of a thousand messages takes some hundredths."""
TOTAL = 500_000_000
"""Characters that one rendering may make in all, those of intermediate texts included."""
LONGEST_SOURCE = 256 * 1024
"""Characters of a template; the longest of known models have some 20,000."""


_OF_DICTS = frozenset(dir(dict))


class _Budget:
    """What is left to a rendering."""

    __slots__ = ("checks", "deadline", "left", "limits")

    def __init__(self) -> None:
        self.limits = False
        """Whether a template with checks was asked for."""
        self.checks, self.left, self.deadline = 0, TOTAL, time.thread_time() + SECONDS

    def tick(self) -> None:
        """Look at the clock every sixteenth time."""
        self.checks += 1
        if not self.checks & 15:
            self.look()

    def look(self) -> None:
        if time.thread_time() > self.deadline:
            raise TooLarge(f"it computes for more than {SECONDS:g} s")

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooLarge(f"it makes more than {TOTAL:,} characters")
        self.tick()

    def text(self, size: int) -> None:
        """Count a text, which may still have to be made."""
        if size > LARGEST:
            raise TooLarge(f"it makes a text of more than {LARGEST:,} characters")
        self.left -= size
        if self.left < 0:
            raise TooLarge(f"it makes more than {TOTAL:,} characters")

    def made(self, value: Any) -> Any:
        """Count a result, and refuse one that is too large; lists are counted with all that is in them, as often as it is."""
        if type(value) is str:
            self.text(len(value))
        elif value is not None and type(value) is not bool:
            weight(value)
            self.spend(8 * len(value) if isinstance(value, Sequence | dict) else 1)
        return value


class _Threads(threading.local):
    budget: _Budget | None = None


_here = _Threads()


def _budget() -> _Budget:
    return _here.budget  # type: ignore[return-value]  # a limited template is rendered within `_limits`


def _each(values: Iterable[Any]) -> Iterator[Any]:
    """What a loop runs over, checked each time."""
    budget = _budget()
    for value in values:
        budget.checks += 1
        if not budget.checks & 15:
            budget.look()
        yield value


def _made(value: Any) -> Any:
    return _budget().made(value)


def _cut(value: Any) -> Any:
    """A part of a text or list, which cannot weigh more than the whole."""
    _budget().spend(len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, Sequence) else 1)
    return value


@jinja2.pass_eval_context
def _joined(context: nodes.EvalContext, *values: Any) -> str:
    """`a ~ b ~ c`, of which none is a text twice."""
    texts = [value if isinstance(value, str) else str(value) for value in values]
    _budget().text(sum(map(len, texts)))
    return markup_join(values) if context.autoescape else str_join(texts)


def _shown(value: Any) -> Any:
    """What an output writes."""
    text = value if isinstance(value, str) else str(value)
    _budget().text(len(text) + 16)
    return text


def _filter(name: str, function: Any) -> Any:
    check, skipped = CHECKED_FILTERS.get(name), 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # with the mark that says which context it takes
    def checked(*args: Any, **kwargs: Any) -> Any:
        _budget().tick()
        if check is not None:
            args = (*args[:skipped], *check(args[skipped:], kwargs))
        return _budget().made(function(*args, **kwargs))

    return checked


def _test(function: Any) -> Any:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _budget().tick()
        return function(*args, **kwargs)

    return checked


class _Checked(NodeTransformer):
    """A parsed template with checks around what is made without a call: loops, literals, parts, and texts put together."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _wrapped(node.iter, "_each")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(node, "_cut") if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(node.nodes[0], "_joined", node.nodes[1:])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(node, "_made") if node.ctx == "load" else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(node, "_made")

    visit_Dict = visit_List


def _wrapped(node: Any, name: str, more: Sequence[Any] = ()) -> nodes.Filter:
    return nodes.Filter(node, name, list(more), [], None, None, lineno=node.lineno, environment=node.environment)


class _Limited(ImmutableSandboxedEnvironment):
    """The environment of transformers, in which everything that a template does is counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    finalize = staticmethod(_shown)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Checked().visit(super()._parse(source, name, filename))
        return parsed

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`message.role`, which is an entry: looked up at once, which saves most of what the checks cost."""
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget()
        if operator == "+":
            if type(left) is str and type(right) is str:  # nearly always
                budget.text(len(left) + len(right))
                return left + right
            return budget.made(left + right)
        if operator == "*":
            times(left, right)
        elif operator == "**":
            power(left, right)
        elif isinstance(left, str):
            left, right = CHECKED_FILTERS["format"]((left, right), {})
        return budget.made(self.binop_table[operator](left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.tick()
        method = getattr(obj, "__wrapped__", obj)  # str.format, which the sandbox wraps
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int) and (check := CHECKED_METHODS.get(method.__name__)) is not None:
            args = check((owner, *args), kwargs)[1:]
        result = super().call(context, obj, *args, **kwargs)
        return result if isinstance(obj, Macro) else budget.made(result)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        found: list[str] = []
        size, budget = 0, _budget()
        for piece in pieces:
            size += len(piece)
            if size > LARGEST:
                budget.text(size)
            found.append(piece)
        budget.text(size)
        return "".join(found)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    """A template as transformers compiles it, but for the checks."""
    environment: Any = _compile("").environment.overlay()
    environment.__class__ = _Limited
    del environment.__dict__["finalize"]
    named = {name: _filter(name, function) for name, function in environment.filters.items() if name not in REMOVED}
    environment.filters = named | {"_each": _each, "_made": _made, "_cut": _cut, "_joined": _joined}
    environment.tests = {name: _test(function) for name, function in environment.tests.items()}
    space = environment.globals["namespace"]
    quiet = type("Namespace", (space,), {"__repr__": lambda _: "<Namespace>"})  # in full it grows exponentially
    environment.globals = {**environment.globals, "namespace": quiet}
    environment.globals.pop("lipsum", None)
    template: jinja2.Template = environment.from_string(source)
    return template


_compile = chat_template_utils._compile_jinja_template


def _compile_within_limits(source: str) -> Any:
    if _here.budget is None:
        return _compile(source)
    _here.budget.limits = True
    return _compiled(source)


chat_template_utils._compile_jinja_template = _compile_within_limits  # what it renders for others stays as it is


@contextmanager
def _limits(tokenizer: Any) -> Iterator[None]:
    """Within: this thread renders a template of the tokenizer's.

    Raises:
        UserError: it reached a limit.
    """
    before, _here.budget = _here.budget, _Budget()
    try:
        yield
    except (TooLarge, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, TooLarge) else "it is nested too deeply, or fills the memory"
        raise UserError(f"the chat template of {tokenizer.name_or_path or 'the model'} was stopped: {reason}") from error
    finally:
        _here.budget = before


def source_of(tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """The chat template's text.

    Raises:
        UserError: it is too long.
    """
    source = str(tokenizer.get_chat_template(tools=tools))
    if len(source) > LONGEST_SOURCE:
        name = tokenizer.name_or_path or "the model"
        raise UserError(f"the chat template of {name} has {len(source):,} characters, more than {LONGEST_SOURCE:,}")
    return source


def render(tokenizer: Any, messages: Sequence[Any], **arguments: Any) -> str:
    """The text that the tokenizer's chat template makes of messages: `apply_chat_template` within limits.

    Args:
        arguments: of `apply_chat_template`, the template's own among them.

    Raises:
        UserError: the template reached a limit, or this version of transformers renders it without them.
        Exception: whatever the template raises.
    """
    source_of(tokenizer, arguments.get("tools"))
    with _limits(tokenizer):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        if not _budget().limits:  # the function that is replaced above is none that others promise to call
            kind = f"{type(tokenizer).__name__} of transformers {version('transformers')}"
            raise UserError(f"{kind} renders its chat template in a way that cannot be limited")
    return text


def variables(tokenizer: Any) -> set[str]:
    """The names that the chat template reads and does not set.

    Raises:
        UserError: it is too long, or nested too deeply.
    """
    source = source_of(tokenizer)
    with _limits(tokenizer):
        return jinja2.meta.find_undeclared_variables(_compile("").environment.parse(source))
