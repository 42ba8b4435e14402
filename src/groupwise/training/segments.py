"""With which settings which steps of a run were trained: segments.jsonl, one line for each start or resume, and recipe.toml.

A line ends with a hash of itself. recipe.toml is a copy of the last line's settings for people and for other commands to read.
"""

import hashlib
import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from groupwise import files
from groupwise.config import Recipe, dump, trees
from groupwise.errors import UserError
from groupwise.files import Digest
from groupwise.training.checkpoints import RECIPE, Checkpoint, seal
from groupwise.training.metrics_file import METRICS, parse, read, set_aside

SEGMENTS = "segments.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A start or a resume of a run."""

    segment: int
    """Counted from 0."""
    first_step: int
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    groupwise: str = field(default_factory=lambda: version("groupwise"))
    torch: str = field(default_factory=lambda: str(torch.__version__))
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are others than before, by dotted key: [old, new]."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of datasets, user code and the base model's files, by path."""
    recipe: Mapping[str, Any]
    """The settings, whole."""
    replaces: str = ""
    """sha256 of the recipe.toml before."""
    metrics: Mapping[str, Any] | None = None
    """Of metrics.jsonl up to the first step, where a damaged one was repaired: its bytes and sha256."""

    @property
    def text(self) -> str:
        """Its recipe.toml."""
        return dump(dict(self.recipe))


class Unrecorded(UserError):
    """A directory does not say with which settings a run was begun in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The settings with which a run goes on, and what was found on the way."""

    text: str
    """As TOML."""
    tree: Mapping[str, Any]
    segments: Sequence[Segment]
    notes: Sequence[str] = ()
    """Which files are damaged, and what was taken instead."""


def read_segments(run: Path) -> tuple[list[Segment], str | None]:
    """The segments of a run that can be read, and what is wrong with the last line; None if it is whole.

    Raises:
        UserError: the system refuses to read the file.
    """
    content = read(run / SEGMENTS)
    if content is None:
        return [], f"{SEGMENTS} is missing"
    lines = content.splitlines()
    found, problem = [], f"{SEGMENTS} is empty" if not lines else None
    for line in lines:
        try:
            content = json.loads(line)
            problem = None if content.pop("sha256") == seal(content) else f"{SEGMENTS} is damaged"
            known = {item.name for item in fields(Segment)}
            found += [] if problem else [Segment(**{key: value for key, value in content.items() if key in known})]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            problem = f"{SEGMENTS} is damaged"
    return found, problem


def write_segments(run: Path, segments: Sequence[Segment]) -> None:
    contents = [as_json(asdict(segment)) for segment in segments]
    text = "".join(json.dumps({**content, "sha256": seal(content)}) + "\n" for content in contents)
    files.write_atomically(run / SEGMENTS, text)


def keep_damaged(run: Path, found: "Recorded") -> None:
    """Keep copies of damaged files that are about to be written again: somebody may have edited them by hand."""
    for name in (SEGMENTS, RECIPE):
        damaged = any(note.startswith(f"{name} is damaged") for note in found.notes)
        if damaged and (content := read(run / name)):
            set_aside(run / name, content)


def after(
    segments: Sequence[Segment], checkpoint: Checkpoint, tree: Mapping[str, Any], inputs: Mapping[str, str]
) -> list[Segment]:
    """The segments of a run that goes on after a checkpoint with these settings, the new one last, without `replaces`.

    Where the segments do not know with which settings the checkpoint was written, one is added that does.
    """
    kept = [segment for segment in segments if segment.first_step <= max(1, checkpoint.step)]
    own = tomllib.loads(checkpoint.recipe)
    if not kept or changes(kept[-1].recipe, own):
        first = max(1, checkpoint.step) if kept else 1
        kept.append(Segment(segment=len(kept), first_step=first, recipe=own, started="", groupwise="", torch=""))
    new = Segment(
        segment=len(kept),
        first_step=checkpoint.step + 1,
        changed=changes(kept[-1].recipe, tree),
        files=inputs,
        recipe=tree,
    )
    return [*kept, new]


# --- which settings


