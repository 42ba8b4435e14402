"""What a run leaves in model/ serves as it is: five families with chat templates, in transformers and in vLLM.

The tests with vLLM need its own environment, .bench/vllm (make .bench/vllm/.ready); without it they are skipped.
"""

import functools
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from groupwise.models import LanguageModel, character_tokenizer
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
VLLM = ROOT / ".bench" / "vllm" / "bin" / "python"
TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
HEADS = {"head_dim": 32}
"""vLLM's attention on a CPU has kernels for heads of 32 and more."""


@dataclass(frozen=True)
class Family:
    settings: dict[str, Any]
    template: str
    dtype: torch.dtype = torch.float32
    """Of the directory that training begins with."""
    recipe: tuple[str, ...] = ()


SYSTEM = "model.system_prompt=Answer with a number."
FAMILIES = {
    "qwen3": Family({"model_type": "qwen3", **HEADS}, "qwen3", recipe=("model.chat_template_kwargs.enable_thinking=false",)),
    "llama": Family({"model_type": "llama"}, "qwen3", torch.bfloat16, (SYSTEM,)),
    "gemma3": Family(
        {
            "model_type": "gemma3_text",
            **HEADS,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gemma",
        recipe=(SYSTEM, "model.lora.rank=4"),
    ),
    "phi3": Family({"model_type": "phi3"}, "qwen3", torch.bfloat16, ("model.lora.rank=4",)),
    "qwen3_moe": Family(
        {
            "model_type": "qwen3_moe",
            **HEADS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
        "qwen3",
        recipe=(SYSTEM, "model.chat_template_kwargs.enable_thinking=true"),
    ),
}
GENERATION = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""As on the hub, with do_sample left false, which transformers refuses to write."""
REWARD = "def reward(problem, completions):\n    return [sum(map(ord, text)) % 7 / 7 for text in completions]\n"
RECIPE = """
[model]
path = "base"
[task]
name = "dataset"
path = "problems.jsonl"
reward = "reward.py:reward"
[algorithm]
name = "grpo"
[rollouts]
group_size = 4
prompts_per_step = 4
max_tokens = 8
[learner]
learning_rate = 1e-2
[training]
steps = 2
eval_problems = 4
tokens_every = 0
"""


def make_base(family: Family, directory: Path) -> None:
    """A tiny random model with a tokenizer, a template and generation settings, in the family's dtype."""
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text()
    tokenizer.save_pretrained(directory)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = AutoConfig.for_model(**{**SIZES, **ids, **family.settings})
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.2 / 8 / parameter.std())
        if not config.tie_word_embeddings:
            module.get_output_embeddings().weight.mul_(3)  # so that the best token is ahead
    module.to(family.dtype).save_pretrained(directory)
    settings = GenerationConfig(eos_token_id=[1, tokenizer.convert_tokens_to_ids("<|im_end|>")], pad_token_id=0).to_dict()
    (directory / "generation_config.json").write_text(json.dumps({**settings, **GENERATION, "do_sample": False}))


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's base, recipe and run, trained when first asked for."""
    return functools.cache(lambda name: train(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=FAMILIES)
def trained(request: pytest.FixtureRequest, homes: Callable[[str], Path]) -> tuple[str, Path]:
    """A family's name and directory."""
    return request.param, homes(request.param)


def train(name: str, home: Path) -> Path:
    family = FAMILIES[name]
    make_base(family, home / "base")
    (home / "problems.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(40)))
    (home / "reward.py").write_text(REWARD)
    (home / "recipe.toml").write_text(RECIPE.replace('"base"', json.dumps(str(home / "base"))))
    changes = [part for change in family.recipe for part in ("--set", change)]
    result = run("train", home / "recipe.toml", "--out", home / "run", *changes)
    assert result.exit_code == 0, result.output
    assert ("moved logits by at most" in result.stdout) == ("model.lora.rank=4" in family.recipe)
    return home


PROMPTS = [[5, 9, 30, 41, 7], [60, 2, 3, 88, 12, 14, 33, 70, 21, 8, 40, 41], [17] * 20]


def test_a_trained_family_loads_in_transformers_with_the_same_logits(trained: tuple[str, Path]) -> None:
    name, home = trained
    family, exported = FAMILIES[name], home / "run" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    assert theirs.dtype == family.dtype
    assert json.loads((exported / "config.json").read_text())["dtype"] == str(family.dtype).removeprefix("torch.")
    before = AutoModelForCausalLM.from_pretrained(home / "base", dtype="auto").eval()
    ours = LanguageModel.load(str(exported))
    tokens = torch.tensor(PROMPTS[1])[None]
    with torch.no_grad():
        of_theirs = theirs.float()(input_ids=tokens).logits
        torch.testing.assert_close(ours.logits(ours.decoder.alone(tokens[0])), of_theirs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before.float()(input_ids=tokens).logits, of_theirs, atol=1e-3), "training has moved it"


def test_template_and_generation_settings_are_as_they_were(trained: tuple[str, Path]) -> None:
    name, home = trained
    exported = home / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == (TEMPLATES / f"{FAMILIES[name].template}.jinja").read_text()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    base = AutoTokenizer.from_pretrained(home / "base")
    for more in ({}, {"enable_thinking": False}, {"tools": [{"name": "f"}]}):
        ids = (one.apply_chat_template(messages, add_generation_prompt=True, **more)["input_ids"] for one in (tokenizer, base))
        assert next(ids) == next(ids)
    written, before = (json.loads((path / "generation_config.json").read_text()) for path in (exported, home / "base"))
    assert written["eos_token_id"] == before["eos_token_id"] and len(written["eos_token_id"]) == 2
    assert {key: written[key] for key in GENERATION} == GENERATION


def test_checkpoints_of_adapters_are_small(trained: tuple[str, Path]) -> None:
    name, home = trained
    size = (home / "run" / "checkpoints" / "step-000002" / "model.safetensors").stat().st_size
    whole = sum(p.numel() for p in LanguageModel.load(str(home / "base")).parameters()) * 4
    assert (size < 0.3 * whole) == ("model.lora.rank=4" in FAMILIES[name].recipe)


def test_vllm_says_the_same_tokens(homes: Callable[[str], Path], tmp_path: Path) -> None:
    if not VLLM.is_file():
        pytest.skip("vLLM is not installed here: make .bench/vllm/.ready")
    exported = {name: homes(name) / "run" / "model" for name in FAMILIES}
    expected = []
    for path in exported.values():
        module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        expected.append([greedy(module, prompt, 12) for prompt in PROMPTS])
    jobs = [{"model": str(path), "prompts": PROMPTS, "tokens": 12} for path in exported.values()]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "vllm_greedy.py"
    done = subprocess.run([VLLM, script, tmp_path / "jobs.json"], capture_output=True, text=True, timeout=600, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stderr[-3000:]
    for name, ours, theirs in zip(exported, expected, json.loads(lines[0].removeprefix("REPORT ")), strict=True):
        assert ours == theirs, name


@torch.no_grad()
def greedy(module: Any, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, each token from the whole sequence."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(module(input_ids=torch.tensor(tokens)[None]).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
