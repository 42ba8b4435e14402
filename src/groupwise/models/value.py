"""A critic's network: a decoder and a scalar head, which says what reward to expect from each state on."""

from typing import Any

import torch
from torch import Tensor, nn

from groupwise.models.checkpoint import check_alike, trained_parameters
from groupwise.models.hidden import inside_rows
from groupwise.models.language_model import LanguageModel
from groupwise.types import Batch


class ValueModel:
    """Values of the states in which completion tokens are chosen."""

    def __init__(self, model: LanguageModel) -> None:
        """`model`: a language model of its own, whose decoder is used; its adapters may be on a base that it shares with others.

        The head starts at 0, so every value does. Beside adapters, which are in float32, it is in float32 too.
        """
        self.model = model
        width = model.config.hidden_size
        self._dtype = torch.float32 if model.adapted else model.dtype
        head = nn.Linear(width, 1, device=model.device, dtype=self._dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.network = nn.ModuleDict({"decoder": model.decoder.module, "head": head})

    def values(self, batch: Batch, *, share_prompts: bool, precision: str = "float32", checkpointing: bool = False) -> Tensor:
        """float32 [B, T]: the value of the state before each token; 0 after a row's end. See `LanguageModel.running`."""
        with self.model.running(precision=precision, checkpointing=checkpointing):
            hidden_NH = self.model.completion_hidden(batch, share_prompts)
            values_N = self.network["head"](hidden_NH.to(self._dtype))[:, 0].float()
        zeros_BT = torch.zeros(batch.tokens_BT.shape, device=values_N.device)
        return zeros_BT.masked_scatter(inside_rows(batch), values_N)

    def state_dict(self) -> dict[str, Any]:
        """The network's weights; of one with adapters, those that are trained."""
        return trained_parameters(self.network) if self.model.adapted else self.network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: they are of another network.
        """
        check_alike(state, self.state_dict())
        self.network.load_state_dict(state, strict=False)
