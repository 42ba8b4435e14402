"""Against `renderers` (Prime Intellect), which writes the ids of a model family by hand instead of running its chat template.

Compared are prompts, what follows a turn, and parsed calls, for the families that both know; the tokenizers are ours, with the
families' special tokens.
"""

import random
from typing import Any

import pytest
import torch

from groupwise.models import Call, Conversations
from tests.test_conversation import (
    TOOLS,
    canonical_turn,
    conversations,
    ids_of,
    known,
    random_calls,
    random_replies,
    said_of,
    text,
)

renderers = pytest.importorskip("renderers")


def renderer(name: str, talk: Conversations) -> Any:
    config = {
        "qwen3": renderers.Qwen3RendererConfig,
        "llama3": renderers.Llama3RendererConfig,
        "glm": renderers.GLM45RendererConfig,
    }[name]
    return renderers.create_renderer(talk.chat.tokenizer, config(thinking_retention="all"))


def stripped(call: Call, name: str) -> tuple[str, dict[str, Any]]:
    """renderers strips whitespace from arguments in GLM's tags."""
    arguments = {
        key: value.strip() if name == "glm" and isinstance(value, str) else value for key, value in call.arguments.items()
    }
    return call.name, arguments


@pytest.mark.parametrize("name", ["qwen3", "llama3", "glm"])
def test_ids_equal_those_of_renderers(name: str) -> None:
    talk, chance = conversations(name), random.Random(name)
    oracle = renderer(name, talk)
    assert set(talk.stop_tokens) <= set(oracle.get_stop_token_ids())
    turns = 0
    for _ in range(60):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Q" + text(chance)}]
        if chance.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "Be brief." + text(chance)})
        S = talk.prompt(messages).tolist()
        assert oracle.render_ids(messages, tools=TOOLS, add_generation_prompt=True) == S
        for _turn in range(chance.randrange(1, 4)):
            calls = random_calls(talk, chance)
            content = "" if name == "llama3" and calls else chance.choice(["Well", "So be it."])
            said, replies = said_of(talk, calls, content), random_replies(calls, chance)
            replies = [{**reply, "content": "R" + text(chance)} for reply in replies]
            before, turn = canonical_turn(talk, messages, said, replies)
            if chance.random() < 0.2 and name != "glm":  # where renderers ends a truncated turn with <|endoftext|>
                turn = ids_of(talk, "I was about to")
            elif calls:
                parsed = oracle.parse_response(turn, tools=TOOLS, prompt_ids=S)
                ours = talk.parse(torch.tensor(turn), torch.tensor(before)).calls
                assert known(ours) == known(calls)
                assert [(call.name, call.arguments) for call in parsed.tool_calls] == [stripped(call, name) for call in ours]
            bridged = oracle.bridge_to_next_turn(S, turn, replies, tools=TOOLS)
            S = [*S, *turn, *talk.after(torch.tensor(turn), replies).tolist()]
            assert bridged is not None and list(bridged.token_ids) == S
            messages, turns = [*messages, said, *replies], turns + 1
    assert turns > 60
