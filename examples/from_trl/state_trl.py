"""A TRL script: DAPO's loss on rewards that read an environment's state.  python state_trl.py MODEL DATA.jsonl"""

import sys

from datasets import load_dataset
from shop import Till
from state import bargain, curiosity
from trl import GRPOConfig, GRPOTrainer

config = GRPOConfig(
    output_dir="state-trl",
    num_generations=4,
    per_device_train_batch_size=8,
    max_completion_length=256,
    max_tool_calling_iterations=3,
    learning_rate=1e-4,
    max_steps=1,
    shuffle_dataset=False,
    epsilon_high=0.28,
    reward_weights=[1.0, 0.5],
    chat_template_kwargs={"enable_thinking": False},
    bf16=False,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=sys.argv[1],
    args=config,
    reward_funcs=[bargain, curiosity],
    environment_factory=Till,
    train_dataset=load_dataset("json", data_files=sys.argv[2], split="train"),
)
trainer.train()
