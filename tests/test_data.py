"""Data in every form: read exactly, split without a leak, in an order that resumes; presets and mixtures."""

import asyncio
import csv
import json
import random
import re
import tomllib
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.config import Recipe, Source, load
from groupwise.errors import UserError
from groupwise.models import Chat, load_tokenizer
from groupwise.rewards.answers import answer_line, last_boxed, last_number
from groupwise.rewards.checkers import CHECKERS
from groupwise.rewards.countdown import countdown, evaluate
from groupwise.tasks.base import build_task, limit_prompts
from groupwise.tasks.mixture import Interleaving, MixtureTask
from groupwise.tasks.presets import PRESETS
from groupwise.training.setup import prepare
from groupwise.types import Problem
from tests.conftest import said
from tests.test_cli import run

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded, and what `datasets` converts lands with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(tmp_path: Path, text: str = "", **task: Any) -> Any:
    return build_task({"name": "dataset", **task}, Source(tmp_path / "recipe.toml", text))


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1), "note": f"n{i}"} for i in range(first, first + count)]


def all_of(task: Any, count: int) -> tuple[list[Problem], list[Problem]]:
    """One epoch of `count` training problems, and what is held out."""
    return [task.problem(i, 0) for i in range(count)], task.held_out(1000)


# forms


def save(form: str, rows: list[dict[str, Any]], home: Path) -> str:
    """The rows in one of the forms; returns what the recipe names."""
    import datasets

    path = home / f"data.{form}"
    if form in ("jsonl", "ndjson"):
        write_lines(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif form in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "directory":
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), path / "train-00000-of-00001.parquet")
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path.name


FORMS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "directory", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_problems(form: str, tmp_path: Path) -> None:
    """Also the same split and order: both depend on the prompts and the seed alone."""
    rows = sums(30)
    reference = build(tmp_path, path=save("jsonl", rows, tmp_path))
    expected = all_of(reference, 27)
    (tmp_path / "other").mkdir()
    task = build(tmp_path, path=f"other/{save(form, rows, tmp_path / 'other')}")
    assert all_of(task, 27) == expected
    assert len(expected[1]) == 3 and {item.metadata["note"] for item in expected[0]} <= {f"n{i}" for i in range(30)}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "directory", "saved"])
def test_streams_have_each_problem_once_an_epoch_and_no_leak(form: str, tmp_path: Path) -> None:
    task = build(tmp_path, path=save(form, sums(50), tmp_path), streaming=True, shuffle_block=7, held_out_share=0.2)
    held = {item.id for item in task.held_out(1000)}
    epoch = 50 - len(held)
    assert 3 <= len(held) <= 20
    drawn = [task.problem(i, 0).id for i in range(3 * epoch * 7)]  # whole blocks and whole epochs
    assert Counter(drawn) == {f"{i}+1=": 21 for i in range(50) if f"{i}+1=" not in held}
    assert drawn[:7] != sorted(drawn[:7], key=lambda text: int(text.split("+")[0])) or drawn[7:14] != sorted(drawn[7:14])


def test_a_stream_resumes_at_any_position(tmp_path: Path) -> None:
    path = save("jsonl", sums(40), tmp_path)
    first = build(tmp_path, path=path, streaming=True, shuffle_block=8)
    drawn = [first.problem(i, 3) for i in range(200)]
    for position in (199, 0, 57, 58, 3, 120):  # backwards too
        again = build(tmp_path, path=path, streaming=True, shuffle_block=8)
        assert again.problem(position, 3) == drawn[position] == first.problem(position, 3)
    assert [first.problem(i, 4) for i in range(40)] != drawn[:40]


def test_cells_of_a_csv_file_stay_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('prompt,answer\n"a, ""b""\nc",007\nd,1e3\ne,NA\n')
    train, held = all_of(build(tmp_path, path="data.csv"), 2)
    assert {(item.prompt, item.answer) for item in train + held} == {('a, "b"\nc', "007"), ("d", "1e3"), ("e", "NA")}


