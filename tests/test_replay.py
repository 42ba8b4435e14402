"""Sampling replay: kept sets are recorded as drawn from, and the learner's softmax runs over them alone, exactly."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.config import LearnerSection
from groupwise.kept import KeptTokens
from groupwise.learner.local import LocalLearner
from groupwise.models import character_tokenizer, head
from groupwise.models.bfloat16 import RoundedWeights
from groupwise.models.cut import CutLogits
from groupwise.models.head import LogitShape, token_logprobs
from groupwise.state import read_state, write_state
from groupwise.types import Batch, Completion, Group, Problem, Score
from tests import reference
from tests.conftest import owned, tiny_model
from tests.test_cli import run
from tests.test_head import Wrapped, model_of
from tests.test_learner import gradient, plain_logprobs, random_batch
from tests.test_sampler import PROMPTS, as_batch, sample
from tests.test_training import metrics_of

N, H, V = 9, 5, 70
LIMITS: list[dict[str, Any]] = [{"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.4}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]


def random_sets(rows: int, vocabulary: int, targets: Tensor | None = None, seed: int = 0) -> Tensor:
    """bool [rows, vocabulary]: sets of one token, of a few, of half, of nearly all, and of all."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.0, 0.02, 0.1, 0.5, 0.97, 1.0]).repeat(rows)[:rows, None]
    sets_NV = torch.rand(rows, vocabulary, generator=generator) < shares
    chosen_N = torch.randint(vocabulary, (rows,), generator=generator) if targets is None else targets
    sets_NV[torch.arange(rows), chosen_N] = True
    return sets_NV


# --- the record


