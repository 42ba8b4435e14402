"""A TRL script: GRPO on texts with two weighted rewards.  python single_turn_trl.py MODEL DATA.jsonl"""

import sys

from datasets import load_dataset
from rewards import brevity, right
from trl import GRPOConfig, GRPOTrainer

config = GRPOConfig(
    output_dir="single-turn-trl",
    num_generations=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_completion_length=16,
    learning_rate=1e-4,
    max_steps=1,
    shuffle_dataset=False,
    loss_type="grpo",
    reward_weights=[1.0, 0.2],
    bf16=False,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=sys.argv[1],
    args=config,
    reward_funcs=[right, brevity],
    train_dataset=load_dataset("json", data_files=sys.argv[2], split="train"),
)
trainer.train()
