"""What the process that trains and a learner's process say to each other: trees that `state.to_bytes` makes a message of."""

import traceback
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from groupwise.errors import Diverged, LearnerLost, RunError, UserError, first_line, is_out_of_memory, text_of
from groupwise.files import Digest, DiskError
from groupwise.kept import KeptTokens
from groupwise.learner.updates import Update
from groupwise.types import Batch

Rows = TypeVar("Rows", bound=Batch)

OURS = (UserError, RunError, Diverged, DiskError, LearnerLost)
"""Errors whose text says all that there is to know, unless they have a cause."""
ERRORS: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in (*OURS, ValueError, MemoryError)}
"""Those that are raised as themselves on the other side."""


class RemoteTraceback(Exception):
    """Where an error was raised in the learner's process: the cause of the one that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


# --- batches and updates


def batch_tree(batch: Batch) -> dict[str, Any]:
    """A batch of any stage, without its type."""
    tree = _fields_of(batch)
    return {**tree, "kept": tuple(None if kept is None else _fields_of(kept) for kept in batch.kept)}


def batch_of(kind: type[Rows], tree: Mapping[str, Any]) -> Rows:
    """The batch that `batch_tree` made a tree of."""
    return kind(**{**tree, "kept": tuple(None if kept is None else KeptTokens(**kept) for kept in tree["kept"])})


def update_tree(update: Update) -> dict[str, Any]:
    return _fields_of(update)


def update_of(tree: Mapping[str, Any]) -> Update:
    """The update that `update_tree` made a tree of."""
    return Update(**tree)


def digest_trees(listing: Mapping[str, Digest]) -> dict[str, Any]:
    return {name: asdict(digest) for name, digest in listing.items()}


def digests_of(trees: Mapping[str, Any]) -> dict[str, Digest]:
    """The listing that `digest_trees` made a tree of."""
    return {name: Digest(**tree) for name, tree in trees.items()}


def _fields_of(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in fields(value)}


# --- errors


def error_tree(error: Exception) -> dict[str, str]:
    """An error for the other side, with where it was raised."""
    kind, text = type(error), text_of(error)
    if is_out_of_memory(error):
        kind, text = MemoryError, first_line(error)
    elif kind not in ERRORS.values():
        kind, text = RunError, f"the learner failed: {kind.__name__}: {first_line(error)}"
    known = type(error) in OURS and error.__cause__ is None
    return {"kind": kind.__name__, "text": text, "traceback": "" if known else "".join(traceback.format_exception(error))}


def error_of(tree: Mapping[str, str]) -> Exception:
    """The error of a tree; its cause says where it was raised."""
    error = ERRORS[tree["kind"]](tree["text"])
    error.__cause__ = RemoteTraceback(tree["traceback"]) if tree["traceback"] else None
    return error
