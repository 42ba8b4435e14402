"""The log-probabilities of a given text, by which samplers show that they have the learner's weights."""

import torch
from torch import Tensor

from groupwise.models import LanguageModel
from groupwise.types import Batch


@torch.no_grad()
def probe(model: LanguageModel, tokens: Tensor, *, precision: str = "float32") -> Tensor:
    """float32 [L - 1], see `Learner.probe`. `precision`: as in `LanguageModel.running`."""
    completion = tokens[None, 1:]
    ones = torch.ones(completion.shape, dtype=torch.bool)
    batch = Batch(
        prompts=(tokens[:1],),
        group_ids_B=torch.tensor([0]),
        rows_B=torch.tensor([0]),
        lengths_B=torch.tensor([completion.shape[1]]),
        tokens_BT=completion,
        mask_BT=ones,
        rollout_logprobs_BT=torch.zeros(completion.shape),
    ).to(model.device)
    with model.bfloat16.held(), model.running(precision=precision):
        return model.completion_logprobs(batch)[0][0].cpu()
