"""Chat templates are programs of a model: none of them computes for ever, fills the memory, or gets out of the sandbox."""

import json
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.errors import UserError
from groupwise.models import Chat, load_tokenizer, templates
from groupwise.models.loading import shipped_path
from groupwise.models.templates import SECONDS
from tests.chat_templates import FAMILIES
from tests.chat_templates import tokenizer as family_tokenizer
from tests.hostile_templates import FOREVER, LARGE, REFUSED, SLOW

QUESTION = ({"role": "user", "content": "What is 6 * 7?"},)
PATIENCE = 1.5 * SECONDS
"""Seconds of computing."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tools-base")


def refusal(tokenizer: Any, template: str, limit: float = PATIENCE) -> str:
    tokenizer.chat_template = template
    began = time.thread_time()
    with pytest.raises(UserError) as caught:
        Chat.build(tokenizer).encode(QUESTION)
    assert time.thread_time() - began < limit
    return str(caught.value)


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_a_template_that_computes_for_ever_is_stopped(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    said = refusal(tokenizer, template, limit=1.5)
    assert said.startswith("the chat template of") and "tools-base was stopped: it computes for more than 0.5 s" in said


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_fills_the_memory_is_stopped_before(tokenizer: Any, template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refusal(tokenizer, template)
    assert said.startswith("the chat template of") and "computes for" not in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # KB


FORMATS = {
    "{{ 'Knowledge date: December 2023, today %s' % 'Monday' }}": "Knowledge date: December 2023, today Monday",
    """{{ '{"name": "%s", "arguments": {%s}}' % ('f', '"x": 1') }}""": '{"name": "f", "arguments": {"x": 1}}',
    """{{ '{{"name": {{"x": {} }} }}'.format(1) }}""": '{"name": {"x": 1 } }',
    "{{ '%(year)04d (%%) 20240101 * %%-3000s' % {'year': 24} }}": "0024 (%) 20240101 * %-3000s",
    "{{ '%5.2f%% of 2024 * 1000' | format(12.345) }}": "12.35% of 2024 * 1000",
    "{{ '{:>5}{!r:.3}, in 2024: {x}'.format(1, 'abcdef', x=2) }}": "    1'ab, in 2024: 2",
}
"""Template -> what it writes, though there are years and braces in it."""


@pytest.mark.parametrize("template", FORMATS)
def test_a_template_that_formats_a_little_is_written(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert tokenizer.decode(Chat.build(tokenizer).encode(QUESTION)) == FORMATS[template]


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_a_template_that_does_what_it_may_not_is_refused(tokenizer: Any, template: str) -> None:
    said = refusal(tokenizer, template, limit=5)
    assert said.startswith("the model's chat template refuses messages of the roles user: ") and len(said) < 1000


def test_only_the_thread_that_renders_is_limited(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the template of another thread goes on while one is stopped."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    tokenizer.chat_template = FOREVER.replace("BODY", "")
    other = load_tokenizer("tools-base")
    said: list[str] = []

    def stopped() -> None:
        with pytest.raises(UserError) as caught:
            Chat.build(tokenizer).encode(QUESTION)
        said.append(str(caught.value))

    thread = threading.Thread(target=stopped)
    thread.start()
    expected = Chat.build(other).render(QUESTION)
    while thread.is_alive():
        assert Chat.build(other).render(QUESTION) == expected
        assert other.apply_chat_template(list(QUESTION), tokenize=False, add_generation_prompt=True) == expected
    assert "computes for" in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_limits_every_template_writes_what_transformers_has_it_write(family: str) -> None:
    tokenizer = family_tokenizer(family)
    call = {"type": "function", "id": "abcdefgh1", "function": {"name": "search", "arguments": {"q": "6*7", "n": [1, None, 2.5]}}}
    schema = {"type": "object", "properties": {"q": {"type": "string", "description": "the <query>"}}, "required": ["q"]}
    tool = {"type": "function", "function": {"name": "search", "description": "Search.", "parameters": schema}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What is\n6 * 7? <b>&amp;"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "search", "tool_call_id": "abcdefgh1", "content": "42"},
        {"role": "assistant", "content": "<think>well</think>It is 42."},
        {"role": "user", "content": "Sure?"},
    ]
    compared = 0
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns], turns[:1] + turns[3:], turns * 100):
        for tools in ((), (tool,)):
            for generation in (False, True):
                arguments = {"tools": list(tools) or None, "add_generation_prompt": generation}
                try:
                    theirs = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
                except (jinja2.TemplateError, TypeError):
                    with pytest.raises(UserError, match="refuses messages"):
                        Chat.build(tokenizer).render(messages, tools, generation)
                    continue
                assert Chat.build(tokenizer).render(messages, tools, generation) == theirs
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize("command", ["check", "data", "train"])
def test_a_command_says_so_in_one_message(command: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped_path("tools-base"), model)
    (model / "chat_template.jinja").write_text(LARGE["doubling with ~"])
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(40))
    )
    (tmp_path / "r.toml").write_text(
        f'extends = "quick"\n[model]\npath = "{model}"\n[task]\nname = "dataset"\npath = "rows.jsonl"\nreward = "last_line"\n'
    )
    result = CliRunner().invoke(app, [command, str(tmp_path / "r.toml")])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert said.count("error:") == 1 and f"the chat template of {model} was stopped: it makes a text of more than" in said