def answer_is(value: str) -> str:
    return f'{{"prompt": "a", "answer": {value}}}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.csv", "prompt,answer\na,1\nb\n", r"data.csv, line 3: 1 cells for 2 columns"),
        ("data.csv", "prompt,prompt\na,1\n", r"line 1: the header must name each column once"),
        ("data.csv", 'prompt,answer\n"a,1\n', r"data.csv, line 2: not CSV"),
        ("data.csv", "", r"no problems in it"),
        ("data.json", '{"prompt": "a"', r"data.json, line 1: not JSON"),
        ("data.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', r"data.json, line 3: not JSON: .* at column 11"),
        (
            "data.json",
            '[{"prompt": "a", "answer": 1}], "rows": [{"prompt": "b", "answer": 1}]',
            r"not JSON: Extra data at column 31",
        ),
        ("data.json", "[1]", r"data.json, row 1: expected an object"),
        ("data.txt", "x", r"'data.txt' is not a .jsonl, .ndjson, .json, .csv, .tsv, .parquet file"),
        ("data.parquet", "x", r"data.parquet cannot be read"),
        ("data.jsonl", answer_is("9" * 5000), r"line 1: a number exceeds the limit"),
        ("data.jsonl", answer_is("[" * 10000 + "]" * 10000), r"line 1: .*nested more than 64"),
        ("data.jsonl", answer_is("[" * 100 + "]" * 100), r"line 1: .*nested more than 64"),
        ("data.jsonl", '{"prompt": "a\\ud800", "answer": 1}', r"line 1: a text is not Unicode"),
        ("data.jsonl", '{"prompt": "a", "answer": null}', r"line 1: 'answer' is null"),
        ("data.jsonl", '{"prompt": [], "answer": 1}', r"line 1: 'prompt' must be a text or a list of messages"),
        ("data.jsonl", '{"prompt": [{"role": "usr", "content": "a"}], "answer": 1}', r"no role 'usr'; did you mean 'user'\?"),
        ("data.jsonl", '{"prompt": [{"role": "user", "content": 3}], "answer": 1}', r"message 1: 'content' must be a text"),
        (
            "data.jsonl",
            '{"prompt": [{"role": "assistant", "content": "so"}], "answer": 1}',
            r"ends with a message of the assistant",
        ),
    ],
)
def test_bad_data_gets_one_message(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        build(tmp_path, path=name)


def test_an_answer_that_is_an_object_is_searched_as_text(tmp_path: Path) -> None:
    """GSM8K's answer stands after #### in a text; in an object it is looked for in its JSON."""
    write_lines(tmp_path / "data.jsonl", [{"question": "q", "answer": {"a": 1}}])
    with pytest.raises(UserError, match=r"line 1: there is no number after '####' in 'answer'"):
        build(tmp_path, path="data.jsonl", preset="gsm8k")


def test_the_line_of_a_csv_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"prompt,answer\n" + b"\xc3\xa9,1\n" * 5000 + b"\xe9,1\n")
    with pytest.raises(UserError, match=r"data.csv, line 5002: not UTF-8: invalid continuation byte"):
        build(tmp_path, path="data.csv")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
