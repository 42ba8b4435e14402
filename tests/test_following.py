"""Following runs: whatever is written, killed, torn and undone meanwhile, what was followed is what the directory holds."""

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.errors import UserError
from groupwise.evidence.document import MOST_EVENTS, document
from groupwise.evidence.following import Followed, Following, addable
from groupwise.evidence.live.hub import Hub, wait_after
from groupwise.evidence.live.patches import patches
from groupwise.evidence.places import expanded, runs_in
from groupwise.evidence.runs import Run, open_run
from groupwise.evidence.shapes import Document, Patch
from groupwise.evidence.status import status
from groupwise.evidence.tail import Tail
from tests.written import WrittenRun

OPERATIONS = ("step", "step", "step", "evaluate", "note", "tear", "resume", "poll", "poll")


def applied(before: Document, patch: Patch) -> dict[str, Any]:
    """What the page makes of a patch; live.js does the same."""
    before, patch = json.loads(json.dumps([before, patch]))
    data: dict[str, Any] = dict(before) | patch.get("parts", {})
    if moved := patch.get("events"):
        data["events"] = data["events"][: moved["keep"]] + data["events"][moved["keep"] + moved["drop"] :] + moved["add"]
    for part in ("settings", "runs"):
        for member in data[part]:
            member |= patch.get(part, {}).get(member["id"], {})
    figures = {figure["id"]: figure for figure in data["figures"]} | patch.get("figures", {}).get("whole", {})
    for figure, lines in patch.get("figures", {}).get("lines", {}).items():
        for line in figures[figure]["lines"]:
            points = dict(lines.get(line["id"], {"keep": 0}))
            keep = points.pop("keep")
            line |= {key: line[key][:keep] + value if isinstance(value, list) else value for key, value in points.items()}
    data["figures"] = [figures[figure] for figure in patch.get("figures", {}).get("order", figures)]
    return data


def same(followed: Run | None, opened: Run) -> None:
    assert followed is not None
    assert list(followed.steps) == list(opened.steps)
    assert list(followed.evaluations) == list(opened.evaluations)
    assert followed.events == opened.events and followed.recipe == opened.recipe
    assert len(followed.segments) == len(opened.segments)
    assert list(followed.left_out) == list(opened.left_out)


@settings(max_examples=25)
@given(operations=st.lists(st.sampled_from(OPERATIONS), max_size=30), data=st.data())
def test_what_was_followed_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, operations: list[str], data: Any
) -> None:
    """Each document is also the one before with its patch."""
    path = tmp_path_factory.mktemp("followed") / "run"
    followed, written = Followed(path), WrittenRun(path)
    followed.poll()
    written.evaluate()
    shown = document([open_run(path)])
    for operation in [*operations, "poll"]:
        if operation == "poll":
            followed.poll()
            same(followed.run, open_run(path))
            assert followed.run is not None
            now = document([followed.run])
            assert applied(shown, patches(shown, now)) == json.loads(json.dumps(now))
            shown = now
        elif operation == "resume":
            written = WrittenRun(path, resume_at=data.draw(st.integers(0, written.last)))
        elif operation == "note":
            written.note("something was seen")
        else:
            getattr(written, operation)()
    assert not followed.poll()


@pytest.mark.parametrize(
    ("old", "new"), [((0, 3), (0, 5)), ((0, 5), (3, 7)), ((0, 3), (3, 6)), ((0, 0), (0, 2)), ((0, 4), (1, 3))]
)
def test_of_events_that_move_on_the_new_ones_are_sent(tmp_path: Path, old: tuple[int, int], new: tuple[int, int]) -> None:
    written = WrittenRun(tmp_path / "run")
    written.evaluate()
    written.step()
    for number in range(7):
        written.note(f"event {number}")
    shown = document([open_run(tmp_path / "run")])
    before, after = (cast(Document, {**shown, "events": shown["events"][slice(*part)]}) for part in (old, new))
    patch = patches(before, after)
    assert set(patch) == {"events"} and applied(before, patch)["events"] == after["events"]
    if new[1] > old[1]:
        assert len(patch["events"]["add"]) == new[1] - max(old[1], new[0])


