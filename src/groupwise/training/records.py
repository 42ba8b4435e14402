"""What a run leaves in its directory: its settings, metrics.jsonl, events.jsonl, rollouts to read, tokens to analyse, a model."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from groupwise import files
from groupwise.errors import RunError, UserError
from groupwise.files import Digest, DiskError, Lock
from groupwise.text import json_line
from groupwise.training.checkpoints import RECIPE, Checkpoint, Store, listed
from groupwise.training.events import Evaluated, Event, StepDone
from groupwise.training.events_file import EventsFile
from groupwise.training.ledger import LEDGER, Ledger
from groupwise.training.metrics_file import METRICS, MetricsFile
from groupwise.training.rollout_text import held_out_samples, readable, samples
from groupwise.training.segments import (
    SEGMENTS,
    Segment,
    Unrecorded,
    as_json,
    changes,
    check_beginning,
    completed,
    recorded,
    replaced,
    shown,
    write_segments,
)
from groupwise.types import Completion, Group, TrainingBatch, pad_rows

WRITTEN = {
    RECIPE, SEGMENTS, METRICS, LEDGER, "events.jsonl", "rollouts", "tokens", "evaluations", "checkpoints", "trackers",
    "report.html", "logs", "weights", ".lock",
}  # fmt: skip
"""What may be in a run's directory before its first checkpoint."""
BY_STEP = ("rollouts", "tokens", "evaluations")
"""Directories with files of each step or evaluation, which a resume drops from where it goes on."""
MOST_HELD_OUT = 100
"""Problems of an evaluation whose completions are written: the first ones, which are the same in every evaluation."""
LEFTOVERS = (
    files.PARTIAL, files.REPLACED, files.REMOVED, "metrics.damaged-", "ledger.damaged-", "recipe.damaged-", "segments.damaged-",
)  # fmt: skip


