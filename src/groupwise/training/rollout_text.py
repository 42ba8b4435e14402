"""A group's best and worst completion, as text for a person to read and as JSON."""

from collections.abc import Mapping
from typing import Any

from groupwise.text import shortened, visible
from groupwise.types import Completion, Group, Message

LONGEST = 20_000
"""Characters of one text that the readable file shows."""


def _ranked(group: Group) -> list[int]:
    """The completions that could be scored, by reward."""
    return sorted((i for i, s in enumerate(group.scores) if s.failure is None), key=lambda i: group.scores[i].reward)


def samples(group: Group) -> list[dict[str, Any]]:
    """The best and the worst completion, whole."""
    ranked = _ranked(group)
    return [
        {
            "rank": rank,
            "prompt": group.problem.text,
            "answer": group.problem.answer,
            "completion": "\n".join(f"{header} {text}" if header else text for header, text in spoken(group.completions[i])),
            "reward": group.scores[i].reward,
            "correct": group.scores[i].correct,
            "stop": group.completions[i].stop,
        }
        for rank, i in (("best", ranked[-1]), ("worst", ranked[0]))
    ] if ranked else []  # fmt: skip


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