@pytest.mark.parametrize("vocabulary", [1, 17, 31, 32, 33, 64, 1000])
def test_sets_are_recorded_as_they_are_in_little_memory(vocabulary: int) -> None:
    sets_TV = random_sets(24, vocabulary)
    kept = KeptTokens.of(sets_TV)
    words = -(-vocabulary // 32)
    counts_T = sets_TV.sum(1)
    assert kept.lengths.tolist() == [0 if n == vocabulary else min(n, words) for n in counts_T.tolist()]
    tokens = torch.arange(vocabulary)
    contained = torch.stack([kept.contains(token.expand(24)) for token in tokens], 1)
    assert torch.equal(contained, sets_TV)
    for size in {1, 7, 64, vocabulary}:
        cut = torch.cat(list(CutLogits(kept, torch.device("cpu")).blocks(vocabulary, size)), 1)
        assert torch.equal(~cut, sets_TV), size


def test_records_are_joined_and_cut() -> None:
    sets_TV = random_sets(11, V)
    first, second = KeptTokens.of(sets_TV[:4]), KeptTokens.of(sets_TV[4:])
    joined = KeptTokens.join([first, None, second], [4, 2, 7])
    assert joined is not None and len(joined) == 13
    expected = torch.cat([sets_TV[:4], torch.ones(2, V, dtype=torch.bool), sets_TV[4:]])
    for start, stop in [(0, 13), (0, 3), (3, 8), (5, 5), (12, 13)]:
        cut = torch.cat(list(CutLogits(joined.slice(start, stop), torch.device("cpu")).blocks(V, V)), 1)
        assert torch.equal(~cut, expected[start:stop])
    assert KeptTokens.join([None, None], [4, 2]) is None
    with pytest.raises(ValueError, match="kept sets of 70 tokens do not fit a model with 71 logits"):
        next(CutLogits(joined, torch.device("cpu")).blocks(71, 71))


def test_groups_keep_their_record_through_a_checkpoint(tmp_path: Path) -> None:
    kept = KeptTokens.of(random_sets(3, V))
    zeros = torch.zeros(3)
    rows = [
        Completion(text="", tokens=zeros.long(), logprobs=zeros, mask=zeros == 0, stop="stop", versions=(), kept=found)
        for found in (kept, None)
    ]
    score = Score(reward=0.0, correct=False)
    problem = Problem(id="a", prompt="a")
    group = Group(problem=problem, prompt_tokens=zeros.long(), completions=tuple(rows), scores=(score, score))
    write_state(tmp_path / "group", asdict(group))
    again = Group.from_dict(read_state(tmp_path / "group"))
    found = again.completions[0].kept
    assert found is not None and again.completions[1].kept is None
    assert torch.equal(found.words, kept.words) and torch.equal(found.ends, kept.ends) and found.vocabulary == V


# --- the output layer


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("settings", [{}, {"logit_scale": 0.3}, {"logits_scaling": 4.0, "final_logit_softcapping": 2.0}])
@pytest.mark.parametrize("block", [1, 9, 64, 4096])
def test_values_and_gradients_are_the_formulas(
    block: int, settings: dict[str, float], wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against loops over the kept tokens, in float64, with blocks of a few logits and of all."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": block * N})
    monkeypatch.setattr(head, "TOKENS_AT_ONCE", 2)
    torch.manual_seed(0)
    layer = torch.nn.Linear(H, V).double()
    inputs, targets = (3 * torch.randn(N, H, dtype=torch.float64)).requires_grad_(), torch.randint(V, (N,))
    sets_NV = random_sets(N, V, targets)
    by_logprobs, by_entropy = torch.randn(2, N, dtype=torch.float64)

    def gradients(logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        loss = (logprobs * by_logprobs + entropy * by_entropy).sum()
        return [logprobs, entropy, *torch.autograd.grad(loss, [inputs, layer.weight, layer.bias])]

    model = model_of(Wrapped(layer) if wrapped else layer, **settings)
    model.config.vocab_size = V
    ours = token_logprobs(model, inputs, targets, 0.7, entropy_gradient=True, kept=KeptTokens.of(sets_NV))
    scores = layer(inputs) * settings.get("logit_scale", 1.0) / settings.get("logits_scaling", 1.0)
    cap = settings.get("final_logit_softcapping")
    z_NV = (cap * torch.tanh(scores / cap) if cap else scores) / 0.7
    rows = zip(z_NV, sets_NV, targets.tolist(), strict=True)
    plain = [reference.replayed(list(z_V), kept_V.nonzero()[:, 0].tolist(), target) for z_V, kept_V, target in rows]
    theirs = torch.stack([a for a, _ in plain]), torch.stack([b for _, b in plain])
    for mine, other in zip(gradients(*ours), gradients(*theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_are_finite_differences(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 8 * N})
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, H), (V, H), (V,))]
    targets = torch.randint(V, (N,))
    cut, shape = CutLogits(KeptTokens.of(random_sets(N, V, targets)), targets.device), LogitShape(0.5, cap, 0.7)
    assert torch.autograd.gradcheck(lambda *given: head._Head.apply(*given, targets, shape, True, None, cut), inputs)


def test_a_cut_token_far_above_the_kept_ones_costs_nothing() -> None:
    """Kept logits 1 and 0 beside a cut one of 1000, in float32: p = sigmoid(1), and the gradient of the cut one is 0."""
    layer = torch.nn.Linear(1, V, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0, 1000.0, *[5.0] * (V - 3)])[:, None])
    kept = KeptTokens.of((torch.arange(V) < 2).expand(2, V))
    logprobs, entropy = token_logprobs(model_of(layer), torch.ones(2, 1), torch.tensor([0, 1]), 1.0, True, kept=kept)
    torch.testing.assert_close(logprobs, torch.tensor([-0.313262, -1.313262]))
    torch.testing.assert_close(entropy, torch.tensor([0.582203, 0.582203]))
    (logprobs.sum() + entropy.sum()).backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all() and (layer.weight.grad[2:] == 0).all()


