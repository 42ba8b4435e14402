"""How a recipe's pieces could share so many GPUs: every split that fits, simulated."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.cluster.planning.memory import (
    CONTEXT,
    Memory,
    generation,
    learner_memory,
    row_bytes,
    sampler_memory,
)
from groupwise.cluster.planning.rates import Rates
from groupwise.cluster.planning.simulation import Lengths, Outcome, Setup, Simulation
from groupwise.config import Recipe
from groupwise.config.loading import merge_trees
from groupwise.errors import UserError
from groupwise.memory import size
from groupwise.rollouts.admission import Admission

USABLE = 0.92
"""Of a GPU's memory, after `CONTEXT`: the rest is for what allocators lose and for peaks that are not planned."""
STALENESS = (0, 1, 2, 4)
STEPS = 10
"""Training steps that are simulated."""
SPLITS = 5
"""Numbers of learners that are simulated, around the one at which both sides would take equally long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run the recipe."""

    samplers: int
    """0: one process samples and learns in turn."""
    learners: int
    staleness: int
    window: int
    partial: bool
    rows: int
    """Completions that a sampler generates at once."""
    sampler: Memory
    """Of each of its GPUs."""
    learner: Memory
    outcome: Outcome
    largest_age: int
    """The most steps that `cluster.staleness` and `cluster.window` allow a group to be behind."""

    def settings(self) -> dict[str, object]:
        """The recipe's keys that make it so."""
        keys: dict[str, object] = {"cluster.samplers": self.samplers, "cluster.learners": self.learners}
        return keys | {"cluster.staleness": self.staleness, "cluster.window": self.window, "cluster.partial": self.partial}


def search(rates: Rates, gpus: int, lengths: Lengths, *, staleness: Sequence[int] = STALENESS) -> list[Option]:
    """The best split for each staleness, first the synchronous one. On one GPU: one process.

    Raises:
        UserError: the learner or a sampler does not fit, whatever the split.
    """
    if gpus == 1:
        return [one_process(rates, lengths)]
    splits = fitting_splits(rates, gpus)
    tried = [(simulate(rates, *split, staleness=1, lengths=lengths, steps=4), split) for split in splits]
    tried.sort(key=lambda pair: pair[0].outcome.seconds)
    best = [split for _, split in tried[:2]]
    found = []
    for bound in staleness:
        options = [simulate(rates, *split, staleness=bound, lengths=lengths) for split in (splits if bound == 0 else best)]
        found.append(min(options, key=lambda option: option.outcome.seconds))
    return found


def budget(rates: Rates) -> float:
    """Bytes of a GPU that tensors may take."""
    return USABLE * (rates.gpu.memory - CONTEXT)


