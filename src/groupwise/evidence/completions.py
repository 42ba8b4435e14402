"""The completions of a run to read: every token of a step with its numbers, or the text of the best and worst of each group, or of
held-out problems."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from groupwise.errors import UserError
from groupwise.evidence.naming import run_id
from groupwise.evidence.reading import LeftOut, number, read_objects, read_tokens, step_of, token_groups
from groupwise.evidence.runs import Run
from groupwise.evidence.runs_page import packed
from groupwise.evidence.shapes import Completion, GroupToRead, Readable, StepToRead, TurnToRead
from groupwise.text import shortened, visible

Source = Literal["tokens", "texts", "held_out"]
DIRECTORIES: Mapping[str, str] = {"tokens": "tokens", "texts": "rollouts", "held_out": "evaluations"}
"""Source -> the directory of a run that it is read from."""
GROUPS: Mapping[Source, int] = {"tokens": 12, "texts": 64, "held_out": 100}
"""How many groups of a source are read at once, if they are small enough."""
MOST_TOKENS, MOST_CHARACTERS = 120_000, 2_000_000
"""What is read at once, at most; but at least one group."""
LONGEST_TOKENS, LEAST_TOKENS = 20_000, 64
"""Tokens of a completion that are shown, its first and last ones: at most, and at least of one of a group that is too large."""
LONGEST_TEXT, LONGEST_PROMPT, LONGEST_TOKEN = 1_000_000, 20_000, 1000
"""Characters that are shown of a completion, of a prompt and its answer, and of a token."""
MOST_PARTS, LONGEST_PART = 40, 80
"""How many components of a reward are shown, and characters of their names."""
STEP_FILE = re.compile(r"step-(\d{6,12})")


def readable(run: Run) -> Readable:
    """The steps of which completions can be read."""
    return {"tokens": run.token_steps(), "texts": _texts(run), "held_out": _steps(run.path / "evaluations", "jsonl")}


def _texts(run: Run) -> list[tuple[int, int]]:
    """Every step writes its texts before its metrics, so the recorded steps are those of the files; a directory of 100,000 files is
    listed only where that is not so."""
    directory = run.path / "rollouts"
    steps = run.column("reward/mean")[0]
    if not len(steps):
        return []
    if not all((directory / f"step-{step:06d}.jsonl").is_file() for step in (steps[0], steps[-1])):
        steps = np.array(_steps(directory, "jsonl"), np.int64)
    breaks = np.flatnonzero(np.diff(steps) != 1)
    firsts, lasts = (
        steps[np.append(0, breaks + 1)] if len(steps) else steps,
        steps[np.append(breaks, -1)] if len(steps) else steps,
    )
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _steps(directory: Path, suffix: str) -> list[int]:
    """The steps that have a file in a directory, ascending."""
    names = [STEP_FILE.fullmatch(path.stem) for path in directory.glob(f"step-*.{suffix}")]
    return sorted(int(name[1]) for name in names if name)


def step_to_read(
    run: Run, step: int, source: Source, first: int = 0, count: int | None = None, most_tokens: int = MOST_TOKENS
) -> StepToRead:
    """Completions of one step.

    Args:
        first: the first group to read, from 0.
        count: how many groups at most, by default as `GROUPS` says; fewer where they are long, but one.
        most_tokens: how many tokens at once.

    Raises:
        UserError: nothing of it can be read.
    """
    suffix = "parquet" if source == "tokens" else "jsonl"
    path = run.path / DIRECTORIES[source] / f"step-{step:06d}.{suffix}"
    count = GROUPS[source] if count is None else count
    if source == "tokens":
        groups, of_all = _token_groups(path, first, count, most_tokens)
    else:
        problems = _problems(path, pairs=source == "texts")
        groups, of_all = _text_groups(problems[first : first + count]), len(problems)
    return {
        "run": run_id(run),
        "step": step,
        "source": source,
        "first": first,
        "groups": groups,
        "left_out": of_all - len(groups),
    }


# --- tokens


def _token_groups(path: Path, first: int, count: int, most_tokens: int) -> tuple[list[GroupToRead], int]:
    """Groups of a file of tokens/, and how many it has."""
    numbers = token_groups(path)
    table = read_tokens(path, numbers[first : first + count])
    groups, rows = (table[name].to_numpy() for name in ("group", "row"))
    starts = np.flatnonzero(np.append(True, (np.diff(groups) != 0) | (np.diff(rows) != 0))) if len(table) else np.zeros(0, int)
    ends = np.append(starts[1:], len(table))
    shown: list[GroupToRead] = []
    total = 0
    for group in dict.fromkeys(groups[starts].tolist()):
        places = [(int(start), int(end)) for start, end in zip(starts, ends, strict=True) if groups[start] == group]
        longest = max(LEAST_TOKENS, min(LONGEST_TOKENS, most_tokens // len(places)))
        total += sum(min(longest, end - start) for start, end in places)
        if shown and total > most_tokens:
            break
        prompt, answer = (_value(table, name, places[0][0]) or "" for name in ("prompt", "answer"))
        shown.append(_group(prompt, answer, [_of_tokens(table.slice(start, end - start), longest) for start, end in places]))
    return shown, len(numbers)


def _value(table: pa.Table, name: str, row: int) -> Any:
    return table[name][row].as_py() if name in table.column_names else None


def _of_tokens(table: pa.Table, longest: int) -> Completion:
    """The completion that these tokens are, cut in its middle."""
    left_out = max(0, len(table) - longest)
    start = (min(len(table), longest) + 1) // 2
    if left_out:
        table = pa.concat_tables([table.slice(0, start), table.slice(start + left_out)])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    parts = _parts(_json(columns["reward_parts"][0]) if "reward_parts" in columns else None)
    return {
        "row": columns["row"][0],
        "text": [visible(shortened(text, LONGEST_TOKEN), lines=True) for text in columns["text"]],
        "tokens": len(table) + left_out,
        "reward": _reward(parts, columns["reward"][0]),
        "parts": _some(parts),
        "correct": columns["correct"][0],
        "stop": _word(columns["stop"][0]),
        "left_out": left_out,
        "start": start,
        "turns": _turns(columns),
        **{name: [_rounded(value) for value in columns[name]] for name in ("advantage", "ratio", "entropy")},  # type: ignore[typeddict-item]
        "probability": [None if value is None else _rounded(math.exp(value)) for value in columns["old_logprob"]],
        "clipped": _clipped(columns),
    }


def _clipped(columns: Mapping[str, Sequence[Any]]) -> list[int | None]:
    """At which bound each token was clipped; 0: at none. Where the ratio that was clipped is the sequence's, the sign of the advantage
    says it."""
    nothing = [None] * len(columns["clipped"])
    known = (columns.get("low", nothing), columns.get("high", nothing), columns["ratio"], columns["advantage"])
    return [
        None if clipped is None else int(clipped) and _bound(*values)
        for clipped, *values in zip(columns["clipped"], *known, strict=True)
    ]


def _bound(low: float | None, high: float | None, ratio: float | None, advantage: float | None) -> int:
    if ratio is not None and high is not None and ratio > high:
        return 1
    if ratio is not None and low is not None and ratio < low:
        return -1
    return 1 if (advantage or 0.0) > 0 else -1


def _turns(columns: Mapping[str, Sequence[Any]]) -> list[TurnToRead]:
    """Who said which tokens; nothing where all of it is one turn of the policy."""
    roles = columns.get("role") or [None] * len(columns["text"])
    turns = columns.get("turn") or roles
    found: list[TurnToRead] = []
    before: Any = object()
    for i, place in enumerate(zip(turns, roles, strict=True)):
        if place != before:
            found.append({"role": _word(place[1] or "assistant"), "label": "", "start": i, "end": i})
        found[-1]["end"] = i + 1
        before = place
    return found if len(found) > 1 or any(turn["role"] != "assistant" for turn in found) else []


# --- texts


def _problems(path: Path, *, pairs: bool) -> list[list[tuple[int, dict[str, Any]]]]:
    """The lines of a file, of a problem each; `pairs`: a group's worst completion follows its best.

    Raises:
        UserError: it is missing, or nothing in it can be read.
    """
    left_out = LeftOut()
    found: list[list[tuple[int, dict[str, Any]]]] = []
    for i, (_, line) in enumerate(read_objects(path, left_out)):
        if not isinstance(line.get("prompt"), str) or not isinstance(line.get("completion"), str):
            left_out.add(path.name, "has no prompt and completion")
        elif pairs and line.get("rank") == "worst" and found and found[-1][0][1]["prompt"] == line["prompt"]:
            if line != found[-1][0][1] | {"rank": "worst"}:  # of a group of one the best is the worst
                found[-1].append((i, line))
        else:
            found.append([(i, line)])
    if not found:
        reason = next(iter(left_out), "is empty" if path.is_file() else "no such file")
        raise UserError(f"{path}: cannot be read: {reason.removeprefix(path.name).lstrip(':, ')}")
    return found


def _text_groups(problems: Sequence[Sequence[tuple[int, dict[str, Any]]]]) -> list[GroupToRead]:
    shown: list[GroupToRead] = []
    total = 0
    for lines in problems:
        total += sum(min(LONGEST_TEXT, len(line["completion"])) for _, line in lines)
        if shown and total > MOST_CHARACTERS:
            break
        first = lines[0][1]
        answer = first.get("answer")
        shown.append(_group(first["prompt"], answer if isinstance(answer, str) else "", [_of_line(i, line) for i, line in lines]))
    return shown


def _of_line(row: int, line: Mapping[str, Any]) -> Completion:
    whole, parts = line["completion"], _parts(line.get("parts"))
    turns = list(_spoken(line.get("turns"), len(whole)))
    before = [0, *(end + 1 for _, _, end in turns)]
    texts = [whole[start:end] for _, start, end in turns] or [whole]
    reward, correct = number(line.get("reward")), line.get("correct")
    return {
        "row": row,
        "text": [visible(shortened(text, LONGEST_TEXT // len(texts)), lines=True) for text in texts],
        "tokens": step_of(line.get("tokens")),
        "reward": _reward(parts, reward),
        "parts": _some(parts),
        "correct": correct if isinstance(correct, bool) else None,
        "stop": _word(line.get("stop")),
        "left_out": 0,
        "start": len(texts),
        "turns": [
            {"role": _word(role), "label": _word(whole[begin:start].strip(" []")), "start": i, "end": i + 1}
            for i, (begin, (role, start, _)) in enumerate(zip(before, turns, strict=False))
        ],
        "advantage": [], "ratio": [], "entropy": [], "probability": [], "clipped": [],
    }  # fmt: skip


def _spoken(turns: Any, length: int) -> Iterator[tuple[str, int, int]]:
    """Role, first character and end of each turn; those that cannot be, and all after them, are left out."""
    reached = 0
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, list) or len(turn) != 3:
            return
        role, start, end = turn
        if not isinstance(role, str) or not all(isinstance(place, int) for place in (start, end)):
            return
        if not reached <= start <= end <= length:
            return
        yield role, start, end
        reached = end


# --- both


def _group(prompt: str, answer: str, completions: list[Completion]) -> GroupToRead:
    key = hashlib.blake2b(json.dumps([prompt, answer]).encode(), digest_size=8).hexdigest()
    shown = [visible(shortened(text, LONGEST_PROMPT), lines=True) for text in (prompt, answer)]
    return {"prompt": shown[0], "key": key, "answer": shown[1], "completions": completions}


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _parts(value: Any) -> dict[str, float]:
    """The components of a reward, by name."""
    items = value.items() if isinstance(value, dict) else ()
    numbers = [(name, number(part)) for name, part in items]
    return {name: part for name, part in numbers if part is not None}


def _reward(parts: Mapping[str, float], recorded: float | None) -> float | None:
    """What was trained on: the sum of the parts, where they were recorded."""
    return _rounded(number(sum(parts.values())) if parts else recorded)


def _some(parts: Mapping[str, float]) -> dict[str, float]:
    """Parts to show."""
    return {visible(shortened(name, LONGEST_PART)): part for name, part in list(parts.items())[:MOST_PARTS]}


def _word(value: Any) -> str:
    return visible(value[:LONGEST_PART]) if isinstance(value, str) else ""


def _rounded(value: float | None) -> float | None:
    """Four significant digits: enough to read, and the page stays small."""
    return None if value is None else float(f"{value:.4g}")


# --- in the report

BYTES_PER_TOKEN = 12
"""About what a token takes in a page, packed."""
TOKEN_STEPS, TEXT_STEPS, HELD_OUT_STEPS = 9, 65, 17
"""How many steps of a run a report has at most, of each source."""
LEAST_BYTES = 2000
"""Below which no further step is tried."""


def embedded(runs: Sequence[Run], budget: int) -> list[StepToRead]:
    """Completions for a page without a server: of each run the last and the first steps before those between them.

    Args:
        budget: about how many bytes of the page they may take, shared evenly by the runs.
    """
    found: list[StepToRead] = []
    for i, run in enumerate(runs):
        share = left = budget // (len(runs) - i)
        for source, step in _choice(readable(run)):
            if left < LEAST_BYTES:
                break
            shown = _fitting(run, step, source, min(left, share // 3))
            if shown is not None:
                found.append(shown[0])
                left -= shown[1]
        budget -= share - left
    return found


def _choice(known: Readable) -> Iterator[tuple[Source, int]]:
    """The steps that a report has of a run, the most wanted first."""
    texts = [step for first, last in known["texts"] for step in (first, *_inner(first, last), last)]
    of_source: dict[Source, list[int]] = {
        "tokens": _spread(known["tokens"], TOKEN_STEPS),
        "held_out": _spread(known["held_out"], HELD_OUT_STEPS),
        "texts": _spread(sorted(set(texts)), TEXT_STEPS),
    }
    for steps in zip_longest(*of_source.values()):
        yield from ((source, step) for source, step in zip(of_source, steps, strict=True) if step is not None)


def _inner(first: int, last: int) -> range:
    """Evenly spaced steps between two."""
    return range(first, last, max(1, (last - first) // TEXT_STEPS))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps: the last, the first, the middle, and so on into ever smaller parts."""
    order: dict[int, None] = {}
    parts = 1
    while steps and len(order) < min(most, len(steps)):
        order |= dict.fromkeys(steps[round(i * (len(steps) - 1) / parts)] for i in range(parts, -1, -1))
        parts *= 2
    return list(order)[:most]


def _fitting(run: Run, step: int, source: Source, most: int) -> tuple[StepToRead, int] | None:
    """As much of a step as takes so many bytes, and how many it takes; None: nothing of it can be read, or is that small."""
    tokens, count = max(most // BYTES_PER_TOKEN, LEAST_TOKENS), GROUPS[source]
    for _ in range(4):
        try:
            shown = step_to_read(run, step, source, 0, count, tokens)
        except UserError as error:
            run.note(error)
            return None
        size = len(packed(shown))
        if size <= most:
            return shown, size
        count, tokens = max(1, len(shown["groups"]) * most // size), tokens * most // (2 * size)
    return None
