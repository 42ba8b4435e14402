"""A plan: the recipe's load, the options and what was assumed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from groupwise.cluster.planning.lengths import as_found, lengths_of, lognormal
from groupwise.cluster.planning.memory import Load, Needs
from groupwise.cluster.planning.rates import Rates, find_gpu
from groupwise.cluster.planning.search import Option, budget, search
from groupwise.cluster.planning.shape import shape_of
from groupwise.cluster.planning.simulation import Lengths, Setup, Simulation
from groupwise.config import Recipe, Source
from groupwise.errors import UserError
from groupwise.evidence.runs import Run, finite, open_run
from groupwise.models import load_config
from groupwise.training.algorithm import build_algorithm, check_together
from groupwise.training.processes import check_processes
from groupwise.training.prompts import build_prompts, prompt_of

LOOKED_AT = 64
"""Problems whose prompts' lengths are measured."""
MEAN_SHARE = 0.4
"""Of `rollouts.max_tokens`: the mean length of completions, where nothing is known of it."""
AS_FAST = 1.05
"""Options within this of the fastest are as fast: the difference is not worth more staleness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    gpu: str
    usable: float
    """Bytes of a GPU that tensors may take."""
    parameters: int
    options: list[Option]
    notes: list[str]
    """What was assumed."""

    @property
    def best(self) -> Option:
        """The least stale of those that are as fast as the fastest."""
        fastest = min(option.outcome.seconds for option in self.options)
        return next(option for option in self.options if option.outcome.seconds <= AS_FAST * fastest)


def plan(
    recipe: Recipe,
    source: Source,
    *,
    gpus: int,
    gpu: str,
    run: Path | None = None,
    mean: float | None = None,
    variation: float = 1.0,
    prompt_tokens: int | None = None,
) -> Plan:
    """
    Args:
        run: a directory whose lengths and times are taken.
        mean: of completions' lengths in tokens, if there is no run.
        variation: their standard deviation over it.
        prompt_tokens: of every prompt; None: as in the task.

    Raises:
        UserError: naming what is wrong, or what does not fit.
    """
    kind = find_gpu(gpu)
    algorithm = build_algorithm(recipe.algorithm, source)
    check_together(recipe, algorithm, source)
    try:
        config = load_config(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        shape = shape_of(config, trust_remote_code=recipe.model.trust_remote_code)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    rollouts = recipe.rollouts
    prompts = prompt_lengths(recipe, source) if prompt_tokens is None else [prompt_tokens]
    if shape.positions and max(prompts) + rollouts.max_tokens > shape.positions:
        raise source.error(
            "rollouts.max_tokens",
            f"a prompt of {max(prompts)} tokens and {rollouts.max_tokens} more exceed the model's {shape.positions} positions",
        )
    measured = None if run is None else open_run(run)
    lengths, note = choose_lengths(measured, rollouts.max_tokens, mean, variation)
    load = Load(
        prompts=rollouts.prompts_per_step,
        group=rollouts.group_size,
        prompt_tokens=float(np.mean(prompts)),
        longest_prompt=max(prompts),
        tokens=float(np.mean(lengths(np.random.default_rng(0), 4096))),
        max_tokens=rollouts.max_tokens,
    )
    needs = Needs(reference=algorithm.needs_reference, critic="critic" in algorithm.needs)
    rates = Rates(shape=shape, recipe=recipe, needs=needs, load=load, gpu=kind)
    if measured is not None:
        rates = calibrated(rates, measured, lengths)
    options, refused = allowed(search(rates, gpus, lengths), recipe, source)
    return Plan(
        gpu=gpu.lower(),
        usable=budget(rates),
        parameters=shape.parameters,
        options=options,
        notes=[note, *rates.assumptions(), *refused],
    )


def allowed(options: list[Option], recipe: Recipe, source: Source) -> tuple[list[Option], list[str]]:
    """The options that the recipe can be run by, and why it cannot by others.

    Raises:
        UserError: by none.
    """
    kept, refused = list[Option](), list[UserError]()
    for option in options:
        try:
            check_option(option, recipe, source)
            kept.append(option)
        except UserError as error:
            refused.append(error)
    if not kept:
        raise refused[0]
    return kept, list(dict.fromkeys(f"other bounds on the staleness are left out: {error}" for error in refused))


def check_option(option: Option, recipe: Recipe, source: Source) -> None:
    """
    Raises:
        UserError: the recipe cannot be run so.
    """
    if not option.samplers:
        return
    keys = {key.removeprefix("cluster."): value for key, value in option.settings().items()}
    merged = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=keys)})
    check_together(merged, build_algorithm(merged.algorithm, source), source)
    check_processes(merged, source)


def prompt_lengths(recipe: Recipe, source: Source) -> list[int]:
    """Of the first problems, in tokens."""
    task, chat, episodes = build_prompts(recipe, source)
    return [len(prompt_of(task.problem(position, recipe.seed), chat, episodes)) for position in range(LOOKED_AT)]


def choose_lengths(run: Run | None, most: int, mean: float | None, variation: float) -> tuple[Lengths, str]:
    """How long completions are, and a sentence about it."""
    if run is not None and mean is None:
        if (found := lengths_of(run)) is not None:
            return as_found(found), f"lengths as in {run.path}: {len(found):,} completions, mean {found.mean():.0f}"
        mean = float(np.mean(finite(run.values("length/mean")) or [MEAN_SHARE * most]))
    mean = MEAN_SHARE * most if mean is None else mean
    text = f"completion lengths are lognormal with mean {mean:,.0f} and standard deviation {mean * variation:,.0f} tokens"
    return lognormal(mean, variation, most), f"{text}, cut off at {most:,}"


def calibrated(rates: Rates, run: Run, lengths: Lengths) -> Rates:
    """With the times of a run, which must be on such GPUs: one sampler or as many as it had, in synchronous steps.

    Raises:
        UserError: it has recorded none, or they are not those of this model in synchronous steps.
    """
    if run.recipe.get("cluster", {}).get("staleness", 0):
        raise UserError(
            f"--rates: {run.path} is asynchronous (cluster.staleness): what a step waits for says nothing of its rates"
        )
    if (other := run.recipe.get("model", {}).get("path", Recipe().model.path)) != rates.recipe.model.path:
        raise UserError(f"--rates: {run.path} has trained another model, {other}; the recipe's is {rates.recipe.model.path}")
    learning, generating = (finite(run.values(f"seconds/{name}")) for name in ("learner", "rollouts"))
    completions, means = finite(run.values("rollouts/completions")), finite(run.values("length/mean"))
    if not (learning and generating and completions and means):
        raise UserError(f"--rates: {run.path} has recorded no training step")
    cluster = run.recipe.get("cluster", {})
    samplers, learners = max(1, cluster.get("samplers", 0)), max(1, cluster.get("learners", 0))
    count, tokens = float(np.median(completions)), float(np.median(completions)) * float(np.median(means))
    group = max(1, round(count / rates.load.prompts))
    setup = Setup(
        samplers=samplers,
        rows=max(1, min(rates.recipe.rollouts.max_rows, round(count / samplers))),
        prompts=rates.load.prompts,
        group=group,
        step_seconds=rates.step_seconds,
        prefill_seconds=rates.prefill_seconds(rates.load.prompt_tokens),
        learn_seconds=lambda _: 0.0,
    )
    expected = Simulation(setup, lengths).run(4).seconds
    return replace(
        rates,
        decoding=float(np.median(generating)) / expected,
        training=tokens / float(np.median(learning)) / learners,
    )
