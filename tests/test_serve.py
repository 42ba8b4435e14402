"""`groupwise serve`, as a process of its own: the engine's completions to the bit, new weights, pauses, agents, bad input."""

import asyncio
import copy
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from torch import Tensor

from groupwise.models import LanguageModel, load_tokenizer
from groupwise.models.published import publish
from groupwise.rollouts import wire
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.driver import gather, generate_all, wait_for
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published, Unavailable
from groupwise.types import Completion
from tests.conftest import tiny_model
from tests.launcher import Launcher, Running
from tests.served import free_port
from tests.test_engine import close, random_requests

LONG = Request(prompt=torch.tensor([7, 12, 9]), sampling=Sampling(max_tokens=1500), seed=5, n=16, keep=True)
"""Rows that take a while, so that something can happen meanwhile."""


class Server:
    """A process, and how it is spoken to."""

    def __init__(self, launcher: Launcher, model: Path | str, logs: Path, *more: object) -> None:
        port = free_port()
        self.process: Running = launcher.start(["serve", model, "--port", port, *more], logs / f"{port}.log")
        self.process.wait_for(lambda: "serving at" in self.process.text, 60)
        self.address = f"http://127.0.0.1:{port}"
        assert self.process.text.strip().endswith(f"serving at {self.address}")
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        found = self.http.post(path, json=body)
        return found.status_code, found.json()

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/health").json()
        return found

    def end(self, number: int = signal.SIGTERM) -> None:
        self.http.close()
        self.process.send(number)
        assert self.process.ends(20) == 128 + number

    @asynccontextmanager
    async def client(self) -> AsyncIterator[NativeServer]:
        client = NativeServer(self.address, None)
        client.given.add(Published(directory=Path(), id="0", version=0))
        try:
            yield client
        finally:
            await client.close()

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while not condition(found := await asyncio.to_thread(self.health)):
            assert time.monotonic() < deadline, found
        return found


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def arithmetic(launcher: Launcher, logs: Path) -> Iterator[Server]:
    server = Server(launcher, "arithmetic-base", logs)
    yield server
    server.end()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Directories of models: three of one architecture, none of whose completions ends by itself, and one of another."""
    root, found = tmp_path_factory.mktemp("weights"), {}
    endless = copy.deepcopy(tokenizer)
    endless.add_special_tokens({"eos_token": "<never>"})
    for name in ("first", "second", "third"):
        module = tiny_model("qwen3", tokenizer, max_position_embeddings=2048)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * len(found) * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        module.generation_config.eos_token_id = None
        publish(LanguageModel(module), root / name)
        endless.save_pretrained(root / name)
        found[name] = root / name
    publish(LanguageModel(tiny_model("gemma", tokenizer)), root / "other")
    return {**found, "other": root / "other"}


@pytest.fixture(scope="module")
def endless(launcher: Launcher, logs: Path, weights: dict[str, Path]) -> Iterator[Server]:
    server = Server(launcher, weights["first"], logs)
    yield server
    server.end(signal.SIGINT)


@pytest.fixture
def tiny(endless: Server, weights: dict[str, Path]) -> Server:
    """As if it had just been started."""
    assert endless.post(wire.LOAD, {"directory": str(weights["first"]), "id": "0"})[0] == 200
    return endless


def same(ours: Completion, theirs: Completion) -> None:
    """To the bit."""
    close(ours, theirs)
    assert torch.equal(ours.logprobs, theirs.logprobs) and ours.logprobs.dtype == torch.float32
    assert torch.equal(ours.mask, theirs.mask) and ours.versions == theirs.versions
    assert (ours.kept is None) == (theirs.kept is None)
    if ours.kept is not None and theirs.kept is not None:
        assert torch.equal(ours.kept.words, theirs.kept.words) and torch.equal(ours.kept.ends, theirs.kept.ends)
        assert ours.kept.vocabulary == theirs.kept.vocabulary


# --- completions


def test_completions_are_those_of_the_engine_in_this_process(arithmetic: Server, shipped: tuple[Any, Any]) -> None:
    model, tokenizer = LanguageModel.load("arithmetic-base"), load_tokenizer("arithmetic-base")
    asked = random_requests(20, seed=7)

    async def over_http() -> tuple[list[Any], list[Any]]:
        async with arithmetic.client() as client:
            apart = [await client.generate(request) for request in asked]
            return apart, await gather(*(client.generate(request) for request in asked))

    apart, together = wait_for(over_http())
    for request, one, other in zip(asked, apart, together, strict=True):
        expected = generate_all(NativeSampler(model, tokenizer), [request])[0]
        assert len(one) == len(other) == request.n
        for i, theirs in enumerate(expected):
            same(one[i], theirs)
            close(other[i], theirs)


def test_conversations_continue_on_kept_keys(arithmetic: Server) -> None:
    model, tokenizer = LanguageModel.load("arithmetic-base"), load_tokenizer("arithmetic-base")
    opening = Request(prompt=torch.tensor([3, 12, 4, 15]), sampling=Sampling(max_tokens=8), seed=3, n=3, keep=True)

    async def converse(sampler: Any) -> list[Completion]:
        said = list(await sampler.generate(opening))
        for first in said[:3]:
            prompt = torch.cat([opening.prompt, first.tokens, torch.tensor([5, 6])])
            said += await sampler.generate(
                Request(prompt=prompt, sampling=Sampling(max_tokens=8), seed=4, continues=first.handle, keep=True)
            )
        return said

    async def over_http() -> list[Completion]:
        async with arithmetic.client() as client:
            return await converse(client)

    before = arithmetic.health()["kept"]
    for ours, theirs in zip(wait_for(over_http()), wait_for(converse(NativeSampler(model, tokenizer))), strict=True):
        same(ours, theirs)
    assert arithmetic.health()["kept"] == before + 3, "each of three openings was continued, and what continued it kept"


def test_the_shapes_of_vllm(arithmetic: Server) -> None:
    model, tokenizer = LanguageModel.load("arithmetic-base"), load_tokenizer("arithmetic-base")
    prompt = torch.tensor([3, 12, 4, 15])
    parameters = {"n": 2, "max_tokens": 6, "seed": 11, "logprobs": 0, "prompt_logprobs": 0, "detokenize": False}
    code, found = arithmetic.post(wire.GENERATE, {"token_ids": prompt.tolist(), "sampling_params": parameters})
    assert code == 200 and found["model"] == "arithmetic-base"
    expected = generate_all(
        NativeSampler(model, tokenizer), [Request(prompt=prompt, sampling=Sampling(max_tokens=6), seed=11, n=2)]
    )
    for choice, theirs in zip(found["choices"], expected[0], strict=True):
        assert choice["token_ids"] == theirs.tokens.tolist() and choice["finish_reason"] == theirs.stop
        content = choice["logprobs"]["content"]
        assert torch.equal(torch.tensor([entry["logprob"] for entry in content], dtype=torch.float32), theirs.logprobs)
        assert [entry["token_id"] for entry in content] == choice["token_ids"]
        assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": len(theirs.tokens)}]
    with torch.no_grad():
        logits = model.module(input_ids=prompt[None]).logits[0]
    logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, prompt[1:, None])[:, 0]
    torch.testing.assert_close(wire.decode_probe(found, prompt), logprobs, rtol=0, atol=1e-4)
    models = httpx.get(f"{arithmetic.address}/v1/models").json()
    assert [one["id"] for one in models["data"]] == ["arithmetic-base"]


def test_the_likeliest_token_at_temperature_0(arithmetic: Server) -> None:
    body = {"token_ids": [3, 12, 4, 15], "sampling_params": {"temperature": 0, "n": 3, "max_tokens": 4}}
    _, found = arithmetic.post(wire.GENERATE, body)
    assert len({tuple(choice["token_ids"]) for choice in found["choices"]}) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"sampling_params": {"temprature": 1}},
            "sampling_params.temprature: is unknown or unsupported; did you mean 'temperature'?",
        ),
        (
            {"sampling_params": {"temperature": -1}},
            "sampling_params.temperature: Input should be greater than or equal to 0, not -1",
        ),
        ({"sampling_params": {"presence_penalty": 1}}, "sampling_params.presence_penalty: "),
        ({"sampling_params": {"max_tokens": "6"}}, "sampling_params.max_tokens: Input should be a valid integer, not '6'"),
        ({"sampling_params": {"max_tokens": 5000}}, "max_tokens: a prompt of 1 tokens and 5000 more exceed the model's"),
        ({"sampling_params": {"logprobs": 3}}, "sampling_params.logprobs: "),
        ({"sampling_params": {"stop_token_ids": [99]}}, "stop_token_ids: 99 is no token: the vocabulary has 17"),
        ({"token_ids": [3, 17]}, "token_ids: 17 is no token: the vocabulary has 17"),
        ({"token_ids": []}, "token_ids: List should have at least 1 item"),
        ({"groupwise": {"ofset": 1}}, "groupwise.ofset: is unknown or unsupported; did you mean 'offset'?"),
        ({"model": "other"}, "model: 'other' is not served here; 'arithmetic-base' is"),
        ({"stream": True}, "stream: is unknown or unsupported"),
    ],
)
def test_bad_requests_are_named(arithmetic: Server, body: dict[str, Any], message: str) -> None:
    code, found = arithmetic.post(wire.GENERATE, {"token_ids": [3], **body})
    assert code == 400 and found["error"]["message"].startswith(message), found
    assert arithmetic.process.text.count("\n") == 1, "nothing is printed"


def test_bodies_that_are_no_json(arithmetic: Server) -> None:
    url, header = f"{arithmetic.address}{wire.GENERATE}", {"content-type": "application/json"}
    for content, headers, message in (
        (b"{", header, "the body is no JSON"),
        (b"[" * 100_000, header, "the body is no JSON"),
        (b"[]", header, "the body: Input should be"),
        (b"{}", {"content-type": "text/plain"}, "the header Content-Type must be application/json"),
    ):
        found = httpx.post(url, content=content, headers=headers)
        assert found.status_code == 400 and found.json()["error"]["message"].startswith(message)
    assert arithmetic.post("/pause?mode=stop")[1]["error"]["message"] == "mode: 'stop' is not one of 'keep', 'wait', 'abort'"
    assert httpx.get(f"{arithmetic.address}/nothing").status_code == 404


# --- weights and pauses


def test_weights_change_while_requests_run(tiny: Server, weights: dict[str, Path]) -> None:
    modules = [LanguageModel.load(str(weights[name])) for name in ("first", "second", "third")]
    steps = tiny.health()["steps"]

    async def run() -> tuple[Completion, ...]:
        async with tiny.client() as client:
            task = asyncio.ensure_future(client.generate(LONG))
            for version, name in enumerate(("second", "third"), 1):
                await tiny.until(lambda found, least=steps + 10 * version: found["steps"] >= least)  # type: ignore[misc]
                await client.load(Published(directory=weights[name], id=f"{name} weights", version=version))
            return await task

    for completion in wait_for(run()):
        for span in completion.versions:
            expected = logprobs(modules[span.version], LONG.prompt, completion.tokens)[span.start : span.end]
            torch.testing.assert_close(completion.logprobs[span.start : span.end], expected, rtol=0, atol=1e-4)
    assert {span.version for completion in wait_for(run_again(tiny)) for span in completion.versions} == {2}
    assert tiny.health()["id"] == "third weights"


def logprobs(model: LanguageModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.module(input_ids=torch.cat([prompt, tokens])[None]).logits[0]
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]


async def run_again(server: Server) -> tuple[Completion, ...]:
    async with server.client() as client:
        client.given.add(Published(directory=Path(), id="third weights", version=2))
        return await client.generate(LONG)


def test_no_step_runs_while_paused(tiny: Server, weights: dict[str, Path]) -> None:
    first = str(weights["first"])
    expected = generate_all(NativeSampler(LanguageModel.load(first), load_tokenizer(first)), [LONG])[0]

    async def run() -> tuple[Completion, ...]:
        async with tiny.client() as client:
            task = asyncio.ensure_future(client.generate(LONG))
            await tiny.until(lambda found: found["rows"] > 0)
            tiny.post("/pause?mode=keep")
            held = asyncio.ensure_future(client.generate(replace(LONG, n=1)))
            await tiny.until(lambda found: found["waiting"] == 1)
            before = tiny.health()
            assert before["paused"] and before["rows"] == LONG.n
            await client.load(Published(directory=weights["first"], id="0", version=0))
            await asyncio.sleep(0.3)
            assert tiny.health()["steps"] == before["steps"]
            tiny.post("/resume")
            return *(await task), *(await held)

    found = wait_for(run())
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        close(ours, theirs)


def test_a_pause_can_wait_for_requests_or_end_them(tiny: Server) -> None:
    async def run() -> None:
        async with tiny.client() as client, httpx.AsyncClient(base_url=tiny.address, timeout=60) as http:
            task = asyncio.ensure_future(client.generate(LONG))
            await tiny.until(lambda found: found["rows"] > 0)
            await http.post("/pause?mode=keep")
            await http.post("/pause?mode=wait")
            assert tiny.health()["rows"] == 0
            assert len(await task) == LONG.n
            held = asyncio.ensure_future(client.generate(LONG))
            await tiny.until(lambda found: found["waiting"] == 1)
            await http.post("/resume")
            await held
            doomed = asyncio.ensure_future(client.generate(LONG))
            await tiny.until(lambda found: found["rows"] > 0)
            await http.post("/pause?mode=abort")
            with pytest.raises(Unavailable, match="ended the request"):
                await doomed
            await http.post("/resume")
            await tiny.until(lambda found: found["rows"] == 0)
            assert len(await client.generate(LONG)) == LONG.n

    wait_for(run())


def test_other_models_weights_are_refused_and_nothing_changes(tiny: Server, weights: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in weights["second"].iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    for directory, message in (
        (weights["other"], "its model_type is 'gemma', and here 'qwen3'"),
        (tmp_path / "nothing", "no model has been published there"),
        (damaged, "cannot be read"),
    ):
        code, found = tiny.post(wire.LOAD, {"directory": str(directory), "id": "1"})
        assert code == 400 and message in found["error"]["message"], found
    assert tiny.health()["id"] == "0" and tiny.health()["status"] == "ok"


def test_a_client_that_goes_frees_its_rows(tiny: Server) -> None:
    async def run() -> None:
        async with tiny.client() as client:
            task = asyncio.ensure_future(client.generate(LONG))
            await tiny.until(lambda found: found["rows"] > 0)
            tiny.post("/pause?mode=keep")
            before = tiny.health()
            task.cancel()
            await asyncio.sleep(0.2)
            tiny.post("/resume")
            after = await tiny.until(lambda found: found["rows"] == 0)
            assert before["rows"] == LONG.n and after["steps"] <= before["steps"] + 2

    wait_for(run())


# --- agents

TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculates.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@pytest.fixture(scope="module")
def agents(launcher: Launcher, logs: Path) -> Iterator[Server]:
    server = Server(launcher, "tools-base", logs, "--set", "rollouts.max_tokens=60")
    yield server
    server.end()


def test_an_agents_turns_keep_their_tokens(agents: Server) -> None:
    asked = {"tools": [TOOL], "return_token_ids": True, "logprobs": True}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 12+7*3?"}]
    ids: list[int] = []
    kept = set()
    for turn in range(4):
        code, found = agents.post("/v1/chat/completions", {**asked, "messages": messages, "seed": turn})
        assert code == 200, found
        (choice,) = found["choices"]
        assert found["prompt_token_ids"][: len(ids)] == ids, "what was sampled stays as it was"
        assert [entry["logprob"] <= 0 for entry in choice["logprobs"]["content"]] == [True] * len(choice["token_ids"])
        assert found["usage"]["completion_tokens"] == len(choice["token_ids"]) <= 60
        ids = found["prompt_token_ids"] + choice["token_ids"]
        kept.add(agents.health()["kept"])
        # As a client of OpenAI's sends it back, with fields that are null.
        messages += [{**choice["message"], "refusal": None, "audio": None}]
        calls = choice["message"].get("tool_calls")
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": "33"} for call in calls or []]
        messages += answers or [{"role": "user", "content": [{"type": "text", "text": "Are you sure?"}]}]
    assert kept == {1}, "each turn continues the keys of the one before"


def test_what_was_held_elsewhere_is_read_from_its_messages(agents: Server) -> None:
    call = {"id": "0", "type": "function", "function": {"name": "calculate", "arguments": '{"expression": "1+1"}'}}
    messages = [
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "0", "content": "2"},
    ]
    code, found = agents.post("/v1/chat/completions", {"messages": messages, "tools": [TOOL], "return_token_ids": True, "n": 2})
    assert code == 200 and len(found["choices"]) == 2
    text = load_tokenizer("tools-base").decode(found["prompt_token_ids"])
    assert '{"name": "calculate", "arguments": {"expression": "1+1"}}' in text and "<tool_response>\n2\n" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role: 'robot' is not one of system, "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content: only parts of the type 'text'",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls.0: is no call"),
        ({"stream": True}, "stream: Input should be False"),
        ({"response_format": {"type": "json_object"}}, "response_format: is unknown or unsupported"),
        ({"max_tokens": 100_000}, "max_tokens: a prompt of "),
        ({"tools": [{"type": "function"}]}, "a tool's schema has no name"),
    ],
)
def test_bad_chats_are_named(agents: Server, body: dict[str, Any], message: str) -> None:
    code, found = agents.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "1+1="}], **body})
    assert code == 400 and found["error"]["message"].startswith(message), found


def test_a_model_without_a_chat_template_says_so(arithmetic: Server) -> None:
    code, found = arithmetic.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "1+1="}]})
    assert code == 400 and "needs a tokenizer with a chat template" in found["error"]["message"]


# --- the process


def test_requests_under_way_are_ended_when_it_is_asked_to_stop(launcher: Launcher, logs: Path, weights: dict[str, Path]) -> None:
    server = Server(launcher, weights["first"], logs)

    async def run() -> None:
        async with server.client() as client:
            task = asyncio.ensure_future(client.generate(LONG))
            await server.until(lambda found: found["rows"] > 0)
            server.process.send(signal.SIGTERM)
            with pytest.raises(Unavailable):
                await task

    wait_for(run())
    assert server.process.ends(20) == 143
    assert server.process.text.count("\n") == 1


def test_what_cannot_be_served_is_named(launcher: Launcher, logs: Path, arithmetic: Server) -> None:
    for arguments, message in (
        (["no-such-model"], "no model 'no-such-model'"),
        (["arithmetic-base", "--port", arithmetic.address.rpartition(":")[2]], "cannot listen at 127.0.0.1 port"),
        (["arithmetic-base", "--set", "rollouts.max_rows=0"], "rollouts.max_rows"),
    ):
        output = logs / f"{abs(hash(message))}.log"
        process = launcher.start(["serve", *arguments], output)
        assert process.ends(60) == 2
        assert message in process.text and "Traceback" not in process.text
