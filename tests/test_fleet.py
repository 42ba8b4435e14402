"""Samplers in other processes: the same completions as in this one, whoever dies, freezes or hangs meanwhile."""

import asyncio
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

import groupwise as gw
from groupwise.config import Recipe
from groupwise.errors import RunError
from groupwise.learner.local import LocalLearner
from groupwise.learner.probing import probe
from groupwise.models import LanguageModel, load_tokenizer
from groupwise.models.published import publish
from groupwise.rollouts import wire
from groupwise.rollouts.attending import Limits
from groupwise.rollouts.base import Request, Sampling, requests
from groupwise.rollouts.driver import gather, generate_all
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.probe import Probe
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published
from groupwise.training.distributed import Distributed
from groupwise.types import Completion
from tests.launcher import Launcher
from tests.served import Servers, answering, free_port

TEXT = torch.tensor([3, 12, 4, 15, 5, 1, 7, 14, 6, 2, 9, 8, 11, 10])
TIMEOUT = 5.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> "Weights":
    return Weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    launcher = Launcher()
    made = Servers(launcher, "arithmetic-base", tmp_path_factory.mktemp("servers"))
    yield made
    made.close()
    launcher.close()


class Weights:
    """Versions of one model, each published."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.tokenizer = directory, load_tokenizer("arithmetic-base")
        self.models: dict[int, LanguageModel] = {}
        self.expected: dict[Any, list[tuple[Completion, ...]]] = {}

    def model(self, version: int) -> LanguageModel:
        if version not in self.models:
            made = LanguageModel.load("arithmetic-base")
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter += 0.02 * version * parameter.std() * torch.randn(parameter.shape, generator=generator)
            publish(made, self.directory / f"v{version}")
            self.models[version] = made
        return self.models[version]

    def published(self, version: int) -> Published:
        self.model(version)
        return Published(directory=self.directory / f"v{version}", id=f"weights of v{version}", version=version)

    def probe(self, version: int, *others: int) -> Probe:
        found = [probe(self.model(number), TEXT) for number in (version, *others)]
        return Probe(tokens=TEXT, logprobs=found[0], others=tuple(found[1:]))

    @property
    def long(self) -> list[Request]:
        """What takes so long that something can happen meanwhile."""
        return self.wanted(24, 16)

    def in_process(self, wanted: Sequence[Request], version: int = 0) -> list[tuple[Completion, ...]]:
        key = version, tuple((one.seed, one.offset, one.n, one.sampling, *one.prompt.tolist()) for one in wanted)
        if key not in self.expected:
            sampler = NativeSampler(self.model(version), self.tokenizer)
            sampler.version = version
            self.expected[key] = generate_all(sampler, wanted)
        return self.expected[key]

    def fleet(self, addresses: Sequence[str], faults: list[str] | None = None, **settings: Any) -> Fleet:
        limits = Limits(timeout=settings.pop("timeout", TIMEOUT), max_restarts=settings.pop("max_restarts", 20))
        connect = partial(NativeServer, tokenizer=self.tokenizer)
        return Fleet(addresses, connect, limits=limits, tell=([] if faults is None else faults).append, **settings)

    def wanted(self, groups: int = 8, n: int = 8, seed: int = 3, **sampling: Any) -> list[Request]:
        prompts = [
            torch.tensor(self.tokenizer.encode(f"{number}+{3 * number}-{number % 7}=")) for number in range(11, 11 + groups)
        ]
        return requests(prompts, n, Sampling(**{"max_tokens": 48, **sampling}), seed)


def check_same(found: list[tuple[Completion, ...]], expected: list[tuple[Completion, ...]]) -> None:
    assert [len(group) for group in found] == [len(group) for group in expected]
    for one, other in zip((row for group in found for row in group), (row for group in expected for row in group), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)
        assert (one.text, one.stop, one.versions) == (other.text, other.stop, other.versions)
        assert one.mask.all() and one.mask.shape == one.tokens.shape
        assert (one.kept is None) == (other.kept is None)
        if one.kept is not None and other.kept is not None:
            assert one.kept.words.tolist() == other.kept.words.tolist() and one.kept.ends.tolist() == other.kept.ends.tolist()


@contextmanager
def meanwhile(fleet: Fleet, *works: Callable[[], object]) -> Iterator["Future[None]"]:
    """Do it in another thread as soon as the fleet generates; done at the end of the context. Gives what is done when it is."""

    def run() -> None:
        wait_until(lambda: fleet.health()["rows"] > 0)
        time.sleep(0.05)
        for work in works:
            work()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run)
        yield done
        done.result()


def held(address: str, work: Callable[[], object]) -> None:
    """Do it while a server stands still, with completions begun; somebody must generate until it is done."""
    with httpx.Client(base_url=address, timeout=60) as server:

        def is_at_work() -> bool:
            return bool(server.get("/health").json()["rows"])

        def stands_still() -> bool:
            server.post("/resume").raise_for_status()
            wait_until(is_at_work, pause=0.0)
            server.post("/pause", params={"mode": "keep"}).raise_for_status()
            return is_at_work()

        try:
            wait_until(stands_still)
            work()
        finally:
            server.post("/resume").raise_for_status()


def wait_until(is_true: Callable[[], bool], seconds: float = 60.0, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(pause)


@pytest.mark.parametrize("count", [1, 2])
def test_same_completions_as_in_process(weights: Weights, servers: Servers, count: int) -> None:
    wanted = [*weights.wanted(), *weights.wanted(4, 4, seed=5, top_p=0.9, temperature=1.3), *weights.wanted(3, 2, stop=("*",))]
    with weights.fleet(servers.alive(count)) as fleet:
        for version in (0, 1):
            fleet.load(weights.published(version), weights.probe(version))
            check_same(generate_all(fleet, wanted), weights.in_process(wanted, version))
            metrics = fleet.metrics()
            assert (metrics["cluster/samplers"], metrics["cluster/reissued"], metrics["cluster/waiting"]) == (count, 0, 0)
            idle = [metrics[f"cluster/idle/sampler_{index}"] for index in range(count)]
            assert all(isinstance(share, float) and 0 <= share < 1 for share in idle), "each had something to do"
        assert fleet.health() == {"version": 1, "waiting": 0, "rows": 0, "samplers": count}


def test_killed_again_and_again(weights: Weights, servers: Servers) -> None:
    """Requests of the dead are done by the living, and who comes back has the newest weights."""
    wanted, faults = weights.long, list[str]()
    expected = weights.in_process(wanted, 1)
    with weights.fleet(servers.alive(2), faults, restarts=servers, most_rows=32) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        fleet.load(weights.published(1), weights.probe(1, 0))
        for index in (0, 1, 0):
            wait_until(lambda: fleet.health()["samplers"] == 2)
            with meanwhile(fleet, partial(servers.kill, index)):
                check_same(generate_all(fleet, wanted), expected)
        wait_until(lambda: len(faults) == 3)
        metrics = fleet.metrics()
    assert [index for index, _ in servers.reasons] == [0, 1, 0] and metrics["cluster/sampler_restarts"] == 3
    assert metrics["cluster/most_attempts"] != 1 and metrics["cluster/reissued"] != 0


def test_frozen_then_awake(weights: Weights, servers: Servers) -> None:
    """Nobody can restart it: others do its work, and awake it loads the newest weights before it is asked for anything."""
    wanted, faults = weights.long, list[str]()
    with weights.fleet(servers.alive(2), faults, most_rows=32) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        with meanwhile(fleet, lambda: servers.send(0, signal.SIGSTOP)):
            check_same(generate_all(fleet, wanted), weights.in_process(wanted))
        wait_until(lambda: bool(faults))
        assert faults == [f"sampler 0: no answer for {TIMEOUT:g} s"]
        fleet.load(weights.published(1), weights.probe(1, 0))
        assert fleet.health()["samplers"] == 1
        with meanwhile(fleet, lambda: servers.send(0, signal.SIGCONT)):
            check_same(generate_all(fleet, wanted), weights.in_process(wanted, 1))
        wait_until(lambda: fleet.health()["samplers"] == 2)
        check_same(generate_all(fleet, wanted), weights.in_process(wanted, 1))
        assert fleet.metrics()["cluster/sampler_restarts"] == 0


def test_frozen_and_replaced(weights: Weights, servers: Servers) -> None:
    wanted = weights.long
    with weights.fleet(servers.alive(2), restarts=servers, most_rows=32) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        with meanwhile(fleet, lambda: servers.send(1, signal.SIGSTOP)):
            check_same(generate_all(fleet, wanted), weights.in_process(wanted))
        wait_until(lambda: len(servers.reasons) == 1 and fleet.health()["samplers"] == 2)
    assert servers.reasons == [(1, f"no answer for {TIMEOUT:g} s")]


def test_a_server_that_answers_and_does_nothing_is_replaced(weights: Weights, servers: Servers) -> None:
    wanted, addresses = weights.long, servers.alive(2)
    with weights.fleet(addresses, restarts=servers, most_rows=32) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        pause = partial(httpx.post, f"{addresses[0]}/pause", params={"mode": "keep"}, timeout=60)
        with meanwhile(fleet, lambda: pause().raise_for_status()):
            check_same(generate_all(fleet, wanted), weights.in_process(wanted))
        wait_until(lambda: len(servers.reasons) == 1)
    assert servers.reasons[0][0] == 0 and "done nothing" in servers.reasons[0][1]


def test_all_dead_at_once(weights: Weights, servers: Servers) -> None:
    """Requests wait until somebody is back, with the newest weights."""
    wanted = weights.long
    with weights.fleet(servers.alive(2), restarts=servers, most_rows=32) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        with meanwhile(fleet, *(partial(servers.kill, index) for index in (0, 1))):
            check_same(generate_all(fleet, wanted), weights.in_process(wanted))
    assert len(servers.reasons) >= 2


def test_too_many_restarts_end_the_run(weights: Weights, servers: Servers) -> None:
    with weights.fleet(servers.alive(1), restarts=servers, max_restarts=0) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        text = r"restarted 0 times \(cluster.max_restarts\); the last: sampler 0: "
        with meanwhile(fleet, partial(servers.kill, 0)), pytest.raises(RunError, match=text):
            generate_all(fleet, weights.long)
        with pytest.raises(RunError, match="restarted 0 times"):
            fleet.load(weights.published(1))


def test_nobody_answers_at_all(weights: Weights) -> None:
    with weights.fleet([f"http://127.0.0.1:{free_port()}"], timeout=0.1) as fleet:
        fleet.load(weights.published(0))
        with pytest.raises(RunError, match=r"no sampler was ready for 2 s; the last fault: sampler 0: .*Connect"):
            generate_all(fleet, weights.wanted(1))


HEALTHY = 200, {"id": None, "waiting": 0, "rows": 0, "steps": 0}


def test_a_server_that_never_loads_is_not_asked_all_the_time(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.rollouts.fleet.PATIENCE", 1)
    answers = {"/health": HEALTHY, "/load": (503, {"error": {"message": "no space"}})}
    published = weights.published(0)
    with answering(answers) as (address, asked), weights.fleet([address]) as fleet:
        fleet.load(published)
        with pytest.raises(RunError, match="no sampler was ready for 5 s; the last fault: sampler 0: HTTP 503: no space"):
            generate_all(fleet, weights.wanted(1))
        assert asked["/load"] <= 4


def test_a_request_whose_connection_always_breaks_is_not_sent_for_ever(weights: Weights) -> None:
    answers = {"/health": HEALTHY, "/load": (200, {}), "/inference/v1/generate": (0, None)}
    with answering(answers) as (address, asked), weights.fleet([address]) as fleet:
        fleet.load(weights.published(0))
        text = "a request was sent 30 times and never completed; the last time sampler 0: RemoteProtocolError"
        with pytest.raises(RunError, match=text):
            generate_all(fleet, weights.wanted(1))
        assert asked["/inference/v1/generate"] == 30


def test_a_request_whose_servers_are_given_up_is_not_sent_for_ever(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a server that somebody has paused: it answers, loads weights, and completes nothing."""
    monkeypatch.setattr("groupwise.rollouts.dispatch.MOST_ATTEMPTS", 3)
    answers = {"/health": HEALTHY, "/load": (200, {}), "/inference/v1/generate": (-1, None)}
    with answering(answers) as (address, asked), weights.fleet([address], timeout=1.0) as fleet:
        fleet.load(weights.published(0))
        text = "a request was sent 3 times and never completed; the last time sampler 0: it answers, but has done nothing for 1 s"
        with pytest.raises(RunError, match=text):
            generate_all(fleet, weights.wanted(1))
        assert asked["/inference/v1/generate"] == 3


