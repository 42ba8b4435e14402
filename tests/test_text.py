"""Texts of models, datasets and users are shown harmless: on the terminal, in files, in the report."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import groupwise as gw
from groupwise.config import dump
from groupwise.terminal import Terminal
from groupwise.text import json_line, shortened, visible
from groupwise.training.rollout_text import readable, samples
from groupwise.types import Completion, Group, Problem, Score
from tests.hostile_texts import TEXTS, harms
from tests.test_evidence import browser, groupwise, needs_browser, opened

__all__ = ["browser"]
STYLE = re.compile(r"\x1b\[[0-9;]*m")
REDRAWN = re.compile(r"\x1b\[(\?25[lh]|[0-9]*[AK])|\r")
"""What a live display of rich writes to draw itself again."""
ORDINARY = {
    "arabic": "مرحبا بالعالم، 123!",
    "persian": "می\u200cخواهم",
    "hebrew": "שלום עולם",
    "hindi": "क्\u200dष हिन्दी",
    "thai": "ภาษาไทยที่นี่",
    "chinese": "你好\u3000世界，「数学」",
    "korean": "안녕하세요",
    "french": "l’été\u00a0: 10\u202f000\u00a0€",
    "decomposed": "e\u0301 a\u0302\u0301 n\u0303",
    "emoji": "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 ❤\ufe0f",
    "mathematics": "∀ε>0 ∃δ: |x−a|<δ ⇒ 𝑓(𝑥)≠∞ ∑ᵢ√2",
    "code": "if x[0] < \"a\":\n\treturn {'b': ~1}  # \\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_hidden_is_shown(text: str) -> None:
    assert not harms(visible(text)) and "\n" not in visible(text)
    assert not harms(visible(text, lines=True).replace("\t", " "))
    assert visible(visible(text)) == visible(text)
    for written in (json_line(text), dump({"text": text, "table": {text: 1}}) if is_unicode(text) else "text = 1"):
        assert not harms(written.replace("\t", " "))
    assert json.loads(json_line(text)) == text
    if is_unicode(text):
        assert tomllib.loads(dump({"text": text, "table": {text: 1}})) == {"text": text, "table": {text: 1}}


def is_unicode(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert visible(text, lines=True) == text


def test_long_texts_are_shortened() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("a" * 750 + "b" * 10**6 + "c" * 250, 1000) == f"{'a' * 750} [… 1,000,000 characters left out …] {'c' * 250}"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_terminal_shows_text_as_text(text: str) -> None:
    text = text[:5000]
    table = Table("a", text, title=text)
    table.add_row(text, Text(text, style="bold"))
    for shown in (text, Text(text, style="red"), table, Panel(text, title=Text(text)), Text.assemble(("a", "red"), text)):
        file = io.StringIO()
        Terminal(file=file, force_terminal=True, color_system="truecolor", width=90).print(shown)
        written = STYLE.sub("", file.getvalue())
        assert not harms(written)
    file = io.StringIO()
    Terminal(file=file, width=90).print(text, soft_wrap=True)
    assert file.getvalue() == visible(text, lines=True).expandtabs() + "\n"


def group_of(best: str, worst: str, prompt: str = "1+1=", answer: str = "2") -> Group:
    def completion(text: str) -> Completion:
        tokens = torch.ones(1, dtype=torch.long)
        return Completion(text=text, tokens=tokens, logprobs=torch.zeros(1), mask=tokens.bool(), stop="stop", versions=())

    problem = Problem(id=prompt, prompt=prompt, answer=answer)
    scores = (Score(reward=1.0, correct=True), Score(reward=0.0, correct=False))
    return Group(problem=problem, prompt_tokens=torch.ones(1), completions=(completion(best), completion(worst)), scores=scores)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_no_text_forges_the_headers_of_a_rollout_or_fills_the_file(text: str) -> None:
    group = group_of(text, text, prompt=text, answer=text)
    lines = readable(group).splitlines()
    headers = [line for line in lines if not line.startswith("|")]
    assert len(headers) == 3 and headers[0].startswith("=== 1 of 2 right; answer ")
    assert headers[1:] == ["--- best: reward 1", "--- worst: reward 0"]
    assert not harms(readable(group).replace("\t", " "))
    assert len(readable(group)) < 250_000
    for sample in samples(group):
        assert json.loads(json_line(sample)) == sample and sample["completion"] == sample["prompt"] == text


SAMPLER = '''
from dataclasses import replace
from groupwise.rollouts.native import NativeSampler
from tests.hostile_texts import TEXTS

texts = list(TEXTS.values())

class Hostile(NativeSampler):
    said = 0

    async def generate(self, request):
        drawn = await super().generate(request)
        Hostile.said += len(drawn)
        return tuple(replace(c, text=texts[(Hostile.said + i) % len(texts)]) for i, c in enumerate(drawn))


def hostile(settings, model, tokenizer):
    return Hostile(model, tokenizer, max_rows=settings.max_rows)


class Task:
    """[/x] \\x1b[31m"""
    name = "[/x] \\x1b]0;title\\x07 \\u202e"
    scored = 0

    def problem(self, position, seed):
        from groupwise.types import Problem
        return Problem(id=str(position), prompt=f"{position % 9}+1=", answer=texts[position % len(texts)])

    def held_out(self, count):
        from groupwise.types import Problem
        return [Problem(id=f"h{n}", prompt=f"{n}+2=", answer=texts[n]) for n in range(count)]

    def score(self, problem, completions):
        from groupwise.types import Score
        Task.scored += 1
        failed = [Score(reward=0.0, correct=False, failure=completions[0].text)] if Task.scored == 9 else []
        return [*failed, *(Score(reward=Task.scored + i / 9, correct=i > 0) for i in range(len(completions) - len(failed)))]
'''
RECIPE = """extends = "quick"
[task]
name = "own.py:Task"
[rollouts]
sampler = "own.py:hostile"
prompts_per_step = 24
group_size = 2
[training]
steps = 2
eval_problems = 8
tokens_every = 1
"""


def on_terminal(*arguments: str, home: Path) -> tuple[str, int]:
    """What a command writes to a terminal of its own, and its exit code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(gw.__file__).parent.parent), str(Path(__file__).parent.parent)])
    command = [sys.executable, "-m", "groupwise", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=home, env=environment)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        written += some
    os.close(ours)
    return written.decode(), process.wait()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose completions, answers, failures, task and directory are hostile, and what it wrote to its terminal."""
    home = tmp_path_factory.mktemp("hostile")
    (home / "own.py").write_text(SAMPLER)
    (home / "r.toml").write_text(RECIPE)
    run = "run [red] \x1b[31m\u202e"
    written, code = on_terminal("train", "r.toml", "--out", run, home=home)
    assert code == 0, written
    return home / run, written


def test_a_run_full_of_hostile_texts_on_a_terminal(hostile: tuple[Path, str]) -> None:
    run, written = hostile
    plain = REDRAWN.sub("", STYLE.sub("", written))
    assert not harms(plain)
    assert "[/x]" in plain and "run [red] \\x1b[31m\\u202e" in plain and "What it learned" in plain and "Examples" in plain
    assert len(written) < 300_000
    written, code = on_terminal("train", "--resume", "no \x1b[31m[/x]", home=run.parent)
    assert code == 2 and "no \\x1b[31m[/x]: there is no" in written and not harms(STYLE.sub("", written).replace("\r", ""))


def test_a_terminal_that_lacks_letters_shows_their_codes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(gw.__file__).parent.parent)}
    command = [sys.executable, "-m", "groupwise", "report", "数学"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "error: \\u6570\\u5b66: not a run directory" in said.stderr


def test_its_files_are_harmless_and_whole(hostile: tuple[Path, str]) -> None:
    run, _ = hostile
    files = [path for path in run.rglob("*") if path.suffix in (".txt", ".jsonl", ".toml", ".log")]
    assert len(files) >= 6
    for path in files:
        assert not harms(path.read_text(encoding="utf-8").replace("\t", " ")), path
    lines = [line for path in run.glob("rollouts/*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    found = {json.loads(line)["completion"] for line in lines}
    assert found == set(TEXTS.values())
    assert all(path.stat().st_size < 2_000_000 for path in run.glob("rollouts/*.txt"))


@needs_browser
def test_its_report_in_a_browser(hostile: tuple[Path, str], browser: Any, tmp_path: Path) -> None:
    run, _ = hostile
    texts = [text.encode(errors="replace").decode() for text in TEXTS.values()]
    for path in run.glob("tokens/*.parquet"):
        table = pq.read_table(path)
        for name, shift in (("text", 0), ("prompt", 7)):
            column = [texts[(i // 3 + shift) % len(texts)] for i in range(len(table))]
            if name == "prompt":  # one for all completions of a group
                column = [texts[group % len(texts)] for group in table["group"].to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(column).dictionary_encode())
        pq.write_table(table, path)
    page_path = tmp_path / "report.html"
    assert not harms(groupwise("report", str(run), "--out", str(page_path)))
    assert not harms(groupwise("check", str(run.parent / "r.toml")))
    assert not harms(groupwise("data", str(run.parent / "r.toml"), "--count", "20"))
    assert not harms(page_path.read_text(encoding="utf-8").split("<style>")[0])
    assert page_path.stat().st_size < 10_000_000
    page, wrong = opened(browser, page_path, viewport={"width": 800, "height": 900})
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined", timeout=20_000)
    page.locator("#completions").scroll_into_view_if_needed()
    page.wait_for_selector("#completions .tokens span")
    assert not harms(page.locator("body").inner_text().replace("\t", " "))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("window.owned === undefined && !document.querySelector('main :is(script, img, iframe, style)')")
    assert wrong == []
