"""Runs of several processes: the same run as in one process, whatever ends on the way, and nothing left afterwards."""

import importlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import groupwise as gw
from groupwise.cluster import launch_of, weights
from groupwise.cluster.launch import launch
from groupwise.cluster.layout import learner_piece, sampler_pieces
from groupwise.cluster.local import LocalLauncher
from groupwise.cluster.piece import Piece, free_port
from groupwise.config import Recipe, Source, find_recipe, load
from groupwise.config.effects import effect
from groupwise.config.trees import flat
from groupwise.errors import RunError, UserError
from groupwise.evidence.runs import open_run
from groupwise.training import session
from groupwise.training.output import make_console
from groupwise.training.pieces import Pieces
from groupwise.training.processes import check_gpus, check_processes
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready
from tests.served import answering

SETTINGS: dict[str, Any] = {
    "algorithm": {"name": "dapo", "dynamic_sampling": False},
    "rollouts": {"group_size": 4, "prompts_per_step": 4, "max_tokens": 16},
    "learner": {"minibatches": 2},
    "training": {"steps": 3, "eval_every": 3, "eval_problems": 8, "checkpoint_every": 2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """In each process, as many as a test's own share of two cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def processes_of(run: Path) -> list[psutil.Process]:
    """Those whose command names the published weights of a run, or which host one of them, but for keepers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(f"{weights.PREFIX}{run.name}-" in word for word in words) and not any("keeper.py" in word for word in words):
            found.append(process)
    return found


def train(run: Path, launched: session.Launch | None = None, **changes: Any) -> Path:
    """A run of SETTINGS with changes."""
    recipe = {**SETTINGS, **{key: {**SETTINGS.get(key, {}), **table} for key, table in changes.items()}}
    if "cluster" in changes:
        recipe["cluster"] = {"timeout": 10.0, **changes["cluster"]}
    if launched is None:
        gw.train(recipe, out=run, quiet=True)
    else:
        plan = session.plan(None, changes=flat(recipe), out=run)
        session.run(plan, make_console(quiet=True), launch=launched)
    assert not processes_of(run)
    assert not list(weights.SHARED_MEMORY.glob(f"{weights.PREFIX}{run.name}-*"))
    return run


def assert_same(run: Path, reference: Path) -> None:
    """The same completions to the token, and the same weights to the bit."""
    for path in sorted((reference / "rollouts").glob("*.jsonl")):
        assert (run / "rollouts" / path.name).read_text() == path.read_text(), path.name
    ours, theirs = (load_file(next((at / "model").glob("*.safetensors"))) for at in (run, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    return train(tmp_path_factory.mktemp("reference") / "one")


@pytest.mark.parametrize(
    "cluster",
    [
        {"samplers": 1},
        {"samplers": 2, "learners": 1},
        {"samplers": 2, "launcher": "ray"},
    ],
    ids=lambda cluster: "-".join(f"{key}={value}" for key, value in cluster.items()),
)
def test_the_same_run_in_several_processes(cluster: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    if cluster.get("launcher") == "ray":
        pytest.importorskip("ray")
    run = train(tmp_path / "several", cluster=cluster)
    assert_same(run, reference)
    names = {path.name for path in (run / "logs").iterdir()}
    learner = {"learner.log"} if "learners" in cluster else set()
    assert names - {"ray.log"} == {f"sampler-{index}.log" for index in range(cluster["samplers"])} | learner


# --- faults


def of_piece(pieces: Any, name: str) -> psutil.Process:
    """The process of a piece, which its keeper has started."""
    keeper = psutil.Process(pieces.supervisor.launcher._pieces[name].process.keeper.pid)
    return keeper.children()[0]


def striking(strikes: dict[int, Callable[[Any], None]]) -> session.Launch:
    """Starts the pieces of a run; each strike is called when weights are brought for the so manieth time, counted from 0."""

    @contextmanager
    def struck(ready: Ready, directory: RunDirectory) -> Iterator[Pieces]:
        with launch(ready, directory) as pieces:
            bring, brought = pieces.bring_weights, [0]

            def bring_weights() -> None:
                bring()
                brought[0] += 1
                if brought[0] in strikes:
                    strikes[brought[0]](pieces)

            pieces.bring_weights = bring_weights  # type: ignore[method-assign]
            yield pieces

    return struck


def test_samplers_that_are_killed_or_frozen_are_replaced(reference: Path, tmp_path: Path) -> None:
    strikes: dict[int, Callable[[Any], None]] = {
        1: lambda pieces: of_piece(pieces, "sampler 0").kill(),
        2: lambda pieces: of_piece(pieces, "sampler 1").suspend(),
    }
    run = train(tmp_path / "struck", striking(strikes), cluster={"samplers": 2, "timeout": 3.0})
    assert_same(run, reference)
    steps = open_run(run).steps
    assert sum(step["cluster/sampler_restarts"] for step in steps) >= 1
    log = (run / "logs" / "sampler-0.log").read_text()
    assert "--- started: " in log and "--- started again, for the 2. time: " in log
    events = (run / "events.jsonl").read_text()
    assert "sampler 0" in events


def test_a_learner_that_is_killed_is_started_again(reference: Path, tmp_path: Path) -> None:
    strikes: dict[int, Callable[[Any], None]] = {2: lambda pieces: of_piece(pieces, "learner").kill()}
    run = train(tmp_path / "struck", striking(strikes), cluster={"samplers": 1, "learners": 1})
    assert_same(run, reference)
    assert "learner_lost" in (run / "events.jsonl").read_text()


def test_nothing_outlives_a_controller_that_is_killed_and_the_run_goes_on(reference: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "killed", tmp_path / "recipe.toml"
    recipe.write_text((reference / "recipe.toml").read_text())
    command = [sys.executable, "-m", "groupwise", "train"]
    asked = ["--set", "cluster.samplers=1", "--set", "cluster.learners=1"]
    with (tmp_path / "output").open("wb") as output:
        controller = subprocess.Popen([*command, str(recipe), *asked, "--out", str(run)], stdout=output, stderr=output)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step-*")):
            assert controller.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.02)
    assert len(processes_of(run)) == 2
    controller.kill()
    controller.wait()
    deadline = time.monotonic() + 10
    while processes_of(run):
        assert time.monotonic() < deadline, processes_of(run)
        time.sleep(0.1)
    assert list(weights.SHARED_MEMORY.glob(f"{weights.PREFIX}{run.name}-*"))  # until the next run of several processes starts
    subprocess.run([*command, "--resume", str(run)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert_same(run, reference)
    assert not list(weights.SHARED_MEMORY.glob(f"{weights.PREFIX}{run.name}-*"))


# --- launching


def sleeper(name: str = "sampler 0", **settings: Any) -> Piece:
    script = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], '{port}'); time.sleep(60)"
    return Piece(name=name, command=["{python}", "-c", script], **settings)


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_gpus_go_to_pieces_in_the_order_of_their_starts(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path, ["3", "5", "7"])
    try:
        address = launcher.start(sleeper("learner", gpus=1))
        launcher.start(sleeper("sampler 0", gpus=2))
        launcher.start(sleeper("helper"))
        with pytest.raises(RunError, match="sampler 1 needs 1 GPUs, and 0 are left"):
            launcher.start(sleeper("sampler 1", gpus=1))
        logs = [tmp_path / name for name in ("learner.log", "sampler-0.log", "helper.log")]
        wait_until(lambda: all(len(log.read_text().splitlines()) == 2 for log in logs))
        assert [log.read_text().splitlines()[1].split(" ")[0] for log in logs] == ["3", "5,7", ""]
        assert address.endswith(":" + logs[0].read_text().split()[-1])
        launcher.restart("learner")
        wait_until(lambda: len(logs[0].read_text().splitlines()) == 4)
        assert logs[0].read_text().splitlines()[3].startswith("3 1 ")
    finally:
        launcher.stop()


def test_a_piece_says_how_it_ended(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path)
    try:
        launcher.start(Piece(name="learner", command=["{python}", "-c", "raise SystemExit('no weights')"]))
        launcher.start(Piece(name="sampler 0", command=[str(tmp_path / "nothing")]))
        launcher.start(sleeper("sampler 1"))
        wait_until(lambda: launcher.failure("learner") and launcher.failure("sampler 0"))
        assert "learner ended with exit status 1; the end of" in str(launcher.failure("learner"))
        assert "no weights" in str(launcher.failure("learner"))
        assert "No such file or directory" in str(launcher.failure("sampler 0"))
        assert launcher.failure("sampler 1") is None
        keeper = psutil.Process(launcher._pieces["sampler 1"].process.keeper.pid)  # type: ignore[union-attr]
        wait_until(lambda: keeper.children())
        keeper.children()[0].send_signal(signal.SIGSEGV)
        wait_until(lambda: launcher.failure("sampler 1"))
        assert "was killed by signal 11" in str(launcher.failure("sampler 1"))
    finally:
        launcher.stop()
    with pytest.raises(RunError, match="the run has ended"):
        launcher.restart("learner")


def test_what_a_piece_starts_ends_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600'], start_new_session=True); print(p.pid); time.sleep(60)"
    )
    launcher = LocalLauncher(tmp_path)
    launcher.start(Piece(name="learner", command=["{python}", "-c", script]))
    log = tmp_path / "learner.log"
    wait_until(lambda: len(log.read_text().splitlines()) == 2)
    launcher.stop()
    assert not psutil.pid_exists(int(log.read_text().splitlines()[1]))


def test_a_sampler_that_cannot_start_ends_the_run_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("#!/nowhere/python\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(RunError, match=r"(?s)sampler 0 ended with exit status 127; the end of .*broken: No such file"):
        train(tmp_path / "failing", rollouts={"sampler": "vllm"}, cluster={"vllm": str(tmp_path / "broken")})
    with pytest.raises(UserError, match=r"^cluster.vllm, given from Python: there is no program 'no-vllm'"):
        train(tmp_path / "absent", rollouts={"sampler": "vllm"}, cluster={"vllm": "no-vllm serve"})


def test_an_address_where_nothing_answers_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no sampler has answered at http://127.0.0.1:9 for 0.5 s"):
        train(tmp_path / "nobody", rollouts={"sampler": "http://127.0.0.1:9"}, cluster={"timeout": 0.5})


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/health": (200, {"ok": True})}, "what answers at .* is neither groupwise serve nor vLLM"),
        ({"/health": (200, None)}, "what answers at .* is neither groupwise serve nor vLLM"),
        ({"/version": (200, {"version": "0.32"})}, "HTTP 404: .*started with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_an_address_of_something_else_is_named_at_once(tmp_path: Path, answers: dict[str, Any], message: str) -> None:
    with (
        answering(answers) as (address, _),
        pytest.raises(UserError, match=rf"^rollouts.sampler, given from Python: .*{message}"),
    ):
        train(tmp_path / "other", rollouts={"sampler": address})


def test_what_the_learners_process_finds_wrong_is_said_of_the_users_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model.lora.targets, given from Python: 'nothing' names no linear layer"):
        train(tmp_path / "wrong", model={"lora": {"targets": ["nothing"]}}, cluster={"samplers": 1, "learners": 1})


def test_ray_replaces_an_actor_that_is_lost(tmp_path: Path) -> None:
    ray = importlib.import_module("groupwise.cluster.ray")
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    handler = signal.getsignal(signal.SIGTERM)
    launcher = ray.RayLauncher(tmp_path, [sleeper("sampler 0")])
    try:
        port = launcher.start(sleeper("sampler 0")).rpartition(":")[2]
        log = tmp_path / "sampler-0.log"
        wait_until(lambda: log.exists() and port in log.read_text())
        found = [process for process in psutil.process_iter(["cmdline"]) if port in str(process.info["cmdline"])]
        (process,) = (one for one in found if not any("keeper.py" in word for word in one.info["cmdline"]))
        process.parent().parent().kill()
        wait_until(lambda: launcher.failure("sampler 0"))
        assert "is lost with its Ray actor" in launcher.failure("sampler 0")
        wait_until(lambda: not process.is_running())
        port = launcher.restart("sampler 0").rpartition(":")[2]
        wait_until(lambda: port in log.read_text())
        assert launcher.failure("sampler 0") is None
    finally:
        launcher.stop()
    assert not [process for process in psutil.process_iter(["cmdline"]) if port in str(process.info["cmdline"])]
    assert signal.getsignal(signal.SIGTERM) is handler  # Ray sets its own


def test_ray_is_asked_for_by_the_name_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = importlib.import_module("groupwise.cluster.ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'groupwise\[ray\]'"):
        ray.loaded_ray(own=False)


def test_weights_of_runs_that_were_killed_are_removed(tmp_path: Path) -> None:
    for name in ("groupwise-killed", "groupwise-no-lock", "other"):
        (tmp_path / name / "000001-v1").mkdir(parents=True)
    (tmp_path / "groupwise-killed" / ".lock").touch()
    (tmp_path / "other" / ".lock").touch()
    (tmp_path / "groupwise-link").symlink_to(tmp_path / "other")
    recipe = Recipe.model_validate({"cluster": {"samplers": 1, "weights": str(tmp_path)}})
    with weights.weights_directory(recipe, Path("run")) as ours:
        assert ours.stat().st_mode & 0o777 == 0o700
        (ours / "000001-v1").mkdir()
        with weights.weights_directory(recipe, Path("run")) as another:  # of the same name, and alive
            assert another != ours and (ours / "000001-v1").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"groupwise-no-lock", "groupwise-link", "other"}
    assert (tmp_path / "other" / "000001-v1").is_dir()


def test_weights_are_removed_where_a_run_is_ended_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from groupwise.cluster import weights; from groupwise.config import Recipe\n"
        "from groupwise.training.interrupts import ending\n"
        "recipe = Recipe.model_validate({'cluster': {'samplers': 1, 'weights': sys.argv[1]}})\n"
        "with weights.weights_directory(recipe, Path('run')) as path:\n"
        "    (path / 'model').mkdir(); ending(lambda: None)(2)"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], timeout=60)
    assert ended.returncode == 130 and not list(tmp_path.iterdir())


def test_published_weights_are_where_all_processes_see_them(tmp_path: Path) -> None:
    def place(size: int = 0, **changes: Any) -> Path:
        recipe = Recipe.model_validate({"rollouts": {"sampler": changes.pop("sampler", "native")}, "cluster": changes})
        with weights.weights_directory(recipe, tmp_path / "run", size) as path:
            assert path.is_dir() and [item.name for item in path.iterdir()] == [".lock"]
        assert not path.exists()
        return path.parent

    (tmp_path / "shared").mkdir()
    assert place(samplers=1) == weights.SHARED_MEMORY
    assert place(sampler="http://localhost:8000") == weights.SHARED_MEMORY
    assert place(10**15, samplers=1) == tmp_path / "run" / "weights"
    assert place(sampler="http://node7:8000") == tmp_path / "run" / "weights"
    assert place(samplers=1, launcher="ray", ray_address="auto") == tmp_path / "run" / "weights"
    assert place(samplers=1, weights=str(tmp_path / "shared")) == tmp_path / "shared"


# --- what cannot be together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts.sampler": "nativ"}, "rollouts.sampler: there is no sampler 'nativ'; did you mean 'native'?"),
        ({"rollouts.sampler": ["native"]}, "rollouts.sampler: a list holds addresses: write 'native' without one"),
        ({"rollouts.sampler": "http://[::1"}, "rollouts.sampler: there is no sampler 'http://[::1'"),
        ({"rollouts.sampler": "http://a:abc"}, "rollouts.sampler: there is no sampler 'http://a:abc'"),
        ({"rollouts.sampler": ["http://a:99999"]}, "rollouts.sampler: there is no sampler 'http://a:99999'"),
        ({"cluster.timeout": 5.0}, "cluster.timeout: is read only where the run has other processes"),
        ({"cluster.max_restarts": 1}, "cluster.max_restarts: is read only where the run starts"),
        ({"rollouts.sampler": "http://a:1", "cluster.max_restarts": 1}, "cluster.max_restarts: is read only where"),
        ({"cluster.gpus_per_sampler": 2}, "cluster.gpus_per_sampler: is read only where cluster.samplers"),
        ({"cluster.samplers": 1, "cluster.vllm": "x"}, "cluster.vllm: is read only where rollouts.sampler = 'vllm'"),
        ({"cluster.samplers": 1, "cluster.vllm_arguments": ["-x"]}, "cluster.vllm_arguments: is read only where"),
        ({"rollouts.sampler": ["http://a:1", "http://a:1/"]}, "rollouts.sampler: names an address twice"),
        ({"rollouts.sampler": "own.py:Own", "cluster.samplers": 1}, "cluster.samplers: a sampler of your own"),
        ({"rollouts.sampler": "own.py:Own", "cluster.learners": 1}, "cluster.learners: a sampler of your own"),
        ({"rollouts.sampler": "http://a:1", "cluster.samplers": 1}, "cluster.samplers: servers at addresses run already"),
        ({"cluster.learners": 1}, "cluster.samplers: 0 means that this process samples"),
        ({"cluster.staleness": 1}, "cluster.staleness: this process cannot sample while it learns"),
        ({"cluster.samplers": 1, "cluster.window": 2}, "cluster.window: is read only where cluster.staleness"),
        ({"cluster.samplers": 1, "cluster.partial": False}, "cluster.partial: is read only where cluster.staleness"),
        ({"cluster.launcher": "ray"}, "cluster.launcher: starts nothing"),
        ({"cluster.samplers": 1, "cluster.ray_address": "auto"}, "cluster.ray_address: is read only where"),
        ({"cluster.weights": "/tmp"}, "cluster.weights: no other process samples"),
        ({"cluster.samplers": 1, "cluster.weights": "/nowhere"}, "cluster.weights: there is no directory /nowhere"),
        ({"cluster.samplers": 1, "model.device": "cuda:1"}, "model.device: 'cuda:1': processes of a run are given devices"),
        ({"cluster.samplers": 1, "cluster.gpus_per_sampler": 2}, "cluster.gpus_per_sampler: the native sampler runs on one GPU"),
        ({"rollouts.sampler": "vllm", "rollouts.top_p": 0.9}, "rollouts.top_p: vLLM does not say which tokens it left out"),
        ({"rollouts.sampler": "vllm", "rollouts.cache_dtype": "float16"}, "rollouts.cache_dtype: is the native sampler's"),
        (
            {"rollouts.sampler": "vllm", "cluster.vllm_arguments": ["--max_num_seqs=4"]},
            "cluster.vllm_arguments: '--max_num_seqs=4': rollouts.max_rows decides on this",
        ),
        ({"rollouts.sampler": "vllm", "rollouts.temperature": 0.001}, "rollouts.temperature: vLLM samples at 0.01 instead"),
    ],
)
def test_combinations_that_cannot_be_exact_are_refused(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        table, _, name = key.partition(".")
        tree.setdefault(table, {})[name] = value
    with pytest.raises(UserError) as refused:
        check_processes(Recipe.model_validate(tree), Source(Path("recipe.toml"), ""))
    assert str(refused.value).startswith(f"recipe.toml, {message}"), refused.value


def test_samplers_elsewhere_keep_a_tied_output_layer(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"lora": {"targets": ["q_proj", "lm_head"]}}, "cluster": {"samplers": 1}}
    with pytest.raises(UserError, match=r"^model.lora.targets, given from Python: 'lm_head' is tied to the embeddings"):
        train(tmp_path / "run", **changes)


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = Recipe.model_validate({"cluster": {"samplers": 7, "learners": 2}})
    check_gpus(recipe, Source(Path("recipe.toml"), ""), 9)
    with pytest.raises(UserError, match="2 for learning and 7 x 1 for sampling are 9 GPUs, and 8 are here"):
        check_gpus(recipe, Source(Path("recipe.toml"), ""), 8)


def test_a_run_in_one_process_starts_nothing() -> None:
    assert launch_of(Recipe()) is session.in_process
    assert launch_of(Recipe.model_validate({"rollouts": {"sampler": "vllm"}})) is launch


# --- examples


EXAMPLES = Path(__file__).parent.parent / "examples" / "cluster"


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sh"], check=True)


@pytest.mark.parametrize("there", [False, True])
def test_the_slurm_script_starts_what_it_says(tmp_path: Path, there: bool) -> None:
    """With stand-ins for Slurm's commands, which run at once what they are given."""
    tools, run = tmp_path / "bin", tmp_path / "run"
    scripts = {
        "scontrol": 'printf "a\\nb\\nc\\n"',
        "srun": f'echo "$@" >> {tmp_path}/srun; while [ "${{1#--}}" != "$1" ]; do shift; done; exec "$@"',
        "groupwise": f'echo "$@" >> {tmp_path}/groupwise; if [ "$1" = serve ]; then exec sleep 61.5; fi; sleep 1',
    }
    tools.mkdir()
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    if there:
        run.mkdir()
        (run / "recipe.toml").touch()
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "a,b,c",
        "SLURM_GPUS_ON_NODE": "2",
    }
    subprocess.run(["bash", EXAMPLES / "slurm.sh", "my.toml", run], env=environment, check=True, timeout=60)
    lines = (tmp_path / "groupwise").read_text().splitlines()
    served, trained = (sorted(line for line in lines if line.startswith(word)) for word in ("serve", "train"))
    assert served == [f"serve my.toml --host 0.0.0.0 --port {port}" for port in (8100, 8101)]
    beginning = f"train --resume {run}" if there else f"train my.toml --out {run}"
    named = [f'"http://{node}:{port}"' for node in "bc" for port in (8100, 8101)]
    asked = f"--set rollouts.sampler=[{','.join(named)}] --set cluster.learners=2 --set cluster.timeout=300"
    assert trained == [f"{beginning} {asked}"]
    ours = [
        process for process in psutil.process_iter(["cmdline"]) if str(tools / "groupwise") in (process.info["cmdline"] or [])
    ]
    wait_until(lambda: not any(process.is_running() for process in ours))


