"""A TRL script: GSPO on conversations with an asynchronous reward.  python conversation_trl.py MODEL DATA.jsonl"""

import sys

from datasets import load_dataset
from judge import polite
from trl import GRPOConfig, GRPOTrainer

config = GRPOConfig(
    output_dir="conversation-trl",
    num_generations=4,
    per_device_train_batch_size=8,
    max_completion_length=16,
    learning_rate=1e-4,
    max_steps=1,
    shuffle_dataset=False,
    loss_type="grpo",
    importance_sampling_level="sequence",
    epsilon=3e-4,
    epsilon_high=4e-4,
    scale_rewards="batch",
    chat_template_kwargs={"enable_thinking": False},
    bf16=False,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=sys.argv[1],
    args=config,
    reward_funcs=polite,
    train_dataset=load_dataset("json", data_files=sys.argv[2], split="train"),
)
trainer.train()
