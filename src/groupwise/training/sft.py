"""The supervised warm start: demonstrations in, a model directory out, its loss and pass rates recorded beside it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.algorithms import token_weights
from groupwise.config import EnvironmentSection, SftModelSection, SftRecipe, Source
from groupwise.environments.find import Environments, find_environments
from groupwise.errors import UserError
from groupwise.learner.micro_batches import Budget
from groupwise.learner.optimiser import Optimiser
from groupwise.models import Chat, LanguageModel, character_tokenizer, load_tokenizer, new_module
from groupwise.rollouts.base import Sampling
from groupwise.rollouts.episodes import make_episodes
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.native import NativeSampler
from groupwise.seeding import derive
from groupwise.tasks.base import Task, build_task, limit_prompts
from groupwise.training.demonstrations import demonstration_batch, demonstration_text
from groupwise.training.evaluate import evaluate
from groupwise.training.records import write_model
from groupwise.training.setup import LOOKED_AT, device_of
from groupwise.training.sizes import check_demonstrations
from groupwise.types import Batch, Demonstration

TAKE_LESS = "shorter demonstrations or a smaller model"
"""What needs less memory than one demonstration that does not fit."""


def sft(recipe: SftRecipe, source: Source, out: Path, report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train on demonstrations and save the model with what it can do.

    Args:
        recipe, source: what to do, and where it was written.
        out: the model directory to make.
        report: called with (step, loss) after each step.

    Returns:
        What is written to `out`/sft.json: the loss and the held-out pass rates.

    Raises:
        UserError: naming the file, line and key at fault.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already there and not empty")
    sources = Sources.of(recipe, source)
    tokenizer, model = start(recipe, sources, source)
    chat = Chat.build(tokenizer, recipe.model.chat)
    settings = recipe.sft
    optimiser = Optimiser(
        model.parameters(),
        learning_rate=settings.learning_rate,
        updates=settings.steps,
        warmup_steps=settings.warmup_steps,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    budget, loss = Budget(settings.micro_batch_tokens, TAKE_LESS), float("nan")
    for step in range(settings.steps):
        first = step * settings.batch_size
        shown, tools = sources.demonstrations(range(first, first + settings.batch_size), recipe.seed)
        batch = demonstration_batch(chat, shown, tools)
        loss = train_step(model, optimiser, batch, budget)
        report(step + 1, loss)
    halved = {"micro_batch_tokens": budget.tokens} if budget.tokens < budget.asked else {}
    record = {"steps": settings.steps, "loss": loss, **halved, **sources.pass_rates(model, chat, recipe)}

    def export(path: Path) -> dict[str, float]:
        found = model.export(path, tokenizer)
        (path / "sft.json").write_text(json.dumps(record, indent=2) + "\n")
        return found

    write_model(out, export)
    return record


@dataclass(frozen=True, slots=True)
class Sources:
    """The tasks that demonstrations come from, in turn, and the environments of each."""

    tasks: list[Task]
    environments: list[Environments | None]

    @classmethod
    def of(cls, recipe: SftRecipe, source: Source) -> "Sources":
        """Raises:
        UserError: a task cannot be made.
        """
        tasks = [build_task(settings, source) for settings in (recipe.task, *recipe.more_tasks)]
        return cls(tasks, [find_environments(EnvironmentSection(), task, source) for task in tasks])

    def demonstrations(self, positions: range, seed: int) -> tuple[list[Demonstration], list[Sequence[Any]]]:
        """The supervised examples at positions of an endless stream, and the tools' schemas in each one's prompt."""
        shown, tools = list[Demonstration](), list[Sequence[Any]]()
        for position in positions:
            place, which = divmod(position, len(self.tasks))
            environments = self.environments[which]
            shown.append(self.tasks[which].demonstration(place, seed))
            tools.append(environments.kinds[None].schemas if environments else ())
        return shown, tools

    def pass_rates(self, model: LanguageModel, chat: Chat, recipe: SftRecipe) -> dict[str, float]:
        """What the model can do on the held-out problems of each task; of several, by the task's name."""
        rates: dict[str, float] = {}
        for task, environments in zip(self.tasks, self.environments, strict=True):
            rollouts = Rollouts(
                sampler=NativeSampler(model, chat.tokenizer),
                task=task,
                chat=chat,
                sampling=Sampling(max_tokens=recipe.sft.max_tokens),
                episodes=make_episodes(environments, EnvironmentSection(), chat),
            )
            problems = task.held_out(recipe.sft.eval_problems)
            found = evaluate(rollouts, problems, seed=derive(recipe.seed, "evaluation")).metrics
            prefix = f"{task.name}/" if len(self.tasks) > 1 else ""
            rates |= {prefix + name: value for name, value in found.items()}
        return rates


