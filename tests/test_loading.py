"""Loading: safetensors only, no code of a model's own unless asked for, and adapters with their base."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groupwise.errors import UserError
from groupwise.models import LanguageModel, load_config, load_module, load_tokenizer
from groupwise.models.loading import stored_dtype
from tests.conftest import tiny_model
from tests.test_cli import run


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    directory = tmp_path / "base"
    tiny_model("qwen3", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_pickled_weights_are_refused_with_how_to_convert_them(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled.*save_pretrained"):
        load_module(str(base))


CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
open({marker!r}, "w").close()
class OwnConfig(Qwen3Config):
    model_type = "own"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_models_own_runs_only_if_asked_for(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr(sys, "stdin", None)  # so that a question would be an error
    for load in (load_module, load_config):
        with pytest.raises(UserError, match=r"set model.trust_remote_code = true"):
            load(str(base))
    checked = run("check", "quick", "--set", f"model.path={base}")
    assert checked.exit_code == 2 and "trust_remote_code" in checked.output and "model.path" in checked.output
    assert not marker.exists()
    trusted = run("check", "quick", "--set", f"model.path={base}", "--set", "model.trust_remote_code=true")
    assert trusted.exit_code == 0, trusted.output
    assert "OwnModel" in trusted.stdout and marker.exists()


@pytest.mark.parametrize("declared", [True, False])
def test_the_stored_dtype_is_the_configurations_or_that_of_the_files(base: Path, tokenizer: Any, declared: bool) -> None:
    tiny_model("qwen3", tokenizer).to(torch.bfloat16).save_pretrained(base)
    if not declared:
        config = json.loads((base / "config.json").read_text())
        del config["dtype"]
        (base / "config.json").write_text(json.dumps(config))
    assert stored_dtype(str(base)) == torch.bfloat16
    model = LanguageModel.load(str(base))
    assert (model.dtype, model.stored_dtype) == (torch.float32, torch.bfloat16)


def test_a_bfloat16_model_trained_in_float32_is_written_as_it_was(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    tiny_model("qwen3", tokenizer).to(torch.bfloat16).save_pretrained(base)
    model = LanguageModel.load(str(base))
    assert model.export(tmp_path / "out", tokenizer) == {}
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == torch.bfloat16 for name in before)
    assert model.dtype == torch.float32


LORA = ["--set", "model.lora.rank=4", "--set", "training.eval_problems=20", "--set", "training.steps=4"]
SMALL = ["--set", "rollouts.prompts_per_step=4", "--set", "training.checkpoint_every=2", "--set", "training.tokens_every=0"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_with_adapters_resumes_bit_for_bit_and_is_evaluated(tmp_path: Path, algorithm: str) -> None:
    more = [*LORA, *SMALL, "--set", f"algorithm.name={algorithm}", "--set", "model.lora.export=adapter"]
    for name in ("one", "two"):
        result = run("train", "quick", "--out", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
    assert "LoRA of rank 4, alpha 32 on 21 layers" in result.stdout

    def adapter(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "model" / "adapter_model.safetensors")

    one = adapter("one")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "two" / "model")
    resumed = run("train", "--resume", tmp_path / "two")
    assert resumed.exit_code == 0, resumed.output
    assert one and all(torch.equal(value, adapter("two")[key]) for key, value in one.items())

    evaluated = run("eval", tmp_path / "one")
    assert evaluated.exit_code == 0, evaluated.output
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    last = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row][-1]
    assert f"{last:.3f}" in evaluated.stdout
    load_tokenizer(str(tmp_path / "one" / "model"))
    other = run("train", "--resume", tmp_path / "one", "--set", "model.lora.rank=8", "--set", "training.steps=5")
    assert other.exit_code == 2 and "cannot change in a run" in other.output


def test_adapters_without_their_base_say_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        load_module(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/at all"}')
    with pytest.raises(UserError, match="no model '/nowhere/at all'"):
        load_config(str(tmp_path))


def test_a_learning_rate_of_full_training_gets_a_hint() -> None:
    low = run("check", "quick", *LORA, "--set", "learner.learning_rate=1e-5")
    assert low.exit_code == 0 and "usually learn with about ten times as much, as 0.0001" in low.stdout
    assert "hint" not in run("check", "quick", *LORA).stdout
    assert "hint" not in run("check", "quick", "--set", "learner.learning_rate=1e-5").stdout
    unknown = run("check", "quick", "--set", "model.lora.rnk=4")
    assert unknown.exit_code == 2 and "did you mean 'rank'" in unknown.output
    target = run("check", "quick", "--set", 'model.lora.targets=["q_prj"]')
    assert target.exit_code == 2 and "model.lora.targets" in target.output and "'q_proj'" in target.output
