"""TRL's GRPOTrainer at one work: for each line on standard input, one whole step; answers with a line of JSON."""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workloads import WORKS, peak_mib, reward


class Clock(TrainerCallback):
    """Waits for a line before each step and reports after it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.generation = self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print("READY", flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.tokens, self.generation, self.started = 0, 0.0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.started
        report = {
            "seconds": seconds,
            "generation": self.generation,
            "training": seconds - self.generation,
            "tokens": self.tokens,
            "peak_mib": peak_mib(),
        }
        print("REPORT " + json.dumps(report), flush=True)


def lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def main() -> None:
    work = dataclasses.replace(WORKS["reasoning"], **json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    directory = Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    clock = Clock()

    def rewards(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.tokens += sum(len(ids) for ids in completion_ids)
        return [reward(ids) for ids in completion_ids]

    rows = work.prompts * work.group_size
    batch = min(work.micro_batch_rows, rows)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
        num_generations=work.group_size,
        max_completion_length=work.max_tokens,
        learning_rate=1e-6,
        beta=0.0,
        epsilon_high=0.28,
        loss_type="dapo",
        router_aux_loss_coef=0.0,  # as groupwise, which has no load-balancing loss
        temperature=1.0,
        max_steps=1000,
        gradient_checkpointing=False,
        bf16=work.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    prompts = json.loads((directory / "prompts.json").read_text())
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, work.dtype)),
        processing_class=tokenizer,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[clock],
        peft_config=lora(work.lora_rank) if work.lora_rank else None,
    )
    generate = trainer._generate

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = generate(*arguments, **named)
        clock.generation += time.perf_counter() - started
        return result

    trainer._generate = timed
    trainer.train()


if __name__ == "__main__":
    main()
