"""The training loop. It holds no model, no optimiser and no weights: the sampler and the learner own them."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.errors import LearnerLost, RunError, UserError
from groupwise.files import DiskError
from groupwise.learner.base import Learner, TokenRecord
from groupwise.learner.updates import combine
from groupwise.rollouts.base import Sampler
from groupwise.rollouts.native import NativeSampler
from groupwise.seeding import derive
from groupwise.state import encode
from groupwise.training import checkpoints
from groupwise.training.batching import make_batch, minibatches
from groupwise.training.checkpoints import Best, Checkpoint, Store
from groupwise.training.collect import Collected, Collector
from groupwise.training.credit import CreditAssigner, Rewards, reward_parts
from groupwise.training.evaluate import Evaluation, evaluate
from groupwise.training.events import Evaluated, Event, Recorder, StepDone, Warned
from groupwise.training.failures import explain, traceback_of
from groupwise.training.gap import check_gap
from groupwise.training.interrupts import Interrupt, Interrupted
from groupwise.training.ledger import Entry
from groupwise.training.metrics import advantage_metrics, peak_mib, reward_metrics, rollout_metrics, weighted_metrics
from groupwise.training.pieces import InProcess, Pieces
from groupwise.training.records import RunDirectory
from groupwise.training.recovery import Deaths, recover
from groupwise.training.room import Room
from groupwise.training.setup import Ready
from groupwise.training.stream import Stream
from groupwise.training.watch import Watch
from groupwise.types import Batch, Metrics, TrainingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with."""

    before: Evaluation
    """Of a run that was resumed the metrics alone, as it recorded them."""
    after: Evaluation
    seconds: float
    best: Best | None
    """The best evaluation of a step that has a checkpoint."""
    exported: dict[str, float]
    """Of the exported model: `LanguageModel.export`."""


