"""Problems from a JSON-lines file: one object a line, with a prompt and an answer."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from groupwise.config import Source
from groupwise.errors import UserError, nearest
from groupwise.plugins import UserFunction, is_reference, load_function
from groupwise.rewards.checkers import CHECKERS
from groupwise.rewards.user import call_reward
from groupwise.types import Completion, Demonstration, Problem, Score


class DatasetTask(BaseModel):
    """Problems of the user's own. Its settings are the keys of [task] in a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["dataset"] = "dataset"
    path: str
    """A .jsonl file, beside the recipe or from here."""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    reward: str = "exact"
    """"exact", "last_line", "math", or a function of yours: "file.py:function" taking (problem, completions)."""
    correct_above: float | None = None
    """A completion counts as correct when your function's reward is above this. Left out: the reward is graded, no completion
    is right or wrong, and what is measured is the mean reward."""
    held_out_path: str = ""
    """A .jsonl file of held-out problems; empty: a share of `path`."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1

    _train: list[Problem] = PrivateAttr(default_factory=list)
    _held_out: list[Problem] = PrivateAttr(default_factory=list)
    _reward: UserFunction | None = PrivateAttr(default=None)
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
        if is_reference(self.reward):
            try:
                self._reward = load_function(self.reward, base)
            except UserError as error:
                raise source.error("task.reward", str(error)) from error
            self.reward = self._reward.reference
        elif self.reward not in CHECKERS:
            raise source.error("task.reward", f"there is no reward {self.reward!r}{nearest(self.reward, CHECKERS)}")

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
        needed = [self.prompt_key] if is_reference(self.reward) else [self.prompt_key, self.answer_key]
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

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        texts = [completion.text for completion in completions]
        if self._reward is not None:
            return call_reward(self._reward, problem, texts, self.correct_above)
        check = CHECKERS[self.reward]
        if self.reward == "math":  # which waits for another process
            loop = asyncio.get_running_loop()
            verdicts = [await loop.run_in_executor(None, check, problem.answer, text) for text in texts]
        else:
            verdicts = [check(problem.answer, text) for text in texts]
        return [Score(reward=float(v == "correct"), correct=v == "correct", verdict=v) for v in verdicts]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        problem = self.problem(position, seed)
        return Demonstration(prompt=problem.text, completion=str(problem.metadata.get("completion", problem.answer)))