@pytest.mark.parametrize("way", ["blocked copies", "autocast"])
def test_in_bfloat16_it_is_the_whole_softmax_divided_by_the_kept_mass(way: str) -> None:
    """log q(y) = log p(y) - log sum of p over the kept set, with p of the same bfloat16 head."""
    from groupwise.kernels.blocked_bf16 import why_not_bf16

    if way == "blocked copies" and (reason := why_not_bf16()):
        pytest.skip(reason)
    torch.manual_seed(0)
    layer, inputs, targets = torch.nn.Linear(6, V), 2 * torch.randn(N, 6), torch.randint(V, (N,))
    sets_NV = random_sets(N, V, targets)
    rounded = RoundedWeights() if way == "blocked copies" else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rounded is None):
        ours, entropy_N = token_logprobs(model_of(layer), inputs, targets, 1.0, rounded=rounded, kept=KeptTokens.of(sets_NV))
        every = [token_logprobs(model_of(layer), inputs, torch.full((N,), j), 1.0, rounded=rounded)[0] for j in range(V)]
    q_NV = torch.stack(every, 1).masked_fill(~sets_NV, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(ours, q_NV[range(N), targets], rtol=1e-5, atol=1e-5)
    entropies = -(q_NV.exp() * q_NV.masked_fill(~sets_NV, 0)).sum(-1)
    torch.testing.assert_close(entropy_N, entropies, rtol=1e-5, atol=1e-5)


# --- sampler and learner


def plain_replay(model: Any, batch: Batch, sets: Sequence[Tensor]) -> Tensor:
    """Each row alone through the model's own forward; the log-softmax over the kept sets [T, V] of each row."""
    rows = []
    for row, length in enumerate(batch.lengths_B.tolist()):
        prompt = batch.prompts[int(batch.group_ids_B[row])]
        tokens = torch.cat([prompt, batch.tokens_BT[row, :length]])
        z_TV = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double().masked_fill(~sets[row], -torch.inf)
        rows.append(torch.log_softmax(z_TV, -1)[range(length), tokens[len(prompt) :]])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def with_sets(batch: Any, vocabulary: int) -> tuple[Any, list[Tensor]]:
    """The batch with random kept sets; one row has none recorded."""
    sets = [random_sets(length, vocabulary, batch.tokens_BT[i, :length], i) for i, length in enumerate(batch.lengths_B.tolist())]
    sets[3] = torch.ones_like(sets[3])
    return replace(batch, kept=tuple(None if i == 3 else KeptTokens.of(found) for i, found in enumerate(sets))), sets


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_learners_logprobs_are_the_samplers(any_model: Any, tokenizer: Any, limits: dict[str, Any]) -> None:
    """Through the learner, with the gap that a run reports; without the kept sets they are far apart."""
    groups = sample(any_model, tokenizer, **limits)
    batch = replace(as_batch(groups), kept=tuple(row.kept for group in groups for row in group))
    learner = LocalLearner(owned(any_model), named("grpo", beta=0.0), LearnerSection(), updates=1, temperature=1.0, max_tokens=12)
    computed, metrics = learner.compute_logprobs(batch)
    torch.testing.assert_close(computed.old_logprobs_BT, batch.rollout_logprobs_BT, rtol=0, atol=1e-5)
    assert metrics["sampler_gap_max"] <= 1e-5
    _, whole = learner.compute_logprobs(replace(batch, kept=()))
    assert whole["sampler_gap_mean"] > 1e-3
    assert metrics["entropy"] < whole["entropy"]


def test_the_reference_is_not_truncated(tokenizer: Any) -> None:
    """With the policy as its own reference, a token's log-ratio is minus the log of the mass that top_p left it."""
    model = tiny_model("qwen3", tokenizer)
    batch = replace(as_batch(groups := sample(model, tokenizer, top_p=0.8)), kept=tuple(c.kept for g in groups for c in g))
    learner = LocalLearner(
        owned(model), named("grpo"), LearnerSection(), updates=1, temperature=1.0, max_tokens=12, reference=owned(model)
    )
    computed, _ = learner.compute_logprobs(batch)
    assert computed.ref_logprobs_BT is not None
    torch.testing.assert_close(computed.ref_logprobs_BT, plain_logprobs(model, batch), rtol=0, atol=5e-5)
    kept_mass = (computed.ref_logprobs_BT - computed.old_logprobs_BT).exp()[batch.mask_BT]
    assert kept_mass.min() > 0.8 - 1e-4 and kept_mass.max() < 1 + 1e-4 and kept_mass.min() < 0.95


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_kept_sets_are_what_the_limits_leave(tokenizer: Any, limits: dict[str, Any]) -> None:
    model = tiny_model("qwen3", tokenizer)
    for prompt, group in zip(PROMPTS, sample(model, tokenizer, **limits), strict=True):
        for row in group:
            assert row.kept is not None and len(row.kept) == len(row.tokens)
            with torch.no_grad():
                z_TV = model(input_ids=torch.cat([prompt, row.tokens])[None]).logits[0, len(prompt) - 1 : -1].double()
            cut_TV = next(CutLogits(row.kept, torch.device("cpu")).blocks(z_TV.shape[1], z_TV.shape[1]))
            for z_V, cut_V in zip(z_TV, cut_TV, strict=True):
                assert (~cut_V).nonzero()[:, 0].tolist() == reference.limited(z_V.tolist(), **limits)


def test_a_larger_vocabulary_has_lists_and_bitmaps() -> None:
    """301 tokens: a list of ids is shorter than a bitmap of 10 words in some places, and longer in others."""
    characters = character_tokenizer("".join(chr(0x4E00 + i) for i in range(299)))
    model = tiny_model("qwen3", characters)
    groups = sample(model, characters, group_size=16, temperature=0.3, top_p=0.3)
    batch = replace(as_batch(groups), kept=tuple(row.kept for group in groups for row in group))
    kept = batch.kept_tokens()
    assert kept is not None and 0.1 < (kept.lengths == 10).float().mean() < 0.9
    with torch.no_grad():
        logprobs_BT, _ = owned(model).completion_logprobs(batch, temperature=0.3)
    torch.testing.assert_close(logprobs_BT, batch.rollout_logprobs_BT, rtol=0, atol=3e-5)  # logits are three times as large


def test_no_limits_no_record(tokenizer: Any) -> None:
    assert all(row.kept is None for group in sample(tiny_model("qwen3", tokenizer), tokenizer) for row in group)


def test_requests_with_and_without_limits_in_one_batch_and_slots_used_again(tokenizer: Any) -> None:
    """A slot that a limited row has left is none of the next row's."""
    from groupwise.rollouts.base import Request, Sampling
    from groupwise.rollouts.driver import generate_all
    from groupwise.rollouts.native import NativeSampler

    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer, max_rows=8)
    ways = [Sampling(max_tokens=12, top_p=0.8), Sampling(max_tokens=12), Sampling(max_tokens=7, top_k=2)]
    asked = [Request(prompt=PROMPTS[i % 3], sampling=ways[i % 3], seed=i, n=4) for i in range(9)]
    for request, group in zip(asked, generate_all(sampler, asked), strict=True):
        for row in group:
            assert (row.kept is None) == (request.sampling is ways[1])
            assert row.kept is None or (len(row.kept) == len(row.tokens) and bool(row.kept.contains(row.tokens).all()))


