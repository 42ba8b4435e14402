"""What `groupwise serve` runs, in this process: damaged weights, pauses, requests that are too much, senders that may not."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from groupwise.models import Chat, LanguageModel, load_tokenizer
from groupwise.models.published import Published, publish
from groupwise.rollouts import handling, serving, wire
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.driver import wait_for
from groupwise.rollouts.handling import Unavailable
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.serving import Served, make_app
from tests.conftest import tiny_model

CHAT = "/v1/chat/completions"
LONG = Request(prompt=torch.tensor([7, 12, 9]), sampling=Sampling(max_tokens=100), seed=5, n=4)


def served_model(name: str) -> Served:
    tokenizer = load_tokenizer(name)
    sampler = NativeSampler(LanguageModel.load(name), tokenizer, max_rows=64)
    return Served(sampler, Chat.build(tokenizer, None), Sampling(max_tokens=4), name)


@pytest.fixture(scope="module")
def agents() -> Served:
    return served_model("tools-base")


@pytest.fixture
def endless(tokenizer: Any) -> Served:
    """Whose completions do not end by themselves."""
    module = tiny_model("qwen3", tokenizer)
    module.generation_config.eos_token_id = None
    tokenizer = load_tokenizer("arithmetic-base")
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    return Served(NativeSampler(LanguageModel(module), tokenizer), Chat.build(tokenizer, None), Sampling(max_tokens=4), "tiny")


def posted(served: Served, path: str, listens: str = "127.0.0.1", body: Any = None, **headers: str) -> tuple[int, Any]:
    """The code and body of the answer to a request."""
    sent = {"content-type": "application/json", **headers}

    async def run() -> tuple[int, Any]:
        transport = httpx.ASGITransport(app=make_app(served, listens))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            found = await http.post(path, content=json.dumps(body), headers=sent)
            return found.status_code, found.json()

    return wait_for(run())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


# --- weights


def test_nothing_is_sampled_from_weights_of_which_some_could_not_be_read(
    endless: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(endless.sampler.model, tmp_path / "weights")

    def breaks(published: Published) -> None:
        with torch.no_grad():
            next(endless.sampler.model.module.parameters()).mul_(2)
        raise OSError("the disk has gone")

    async def run() -> None:
        task = asyncio.ensure_future(endless.generate(LONG))
        await until(lambda: endless.health()["rows"] == LONG.n)
        with monkeypatch.context() as patch:
            patch.setattr(Published, "load", breaks)
            with pytest.raises(Unavailable, match="the disk has gone"):
                await endless.load(tmp_path / "weights", "1")
        with pytest.raises(Unavailable, match="no weights: "):
            await task
        with pytest.raises(Unavailable):
            await endless.generate(LONG)
        await until(lambda: endless.health()["rows"] == 0)
        assert "the disk has gone" in endless.health()["status"]
        await endless.load(tmp_path / "weights", "2")
        assert {span.version for one in await endless.generate(LONG) for span in one.versions} == {1}

    wait_for(run())


def test_a_pause_that_waits_ends_when_another_takes_its_place(endless: Served) -> None:
    async def run() -> None:
        for follow in (lambda: endless.pause("keep"), lambda: endless.pause("abort"), lambda: asyncio.sleep(0, endless.resume())):
            task = asyncio.ensure_future(endless.generate(LONG))
            await until(lambda: endless.health()["rows"] == LONG.n)
            waits = asyncio.ensure_future(endless.pause("wait"))
            await asyncio.sleep(0)
            await follow()
            await asyncio.wait_for(waits, 5)
            steps = endless.health()["steps"]
            if endless.paused:
                await asyncio.sleep(0.01)
                assert endless.health()["steps"] == steps, "no step runs"
            endless.resume()
            await asyncio.wait({task})
        waits = asyncio.ensure_future(endless.generate(LONG))
        await until(lambda: endless.health()["rows"] == LONG.n)
        await asyncio.gather(endless.pause("wait"), endless.pause("wait"))
        assert waits.done() or len(await waits) == LONG.n
        endless.resume()

    wait_for(run())


# --- requests that are too much


def test_log_probabilities_of_a_prompt_are_computed_beside_the_event_loop(
    endless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, tokens = endless._score, torch.arange(3, 12)

    async def run() -> None:
        expected = await endless.prompt_logprobs(tokens)
        answers: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()

        def slow(tokens: torch.Tensor) -> torch.Tensor:
            asyncio.run_coroutine_threadsafe(answer(), loop).result(5)  # the loop answers meanwhile
            return score(tokens)

        async def answer() -> None:
            answers.append(endless.health())

        monkeypatch.setattr(endless, "_score", slow)
        task = asyncio.ensure_future(endless.generate(LONG))
        await until(lambda: endless.health()["rows"] == LONG.n)
        assert torch.equal(await endless.prompt_logprobs(tokens), expected)
        assert answers[0]["rows"] == LONG.n
        assert len(await task) == LONG.n, "it goes on"

    wait_for(run())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"token_ids": [999_999], "sampling_params": {"prompt_logprobs": 0}}, "token_ids: 999999 is no token"),
        ({"token_ids": [3] * 100_000, "sampling_params": {"prompt_logprobs": 0}}, "max_tokens: a prompt of 100000 tokens"),
        ({"token_ids": [2**63]}, "token_ids.0: Input should be less than 2147483648"),
        ({"sampling_params": {"n": 65}}, "n: 65 completions are more than the rows generated at once, rollouts.max_rows = 64"),
        ({"sampling_params": {"seed": 2**64}}, "sampling_params.seed: Input should be less than 18446744073709551616"),
        ({"sampling_params": {"stop": ""}}, "sampling_params.stop"),
        ({"sampling_params": {"stop": ["a", ""]}}, "sampling_params.stop"),
        ({"groupwise": {"offset": 10**15}}, "groupwise.offset: Input should be less than or equal to"),
        ({"request_id": "\ud800"}, "request_id: half of a surrogate pair is no text"),
    ],
)
def test_bad_requests_are_named(agents: Served, body: dict[str, Any], message: str) -> None:
    code, found = posted(agents, wire.GENERATE, body={"token_ids": [3], **body})
    assert code == 400 and found["error"]["message"].startswith(message), found


def test_too_many_tokens_are_not_scored(endless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_SCORED", 3)
    code, found = posted(endless, wire.GENERATE, body={"token_ids": [3] * 4, "sampling_params": {"prompt_logprobs": 0}})
    assert code == 400 and found["error"]["message"] == "prompt_logprobs: at most 3 tokens are scored at once, not 4"


def test_large_bodies_are_refused(agents: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handling, "MOST_BYTES", 1000)
    code, found = posted(agents, wire.GENERATE, body={"token_ids": [3] * 1000})
    assert code == 400 and found["error"]["message"] == "the body has more than 1000 bytes"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages.0.content: half of a surrogate pair is no text"),
        ({"messages": [{"role": "user", "content": "1", "nmae": "x"}]}, "messages.0.nmae: is unknown or unsupported"),
        ({"messages": [{"role": "user", "content": "1", "name": 5}]}, "messages.0.name: must be a text"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages.0.tool_calls: must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content: only parts"),
        ({"tools": [{"function": 5}]}, "tools.0.function: must be an object"),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters: must be an object"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"properties": {"x": 5}}}}]},
            "tools.0.function.parameters.properties.x: must be an object",
        ),
        ({"seed": 2**64}, "seed: "),
        ({"stop": [""]}, "stop"),
        ({"presence_penalty": 1}, "presence_penalty: "),
    ],
)
def test_bad_chats_are_named(agents: Served, body: dict[str, Any], message: str) -> None:
    code, found = posted(agents, CHAT, body={"messages": [{"role": "user", "content": "1+1="}], **body})
    assert code == 400 and found["error"]["message"].startswith(message), found


def test_what_openai_lets_be_null(agents: Served) -> None:
    names = ("n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "presence_penalty", "frequency_penalty")
    message = {"role": "user", "content": "1+1=", "name": None, "refusal": None}
    code, found = posted(agents, CHAT, body={"messages": [message], **dict.fromkeys((*names, "tools", "tool_choice", "stream"))})
    assert code == 200 and len(found["choices"]) == 1, found


# --- senders


@pytest.mark.parametrize("path", [wire.PAUSE, wire.RESUME, wire.GENERATE])
def test_web_pages_are_not_answered(agents: Served, path: str) -> None:
    code, found = posted(agents, path, origin="https://example.com")
    assert code == 400 and found["error"]["message"].startswith("the header Origin") and not agents.paused


@pytest.mark.parametrize(
    ("listens", "host", "answered"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost:8000", True),
        ("127.0.0.1", "[::1]:8000", True),
        ("127.0.0.1", "example.com:8000", False),
        ("::1", "example.com", False),
        ("localhost", "example.com", False),
        ("0.0.0.0", "sampler.example.com", True),
    ],
)
def test_other_names_for_this_machine_are_refused(agents: Served, listens: str, host: str, answered: bool) -> None:
    code, found = posted(agents, wire.RESUME, listens, host=host)
    assert (code == 200) == answered, found


# --- what is remembered


def test_the_conversations_that_are_remembered_are_the_latest(agents: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.rollouts.chatting.MOST", 2)
    chat = agents.chat

    def say(text: str) -> bytes:
        posted(agents, CHAT, body={"messages": [{"role": "user", "content": text}], "seed": 1})
        return next(reversed(chat._remembered))

    first, second, again, third = (say(text) for text in ("1+1=", "2+2=", "1+1=", "3+3="))
    assert first == again and list(chat._remembered) == [first, third] and second not in chat._remembered
