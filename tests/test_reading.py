"""Completions to read: what a run records of them, how they are read, and the page's reader in Chromium."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from groupwise.algorithms import named
from groupwise.errors import UserError
from groupwise.evidence.completions import embedded, readable, step_to_read
from groupwise.evidence.report import write_page
from groupwise.evidence.runs import open_run
from groupwise.evidence.runs_page import packed
from groupwise.text import JOINERS, is_hidden
from groupwise.training import session
from groupwise.training.batching import make_batch
from groupwise.training.checkpoints import Store
from groupwise.training.credit import CreditAssigner, reward_parts, weighted_parts
from groupwise.training.evaluate import Evaluation
from groupwise.training.events import Evaluated
from groupwise.training.metrics import weighted_metrics
from groupwise.training.output import make_console
from groupwise.training.records import RunDirectory
from groupwise.types import LogprobBatch, Score, upgrade
from tests.hostile_texts import TEXTS
from tests.pages import chromium, illegible, inaccessible, needs_browser, opened
from tests.test_methods import group_of, two

# --- what a run records


def test_parts_are_weighted_and_sum_to_the_reward_that_was_trained_on() -> None:
    """The task's components times their weights. Of a limit of 4 tokens 2 are the overlong cache: a completion of 4 loses
    1. DAPO prices a wrong verdict at -1. What components leave of a reward is the remainder."""
    scores = [
        two(1, 0.2),
        two(0, None),
        Score(reward=0.0, correct=False, verdict="wrong"),
        Score.failed("raised"),
        Score(reward=1.0, components={"format": 0.25}),
    ]
    group = group_of(scores, lengths=[2, 4, 2, 2, 2])
    algorithm = named("dapo", overlong_cache=0.5)
    rewards = reward_parts([group], algorithm, 4)
    parts = weighted_parts([group], rewards)
    over = "algorithm/overlong"
    assert parts == [
        {"right": 1.0, "short": 0.1, over: 0.0},
        {"right": 0.0, over: -1.0},
        {"task": -1.0, over: 0.0},
        {},
        {"format": 0.25, "remainder": 0.75, over: 0.0},
    ]
    trained = sum(rewards.values()).tolist()  # type: ignore[union-attr]
    assert [sum(part.values()) for part in parts if part] == pytest.approx([trained[i] for i in (0, 1, 2, 4)])


def test_the_kl_penalty_is_a_part() -> None:
    """Two tokens with log(π_old / π_ref) = 0.5 each, and a coefficient of 0.1: the penalty is 0.1."""
    group, algorithm = group_of([Score(reward=1.0), Score.failed("raised")]), named("reinforce_pp", kl_reward=0.1)
    batch = make_batch([group], algorithm)
    zeros = torch.zeros(batch.tokens_BT.shape)
    batch = upgrade(LogprobBatch, batch, old_logprobs_BT=zeros, ref_logprobs_BT=zeros - 0.5)
    rewards, assigner = reward_parts([group], algorithm, 8), CreditAssigner(algorithm, None, 8)
    training, _ = assigner.assign(batch, [group], rewards, policy_moved=True)
    parts = assigner.parts(training, [group], rewards)
    assert parts == [{"task": 1.0, "algorithm/kl": pytest.approx(-0.1)}, {}]
    recorded = {"shaped_mean": 0.9, "weighted/task": 1.0, "weighted/algorithm/kl": -0.1}
    assert weighted_metrics(parts) == pytest.approx({f"reward/{name}": value for name, value in recorded.items()})


def test_an_evaluation_counts_the_problems_that_its_scores_are_of(tmp_path: Path) -> None:
    groups = [group_of([Score(reward=1.0)]), group_of([Score.failed("raised")])]
    directory = RunDirectory(tmp_path, None)
    directory.record(Evaluated(step=0, evaluation=Evaluation(metrics={"eval/reward": 1.0}, values={}, groups=groups)))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line == {"step": 0, "eval/reward": 1.0, "eval_problems": 1.0, "eval_unscored": 1.0}


SMALL = ("training.steps=2", "training.eval_every=1", "training.eval_problems=120", "rollouts.prompts_per_step=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "run"
    session.run(session.plan("quick", overrides=SMALL, out=path), make_console(quiet=True))
    return path


def test_a_run_records_what_the_reader_shows(run: Path) -> None:
    known = readable(open_run(run))
    assert known == {"tokens": [1, 2], "texts": [(1, 2)], "held_out": [0, 1, 2]}
    tokens, texts = (step_to_read(open_run(run), 2, source) for source in ("tokens", "texts"))
    assert [group["key"] for group in tokens["groups"]] == [group["key"] for group in texts["groups"]]
    completions = [completion for group in tokens["groups"] for completion in group["completions"]]
    assert {tuple(completion["parts"]) for completion in completions} == {("task", "algorithm/overlong")}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(record for record in metrics if record["step"] == 2 and "reward/shaped_mean" in record)
    weighted = [value for name, value in trained.items() if name.startswith("reward/weighted/")]
    assert len(weighted) == 2 and sum(weighted) == pytest.approx(trained["reward/shaped_mean"])
    mean = sum(completion["reward"] or 0 for completion in completions) / len(completions)
    assert mean == pytest.approx(trained["reward/shaped_mean"], abs=1e-3)
    for group in texts["groups"]:  # the text of a completion is its tokens, without the end-of-sequence token
        whole = next(one for one in tokens["groups"] if one["key"] == group["key"])
        assert group["completions"][0]["text"][0] in {
            "".join(item["text"]).removesuffix("<end>") for item in whole["completions"]
        }
    held_out = [step_to_read(open_run(run), step, "held_out") for step in known["held_out"]]
    assert [len(step["groups"]) for step in held_out] == [100, 100, 100] and held_out[0]["left_out"] == 0
    assert [group["key"] for group in held_out[0]["groups"]] == [group["key"] for group in held_out[2]["groups"]]


def test_a_resumed_run_has_no_completions_of_steps_that_it_will_do_again(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    directory = RunDirectory(path, None)
    (path / "evaluations" / ".partial-step-000001.jsonl").write_text("half")
    directory.rewind(1, [], Store(directory.checkpoints, 2), [])
    assert readable(open_run(path)) == {"tokens": [1], "texts": [(1, 1)], "held_out": [0, 1]}
    assert not list(path.glob("*/.partial*"))
    directory.create_again(json.loads((path / "segments.jsonl").read_text().splitlines()[0])["recipe"])
    assert readable(open_run(path)) == {"tokens": [], "texts": [], "held_out": []}


# --- reading


def test_groups_are_read_a_few_at_a_time(run: Path) -> None:
    whole, part = step_to_read(open_run(run), 1, "tokens"), step_to_read(open_run(run), 1, "tokens", 1, 2)
    assert part["groups"] == whole["groups"][1:3] and (part["first"], part["left_out"], whole["left_out"]) == (1, 2, 0)
    cut = step_to_read(open_run(run), 1, "tokens", most_tokens=1)  # one group at least, whole where it is short
    assert len(cut["groups"]) == 1 and cut["groups"] == whole["groups"][:1]
    assert step_to_read(open_run(run), 1, "held_out", 98)["left_out"] == 98
    assert step_to_read(open_run(run), 1, "texts", 99)["groups"] == []


def test_runs_of_earlier_versions_are_read(run: Path, tmp_path: Path) -> None:
    """Without the columns that later versions added; a long completion is cut in its middle."""
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (path / "tokens" / "step-000001.parquet").unlink()
    table = pq.read_table(path / "tokens" / "step-000002.parquet").slice(0, 1)
    table = pa.concat_tables([table.unify_dictionaries()] * 200).drop(["answer", "reward_parts", "turn", "role", "low", "high"])
    table = table.set_column(table.column_names.index("clipped"), "clipped", pa.array([None, True] * 100))
    pq.write_table(table, path / "tokens" / "step-000002.parquet")
    shutil.rmtree(path / "evaluations")
    old = open_run(path)
    assert readable(old) == {"tokens": [2], "texts": [(1, 2)], "held_out": []}
    (group,) = step_to_read(old, 2, "tokens", most_tokens=100)["groups"]
    (completion,) = group["completions"]
    assert (len(completion["text"]), completion["left_out"], completion["start"], completion["tokens"]) == (100, 100, 50, 200)
    assert (completion["parts"], completion["turns"], group["answer"]) == ({}, [], "")
    bound = 1 if (completion["advantage"][0] or 0) > 0 else -1
    assert completion["clipped"] == [None, bound] * 50


LINE = {"prompt": "p", "completion": "[assistant] one\n[tool, 1 failed] two", "turns": [["assistant", 12, 15], ["tool", 33, 36]]}


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({}, ["one", "two"]),
        ({"turns": []}, [LINE["completion"]]),
        ({"turns": [["assistant", 12, 15], ["tool", 14, 36]]}, ["one"]),
        ({"turns": [["assistant", 12, 99]]}, [LINE["completion"]]),
        ({"turns": {"a": 1}}, [LINE["completion"]]),
        ({"turns": [[1, "x", None]]}, [LINE["completion"]]),
        ({"completion": "\x1b[31m\u202ered", "turns": None}, ["\\x1b[31m\\u202ered"]),
        ({"completion": "x" * 3_000_000, "turns": []}, None),
    ],
)
def test_any_line_of_text_is_read(run: Path, tmp_path: Path, change: dict[str, Any], texts: list[str] | None) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    odd = {
        "reward": "much",
        "parts": {"a": 1.0, "b": "x", "c": math.inf, "d\u202e": 2},
        "correct": 1,
        "stop": ["length"],
        "tokens": 1e999,
    }
    lines = ["nonsense", "5", '{"prompt": 1, "completion": "x"}', json.dumps({**LINE, **odd, **change})]
    (path / "rollouts" / "step-000002.jsonl").write_text("\n".join(lines) + "\n")
    (group,) = step_to_read(open_run(path), 2, "texts")["groups"]
    (completion,) = group["completions"]
    if texts is None:
        assert 1_000_000 <= len(completion["text"][0]) <= 1_000_100
    else:
        assert completion["text"] == texts
    assert completion["parts"] == {"a": 1.0, "d\\u202e": 2} and completion["reward"] == 3.0
    assert (completion["correct"], completion["stop"], completion["tokens"]) == (None, "", None)
    if not change:
        assert completion["turns"][1] == {"role": "tool", "label": "tool, 1 failed", "start": 1, "end": 2}
    json.dumps(completion, allow_nan=False)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"\xff\n", b"{}\n"])
@pytest.mark.parametrize("source", ["tokens", "texts", "held_out"])
def test_what_cannot_be_read_is_named(run: Path, tmp_path: Path, source: Any, content: bytes | None) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (file,) = (path / {"tokens": "tokens", "texts": "rollouts", "held_out": "evaluations"}[source]).glob("step-000002.[pj]*")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        step_to_read(open_run(path), 2, source)
    damaged = open_run(path)
    found = [step["step"] for step in embedded([damaged], 1_000_000) if step["source"] == source]
    assert 1 in found and 2 not in found
    assert content is None or any(file.name in line for line in damaged.left_out)


def test_what_a_report_holds_fits_into_its_budget(run: Path, tmp_path: Path) -> None:
    runs = [open_run(run), open_run(shutil.copytree(run, tmp_path / "other"))]
    sizes = []
    for budget in (10_000, 60_000, 10_000_000):
        found = embedded(runs, budget)
        sizes.append(sum(len(packed(step)) for step in found))
        assert 0 < sizes[-1] <= budget
        assert len({step["run"] for step in found}) == 2
    assert sizes == sorted(sizes)
    assert {(step["source"], step["step"]) for step in found} == {
        *(("tokens", step) for step in (1, 2)), *(("texts", step) for step in (1, 2)), *(("held_out", step) for step in (0, 1, 2))
    }  # fmt: skip


# --- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def reading(browser: Any, page_path: Path, **settings: Any) -> tuple[Any, list[str]]:
    page, wrong = opened(browser, page_path, **settings)
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
    page.locator("#completions").scroll_into_view_if_needed()
    page.wait_for_selector("#completions .completion")
    return page, wrong


@pytest.fixture(scope="module")
def page_path(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs with the same prompts."""
    home = tmp_path_factory.mktemp("pages")
    runs = [open_run(run), open_run(shutil.copytree(run, home / "other"))]
    write_page(runs, home / "report.html")
    return home / "report.html"


