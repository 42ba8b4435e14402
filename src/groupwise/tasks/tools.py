"""Two tasks for which tools are called: a calculation too long for the head, and a search over several turns.

483*296=          calculator: the answer is right when the last turn is the value. The base model usually answers at once,
                  which is usually wrong; when it calls `calculate`, which is rare, it copies the result.

17 to 48          search: `guess` answers "higher", "lower" or "found", six times at most. The base model's guesses are often
                  outside the range that the answers so far have left.
"""

import random
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from groupwise.environments.calculator import calculate
from groupwise.environments.search import Search
from groupwise.tasks.arithmetic import first_distinct, is_held_out, parse
from groupwise.types import Completion, Demonstration, Message, Problem, Score

Share = Annotated[float, Field(ge=0, le=1)]


def called(name: str, content: str = "", **arguments: Any) -> Message:
    """An assistant's message that calls one tool."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


class _ToolTask(BaseModel):
    """Endless problems, one in ten of which, by its digest, is held out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    environment: ClassVar[type | None] = None
    """The environment class of its conversations."""
    correct_above: ClassVar[float | None] = None
    """Of what its get_reward() returns."""
    tools: ClassVar[tuple[Callable[..., Any], ...]] = ()
    """Functions that can be called beside the environment's methods."""

    def _draw(self, rng: random.Random) -> Problem:
        raise NotImplementedError

    def _drawn(self, rng: random.Random, *, held_out: bool) -> Problem:
        while True:
            problem = self._draw(rng)
            if is_held_out(problem.id) == held_out:
                return problem

    def problem(self, position: int, seed: int) -> Problem:
        """The training problem at a position of the endless stream that `seed` names."""
        return self._drawn(random.Random(f"train/{seed}/{position}"), held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, the same for every run; none of them is ever trained on."""
        rng = random.Random("held out")
        return first_distinct(lambda: self._drawn(rng, held_out=True), count)


class Habits(BaseModel):
    """The mix of demonstrations: how often they show the skill, and how often they show the choice to use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    taught_share: Share = 0.7
    """Share of demonstrations that show the skill but leave the first token of each call, which chooses it, out of the loss."""
    choice_share: Share = 0.15
    """Among the others, the share that show it, choice included: how often the base will choose it."""

    def draw(self, rng: random.Random) -> tuple[bool, bool]:
        """Whether a demonstration shows the skill, and whether it leaves the choice out."""
        taught = rng.random() < self.taught_share
        return taught or rng.random() < self.choice_share, taught


class CalculatorTask(_ToolTask):
    """Products of numbers of three digits. Its settings are the keys of [task] in a recipe."""

    tools: ClassVar[tuple[Callable[..., Any], ...]] = (calculate,)

    name: Literal["calculator"] = "calculator"
    habits: Habits = Habits()

    def _draw(self, rng: random.Random) -> Problem:
        left, right = (rng.randint(100, 999) for _ in range(2))
        expression = f"{left}*{right}"
        found = parse(expression)
        assert found is not None
        return Problem(id=expression, prompt=f"{expression}=", answer=str(found.value()))

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        """1 where the last turn is the value, else 0."""
        right = [completion.answer.strip() == problem.answer for completion in completions]
        return [Score(reward=float(correct), correct=correct, verdict="correct" if correct else "wrong") for correct in right]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        """A supervised example: a call and its result, or an estimate at once; see `Habits`."""
        rng = random.Random(f"demonstration/{seed}/{position}")
        problem = self._drawn(rng, held_out=False)
        skilled, taught = self.habits.draw(rng)
        if skilled:
            call = called("calculate", expression=problem.text.removesuffix("="))
            result: Message = {"role": "tool", "name": "calculate", "content": problem.answer}
            said: Message = {"role": "assistant", "content": problem.answer}
            return Demonstration(prompt=problem.prompt, messages=(call, result, said), skip_first=taught)
        estimate = int(problem.answer) + rng.choice((-1, 1)) * rng.randint(1, 10_000)
        return Demonstration(prompt=problem.prompt, messages=({"role": "assistant", "content": str(estimate)},))


class SearchTask(_ToolTask):
    """A number hidden in a range. Its settings are the keys of [task] in a recipe."""

    environment: ClassVar[type | None] = Search
    correct_above: ClassVar[float | None] = 0.5

    name: Literal["search"] = "search"
    size: Annotated[int, Field(ge=2, le=50)] = 32
    """How many numbers the range holds."""
    habits: Habits = Habits()

    def _draw(self, rng: random.Random) -> Problem:
        low = rng.randint(1, 99 - self.size + 1)
        hidden = rng.randint(low, low + self.size - 1)
        columns = {"low": low, "high": low + self.size - 1, "hidden": hidden}
        prompt = f"{columns['low']} to {columns['high']}"
        return Problem(id=f"{prompt}: {hidden}", prompt=prompt, answer=str(hidden), metadata=columns)

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        """Never asked where the environment gives the reward; 1 where the number was found."""
        found = ["found" in completion.text for completion in completions]
        return [Score(reward=float(right), correct=right, verdict="correct" if right else "wrong") for right in found]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        """A supervised example: a search that bisects what is left, or one that guesses anywhere; see `Habits`."""
        rng = random.Random(f"demonstration/{seed}/{position}")
        problem = self._drawn(rng, held_out=False)
        skilled, taught = self.habits.draw(rng)
        game = Search()
        game.reset(**problem.metadata)
        messages: list[Message] = []
        said = ""
        while said not in ("found", "no guesses left"):
            working = f"left: {game.low} to {game.high}" if skilled else ""
            anywhere = rng.randint(problem.metadata["low"], problem.metadata["high"])
            number = (game.low + game.high) // 2 if skilled else anywhere
            said = game.guess(number)
            messages += [called("guess", working, number=number), {"role": "tool", "name": "guess", "content": said}]
        messages.append({"role": "assistant", "content": "done"})
        return Demonstration(prompt=problem.prompt, messages=tuple(messages), skip_first=taught)