class RunDirectory:
    """A run's files: recipe.toml, segments.jsonl, metrics.jsonl, ledger.jsonl, events.jsonl, rollouts/, tokens/, evaluations/,
    checkpoints/, model/."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        """`tokenizer`: to write tokens as text."""
        self.path, self.tokenizer = path, tokenizer
        self.metrics = MetricsFile(path / METRICS)
        self.ledger = Ledger(path / LEDGER)
        self.events = EventsFile(path / "events.jsonl")
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.logs = path / "logs"
        """Of other processes of the run."""
        self.recipe = ""
        """The run's settings, as TOML."""

    # --- the beginning

    def claim(self) -> Lock:
        """Make the directory this process's, to begin a run in.

        Raises:
            UserError: it holds something else, or another process is at work in it.
        """
        self.check_free()
        try:
            files.make_directory(self.path)
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror}") from error
        try:
            lock = Lock(self.path)
        except DiskError as error:
            raise UserError(f"--out {error}") from error
        self.check_free()  # again, now that nobody else writes there
        return lock

    def check_free(self) -> None:
        """Refuse a directory that holds anything but what a run writes before its first checkpoint.

        Raises:
            UserError: naming it.
        """
        if not self.path.exists():
            return
        there = f"--out {self.path}: already there and not empty"
        if not self.path.is_dir():
            raise UserError(there)
        if self.model.exists() or listed(self.checkpoints) or any(self.checkpoints.glob("damaged-step-*")):
            raise UserError(f"{there}; to go on with a run: groupwise train --resume {shlex.quote(str(self.path))}")
        names = {path.name for path in self.path.iterdir()}
        foreign = sorted(name for name in names if name not in WRITTEN and not name.startswith(LEFTOVERS))
        if foreign:
            raise UserError(f"{there}: {foreign[0]!r} is nothing that a run writes")
        if not names & {SEGMENTS, RECIPE} and names & {METRICS, "events.jsonl", "tokens", "evaluations"}:
            raise UserError(f"{there}, and without the settings of what is in it")

    def create(self, tree: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> None:
        """Write the settings of a run that begins; what it left when it was killed before its first checkpoint goes.

        Args:
            tree: the settings, whole.
            inputs: hashes of what the run reads from elsewhere.

        Raises:
            UserError: what was begun here had other settings.
        """
        with suppress(Unrecorded):  # killed before it wrote them
            before, now = recorded(self.path, None).tree, tree
            check_beginning(self.path, before)
            with suppress(UserError):  # else every difference is said
                before, now = completed(before), completed(now)
            if differing := changes(before, now):
                keys = "".join(f"\n  {key}: {shown(old)} -> {shown(new)}" for key, (old, new) in differing.items())
                raise UserError(f"--out {self.path}: a run with other settings was begun there:{keys}")
        self.create_again(tree, inputs)

    def create_again(self, tree: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Segment:
        """As `create`, for a run that is resumed without a checkpoint, and may have other settings than before."""
        self._recover()
        with files.explained(self.path):
            files.make_directory(self.path)
        if self.metrics.path.exists():
            files.write_atomically(self.metrics.path, b"")
        self.ledger.clear()
        self._drop_after(-1)
        first = Segment(segment=0, first_step=1, recipe=as_json(tree), files=inputs or {})
        self._write_settings([first])
        return first

    def resume(
        self,
        checkpoint: Checkpoint,
        damaged: Iterable[int],
        segments: Sequence[Segment],
        store: Store,
        metrics: Sequence[Digest],
    ) -> str | None:
        """Have the directory say what it said when the checkpoint was written, and with which settings the run goes on.

        Everything has been verified and loaded before. Killed anywhere in here, the run can be resumed with the same command:
        whatever is removed will be done again, every file is replaced as a whole, and a recipe.toml that is older than the last
        segment is known by its hash. The segment comes before it, so that no step is ever labelled with settings that it was
        not trained with.

        Args:
            damaged: steps of newer checkpoints that cannot be resumed from.
            segments: of the run, that of this resume last.
            metrics: what metrics.jsonl held at the checkpoint, by any who knows.

        Returns:
            What is wrong with metrics.jsonl or ledger.jsonl; None if nothing is.
        """
        problem = self.rewind(checkpoint.step, damaged, store, metrics)
        *before, last = segments
        repaired = None if self.metrics.begins(checkpoint.metrics) else asdict(self.metrics.digest)
        self._write_settings([*before, replace(last, metrics=repaired)])
        return problem

    def rewind(self, step: int, damaged: Iterable[int], store: Store, metrics: Sequence[Digest]) -> str | None:
        """Have the directory say what it said when the checkpoint of a step was written; 0: before the first step.

        Args:
            damaged: steps of newer checkpoints that cannot be resumed from.
            metrics: what metrics.jsonl held then, by any who knows.

        Returns:
            What is wrong with metrics.jsonl or ledger.jsonl; None if nothing is.
        """
        self._recover()
        store.set_aside(damaged)
        problems = self.metrics.rewind(step, metrics), self.ledger.rewind(step)
        self._drop_after(step)
        store.resume(step, self.metrics.evaluations)
        return "; ".join(filter(None, problems)) or None

    def _recover(self) -> None:
        for directory in (self.path, *(self.path / name for name in BY_STEP), self.checkpoints):
            files.recover(directory)

    def _drop_after(self, step: int) -> None:
        """Remove what was written of steps and evaluations that will be done again."""
        for name in BY_STEP:
            for path in (self.path / name).glob("step-*.*"):
                number = path.name.removeprefix("step-").partition(".")[0]
                if number.isdecimal() and int(number) > step:
                    with files.explained(path):
                        path.unlink()

    def _write_settings(self, segments: Sequence[Segment]) -> None:
        *before, last = segments
        with files.explained(self.path):
            (self.path / "rollouts").mkdir(exist_ok=True)
        write_segments(self.path, [*before, replace(last, replaces=replaced(self.path))])
        self.recipe = last.text
        files.write_atomically(self.path / RECIPE, self.recipe)

    # --- on the way

    def record(self, event: Event) -> None:
        """Write what an event holds; the directory is a `Recorder`."""
        if isinstance(event, StepDone):
            self.write_rollouts(event.step, event.groups, event.parts)
            if event.tokens and isinstance(event.batch, TrainingBatch):
                self.write_tokens(event)
            if event.entry is not None:
                self.ledger.append(event.entry)
            self.metrics.append(event.step, event.metrics)  # last: who reads the line finds the step's other files complete
        elif isinstance(event, Evaluated):
            self.write_held_out(event.step, event.evaluation.groups)
            scored = sum(bool(group.scored) for group in event.evaluation.groups)
            problems = {"eval_problems": float(scored)}  # which the scores are means over
            if unscored := len(event.evaluation.groups) - scored:
                problems["eval_unscored"] = float(unscored)
            self.metrics.append(event.step, {**event.evaluation.metrics, **problems})
        else:
            self.events.record(event)

    def write_rollouts(self, step: int, groups: Sequence[Group], parts: Sequence[Mapping[str, float]] = ()) -> None:
        """The best and the worst completion of each group: as text for a person to read, and as a line of JSON each.

        Args:
            parts: of each completion's reward.
        """
        text = "\n".join(readable(group) for group in groups)
        ends = list(accumulate((len(group.completions) for group in groups), initial=0))
        of_groups = [samples(group, parts[start:end]) for group, (start, end) in zip(groups, pairwise(ends), strict=True)]
        lines = [json_line(sample) + "\n" for found in of_groups for sample in found]
        for suffix, content in (("txt", text), ("jsonl", "".join(lines))):
            path = self.path / "rollouts" / f"step-{step:06d}.{suffix}"
            files.write_atomically(path, content.encode(), durable=False)

    def write_held_out(self, step: int, groups: Sequence[Group]) -> None:
        """The completions of the first `MOST_HELD_OUT` problems of an evaluation, a line of JSON each."""
        path = self.path / "evaluations" / f"step-{step:06d}.jsonl"
        lines = [json_line(sample) + "\n" for group in groups[:MOST_HELD_OUT] for sample in held_out_samples(group)]
        with files.explained(path):
            path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, "".join(lines), durable=False)

    def write_tokens(self, done: StepDone) -> None:
        """Every completion token as a row of Parquet; what only the learner knows is null where a row was not run."""
        path = self.path / "tokens" / f"step-{done.step:06d}.parquet"
        table = pa.table(token_columns(done, self.tokenizer))
        partial = path.with_name(files.PARTIAL + path.name)
        with files.explained(path):
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table, partial)
        files.move(partial, path, durable=False)

    # --- the end

    def write_model(self, export: Callable[[Path], dict[str, float]]) -> dict[str, float]:
        """Have the trained model written to model/, which is what it was until all of it is on the disk."""
        return write_model(self.model, export)


