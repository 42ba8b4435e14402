"""What a run leaves in its directory: recipe.toml, metrics.jsonl, rollouts to read, tokens to analyse."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from groupwise.config import dump
from groupwise.errors import UserError
from groupwise.learner.base import TokenRecord
from groupwise.training.events import Evaluated, Event, StepDone
from groupwise.types import Completion, Group, Message, TrainingBatch, pad_rows

SURROGATES = "backslashreplace"
"""How half of a surrogate pair is written, which a sampler of one's own may return: as JSON has it, \\ud800."""


class RunDirectory:
    """A run's files: recipe.toml, metrics.jsonl, rollouts/, tokens/, checkpoints/, model/."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        """`tokenizer`: to write tokens as text."""
        self.path, self.tokenizer = path, tokenizer
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def create(self, recipe: dict[str, Any]) -> None:
        """Raises:
        UserError: the directory holds something already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"--out {self.path}: already there and not empty; to go on with a run: --resume {self.path}")
        try:
            (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror}") from error
        self.write_recipe(recipe)

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        (self.path / "recipe.toml").write_text(dump(recipe))

    def rewind(self, step: int) -> None:
        """Remove what was recorded after `step`, which will be done again, and evaluations of `step`, which are repeated."""
        lines = self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.exists() else []
        kept = [line for line in lines if _step_of(line) < step or (_step_of(line) == step and "reward/mean" in json.loads(line))]
        self.metrics_path.write_text("".join(kept))

    def record(self, event: Event) -> None:
        """Write what an event holds; the directory is a `Recorder`."""
        if isinstance(event, StepDone):
            self.write_rollouts(event.step, event.groups)
            if event.tokens and isinstance(event.batch, TrainingBatch):
                self.write_tokens(event.step, event.groups, event.batch, event.tokens)
            self.write_metrics(event.step, event.metrics)  # last: who reads the line finds the step's other files complete
        elif isinstance(event, Evaluated):
            problems = float(len(event.evaluation.groups))
            self.write_metrics(event.step, {**event.evaluation.metrics, "eval_problems": problems})

    def write_metrics(self, step: int, metrics: Mapping[str, float | list[float]]) -> None:
        # JSON has no NaN.
        finite = {key: value if isinstance(value, list) or math.isfinite(value) else None for key, value in metrics.items()}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """The best and the worst completion of each group: as text for a person to read, and as a line of JSON each."""
        text = "\n".join(_readable(group) for group in groups)
        (self.path / "rollouts" / f"step-{step:06d}.txt").write_text(text, encoding="utf-8", errors=SURROGATES)
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for group in groups for sample in _samples(group)]
        (self.path / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8", errors=SURROGATES)

    def write_tokens(self, step: int, groups: Sequence[Group], batch: TrainingBatch, records: Sequence[TokenRecord]) -> None:
        """Every completion token as a row of Parquet; what only the learner knows is null where a row was not run."""
        (self.path / "tokens").mkdir(exist_ok=True)
        table = pa.table(token_columns(step, groups, batch, records, self.tokenizer))
        partial = self.path / "tokens" / ".partial"  # renamed at the end, so that a file that exists is complete
        pq.write_table(table, partial)
        partial.replace(self.path / "tokens" / f"step-{step:06d}.parquet")


def token_columns(
    step: int, groups: Sequence[Group], batch: TrainingBatch, records: Sequence[TokenRecord], tokenizer: Any
) -> dict[str, Any]:
    """Columns of equal length: one entry for each completion token of the step, row after row.

    `ratio`, `low` and `high` are of tokens, even where the algorithm's own ratio is the sequence's.
    """
    inside_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    rows_N, positions_N = inside_BT.nonzero(as_tuple=True)
    known: dict[str, Tensor] = {
        name: torch.full(inside_BT.shape, math.nan) for name in ("logprob", "low", "high", "clipped", "entropy")
    }
    for record in records:
        for name, known_BT in known.items():
            part = record[name]
            known_BT[record["rows_B"], : part.shape[1]] = part.float()
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores]
    prompts = [group.problem.text for group in groups for _ in group.completions]
    old_BT = batch.old_logprobs_BT
    measured_BT = torch.where(batch.mask_BT, 1.0, math.nan)  # a masked token has no ratio, one of a tool no probability
    sampled_BT = torch.where(pad_rows([completion.mask for completion in completions]), 1.0, math.nan)
    texts = {token: tokenizer.decode([token]) for token in set(batch.tokens_BT[inside_BT].tolist())}
    rows = rows_N.tolist()
    turns = [place for completion in completions for place in _turns_of_tokens(completion)]

    def of_rows(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    def floats(values_BT: Tensor) -> Any:
        return pa.array(values_BT[inside_BT].float().numpy(), from_pandas=True)  # NaN as null

    return {
        "step": pa.array([step] * len(rows), pa.int32()),
        "group": pa.array(batch.group_ids_B[rows_N].numpy(), pa.int32()),
        "row": pa.array(rows, pa.int32()),
        "position": pa.array(positions_N.numpy(), pa.int32()),
        "prompt": pa.array(of_rows(prompts)).dictionary_encode(),
        "token": pa.array(batch.tokens_BT[inside_BT].numpy(), pa.int32()),
        "text": pa.array([texts[token] for token in batch.tokens_BT[inside_BT].tolist()]).dictionary_encode(),
        "reward": pa.array(of_rows([score.reward if score.failure is None else None for score in scores]), pa.float32()),
        "correct": pa.array(of_rows([score.correct for score in scores])),
        "stop": pa.array(of_rows([completion.stop for completion in completions])).dictionary_encode(),
        "turn": pa.array([turn for turn, _ in turns], pa.int32()),
        "role": pa.array([role for _, role in turns]).dictionary_encode(),
        "trained": pa.array(batch.mask_BT[inside_BT].numpy()),
        "advantage": floats(batch.advantages_BT),
        "rollout_logprob": floats(batch.rollout_logprobs_BT * sampled_BT),
        "old_logprob": floats(old_BT * sampled_BT),
        "logprob": floats(known["logprob"] * measured_BT),
        "ratio": floats((known["logprob"] - old_BT).exp() * measured_BT),
        "low": floats(known["low"] * measured_BT),
        "high": floats(known["high"] * measured_BT),
        "clipped": floats(known["clipped"] * measured_BT).cast(pa.bool_()),
        "entropy": floats(known["entropy"]),
    }


def _turns_of_tokens(completion: Completion) -> list[tuple[int, str]]:
    """For each token the number of its turn, from 0, and who said it."""
    spans = completion.turns or completion.said
    return [(number, turn.role) for number, turn in enumerate(spans) for _ in range(turn.start, turn.end)]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the line that a kill cut short
        return float("inf")


def _ranked(group: Group) -> list[int]:
    """The completions that could be scored, by reward."""
    return sorted((i for i, s in enumerate(group.scores) if s.failure is None), key=lambda i: group.scores[i].reward)


def _samples(group: Group) -> list[dict[str, Any]]:
    ranked = _ranked(group)
    return [
        {
            "rank": rank,
            "prompt": group.problem.text,
            "answer": group.problem.answer,
            "completion": "\n".join(spoken(group.completions[i])),
            "reward": group.scores[i].reward,
            "correct": group.scores[i].correct,
            "stop": group.completions[i].stop,
        }
        for rank, i in (("best", ranked[-1]), ("worst", ranked[0]))
    ] if ranked else []  # fmt: skip


def spoken(completion: Completion) -> list[str]:
    """A completion for a person to read: its text, or the turns of a conversation, each with who said it and what it earned."""
    if not completion.turns:
        return [completion.text]
    turns = [turn for turn in completion.turns if turn.start >= completion.lead]
    lines = []
    for turn, messages in zip(turns, _messages_of_turns(completion), strict=False):
        earned = "" if turn.reward is None else f", reward {turn.reward:g}"
        errors = f", {turn.errors} failed" if turn.errors else ""
        lines.append(f"[{turn.role}{earned}{errors}] " + "\n".join(map(_written, messages)))
    return lines


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


def _readable(group: Group) -> str:
    ranked = _ranked(group)
    failed = len(group.scores) - len(ranked)
    right = "" if any(score.correct is None for score in group.scored) else f"{group.correct_count} of {len(ranked)} right; "
    note = f"; {failed} could not be scored" if failed else ""
    lines = [f"=== {group.problem.text}   ({right}answer {group.problem.answer}{note})"]
    for name, i in (("best", ranked[-1]), ("worst", ranked[0])) if ranked else ():
        completion, score = group.completions[i], group.scores[i]
        truncated = ", truncated" if completion.stop == "length" else ""
        lines += [f"--- {name}: reward {score.reward:g}{truncated}", *spoken(completion)]
    return "\n".join(lines) + "\n"