def test_values_and_gradients_through_a_model_are_its_own_forwards(any_model: Any) -> None:
    """Tied and untied embeddings, soft caps: the gradient of every parameter, summed in place as in an update."""
    batch, sets = with_sets(random_batch(any_model), any_model.config.vocab_size)
    weights_BT = torch.randn(batch.tokens_BT.shape, generator=torch.Generator().manual_seed(1))

    def gradients(logprobs_BT: Tensor) -> list[Tensor]:
        (logprobs_BT * weights_BT).sum().backward()
        found = [p.grad.clone() for p in any_model.parameters() if p.grad is not None]
        any_model.zero_grad(set_to_none=True)
        return found

    model = owned(any_model)
    with model.running():
        logprobs_BT, _ = model.completion_logprobs(batch)
        ours = gradients(logprobs_BT)
    plain_BT = plain_replay(any_model, batch, sets).float()
    torch.testing.assert_close(logprobs_BT, plain_BT, rtol=0, atol=5e-5)
    theirs = gradients(plain_BT)
    norm = sum(float(value.square().sum()) for value in theirs) ** 0.5
    assert sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5 <= 1e-4 * norm


def test_the_gradient_does_not_depend_on_the_cut(any_model: Any) -> None:
    batch, _ = with_sets(random_batch(any_model), any_model.config.vocab_size)
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    whole = gradient(any_model, batch)
    assert (gradient(any_model, replace(batch, kept=())) - whole).norm() / whole.norm() > 0.01
    for other, settings in [
        (batch, {"micro_batch_tokens": 1}),
        (batch, {"micro_batch_tokens": 40}),
        (batch, {"share_prompts": False, "micro_batch_tokens": 60}),
        (shuffled, {"micro_batch_tokens": 50}),
    ]:
        error = (gradient(any_model, other, **settings) - whole).norm() / whole.norm()
        assert error <= 1e-5, (settings, float(error))