def recorded(run: Path, checkpoint: Checkpoint | None) -> Recorded:
    """The settings of a run, by three witnesses: the last line of segments.jsonl, recipe.toml, and the checkpoint's copy.

    Raises:
        UserError: there are none, or recipe.toml is none that the run wrote.
    """
    segments, problem = read_segments(run)
    last = segments[-1] if segments and problem is None else None
    notes = [problem] if problem and checkpoint else []
    text, tree, broken = _read_recipe(run / RECIPE)
    wanted = last.text if last else checkpoint.recipe if checkpoint else None
    if wanted is None:
        if tree is None:
            raise Unrecorded(f"{run}: its settings are not there (any more); begin with groupwise train RECIPE --out {run}")
        return Recorded(text=text, tree=tree, segments=segments, notes=notes)
    if tree is not None and not changes(tomllib.loads(wanted), tree):
        return Recorded(text=text, tree=tree, segments=segments, notes=notes)
    where = SEGMENTS if last else checkpoint.path.name if checkpoint else ""
    if tree is not None and checkpoint and last and not changes(tomllib.loads(checkpoint.recipe), tree):
        if _sha256(text) != last.replaces:  # else a resume was killed after it had written the one, and before the other
            notes.append(f"{SEGMENTS} is older than the newest checkpoint; {RECIPE} agrees with that and is taken")
            return Recorded(text=text, tree=tree, segments=segments, notes=notes)
    elif tree is not None and not wanted.startswith(text) and not (last and _sha256(text) == last.replaces):
        raise _edited(run, tomllib.loads(wanted), tree, where)
    broken = broken or ("is cut short" if wanted.startswith(text) else "is older than the last resume")
    notes.append(f"{RECIPE} {broken}; written again from {where}")
    return Recorded(text=wanted, tree=tomllib.loads(wanted), segments=segments, notes=notes)


def check_beginning(run: Path, tree: Mapping[str, Any]) -> None:
    """Refuse to begin a run again that had checkpoints, since what it recorded would go.

    Raises:
        UserError: it did more steps than a run does without a checkpoint.
    """
    records = [parse(line) for line in (run / METRICS).read_bytes().splitlines()] if (run / METRICS).exists() else []
    done = max((record["step"] for record in records if record), default=0)
    longest = tree.get("training", {}).get("checkpoint_every", 0) + 1  # where the disk is full the first is tried twice
    if (run / "model").exists() or done > longest:
        raise UserError(
            f"{run}: has records of {done} steps and no checkpoint (any more), so it cannot be resumed; begin elsewhere"
        )


def _read_recipe(path: Path) -> tuple[str, dict[str, Any] | None, str]:
    """Its text, its tree or None, and why there is none."""
    try:
        text = path.read_bytes().decode()
        return (text, tomllib.loads(text), "") if text.strip() else ("", None, "is empty")
    except FileNotFoundError:
        return "", None, "is missing"
    except OSError as error:
        return "", None, f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return "", None, f"is damaged ({str(error).splitlines()[0]})"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def replaced(run: Path) -> str:
    """The hash of a run's recipe.toml, which is about to be replaced."""
    return _sha256(_read_recipe(run / RECIPE)[0])


def _edited(run: Path, wanted: Mapping[str, Any], tree: Mapping[str, Any], where: str) -> UserError:
    differing = changes(wanted, tree)
    lines = "".join(f"\n  {key}: {shown(new)}, and in {where} {shown(old)}" for key, (old, new) in differing.items())
    sets = "".join(f" --set {shlex.quote(f'{key}={json.dumps(new)}')}" for key, (_, new) in differing.items() if new is not None)
    resume = f"groupwise train --resume {shlex.quote(str(run))}"
    return UserError(
        f"{run / RECIPE}: not the settings that the run was trained with:{lines}\n"
        f"To go on as before: remove that file, then {resume}\n"
        f"To change the settings: remove that file, then {resume}{sets}"
    )


def shown(value: Any) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)


# --- trees of settings


def as_json(tree: Any) -> Any:
    """Settings as JSON has them: dates as text.

    Raises:
        UserError: they hold a text that is not Unicode, and so cannot be written.
    """
    text = json.dumps(tree, default=str, ensure_ascii=False)
    try:
        return json.loads(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"a setting is not Unicode: …{text[max(0, error.start - 30) : error.end]!r}") from error


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings in which two trees differ once they are written down; see `trees.changes`."""
    return trees.changes(as_json(old), as_json(new))


def completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with this version's defaults for what it leaves out, since an earlier version did not know it.

    Raises:
        UserError: it holds what this version does not know.
    """
    try:
        recipe = Recipe.model_validate_json(json.dumps(as_json(tree)), by_alias=True, by_name=True)
    except ValidationError as error:
        raise UserError(f"it is of another version of groupwise: {error}") from error
    return recipe.model_dump(by_alias=True)


def metrics_at(segments: Sequence[Segment], checkpoint: Checkpoint) -> list[Digest]:
    """What metrics.jsonl held at a checkpoint: as it says, or as it was repaired by a resume from it."""
    repaired = [segment.metrics for segment in segments if segment.first_step == checkpoint.step + 1 and segment.metrics]
    return [checkpoint.metrics, *(Digest(**digest) for digest in repaired)]
