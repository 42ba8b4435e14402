"""What one process of a sharded learner does in tests/test_sharded.py, and the same in a single process."""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.cli import main
from groupwise.config import CriticSection, LearnerSection, LoraSection
from groupwise.errors import LearnerLost, RunError
from groupwise.files import DiskError
from groupwise.learner.base import Learner
from groupwise.learner.critic import Critic
from groupwise.learner.following import Leader, follow
from groupwise.learner.local import LocalLearner
from groupwise.learner.processes import ManyRanks
from groupwise.learner.ranks import ONE_RANK, Ranks
from groupwise.learner.sharded import ShardedLearner
from groupwise.models import LanguageModel, character_tokenizer, sharding
from groupwise.models.adapters import add_adapters
from groupwise.models.sharding import full
from groupwise.tasks.arithmetic import CHARACTERS
from groupwise.types import Batch, TrainingBatch, upgrade
from tests import zoo
from tests.conftest import ARCHITECTURES, owned, tiny_model
from tests.test_learner import random_batch

UPDATES = 2
TOKENS = 40
"""Of a micro-batch, so that each process has several."""


@dataclass(frozen=True)
class Case:
    """A learner, and what it learns from."""

    algorithm: str = "grpo"
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the algorithm."""
    architecture: str = "qwen3"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of [learner]."""
    lora: bool = False
    backend: str = "auto"
    mixed: bool = False
    """Whether several processes gather weights in bfloat16, as on GPUs."""
    rows: str = "all"
    unused: bool = False
    """Whether a layer has a weight that no token uses, as a mixture's expert may."""


CASES: dict[str, Case] = {
    "grpo": Case(),
    "dapo": Case("dapo"),
    "gspo": Case("gspo"),
    "dcpo": Case("dcpo"),
    "kl": Case(changes={"beta": 0.1}),
    "ppo": Case("ppo"),
    "entropy": Case(changes={"entropy_bonus": 0.01}),
    "checkpointing": Case(settings={"checkpointing": True}, changes={"beta": 0.1}),
    "prompts not shared": Case("dapo", settings={"share_prompts": False}),
    "padded batches": Case("dapo", changes={"beta": 0.1}, backend="transformers", settings={"checkpointing": True}),
    "bfloat16": Case("dapo", settings={"precision": "bfloat16"}),
    "gathered in bfloat16": Case(changes={"beta": 0.1}, backend="torch", settings={"precision": "bfloat16"}, mixed=True),
    "sampler's log-probabilities": Case(changes={"beta": 0.1}, lora=True, settings={"old_logprobs": "sampler"}),
    "lora": Case("dapo", lora=True),
    "lora and kl": Case(changes={"beta": 0.1}, lora=True),
    "lora and ppo": Case("ppo", lora=True),
    "rows without advantage": Case(rows="half idle"),
    "no advantage at all": Case(rows="idle"),
    "one group": Case("dapo", rows="one group"),
    "one row": Case("ppo", rows="one row"),
    "llama": Case("dapo", architecture="llama"),
    "gemma2": Case("dapo", architecture="gemma2"),
    "mixture of experts": Case("gspo", architecture="qwen3_moe"),
    "recurrent layers": Case(architecture="qwen3_next", settings={"checkpointing": True}),
    "a weight without use": Case("ppo", unused=True, settings={"weight_decay": 1.0}),
    "layers with weights in common": Case(architecture="zamba"),
    "mixture, checkpointing": Case("grpo", architecture="qwen3_moe", settings={"checkpointing": True}),
}
CHECKPOINT = Case("ppo")
CHECKPOINTS = {
    "all": CHECKPOINT,
    "lora": Case("dapo", lora=True),
    "mixture": Case("dapo", architecture="qwen3_moe"),
    "critic with buffers": Case("ppo", architecture="deepseek_v3"),
}
"""Of what is saved and loaded."""
TEXT = torch.tensor([5, 6, 7, 8, 9])
"""That models are compared by."""


