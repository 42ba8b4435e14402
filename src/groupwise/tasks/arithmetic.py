"""Integer expressions, answered at once or after a scratchpad that reduces one operation per line.

    7+3*4-5=          the prompt
    14                answered at once, or

    7+12-5            worked: a newline, then one operation fewer on each line,
    19-5              products first, then from the left;
    14                the last line is the answer

Every line of a scratchpad can be checked, so the task also scores steps.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from groupwise.types import Completion, Demonstration, Problem, Score, Verdict

GRADES = {1: (2, False), 2: (3, False), 3: (4, False), 4: (4, True), 5: (5, True)}
"""Grade -> (operands, whether one of the operations is a multiplication)."""
CHARACTERS = "0123456789+-*=\n"
LARGEST = 20
LARGEST_FACTOR = 9
HELD_OUT_SHARE = 10
"""One expression in this many, chosen by its digest, is held out: never drawn for training, of any kind."""


@dataclass(frozen=True, slots=True)
class Expression:
    """Integers joined by + - *; n operators for n + 1 numbers."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    def __str__(self) -> str:
        tail = "".join(o + str(n) for o, n in zip(self.operators, self.numbers[1:], strict=True))
        return f"{self.numbers[0]}{tail}"

    def reduce(self) -> "Expression":
        """One operation carried out: the first product if there is one, else the first from the left."""
        i = self.operators.index("*") if "*" in self.operators else 0
        a, b = self.numbers[i], self.numbers[i + 1]
        value = {"+": a + b, "-": a - b, "*": a * b}[self.operators[i]]
        return Expression((*self.numbers[:i], value, *self.numbers[i + 2 :]), self.operators[:i] + self.operators[i + 1 :])

    def value(self) -> int:
        expression = self
        while expression.operators:
            expression = expression.reduce()
        return expression.numbers[0]


MOST_HELD_OUT = 10_000
"""How many problems are held out at most; each takes a tenth of a millisecond to find."""
_EXPRESSION = re.compile(r"-?\d{1,9}([+*-]\d{1,9})*")


def parse(text: str) -> Expression | None:
    """The expression that `text` spells (only its first number may be negative), or None."""
    if not _EXPRESSION.fullmatch(text):
        return None
    pieces = re.findall(r"\d+|[+*-]", text.removeprefix("-"))
    numbers = [int(piece) for piece in pieces[::2]]
    if text.startswith("-"):
        numbers[0] = -numbers[0]
    return Expression(tuple(numbers), tuple(pieces[1::2]))


def is_held_out(expression: str) -> bool:
    return int.from_bytes(hashlib.sha256(expression.encode()).digest()[:4]) % HELD_OUT_SHARE == 0


def first_distinct(draw: Callable[[], Problem], count: int) -> list[Problem]:
    """The first `count` problems that differ, at most `MOST_HELD_OUT`; fewer where many draws in a row give no other."""
    problems: dict[str, Problem] = {}
    count, misses = min(count, MOST_HELD_OUT), 0
    while len(problems) < count and misses <= 1000 + 4 * len(problems):
        problem = draw()
        misses = misses + 1 if problem.id in problems else 0
        problems.setdefault(problem.id, problem)
    return list(problems.values())


def draw(rng: random.Random, grades: list[int], *, held_out: bool) -> tuple[int, Expression]:
    """A grade and an expression of it, from the held-out part or from the rest."""
    while True:
        grade = rng.choice(grades)
        count, product = GRADES[grade]
        operators = [rng.choice("+-") for _ in range(count - 1)]
        numbers = [rng.randint(1, LARGEST) for _ in range(count)]
        if product:
            i = rng.randrange(count - 1)
            operators[i] = "*"
            numbers[i], numbers[i + 1] = (rng.randint(2, LARGEST_FACTOR) for _ in range(2))
        expression = Expression(tuple(numbers), tuple(operators))
        if is_held_out(str(expression)) == held_out:
            return grade, expression


def working(expression: Expression) -> str:
    """The scratchpad, its leading newline included."""
    lines = []
    while expression.operators:
        expression = expression.reduce()
        lines.append(str(expression))
    return "\n" + "\n".join(lines)