LINES = st.one_of(
    st.text(),
    st.binary().map(lambda data: data.decode("latin-1")),
    VALUES.map(json.dumps),
    st.fixed_dictionaries({"prompt": VALUES, "answer": VALUES}).map(json.dumps),
    st.builds(lambda n, c: '{"prompt": ' + c * n, st.integers(0, 3000), st.sampled_from(["[", '{"a":', "9", '"'])),
)


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(LINES, max_size=4), form=st.sampled_from(["jsonl", "json", "csv"]))
def test_no_line_makes_a_traceback(lines: list[str], form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("fuzz")
    (home / f"data.{form}").write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    try:
        task = build(home, path=f"data.{form}")
    except UserError as error:
        message = str(error)
        assert "data." in message and len(message) < 1000
    else:
        assert task.problem(0, 0).id != task.held_out(1)[0].id


# the hub


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """A hub that has these splits of any dataset; returns what it was asked for."""
    import datasets

    asked = []

    load_files = datasets.load_dataset

    def load_dataset(path: str, *, split: str, streaming: bool, name: str | None = None, data_files: str | None = None) -> Any:
        if data_files is not None:
            return load_files(path, data_files=data_files, split=split, streaming=streaming)
        asked.append((path, name, split, streaming))
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        found = datasets.Dataset.from_list(splits[split])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_with_config_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    asked = hub(monkeypatch, {"train": sums(20), "test": sums(6, first=18)})
    task = build(tmp_path, path="some/set", config="main", held_out_split="test", streaming=streaming, shuffle_block=18)
    train, held = all_of(task, 18)
    assert {call[2] for call in asked} == {"train", "test"} and {(*call[:2], call[3]) for call in asked} == {
        ("some/set", "main", streaming)
    }
    assert [item.id for item in held] == [f"{i}+1=" for i in range(18, 24)]
    assert sorted(item.id for item in train) == sorted(f"{i}+1=" for i in range(18))  # 18 and 19 are in both
    task.problem(18, 0)  # the stream has been read to its end
    assert task.problems.dropped["are held out too"] == 2
    with pytest.raises(UserError, match=r"some/set.*Unknown split \"tset\""):
        build(tmp_path, path="some/set", split="tset")


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(path: str, **settings: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    (tmp_path / "r.toml").write_text('[task]\nname = "dataset"\npath = "nobody/nothing"\n')
    result = run("data", str(tmp_path / "r.toml"))
    assert result.exit_code == 2 and "Traceback" not in result.output and "more lines" not in result.output
    assert "no file or directory 'nobody/nothing'" in result.output and "Couldn't reach the Hub" in result.output


# prompts, columns, filters, splits


def test_messages_system_prompts_and_templates(tmp_path: Path) -> None:
    rows = [{"prompt": MESSAGES, "answer": 2}, {"prompt": MESSAGES[1:], "answer": 2}, {"prompt": "2+2?", "answer": 4}]
    write_lines(tmp_path / "data.jsonl", rows)
    task = build(tmp_path, path="data.jsonl", system_prompt="Think.", prompt_template="{prompt} Go.", held_out_share=0.3)
    prompts = {tuple(message["content"] for message in item.prompt) for part in all_of(task, 2) for item in part}
    assert prompts == {("Be brief.", "1+1? Go."), ("Think.", "1+1? Go."), ("Think.", "2+2? Go.")}
    with pytest.raises(UserError, match=r"task.prompt_template: there is no \{prompt\}"):
        build(tmp_path, path="data.jsonl", prompt_template="Go.")


def test_messages_from_parquet_have_no_empty_keys(tmp_path: Path) -> None:
    called = {"role": "tool", "content": "x", "name": "f"}
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}, called], "answer": i} for i in range(4)]
    save("parquet", rows, tmp_path)
    assert build(tmp_path, path="data.parquet").problem(0, 0).prompt[0].keys() == {"role", "content"}


def test_columns_are_renamed_and_nested_keys_found(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "extra": {"gold": i}, "sol": "s"} for i in range(5)]
    write_lines(tmp_path / "data.jsonl", rows)
    task = build(tmp_path, path="data.jsonl", prompt_key="q", answer_key="extra.gold", columns={"solution": "sol"})
    problem = task.problem(0, 0)
    assert problem.answer == problem.prompt[:-1]
    assert problem.metadata == {"extra": {"gold": int(problem.answer)}, "solution": "s"}
    with pytest.raises(UserError, match=r"line 1: no 'soll'; did you mean 'sol'\?"):
        build(tmp_path, path="data.jsonl", prompt_key="q", answer_key="extra.gold", columns={"solution": "soll"})


def test_columns_can_be_swapped_and_used_twice(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"prompt": str(i), "answer": f"{i}?", "note": f"n{i}"} for i in range(5)])
    swapped = {"prompt": "answer", "answer": "prompt", "same": "note", "again": "note"}
    problem = build(tmp_path, path="data.jsonl", columns=swapped).problem(0, 0)
    assert problem.prompt == f"{problem.answer}?"
    assert problem.metadata == {"same": f"n{problem.answer}", "again": f"n{problem.answer}"}


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"prompt": "1" * n, "answer": n} for n in range(1, 41)])
    task = build(tmp_path, path="data.jsonl", max_prompt_tokens=30)
    before = {item.id for item in task.held_out(10)}
    source = Source(tmp_path / "r.toml", "")
    chat = Chat.build(load_tokenizer("arithmetic-base"))
    limit_prompts(task, chat, source)
    held = {item.id for item in task.held_out(10)}
    assert held == {text for text in before if len(text) <= 30}
    train = {task.problem(i, 0).id for i in range(30 - len(held))}
    assert train | held == {"1" * n for n in range(1, 31)}
    assert sum(task.problems.dropped.values()) == 10 and "more than 30 tokens" in task.left_out()
    tight = build(tmp_path, path="data.jsonl", max_prompt_tokens=1)
    with pytest.raises(UserError, match=r"task.max_prompt_tokens: no held-out problem has a prompt of at most 1 tokens"):
        limit_prompts(tight, chat, source)