def new_learner(case: Case, ranks: Ranks = ONE_RANK) -> LocalLearner:
    tokenizer = character_tokenizer(CHARACTERS)

    def base() -> Any:
        known = case.architecture in ARCHITECTURES
        module = tiny_model(case.architecture, tokenizer) if known else zoo.build(case.architecture)
        if case.unused:
            layer = module.get_decoder().layers[0]
            layer.register_parameter("unused", torch.nn.Parameter(torch.ones(6, 4)))
        return add_adapters(module, LoraSection(rank=4, alpha=8.0), seed=3) if case.lora else module

    algorithm = named(case.algorithm, **case.changes)
    section = LearnerSection(**{"micro_batch_tokens": TOKENS, "learning_rate": 1e-2, **case.settings})
    model = owned(base(), case.backend)
    critic = None
    if "critic" in algorithm.needs:
        of_critic = model.with_shared_base() if case.lora else owned(base())
        critic = Critic(of_critic, CriticSection(), section, updates=10, ranks=ranks)
    arguments: dict[str, Any] = {
        "updates": 10,
        "temperature": 0.9,
        "max_tokens": 16,
        "reference": owned(base()).freeze() if algorithm.needs_reference and not case.lora else None,
        "critic": critic,
        "ranks": ranks,
    }
    kind = LocalLearner if ranks is ONE_RANK else ShardedLearner
    return kind(model, algorithm, section, **arguments)


def new_batch(case: Case, learner: LocalLearner) -> TrainingBatch:
    batch = random_batch(learner.model.module)
    idle_B = torch.zeros(len(batch), dtype=torch.bool)
    if case.rows == "half idle":
        idle_B = (batch.group_ids_B == 0) | (torch.arange(len(batch)) == 7)
    elif case.rows == "idle":
        idle_B = ~idle_B
    elif case.rows == "one group":
        batch = batch.select(torch.tensor([4, 6]))
    elif case.rows == "one row":
        batch = batch.select(torch.tensor([5]))
    if len(idle_B) == len(batch):
        batch = replace(batch, advantages_BT=torch.where(idle_B[:, None], 0, batch.advantages_BT))
    return batch


def learn(case: Case, ranks: Ranks = ONE_RANK) -> dict[str, Any]:
    """Log-probabilities, updates, and the gradients of the first."""
    with gathering_in_bfloat16() if case.mixed and ranks is not ONE_RANK else nullcontext():
        learner = new_learner(case, ranks)
    found: dict[str, Any] = {}
    minibatch = annotated(new_batch(case, learner), learner)
    found["old"], found["reference"], found["values"] = (
        minibatch.old_logprobs_BT,
        minibatch.ref_logprobs_BT,
        minibatch.values_BT,
    )
    records: list[Any] = []
    with gradients(learner) as taken:
        found["update"] = [learner.update(minibatch, records.append)]
    found["gradient"] = taken
    found["update"] += [learner.update(minibatch) for _ in range(UPDATES - 1)]
    found["weights"] = weights(learner)
    names = ("logprob", "low", "high", "clipped", "entropy")
    rows = [(int(row), name, part[name][i]) for part in records for i, row in enumerate(part["rows_B"]) for name in names]
    found["records"] = sorted(rows, key=lambda item: item[:2])
    return found


@contextmanager
def gathering_in_bfloat16() -> Iterator[None]:
    """Within: models are sharded as on GPUs."""
    original = sharding.fully_shard

    def shard(module: Any, **settings: Any) -> Any:
        return original(module, **{**settings, "mp_policy": sharding._mixed_precision()})

    sharding.fully_shard = shard  # type: ignore[assignment]
    try:
        yield
    finally:
        sharding.fully_shard = original


def annotated(batch: TrainingBatch, learner: Learner) -> TrainingBatch:
    plain = Batch(**{item.name: getattr(batch, item.name) for item in fields(Batch)})
    with_logprobs, _ = learner.compute_logprobs(plain)
    moved_BT = with_logprobs.old_logprobs_BT + torch.where(batch.mask_BT, 0.1 * torch.sin(batch.tokens_BT.float()), 0)
    more: dict[str, Any] = {"old_logprobs_BT": moved_BT, "advantages_BT": batch.advantages_BT}
    if with_logprobs.values_BT is not None:
        more["returns_BT"] = torch.where(batch.mask_BT, batch.tokens_BT.float() / 17, 0)
    return upgrade(TrainingBatch, with_logprobs, **more)


