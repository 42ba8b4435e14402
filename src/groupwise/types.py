"""What flows through groupwise: Problem, Completion, Score, Group, the stages of a Batch, and the Demonstration of a warm start.

Shapes in names: B completions, T completion tokens (right-padded), P prompts (one per group).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from groupwise.kept import KeptTokens

Message = Mapping[str, Any]
"""One message of a conversation: "role", "content", and whatever else the model's chat template reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question whose answer can be checked."""

    id: str
    """Identity of the prompt: the same each time the problem is visited."""
    prompt: str | tuple[Message, ...]
    """What the model reads, before any chat template: a text, or the messages of a conversation."""
    answer: str = ""
    """The reference answer, in the form that the task's checker understands."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the task knows: its grade, the other columns of its dataset line."""
    source: int = 0
    """Which of the task's sources it comes from, where it mixes several."""

    @property
    def text(self) -> str:
        """The prompt for a person to read: itself, or the contents of its messages."""
        return prompt_text(self.prompt)


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """A prompt for a person to read: itself, or the contents of its messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One supervised example for `groupwise sft`."""

    prompt: str | tuple[Message, ...]
    """What the model reads; carries no loss."""
    completion: str = ""
    """What it should say; an end-of-sequence token follows it."""
    messages: tuple[Message, ...] = ()
    """Instead of `completion`: what is said after the prompt, in a conversation. The assistant's messages are trained on."""
    skip_first: bool = False
    """Leave the first token, or that of each turn that calls a tool, out of the loss: the skill is taught, the choice to use it
    is not."""

    @property
    def text(self) -> str:
        """The prompt for a person to read."""
        return prompt_text(self.prompt)


