"""Supervised examples as rows: completions of a prompt, and conversations of which the assistant's turns are trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models import Chat
from groupwise.types import Batch, Demonstration, pad_rows

Row = tuple[Tensor, Tensor, Tensor]
"""Prompt int64 [L], completion int64 [T], and its mask bool [T]."""


def demonstration_batch(chat: Chat, shown: Sequence[Demonstration], tools: Sequence[Sequence[Any]] = ()) -> Batch:
    """Demonstrations as rows, the shortest first, each with its own prompt.

    Args:
        chat: how prompts are written.
        shown: the demonstrations.
        tools: for each demonstration the schemas of the tools in its prompt; empty: none.
    """
    rows = [
        conversation_row(chat, item, schemas) if item.messages else completion_row(chat, item)
        for item, schemas in zip(shown, tools or [()] * len(shown), strict=True)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    prompts, tokens, masks = zip(*rows, strict=True)
    tokens_BT = pad_rows(tokens)
    return Batch(
        rows_B=torch.arange(len(rows)),
        prompts=tuple(prompts),
        group_ids_B=torch.arange(len(rows)),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor([len(row) for row in tokens]),
        mask_BT=pad_rows(masks),
        rollout_logprobs_BT=torch.zeros(tokens_BT.shape),
    )


def completion_row(chat: Chat, shown: Demonstration) -> Row:
    """A completion and its end, all of it trained on."""
    ids = chat.tokenizer(shown.completion, add_special_tokens=False).input_ids
    tokens = torch.tensor([*ids, chat.tokenizer.eos_token_id])
    mask = torch.ones(len(tokens), dtype=torch.bool)
    mask[0] = not shown.skip_first
    return chat.encode(shown.prompt), tokens, mask


def conversation_row(chat: Chat, shown: Demonstration, tools: Sequence[Any]) -> Row:
    """A conversation, of which the assistant's turns are trained on, each with the token that ends it.

    Raises:
        UserError: the chat template does not write a conversation as the beginning of a longer one.
    """
    pieces = conversation_pieces(chat, shown, tools)
    ids = [torch.tensor(chat.tokenizer(text, add_special_tokens=False).input_ids) for text, _ in pieces]
    masks = [torch.full(piece.shape, said) for piece, (_, said) in zip(ids, pieces, strict=True)]
    turns = [message for message in shown.messages if message["role"] == "assistant"]
    for message, mask in zip(turns, masks[1::2], strict=True):
        mask[0] = not (shown.skip_first and message.get("tool_calls"))
    return ids[0], torch.cat(ids[1:]), torch.cat(masks[1:])


def conversation_pieces(chat: Chat, shown: Demonstration, tools: Sequence[Any]) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, the prompt first, and whether the assistant said each. It ends with its last turn."""
    end = chat.tokenizer.eos_token

    prompt = chat.messages(shown.prompt)
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(shown.messages):
        if message["role"] != "assistant":
            continue
        before = chat.render([*prompt, *shown.messages[:i]], tools)
        after = chat.render([*prompt, *shown.messages[: i + 1]], tools, generation=False)
        if not (before.startswith(done) and after.startswith(before) and end in after[len(before) :]):
            raise UserError("the chat template rewrites earlier turns, so conversations cannot be demonstrated to it")
        said = after[len(before) :]
        said = said[: said.rindex(end) + len(end)]
        pieces += [(before[len(done) :], False), (said, True)]
        done = before + said
    return pieces


def demonstration_text(chat: Chat, shown: Sequence[Demonstration], tools: Sequence[Sequence[Any]]) -> str:
    """Everything that demonstrations say, prompts included."""
    texts = []
    for item, schemas in zip(shown, tools, strict=True):
        if item.messages:
            texts += [text for text, _ in conversation_pieces(chat, item, schemas)]
        else:
            texts += [chat.tokenizer.decode(chat.encode(item.prompt)) if chat.template else item.text, item.completion]
    return "".join(texts)
