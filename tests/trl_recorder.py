"""Runs a TRL script as it is, in an environment that has TRL, with the completions of a file, and records what TRL makes of them.

python trl_recorder.py OUT TURNS.json SCRIPT [ARGUMENTS...]; TURNS.json: for each row of the batch the token ids of its turns.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from safetensors.torch import save_file
from transformers import TrainerCallback

OUT, TURNS = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())


class Gradients(TrainerCallback):
    """Keeps the gradients of the only optimiser step, before they are clipped."""

    def __init__(self, recorded: dict[str, torch.Tensor]) -> None:
        self.recorded = recorded

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        OUT.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.recorded.items()}, str(OUT / "recorded.safetensors"))


class Recorded(trl.GRPOTrainer):  # type: ignore[misc]
    """The trainer, with given completions in place of sampled ones."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.recorded: dict[str, torch.Tensor] = {}
        self.rows: list[tuple[list[int], int]] = []
        super().__init__(*arguments, callbacks=[Gradients(self.recorded)], **named)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        """The next turn of each row. A row is known by what it has read and said so far."""
        if not self.rows:
            self.rows = [(list(prompt), 0) for prompt in prompt_ids]
            given, taken = list(range(len(prompt_ids))), set()
        else:
            given, taken = [], set[int]()
            for prompt in prompt_ids:
                row = next(
                    i
                    for i, (so_far, turn) in enumerate(self.rows)
                    if i not in taken and turn < len(TURNS[i]) and prompt[: len(so_far)] == so_far
                )
                taken.add(row)
                given.append(row)
        said = [list(TURNS[row][self.rows[row][1]]) for row in given]
        for row, prompt, ids in zip(given, prompt_ids, said, strict=True):
            self.rows[row] = (list(prompt) + ids, self.rows[row][1] + 1)
        return said, None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        (OUT / "said.json").write_text(json.dumps({"prompts": prompts, "completions": completions, "ids": completion_ids_list}))
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.recorded["rewards"] = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages"):
            if found.get(name) is not None:
                self.recorded[name] = found[name].clone()
        return found

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        loss = super().training_step(*arguments, **named)
        self.recorded["loss"] = self.recorded.get("loss", torch.zeros(())) + loss.detach()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.recorded[f"grad.{name}"] = parameter.grad.clone()
        return loss


OUT.mkdir(exist_ok=True)
trl.GRPOTrainer = Recorded
script = Path(sys.argv[3]).resolve()
sys.path.insert(0, str(script.parent))
sys.argv = [str(script), *sys.argv[4:]]
runpy.run_path(str(script), run_name="__main__")