@needs_browser
def test_reading_tokens(browser: Any, page_path: Path) -> None:
    page, wrong = reading(browser, page_path, viewport={"width": 1024, "height": 900}, color_scheme="light")
    text = page.locator(".tokens").first
    tokens = text.locator(".block span")
    tokens.first.wait_for()  # they are drawn when they come into view
    before = [token.get_attribute("class") for token in tokens.all()]
    assert page.locator("[data-key=step0]").input_value() == "2" and any("high" in name or "low" in name for name in before)
    page.select_option("[data-key=quantity]", "probability")
    assert [token.get_attribute("class") for token in tokens.all()] != before
    text.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    tip = page.locator("#token-tip")
    assert tip.is_visible() and "probability" in tip.inner_text() and "token 2" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    tokens.nth(0).hover()
    assert tip.is_visible()
    assert "algorithm/overlong" in page.locator(".parts").first.inner_text()
    page.select_option("[data-key=order]", "ratio")
    page.check("[data-key=wrong]")
    assert set(page.locator("#completions .verdict").all_inner_texts()) == {"✗ wrong"}
    page.click("[data-key=earlier0]")
    page.wait_for_function("document.querySelector('[data-key=step0]').value === '1'")
    page.evaluate("scrollTo(0, 0)")  # the contents stay at the top, over what is scrolled
    assert not illegible(page) and not inaccessible(page) and wrong == []
    page.close()


