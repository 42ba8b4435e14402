"""Conversations with environments: what a scripted policy says is answered, masked, scored and limited as promised."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.config import EnvironmentSection, SftRecipe, find_recipe, load
from groupwise.environments.find import Environments, Found, kind_of
from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.models import Chat, character_tokenizer
from groupwise.plugins import UserFunction
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.episodes import Episodes
from groupwise.rollouts.groups import Rollouts
from groupwise.types import Completion, Group, Problem, Score, VersionSpan
from tests import chat_templates

END = "<|im_end|>"


@pytest.fixture(scope="module")
def chat() -> Chat:
    """The shipped base's tokenizer and chat template."""
    model = load(find_recipe("tools-base"), SftRecipe)[0].model
    tokenizer = character_tokenizer(
        model.characters, model.words, special=model.special_tokens, chat_template=model.chat_template
    )
    return Chat.build(tokenizer)


def call(name: str, **arguments: Any) -> str:
    inner = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{inner}}}}}\n</tool_call>{END}'


class Scripted:
    """A sampler whose n-th turn of the i-th completion says `say(i, n)`."""

    def __init__(self, tokenizer: Any, say: Callable[[int, int], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.requests: list[Request] = []
        self.started = 0

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        self.requests.append(request)
        await asyncio.sleep(0)
        if request.continues is None:
            rows = [(self.started + i, 0) for i in range(request.n)]
            self.started += request.n
        else:
            rows = [(request.continues // 100, request.continues % 100)]
        return tuple(self._completion(i, number, request.sampling) for i, number in rows)

    def _completion(self, i: int, number: int, sampling: Sampling) -> Completion:
        ids = self.tokenizer(self.say(i, number), add_special_tokens=False).input_ids
        assert set(ids) - {self.tokenizer.pad_token_id} == set(ids)
        ended = ids[-1] == self.tokenizer.eos_token_id and len(ids) <= sampling.max_tokens
        tokens = torch.tensor(ids[: sampling.max_tokens])
        return Completion(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tokens,
            logprobs=torch.full((len(tokens),), -1.0 - number),
            mask=torch.ones(len(tokens), dtype=torch.bool),
            stop="stop" if ended else "length",
            versions=(VersionSpan(0, len(tokens), number),),
            handle=100 * i + number + 1,
        )

    def load(self, weights: Any, version: int) -> None: ...

    def health(self) -> dict[str, float]:
        return {}


class LastWord:
    """A task that scores 1 where the last turn is the answer."""

    name = "last word"

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        return [Score(reward=float(c.answer == problem.answer), correct=c.answer == problem.answer) for c in completions]


def converse(
    chat: Chat,
    make: Any,
    say: Callable[[int, int], str],
    *,
    n: int = 1,
    tools: Sequence[Callable[..., Any]] = (),
    max_tokens: int = 400,
    problem: Problem | None = None,
    task: Any = None,
    **settings: Any,
) -> tuple[Group, Scripted]:
    """A group of scripted conversations."""
    made = make if isinstance(make, dict) else {None: make}
    kinds = {key: item if isinstance(item, Kind) else Kind.of(item, tools) for key, item in made.items()}
    above = settings.pop("correct_above", None)
    sampler = Scripted(chat.tokenizer, say)
    rollouts = Rollouts(
        sampler=sampler,
        task=task or LastWord(),
        chat=chat,
        sampling=Sampling(max_tokens=max_tokens),
        episodes=Episodes(Environments(kinds, above), EnvironmentSection(**settings), chat),
    )
    problem = problem or Problem(id="p", prompt="go", answer="12", metadata={"start": 5})
    return rollouts.groups([problem], n, 7)[0][0], sampler


class Increment:
    """As in TRL's documentation: reset, tools, get_reward; nothing of groupwise in it."""

    def reset(self, **row: Any) -> str | None:
        self.row = row
        self.counter = row["start"]
        return f" from {self.counter}"

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        if step < 0:
            raise ValueError("not down")
        self.counter += step
        return self.counter

    async def slowly(self, step: int) -> int:
        """
        Increment the internal counter, asynchronously.

        Args:
            step: Value to add to the counter.
        """
        await asyncio.sleep(0)
        return self.increment(step)

    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        return float(self.counter)

    def _private(self) -> None:
        raise AssertionError


def test_trl_class_unchanged(chat: Chat) -> None:
    script = [call("increment", step=2), call("slowly", step=3), f"done{END}"]
    group, sampler = converse(chat, Increment, lambda _, n: script[n], n=2, correct_above=9.5)
    text = chat.tokenizer.decode(group.prompt_tokens)
    assert "tools: increment(step), slowly(step)" in text
    assert text.endswith(f"user\ngo from 5{END}\n<|im_start|>assistant\n")
    completion = group.completions[0]
    assert [message["role"] for message in completion.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["content"] for message in completion.messages if message["role"] == "tool"] == ["7", "10"]
    assert [score.reward for score in group.scores] == [10.0, 10.0]  # each completion has an instance of its own
    assert all(score.correct for score in group.scores)
    assert [turn.calls for turn in completion.said] == [1, 1, 0]
    assert completion.answer == "done" and completion.stop == "stop"
    assert len(sampler.requests) == 1 + 2 * 2  # the first turn of a group is one request


def test_sampled_ids_stay_as_they_are_and_the_rest_is_masked(chat: Chat) -> None:
    script = [call("increment", step=2), call("slowly", step=3), f"done{END}"]
    group, sampler = converse(chat, Increment, lambda _, n: script[n], n=2)
    for completion in group.completions:
        sampled = [chat.tokenizer(text, add_special_tokens=False).input_ids for text in script]
        assert completion.tokens[completion.mask].tolist() == [token for ids in sampled for token in ids]
        assert [completion.tokens[turn.start : turn.end].tolist() for turn in completion.said] == sampled
        assert [turn.start for turn in completion.turns] == [0, *(turn.end for turn in completion.turns[:-1])]
        assert completion.turns[-1].end == len(completion.tokens)
        assert [turn.role for turn in completion.turns] == ["assistant", "tool"] * 2 + ["assistant"]
        for number, turn in enumerate(completion.said):
            assert (completion.logprobs[turn.start : turn.end] == -1.0 - number).all()
        assert (completion.logprobs[~completion.mask] == 0).all()
        assert [(s.start, s.end, s.version) for s in completion.versions] == [
            (turn.start, turn.end, number) for number, turn in enumerate(completion.said)
        ]
        # The template's own rendering of the whole conversation has these very tokens, but for what follows the last turn.
        schemas = [dict(tool) for tool in Kind.of(Increment).schemas]
        messages = [{"role": "user", "content": "go from 5"}, *completion.messages]
        whole = chat.tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False)
        ids = chat.tokenizer(whole.removesuffix("\n"), add_special_tokens=False).input_ids
        assert ids == [*group.prompt_tokens.tolist(), *completion.tokens.tolist()]
    for request in sampler.requests[1:]:
        assert request.continues is not None and request.keep
        begun = [*group.prompt_tokens.tolist(), *group.completions[0].tokens.tolist()]
        assert request.prompt.tolist() == begun[: len(request.prompt)]
    assert len({(request.seed, request.offset) for request in sampler.requests}) == len(sampler.requests)


def test_what_a_tool_raises_goes_to_the_model(chat: Chat) -> None:
    script = [
        call("increment", step=-1),
        call("incremint", step=1),
        '<tool_call>\n{"name": "incr</tool_call>' + END,
        f"done{END}",
    ]
    group, _ = converse(chat, Increment, lambda _, n: script[n])
    completion = group.completions[0]
    said = [message["content"] for message in completion.messages if message["role"] == "tool"]
    assert said[0] == "{'error': 'not down'}"
    assert "incremint" in said[1] and "error" in said[1]
    assert "error" in said[2]
    assert [turn.errors for turn in completion.turns if turn.role == "tool"] == [1, 1, 1]
    assert group.scores[0].reward == 5.0


def double(number: int) -> int:
    """
    Double a number.

    Args:
        number: The number.
    """
    return 2 * number


def test_functions_alone_are_scored_by_the_task(chat: Chat) -> None:
    group, _ = converse(chat, None, lambda i, n: [call("double", number=6), f"{12 + i}{END}"][n], n=2, tools=[double])
    assert [score.reward for score in group.scores] == [1.0, 0.0]


def test_limits_on_turns_and_tokens(chat: Chat) -> None:
    step = call("increment", step=1)
    group, _ = converse(chat, Increment, lambda *_: step, max_turns=3)
    completion = group.completions[0]
    assert [turn.role for turn in completion.turns] == ["assistant", "tool"] * 2 + ["assistant"]
    assert group.scores[0].reward == 7.0  # the third call is not carried out
    assert completion.stop == "stop"

    turn, answer = (completion.turns[i].end - completion.turns[i].start for i in (0, 1))
    for limit in range(1, 3 * (turn + answer)):
        group, sampler = converse(chat, Increment, lambda *_: step, max_tokens=limit)
        completion = group.completions[0]
        assert completion.stop == "length" and len(completion.tokens) <= limit
        # What does not fit with a token to spare is left out, so that no row ends with a masked token.
        assert completion.turns[-1].role == "assistant"
        room = limit % (turn + answer)
        whole = limit // (turn + answer) * (turn + answer)
        assert len(completion.tokens) == (whole + min(room, turn) if room else whole - answer)
        assert all(len(r.prompt) - len(group.prompt_tokens) + r.sampling.max_tokens == limit for r in sampler.requests)


FAILING = """
import asyncio, math, os, time

class Failing:
    made = 0

    def __init__(self):
        self.number = Failing.made
        Failing.made += 1
        if self.number == 8:
            raise RuntimeError("no room")

    def reset(self, **row):
        if self.number == 1:
            raise RuntimeError("no board")
        return 5 if self.number == 2 else None

    def wait(self) -> str:
        \"\"\"Wait.\"\"\"
        if self.number == 3:
            raise ValueError("not now")
        return "waited"

    async def get_reward(self):
        await asyncio.sleep(5 if self.number == 9 else 0)
        if self.number == 4:
            raise RuntimeError("no score")
        return {5: None, 6: math.nan, 7: "many"}.get(self.number, 1.0)

class Hanging(Failing):
    def wait(self) -> str:
        \"\"\"Wait.\"\"\"
        time.sleep(60)

class Dying(Failing):
    def wait(self) -> str:
        \"\"\"Wait.\"\"\"
        os._exit(1)

def add(left: int, right: int) -> int:
    \"\"\"Add.

    Args:
        left: A number.
        right: Another.
    \"\"\"
    return left + right
"""


def in_workers(tmp_path: Path, name: str, tools: Sequence[str] = ()) -> Kind:
    """A class of the file above, as a recipe names it."""
    (tmp_path / "game.py").write_text(FAILING)
    made = Found.of(f"game.py:{name}", tmp_path)
    return kind_of(made, [Found.of(f"game.py:{tool}", tmp_path) for tool in tools])


def test_an_environment_that_fails_sets_its_conversation_aside(chat: Chat, tmp_path: Path) -> None:
    kind = in_workers(tmp_path, "Failing")
    script = [call("wait"), f"done{END}"]
    group, _ = converse(chat, kind, lambda _, n: script[n], n=10, time_limit=0.5)
    causes = ["raised", "wrong type", None, "raised", "none", "not finite", "wrong type", "raised", "timeout"]
    assert [score.failure for score in group.scores] == [None, *causes]
    assert "no board" in group.scores[1].detail and "get_reward()" in group.scores[4].detail
    assert "no room" in group.scores[8].detail
    answers = [[message["content"] for message in c.messages if message["role"] == "tool"] for c in group.completions]
    assert answers[0] == ["waited"] and answers[3] == ["{'error': 'not now'}"]
    assert all(len(completion.tokens) for completion in group.completions)


@pytest.mark.parametrize(("name", "cause"), [("Hanging", "timeout"), ("Dying", "died")])
def test_a_tool_that_hangs_or_ends_its_process_costs_its_group(chat: Chat, tmp_path: Path, name: str, cause: str) -> None:
    kind = in_workers(tmp_path, name)
    group, _ = converse(chat, kind, lambda i, n: [call("wait") if i == 0 else END, f"done{END}"][n], n=3, time_limit=0.5)
    assert group.scores[0].failure == cause
    assert {score.failure for score in group.scores[1:]} <= {"raised", "wrong type", "died"}  # these cannot be reset


def test_functions_and_objects_run_in_workers(chat: Chat, tmp_path: Path) -> None:
    kind = in_workers(tmp_path, "Failing", ["add"])
    script = [call("add", left=2, right=3), call("wait"), f"done{END}"]
    group, _ = converse(chat, kind, lambda _, n: script[n])
    assert [message["content"] for message in group.completions[0].messages if message["role"] == "tool"] == ["5", "waited"]

    class Local(Payer):
        """A class that only this process knows."""

    given = Found.of(UserFunction(Local, "test:Local"), tmp_path)
    script = [call("increment", step=2), call("slowly", step=1), f"done{END}"]
    group, _ = converse(chat, kind_of(given, []), lambda _, n: script[n])
    assert group.scores[0].reward == pytest.approx(8.3)
    assert [turn.reward for turn in group.completions[0].said] == [0.2, 0.1, None]


class Differing(Increment):
    """Every conversation begins with a text of its own."""

    made = 0

    def reset(self, **row: Any) -> str:
        super().reset(**row)
        Differing.made += 1
        return " on" * (Differing.made - 1)


def test_prompts_that_differ_in_a_group(chat: Chat) -> None:
    Differing.made = 0
    group, sampler = converse(chat, Differing, lambda i, n: [call("increment", step=i), f"done{END}"][n], n=3, max_tokens=60)
    texts = [chat.tokenizer.decode([*group.prompt_tokens.tolist(), *c.tokens.tolist()]) for c in group.completions]
    for i, (text, completion) in enumerate(zip(texts, group.completions, strict=True)):
        assert f"user\ngo{' on' * i}{END}\n<|im_start|>assistant\n<tool_call>" in text
        assert completion.turns[0].role == "user" and completion.lead == completion.turns[0].end
        assert not completion.mask[: completion.lead].any() and (completion.logprobs[: completion.lead] == 0).all()
        assert [turn.role for turn in completion.turns] == ["user", "assistant", "tool", "assistant"]
        assert completion.versions[0].start == completion.lead
    assert [len(c.tokens) - c.lead for c in group.completions] == [
        len(group.completions[0].tokens) - group.completions[0].lead
    ] * 3
    assert len(sampler.requests) == 6


class Talk:
    """A simulated user, who pays for each turn and has enough after three."""

    def reset(self, **row: Any) -> None:
        self.heard: list[str] = []

    async def step(self, message: Any) -> tuple[list[Any], float | None, bool]:
        self.heard.append(message["content"])
        reward = None if len(self.heard) == 2 else float(len(self.heard))
        return [{"role": "user", "content": f"go on {len(self.heard)}"}], reward, len(self.heard) == 3


def test_a_simulated_user_and_rewards_of_turns(chat: Chat) -> None:
    group, _ = converse(chat, Talk, lambda _, n: f"{12 if n == 2 else n}{END}", n=2)
    completion, score = group.completions[0], group.scores[0]
    assert [turn.role for turn in completion.turns] == ["assistant", "user"] * 2 + ["assistant"]
    assert [turn.reward for turn in completion.said] == [1.0, None, 3.0]
    assert "user\ngo on 2" in chat.tokenizer.decode(completion.tokens)
    # No get_reward(): the task's score of the answer, 1, and the turns'.
    assert score.reward == 5.0 and score.components == {"outcome": 1.0, "turns": 4.0} and score.correct


RUDE = """
class Rude:
    said = {}

    def reset(self, **row): ...

    def step(self, message):
        return self.said[message["content"]], None, False

    def get_reward(self):
        return 1.0

user, tool = {"role": "user", "content": "a"}, {"role": "tool", "name": "look", "content": "b"}
Rude.said = {
    "0": [user],
    "1": [tool, user],
    "2": [user, tool],
    "3": [{"role": "user"}],
    "4": [{"role": "user", "content": 5}],
    "5": [user, user],
}

class WithTool(Rude):
    def look(self) -> str:
        \"\"\"Look.\"\"\"
        return "b"
"""


@pytest.mark.parametrize(
    ("name", "family", "wrong"),
    [("Rude", "qwen3", [1, 2, 3, 4]), ("WithTool", "qwen3", [2, 3, 4]), ("Rude", "gemma", [1, 2, 3, 4, 5])],
)
def test_what_a_simulated_user_may_not_say(tmp_path: Path, name: str, family: str, wrong: list[int]) -> None:
    """It sets the conversation aside and no other, also what only the chat template refuses."""
    (tmp_path / "rude.py").write_text(RUDE)
    template = Chat.build(chat_templates.tokenizer(family))
    kind = kind_of(Found.of(f"rude.py:{name}", tmp_path), [])
    group, _ = converse(template, kind, lambda i, _: f"{i}{template.tokenizer.eos_token}", n=6, max_turns=2)
    assert [i for i, score in enumerate(group.scores) if score.failure == "wrong type"] == wrong
    assert [score.reward for i, score in enumerate(group.scores) if i not in wrong] == [1.0] * (6 - len(wrong))


def test_a_call_that_cannot_be_read_is_answered_in_every_template() -> None:
    """Mistral's asks for the id of the call, which nobody could read."""
    template = Chat.build(chat_templates.tokenizer("mistral"))
    group, _ = converse(template, Increment, lambda _, n: ["[TOOL_CALLS][{]</s>", "done</s>"][n])
    assert [turn.role for turn in group.completions[0].turns] == ["assistant", "tool", "assistant"]
    assert "not valid JSON" in group.completions[0].messages[1]["content"] and group.scores[0].reward == 5.0


class Walker:
    """TRL's form: its step() is a tool."""

    def reset(self, **row: Any) -> None: ...

    def step(self, direction: str) -> str:
        """
        Take a step.

        Args:
            direction: Where to.
        """
        return direction


def test_a_step_with_other_arguments_is_a_tool() -> None:
    kind = Kind.of(Walker)
    assert kind.tool_names == ["step"] and not kind.has_step
    assert Kind.of(Talk).has_step and "step" not in Kind.of(Talk).tool_names


class Quiet(Increment):
    """Only some conversations earn rewards of turns."""

    turn_reward: float | None = None

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter; an odd one earns its half.
        """
        self.turn_reward = step / 2 if step % 2 else None
        return super().increment(step)


def test_all_rewards_of_a_group_have_the_same_parts(chat: Chat) -> None:
    """Where one conversation's turn earned something, the others' earned 0; where none did, there is no such part."""

    def steps(*sizes: int) -> Group:
        def say(i: int, n: int) -> str:
            return f"done{END}" if n else call("increment", step=sizes[i])

        return converse(chat, Quiet, say, n=len(sizes))[0]

    assert [score.components for score in steps(1, 2).scores] == [{"outcome": 6, "turns": 0.5}, {"outcome": 7, "turns": 0}]
    assert [score.reward for score in steps(1, 2).scores] == [6.5, 7.0]
    assert [score.components for score in steps(4, 2).scores] == [{}, {}]


def test_rewards_of_task_and_environment_together(chat: Chat) -> None:
    group, _ = converse(chat, Increment, lambda i, _: f"{12 + i}{END}", n=2, task_reward=True)
    assert [score.reward for score in group.scores] == [6.0, 5.0]
    assert group.scores[0].components == {"task": 1.0, "environment": 5.0}
    assert [score.correct for score in group.scores] == [True, False]


class Payer(Increment):
    """Earns by an attribute, which leaves it a class for TRL."""

    turn_reward: float | None = None

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.
        """
        self.turn_reward = step / 10
        return super().increment(step)


def test_rewards_of_tool_turns(chat: Chat) -> None:
    group, _ = converse(chat, Payer, lambda _, n: [call("increment", step=2), call("slowly", step=1), f"done{END}"][n])
    assert [turn.reward for turn in group.completions[0].said] == [0.2, 0.1, None]
    assert group.scores[0].reward == pytest.approx(8.3)


def test_a_column_chooses_the_class(chat: Chat) -> None:
    classes = {"count": Increment, "talk": Talk}
    problem = Problem(id="p", prompt="go", answer="12", metadata={"start": 5, "environment": "count"})
    group, _ = converse(chat, classes, lambda *_: f"done{END}", problem=problem)
    assert "tools: increment(step), slowly(step)" in chat.tokenizer.decode(group.prompt_tokens)
    talk = Problem(id="p", prompt="go", answer="12", metadata={"environment": "talk"})
    group, _ = converse(chat, classes, lambda *_: f"done{END}", problem=talk)
    assert "tools" not in chat.tokenizer.decode(group.prompt_tokens) and len(group.completions[0].turns) == 5
    with pytest.raises(UserError, match="its column 'environment' is 'tolk'"):
        converse(chat, classes, lambda *_: END, problem=Problem(id="p", prompt="go", metadata={"environment": "tolk"}))


def test_rows_are_the_columns(chat: Chat) -> None:
    rows = []

    class Look(Increment):
        def reset(self, **row: Any) -> str | None:
            rows.append(row)
            return super().reset(**row)

    converse(chat, Look, lambda *_: f"done{END}")
    assert rows == [{"prompt": "go", "answer": "12", "start": 5}]


def undescribed(number: int) -> int:
    """Double a number."""
    return number


class NoReset:
    pass


class Exits:
    def __init__(self) -> None:
        raise SystemExit(0)


class Broken:
    def __init__(self) -> None:
        raise OSError("no file")


@pytest.mark.parametrize(
    ("make", "tools", "message"),
    [
        (None, [undescribed], "tool undescribed: .*number"),
        (NoReset, [], r"NoReset has no reset\(\)"),
        (Broken, [], r"Broken\(\): OSError: no file"),
        (Exits, [], r"Exits\(\): SystemExit: 0"),
        (None, [double, double], "two tools are named 'double'"),
    ],
)
def test_classes_and_tools_that_cannot_be_used_are_refused(make: Any, tools: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Kind.of(make, tools)
