"""A row of a dataset becomes a problem: which columns are the prompt and the answer, and what is written around the prompt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from groupwise.errors import UserError, nearest
from groupwise.tasks.presets import Preset, needed
from groupwise.tasks.rows import Row
from groupwise.types import Message, Problem

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Makes the problem of a row."""

    prompt_key: str
    answer_key: str
    needs_answer: bool = True
    id_key: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The name that a column gets -> its name in the data."""
    system_prompt: str = ""
    prompt_template: str = "{prompt}"
    preset: Preset | None = None

    def read(self, row: Row, place: str) -> tuple[Problem, str | None]:
        """The problem of a row, and what the preset knows rows by that repeat a problem; `place` is named in a message.

        Raises:
            UserError: a column is missing, or not what it should be.
        """
        preset = self.preset
        try:
            row = self._renamed(row)
            return self._problem(row), preset.same(row) if preset is not None and preset.same is not None else None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error

    def _renamed(self, row: Row) -> Row:
        """The row with columns under the names that `columns` gives them, each read from the row as it came."""
        renamed = {name: needed(row, old) for name, old in self.columns.items()}
        old_names = set(self.columns.values())
        return {name: value for name, value in row.items() if name not in old_names} | renamed

    def _problem(self, row: Row) -> Problem:
        rest = dict(row)
        if self.preset is not None and self.preset.write is not None:
            prompt = check_prompt(self.preset.write(row), "prompt")
        else:
            prompt = check_prompt(needed(row, self.prompt_key), self.prompt_key)
            rest.pop(self.prompt_key, None)
        identity = str(needed(row, self.id_key)) if self.id_key else identity_of(prompt)
        answer = self._answer(row, rest)
        return Problem(id=identity, prompt=self._written(prompt), answer=answer, metadata=rest)

    def _answer(self, row: Row, rest: Row) -> str:
        """The answer; `rest` loses its column, or keeps as "solution" what the answer was found in."""
        preset = self.preset
        if preset is not None and preset.compose is not None:
            return preset.compose(row)
        try:
            value = needed(row, self.answer_key)
        except ValueError:
            if self.needs_answer:
                raise
            return ""
        rest.pop(self.answer_key, None)
        if value is None and self.needs_answer:
            raise ValueError(f"{self.answer_key!r} is null")
        if preset is None or preset.extract is None:
            return "" if value is None else _as_text(value)
        found = preset.extract(_as_text(value))
        if found is None:
            raise ValueError(f"there is no {preset.wanted} in {self.answer_key!r}, which ends with {str(value)[-80:]!r}")
        if preset.keeps_solution:
            rest.setdefault("solution", value)
        return found

    def _written(self, prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
        """The prompt within the template, after the system prompt."""
        if isinstance(prompt, str):
            text = self.prompt_template.replace("{prompt}", prompt)
            if not self.system_prompt:
                return text
            return ({"role": "system", "content": self.system_prompt}, {"role": "user", "content": text})
        messages = list(prompt)
        if self.prompt_template != "{prompt}":
            last = messages[-1]
            messages[-1] = {**last, "content": self.prompt_template.replace("{prompt}", last.get("content") or "")}
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return tuple(messages)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)  # so True is "True"


def check_prompt(prompt: Any, key: str) -> str | tuple[Message, ...]:
    """A prompt as `Problem` has it: a text, or messages of which the last is not the assistant's.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{key!r} must be a text or a list of messages that is not empty, not {str(prompt)[:80]!r}")
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(
                f"{key!r}, message {number}: expected an object with 'role' and 'content', not {str(message)[:80]!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{key!r}, message {number}: there is no role {message['role']!r}{nearest(message['role'], ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"{key!r}, message {number}: 'content' must be a text, not {str(message.get('content'))[:80]!r}")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{key!r} ends with a message of the assistant, which is what the model is to write")
    return tuple(prompt)


def identity_of(prompt: str | tuple[Message, ...]) -> str:
    """What tells one prompt from another, before a template is put around it."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def digest(identity: str) -> int:
    """64 bits of an identity, the same on every machine."""
    return int.from_bytes(blake2b(identity.encode(), digest_size=8).digest())
