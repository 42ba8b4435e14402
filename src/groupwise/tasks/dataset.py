"""Problems of the user's own, from a file, a directory or the Hugging Face hub."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from groupwise.config import Source
from groupwise.errors import UserError, nearest
from groupwise.rewards.sandbox import Box, find_box
from groupwise.rewards.settings import RewardSettings
from groupwise.tasks.pool import Part, Pool, Problems, StreamPool
from groupwise.tasks.presets import PRESETS
from groupwise.tasks.reading import RowReader
from groupwise.tasks.rows import Origin
from groupwise.types import Demonstration, Problem


class DatasetTask(RewardSettings):
    """Problems of the user's own. Its settings are the keys of [task] in a recipe, or of each of its [[task.sources]], which are
    mixed by their `weight`."""

    name: Literal["dataset"] = "dataset"
    path: str = ""
    """A .jsonl, .json, .csv, .tsv or .parquet file or a directory, beside the recipe or from here; or a dataset's hub id."""
    preset: str = ""
    """A dataset whose rows are known: it fills in the keys that are left out; see `groupwise data --presets`."""
    config: str | None = None
    """Which configuration of a dataset that has several."""
    split: str | None = None
    """Which split of a directory or a dataset on the hub to train on; left out: "train"."""
    streaming: bool = False
    """Read rows as they are needed, from the first one on, instead of all at the start: for data that is too large to look
    through. Repeated rows are then not found."""
    shuffle_block: Annotated[int, Field(ge=1)] = 1024
    """Streaming: so many problems are read ahead and shuffled among themselves."""
    prompt_key: str = ""
    """The column with the prompt, a text or a list of messages; left out: "prompt". "a.b" is the value b of an object a."""
    answer_key: str = ""
    """The column with the reference answer; left out: "answer"."""
    id_key: str = ""
    """The column that tells problems apart; left out: the prompt. Problems with the same one are one problem."""
    columns: dict[str, str] = Field(default={})
    """Other names for columns: the name that a reward or a preset looks for = the name in the data."""
    system_prompt: str = ""
    """The system message of prompts that bring none; empty: model.system_prompt."""
    prompt_template: str = ""
    """What is written around a prompt, as in "{prompt}\\nAnswer with a number."; left out: nothing."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Leave out problems whose prompt, chat template included, has more tokens."""
    held_out_path: str = ""
    """Where held-out problems are, in the same form as `path`; empty: in `path`."""
    held_out_split: str | None = None
    """Which split of it is held out; left out: a share of `split`."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Where neither a path nor a split is given for them."""

    _problems: Problems | None = PrivateAttr(default=None)

    def open(self, source: Source, base: Path) -> None:
        """Find the reward, and read the data.

        Raises:
            UserError: something is missing, or a row is not what it should be.
        """
        self._fill_in(source)
        self._check_sandbox(source)
        train = self._find(source, "task.path", self.path, base, self.config or "", self.split or "")
        self.path = train.path
        held = None
        if self.held_out_path:
            held = self._find(source, "task.held_out_path", self.held_out_path, base, "", self.held_out_split or "")
            self.held_out_path = held.path
        elif self.held_out_split:
            if train.file is not None:
                raise source.error("task.held_out_split", f"{self.path} is one file, which has no splits; use held_out_path")
            held = replace(train, split=self.held_out_split)
        self._problems = self._open(train, held, source)
        self.open_rewards(source, base, prompt_key=self.prompt_key, answer_key=self.answer_key)

    def _fill_in(self, source: Source) -> None:
        """Keys that are left out, from the preset or as they are without one."""
        preset = PRESETS.get(self.preset)
        if self.preset and preset is None:
            raise source.error("task.preset", f"there is no preset {self.preset!r}{nearest(self.preset, PRESETS)}")
        if preset is not None:
            if not self.path:
                self.path, self.config, self.split = preset.path, self.config or preset.config, self.split or preset.split
                if not self.held_out_path:
                    self.held_out_split = self.held_out_split or preset.held_out_split
            if "reward" not in self.model_fields_set:
                self.reward = preset.reward
            self.prompt_key, self.answer_key = self.prompt_key or preset.prompt_key, self.answer_key or preset.answer_key
            self.prompt_template = self.prompt_template or preset.prompt_template
        if not self.path:
            raise source.error("task.path", "name a file, a directory or a dataset on the hub")
        self.prompt_key, self.answer_key = self.prompt_key or "prompt", self.answer_key or "answer"
        self.prompt_template = self.prompt_template or "{prompt}"
        if "{prompt}" not in self.prompt_template:
            raise source.error("task.prompt_template", "there is no {prompt} in it, which stands for the row's prompt")

    def _find(self, source: Source, key: str, name: str, base: Path, config: str, split: str) -> Origin:
        try:
            return Origin.find(name, base, config, split)
        except UserError as error:
            raise source.error(key, str(error)) from error

    def _open(self, train: Origin, held: Origin | None, source: Source) -> Problems:
        reader = RowReader(
            prompt_key=self.prompt_key,
            answer_key=self.answer_key,
            needs_answer=self.needs_answer,
            id_key=self.id_key,
            columns=self.columns,
            system_prompt=self.system_prompt,
            prompt_template=self.prompt_template,
            preset=PRESETS.get(self.preset),
        )
        if self.streaming:
            second = None if held is None else (held.stream(), reader)
            return StreamPool(
                train.stream(),
                reader,
                lambda text: source.error("task.path", text),
                share=self.held_out_share,
                block=self.shuffle_block,
                held=second,
            )
        dropped: Counter[str] = Counter()
        part = Part.scan(train.rows(), reader, dropped)
        if not len(part):
            raise UserError(f"{train.path}: no problems in it")
        if held is None:
            pool = Pool.split(part, self.held_out_share, dropped)
            if not len(pool.train):
                raise source.error("task.path", f"{self.path} has too few problems to hold any out")
            return pool
        pool = Pool.of_two(part, Part.scan(held.rows(), reader, dropped), dropped)
        if not len(pool.held):
            raise UserError(f"{held.path}: no problems in it")
        if not len(pool.train):
            raise source.error("task.path", "every problem in it is held out too")
        return pool

    def _check_sandbox(self, source: Source) -> None:
        """Refuse a reward that runs programs where no sandbox can be built."""
        try:
            self.boxes()
        except UserError as error:
            raise source.error("task.reward", str(error)) from error

    def boxes(self) -> list[Box]:
        """Those that its rewards run programs in.

        Raises:
            UserError: one cannot be built.
        """
        return [find_box(weaker=name != "code") for name in ("code", "code-in-processes") if name in self.listed]

    @property
    def problems(self) -> Problems:
        assert self._problems is not None, "open() was not called"
        return self._problems

    def limit_prompts(self, encode: Callable[[Problem], Any], source: Source) -> None:
        """Leave out problems whose prompt has more than `max_prompt_tokens`; `encode` gives the tokens of a problem's prompt.

        Raises:
            UserError: none is left.
        """
        most = self.max_prompt_tokens
        if most is None:
            return
        self.problems.limit(lambda problem: len(encode(problem)) <= most, f"have a prompt of more than {most} tokens")
        if which := self.left_nothing():
            raise source.error("task.max_prompt_tokens", f"no {which} problem has a prompt of at most {most} tokens")

    def left_out(self) -> str:
        """How many rows were left out and why, for a person; empty: none."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.problems.dropped.items())

    def left_nothing(self) -> str | None:
        """Which problems there are none of, "training" or "held-out"; None where there are both, or it is not known."""
        if not isinstance(self.problems, Pool):
            return None
        return "training" if not len(self.problems.train) else "held-out" if not len(self.problems.held) else None

    def problem(self, position: int, seed: int) -> Problem:
        return self.problems.problem(position, seed)

    def held_out(self, count: int) -> list[Problem]:
        return self.problems.held_out(count)

    def demonstration(self, position: int, seed: int) -> Demonstration:
        """The row's column `completion`, a text or messages, or else its answer, as what the model should say.

        Raises:
            UserError: the completion is neither.
        """
        problem = self.problem(position, seed)
        completion = problem.metadata.get("completion", problem.answer)
        if isinstance(completion, str):
            return Demonstration(prompt=problem.prompt, completion=completion)
        messages = completion if isinstance(completion, list) else []
        if not messages or not all(isinstance(item, dict) and item.get("role") and "content" in item for item in messages):
            expected = "must be a text, or messages with role and content"
            raise UserError(f"{self.path}: the 'completion' of {problem.id!r} {expected}, not {completion!r}")
        return Demonstration(prompt=problem.prompt, messages=tuple(messages))