# --- runs

TINY = [
    "training.steps=2", "training.eval_problems=4", "rollouts.top_p=0.8", "rollouts.prompts_per_step=4", "algorithm.name=grpo",
]  # fmt: skip


@pytest.mark.parametrize("extra", ["algorithm.correction=tis", "learner.old_logprobs=sampler"])
def test_runs_that_compare_with_the_sampler(tmp_path: Path, extra: str) -> None:
    result = run("train", "quick", "--out", tmp_path / "run", *(part for item in [*TINY, extra] for part in ("--set", item)))
    assert result.exit_code == 0, result.output
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert len(rows) == 2 and all(row["kl_ref"] >= 0 for row in rows)
    if "correction" in extra:
        assert all(row["sampler_gap_max"] <= 1e-4 and abs(row["correction_mean"] - 1) <= 1e-4 for row in rows)


def test_a_sampler_without_kept_sets_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from groupwise.rollouts.native import NativeSampler\n"
        "from groupwise.kept import KeptTokens\n"
        "class Forgets(NativeSampler):\n"
        "    async def generate(self, request):\n"
        "        return tuple(replace(row, kept=None) for row in await super().generate(request))\n"
        "class Mixes(NativeSampler):\n"
        "    async def generate(self, request):\n"
        "        rows = await super().generate(request)\n"
        "        return tuple(replace(row, tokens=(row.tokens + 1) % 17) for row in rows)\n"
        "def forgets(settings, model, tokenizer):\n    return Forgets(model, tokenizer)\n"
        "def mixes(settings, model, tokenizer):\n    return Mixes(model, tokenizer)\n"
    )

    def trained(name: str, *more: str) -> Any:
        sets = [*TINY, f"rollouts.sampler={tmp_path}/mine.py:{name}", *more]
        return run("train", "quick", "--out", tmp_path / name / str(len(more)), *(p for item in sets for p in ("--set", item)))

    assert trained("forgets").exit_code == 0
    refused = trained("forgets", "learner.old_logprobs=sampler")
    assert refused.exit_code == 2
    assert "gives no kept sets" in refused.stderr and "learner.old_logprobs = 'sampler'" in " ".join(refused.stderr.split())
    mixed = trained("mixes")
    assert mixed.exit_code == 2
    assert "is not in the kept set it was drawn from" in " ".join(mixed.stderr.split())


def test_the_references_limits_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().tolist()
    assert reference.limited(logits, top_p=0.8 - 1e-9) == [1, 3]
    assert reference.limited(logits, top_p=0.81) == [1, 2, 3]
    assert reference.limited(logits, top_k=1) == [1]
    assert reference.limited(logits, min_p=0.29) == [1, 2, 3]
    assert reference.limited(logits, min_p=0.31) == [1, 3]