def test_of_several_runs_the_events_that_are_new_are_sent(tmp_path: Path) -> None:
    """The oldest of one of them goes from their midst."""
    written = [WrittenRun(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for run in written:
        run.step()
    for number in range(2 * MOST_EVENTS):
        written[number % 2].note(f"event {number}")
    runs = [tmp_path / name for name in "ab"]
    before = document([open_run(path) for path in runs])
    written[1].note("one more")
    after = document([open_run(path) for path in runs])
    assert len(before["events"]) == len(after["events"]) == 2 * MOST_EVENTS
    patch = patches(before, after)
    assert applied(before, patch)["events"] == after["events"]
    assert [event["text"] for event in patch["events"]["add"]] == ["one more"] and patch["events"]["drop"] == 1


def test_settings_that_could_not_be_read_once_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared disk that fails for a moment, and changes no file meanwhile."""
    written, followed, opened = WrittenRun(tmp_path / "run", seed=7), Followed(tmp_path / "run"), Path.open
    written.step()

    def failing(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path.name == "segments.jsonl":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing)
        assert followed.poll()
    assert followed.run is not None and list(followed.run.left_out) == ["segments.jsonl: Input/output error"]
    assert followed.poll() and not followed.poll()
    same(followed.run, open_run(tmp_path / "run"))


def test_a_run_that_cannot_be_read_any_more_stays_and_says_why(tmp_path: Path) -> None:
    written, followed = WrittenRun(tmp_path / "run"), Followed(tmp_path / "run")
    written.step()
    assert followed.poll()
    (tmp_path / "run" / "segments.jsonl").unlink()
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    (tmp_path / "run" / "recipe.toml").write_text("no = toml = at all")
    assert followed.poll() and not followed.poll()
    assert followed.run is not None and followed.run.last_step == 1
    assert len([line for line in followed.run.left_out if line.startswith("recipe.toml: ")]) == 1
    (tmp_path / "run").rename(tmp_path / "away")
    assert not followed.poll()
    (tmp_path / "away").rename(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text(recipe)
    assert followed.poll() and not followed.poll()
    same(followed.run, open_run(tmp_path / "run"))
    (tmp_path / "run" / "events.jsonl").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / "events.jsonl")
    assert followed.poll() and "events.jsonl: is not a file" in list(followed.run.left_out)
    (tmp_path / "run" / "events.jsonl").unlink()
    assert followed.poll() and "events.jsonl: is not a file" not in list(followed.run.left_out)


def test_a_resume_that_has_overtaken_is_noticed(tmp_path: Path) -> None:
    """Between two looks the file was cut, and is longer now than it was, with the same inode number."""
    written, followed = WrittenRun(tmp_path / "run"), Followed(tmp_path / "run")
    for _ in range(8):
        written.step()
    followed.poll()
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:5]
    with (tmp_path / "run" / "metrics.jsonl").open("r+b") as file:
        file.truncate(sum(map(len, kept)))
    written.metrics.rewind(5, [])
    written.last = 5
    for _ in range(7):
        written.step()
    assert followed.poll()
    same(followed.run, open_run(tmp_path / "run"))


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    path, lines = tmp_path / "lines", []
    tail = Tail(path)

    def read() -> bool:
        return tail.read(lambda number, line: lines.append((number, line)), lines.clear)

    assert not read()
    path.write_bytes(b"a\nb")
    assert read() and lines == [(1, b"a\n")]
    assert not read()
    with path.open("ab") as file:
        file.write(b"c\nd\n")
    assert read() and lines == [(1, b"a\n"), (2, b"bc\n"), (3, b"d\n")]
    path.write_bytes(b"")
    assert read() and lines == []
    path.unlink()
    assert not read()


def test_a_run_whose_directory_goes_stays_and_is_said_to_be_gone(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path / "runs" / "a")
    written.step()
    following = Following([tmp_path / "runs"])
    assert following.look() and following.poll()
    shutil.rmtree(tmp_path / "runs" / "a")
    assert not following.look() and not following.poll()
    (one,) = following
    assert one.run is not None and one.run.last_step == 1
    assert status(one.run, time.time())["state"] == "gone"
    again = WrittenRun(tmp_path / "runs" / "a")  # another run in the same place
    again.evaluate()
    assert following.poll() and one.run.last_step == 0


def test_new_runs_appear_and_removed_ones_stay_away(tmp_path: Path) -> None:
    following = Following([tmp_path / "runs", tmp_path / "later"])
    following.look()
    assert [one.path.name for one in following] == ["runs", "later"] and not following.poll()
    for name in ("runs/a", "runs/ladder/1-grpo/seed-0", "runs/ladder/1-grpo/seed-10", "runs/ladder/1-grpo/seed-2", "later"):
        WrittenRun(tmp_path / name).step()
    (tmp_path / "runs" / "ladder" / "ladder.toml").write_text("")
    assert following.look() and following.poll()
    assert [one.path.name for one in following] == ["a", "seed-0", "seed-2", "seed-10", "later"]
    following.remove((tmp_path / "runs" / "a").resolve())
    assert following.look() and not following.look()
    assert [one.path.name for one in following] == ["seed-0", "seed-2", "seed-10", "later"]
    following.add(tmp_path / "runs" / "a", addable(tmp_path / "runs" / "a"))
    following.look()
    assert "a" in [one.path.name for one in following]
    for nothing in (tmp_path / "nothing", tmp_path / "runs" / "a" / "rollouts"):
        with pytest.raises(UserError, match="not a run directory"):
            addable(nothing)


def test_a_path_means_its_runs(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "runs" / "ladder" / "2-b" / "seed-0")
    WrittenRun(tmp_path / "runs" / "ladder" / "10-c" / "seed-0")
    (tmp_path / "runs" / "ladder" / "ladder.toml").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in runs_in(tmp_path / "runs" / "ladder")]
    assert found == ["runs/ladder/2-b/seed-0", "runs/ladder/10-c/seed-0"]
    assert expanded([tmp_path / "none"]) == [tmp_path / "none"]
    (tmp_path / "other" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="neither a run"):
        expanded([tmp_path / "other"])


@pytest.fixture
def timed(tmp_path: Path) -> WrittenRun:
    """Twelve steps of 10 s each, and 30 s more where an evaluation came before, the last one just now."""
    written, now = WrittenRun(tmp_path / "run", steps=20), time.time()
    written.evaluate()
    moments = {}
    clock = 0.0
    for step in range(1, 13):
        written.step()
        clock += 10 + (30 if (step - 1) % 5 == 0 else 0)
        moments[step] = clock
    for step, moment in moments.items():
        moment += now - clock
        os.utime(written.path / "rollouts" / f"step-{step:06d}.jsonl", (moment, moment))
    return written


def test_states_and_time_left(timed: WrittenRun) -> None:
    def found(owner: str | None, later: float = 0.0) -> Any:
        lock = timed.path / ".lock"
        lock.unlink(missing_ok=True)
        if owner is not None:
            lock.write_text(owner)
            os.utime(lock, (1e9, 1e9))
        return status(open_run(timed.path), time.time() + later)

    here, elsewhere = f"pid {os.getpid()} on {socket.gethostname()}\n", "pid 7 on another-machine\n"
    training = found(here)
    assert training["state"] == "training" and (training["step"], training["steps"]) == (12, 20)
    assert training["seconds_per_step"] == pytest.approx(10, abs=0.1)
    assert training["seconds_left"] == pytest.approx(8 * 10 + 2 * 30, abs=2)  # evaluations after steps 15 and 20
    assert found(here, 20)["seconds_left"] == pytest.approx(120, abs=2)
    assert found(here, 1000)["state"] == "silent"
    assert found(elsewhere)["state"] == "training" and found(elsewhere, 1000)["state"] == "silent"
    assert found(elsewhere, 1e6)["state"] == "stopped"
    assert found(None)["state"] == "stopped" and found(f"pid {2**22 + 1} on {socket.gethostname()}\n")["state"] == "stopped"
    while timed.last < 20:
        timed.step()
    assert found(here)["state"] == "training"  # the last evaluation, and the model
    (timed.path / "model").mkdir()
    assert found(here)["state"] == "finished" and found(None)["seconds_left"] is None


def test_a_page_that_was_away_gets_what_it_lacks(tmp_path: Path) -> None:
    """Everything at first and from another server, else what changed since; and what cannot be put together is said."""
    written = WrittenRun(tmp_path / "run")
    written.step()
    broken = False

    def make(runs: Sequence[Run]) -> Document:
        if broken:
            raise ValueError("unforeseen")
        return document(runs)

    async def follow() -> None:
        nonlocal broken
        hub = Hub(Following([tmp_path / "run"]), make)

        async def first(since: str) -> dict[str, Any]:
            stream = cast(AsyncGenerator[bytes, None], hub.messages(since))
            found: dict[str, Any] = json.loads(await anext(stream))
            await stream.aclose()
            return found

        await hub.refresh()
        whole = await first("")
        here = whole["instance"]
        assert whole["document"]["runs"][0]["status"]["step"] == 1 and whole["version"] == 1
        written.step()
        await hub.refresh()
        written.step()
        await hub.refresh()
        assert (await first(f"{here}-2"))["version"] == 3 and "patch" in await first(f"{here}-2")
        for other in ("", "another-2", f"{here}-0", f"{here}-99", f"{here}-x", f"{here}-²"):
            assert (await first(other))["document"]["runs"][0]["status"]["step"] == 3, other
        assert await first(f"{here}-3") == {"alive": hub.interval}
        written.step()
        broken = True
        await hub.refresh()
        assert (await first(f"{here}-3"))["patch"]["extra"]["problem"] == "ValueError: unforeseen"
        broken = False
        written.step()
        await hub.refresh()
        last = (await first(f"{here}-4"))["patch"]
        assert last["extra"]["problem"] == "" and next(iter(last["runs"].values()))["status"]["step"] == 5
        assert hub.watchers == 0

    asyncio.run(follow())


def test_one_dear_look_delays_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a run that is added, nor what takes long once; and whatever looking costs, the next look is soon."""
    written, spent = WrittenRun(tmp_path / "run"), [0.0]
    written.step()

    def make(runs: Sequence[Run]) -> Document:
        end = time.thread_time() + spent[0]
        while time.thread_time() < end:
            pass
        return document(runs)

    async def follow() -> None:
        hub = Hub(Following([tmp_path / "run"]), make)
        for _ in range(4):
            await hub.refresh()
            written.step()
        usual, spent[0] = hub.interval, 0.3
        await hub.refresh()
        assert hub.interval == usual == 0.5
        spent[0] = 0.0
        WrittenRun(tmp_path / "other").step()
        assert await hub.add(tmp_path / "other") == {"found": 1}
        seen = hub.version
        await hub.refresh()
        lines = [json.loads(line) for line in hub._news(seen)]
        assert [line["patch"]["extra"]["reading"] for line in lines] == [1, 0]
        assert hub.interval == usual and wait_after(1000.0) == 5.0

    asyncio.run(follow())


def test_runs_keep_their_places_when_one_goes(tmp_path: Path) -> None:
    for name in "abc":
        WrittenRun(tmp_path / "runs" / name).step()
    following = Following([tmp_path / "runs"])
    following.look()
    following.poll()
    shutil.rmtree(tmp_path / "runs" / "b")
    assert not following.look()
    WrittenRun(tmp_path / "runs" / "d").step()
    assert following.look()
    assert [one.path.name for one in following] == ["a", "b", "c", "d"]


def test_a_directory_whose_runs_are_followed_is_followed_when_it_is_added(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "runs" / "a").step()
    following = Following([tmp_path / "runs" / "a"])
    following.look()
    following.add(tmp_path / "runs", addable(tmp_path / "runs"))
    WrittenRun(tmp_path / "runs" / "b").step()
    assert following.look() and [one.path.name for one in following] == ["a", "b"]


def test_paths_that_cannot_be_looked_at_hide_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WrittenRun(tmp_path / "a").step()
    (tmp_path / "locked").mkdir()
    look = Path.stat

    def refused(path: Path, **arguments: Any) -> os.stat_result:
        if "locked" in path.parts[-2:]:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **arguments)

    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    following = Following([tmp_path / "circle", tmp_path])
    following.look()
    assert [one.path.name for one in following] == ["circle", "a"]
    monkeypatch.setattr(Path, "stat", refused)
    assert runs_in(tmp_path) == expanded([tmp_path]) == [tmp_path / "a"]
    assert runs_in(tmp_path / ("x" * 300)) == []


def test_more_runs_than_a_page_is_for_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.evidence.following.MOST_ADDED", 2)
    for name in "abc":
        WrittenRun(tmp_path / "runs" / name)
    with pytest.raises(UserError, match="more than 2 runs"):
        addable(tmp_path / "runs")


def test_why_there_is_no_run_is_said_once(tmp_path: Path) -> None:
    followed = Followed(tmp_path / "run")
    assert not followed.poll() and followed.waits == "absent"
    (tmp_path / "run").mkdir()
    assert followed.poll() and (followed.waits, followed.reason) == ("empty", "")
    (tmp_path / "run" / "recipe.toml").write_text("seed = 1")
    assert followed.poll() and followed.waits == "unreadable" and "metrics.jsonl" in followed.reason
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    assert followed.poll() and "is not a file" in followed.reason
    os.mkfifo(tmp_path / "lines")
    tail = Tail(tmp_path / "lines")
    assert not tail.read(lambda *_: None, lambda: None) and tail.problem == "is not a file"


def test_a_last_line_without_its_end_counts_as_in_a_report(tmp_path: Path) -> None:
    written, followed = WrittenRun(tmp_path / "run"), Followed(tmp_path / "run")
    written.step()
    written.step()
    path = written.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    followed.poll()
    same(followed.run, open_run(tmp_path / "run"))
    assert followed.run is not None and followed.run.last_step == 2
    path.write_bytes(whole)
    followed.poll()
    written.step()
    with path.open("ab") as file:
        file.write(b"[]\n")
    assert followed.poll()
    same(followed.run, open_run(tmp_path / "run"))


def test_a_run_whose_pace_is_not_known_is_not_called_silent(tmp_path: Path) -> None:
    """Before its first step, and while it evaluates for the first time."""
    written = WrittenRun(tmp_path / "run")
    lock = written.path / ".lock"
    written.evaluate()

    def state(owner: str) -> str:
        lock.write_text(owner)
        os.utime(lock, (1e9, 1e9))
        return status(open_run(written.path), time.time() + 3000)["state"]

    here, elsewhere = f"pid {os.getpid()} on {socket.gethostname()}\n", "pid 7 on another-machine\n"
    assert state(here) == state(elsewhere) == "training"
    for _ in range(3):
        written.step()
    assert state(here) == state(elsewhere) == "silent"
    for _ in range(2):
        written.step()
    assert state(here) == "training"  # an evaluation comes after step 5
    written.evaluate()
    assert state(here) == "silent"