TOOL = """
def lookup(key: str) -> str:
    \"\"\"Look a key up.

    Args:
        key: The key.
    \"\"\"
    return key
"""


def test_prompts_are_shown_and_limited_with_the_tools_in_them(tmp_path: Path) -> None:
    """`data` prints the token ids of the very prompt that `check` prints, and both count its tokens against the limit."""
    (tmp_path / "tools.py").write_text(TOOL)
    write_lines(tmp_path / "data.jsonl", sums(20))
    path = tmp_path / "recipe.toml"
    text = (
        "[model]\npath = 'tools-base'\n[task]\nname = 'dataset'\npath = 'data.jsonl'\n[environment]\ntools = ['tools.py:lookup']"
    )
    path.write_text(text)
    ready = prepare(*load(path, Recipe))
    length = len(ready.prompt(ready.problem))
    assert length > len(ready.chat.encode(ready.problem.prompt)) + 10
    shown = run("data", path)
    assert shown.exit_code == 0, shown.output
    assert f"prompt 1: {length} tokens" in shown.stdout and "lookup" in shown.stdout
    assert int(re.search(r"longest (\d+)", shown.stdout)[1]) >= length  # type: ignore[index]
    for command in ("data", "check"):
        refused = run(command, path, "--set", f"task.max_prompt_tokens={length - 5}")
        assert refused.exit_code == 2 and "task.max_prompt_tokens" in refused.stderr, refused.output
    assert "calculator" in run("data", "calculator", "--count", "1").stdout


def test_a_stream_that_leaves_nothing_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[task]\nname = 'dataset'\npath = 'data.jsonl'\nstreaming = true\n")
    write_lines(tmp_path / "data.jsonl", sums(40))
    tight = run("check", path, "--set", "task.max_prompt_tokens=1")
    assert tight.exit_code == 2 and "recipe.toml, line 3, task.path: the stream has no problem to train on" in tight.stderr
    assert "have a prompt of more than 1 tokens" in tight.stderr
    write_lines(tmp_path / "data.jsonl", sums(1))
    one = run("check", path)
    assert one.exit_code == 2 and "recipe.toml, line 1, [task]: no problem is held out for evaluations" in one.stderr


def test_a_system_prompt_needs_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[task]\nname = 'dataset'\npath = 'data.jsonl'\nsystem_prompt = 'Be brief.'\n")
    write_lines(tmp_path / "data.jsonl", sums(40))
    assert "recipe.toml, line 4, task.system_prompt: needs a chat template" in run("check", path).stderr


def test_the_same_prompt_is_never_in_both(tmp_path: Path) -> None:
    """Rows repeated within a file and between two; and what is held out does not depend on the order of rows."""
    rows = sums(40)
    write_lines(tmp_path / "a.jsonl", rows + rows[:15])
    random.Random(1).shuffle(rows)
    write_lines(tmp_path / "b.jsonl", rows)
    first, second = (build(tmp_path, path=name) for name in ("a.jsonl", "b.jsonl"))
    assert {item.id for item in first.held_out(99)} == {item.id for item in second.held_out(99)}
    assert first.problems.dropped["repeat an earlier problem"] == 15
    train, held = all_of(first, 36)
    assert len({item.id for item in train}) == 36 and not {item.id for item in train} & {item.id for item in held}
    write_lines(tmp_path / "held.jsonl", sums(10, first=35))
    train, held = all_of(build(tmp_path, path="a.jsonl", held_out_path="held.jsonl"), 35)
    assert {item.id for item in train} == {f"{i}+1=" for i in range(35)} and len(held) == 10


def test_an_id_column_tells_equal_prompts_apart(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"prompt": "Play.", "answer": "", "seed": i} for i in range(10)])
    task = build(tmp_path, path="data.jsonl", id_key="seed")
    train, held = all_of(task, 9)
    assert sorted(item.metadata["seed"] for item in train + held) == list(range(10))


def test_the_resolved_task_is_the_same_task(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"question": f"{i}", "answer": f"so\n#### {i}"} for i in range(20)])
    task = build(tmp_path, preset="gsm8k", path="data.jsonl")
    again = build_task(task.model_dump(), Source(tmp_path / "elsewhere" / "recipe.toml", ""))
    assert again.model_dump() == task.model_dump() and all_of(again, 18) == all_of(task, 18)


# several sources