Metrics = dict[str, float | list[float]]
"""Numbers by name, for a person or a plot to read; lists are sums over bins."""
Stop = Literal["stop", "length"]
Verdict = Literal["correct", "wrong", "unparsed"]
Outcome = Literal["all_correct", "all_wrong", "mixed", "equal", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Consecutive tokens of a completion that one side of the conversation said."""

    role: Literal["assistant", "tool", "user"]
    start: int
    """Index of the first token."""
    end: int
    """Index after the last."""
    reward: float | None = None
    """What the environment gave for it; None: nothing."""
    calls: int = 0
    """Tool calls in it."""
    errors: int = 0
    """Calls in it that could not be parsed; in a tool's turn, results that are errors."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens of a completion that were sampled with the same weights."""

    start: int
    """Index of the first token."""
    end: int
    """Index after the last."""
    version: int
    """How many optimiser updates the weights had seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, as the sampler returns it. T is its own length."""

    text: str
    """The decoded tokens, without the end-of-sequence token."""
    tokens: Tensor
    """int64 [T], the end-of-sequence token included where one was sampled."""
    logprobs: Tensor
    """float32 [T], of each token under the distribution it was drawn from."""
    mask: Tensor
    """bool [T], True where the policy chose the token (False for the output of a tool, say)."""
    stop: Stop
    """"stop": ended by itself. "length": truncated at the limit."""
    versions: tuple["VersionSpan", ...]
    """Which weights made which tokens, in order; more than one where weights changed on the way."""
    turns: tuple[Turn, ...] = ()
    """Who said what, in order and without gaps; empty: all of it is one turn of the policy."""
    messages: tuple[Message, ...] = ()
    """The completion as messages, those of tools included; empty: one of the assistant, with `text` as its content."""
    kept: KeptTokens | None = None
    """What top-k, top-p and min-p left to draw each token from; None: there were no limits, or the sampler does not say."""
    handle: int | None = None
    """What a later request names in `Request.continues`, so that the sampler reuses the keys and values of this completion."""
    attempts: int = 1
    """How often samplers were asked for it, or for one of its turns: more than once where one was lost or silent."""

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Completion":
        """The completion that `dataclasses.asdict` made a tree of."""
        kept = tree.get("kept")
        turns, versions = (Turn(**turn) for turn in tree["turns"]), (VersionSpan(**span) for span in tree["versions"])
        changes = {"versions": tuple(versions), "turns": tuple(turns), "kept": None if kept is None else KeptTokens(**kept)}
        return cls(**{**tree, **changes})

    @property
    def answer(self) -> str:
        """What it ends with: the assistant's last message of a conversation; otherwise all of it."""
        if not self.messages:
            return self.text
        said = [message for message in self.messages if message["role"] == "assistant"]
        return str(said[-1].get("content") or "") if said else ""

    @property
    def lead(self) -> int:
        """Tokens before the policy's first: the part of its prompt that is not the same for its whole group."""
        return self.turns[0].end if self.turns and self.turns[0].role != "assistant" else 0

    @property
    def said(self) -> tuple[Turn, ...]:
        """The turns of the policy; one of all tokens where the completion has no turns."""
        if not self.turns:
            return (Turn(role="assistant", start=0, end=len(self.tokens)),)
        return tuple(turn for turn in self.turns if turn.role == "assistant")

    @property
    def oldest_version(self) -> int:
        """How many optimiser updates the oldest weights that made a token of it had seen."""
        return min(span.version for span in self.versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a task thinks of one completion."""

    reward: float
    """In the task's own unit, before an algorithm's shaping; NaN where scoring failed."""
    correct: bool | None = None
    """Whether the answer is right: what pass rates count. None: the reward is graded, and nothing says what is right."""
    verdict: Verdict | None = None
    """Set where the reward is nothing but a verdict, which an algorithm may price its own way; None for a graded reward."""
    components: Mapping[str, float] = field(default_factory=dict)
    """The parts of the reward by name; the reward is their sum, each times its entry in `weights`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each part counts in the reward; 1 for one that is not listed."""
    steps: tuple[tuple[int, float], ...] = ()
    """(end, reward) of each step that could be checked; `end` counts characters of the text, the step's last included."""
    failure: str | None = None
    """Why there is no reward: "raised", "timeout", "none", "not finite" and the like. The completion is then set aside: it has
    no loss, and does not count in the baseline of its group."""
    detail: str = ""
    """What a person should read of the failure: the exception's text, say."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the reward logged of this completion (TRL's `log_extra`), by column."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the reward logged (TRL's `log_metric`); a step records their means."""

    def checked(self) -> "Score":
        """The score with its numbers as floats; failed, where one of those that training reads is not a finite number."""
        if self.failure is not None:
            return self
        numbers = {"reward": self.reward, **self.components}
        numbers |= {f"the weight of {name}": weight for name, weight in self.weights.items()}
        numbers |= {f"step {i}": reward for i, (_, reward) in enumerate(self.steps, 1)}
        for name, number in numbers.items():
            if not isinstance(number, Real):
                return Score.failed("wrong type", f"{name} is {number!r:.100}, and not a number")
            if not math.isfinite(number):
                return Score.failed("not finite", f"{name} is {float(number)}")
        return replace(
            self,
            reward=float(self.reward),
            components={name: float(value) for name, value in self.components.items()},
            weights={name: float(value) for name, value in self.weights.items()},
            steps=tuple((int(end), float(reward)) for end, reward in self.steps),
        )

    @classmethod
    def failed(cls, failure: str, detail: str = "") -> "Score":
        """The score of a completion that could not be scored."""
        return cls(reward=math.nan, failure=failure, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The completions of one prompt, scored."""

    problem: Problem
    prompt_tokens: Tensor
    """int64 [L]."""
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
    position: int | None = None
    """Its place among all groups that the run has begun, which its random numbers follow from; None: it is not of a run."""

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Group":
        """The group that `dataclasses.asdict` made a tree of."""
        return cls(
            problem=Problem(**tree["problem"]),
            prompt_tokens=tree["prompt_tokens"],
            completions=tuple(Completion.from_dict(completion) for completion in tree["completions"]),
            scores=tuple(Score(**score) for score in tree["scores"]),
            position=tree["position"],
        )

    @property
    def attempts(self) -> int:
        """The most of any of its completions."""
        return max(completion.attempts for completion in self.completions)

    @property
    def scored(self) -> list[Score]:
        """The scores of completions that could be scored."""
        return [score for score in self.scores if score.failure is None]

    @property
    def correct_count(self) -> int:
        return sum(score.correct is True for score in self.scores)

    @property
    def outcome(self) -> Outcome:
        """Whether its scored completions are all correct, all wrong, or some of each; without a verdict: whether their rewards
        are equal ("equal") or differ ("mixed"). "failed": none could be scored."""
        scored = self.scored
        if not scored:
            return "failed"
        if any(score.correct is None for score in scored):
            return "equal" if len({score.reward for score in scored}) == 1 else "mixed"
        if self.correct_count == len(scored):
            return "all_correct"
        return "mixed" if self.correct_count else "all_wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows for the learner as they were sampled, right-padded to the longest of them."""

    PER_TOKEN: ClassVar[tuple[str, ...]] = ("tokens_BT", "mask_BT", "rollout_logprobs_BT")
    """Fields of shape [B, T]."""

    prompts: tuple[Tensor, ...]
    """P prompts, int64 [L_p] each; every prompt once."""
    group_ids_B: Tensor
    """int64 [B], the row's prompt as an index into `prompts`."""
    rows_B: Tensor
    """int64 [B], which completion of the step each row is, counted through its groups."""
    lengths_B: Tensor
    """int64 [B], tokens in each row, trained on or not."""
    tokens_BT: Tensor
    """int64 [B, T]; 0 after the row's end."""
    mask_BT: Tensor
    """bool [B, T], True where a token is trained on."""
    rollout_logprobs_BT: Tensor
    """float32 [B, T], as sampled; 0 after the row's end."""
    kept: tuple[KeptTokens | None, ...] = ()
    """The kept sets of each row's tokens, on the CPU; empty where no row has any."""

    def kept_tokens(self) -> KeptTokens | None:
        """The kept sets of all tokens, row after row, without padding; None where no row has any."""
        return KeptTokens.join(self.kept, self.lengths_B.tolist()) if self.kept else None

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def select(self, rows: Tensor) -> Self:
        """The given rows (int64 [R]) as a batch of their own, cut to its longest row, with only the prompts it needs."""
        length = int(self.lengths_B[rows].max())
        kept = sorted(set(self.group_ids_B[rows].tolist()))
        per_token = {name: getattr(self, name) for name in self.PER_TOKEN}
        changes: dict[str, Any] = {
            "prompts": tuple(self.prompts[i] for i in kept),
            "group_ids_B": torch.searchsorted(self.group_ids_B.new_tensor(kept), self.group_ids_B[rows]),
            "rows_B": self.rows_B[rows],
            "lengths_B": self.lengths_B[rows],
            "kept": tuple(self.kept[row] for row in rows.tolist()) if self.kept else (),
            **{name: value[rows, :length] for name, value in per_token.items() if value is not None},
        }
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        changes: dict[str, Any] = {"prompts": tuple(prompt.to(device) for prompt in self.prompts)}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value.to(device)
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobBatch(Batch):
    """A batch with what the learner computed of it before the first update of the step."""

    PER_TOKEN: ClassVar[tuple[str, ...]] = (*Batch.PER_TOKEN, "old_logprobs_BT", "ref_logprobs_BT", "values_BT")

    old_logprobs_BT: Tensor
    """float32 [B, T], the policy at the start of the step."""
    ref_logprobs_BT: Tensor | None = None
    """float32 [B, T], the frozen reference, over the whole vocabulary; None where the algorithm uses none."""
    values_BT: Tensor | None = None
    """float32 [B, T], the critic's values; None where the algorithm has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch(LogprobBatch):
    """A batch with its advantages, ready for updates."""

    PER_TOKEN: ClassVar[tuple[str, ...]] = (*LogprobBatch.PER_TOKEN, "advantages_BT", "returns_BT")

    advantages_BT: Tensor
    """float32 [B, T]."""
    returns_BT: Tensor | None = None
    """float32 [B, T], what the critic learns to predict; None where the algorithm has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedBatch(TrainingBatch):
    """The rows of one optimiser step with their token weights, fixed before micro-batches are cut."""

    PER_TOKEN: ClassVar[tuple[str, ...]] = (*TrainingBatch.PER_TOKEN, "weights_BT")

    weights_BT: Tensor
    """float64 [B, T], what each token counts in the loss."""


Stage = TypeVar("Stage", bound=Batch)


def pad_rows(rows: Sequence[Tensor], length: int | None = None) -> Tensor:
    """Stack 1-d tensors into [B, T], zeros (False) after each row's end. T is the longest row, or `length` if that is more."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    if length is not None and padded.shape[1] < length:
        padded = torch.nn.functional.pad(padded, (0, length - padded.shape[1]))
    return padded


def upgrade(kind: type[Stage], batch: Batch, **more: Any) -> Stage:
    """A batch as a later stage, with the fields that the stage adds or changes."""
    return kind(**{**{item.name: getattr(batch, item.name) for item in fields(batch)}, **more})
