"""The supervised warm start: demonstrations in, a model directory out, its loss and pass rates recorded beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groupwise.algorithms import token_weights
from groupwise.config import SftRecipe, Source
from groupwise.errors import UserError
from groupwise.learner.micro_batches import cut_rows
from groupwise.learner.optimiser import Optimiser
from groupwise.models import Chat, LanguageModel, character_tokenizer, encode_prompt, load_tokenizer, new_module
from groupwise.rollouts.base import Sampling
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.native import NativeSampler
from groupwise.seeding import derive
from groupwise.tasks.base import Task, build_task, limit_prompts
from groupwise.training.evaluate import evaluate
from groupwise.training.setup import LOOKED_AT, device_of
from groupwise.types import Batch, Demonstration, pad_rows


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
    task = build_task(recipe.task, source)
    tokenizer, model = start(recipe, task, source)
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
    loss = float("nan")
    for step in range(settings.steps):
        first = step * settings.batch_size
        shown = [task.demonstration(first + i, recipe.seed) for i in range(settings.batch_size)]
        batch = demonstration_batch(tokenizer, shown, recipe.model.chat)
        loss = train_step(model, optimiser, batch, settings.micro_batch_tokens)
        report(step + 1, loss)
    record = {"steps": settings.steps, "loss": loss, **pass_rates(model, tokenizer, task, recipe)}
    model.export(out, tokenizer)
    (out / "sft.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def start(recipe: SftRecipe, task: Task, source: Source) -> tuple[Any, LanguageModel]:
    """The tokenizer and the model to begin with: loaded, or new.

    Raises:
        UserError: neither can be had, or the vocabulary lacks a character of the task.
    """
    settings = recipe.model
    if bool(settings.path) == bool(settings.new):
        raise source.error("model", "set path for a model to start from, or new for a new one, and not both")
    if settings.new and (not settings.characters or "model_type" not in settings.new):
        raise source.error("model.new", "a new model needs new.model_type, and characters for its vocabulary")
    shown = [task.demonstration(i, recipe.seed) for i in range(LOOKED_AT)]
    text = "".join(item.text + item.completion for item in shown)
    if settings.new and (missing := sorted(set(text) - set(settings.characters))):
        raise source.error("model.characters", f"the task also uses {''.join(missing)!r}")
    device = device_of(settings.device, source)
    try:
        if settings.path:
            trust = settings.trust_remote_code
            tokenizer = load_tokenizer(settings.path, trust_remote_code=trust)
            model = LanguageModel.load(settings.path, device=device, trust_remote_code=trust)
        else:
            tokenizer = character_tokenizer(settings.characters)
            model = LanguageModel(new_module(settings.new, tokenizer, recipe.seed).to(device))
            model.check_logits()
    except UserError as error:
        raise source.error("model.path" if settings.path else "model.new", str(error)) from error
    if settings.chat and not tokenizer.chat_template:
        raise source.error("model.chat", "the tokenizer has no chat template")
    limit_prompts(task, Chat.build(tokenizer, settings.chat), source)
    return tokenizer, model


def train_step(model: LanguageModel, optimiser: Optimiser, batch: Batch, micro_batch_tokens: int) -> float:
    """One update on the mean negative log-probability of the tokens that count; returns it."""
    weights_BT = token_weights(batch.mask_BT, "token_mean")
    total = 0.0
    for rows in cut_rows(batch, micro_batch_tokens, padded=True):
        part = batch.select(rows).to(model.device)
        logprobs_BT, _ = model.completion_logprobs(part, share_prompts=False)
        part_BT = weights_BT[rows, : logprobs_BT.shape[1]].to(logprobs_BT)
        loss = -(part_BT * logprobs_BT).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    optimiser.step(total)
    return total


def demonstration_batch(tokenizer: Any, shown: list[Demonstration], chat: bool | None) -> Batch:
    """Demonstrations as rows, the shortest first, each with its own prompt; the completion and its end are trained on."""
    shown = sorted(shown, key=lambda item: len(item.text) + len(item.completion))
    ids = [tokenizer(item.completion, add_special_tokens=False).input_ids for item in shown]
    tokens = [torch.tensor([*row, tokenizer.eos_token_id]) for row in ids]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in tokens]
    for item, mask in zip(shown, masks, strict=True):
        mask[0] = not item.skip_first
    tokens_BT = pad_rows(tokens)
    return Batch(
        rows_B=torch.arange(len(shown)),
        prompts=tuple(encode_prompt(tokenizer, item.prompt, chat) for item in shown),
        group_ids_B=torch.arange(len(shown)),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor([len(row) for row in tokens]),
        mask_BT=pad_rows(masks),
        rollout_logprobs_BT=torch.zeros(tokens_BT.shape),
    )


def pass_rates(model: LanguageModel, tokenizer: Any, task: Task, recipe: SftRecipe) -> dict[str, float]:
    rollouts = Rollouts(
        sampler=NativeSampler(model, tokenizer),
        task=task,
        chat=Chat.build(tokenizer, recipe.model.chat),
        sampling=Sampling(max_tokens=recipe.sft.max_tokens),
    )
    problems = task.held_out(recipe.sft.eval_problems)
    return evaluate(rollouts, problems, seed=derive(recipe.seed, "evaluation")).metrics