def write_model(final: Path, export: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """Have `export` write a model directory, and put it in place when it is complete; returns what `export` does.

    Raises:
        DiskError: it cannot be written; what was in place stays.
    """
    partial = final.with_name(files.PARTIAL + final.name)
    files.remove(partial)
    with files.explained(final):
        files.make_directory(final.parent)
    try:
        found = export(partial)
        files.sync_tree(partial)
    except (RunError, UserError):
        files.remove(partial)
        raise
    except Exception as error:  # transformers, tokenizers and safetensors write, and say of a full disk whatever they like
        files.remove(partial)
        raise DiskError(f"{final}: cannot be written: {str(error).splitlines()[0] if str(error) else error!r}") from error
    files.put_directory(partial, final)
    return found


def token_columns(done: StepDone, tokenizer: Any) -> dict[str, Any]:
    """Columns of equal length: one entry for each completion token of a step with a TrainingBatch, row after row.

    `ratio`, `low` and `high` are of tokens, even where the algorithm's own ratio is the sequence's.
    """
    groups, batch = done.groups, done.batch
    assert isinstance(batch, TrainingBatch)
    inside_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    rows_N, positions_N = inside_BT.nonzero(as_tuple=True)
    known: dict[str, Tensor] = {
        name: torch.full(inside_BT.shape, math.nan) for name in ("logprob", "low", "high", "clipped", "entropy")
    }
    for record in done.tokens:
        for name, known_BT in known.items():
            part = record[name]
            known_BT[record["rows_B"], : part.shape[1]] = part.float()
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores]
    problems = [group.problem for group in groups for _ in group.completions]
    old_BT = batch.old_logprobs_BT
    measured_BT = torch.where(batch.mask_BT, 1.0, math.nan)  # a masked token has no ratio, one of a tool no probability
    sampled_BT = torch.where(pad_rows([completion.mask for completion in completions]), 1.0, math.nan)
    texts = {token: tokenizer.decode([token]) for token in set(batch.tokens_BT[inside_BT].tolist())}
    rows = pa.array(rows_N.numpy(), pa.int32())
    turns = [place for completion in completions for place in _turns_of_tokens(completion)]

    def of_rows(values: Sequence[Any], kind: pa.DataType | None = None) -> Any:
        """Values of completions for each of their tokens; of texts each is stored once."""
        column = pa.array(values, kind)
        return (column.dictionary_encode() if column.type == pa.string() else column).take(rows)

    def floats(values_BT: Tensor) -> Any:
        return pa.array(values_BT[inside_BT].float().numpy(), from_pandas=True)  # NaN as null

    return {
        "step": pa.array([done.step] * len(rows), pa.int32()),
        "group": pa.array(batch.group_ids_B[rows_N].numpy(), pa.int32()),
        "row": rows,
        "position": pa.array(positions_N.numpy(), pa.int32()),
        "prompt": of_rows([problem.text for problem in problems], pa.string()),
        "answer": of_rows([problem.answer.encode(errors="replace").decode() for problem in problems], pa.string()),
        "token": pa.array(batch.tokens_BT[inside_BT].numpy(), pa.int32()),
        "text": pa.array([texts[token] for token in batch.tokens_BT[inside_BT].tolist()]).dictionary_encode(),
        "reward": of_rows([score.reward if score.failure is None else None for score in scores], pa.float32()),
        "reward_parts": of_rows([json_line(part) if part else None for part in done.parts or [{}] * len(scores)], pa.string()),
        "correct": of_rows([score.correct for score in scores], pa.bool_()),
        "stop": of_rows([completion.stop for completion in completions], pa.string()),
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