class Habits(BaseModel):
    """The mix of demonstrations: how often the working is shown, how often an immediate answer, and how often that is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    working_share: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of demonstrations that are worked but leave the first token, which chooses to work, out of the loss."""
    choice_share: Annotated[float, Field(ge=0, le=1)] = 0.08
    """Among the others, the share that are worked, choice included: how often the base will choose to work."""
    careless_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of quick answers that are off by a little."""


class ArithmeticTask(BaseModel):
    """The embedded task. Its settings are the keys of [task] in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Literal["arithmetic"] = "arithmetic"
    grades: list[Annotated[int, Field(ge=1, le=max(GRADES))]] = Field(default=sorted(GRADES), min_length=1)
    """Which grades to draw from, evenly. 1: two operands, + and -; 2: three; 3: four; 4: four, one *; 5: five, one *."""
    problems: Annotated[int, Field(ge=0)] = 0
    """Size of the training pool, revisited in turn; 0: never the same draw twice."""
    steps_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second reward, the share of a completion's steps that are right, added to that of the answer; 0: none."""
    habits: Habits = Habits()

    def problem(self, position: int, seed: int) -> Problem:
        """The training problem at a position of the endless stream that `seed` names."""
        if self.problems:
            position %= self.problems
        return self.drawn(random.Random(f"train/{seed}/{position}"), held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, the same for every run; no expression of theirs is ever trained on."""
        return list(_held_out_of(tuple(self.grades), min(count, MOST_HELD_OUT)))  # seconds to find, where most are asked for

    def drawn(self, rng: random.Random, *, held_out: bool) -> Problem:
        grade, expression = draw(rng, list(self.grades), held_out=held_out)
        return Problem(id=str(expression), prompt=f"{expression}=", answer=str(expression.value()), metadata={"grade": grade})

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        scores = [score_answer(problem, completion.text) for completion in completions]
        return [with_steps(score, self.steps_weight) for score in scores] if self.steps_weight else scores

    def demonstration(self, position: int, seed: int) -> Demonstration:
        """A supervised example: the working (with or without a loss on its first token), or an immediate answer; see `Habits`."""
        rng = random.Random(f"demonstration/{seed}/{position}")
        _, expression = draw(rng, list(self.grades), held_out=False)
        prompt = f"{expression}="
        if rng.random() < self.habits.working_share:
            return Demonstration(prompt=prompt, completion=working(expression), skip_first=True)
        if rng.random() < self.habits.choice_share:
            return Demonstration(prompt=prompt, completion=working(expression))
        slip = rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < self.habits.careless_share else 0
        return Demonstration(prompt=prompt, completion=str(expression.value() + slip))


@lru_cache(maxsize=8)
def _held_out_of(grades: tuple[int, ...], count: int) -> tuple[Problem, ...]:
    rng, task = random.Random("held out"), ArithmeticTask(grades=list(grades))
    return tuple(first_distinct(lambda: task.drawn(rng, held_out=True), count))


def score_answer(problem: Problem, text: str) -> Score:
    """1 for the right last line, else 0; and 1 or 0 for each step.

    A step is right when it has the problem's value and one operation fewer than the line before it (an answer given at
    once is one step, and right when its value is).
    """
    *scratchpad, last = text.split("\n")
    parsed = parse(last)
    verdict: Verdict = "unparsed"
    if parsed is not None and not parsed.operators:
        verdict = "correct" if str(parsed.value()) == problem.answer else "wrong"
    correct = verdict == "correct"
    if not scratchpad or scratchpad[0]:
        return Score(reward=float(correct), correct=correct, verdict=verdict, steps=((len(text), float(correct)),))
    return Score(reward=float(correct), correct=correct, verdict=verdict, steps=score_steps(problem, text))


def with_steps(score: Score, weight: float) -> Score:
    """A score of two rewards: of the answer, and of the share of right steps."""
    components = {"answer": score.reward, "steps": sum(right for _, right in score.steps) / len(score.steps)}
    return replace(
        score,
        reward=components["answer"] + weight * components["steps"],
        verdict=None,
        components=components,
        weights={"steps": weight},
    )


def score_steps(problem: Problem, text: str) -> tuple[tuple[int, float], ...]:
    """(end, reward) for each line of a scratchpad that begins with a newline."""
    steps = []
    end = 0
    before = parse(problem.text.removesuffix("="))
    for line in text.split("\n")[1:]:
        end += 1 + len(line)
        now = parse(line)
        right = (
            now is not None
            and before is not None
            and len(now.operators) == len(before.operators) - 1
            and str(now.value()) == problem.answer
        )
        steps.append((end, float(right)))
        before = now
    return tuple(steps)