@contextmanager
def gradients(learner: LocalLearner) -> Iterator[list[Tensor]]:
    """Within: the gradients of each optimiser's next step, whole."""
    taken: list[Tensor] = []
    optimisers = learner._optimisers
    for optimiser in optimisers:

        def step(loss: float, optimiser: Any = optimiser, original: Any = optimiser.step) -> Any:
            zero = [parameter.detach() * 0 if parameter.grad is None else parameter.grad for parameter in optimiser.parameters]
            taken.append(torch.cat([full(gradient).flatten() for gradient in zero]))
            return original(loss)

        optimiser.step = step  # type: ignore[method-assign]
    yield taken
    for optimiser in optimisers:
        del optimiser.step  # type: ignore[method-assign]


@torch.no_grad()
def weights(learner: LocalLearner) -> list[Tensor]:
    """Everything that is trained, whole."""
    return [full(parameter).clone() for optimiser in learner._optimisers for parameter in optimiser.parameters]


@torch.no_grad()
def moments(learner: LocalLearner) -> list[Tensor]:
    found: list[Tensor] = []
    for optimiser in learner._optimisers:
        for parameter in optimiser.parameters:
            state = optimiser.adam.state[parameter]
            found += [full(state[name]).clone() for name in ("exp_avg", "exp_avg_sq", "step")]
    return found


def state_of(learner: LocalLearner) -> dict[str, Any]:
    counts = [optimiser.position for optimiser in learner._optimisers]
    return {"weights": weights(learner), "moments": moments(learner), "counts": [position[1:] for position in counts]}


def after_updates(case: Case, ranks: Ranks = ONE_RANK, updates: int = UPDATES) -> LocalLearner:
    learner = new_learner(case, ranks)
    minibatch = annotated(new_batch(case, learner), learner)
    for _ in range(updates):
        learner.update(minibatch)
    return learner


def skipped(ranks: Ranks = ONE_RANK) -> dict[str, Any]:
    """An update whose log-probabilities are not finite, on the rows of one process only, and one that is finite."""
    learner = new_learner(Case("dapo", settings={"micro_batch_tokens": 20}), ranks)
    minibatch = annotated(new_batch(Case(), learner), learner)
    before = weights(learner)
    bad = replace(minibatch, old_logprobs_BT=minibatch.old_logprobs_BT.clone())
    original = LanguageModel.completion_logprobs

    def infinite(model: LanguageModel, part: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
        logprobs_BT, entropy_BT = original(model, part, **settings)
        return torch.where((part.rows_B == 0)[:, None], torch.inf * logprobs_BT, logprobs_BT), entropy_BT

    LanguageModel.completion_logprobs = infinite  # type: ignore[method-assign]
    try:
        update = learner.update(bad)
    finally:
        LanguageModel.completion_logprobs = original  # type: ignore[method-assign]
    same = all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))
    after = learner.update(minibatch)
    return {"skipped": update.latest["skipped_updates"], "same": same, "then": after.latest["skipped_updates"],
            "version": learner.version}  # fmt: skip


def small(ranks: int) -> list[str]:
    """The cases of so many processes: all of two, and of three those whose rows do not spread evenly."""
    few = ("dapo", "ppo", "lora and kl", "one group", "one row", "rows without advantage", "mixture of experts")
    return [name for name in CASES if ranks == 2 or name in few]


# --- what processes do


def everything(directory: Path, sources: list[str]) -> None:
    """All cases over the processes, and checkpoints; process 0 writes what it found."""
    ranks = ManyRanks.join()
    found: dict[str, Any] = {name: learn(CASES[name], ranks) for name in small(ranks.size)}
    found["skipped"] = skipped(ranks)
    for source in sources:
        for name, case in CHECKPOINTS.items():
            learner = new_learner(case, ranks)
            learner.load(directory / source / name)
            found[f"{name} of {source}"] = state_of(learner)
    for name, case in CHECKPOINTS.items():
        learner = after_updates(case, ranks)
        saved = directory / f"{ranks.size}" / name
        if ranks.rank == 0:
            saved.mkdir(parents=True)
        ranks.gather(None)
        files = ranks.gather(dict(learner.save(saved)))
        found[f"saved {name}"] = state_of(learner)
        found[f"files {name}"] = {file: digest for part in files for file, digest in part.items()}
        learner.publish(saved / "published")
        found[f"probe {name}"] = learner.probe(TEXT)
    if ranks.rank == 0:
        torch.save(found, directory / f"{ranks.size}.pt")
        ranks.end(0)
    else:
        raise SystemExit(ranks.order())


