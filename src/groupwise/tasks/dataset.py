"""Problems from a JSON-lines file: one object a line, with a prompt and an answer."""

import json
import random
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from groupwise.config import Source
from groupwise.errors import UserError, nearest
from groupwise.rewards.settings import RewardSettings
from groupwise.types import Demonstration, Problem


class DatasetTask(RewardSettings):
    """Problems of the user's own. Its settings are the keys of [task] in a recipe."""

    name: Literal["dataset"] = "dataset"
    path: str
    """A .jsonl file, beside the recipe or from here."""
    prompt_key: str = "prompt"
    """The key of a line's prompt."""
    answer_key: str = "answer"
    """The key of its reference answer."""
    held_out_path: str = ""
    """A .jsonl file of held-out problems; empty: a share of `path`."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What share of `path` is held out where there is no `held_out_path`."""

    _train: list[Problem] = PrivateAttr(default_factory=list)
    _held_out: list[Problem] = PrivateAttr(default_factory=list)
    _order: tuple[str, list[int]] = PrivateAttr(default=("", []))

    def open(self, source: Source, base: Path) -> None:
        """Read the files and find the reward.

        Raises:
            UserError: something is missing, or a line is not what it should be.
        """
        problems, self.path = self._read(source, "task.path", self.path, base)
        if self.held_out_path:
            held_out, self.held_out_path = self._read(source, "task.held_out_path", self.held_out_path, base)
            self._train, self._held_out = problems, held_out
        else:
            random.Random("held out").shuffle(problems)
            count = max(1, round(len(problems) * self.held_out_share))
            self._train, self._held_out = problems[count:], problems[:count]
        if not self._train:
            raise source.error("task.path", f"{self.path} has too few problems to hold any out")
        self.open_rewards(source, base, prompt_key=self.prompt_key, answer_key=self.answer_key)

    def _read(self, source: Source, key: str, name: str, base: Path) -> tuple[list[Problem], str]:
        """The problems of a file, each prompt once, and the file's absolute path."""
        path = next((path for path in (base / name, Path(name)) if path.is_file()), None)
        if path is None:
            beside = [item.name for item in base.glob("*.jsonl")]
            raise source.error(key, f"there is no file {name!r} beside the recipe or here{nearest(name, beside)}")
        problems: dict[str, Problem] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                problem = self._problem(f"{path}, line {number}", line)
                problems[problem.id] = problem
        if not problems:
            raise UserError(f"{path}: no problems in it")
        return list(problems.values()), str(path.resolve())

    def _problem(self, place: str, line: str) -> Problem:
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(columns, dict):
            raise UserError(f"{place}: expected an object with {self.prompt_key!r}, not {type(columns).__name__}")
        needed = [self.prompt_key, self.answer_key] if self.needs_answer else [self.prompt_key]
        for key in needed:
            if key not in columns:
                raise UserError(f"{place}: no {key!r}{nearest(key, columns)}")
        prompt = columns.pop(self.prompt_key)
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{place}: {self.prompt_key!r} must be a text that is not empty, not {prompt!r}")
        answer = columns.pop(self.answer_key, "")
        return Problem(id=prompt, prompt=prompt, answer=str(answer), metadata=columns)

    def problem(self, position: int, seed: int) -> Problem:
        epoch, place = divmod(position, len(self._train))
        name = f"epoch/{seed}/{epoch}"
        if name != self._order[0]:
            order = list(range(len(self._train)))
            random.Random(name).shuffle(order)
            self._order = (name, order)
        return self._train[self._order[1][place]]

    def held_out(self, count: int) -> list[Problem]:
        return self._held_out[:count]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        problem = self.problem(position, seed)
        return Demonstration(prompt=problem.text, completion=str(problem.metadata.get("completion", problem.answer)))