def start(recipe: SftRecipe, sources: Sources, source: Source) -> tuple[Any, LanguageModel]:
    """The tokenizer and the model to begin with: loaded, or new.

    Raises:
        UserError: neither can be had, or the vocabulary lacks a character of the task.
    """
    check_demonstrations(recipe, source)
    settings = recipe.model
    if bool(settings.path) == bool(settings.new):
        raise source.error("model", "set path for a model to start from, or new for a new one, and not both")
    if settings.new and (not settings.characters or "model_type" not in settings.new):
        raise source.error("model.new", "a new model needs new.model_type, and characters for its vocabulary")
    device, trust = device_of(settings.device, source), settings.trust_remote_code
    try:
        tokenizer = load_tokenizer(settings.path, trust_remote_code=trust) if settings.path else new_tokenizer(settings)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    if settings.chat and not tokenizer.chat_template:
        raise source.error("model.chat", "the tokenizer has no chat template")
    chat = Chat.build(tokenizer, settings.chat)
    for task in sources.tasks:
        limit_prompts(task, chat, source)
    if settings.new:
        check_vocabulary(recipe, sources, chat, source)
    try:
        if settings.path:
            model = LanguageModel.load(settings.path, device=device, trust_remote_code=trust)
        else:
            model = LanguageModel(new_module(settings.new, tokenizer, recipe.seed).to(device))
            model.check_logits()
    except UserError as error:
        raise source.error("model.path" if settings.path else "model.new", str(error)) from error
    return tokenizer, model


def new_tokenizer(settings: SftModelSection) -> Any:
    return character_tokenizer(
        settings.characters, settings.words, special=settings.special_tokens, chat_template=settings.chat_template
    )


def check_vocabulary(recipe: SftRecipe, sources: Sources, chat: Chat, source: Source) -> None:
    """
    Raises:
        UserError: a new model's vocabulary lacks a character of the tasks.
    """
    shown, tools = sources.demonstrations(range(LOOKED_AT), recipe.seed)
    text = demonstration_text(chat, shown, tools)
    unknown = chat.tokenizer.pad_token_id in chat.tokenizer(text, add_special_tokens=False).input_ids
    if unknown and (missing := sorted(set(text) - set(recipe.model.characters))):
        raise source.error("model.characters", f"the task also uses {''.join(missing)!r}")


def train_step(model: LanguageModel, optimiser: Optimiser, batch: Batch, budget: Budget) -> float:
    """One update on the mean negative log-probability of the tokens that count; returns it.

    Raises:
        RunError: memory does not suffice, however small the micro-batches.
    """
    weights_BT = token_weights(batch.mask_BT, "token_mean")

    def gradient() -> float:
        total = 0.0
        for rows, _ in budget.cut(batch, padded=True):
            part = batch.select(rows).to(model.device)
            logprobs_BT, _ = model.completion_logprobs(part, share_prompts=False)
            part_BT = weights_BT[rows, : logprobs_BT.shape[1]].to(logprobs_BT)
            loss = -(part_BT * logprobs_BT).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    total = budget.fit(gradient, optimiser.clear)
    optimiser.step(total)
    return total