def test_the_kubernetes_manifest_has_the_form_of_a_ray_job() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert set(job["spec"]) == known
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"} == set(workers)
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]
    gpus = workers["replicas"] * int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    shell = shlex.split(job["spec"]["entrypoint"])
    assert shell[:2] == ["sh", "-c"] and len(shell) == 3
    subprocess.run(["sh", "-n", "-c", shell[2]], check=True)
    said = subprocess.run(["sh", "-c", shell[2].replace("exec groupwise", "echo")], capture_output=True, text=True, check=True)
    words = said.stdout.split()
    overrides = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    recipe, _ = load(find_recipe(None), Recipe, overrides)
    assert words[:4] == ["train", "/shared/recipe.toml", "--out", "/shared/run"]
    pieces = [learner_piece(recipe, Path("recipe.toml"), ""), *sampler_pieces(recipe, Path("recipe.toml"))]
    assert recipe.cluster.launcher == "ray" and sum(piece.gpus for piece in pieces) == gpus


def test_a_ray_cluster_where_nobody_listens_is_said_at_once() -> None:
    ray = importlib.import_module("groupwise.cluster.ray")
    port = free_port("127.0.0.1")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:abc"):
        with pytest.raises(UserError, match=rf"^cluster.ray_address: Ray at {address} cannot be reached"):
            ray.check_listens(address)
    ray.check_listens("auto")


def test_what_changed_settings_of_the_cluster_change() -> None:
    assert effect("cluster.max_restarts", {}) == ""
    assert effect("cluster.samplers", {}) == effect("cluster.learners", {}) == "changes results by rounding"
    assert effect("cluster.staleness", {}) == effect("cluster.window", {}) == "changes results"


def test_a_piece_that_is_given_time_ends_by_itself_at_the_end_of_a_run(tmp_path: Path) -> None:
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('ended') or 0)); print('up'); time.sleep(60)"
    launcher, log = LocalLauncher(tmp_path), tmp_path / "sampler-0.log"
    launcher.start(Piece(name="sampler 0", command=["{python}", "-c", script], grace=10.0))
    wait_until(lambda: log.read_text().count("up") == 1)
    launcher.restart("sampler 0")
    wait_until(lambda: log.read_text().count("up") == 2)
    assert "ended" not in log.read_text()
    launcher.stop()
    assert log.read_text().endswith("up\nended\n")