@given(st.lists(st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0, 7.0, 1000.3]), min_size=1, max_size=4))
def test_interleaving_is_a_bijection_in_proportion(weights: list[float]) -> None:
    """Each source's positions come in order, each once; after n positions a source is within one turn of its share."""
    interleaving = Interleaving.of(weights)
    seen: Counter[int] = Counter()
    for position in range(100):
        source, place = interleaving.at(position)
        assert place == seen[source]
        seen[source] += 1
        for i, weight in enumerate(weights):
            share = float(Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights))
            assert abs(seen[i] - share * (position + 1)) < len(weights)
    far = 10**12 + 17
    assert interleaving.at(far)[1] <= far


def test_sources_have_their_own_settings_and_share_no_held_out_problem(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", sums(30))
    write_lines(tmp_path / "b.jsonl", [{"question": f"{i}+1=", "answer": f"#### {i + 1}"} for i in range(10, 60)])
    second = {"path": "b.jsonl", "preset": "gsm8k", "prompt_template": "Q: {prompt}"}
    task = build(tmp_path, held_out_share=0.2, sources=[{"path": "a.jsonl", "weight": 3}, second])
    assert isinstance(task, MixtureTask)
    drawn = [task.problem(i, 0) for i in range(400)]
    assert Counter(item.source for item in drawn) == {0: 300, 1: 100}
    held = task.held_out(1000)
    assert len(held) == 6 + 10 and Counter(item.source for item in held[:8]) == {0: 6, 1: 2}
    assert not {item.id for item in drawn} & {item.id for item in held}
    score = asyncio.run(task.score(drawn[[item.source for item in drawn].index(1)], [said("#### 5"), said("5")]))
    assert [item.verdict for item in score] == ["wrong", "unparsed"]  # by the second source's own reward
    again = build_task(task.model_dump(), Source(tmp_path / "x" / "r.toml", ""))
    assert [again.problem(i, 0) for i in range(50)] == drawn[:50] and again.model_dump() == task.model_dump()


RECIPE = """[task]
name = "dataset"
prompt_kee = "q"
[[task.sources]]
path = "a.jsonl"
[[task.sources]]
path = "a.jsonl"
weight = 0
"""


def test_messages_name_the_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", sums(5))
    sources = [{"path": "a.jsonl"}, {"path": "a.jsonl", "weight": 0}]
    with pytest.raises(UserError, match=r"recipe.toml, line 8, task.sources\[1\].weight: expected a number above 0, not 0"):
        build(tmp_path, RECIPE, sources=sources)
    with pytest.raises(UserError, match=r"recipe.toml, line 3, task.prompt_kee: unknown key; did you mean 'prompt_key'\?"):
        build(tmp_path, RECIPE, prompt_kee="q", sources=sources)
    sources[1] = {"path": "b.jsonl"}
    with pytest.raises(UserError, match=r"recipe.toml, line 7, task.sources\[1\].path: there is no file 'b.jsonl'.*'a.jsonl'"):
        build(tmp_path, RECIPE, sources=sources)


# presets


def verl_row(i: int, index: int) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve {i}. The last line should be of the form Answer: $Answer"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{index}"},
    }


