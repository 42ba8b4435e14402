"""The works that are compared: one model and its prompts, the same for every peer. Needs transformers and torch only."""

import json
import random
import string
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Work:
    """A rollout batch: prompts of so many tokens, G completions each, at most so many tokens."""

    prompts: int
    prompt_tokens: int
    group_size: int
    max_tokens: int
    endless: bool = False
    """No completion ends by itself: each has exactly max_tokens."""
    vocabulary: int = 64
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    kv_heads: int = 0
    """Fewer than heads where groups of heads share keys and values; 0: as many."""
    head_dim: int = 64
    mlp: int = 768
    dtype: str = "float32"
    precision: str = "float32"
    """Of the matmuls of groupwise's sampler and learner."""
    threads: int = 2
    """Of groupwise and of TRL."""
    micro_batch_tokens: int = 4096
    """Of groupwise's learner."""
    micro_batch_rows: int = 64
    """Of TRL's."""
    model_type: str = "qwen3"
    architecture: dict[str, Any] = field(default_factory=dict)
    """Settings of the transformers configuration, over those that the fields above give; None: leave it to transformers."""
    backend: str = "auto"
    """Of groupwise's sampler and learner."""
    cache_dtype: str | None = None
    """Of keys and values while groupwise generates; None: the model's."""
    lora_rank: int = 0
    """Groupwise and TRL train LoRA adapters of this rank, alpha twice that, on all linear layers; 0: the whole model."""


WORKS = {
    "reasoning": Work(prompts=16, prompt_tokens=200, group_size=16, max_tokens=256),
    "short": Work(prompts=16, prompt_tokens=10, group_size=16, max_tokens=64, endless=True),
    "vocabulary": Work(
        prompts=4,
        prompt_tokens=128,
        group_size=8,
        max_tokens=128,
        endless=True,
        vocabulary=151_936,
        hidden=256,
        heads=4,
        mlp=1024,
        micro_batch_tokens=512,
    ),
}


def as_json(work: Work) -> str:
    """The fields without a default, and those that differ from it: what workers take, those of earlier versions too."""
    mine, defaults = asdict(work), asdict(Work(0, 0, 0, 0))
    required = {field.name for field in fields(Work)[:4]}
    return json.dumps({name: value for name, value in mine.items() if name in required or value != defaults[name]})


def scaled(work: Work, scale: float) -> Work:
    """Fewer prompts, down to two; below that shorter prompts and completions as well."""
    prompts = min(work.prompts, max(2, round(work.prompts * scale)))
    shorter = min(1.0, work.prompts * scale / 2)
    lengths = {name: max(4, round(getattr(work, name) * shorter)) for name in ("prompt_tokens", "max_tokens")}
    return replace(work, prompts=prompts, **lengths)


def end_token(work: Work) -> int:
    """The end-of-sequence token; where no completion may end, an id that the model has no logit for."""
    return work.vocabulary if work.endless else 1


def tokenizer(work: Work) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "<spare>" if work.endless else "<end>": 1}
    vocabulary |= {character: 2 + i for i, character in enumerate(CHARACTERS)} | {"<end>": end_token(work)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def new_model(work: Work, device: str = "cpu") -> PreTrainedModel:
    """Random weights, always the same on a device."""
    settings = {
        "vocab_size": work.vocabulary,
        "hidden_size": work.hidden,
        "num_hidden_layers": work.layers,
        "num_attention_heads": work.heads,
        "num_key_value_heads": work.kv_heads or work.heads,
        "head_dim": work.head_dim,
        "intermediate_size": work.mlp,
        "max_position_embeddings": max(4096, work.prompt_tokens + work.max_tokens),
        "tie_word_embeddings": True,
        "eos_token_id": end_token(work),
        "pad_token_id": 0,
        "bos_token_id": None,
        **work.architecture,
    }
    given = {name: value for name, value in settings.items() if value is not None or name == "bos_token_id"}
    config = AutoConfig.for_model(work.model_type, **given)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype)).eval()


def prompts(work: Work) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(CHARACTERS, k=work.prompt_tokens)) for _ in range(work.prompts)]


def make(work: Work, directory: Path) -> None:
    """Write the model, its tokenizer and prompts.json into a directory."""
    logging.disable_progress_bar()
    new_model(work).save_pretrained(directory)
    tokenizer(work).save_pretrained(directory)
    (directory / "prompts.json").write_text(json.dumps(prompts(work)))


def parameters(work: Work) -> int:
    """Model weights that a completion token is multiplied with, those of the output layer included; of Qwen3 and its like."""
    heads = work.heads * work.head_dim
    key_values = 2 * (work.kv_heads or work.heads) * work.head_dim
    return work.layers * work.hidden * (2 * heads + key_values + 3 * work.mlp) + work.hidden * work.vocabulary


def peak_mib() -> float:
    """Of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage also counts the process that started this one
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def reward(tokens: list[int]) -> float:
    """Right or wrong by a coin that the completion itself tosses, so that nearly every group is mixed."""
    return float(sum(tokens) % 2)
