"""Puzzles from the generators of reasoning-gym (the extra `reasoning-gym`), which run in a worker process, scored by its own
scorers in a sandbox.

Some of those scorers evaluate what a model wrote as code, so they run in a box (`groupwise.rewards.sandbox`): a process that has
imported the library, and forks for each request.
"""

import asyncio
import json
import math
import os
import random
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from groupwise.config import Source
from groupwise.errors import UserError, nearest
from groupwise.rewards.answers import last_tagged
from groupwise.rewards.boxes import Limits, SandboxError
from groupwise.rewards.sandbox import Box, end, find_box, heard, tell
from groupwise.types import Completion, Demonstration, Problem, Score
from groupwise.workers import Pool, Target, WorkerError, wait_elsewhere

HELD_OUT_SHARE = 10
"""One question in this many, chosen by its digest, is held out: never trained on."""
TRIES = 100
"""How many questions are drawn to find one that is not held out."""
CORRECT = 0.99
"""Scores from here on count as correct; some scorers give a little for a wrong answer, and a sum may miss 1."""
LARGEST_SCORE = 1e9
"""Those of the library lie from 0 to 1."""
SECONDS = 60.0
"""For the scores of one group, or to make one question."""
LIMITS = Limits(seconds=math.inf, memory=8 << 30, processes=64)
"""Of the scorer as a whole, which lives as long as the task; each request has half of `SECONDS`, by the clock and of CPU time."""
MOST_SAID = 1 << 20
"""Bytes of the scores of one group."""
WORKER = """
import ctypes, json, os, resource, signal, sys
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # not dumpable: what is evaluated may not open this process's pipes
sys.path[:0] = {paths!r}
import reasoning_gym
made = {{}}
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    key = json.dumps(asked["dataset"])
    if key not in made:
        name, config, seed, size = asked["dataset"]
        made[key] = reasoning_gym.create_dataset(name, seed=seed, size=size, **config)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (0, 1):  # the pipes to the trainer
            os.dup2(2, descriptor)
        os.close(reads)
        signal.alarm({seconds})
        resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
        entry = made[key][asked["index"]]
        scores = []
        for answer in asked["answers"]:
            try:
                scores.append(float(made[key].score_answer(answer, entry)))
            except Exception as error:
                scores.append(f"{{type(error).__name__}}: {{error}}"[:200])
        with open(writes, "wb") as file:
            file.write(json.dumps(scores).encode() + b"\\n")
        os._exit(0)
    os.close(writes)
    said = b""
    while b"\\n" not in said and len(said) < {most} and (part := os.read(reads, 65536)):
        said += part
    os.close(reads)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print((said.partition(b"\\n")[0] if b"\\n" in said else b"null").decode(errors="replace"), flush=True)
"""


