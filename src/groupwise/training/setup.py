"""A recipe made ready: everything that can be wrong is found here, before anything is trained."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from groupwise.algorithms import Algorithm
from groupwise.config import Recipe, RolloutsSection, Source
from groupwise.environments.hosting import ENVIRONMENTS
from groupwise.environments.instance import EnvironmentFailed
from groupwise.errors import UserError
from groupwise.learner.local import LocalLearner
from groupwise.models import FULL_TRAINING_RATE, Chat, LanguageModel, load_config
from groupwise.models.loading import is_adapter
from groupwise.plugins import UserFunction, find_file
from groupwise.rollouts.base import LocalSampler, Sampler
from groupwise.rollouts.driver import wait_for
from groupwise.rollouts.episodes import Episodes
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.samplers import find_sampler
from groupwise.seeding import derive
from groupwise.tasks.base import FollowsTraining, TakesEnvironments, Task
from groupwise.training.algorithm import about_staleness, build_algorithm, check_together, try_parts, with_correction
from groupwise.training.collect import sampling_of
from groupwise.training.processes import check_head, check_processes, learns_elsewhere
from groupwise.training.prompts import build_prompts, prompt_of
from groupwise.training.sizes import check_block, check_cache, check_step, check_training
from groupwise.training.supply import describe_failures
from groupwise.training.trackers import Tracker, find_trackers
from groupwise.types import Completion, Problem

Result = TypeVar("Result")

LOOKED_AT = 256
"""How many training problems are looked at before training."""
MOST_TRIED = 1024
"""How many made-up answers are scored before training, of a group that is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a run is made of."""

    recipe: Recipe
    source: Source
    algorithm: Algorithm
    task: Task
    chat: Chat
    model: LanguageModel | None
    """None: other processes learn and sample, and load it."""
    problem: Problem
    """The first of them, for a trial."""
    sampler: Callable[[RolloutsSection, LanguageModel, Any], LocalSampler]
    """Makes the recipe's sampler."""
    trackers: list[Tracker]
    """Make the recipe's further recorders."""
    episodes: Episodes | None
    """Holds the recipe's conversations; None: a completion is one turn."""

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    @property
    def policy(self) -> LanguageModel:
        """The model, of a run that has it in this process."""
        assert self.model is not None
        return self.model

    def rollouts(self, sampler: Sampler) -> Rollouts:
        """What makes the recipe's groups, with this engine."""
        return Rollouts(
            sampler=sampler, task=self.task, chat=self.chat, sampling=sampling_of(self.recipe.rollouts), episodes=self.episodes
        )

    def prompt(self, problem: Problem) -> Tensor:
        """int64 [L]: a problem's prompt as the model reads it, but for what an environment's reset() appends."""
        return prompt_of(problem, self.chat, self.episodes)

    def begin_step(self, step: int) -> None:
        """Tell a task whose scores may depend on it that so many training steps are done."""
        begin_step(self.task, step, self.recipe)

    def check_memory(self) -> None:
        """
        Raises:
            UserError: there is not enough memory to train the model.
        """
        check_training(self.recipe, self.algorithm, self.policy, self.source)

    def make_learner(self) -> LocalLearner:
        """The learner, which owns the model from now on.

        Raises:
            UserError: there is not enough memory to train the model.
        """
        self.check_memory()
        return LocalLearner.build(self.recipe, self.algorithm, self.policy)

    def make_sampler(self, weights: LanguageModel) -> LocalSampler:
        """A sampler of these weights.

        Raises:
            UserError: the user's own cannot be made, or is no sampler.
        """
        return self.sampler(self.recipe.rollouts, weights, self.tokenizer)

    def fallback(self) -> str | None:
        """What keeps the model from its fastest path, and why; None if nothing does, or another process has the model."""
        if self.model is None:
            return None
        rollouts = self.recipe.rollouts
        found = self.model.fallback(*(getattr(torch, name) if name else None for name in (rollouts.dtype, rollouts.cache_dtype)))
        if found is None and (text := self.bfloat16()) and self.model.bfloat16.why_not():
            return text
        return found

    def bfloat16(self) -> str | None:
        """What runs bfloat16 on a CPU; None on a GPU, or if the recipe asks for none."""
        recipe = self.recipe
        asked = "bfloat16" in (recipe.model.dtype, recipe.rollouts.dtype, recipe.learner.precision)
        if not (asked and self.policy.device.type == "cpu"):
            return None
        reason = self.policy.bfloat16.why_not()
        if reason is None:
            return "linear layers run in bfloat16 in C++, with sums in float32"
        return f"bfloat16 runs on PyTorch's matmuls and attention, which may be slower than float32: {reason}"

    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.recipe.model.lora is not None or is_adapter(self.recipe.model.path)

    def hints(self) -> list[str]:
        """What is allowed and most likely not meant, and what was chosen in the recipe's place."""
        rate, stale = self.recipe.learner.learning_rate, about_staleness(self.recipe, self.algorithm)
        found = [] if stale is None else [stale]
        if self.has_adapters() and 0 < rate <= FULL_TRAINING_RATE:
            found.append(
                f"learner.learning_rate = {rate:g} is typical of full training; LoRA adapters usually learn with about ten times "
                f"as much, as {10 * rate:g}"
            )
        return found