def led(directory: Path) -> None:
    """A leader's calls, in whose last one process 1 fails."""
    ranks = ManyRanks.join()
    learner = new_learner(CHECKPOINT, ranks)
    if ranks.rank:
        _at_the_fourth_update(learner, _fail)
        raise SystemExit(follow(learner, ranks))  # type: ignore[arg-type]
    leader = Leader(learner, ranks)  # type: ignore[arg-type]
    leader.begin_step()
    minibatch = annotated(new_batch(CHECKPOINT, learner), leader)
    records: list[Any] = []
    updates = [leader.update(minibatch, records.append), leader.update(minibatch)]
    (directory / "led").mkdir()
    files = leader.save(directory / "led")
    leader.publish(directory / "led" / "published")
    updates.append(leader.update(minibatch))
    probes = [leader.probe(TEXT)]
    (directory / "damaged").mkdir()
    for _ in range(2):  # a failure that all processes see alike leaves them in step
        try:
            leader.load(directory / "damaged")
        except FileNotFoundError:
            probes.append(leader.probe(TEXT))
    try:
        leader.save(directory / "missing")
    except DiskError:
        probes.append(leader.probe(TEXT))
    leader.load(directory / "led")
    again = leader.update(minibatch)
    taken_back, version = leader.take_back(), leader.version
    try:
        leader.update(minibatch)
        lost = "not"
    except RunError as error:
        lost = f"{type(error).__name__}: {error}"
    try:
        leader.probe(TEXT)
    except LearnerLost as error:
        lost += f"; then {error}"
    found = {"updates": updates, "again": again, "probes": probes, "files": files, "records": len(records), "lost": lost}
    torch.save({**found, "taken back": taken_back, "version": version}, directory / "led.pt")
    leader.close()


def lost(how: str, limit: float) -> None:
    """Process 1 is killed, stands still or fails while the others learn; or process 0 ends while they wait for it. Process 0
    prints what it makes of that, and how many seconds it took."""
    ranks = ManyRanks.join(limit)
    learner = new_learner(Case("dapo"), ranks)
    if ranks.rank:
        if ranks.rank == 1 and how in ENDS:
            _at_the_fourth_update(learner, ENDS[how])
        if ranks.rank == 1 and how == "stopped while it saves":
            learner.save = ENDS["stopped"]  # type: ignore[method-assign]
        raise SystemExit(follow(learner, ranks))  # type: ignore[arg-type]
    leader = Leader(learner, ranks)  # type: ignore[arg-type]
    minibatch = annotated(new_batch(Case(), learner), leader)
    for _ in range(3):
        leader.update(minibatch)
    if how == "without its leader":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "closed":
        leader.close(3)
        raise SystemExit(3)
    started = time.monotonic()
    try:
        if how == "stopped while it saves":
            leader.save(Path("missing"))
        else:
            leader.update(minibatch)
    except RunError as error:
        print(f"{error}\n{time.monotonic() - started:.1f}", file=sys.stderr)
        raise SystemExit(5 if isinstance(error, LearnerLost) else 6) from None


def command(*arguments: str) -> None:
    """The command line."""
    sys.argv = ["groupwise", *arguments]
    main()


def _at_the_fourth_update(learner: LocalLearner, do: Callable[[], Any]) -> None:
    original, count = learner.update, itertools.count(1)

    def update(*arguments: Any) -> Any:
        if next(count) == 4 + (do is _fail):
            do()
        return original(*arguments)

    learner.update = update  # type: ignore[method-assign]


def _fail() -> None:
    raise RuntimeError("this process has a fault")


def _refuse() -> None:
    raise RunError("your surrogate fails on these rows")


ENDS: dict[str, Callable[..., Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda *_: os.kill(os.getpid(), signal.SIGSTOP),
    "its rows are refused": _refuse,
}
"""What may happen to one process while the others learn."""


# --- starting them

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.sharded_cases"])  # which imports torch once for all


def start(ranks: int, function: Callable[..., None], *arguments: Any, log: Path) -> list[Any]:
    """So many processes that find each other as those of torchrun do; what they print goes to LOG.RANK."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    processes = [CONTEXT.Process(target=_child, args=(function, arguments, rank, ranks, port, log)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def _child(function: Callable[..., None], arguments: Any, rank: int, ranks: int, port: int, log: Path) -> None:
    described = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in described.items()})
    with log.with_suffix(f".{rank}").open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(*arguments)


def end(processes: list[Any], seconds: float) -> list[int | None]:
    """The exit codes of processes, which have so long; those that have not ended by then (None) are killed."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