def fitting_splits(rates: Rates, gpus: int) -> list[tuple[int, int]]:
    """(samplers, learners), at most `SPLITS` of them.

    Raises:
        UserError: none fits.
    """
    largest = (gpus - rates.shards, rates.shards)
    if largest[0] < 1:
        raise UserError(
            f"--gpus {gpus}: a sampler of cluster.gpus_per_sampler = {rates.shards} and a learner need {rates.shards + 1}"
        )
    check_sampler(rates)
    fits = [n for n in range(1, gpus - rates.shards + 1) if learner(rates, n).peak <= budget(rates)]
    if not fits:
        raise UserError(too_large(rates, gpus))
    every = [((gpus - n) // rates.shards, n) for n in fits]
    rows = affordable_rows(rates)

    def imbalance(split: tuple[int, int]) -> float:
        samplers, learners = split
        total = rates.load.prompts * rates.load.group
        at_once = max(1, min(rows, math.ceil(total / samplers)))
        rollouts = total * rates.load.tokens / (samplers * at_once) * rates.step_seconds(at_once)
        learning = rates.learn_seconds(round(total * rates.load.tokens), learners)
        return max(rollouts, learning)

    return sorted(every, key=imbalance)[:SPLITS]


def learner(rates: Rates, ranks: int) -> Memory:
    return learner_memory(rates.shape, rates.recipe, rates.needs, rates.load, ranks=ranks)


def affordable_rows(rates: Rates) -> int:
    """Completions that a sampler's memory suffices for, at most `rollouts.max_rows`."""
    vllm = rates.engine == "vllm"
    each = row_bytes(rates.shape, rates.recipe, rates.load, vllm=vllm) / rates.shards
    empty = sampler_memory(
        rates.shape, rates.recipe, rates.load, rows=rates.load.group, prompts=1, vllm=vllm, shards=rates.shards
    )
    rows = rates.load.group + (budget(rates) - empty.peak) / max(1.0, 1.1 * each)
    return max(0, min(rates.recipe.rollouts.max_rows, int(rows)))


def check_sampler(rates: Rates) -> None:
    """
    Raises:
        UserError: a sampler cannot generate a single group.
    """
    if affordable_rows(rates) >= rates.load.group:
        return
    memory = sampler_of(rates, rates.load.group)
    raise UserError(
        f"a sampler takes {size(memory.peak)} for one group, and a GPU has {size(budget(rates))} to use ({described(memory)}). "
        "A smaller rollouts.group_size or rollouts.max_tokens takes less, and so does rollouts.dtype = 'bfloat16'; "
        "vLLM splits a model over cluster.gpus_per_sampler GPUs"
    )


def sampler_of(rates: Rates, rows: int) -> Memory:
    prompts = math.ceil(rows / rates.load.group)
    vllm = rates.engine == "vllm"
    return sampler_memory(rates.shape, rates.recipe, rates.load, rows=rows, prompts=prompts, vllm=vllm, shards=rates.shards)


def described(memory: Memory) -> str:
    """The largest parts."""
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size(count)}" for name, count in parts)


def too_large(rates: Rates, gpus: int) -> str:
    """Why no learner fits, and what would."""
    ranks = max(1, gpus - rates.shards)
    memory = learner(rates, ranks)
    text = (
        f"the learner takes {size(memory.peak)} on each of {ranks} GPUs, which have {size(budget(rates))} to use "
        f"({described(memory)})"
    )
    enough = next((n for n in (2**i for i in range(1, 13)) if n > ranks and learner(rates, n).peak <= budget(rates)), None)
    return f"{text}. What would fit: {'; '.join(remedies(rates, ranks, enough)) or 'nothing that is known here'}"


def remedies(rates: Rates, ranks: int, enough: int | None) -> list[str]:
    """Settings with which the learner fits on so many GPUs, as few as possible; `enough`: GPUs that suffice."""
    fewer = max(1, rates.recipe.learner.micro_batch_tokens // 4)
    changes: dict[str, dict[str, Any]] = {
        "learner.checkpointing = true": {"learner": {"checkpointing": True}},
        f"learner.micro_batch_tokens = {fewer}": {"learner": {"micro_batch_tokens": fewer}},
        "model.dtype = 'bfloat16'": {"model": {"dtype": "bfloat16"}},
        "[model.lora] rank = 16": {"model": {"lora": {"rank": 16}}},
    }

    def fits(*trees: dict[str, Any]) -> bool:
        tree = functools.reduce(merge_trees, trees, rates.recipe.model_dump(by_alias=True))
        recipe = Recipe.model_validate(tree)
        return learner_memory(rates.shape, recipe, rates.needs, rates.load, ranks=ranks).peak <= budget(rates)

    found: list[str] = []
    for count in range(1, len(changes) + 1):
        chosen = itertools.combinations(changes, count)
        found = found or [" with ".join(names) for names in chosen if fits(*(changes[name] for name in names))]
    return found + ([f"{enough} GPUs for the learner"] if enough else [])


def simulate(rates: Rates, samplers: int, learners: int, *, staleness: int, lengths: Lengths, steps: int = STEPS) -> Option:
    """One split, with partial rollouts and a window of a batch where it is asynchronous."""
    rows, window = affordable_rows(rates), rates.load.prompts if staleness else 1
    under_way = (staleness + 1) * rates.load.prompts * rates.load.group
    rows = max(rates.load.group, min(rows, math.ceil(under_way / samplers)))
    setup = Setup(
        samplers=samplers,
        rows=rows,
        prompts=rates.load.prompts,
        group=rates.load.group,
        staleness=staleness,
        window=window,
        step_seconds=rates.step_seconds,
        prefill_seconds=rates.prefill_seconds(rates.load.prompt_tokens),
        learn_seconds=lambda tokens: rates.learn_seconds(tokens, learners),
        publish_seconds=rates.publish_seconds(),
        load_seconds=rates.load_seconds,
    )
    return Option(
        samplers=samplers,
        learners=learners,
        staleness=staleness,
        window=window,
        partial=True,
        rows=rows,
        sampler=sampler_of(rates, rows),
        learner=learner(rates, learners),
        largest_age=Admission(rates.load.prompts, staleness, window).largest_age,
        outcome=Simulation(setup, lengths).run(steps + staleness + 1 if staleness else steps),
    )


def one_process(rates: Rates, lengths: Lengths) -> Option:
    """Sampling and learning in turn, on one copy of the weights.

    Raises:
        UserError: it does not fit.
    """
    memory, load = learner(rates, 1), rates.load
    held = sum(memory.held.values())
    each = row_bytes(rates.shape, rates.recipe, load)
    rows = int(
        min(rates.recipe.rollouts.max_rows, load.prompts * load.group, (budget(rates) - memory.slack * held) / (1.1 * each))
    )
    if memory.peak > budget(rates) or rows < load.group:
        raise UserError(too_large(rates, 1))
    prompts = math.ceil(rows / load.group)
    phases = {**memory.phases, "generation": generation(rates.shape, rates.recipe, load, rows=rows, prompts=prompts, gpu=True)}
    setup = Setup(
        samplers=1,
        rows=rows,
        prompts=load.prompts,
        group=load.group,
        step_seconds=rates.step_seconds,
        prefill_seconds=rates.prefill_seconds(load.prompt_tokens),
        learn_seconds=lambda tokens: rates.learn_seconds(tokens, 1),
    )
    whole = Memory(held=memory.held, phases=phases)
    outcome = Simulation(setup, lengths).run(STEPS)
    return Option(
        samplers=0,
        learners=0,
        staleness=0,
        window=1,
        partial=True,
        rows=rows,
        sampler=whole,
        learner=whole,
        largest_age=0,
        outcome=outcome,
    )
