"""A step as it is usually written on transformers alone: `generate` for all completions at once, then training on padded rows."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from worker_groupwise import Step

from groupwise.algorithms import policy_loss
from groupwise.types import Completion, TrainingBatch, VersionSpan


def generate(module: PreTrainedModel, step: Step) -> list[tuple[Completion, ...]]:
    """The completions of each of the step's prompts, which must be equally long; without their log-probabilities."""
    work = step.work
    prompts_PL = torch.stack(step.prompts).to(module.device)
    rows = module.generate(
        input_ids=prompts_PL,
        attention_mask=torch.ones_like(prompts_PL),
        do_sample=True,
        top_k=0,
        max_new_tokens=work.max_tokens,
        num_return_sequences=work.group_size,
        pad_token_id=0,
    )
    tokens_BT = rows[:, prompts_PL.shape[1] :].cpu()
    ended_B = [(row == step.tokenizer.eos_token_id).nonzero()[:1, 0].tolist() for row in tokens_BT]
    completions = [
        _completion(row[: ended[0] + 1] if ended else row, bool(ended)) for row, ended in zip(tokens_BT, ended_B, strict=True)
    ]
    G = work.group_size
    return [tuple(completions[i : i + G]) for i in range(0, len(completions), G)]


def _completion(tokens: Tensor, ended: bool) -> Completion:
    return Completion(
        text="",
        tokens=tokens,
        logprobs=torch.zeros(len(tokens)),
        mask=torch.ones(len(tokens), dtype=torch.bool),
        stop="stop" if ended else "length",
        versions=(VersionSpan(0, len(tokens), 0),),
    )


def update(module: PreTrainedModel, adam: torch.optim.Optimizer, step: Step, batch: TrainingBatch, rows: int) -> dict[str, float]:
    """One optimiser step with the same loss, on `rows` padded rows at a time, each with a copy of its prompt.

    The policy has not moved since it sampled, so its old log-probabilities are the current ones.
    """
    work, algorithm = step.work, step.algorithm
    weights_BT = algorithm.aggregation(batch.mask_BT, group_ids_B=batch.group_ids_B, max_length=work.max_tokens)
    prompts_PL = torch.stack(batch.prompts)
    total = 0.0
    for start in range(0, len(batch), rows):
        part = slice(start, start + rows)
        to = [x[part].to(module.device) for x in (batch.tokens_BT, batch.mask_BT, batch.advantages_BT, weights_BT)]
        tokens_BT, mask_BT, advantages_BT, weights = to
        prompt_BL = prompts_PL[batch.group_ids_B[part]].to(module.device)
        inside_BT = (torch.arange(tokens_BT.shape[1]) < batch.lengths_B[part, None]).to(module.device)
        output = module(
            input_ids=torch.cat([prompt_BL, tokens_BT], 1),
            attention_mask=torch.cat([torch.ones_like(prompt_BL), inside_BT.long()], 1),
            logits_to_keep=tokens_BT.shape[1] + 1,
            use_cache=False,
        )
        logits_NV = output.logits[:, :-1].flatten(0, 1).float()
        del output
        logprobs_BT = -torch.nn.functional.cross_entropy(logits_NV, tokens_BT.flatten(), reduction="none").view(tokens_BT.shape)
        loss, _ = policy_loss(algorithm, logprobs_BT, logprobs_BT.detach(), advantages_BT, mask_BT, weights_BT=weights)
        loss.backward()
        total += float(loss.detach())
        del logits_NV, logprobs_BT, loss
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), step.learner.settings.max_grad_norm)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": float(norm)}