@needs_browser
def test_two_evaluations_side_by_side(browser: Any, page_path: Path) -> None:
    page, wrong = reading(browser, page_path, viewport={"width": 390, "height": 900}, color_scheme="dark", locale="zh-CN")
    page.select_option("[data-key=source0]", "held_out")
    page.click("[data-key=compare]")
    assert page.locator("[data-key=run1]").input_value() != page.locator("[data-key=run0]").input_value()
    page.check("[data-key=changed]")
    status = page.locator("#completions [role=status]")
    status.get_by_text("没有符合条件的回复").wait_for()  # the other run is a copy
    page.fill("[data-key=step1]", "0")
    page.keyboard.press("Enter")
    page.wait_for_selector("#completions .group")
    for group in page.locator("#completions .group").all():
        assert len(set(group.locator(".verdict").all_inner_texts())) == 2
    prompt = page.locator("#completions .prompt").first.inner_text()
    page.fill("#completions [type=search]", prompt)
    page.wait_for_function("document.querySelectorAll('#completions .group').length === 1")
    page.evaluate("scrollTo(0, 0)")  # the contents stay at the top, over what is scrolled
    assert not illegible(page) and not inaccessible(page) and wrong == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


@needs_browser
def test_runs_without_common_prompts_are_compared_on_held_out_problems(browser: Any, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for file in (other / "tokens").iterdir():
        table = pq.read_table(file)
        prompts = pa.array([f"Work out {prompt}" for prompt in table["prompt"].to_pylist()]).dictionary_encode()
        pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", prompts), file)
    write_page([open_run(run), open_run(other)], tmp_path / "report.html")
    page, wrong = reading(browser, tmp_path / "report.html", viewport={"width": 1024, "height": 900}, locale="en-GB")
    assert page.locator("#completions .group").count() == 3, "further prompts are asked for"
    folded = page.locator("#completions .facts b").first
    assert folded.inner_text().endswith("× the same") and int(folded.inner_text().split()[0]) > 1
    page.click("[data-key=compare]")
    page.wait_for_function("document.querySelector('[data-key=source1]')?.value === 'held_out'")
    page.wait_for_selector("[data-key=changed]")
    assert page.locator("[data-key=source0]").input_value() == "held_out"
    assert page.locator("#completions .group").first.locator(".side").count() == 2
    for side in (0, 1):
        page.select_option(f"[data-key=source{side}]", "tokens")
    page.locator("#completions [role=status]").get_by_text("no prompt in common").wait_for()
    groups = page.locator("#completions .group").all()
    assert [group.locator(".side").count() for group in groups] == [1, 1, 1] and not page.locator("[data-key=changed]").count()
    assert {group.locator(".side-name").inner_text()[0] for group in groups} == {"A", "B"}
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#token-tip:visible")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_selector("#token-tip", state="hidden")
    assert wrong == []
    page.close()


@needs_browser
def test_hostile_and_long_texts(browser: Any, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    for file in (path / "tokens").iterdir():
        table = pq.read_table(file)
        texts = [text.encode(errors="replace").decode() for text in TEXTS.values()]
        for name in ("text", "prompt", "answer"):
            places = range(len(table)) if name == "text" else table["group"].to_pylist()
            column = pa.array([texts[place % len(texts)] for place in places])
            table = table.set_column(table.column_names.index(name), name, column.dictionary_encode())
        pq.write_table(table, file)
    lines = [{"prompt": "long", "completion": "a needle in a line\n" * 60_000, "turns": []}]
    lines += [{"prompt": text, "answer": text, "completion": text[:9999], "turns": []} for text in TEXTS.values()]
    (path / "evaluations" / "step-000002.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page([open_run(path)], tmp_path / "report.html")
    page, wrong = reading(browser, tmp_path / "report.html", viewport={"width": 390, "height": 900})
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    for source in ("tokens", "held_out"):
        page.select_option("[data-key=source0]", source)
        while page.locator("[data-key=more]").count():
            page.click("[data-key=more]")
        assert page.locator("#completions .group").count() == (4 if source == "tokens" else len(lines))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(
            "window.owned === undefined && !document.querySelector('#completions :is(script, img, iframe, style)')"
        )
        shown = page.locator("#completions").inner_text()
        assert not [letter for letter in shown if is_hidden(ord(letter)) and letter not in "\n\t" + JOINERS]
    page.fill("#completions [type=search]", "NEEDLE")
    page.wait_for_selector("#completions mark")
    seconds = page.evaluate("""async () => {
        const started = performance.now();
        document.querySelector("#completions .completion .more").click();
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        return (performance.now() - started) / 1000;
    }""")
    assert seconds < 2 and page.locator("#completions .block").count() > 50 and wrong == []
    page.close()


def test_tables_are_read_without_loading_more(run: Path) -> None:
    """Which a live page would do while a run begins."""
    code = (
        "import sys\nfrom pathlib import Path\nimport pyarrow.compute as pc\n"
        "from groupwise.evidence.reading import load_arrow\nfrom groupwise.evidence.runs import open_run\n"
        "load_arrow()\nloaded = set(sys.modules)\nrun = open_run(Path(sys.argv[1]))\n"
        "table = run.tokens(run.token_steps()[0])\npc.less(table['reward'], 1.0)\n"
        "print(sorted(name for name in set(sys.modules) - loaded if name.startswith(('pyarrow', 'pandas'))))"
    )
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
