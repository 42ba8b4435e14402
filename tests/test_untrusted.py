"""No pickle of a model or dataset is loaded, no code beside them is run, and nothing is asked on the terminal."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import groupwise
from groupwise.errors import UserError
from groupwise.models import load_config, load_module, load_tokenizer
from groupwise.models.loading import load_classifier, shipped_path
from groupwise.models.reward_model import RewardModel
from tests.test_cli import run

CODE = """open({canary!r}, "w").close()
from transformers import LlamaForCausalLM as Model, LlamaConfig as Config, PreTrainedTokenizerFast as Tokenizer
generate = Model
"""
OWN = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoModelForSequenceClassification": "own.Model",
    "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"],
}


class Touch:
    """Pickled, a command that runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that must never come to be; all the while whoever asks on the input gets a yes."""
    path = tmp_path / "canary"
    reader, writer = os.pipe()
    os.write(writer, b"y\n" * 8)
    os.close(writer)
    with os.fdopen(reader) as answers:
        monkeypatch.setattr(sys, "stdin", answers)
        yield path
        assert not path.exists()
        assert answers.read() == "y\n" * 8


@pytest.fixture
def model(tmp_path: Path, canary: Path) -> Path:
    home = tmp_path / "model"
    shutil.copytree(shipped_path("arithmetic-base"), home)
    (home / "own.py").write_text(CODE.format(canary=str(canary)))
    return home


def change(path: Path, **values: Any) -> None:
    tree = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


LOADERS: list[Callable[[str], Any]] = [load_config, load_module, load_classifier, RewardModel.load]


@pytest.mark.parametrize("kind", ["own", None])
def test_a_model_that_needs_its_own_code_is_refused(kind: str | None, model: Path, canary: Path) -> None:
    change(model / "config.json", auto_map=OWN, model_type=kind)
    change(model / "tokenizer_config.json", auto_map=OWN)
    for load in LOADERS:
        said = "such models cannot be used here" if load in (load_classifier, RewardModel.load) else "set model.trust_remote_code"
        with pytest.raises(UserError, match=said):
            load(str(model))
    load_tokenizer(str(model))  # its tokenizer.json is data
    assert run("check", "quick", "--set", f"model.path={model}").exit_code == 2


def test_a_model_that_transformers_knows_is_loaded_without_its_code(model: Path, canary: Path) -> None:
    change(model / "config.json", auto_map=OWN)
    change(model / "tokenizer_config.json", auto_map=OWN)
    (model / "custom_generate").mkdir()
    shutil.copy(model / "own.py", model / "custom_generate" / "generate.py")
    assert type(load_module(str(model))).__name__ == "Qwen3ForCausalLM"
    load_tokenizer(str(model))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_configuration_that_names_code_of_the_hub_is_refused(key: str, model: Path, canary: Path) -> None:
    change(model / "config.json", **{key: "someone/kernel"})
    for load in (load_module, load_classifier):
        with pytest.raises(UserError, match=r"names code from the hub .*'someone/kernel'"):
            load(str(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(name: str, model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Touch(canary)}, model / name)
    for load in (load_module, load_classifier):
        with pytest.raises(UserError, match=r"pickled.*convert them once: python -c"):
            load(str(model))


def test_the_command_that_converts_does(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    (model / "own.py").unlink()
    with pytest.raises(UserError) as caught:
        load_module(str(model))
    assert os.system(str(caught.value).rpartition("once: ")[2].replace("python", sys.executable, 1) + " 2> /dev/null") == 0
    converted = load_module(f"{model}-safetensors").state_dict()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    load_tokenizer(f"{model}-safetensors")


def test_pickles_under_other_names_are_not_read(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Touch(canary)}, model / "weights.dat")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"weight": "weights.dat"}}))
    with pytest.raises(UserError, match=r"lists 'weights.dat', which is no safetensors file"):
        load_module(str(model))
    (model / "model.safetensors.index.json").unlink()
    (model / "weights.dat").rename(model / "model.safetensors")
    with pytest.raises(UserError, match="cannot load the model"):
        load_module(str(model))


def test_pickled_adapters_are_refused(model: Path, canary: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = tmp_path / "adapters"
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_module(str(model)), settings).save_pretrained(adapters)
    assert load_module(str(adapters)) is not None
    (adapters / "adapter_model.safetensors").unlink()
    torch.save({"weight": Touch(canary)}, adapters / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapters .* pickled \(adapter_model.bin\).*convert them once: python -c"):
        load_module(str(adapters))
    for file in model.iterdir():  # adapters beside a model of safetensors, which transformers loads with it
        if file.is_file():
            shutil.copy(file, adapters)
    with pytest.raises(UserError, match=r"adapters .* pickled"):
        load_module(str(adapters))


def test_a_file_of_safetensors_beside_pickled_adapters_does_not_pass_for_them(model: Path, canary: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = tmp_path / "adapters"
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_module(str(model)), settings).save_pretrained(adapters)
    (adapters / "adapter_model.safetensors").rename(adapters / "other.safetensors")
    torch.save({"weight": Touch(canary)}, adapters / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapters .* pickled \(adapter_model.bin\)"):
        load_module(str(adapters))


def test_names_in_a_models_files_do_not_reach_the_terminal_raw(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "\x1b]0;title\x07\u202e[red]": torch.zeros(1)}, model / "model.safetensors", metadata={"format": "pt"})
    code = f"from groupwise.models import load_module; load_module({str(model)!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(groupwise.__file__).parent.parent)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stderr
    assert "\\x1b]0;title\\x07\\u202e[red]" in said and not {"\x07", "\u202e"} & set(said)


def dataset(home: Path, path: str) -> str:
    """What `groupwise data` says of a dataset."""
    (home / "r.toml").write_text(f'extends = "quick"\n[task]\nname = "dataset"\npath = "{path}"\nreward = "last_line"\n')
    result = run("data", home / "r.toml", "--count", "1")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return f"{result.exit_code} {' '.join(result.output.split())}"


def test_pickled_datasets_and_their_scripts_are_refused(canary: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Touch(canary))
    (tmp_path / "rows.pkl").write_bytes(bomb)
    assert dataset(tmp_path, "rows.pkl").startswith("2 error:")
    for name in ("rows.pkl", "rows.pickle", "rows.npy", "rows.py", "folder.py"):
        home = tmp_path / f"folder-{name}" if name != "folder.py" else tmp_path / "folder"
        home.mkdir()
        (home / name).write_bytes(CODE.format(canary=str(canary)).encode() if name.endswith(".py") else bomb)
        (home / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
        assert dataset(tmp_path, home.name).startswith("2 error:"), name


def test_parquet_with_a_pickled_type_is_read_as_what_it_stores(canary: Path, tmp_path: Path) -> None:
    bomb = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Touch(canary))}
    fields = [pa.field("prompt", pa.string(), metadata=bomb), pa.field("answer", pa.string())]
    rows = [[f"{i}+1=" for i in range(40)], [str(i + 1) for i in range(40)]]
    pq.write_table(pa.table(rows, schema=pa.schema(fields)), tmp_path / "rows.parquet")
    assert dataset(tmp_path, "rows.parquet").startswith("0 ")