class Trainer:
    """A run: its parts, and the state that a checkpoint carries."""

    def __init__(self, ready: Ready, run: RunDirectory, recorders: Sequence[Recorder] = (), pieces: Pieces | None = None) -> None:
        """
        Args:
            recorders: further recorders of the run's events; its directory always is one.
            pieces: learner and sampler; None: both in this process.
        """
        self.ready, self.recipe, self.algorithm = ready, ready.recipe, ready.algorithm
        self.run_directory = run
        self.recorders: list[Recorder] = [run, *recorders]
        self.step = 0
        self.store = Store(run.checkpoints, self.recipe.training.keep_checkpoints)
        self.saved: int | None = None
        """The step of the newest checkpoint that this process wrote or read."""
        self.interrupt: Interrupt | None = None
        self.room = Room(run.path, self.save, self.record)
        self.watch = Watch(self.recipe)
        self.pieces = pieces or InProcess.of(ready)
        self.learner: Learner = self.pieces.learner
        self.sampler: Sampler = self.pieces.sampler
        kind = Stream if self.recipe.cluster.staleness else Collector
        self.collector: Collector | Stream = kind(ready.rollouts(self.sampler), self.recipe, self.algorithm)
        self.credit = CreditAssigner(self.algorithm, ready.tokenizer, self.recipe.rollouts.max_tokens)
        self.held_out = ready.task.held_out(self.recipe.training.eval_problems)
        self.deaths = Deaths()
        self.beginning = copy.deepcopy(self.state())
        """What a run begins with, and begins again with where it has no checkpoint."""

    def train(self, interrupt: Interrupt | None = None) -> Result:
        """Run the remaining steps, with evaluations and checkpoints, then export the model.

        Args:
            interrupt: hears the signals; None: nobody does.

        Raises:
            Interrupted: a signal came; a checkpoint was written after the step under way.
            UserError, RunError: the run cannot go on. If no weight has changed since the last step, that one is saved.
        """
        self.interrupt, started = interrupt, time.monotonic()
        with closing(self.collector):
            while True:
                try:
                    before, after = self.take_steps(interrupt)
                    with self.explained("export", save=False):
                        exported = self.run_directory.write_model(lambda path: self.learner.export(path, self.ready.tokenizer))
                    seconds = time.monotonic() - started
                    return Result(before=before, after=after, best=self.store.best, seconds=seconds, exported=exported)
                except LearnerLost as lost:
                    with self.explained("starting the learner again", save=False):
                        recover(self, lost)

    def take_steps(self, interrupt: Interrupt | None) -> tuple[Evaluation, Evaluation]:
        """Run the remaining steps. Returns the first evaluation and the last."""
        checked = False
        with self.explained(f"evaluation after step {self.step}", save=False):
            before = after = self.recorded_base() if self.step else self.evaluate()
        with interrupt.in_steps() if interrupt else nullcontext():
            if self.step and self.is_due(self.recipe.training.eval_every):
                after = self.evaluate_or_save()
            while self.heed() and self.step < self.recipe.training.steps:
                self.train_step()
                if not checked:
                    with self.explained(f"the state after step {self.step}", save=False):
                        encode(self.state())  # what cannot be saved is found before hours of work depend on it
                    checked = True
                if self.is_due(self.recipe.training.checkpoint_every) or self.room.owed:
                    self.save_if_possible()
                if self.is_due(self.recipe.training.eval_every):
                    after = self.evaluate_or_save()
        return before, after

    def heed(self) -> bool:
        """Do what signals asked for, between two steps. True: the run goes on.

        Raises:
            Interrupted: it does not.
        """
        if self.interrupt is None:
            return True
        if self.interrupt.save:
            self.interrupt.save = False
            if self.saved == self.step or self.save_if_possible():
                self.warn(f"the checkpoint of step {self.step} is written, as SIGUSR1 asked", kind="note", name="saved_on_signal")
        if self.interrupt.stop is not None:
            if self.saved != self.step:
                with self.explained(f"the checkpoint of step {self.step}", save=False):
                    self.save()
            raise Interrupted(self.interrupt.stop)
        return True

    def train_step(self) -> None:
        """One step, recorded. If it fails before a weight has changed it is taken back, and a checkpoint saved."""
        memory = self.credit.state_dict()
        self.learner.begin_step()
        self.collector.begin_step()

        def take_back() -> bool:
            self.step = began
            if not self.learner.take_back():
                return False
            self.collector.take_back()
            self.credit.load_state_dict(memory)
            return True

        began = self.step
        with self.explained(f"step {began + 1}", take_back):
            self.compute_step(self.collect())

    def compute_step(self, collected: Collected) -> None:
        """Advantages, updates."""
        started = time.perf_counter()
        self.step += 1
        groups = collected.groups
        batch = make_batch(groups, self.algorithm)
        rewards = reward_parts(groups, self.algorithm, self.recipe.rollouts.max_tokens)
        metrics: Metrics = {**rollout_metrics(collected, self.learner.version), **reward_metrics(groups, rewards)}
        tokens: list[TokenRecord] = []
        if batch.mask_BT.any():
            batch, learner_metrics = self.learn(batch, collected, rewards, tokens)
            metrics |= learner_metrics
            self.pieces.bring_weights()
        else:
            self.warn(
                "no completion can be learnt from: all were truncated and filtered, or could not be scored",
                name="nothing_to_learn",
                advice="Raise rollouts.max_tokens, or turn algorithm.overlong_filter off.",
            )
        parts = self.credit.parts(batch, groups, rewards)
        self.collector.publish(self.step)
        seconds = time.perf_counter() - started
        metrics |= {
            **weighted_metrics(parts),
            "seconds/rollouts": collected.seconds,
            "seconds/scoring": collected.scoring_seconds,
            "seconds/learner": seconds,
            "memory/peak_mib": peak_mib(),
            **self.fewer_rows(),
            **self.pieces.metrics(),
            "tokens_per_second": int(batch.lengths_B.sum()) / (collected.seconds + seconds),
        }
        entry = Entry.of(self.step, collected)
        done = StepDone(step=self.step, metrics=metrics, groups=groups, batch=batch, tokens=tokens, parts=parts, entry=entry)
        self.record(done)
        for event in self.watch.look(self.step, metrics):
            self.record(event)

    def learn(
        self, batch: Batch, collected: Collected, rewards: Rewards, tokens: list[TokenRecord]
    ) -> tuple[TrainingBatch, Metrics]:
        """Old and reference log-probabilities, advantages, optimiser updates.

        Appends diagnostics of each token to `tokens` on steps on which they are recorded.
        """
        started = time.perf_counter()
        with_logprobs, metrics = self.learner.compute_logprobs(batch)
        metrics["seconds/logprobs"] = time.perf_counter() - started
        check_gap(self.step, metrics.get("sampler_gap_mean", 0.0), self.recipe)
        training, kl_metrics = self.credit.assign(with_logprobs, collected.groups, rewards, policy_moved=self.learner.version > 0)
        self.remember_dropped(collected)
        settings, seed = self.recipe.learner, derive(self.recipe.seed, "minibatches", self.step)
        parts = minibatches(training, settings.minibatches, seed, self.recipe.rollouts.epochs)
        record = tokens.append if self.tokens_are_due() else None
        updates = [self.learner.update(minibatch, record) for minibatch in parts]
        advantages = advantage_metrics(training.advantages_BT, training.mask_BT, collected.groups)
        return training, {**metrics, **kl_metrics, **combine(updates), **advantages}

    def fewer_rows(self) -> Metrics:
        """How many rows memory suffices for in generation, where that is less than the recipe asks for."""
        rows = getattr(self.sampler, "max_rows", math.inf)
        return {"rollouts/max_rows": float(rows)} if rows < self.recipe.rollouts.max_rows else {}

    def remember_dropped(self, collected: Collected) -> None:
        """Add groups that will never be trained on to the history of their prompts, for algorithms that keep one (DCPO)."""
        never_trained = collected.never_trained
        if "history" in self.algorithm.needs and never_trained:
            rewards = reward_parts(never_trained, self.algorithm, self.recipe.rollouts.max_tokens)
            self.credit.remember(make_batch(never_trained, self.algorithm), never_trained, rewards)

    def collect(self) -> Collected:
        """Groups for the next step.

        Raises:
            RunError: there is none.
        """
        self.ready.begin_step(self.step)
        collected = self.collector.collect(self.step)
        if not collected.groups:
            raise RunError(
                f"step {self.step + 1}: dynamic sampling found {collected.describe()}. "
                "Easier or harder problems, or a larger group_size, would give it something to learn from."
            )
        for name, text, advice in collected.remarks():
            self.warn(text, self.step + 1, name=name, advice=advice)
        return collected

    # --- when

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last."""
        return self.step % every == 0 or self.step == self.recipe.training.steps

    def tokens_are_due(self) -> bool:
        every = self.recipe.training.tokens_every
        return every > 0 and (self.is_due(every) or self.step == 1)

    # --- evaluation

    def evaluate_or_save(self) -> Evaluation:
        """The same between steps, where a failure leaves a checkpoint, and the best one is kept."""
        with self.explained(f"the evaluation after step {self.step}"):
            evaluation = self.evaluate()
        self.keep_best(evaluation)
        return evaluation

    def evaluate(self) -> Evaluation:
        """Held-out results of the weights as they are, recorded."""
        self.ready.begin_step(self.step)
        evaluation = evaluate(self.collector.rollouts, self.held_out, seed=derive(self.recipe.seed, "evaluation"))
        self.record(Evaluated(step=self.step, evaluation=evaluation))
        return evaluation

    def recorded_base(self) -> Evaluation:
        """Held-out results of the untrained base model, as a resumed run recorded them when it began. Empty if it has no such
        record, or one of another number of problems."""
        record = next((record for record in self.run_directory.metrics.evaluations if record["step"] == 0), {})
        tried = record.get("eval_problems", 0.0) + record.get("eval_unscored", 0.0)
        known = tried == len(self.held_out)
        numbers = {name: value for name, value in record.items() if name.startswith("eval/") and isinstance(value, float)}
        return Evaluation(metrics=numbers if known else {}, groups=(), values={})

    # --- records and state

    def record(self, event: Event) -> None:
        for text in self.pieces.notes():
            self._tell(Warned(step=self.step, text=text, kind="note", name="process"))
        self._tell(event)

    def _tell(self, event: Event) -> None:
        for recorder in self.recorders:
            recorder.record(event)

    def warn(self, text: str, step: int | None = None, **fields: Any) -> None:
        """`fields`: of `Warned`."""
        self.record(Warned(step=self.step if step is None else step, text=text, **fields))

    # --- failures

    @contextmanager
    def explained(self, what: str, take_back: Callable[[], bool] = lambda: True, *, save: bool = True) -> Iterator[None]:
        """Within: whatever is raised becomes the one message that the run ends with, and is recorded.

        Args:
            what: is being done.
            take_back: makes the run as it was when this began; False: it cannot, and the last checkpoint is what is left.
            save: whether a checkpoint is worth it.
        """
        try:
            yield
        except LearnerLost:  # from which the run recovers
            raise
        except BaseException as error:  # sys.exit() in a part of the user's does not end a run as if all were well
            if isinstance(error, KeyboardInterrupt) and (self.interrupt is None or self.interrupt.raised):
                raise
            known = explain(error, what)
            if take_back() and save and self.saved != self.step:
                with suppress(Exception):  # what failed first is what has to be said
                    self.save()
            ours = known is error and error.__cause__ is None  # says all that there is to know
            self.warn(str(known), kind="fault", name="failed", traceback="" if ours else traceback_of(error))
            if known is error:
                raise
            raise known from error

    def save_if_possible(self) -> bool:
        """Write a checkpoint, or leave it to the next step where the disk is full. Returns whether it is written."""
        with self.explained(f"the checkpoint of step {self.step}", save=False):
            return self.room.write(self.step, last=self.step == self.recipe.training.steps)

    def save(self) -> Path:
        """Write a checkpoint of the run as it is after `step`."""
        state = self.state()
        metrics = self.run_directory.metrics
        metrics.sync()  # a checkpoint must not outlive the records of its steps
        self.run_directory.ledger.sync()
        directory, recipe = self.run_directory.checkpoints, self.run_directory.recipe
        path = checkpoints.save(directory, self.step, self.learner, state, recipe=recipe, metrics=metrics.digest)
        self.saved = self.step
        with self.tidying():
            self.store.prune(self.step)
        return path

    @contextmanager
    def tidying(self) -> Iterator[None]:
        """Within: what the disk refuses costs no checkpoint, and is a warning."""
        try:
            yield
        except DiskError as error:
            text = f"the checkpoint of step {self.step} is written, but older ones cannot be tidied up: {error}"
            self.warn(text, name="disk_low", advice=f"See whether {self.run_directory.checkpoints} can be written.")

    def state(self) -> dict[str, Any]:
        """The loop's own, which `resume` takes up."""
        found = {"step": self.step, "collector": self.collector.state_dict(), "credit": self.credit.state_dict()}
        return {**found, "rows": self.sampler.rows()} if isinstance(self.sampler, NativeSampler) else found

    def keep_best(self, evaluation: Evaluation) -> None:
        """If it is the best so far, see to it that there is a checkpoint of this step, which then stays."""
        best = self.store.is_better(self.step, evaluation.metrics)
        if best is None:
            return
        if self.step in checkpoints.listed(self.run_directory.checkpoints) or self.save_if_possible():
            with self.tidying():
                self.store.set_best(best)
                self.store.prune(self.step)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Load what a checkpoint holds. Without one be as the run began, which the learner is already. Nothing is written.

        Raises:
            UserError: it is of another model, or of another version of groupwise.
        """
        state = checkpoints.load(checkpoint, self.learner) if checkpoint else copy.deepcopy(self.beginning)
        try:
            self.step = state["step"]
            self.collector.load_state_dict(state["collector"])
            self.credit.load_state_dict(state["credit"])
            if isinstance(self.sampler, NativeSampler) and "rows" in state:
                self.sampler.load_rows(state["rows"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # entries, or fields of groups, have other names
            text = f"written by another version of groupwise: {type(error).__name__}: {error}"
            raise UserError(f"{checkpoint.path if checkpoint else 'the beginning'}: {text}") from error
        self.pieces.bring_weights()
        self.saved = checkpoint.step if checkpoint else None
        self.watch, self.room = Watch(self.recipe), Room(self.run_directory.path, self.save, self.record)