COMPETITION = [{"problem": f"Find {i}.", "answer": f"{i}", "solution": "…"} for i in range(10)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"Q{i}", "answer": f"Half of it is #### 3.\n#### 1,{i}00"} for i in range(10)],
    "math": [
        {
            "problem": f"P{i}",
            "level": "Level 5",
            "type": "Algebra",
            "solution": rf"$\boxed{{0}}$, so $\boxed{{\frac{{{i}}}{{7}}}}$.",
        }
        for i in range(10)
    ],
    "math500": [{**row, "unique_id": "test/1.json"} for row in COMPETITION],
    "aime24": [{**row, "url": "…", "year": "2024"} for row in COMPETITION],
    "aime25": COMPETITION,
    "deepscaler": COMPETITION,
    "polaris": [{"problem": row["problem"], "answer": row["answer"], "difficulty": "3/8"} for row in COMPETITION],
    "dapo": [verl_row(i, i) for i in range(10)] * 2 + [verl_row(77, 3)],
    "verl": [verl_row(i, i) for i in range(10)],
    "countdown": [{"nums": [1, 2, 3 + i], "target": 6 + i} for i in range(10)],
    "code": [
        {
            "problem": f"Add {i}.",
            "starter_code": "",
            "tests": json.dumps([{"input": "1\n", "output": f"{1 + i}", "type": "stdin"}]),
        }
        for i in range(10)
    ],
}
EXPECTED: dict[str, tuple[str, str, str]] = {
    "gsm8k": ("1{i}00", "#### 1,{i}00", "#### 2"),
    "math": (r"\frac{{{i}}}{{7}}", r"it is \boxed{{\dfrac{{{i}}}{{7}}}}", r"\boxed{{9999}}"),
    "countdown": ('{{"nums": [1, 2, {last}], "target": {target}}}', "<answer>1 + 2 + {last}</answer>", "<answer>7</answer>"),
    "dapo": ("{i}", "so\nAnswer: ${i}$", "Answer: 12345"),
    "verl": ("{i}", "Answer: {i}", "#### 12345"),
    "aime25": ("{i}", r"\boxed{{{i}}}", r"\boxed{{12345}}"),
}
"""Of row i: its answer, and completions that are right and wrong."""


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_read_rows_of_their_form(preset: str, form: str, tmp_path: Path) -> None:
    task = build(tmp_path, preset=preset, path=save(form, ROWS[preset], tmp_path))
    assert task.reward == PRESETS[preset].reward
    train, held = all_of(task, 9)
    assert len(held) == 1 and len({item.id for item in train + held}) == 10
    if preset in EXPECTED:
        i = next(
            i for i, row in enumerate(ROWS[preset]) if str(next(iter(row.values()))) in str(train[0].metadata) + train[0].text
        )
        if preset in ("dapo", "verl"):
            i = int(re.findall(r"\d+", train[0].text)[0])
        answer, right, wrong = (text.format(i=i, last=3 + i, target=6 + i) for text in EXPECTED[preset])
        assert train[0].answer == answer
        scores = asyncio.run(task.score(train[0], [said(right), said(wrong), said("no idea")]))
        assert [score.verdict for score in scores] == ["correct", "wrong", "unparsed"]
    if preset == "dapo":
        assert task.problems.dropped["repeat an earlier problem"] == 11  # each twice, and one other text under an index
    if preset in ("gsm8k", "math"):
        assert "####" in train[0].metadata["solution"] or "boxed" in train[0].metadata["solution"]
    if preset == "math":
        assert train[0].answer.startswith(r"\frac{") and r"\boxed{}" in train[0].prompt
    if preset == "code":
        assert train[0].metadata.keys() == {"problem", "starter_code"}  # the tests are the answer
        assert json.loads(train[0].answer)[0]["input"] == "1\n"


def test_a_preset_knows_where_its_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, {"train": ROWS["gsm8k"], "test": [{"question": "T", "answer": "#### 1"}]})
    task = build(tmp_path, preset="gsm8k")
    assert asked == [("openai/gsm8k", "main", "train", False), ("openai/gsm8k", "main", "test", False)]
    assert [item.id for item in task.held_out(9)] == ["T"]
    with pytest.raises(UserError, match=r"no preset 'gms8k'; did you mean 'gsm8k'\?"):
        build(tmp_path, preset="gms8k")
    hub(monkeypatch, {"train": [{"question": "q", "answer": "4"}], "test": []})
    with pytest.raises(UserError, match=r"row 1: there is no number after '####' in 'answer', which ends with '4'"):
        build(tmp_path, preset="gsm8k")


# extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{ \boxed{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{4}", "4"),
        (r"} \boxed{5}", "5"),
        ("boxed{5}", None),
    ],
)
def test_the_last_balanced_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 34", "34"),
        ("**Answer:** $34$", "34"),
        (r"ANSWER : \boxed{34}.", "34"),
        ("Answer: 1\nAnswer: 2", "2"),
        (r"so \boxed{7}", "7"),
        ("Answer: 5" + "." * 400, None),
        ("nothing", None),
    ],
)
def test_dapo_reads_the_last_300_characters(text: str, expected: str | None) -> None:
    assert answer_line(text) == expected


def test_numbers_after_hashes() -> None:
    assert [last_number(text) for text in ("#### 1,234", "#### -5.", "#### 1\n#### $2", "5", "#### 1.2.3", "####  .5")] == [
        "1234", "-5", "2", None, None, ".5",
    ]  # fmt: skip
    assert CHECKERS["gsm8k"]("3", "#### 3.0") == "correct"


def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda a, sign, b: f"({a}{sign} {b})", inner, st.sampled_from("+-*/"), inner)


