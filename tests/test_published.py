"""Weights that one process publishes and another loads: every tensor arrives, and those of another model are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groupwise.errors import UserError
from groupwise.models import LanguageModel
from groupwise.models.published import Published, publish
from tests import zoo


def model(name: str, seed: int, tied: bool) -> LanguageModel:
    member = zoo.ZOO[name]
    zoo.ZOO["published"] = replace(member, settings={**member.settings, "tie_word_embeddings": tied})
    try:
        return LanguageModel(zoo.build("published", seed=seed))
    finally:
        del zoo.ZOO["published"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_every_tensor_arrives(name: str, tied: bool, tmp_path: Path) -> None:
    theirs, ours = model(name, 1, tied), model(name, 2, tied)
    publish(theirs, tmp_path / "w")
    before = [parameter.data_ptr() for parameter in ours.parameters()]
    Published(ours, tmp_path / "w").load()
    for key, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[key], tensor), key
    assert [parameter.data_ptr() for parameter in ours.parameters()] == before, "in the tensors that it has"


def test_a_sampler_in_bfloat16_takes_float32(tmp_path: Path) -> None:
    theirs, ours = model("llama", 1, True), model("llama", 2, True).copy(torch.bfloat16)
    publish(theirs, tmp_path / "w")
    Published(ours, tmp_path / "w").load()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    ours = model("qwen3", 1, False)
    before = {key: tensor.clone() for key, tensor in ours.module.state_dict().items()}
    publish(model("qwen3", 2, True), tmp_path / "tied")
    publish(model("mixtral", 2, False), tmp_path / "mixtral")
    zoo.ZOO["wider"] = replace(zoo.ZOO["qwen3"], settings={**zoo.ZOO["qwen3"].settings, "intermediate_size": 64})
    publish(LanguageModel(zoo.build("wider")), tmp_path / "wider")
    zoo.ZOO["deeper"] = replace(zoo.ZOO["qwen3"], settings={**zoo.ZOO["qwen3"].settings, "num_hidden_layers": 3})
    publish(LanguageModel(zoo.build("deeper")), tmp_path / "deeper")
    del zoo.ZOO["wider"], zoo.ZOO["deeper"]
    publish(model("qwen3", 2, False), tmp_path / "lost")
    (tmp_path / "lost" / "model.safetensors").unlink()
    for name, message in (
        ("tied", "its tie_word_embeddings is True, and here False"),
        ("mixtral", "its model_type is 'mixtral', and here 'qwen3'"),
        ("wider", r"mlp.*_proj.weight is \[.*64.*\] F32, and here \[.*48.*\] float32"),
        ("deeper", r"another model's weights: .*layers\.2\."),
        ("lost", "no .*safetensors files"),
        ("nothing", "no model has been published there"),
    ):
        with pytest.raises(UserError, match=message):
            Published(ours, tmp_path / name).load()
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.module.state_dict().items())


def test_a_configuration_without_a_setting_is_no_other_model(tmp_path: Path) -> None:
    theirs, ours = model("llama", 1, False), model("llama", 2, False)
    publish(theirs, tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    Published(ours, tmp_path / "w").load()
    assert torch.equal(next(iter(ours.parameters())), next(iter(theirs.parameters())))