class ReasoningGymTask(BaseModel):
    """Puzzles of reasoning-gym. Its settings are the keys of [task] in a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Literal["reasoning-gym"] = "reasoning-gym"
    datasets: Annotated[list[str], Field(min_length=1)]
    """Its generators by name, such as "chain_sum"; each problem comes from the next one in turn."""
    config: dict[str, dict[str, Any]] = {}
    """Settings of a generator, by its name."""
    size: Annotated[int, Field(ge=1)] = 10_000
    """How many problems of each there are before they come again."""
    prompt_template: str = "{prompt}\n\nThink first, then give only the final answer in <answer> </answer>."
    """What is written around a question, {prompt}."""
    sandbox: Literal["auto", "processes"] = "auto"
    """"auto": the strongest sandbox that can be built here, or a refusal; "processes": without one, which is unsafe, since some
    scorers call eval on what a model wrote."""

    _generators: Pool = PrivateAttr(default_factory=lambda: Pool(1))
    _scorer: "Scorer | None" = PrivateAttr(default=None)

    def open(self, source: Source, base: Path) -> None:
        """Make each generator once.

        Raises:
            UserError: the library is missing, there is no such generator, or its settings are wrong.
        """
        if find_spec("reasoning_gym") is None:
            raise source.error("task.name", "reasoning-gym is not installed: pip install 'groupwise[reasoning-gym]'")
        try:
            known = self._ask("names")
        except WorkerError as error:
            raise source.error("task.name", f"reasoning-gym: {error.detail}") from error
        for name in self.datasets:
            if name not in known:
                raise source.error("task.datasets", f"reasoning-gym has no dataset {name!r}{nearest(name, known)}")
        for name in self.config:
            if name not in self.datasets:
                raise source.error(f"task.config.{name}", f"not among task.datasets{nearest(name, self.datasets)}")
        if "{prompt}" not in self.prompt_template:
            raise source.error("task.prompt_template", "there is no {prompt} in it, which stands for the question")
        for name in self.datasets:
            try:
                self._ask("entry", *self._named(name, 0), 0)
            except WorkerError as error:
                raise source.error(f"task.config.{name}", error.detail) from error
        try:
            self._scorer = Scorer(find_box(weaker=self.sandbox == "processes"))
        except UserError as error:
            told = str(error).replace('reward = "code-in-processes"', 'sandbox = "processes"')
            raise source.error("task.sandbox", told) from error

    def boxes(self) -> list[Box]:
        """Those that its scorers run in."""
        return [self._scorer.box] if self._scorer else []

    def _named(self, name: str, seed: int) -> list[Any]:
        """What a generator is made from."""
        return [name, self.config.get(name, {}), seed, self.size * TRIES]

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What a function of `puzzles.py` returns.

        Raises:
            WorkerError: it raised, or took longer than `SECONDS`.
        """
        target = Target.in_file(Path(__file__).with_name("puzzles.py"), function)
        return wait_elsewhere(self._generators.call(target, *arguments, limit=SECONDS)).value

    def problem(self, position: int, seed: int) -> Problem:
        turn, which = divmod(position, len(self.datasets))
        name, inner = self.datasets[which], random.Random(f"train/{seed}").getrandbits(31)
        for attempt in range(TRIES):
            problem = self._problem(name, inner, turn % self.size + attempt * self.size)
            if not is_held_out(problem.id):
                return problem
        raise UserError(f"reasoning-gym's {name} has too few questions to hold any out")

    def held_out(self, count: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        for position in range(TRIES * count):
            turn, which = divmod(position, len(self.datasets))
            if turn >= self.size * TRIES or len(found) == count:
                break
            problem = self._problem(self.datasets[which], 1 << 31, turn)
            if is_held_out(problem.id):
                found.setdefault(problem.id, problem)
        return list(found.values())

    def _problem(self, name: str, seed: int, index: int) -> Problem:
        try:
            question, answer = self._ask("entry", *self._named(name, seed), index)
        except WorkerError as error:
            raise UserError(f"reasoning-gym's {name}, question {index}: {error.detail}") from error
        return Problem(
            id=question,
            prompt=self.prompt_template.replace("{prompt}", question),
            answer=answer,
            metadata={"dataset": name, "seed": seed, "index": index},
        )

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        """The generator's own score of what stands in the last <answer>; 0 where there is none."""
        said = [last_tagged(completion.text) for completion in completions]
        given = [answer for answer in said if answer is not None]
        where = problem.metadata
        assert self._scorer is not None, "open() was not called"
        loop = asyncio.get_running_loop()
        asked = {"dataset": self._named(where["dataset"], where["seed"]), "index": where["index"], "answers": given}
        scores = iter(await loop.run_in_executor(None, self._scorer.scores, asked) if given else [])
        return [Score(reward=0.0, correct=False) if answer is None else _score(next(scores)) for answer in said]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        problem = self.problem(position, seed)
        return Demonstration(prompt=problem.prompt, completion=f"<answer>{problem.answer}</answer>")


def is_held_out(question: str) -> bool:
    return int.from_bytes(sha256(question.encode()).digest()[:4]) % HELD_OUT_SHARE == 0


def _is_score(value: object) -> bool:
    """Whether it is a text or a finite number, of what a scorer's process said."""
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) < LARGEST_SCORE)


def _score(value: float | str) -> Score:
    if isinstance(value, str):
        return Score.failed("raised", value)
    return Score(reward=value, correct=value >= CORRECT)


class Scorer:
    """A process in a box that scores answers; begun when it is first needed, and again after one that took too long."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def scores(self, asked: dict[str, Any]) -> list[float | str]:
        """A score for each answer, or the text of what its scorer raised."""
        count = len(asked["answers"])
        with self._lock:
            try:
                process = self._process or self._start()
                assert process.stdin is not None and process.stdout is not None
                tell(process.stdin.fileno(), json.dumps(asked).encode() + b"\n", SECONDS)
                line = heard(process.stdout.fileno(), SECONDS, MOST_SAID)
                if not line:
                    raise ValueError("its process ended")
                values = json.loads(line)
            except (SandboxError, OSError, ValueError, RecursionError) as error:
                self.close()
                return [f"the scorer was stopped: {error}"] * count
        if not isinstance(values, list) or len(values) != count:
            return ["the scorer ended early"] * count
        return [value if _is_score(value) else "the scorer returned no number" for value in values]

    def _start(self) -> subprocess.Popen[bytes]:
        spec = find_spec("reasoning_gym")
        assert spec is not None and spec.origin is not None
        home = str(Path(spec.origin).parent.parent)
        source = WORKER.format(paths=[home], seconds=int(SECONDS / 2), most=MOST_SAID // 2)
        self._process = self.box.start(source, readable=[home], limits=LIMITS)
        assert self._process.stdout is not None
        try:
            said = heard(self._process.stdout.fileno(), SECONDS, MOST_SAID)
        except (TimeoutError, ValueError):
            said = b""
        if said.strip() != b"ready":
            self.close()
            raise SandboxError("reasoning-gym could not be imported in the sandbox")
        return self._process

    def close(self) -> None:
        if self._process is not None:
            end(self._process, self.box.kind)
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        if os is not None:  # at the interpreter's end modules may be gone
            self.close()