def test_too_few_open_files_are_not_the_servers_fault(weights: Weights, servers: Servers) -> None:
    with weights.fleet(servers.alive(1), restarts=servers) as fleet:
        fleet.load(weights.published(0))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)

        async def generate() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            try:
                await gather(*map(fleet.generate, weights.wanted(8)))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)

        with pytest.raises(RunError, match=r"too many open files, .*ulimit -n"):
            asyncio.run(generate())
        assert not servers.reasons


@pytest.mark.parametrize(
    ("n", "logprobs", "spans", "message"),
    [
        (2, [-1.0, -2.0], [(0, 2)], "1 completions for a request of 2"),
        (1, [-1.0, float("nan")], [(0, 2)], "not finite"),
        (1, [-1.0, -2.0], [(0, 1)], "do not cover 2 tokens"),
        (1, [-1.0, -2.0], [(0, 1), (0, 2)], "do not cover 2 tokens"),
        (1, [-1.0, -2.0], [], "do not cover 2 tokens"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(
    n: int, logprobs: list[float], spans: list[tuple[int, int]], message: str
) -> None:
    choice = {
        "index": 0,
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": logprob} for logprob in logprobs]},
        "weight_versions": [{"version": "v", "start": start, "end": end} for start, end in spans],
    }
    with pytest.raises(RunError, match=message):
        wire.decode_answer({"choices": [choice]}, n, version_of=lambda _: 0, text_of=lambda tokens: ["" for _ in tokens])


def test_an_outsider_restarts_it(weights: Weights, servers: Servers) -> None:
    """At the same address, as Kubernetes does: it has lost its weights, and is given them again."""
    wanted, faults = weights.wanted(4, 4), list[str]()
    (address,) = servers.alive(1)
    with weights.fleet([address], faults) as fleet:
        fleet.load(weights.published(1), weights.probe(1))
        servers.kill(0)
        servers.start(0, int(address.rpartition(":")[2]))
        check_same(generate_all(fleet, wanted), weights.in_process(wanted, 1))
    assert faults


def test_another_models_weights_are_noticed(weights: Weights, servers: Servers) -> None:
    told: list[str] = []
    with weights.fleet(servers.alive(2), told) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        with pytest.raises(RunError, match=r"sampler \d has loaded .*v2 twice and has other weights: .* differ by .* nats"):
            fleet.load(weights.published(2), weights.probe(0))
        with pytest.raises(RunError, match="twice"):
            generate_all(fleet, weights.wanted(1))
    assert any("after loading weights of v2 its log-probabilities differ" in text for text in told)


def test_weights_that_were_not_renewed_are_noticed(weights: Weights) -> None:
    """However little an update changed, and however much rounding does."""
    new, old = torch.zeros(63), torch.full((63,), 4e-4)
    noise = 1e-4 * torch.randn(63)
    made = Probe(tokens=torch.arange(64), logprobs=new, others=(old,))
    assert made.problem(new + noise) is None
    assert "published before" in (made.problem(old + noise) or "")
    assert "not finite" in (made.problem(torch.full((63,), torch.nan)) or "")
    routed = new.clone()
    routed[5:20] = 0.3
    assert made.problem(routed) is None, "some tokens went to other experts"


def test_versions_of_tokens(weights: Weights, servers: Servers) -> None:
    """New weights arrive while completions are under way: these go on, and say which weights made which tokens."""
    wanted, (address,) = weights.wanted(24, 16, temperature=3.0), servers.alive(1)  # so hot, few end early
    with weights.fleet([address], most_rows=32, timeout=30.0) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        groups: list[tuple[Completion, ...]] = []
        with meanwhile(fleet, partial(held, address, lambda: fleet.load(weights.published(1)))) as done:
            while not done.done():
                groups += generate_all(fleet, wanted)
        check_same(generate_all(fleet, wanted), weights.in_process(wanted, 1))
    spans = [completion.versions for group in groups for completion in group]
    assert {span.version for versions in spans for span in versions} == {0, 1}
    assert any(len(versions) == 2 for versions in spans)
    for versions, completion in zip(spans, (completion for group in groups for completion in group), strict=True):
        assert [span.version for span in versions] == sorted({span.version for span in versions})
        ends = [0, *(span.end for span in versions)]
        assert [span.start for span in versions] == ends[:-1] and ends[-1] == len(completion.tokens)


def test_completions_under_way_are_finished_first(weights: Weights, servers: Servers) -> None:
    wanted, (address,) = weights.wanted(24, 16, temperature=3.0), servers.alive(1)  # so hot, few end early
    with weights.fleet([address], partial=False, most_rows=32, timeout=30.0) as fleet:
        fleet.load(weights.published(0), weights.probe(0))
        groups: list[tuple[Completion, ...]] = []
        with meanwhile(fleet, partial(held, address, lambda: fleet.load(weights.published(1)))) as done:
            while not done.done():
                groups += generate_all(fleet, wanted)
        groups += generate_all(fleet, wanted)
    expected = [weights.in_process(wanted, version) for version in (0, 1)]
    made_by = [group[0].versions[0].version for group in groups]
    assert set(made_by) == {0, 1}
    check_same(groups, [expected[version][index % len(wanted)] for index, version in enumerate(made_by)])


def test_a_wrong_request_is_an_error_and_not_tried_again(weights: Weights, servers: Servers) -> None:
    faults: list[str] = []
    with weights.fleet(servers.alive(1), faults) as fleet:
        fleet.load(weights.published(0))
        long = requests([torch.ones(4000, dtype=torch.long)], 1, Sampling(max_tokens=4), 0)
        with pytest.raises(RunError, match="HTTP 400"):
            generate_all(fleet, long)
        wanted = weights.wanted(2)
        check_same(generate_all(fleet, wanted), weights.in_process(wanted))
        assert fleet.metrics()["cluster/most_attempts"] == 1
    assert not faults


def test_what_is_cancelled_is_cancelled_at_the_server(weights: Weights, servers: Servers) -> None:
    (address,) = servers.alive(1)
    with weights.fleet([address]) as fleet:
        fleet.load(weights.published(0))

        async def begin_and_cancel() -> None:
            tasks = [asyncio.ensure_future(fleet.generate(request)) for request in 4 * weights.long]
            while not httpx.get(f"{address}/health", timeout=60).json()["rows"]:
                assert not all(task.done() for task in tasks)
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(begin_and_cancel())
        wait_until(lambda: fleet.health()["rows"] == 0)
        wait_until(lambda: httpx.get(f"{address}/health", timeout=60).json()["rows"] == 0, 5)
        check_same(generate_all(fleet, weights.wanted(2)), weights.in_process(weights.wanted(2)))


def test_any_event_loop_and_several_at_once(weights: Weights, servers: Servers) -> None:
    wanted = [weights.wanted(2, 4, seed=seed) for seed in range(4)]
    with weights.fleet(servers.alive(1)) as fleet:
        fleet.load(weights.published(0))
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda one: generate_all(fleet, one), wanted))
        for one, groups in zip(wanted, found, strict=True):
            check_same(groups, weights.in_process(one))


def test_conversations_stay_where_their_keys_are(weights: Weights, servers: Servers) -> None:
    addresses = servers.alive(2)
    first = [replace(request, keep=True) for request in weights.wanted(6, 1)]

    def going_on(groups: list[tuple[Completion, ...]]) -> list[Request]:
        more = torch.tensor(weights.tokenizer.encode("1+1="))
        return [
            replace(
                request, prompt=torch.cat([request.prompt, group[0].tokens, more]), continues=group[0].handle, seed=9, keep=False
            )
            for request, group in zip(first, groups, strict=True)
        ]

    expected = weights.in_process(first)
    with weights.fleet(addresses, restarts=servers) as fleet:
        fleet.load(weights.published(0))
        groups = generate_all(fleet, first)
        check_same(groups, expected)

        def kept() -> list[int]:
            return [int(httpx.get(f"{address}/health", timeout=60).json()["kept"]) for address in addresses]

        assert sum(kept()) == 6 and min(kept()) > 0, "both keep some"
        second = going_on(groups)
        check_same(generate_all(fleet, second), weights.in_process(second))
        assert kept() == [0, 0], "each was continued"
        again = going_on(generate_all(fleet, first))
        servers.kill(0)
        check_same(generate_all(fleet, again), weights.in_process(again))


def test_weights_on_their_way(weights: Weights, servers: Servers, tmp_path: Path) -> None:
    """Published, loaded, probed; the newest two stay on the disk."""
    recipe = Recipe()
    learner = LocalLearner.build(recipe, gw.named("dapo"), LanguageModel.load("arithmetic-base"))
    wanted = weights.wanted(2)
    with weights.fleet(servers.alive(2)) as fleet:
        pieces = Distributed(learner, fleet, tmp_path, prompt=wanted[0].prompt, max_tokens=64, tolerance=1e-3)
        ids: list[str] = []
        for _ in range(4):
            pieces.bring_weights()
            ids.append(max(path.name for path in tmp_path.iterdir()))
            check_same(generate_all(fleet, wanted), generate_all(NativeSampler(learner.weights(), weights.tokenizer), wanted))
            with torch.no_grad():
                for parameter in learner.weights().parameters():
                    parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
        assert sorted(path.name for path in tmp_path.iterdir()) == ids[-2:] and len(set(ids)) == 4
        assert all(id.startswith(f"00000{number}-v0-") for number, id in enumerate(ids, 1))
        assert pieces.metrics()["cluster/samplers"] == 2
