"""A group's best and worst completion, as text for a person to read and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from groupwise.text import shortened, visible
from groupwise.types import Completion, Group, Message, Score

LONGEST = 20_000
"""Characters of one text that the readable file shows."""


def _ranked(group: Group) -> list[int]:
    """The completions that could be scored, by reward."""
    return sorted((i for i, s in enumerate(group.scores) if s.failure is None), key=lambda i: group.scores[i].reward)


def samples(group: Group, parts: Sequence[Mapping[str, float]] = ()) -> list[dict[str, Any]]:
    """The best and the worst completion, whole.

    Args:
        parts: what the reward of each completion is the sum of; empty: not known.
    """
    ranked = _ranked(group)
    if not ranked:
        return []
    return [
        {"rank": rank, **_sample(group, i, parts[i] if parts else {})} for rank, i in (("best", ranked[-1]), ("worst", ranked[0]))
    ]


def held_out_samples(group: Group) -> list[dict[str, Any]]:
    """Every completion of a held-out problem, no text longer than `LONGEST` characters. One that could not be scored has no
    reward."""
    found = [_sample(group, i, _parts(score)) for i, score in enumerate(group.scores)]
    for one in found:
        if len(one["completion"]) > LONGEST:  # the middle goes, so that places after it are others
            one["turns"] = []
        one |= {key: shortened(one[key], LONGEST) for key in ("prompt", "answer", "completion")}
    return found


def _parts(score: Score) -> dict[str, float]:
    """What the components of a task's reward count in it."""
    return {name: value * score.weights.get(name, 1.0) for name, value in score.components.items()}


def _sample(group: Group, i: int, parts: Mapping[str, float]) -> dict[str, Any]:
    """One completion; `turns` are who spoke, and where in the text the turn begins and ends, of a conversation."""
    completion, score = group.completions[i], group.scores[i]
    said, turns, end = list[str](), list[tuple[str, int, int]](), -1
    roles = (turn.role for turn in completion.turns if turn.start >= completion.lead)
    for header, text in spoken(completion):
        said.append(f"{header} {text}" if header else text)
        start, end = end + 1, end + 1 + len(said[-1])
        if header:
            turns.append((next(roles), start + len(header) + 1, end))
    return {
        "prompt": group.problem.text,
        "answer": group.problem.answer,
        "completion": "\n".join(said),
        "reward": score.reward if score.failure is None else None,
        "parts": dict(parts),
        "correct": score.correct,
        "stop": completion.stop,
        "tokens": len(completion.tokens),
        "turns": turns,
    }


def spoken(completion: Completion) -> list[tuple[str, str]]:
    """A completion as pairs of header and text: for a conversation one for each turn, with who said it and what it earned; else
    its text under no header."""
    if not completion.turns:
        return [("", completion.text)]
    turns = [turn for turn in completion.turns if turn.start >= completion.lead]
    pairs = []
    for turn, messages in zip(turns, _messages_of_turns(completion), strict=False):
        earned = "" if turn.reward is None else f", reward {turn.reward:g}"
        errors = f", {turn.errors} failed" if turn.errors else ""
        pairs.append((f"[{turn.role}{earned}{errors}]", "\n".join(map(_written, messages))))
    return pairs


def _messages_of_turns(completion: Completion) -> list[list[Message]]:
    """The messages of each turn: one of the assistant, or what was said before the assistant's next."""
    found: list[list[Message]] = []
    for message in completion.messages:
        if message["role"] == "assistant" or not found or found[-1][0]["role"] == "assistant":
            found.append([])
        found[-1].append(message)
    return found


def _written(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [str(message.get(key) or "") for key in ("reasoning_content", "content")]
    return " ".join([*(text for text in said if text), *(f"{call['name']}({_arguments(call['arguments'])})" for call in calls)])


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return str(arguments)
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def readable(group: Group) -> str:
    """The group's prompt, its best and its worst completion. Lines of theirs begin with a bar and headers do not, so that no text
    can pass for a header; the JSON beside it holds every text whole."""
    ranked = _ranked(group)
    failed = len(group.scores) - len(ranked)
    right = "" if any(score.correct is None for score in group.scored) else f"{group.correct_count} of {len(ranked)} right; "
    note = f"; {failed} could not be scored" if failed else ""
    answer = visible(shortened(group.problem.answer, 200))
    lines = [f"=== {right}answer {answer}{note}", *_quoted(group.problem.text)]
    for name, i in (("best", ranked[-1]), ("worst", ranked[0])) if ranked else ():
        completion, score = group.completions[i], group.scores[i]
        truncated = ", truncated" if completion.stop == "length" else ""
        lines.append(f"--- {name}: reward {score.reward:g}{truncated}")
        for header, text in spoken(completion):
            lines += [*([header] if header else []), *_quoted(text)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    return [f"| {line}".rstrip() for line in visible(shortened(text, LONGEST), lines=True).split("\n")]
