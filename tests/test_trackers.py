"""Trackers: real libraries write real files, which are read back; none repeats, stops or slows a run."""

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import groupwise as gw
from groupwise.trackers.replay import Replay, locked, send_all
from groupwise.training.events import Warned
from groupwise.training.trackers import NAMES, Guarded
from tests.test_cli import run

SMALL: dict[str, Any] = {
    "training": {"steps": 2, "eval_problems": 10, "eval_every": 1, "checkpoint_every": 1},
    "rollouts": {"prompts_per_step": 4},
}


def need(tracker: str) -> Any:
    return pytest.importorskip(tracker, reason=f"{tracker} is not installed; the extra groupwise[{tracker}] installs it")


@pytest.fixture(autouse=True)
def _stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library of a tracker writes outside the test's folder."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without trackers."""
    return gw.train("quick", out=tmp_path_factory.mktemp("runs") / "recorded", quiet=True, **SMALL).path


@pytest.fixture
def finished(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it, to be sent."""
    home = tmp_path / "finished"
    home.mkdir()
    (home / "rollouts").mkdir()
    for file in (*recorded.glob("*.*"), *recorded.glob("rollouts/*")):
        (home / file.relative_to(recorded)).write_bytes(file.read_bytes())
    text = (home / "recipe.toml").read_text()
    (home / "recipe.toml").write_text(text.replace("offline = false", "offline = true"))
    return home


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records(run) if record.get(key) is not None]


# --- the libraries


def test_tensorboard_files_hold_what_was_recorded(finished: Path) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert send_all(finished, "tensorboard") == len(records(finished)) == 5
    found = EventAccumulator(str(finished / "trackers" / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    found.Reload()
    for key in ("reward/mean", "eval/pass@1", "entropy"):
        assert {e.step: e.value for e in found.Scalars(key)} == pytest.approx(dict(numbers(finished, key)), rel=1e-6), key
    step, counts = next((r["step"], r["by_probability/tokens"]) for r in records(finished) if "by_probability/tokens" in r)
    drawn = found.Histograms("by_probability/tokens")[0]
    assert (drawn.step, drawn.histogram_value.bucket) == (step, counts)
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]}
    assert 'name = "dapo"' in texts["recipe/text_summary"][0]
    sample = json.loads((finished / "rollouts" / "step-000001.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] in texts["samples/text_summary"][0] and "| best |" in texts["samples/text_summary"][0]
    assert texts["report/text_summary"] == [f"`{finished / 'report.html'}`"]


def test_trackio_holds_what_was_recorded(finished: Path) -> None:
    need("trackio")
    assert send_all(finished, "trackio") == 5
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("groupwise", "finished")
    for key in ("reward/mean", "eval/pass@1"):
        assert [(log["step"], log[key]) for log in logs if key in log] == numbers(finished, key)
    [first, last] = [log["samples"]["_value"] for log in logs if "samples" in log]
    assert {row["rank"] for row in first} == {"best", "worst"} and len(last) == 8
    assert storage.get_run_config("groupwise", "finished")["algorithm"]["name"] == "dapo"
    assert len([log for log in logs if "report" in log]) == 1
    bins = next(log["by_probability/tokens"] for log in logs if "by_probability/tokens" in log)
    assert bins["values"] == numbers(finished, "by_probability/tokens")[0][1]


def log_entries(path: Path, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The entries of a file in LevelDB's log form, which wandb and swanlab write offline: (crc, length, kind), then the data."""
    data, position, partial = path.read_bytes(), header, b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield partial
            partial = b""


def test_wandb_offline_holds_what_was_recorded(finished: Path) -> None:
    need("wandb")
    assert send_all(finished, "wandb") == 5
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    [file] = (finished / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    history: dict[str, list[tuple[int, Any]]] = {}
    for entry in log_entries(file):
        record = messages.Record()
        record.ParseFromString(entry)
        values: dict[str, Any] = {}
        for item in record.history.item:  # a table or a page is a tree, written leaf by leaf
            first, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            values[first] = {**values.get(first, {}), inner[0]: value} if inner else value
        for key, value in values.items():
            history.setdefault(key, []).append((record.history.step.num, value))
    for key in ("reward/mean", "eval/pass@1"):
        assert history[key] == numbers(finished, key)
    [(_, first), (_, last)] = history["samples"]
    assert first["_type"] == last["_type"] == "table-file" and first["ncols"] == 7
    table = json.loads((file.parent / "files" / first["path"]).read_text())
    assert table["columns"][:2] == ["rank", "prompt"] and len(table["data"]) == 8
    [(step, page)] = history["report"]
    assert step == 2 and (file.parent / "files" / page["path"]).stat().st_size == (finished / "report.html").stat().st_size
    assert history["by_probability/tokens"][0][1]["values"] == numbers(finished, "by_probability/tokens")[0][1]


def test_swanlab_offline_holds_what_was_recorded(finished: Path) -> None:
    need("swanlab")
    assert send_all(finished, "swanlab") == 5
    [file] = (finished / "trackers" / "swanlab").glob("run-*/*.swanlab")
    text = b"".join(log_entries(file))
    assert all(key.encode() in text for key in ("reward/mean", "eval/pass@1", "by_probability/tokens/03", "samples", "report"))
    [page] = file.parent.glob("media/html/*.html")
    assert page.stat().st_size == (finished / "report.html").stat().st_size
    tables = sorted(file.parent.glob("media/echarts/*.json"))
    assert len(tables) == 2 and "best" in tables[0].read_text()


def test_mlflow_holds_what_was_recorded(finished: Path) -> None:
    client_of = need("mlflow").MlflowClient
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed; the extra groupwise[mlflow] installs it")
    assert send_all(finished, "mlflow") == 5
    client = client_of(tracking_uri=f"sqlite:///{finished / 'trackers' / 'mlflow.db'}")
    [found] = client.search_runs([client.get_experiment_by_name("groupwise").experiment_id])
    assert found.info.run_name == "finished" and found.info.status == "FINISHED"
    assert found.data.params["algorithm.name"] == "dapo"
    for key, name in (("reward/mean", "reward/mean"), ("eval/pass@1", "eval/pass_at_1")):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == numbers(finished, key)
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"recipe.toml", "report.html", "samples"} <= artifacts


# --- each record once


def test_a_run_that_is_sent_again_repeats_nothing(finished: Path) -> None:
    need("trackio")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # step 1 is being written
    assert send_all(finished, "trackio") == 2
    (finished / "metrics.jsonl").write_text("".join(lines))
    assert [send_all(finished, "trackio") for _ in range(2)] == [3, 0]
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logs = storage.get_logs("groupwise", "finished")
    assert [(log["step"], log["reward/mean"]) for log in logs if "reward/mean" in log] == numbers(finished, "reward/mean")
    assert len([log for log in logs if "report" in log]) == 1


def test_one_process_at_a_time_sends_a_run(finished: Path) -> None:
    with locked(finished, "tensorboard", wait=True), pytest.raises(gw.UserError, match="another process is sending it"):
        send_all(finished, "tensorboard")


def test_a_killed_run_is_sent_to_its_end_and_resumed_without_repeats(tmp_path: Path) -> None:
    """kill -9 after a step beyond the last checkpoint: that step is sent, done again on resume, and not sent again."""
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    settings = ["trackers.names=['tensorboard']", "training.steps=500", "training.checkpoint_every=3", "training.eval_problems=4"]
    settings += ["rollouts.prompts_per_step=4", "training.eval_every=500"]
    command = [sys.executable, "-m", "groupwise", "train", "quick", "--out", str(out)]
    state = out / "trackers" / "tensorboard.json"

    def sent() -> int:
        return int(json.loads(state.read_text())["sent"][0]) if state.exists() else -1

    with subprocess.Popen([*command, *(a for s in settings for a in ("--set", s))], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while sent() < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    with locked(out, "tensorboard", wait=True):  # what the process beside it does once its run is gone
        before = sent()
    assert before == len([record for record in records(out) if "reward/mean" in record]) >= 5
    steps = before + 2
    resumed = gw.train(resume=out, training={"steps": steps, "eval_every": steps}, quiet=True)
    found = EventAccumulator(str(out / "trackers" / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("reward/mean")] == list(range(1, steps + 1))
    assert [event.value for event in found.Scalars("reward/mean")] == pytest.approx(resumed.values("reward/mean"), rel=1e-6)


# --- trackers that fail


BROKEN = """
import time
class Destination:
    identity = "x"
    def write(self, step, numbers, bins): {write}
    def write_samples(self, step, rows): pass
    def write_report(self, step, page): pass
    def close(self): pass
def open_destination(opening): return Destination()
"""


@pytest.mark.parametrize(
    ("write", "timeout", "message"),
    [
        ("raise ConnectionError('no network')", 60, "ConnectionError: no network"),
        ("time.sleep(1000)", 2, "not finished after trackers.timeout = 2 s"),
        ("import os; os._exit(7)", 60, "process ended with code 7"),
        ("import os; os.kill(os.getpid(), 9)", 60, "process ended with code -9"),
    ],
)
def test_a_tracker_that_fails_costs_the_run_a_message(
    write: str, timeout: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process beside the run, with a destination that fails in place of TensorBoard's."""
    (tmp_path / "libraries").mkdir()
    module = BROKEN.format(write=write)
    (tmp_path / "libraries" / "sitecustomize.py").write_text(
        "import sys, types\nmodule = types.ModuleType('groupwise.trackers.tensorboard')\n"
        f"exec({module!r}, module.__dict__)\nsys.modules['groupwise.trackers.tensorboard'] = module\n"
    )
    need("tensorboard")
    paths = [str(tmp_path / "libraries"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    extra = ["--set", "trackers.names=['tensorboard']", "--set", f"trackers.timeout={timeout}", "--set", "training.steps=2"]
    small = ["--set", "training.eval_problems=4", "--set", "rollouts.prompts_per_step=4"]
    result = run("train", "quick", "--out", tmp_path / "run", *extra, *small)
    assert result.exit_code == 0, result.output
    assert result.output.count("tracker tensorboard:") == 1 and message in result.output
    assert f"groupwise track {tmp_path / 'run'} --to tensorboard" in result.output


class Slow:
    """A recorder that hangs, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def record(self, event: Any) -> None:
        if self.error:
            raise self.error
        time.sleep(60)


def test_an_own_recorder_that_hangs_or_raises_is_left_out_and_noted_once() -> None:
    event, notes = Warned(step=1, text="x"), list[str]()
    for recorder in (Slow(KeyError("x")), Slow()):
        guarded = Guarded("mine", recorder, notes.append, patience=0.2)
        started = time.monotonic()
        guarded.record(event)
        time.sleep(0.2)
        for _ in range(Guarded.WAITING + 5):
            guarded.record(event)
        guarded.close()
        assert time.monotonic() - started < 10
    assert notes == ["tracker mine: KeyError: 'x'. The run does not need it.",
                     f"tracker mine: falls behind by {Guarded.WAITING} events. The run does not need it."]  # fmt: skip


def test_an_own_recorder_gets_every_event_and_may_close(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import json\nclass Log:\n    def __init__(self, run, recipe):\n        self.path, self.seen = run / 'mine.json', []\n"
        "    def record(self, event):\n        self.seen.append([type(event).__name__, event.step])\n"
        "    def close(self):\n        self.path.write_text(json.dumps(self.seen))\n"
    )
    (tmp_path / "recipe.toml").write_text('extends = "quick"\n[trackers]\nnames = ["mine.py:Log"]\n')
    found = gw.train(tmp_path / "recipe.toml", out=tmp_path / "run", quiet=True, **SMALL)
    expected = [["Evaluated", 0], ["StepDone", 1], ["Evaluated", 1], ["StepDone", 2], ["Evaluated", 2]]
    assert json.loads((found.path / "mine.json").read_text()) == expected
    assert found.recipe["trackers"]["names"] == [f"{tmp_path / 'mine.py'}:Log"]  # so that a resume finds it from anywhere


# --- names


def test_names_are_checked_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'wandb'?" in run("check", "quick", "--set", "trackers.names=['wandbb']").stderr
    twice = run("check", "quick", "--set", "trackers.names=['tensorboard', 'tensorboard']")
    assert twice.exit_code == 2 and "names a tracker twice" in twice.stderr
    monkeypatch.setattr("groupwise.training.trackers.find_spec", lambda _: None)
    missing = run("check", "quick", "--set", "trackers.names=['mlflow']")
    assert missing.exit_code == 2 and "pip install 'groupwise[mlflow]'" in missing.stderr


def test_track_says_what_is_wrong(finished: Path, tmp_path: Path) -> None:
    assert "not a run directory" in run("track", tmp_path / "nothing").stderr
    assert "say which one with --to: trackio" in run("track", finished).stderr
    assert "did you mean 'mlflow'?" in run("track", finished, "--to", "mlfow").stderr
    (finished / "recipe.toml").write_text("[trackers]\nnames = 3\n")
    assert "recipe.toml, line 2, trackers.names: input should be" in run("track", finished).stderr
    (finished / "recipe.toml").write_text("[trackers\n")
    for arguments in ((), ("--to", "tensorboard")):
        assert "recipe.toml: Expected" in run("track", finished, *arguments).stderr
    assert "did you mean 'mlflow'?" in run("track", finished, "--to", "mlfow").stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_tracker_has_a_module_and_an_extra(name: str) -> None:
    import tomllib

    root = Path(gw.__file__).parent
    assert (root / "trackers" / f"{name}.py").is_file()
    project: Mapping[str, Any] = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert name in project["optional-dependencies"]


def test_a_line_is_read_once_and_a_shorter_file_from_its_start(finished: Path) -> None:
    need("tensorboard")
    (finished / "trackers").mkdir()
    replay = Replay(finished, "tensorboard")
    assert [replay.send_new(), replay.send_new()] == [5, 0]
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text("".join(lines[:3]))
    assert replay.send_new() == 0 and replay.position == len("".join(lines[:3]).encode())
    replay.finish()