@settings(max_examples=300)
@given(st.recursive(st.integers(0, 50).map(str), joined, max_leaves=12))
def test_countdowns_arithmetic_is_pythons(text: str) -> None:
    """Against Python's own parser on exact fractions."""
    exact = re.sub(r"\d+", lambda match: f"Fraction({match[0]})", text)
    try:
        expected = eval(exact)
    except ZeroDivisionError:
        expected = None
    assert evaluate(text) == (expected, [int(number) for number in re.findall(r"\d+", text)])


@pytest.mark.parametrize(
    ("said_", "verdict"),
    [
        ("<answer>(6 - 2) * 3</answer>", "correct"),
        ("<answer>9</answer><answer>3*(6-2)</answer>", "correct"),
        ("<answer>3 × (6 − 2)</answer>", "correct"),
        ("<answer>12</answer>", "wrong"),
        ("<answer>6 + 6</answer>", "wrong"),
        ("<answer>6*2</answer>", "wrong"),
        ("<answer>6/(3-3)</answer>", "wrong"),
        ("<answer>(6-2)*3 = 12</answer>", "unparsed"),
        ("<answer>__import__('os')</answer>", "unparsed"),
        ("<answer>2**9**9**9</answer>", "unparsed"),
        ("<answer>" + "(" * 5000 + "</answer>", "unparsed"),
        ("(6-2)*3", "unparsed"),
        ("<answer>6 2</answer>", "unparsed"),
        ("<answer></answer>", "unparsed"),
    ],
)
def test_countdown_by_hand(said_: str, verdict: str) -> None:
    assert countdown('{"nums": [2, 3, 6], "target": 12}', said_) == verdict


# the page


TEXT = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
PAGE = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
GENERAL = [
    {"prompt": f"{i}+1=", "answer": i, "question": f"{i}?", "problem": f"{i}.", "key": {"value": i}, "level": 1} for i in range(9)
]


@pytest.mark.parametrize("number", [i for i, (language, _) in enumerate(PAGE) if language == "toml"])
def test_the_recipes_of_the_page_build_their_tasks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows of their form, in files and on a hub that we made; what the page says of them holds."""
    text = PAGE[number][1]
    if "reasoning-gym" in text:
        pytest.importorskip("reasoning_gym")
    settings = tomllib.loads(text)["task"]
    for _, code in [block for block in PAGE if block[0] == "python"]:
        (tmp_path / code.split("\n")[0].removeprefix("# ")).write_text(code)
    (tmp_path / "rewards.py").write_text("def last_number(problem, completions):\n    return [0.0 for _ in completions]\n")
    rows = ROWS.get(settings.get("preset", ""), GENERAL)
    if "sources" in settings or settings.get("preset") == "gsm8k":
        hub(monkeypatch, {"train": ROWS["gsm8k"], "test": ROWS["gsm8k"][:2]})
    else:
        hub(monkeypatch, {"train": rows, "test": rows[:2]})
    if settings.get("held_out_path", "").startswith("HuggingFace"):
        settings["held_out_path"] = "held.parquet"  # the one hub that we have has one set
    for name in [*re.findall(r'^path = "(\w+\.\w+)"', text, re.MULTILINE), "test.parquet", "held.parquet"]:
        written = rows[:2] if name in ("test.parquet", "held.parquet") else rows
        (tmp_path / save(name.split(".")[1], written, tmp_path)).rename(tmp_path / name)
    task = build_task(settings, Source(tmp_path / "recipe.toml", text))
    drawn = [task.problem(i, 0) for i in range(8)]
    assert not {item.id for item in drawn} & {item.id for item in task.held_out(20)}


def test_demonstrations_are_texts_or_messages(tmp_path: Path) -> None:
    said_so = [{"role": "assistant", "content": "yo"}]
    rows = [{"prompt": f"p{i}", "answer": "a", "completion": said_so} for i in range(4)]
    write_lines(tmp_path / "rows.jsonl", rows)
    shown = build(tmp_path, path="rows.jsonl").demonstration(0, 0)
    assert shown.messages == tuple(said_so) and shown.completion == ""
    write_lines(tmp_path / "rows.jsonl", [{**row, "completion": 5} for row in rows])
    with pytest.raises(UserError, match=r"rows.jsonl: the 'completion' of 'p\d' must be a text, or messages .* not 5"):
        build(tmp_path, path="rows.jsonl").demonstration(0, 0)