def prepare(recipe: Recipe, source: Source, *, everything: bool = False) -> Ready:
    """Check a recipe and load what it names.

    Args:
        everything: also load a model that other processes are to load, which finds what is wrong with it here.

    Raises:
        UserError: naming the file, line and key at fault.
    """
    algorithm = build_algorithm(recipe.algorithm, source)
    algorithm = build_algorithm(with_correction(recipe, algorithm), source)
    check_together(recipe, algorithm, source)
    check_processes(recipe, source)
    loads = everything or not learns_elsewhere(recipe)
    check_step(recipe, algorithm, source)
    check_block(recipe.task, source)
    sampler = find_sampler(recipe.rollouts, source)
    trackers = find_trackers(recipe.trackers, source)
    task, chat, episodes = build_prompts(recipe, source)
    try:
        config = load_config(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    check_head(recipe, config, source)
    problem = task.problem(0, recipe.seed)
    longest = check_lengths(recipe, config, chat, episodes, task, source)
    check_cache(recipe, config, longest, device_of(recipe.model.device, source) if loads else None, source)
    begin_step(task, 0, recipe)
    if episodes is not None:
        tried(episodes.trial(problem), problem)
    if episodes is not None and not episodes.is_rewarded(problem) and getattr(task, "reward", None) == []:
        raise source.error("task.reward", "names no reward, and the environment has no get_reward()")
    check_environments(task, problem, recipe, source)
    if episodes is None or episodes.asks_task(problem):
        try_scoring(task, problem, chat, algorithm, recipe.rollouts.group_size, source, episodes)
    try_parts(algorithm, recipe.rollouts.group_size)
    return Ready(
        recipe=recipe,
        source=source,
        algorithm=algorithm,
        task=task,
        chat=chat,
        model=checked_policy(recipe, source, longest) if loads else None,
        problem=problem,
        sampler=sampler,
        trackers=trackers,
        episodes=episodes,
    )


def begin_step(task: Task, step: int, recipe: Recipe) -> None:
    if isinstance(task, FollowsTraining):
        task.begin_step(step, recipe.training.steps)


def tried(trial: Coroutine[Any, Any, Result], problem: Problem) -> Result:
    """The result of a trial of the environment.

    Raises:
        UserError: the environment fails.
    """
    try:
        return wait_for(trial)
    except EnvironmentFailed as error:
        raise UserError(f"the environment fails: {error} (problem {problem.id!r})") from error


def checked_policy(recipe: Recipe, source: Source, longest: int) -> LanguageModel:
    """The model of a recipe, which can run what the recipe asks of it.

    Args:
        longest: tokens of the longest prompt and of a completion.

    Raises:
        UserError: it cannot be loaded, or not do that.
    """
    model = load_policy(recipe, source)
    try:
        model.decoder.check_length(longest)
    except UserError as error:
        raise source.error("rollouts.max_tokens", str(error)) from error
    cache_dtype = getattr(torch, recipe.rollouts.cache_dtype or str(model.dtype).removeprefix("torch."))
    if cache_dtype != model.dtype and (reason := model.why_not_decoding(cache_dtype)):
        raise source.error("rollouts.cache_dtype", f"the model generates on a cache of its own, in its own dtype: {reason}")
    return model


def load_for_training(recipe: Recipe, source: Source, algorithm: Algorithm, processes: int) -> LanguageModel:
    """The model of a recipe, for a learner over so many processes.

    Raises:
        UserError: it cannot be loaded, or there is not enough memory to train it.
    """
    model = load_policy(recipe, source)
    check_training(recipe, algorithm, model, source, processes)
    return model


def load_policy(recipe: Recipe, source: Source) -> LanguageModel:
    """The model of a recipe, on its device, with its backend.

    Raises:
        UserError: it cannot be loaded, or not run in that way.
    """
    settings, device = recipe.model, device_of(recipe.model.device, source)
    try:
        model = LanguageModel.load(
            settings.path,
            dtype=getattr(torch, settings.dtype),
            device=device,
            backend=settings.backend,
            trust_remote_code=settings.trust_remote_code,
            lora=settings.lora,
            seed=derive(recipe.seed, "adapters"),
        )
    except UserError as error:
        beginnings = (
            ("model.backend", "model.backend = 'kernels': "),
            ("model.lora.targets", "model.lora.targets: "),
            ("model.lora.rank", "model.lora.rank: "),
        )
        for key, beginning in beginnings:
            if str(error).startswith(beginning):
                raise source.error(key, str(error).removeprefix(beginning)) from error
        raise source.error("model.path", str(error)) from error
    if settings.compile:
        model.compile()
    return model


def check_lengths(recipe: Recipe, config: Any, chat: Chat, episodes: Episodes | None, task: Task, source: Source) -> int:
    """Refuse stop tokens outside the vocabulary, a task that holds out no problem, and prompts longer than the model's positions.

    Returns the tokens of the longest prompt that was looked at and of a completion.
    """
    text_config = config.get_text_config()
    for token in recipe.rollouts.stop_tokens:
        if token >= text_config.vocab_size:
            raise source.error("rollouts.stop_tokens", f"{token} is no token: the vocabulary has {text_config.vocab_size}")
    limit = getattr(text_config, "max_position_embeddings", None)
    held_out = task.held_out(recipe.training.eval_problems)
    if not held_out:
        raise source.error("task", "no problem is held out for evaluations: there are too few, or all of them are left out")
    problems = [task.problem(i, recipe.seed) for i in range(LOOKED_AT)] + held_out
    longest = max(problems, key=lambda problem: len(problem.text))
    length = len(prompt_of(longest, chat, episodes))
    if limit is not None and length + recipe.rollouts.max_tokens > limit:
        raise source.error(
            "rollouts.max_tokens",
            f"a prompt of {length} tokens and {recipe.rollouts.max_tokens} more exceed the model's {limit} positions: "
            f"{longest.text[:60]!r}",
        )
    return length + recipe.rollouts.max_tokens


def check_environments(task: Task, problem: Problem, recipe: Recipe, source: Source) -> None:
    """Refuse a reward that needs environments where the recipe has no class of them.

    Raises:
        UserError: naming it.
    """
    if recipe.environment.kind is not None or ENVIRONMENTS in problem.metadata or not isinstance(task, TakesEnvironments):
        return
    for name, needs in task.takes_environments().items():
        if needs:
            raise source.error("task.reward", f"{name} takes {ENVIRONMENTS}, and there is no environment.class to make them")


def try_scoring(
    task: Task,
    problem: Problem,
    chat: Chat,
    algorithm: Algorithm,
    group_size: int,
    source: Source,
    episodes: Episodes | None,
) -> None:
    """Score a group of made-up answers, so that a reward that always fails does so before training. Rewards that take
    environments are given instances that were reset, and nothing more.

    Raises:
        UserError: none of them could be scored, or the algorithm needs what the task's scores do not hold.
    """
    answer, empty = (_made_up(text, chat.tokenizer) for text in (problem.answer or "an answer", ""))
    completions = [answer, *[empty] * (min(group_size, MOST_TRIED) - 1)]
    if episodes is not None and isinstance(task, TakesEnvironments) and task.takes_environments():
        scores = tried(episodes.trial_scores(task, problem, completions), problem)
    else:
        scores = wait_for(task.score(problem, completions))
    scores = [score.checked() for score in scores]
    if all(score.failure is not None for score in scores):
        raise UserError(f"scoring fails: {describe_failures(scores)} (problem {problem.id!r})")
    if "steps" in algorithm.needs and not any(score.steps for score in scores):
        raise source.error("algorithm.advantage", f"process supervision needs rewards of steps; {task.name!r} has none")


def _made_up(text: str, tokenizer: Any) -> Completion:
    tokens = torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
    mask = torch.ones(len(tokens), dtype=torch.bool)
    return Completion(text=text, tokens=tokens, logprobs=torch.zeros(len(tokens)), mask=mask, stop="stop", versions=())


def device_of(name: str, source: Source) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise source.error("model.device", f"{name!r} is not here: {str(error).splitlines()[0]}") from error
    return device


def resolved(ready: Ready) -> dict[str, Any]:
    """The complete recipe for the run directory: every default of every part filled in, files by absolute paths.

    So a default that changes later changes nothing of an old run.
    """
    tree = ready.recipe.model_dump(by_alias=True)
    environment, base = ready.recipe.environment, Path(ready.source.path).parent
    tree["environment"] |= {"class": _references(environment.kind, base), "tools": _references(environment.tools, base)}
    if Path(ready.recipe.model.path).is_dir():
        tree["model"]["path"] = str(Path(ready.recipe.model.path).resolve())
    tree["task"] = ready.task.model_dump()
    tree["trackers"]["names"] = [tracker.name for tracker in ready.trackers]
    settings = {key: _written(value) for key, value in ready.algorithm.settings().items()}
    tree["algorithm"] = {"name": ready.algorithm.name, **settings}
    return tree


def _references(value: Any, base: Path) -> Any:
    """Functions and classes of [environment] as "file.py:name", by absolute paths."""
    if isinstance(value, dict):
        return {key: _references(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_references(item, base) for item in value]
    if isinstance(value, UserFunction):
        return value.reference
    return value and ":".join(map(str, find_file(value, base)))


def _written(value: Any) -> Any:
    """A setting as TOML can hold it and `build_algorithm` reads it."""
    if value is None:
        return "none"
    return list(value) if isinstance(value, tuple) else value
