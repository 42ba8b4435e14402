"""A surrogate loss of your own, with a hyper-parameter: GRPO whose ratio is pulled back by a square instead of clipped."""

from dataclasses import dataclass

import torch

import groupwise as gw


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """-(ratio A - pull (ratio - 1)^2): its field is a setting, so a recipe or `train` can change it."""

    pull: float = 1.0
    reads_bounds = False
    zero_advantage_is_idle = False  # the square moves a token whose advantage is 0, too

    def __call__(self, terms: gw.Terms) -> tuple[torch.Tensor, torch.Tensor]:
        ratio_BT = terms.log_ratio_BT.exp()
        loss_BT = -ratio_BT * terms.advantages_BT + self.pull * (ratio_BT - 1) ** 2
        return loss_BT, torch.zeros_like(terms.mask_BT)  # nothing is clipped


if __name__ == "__main__":
    run = gw.train(
        "quick",
        algorithm={"name": "grpo", "beta": 0.0, "surrogate": Pulled, "pull": 0.5},
        training={"eval_every": 16},
    )
    print("pass@1 before and after:", run.values("eval/pass@1"))
