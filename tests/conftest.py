"""Tiny real models: random weights, one per architecture, and the shipped one; the order in which files of tests run."""

import os
import signal
from typing import Any

import hypothesis
import pytest
import torch

from groupwise.kernels import blocked_bf16, layers, packed_attention, recurrent
from groupwise.kernels.compiled import library
from groupwise.models import LanguageModel, character_tokenizer, load_module, load_tokenizer, new_module
from groupwise.types import Completion

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {**SIZES, "head_dim": 8},
    "llama": SIZES,
    "gemma": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "qwen3_moe": {
        **SIZES,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}


for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # as a shell, or nohup, has it for what it starts in the background
        signal.signal(_number, _usual)


LONGEST = (
    "cluster", "sharded", "learner_process", "trackers", "evidence", "live", "zoo", "training", "lora", "user_code", "text",
    "sampler", "serve", "fleet", "planning", "served", "recurrent", "explorer", "workers", "signals", "examples", "user_task",
    "environments_training", "stream", "rewards", "data", "benchmarks", "bare", "from_trl", "gpu_paths", "faults", "ladder",
    "out_of_memory", "docs",
)  # fmt: skip
"""Files of tests that take longest, in the order in which they are begun: begun last, they would run on alone."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of pytest -n logical: the cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA device here; benchmarks/gpu.sh runs these tests where there is one")
                )


def need_kernels() -> None:
    if library("sample") is None:
        pytest.skip("no C++ compiler here that makes the kernels; PyTorch does their work, and is tested beside them")


def forget_kernels() -> None:
    """As in a new process: what is compiled is compiled again."""
    of_layers = layers.layer_kernels, recurrent.recurrent_kernels, recurrent.recurrence_kernels
    for function in (library, packed_attention.attention_kernels, blocked_bf16.bf16_kernels, *of_layers):
        function.cache_clear()


@pytest.fixture(autouse=True)
def _quiet_threads() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from groupwise.tasks.arithmetic import CHARACTERS  # needs pydantic, which a machine lent for tests/test_gpu.py lacks

    return character_tokenizer(CHARACTERS)


@pytest.fixture(scope="session")
def shipped() -> tuple[Any, Any]:
    """The model and tokenizer that ship with the package."""
    return load_module("arithmetic-base"), load_tokenizer("arithmetic-base")


def said(text: str) -> Completion:
    """A completion of so many tokens as characters, as a sampler would return it."""
    mask = torch.ones(max(1, len(text)), dtype=torch.bool)
    return Completion(text=text, tokens=mask.long(), logprobs=mask * -1.0, mask=mask, stop="stop", versions=())


def tiny_model(architecture: str, tokenizer: Any, **changes: Any) -> Any:
    """Random weights, larger than the usual start, so that distributions are far from flat. `changes`: of its configuration."""
    module = new_module({"model_type": architecture, **ARCHITECTURES[architecture], **changes}, tokenizer, seed=1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return module


def owned(module: Any, backend: Any = "auto") -> LanguageModel:
    """A `LanguageModel` around a module."""
    return LanguageModel(module, backend)


def packs(module: Any) -> bool:
    """Whether packed sequences run through it."""
    return owned(module).decoder.packs()


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tiny_model(request.param, tokenizer)
