"""The native sampler: its log-probabilities are the learner's, its samples follow the distribution, its limits hold."""

import shutil
from typing import Any

import pytest
import torch

from groupwise.kernels.sample import sample_kernel
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.drawing import draw
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Batch, Completion, pad_rows
from tests.conftest import need_kernels, owned, packs

PROMPTS = [torch.tensor([3, 12, 4, 15]), torch.tensor([7, 14, 5, 12, 6, 6, 15]), torch.tensor([5, 15])]


def sample(
    model: Any, tokenizer: Any, seed: int = 0, group_size: int = 8, max_rows: int = 1024, backend: Any = "auto", **settings: Any
) -> list[tuple[Completion, ...]]:
    sampler = NativeSampler(owned(model, backend), tokenizer, max_rows=max_rows)
    return groups_of(sampler, group_size, seed, **settings)


def groups_of(sampler: NativeSampler, group_size: int, seed: int = 0, **settings: Any) -> list[tuple[Completion, ...]]:
    sampling = Sampling(**{"max_tokens": 12, **settings})
    return generate_all(sampler, requests(PROMPTS, group_size, sampling, seed))


def spoken(groups: list[tuple[Completion, ...]]) -> list[list[int]]:
    return [completion.tokens.tolist() for group in groups for completion in group]


def as_batch(groups: list[tuple[Completion, ...]]) -> Batch:
    rows = [completion for group in groups for completion in group]
    tokens_BT = pad_rows([row.tokens for row in rows])
    return Batch(
        rows_B=torch.arange(len(rows)),
        prompts=tuple(PROMPTS),
        group_ids_B=torch.arange(len(groups)).repeat_interleave(len(groups[0])),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor([len(row.tokens) for row in rows]),
        mask_BT=pad_rows([row.mask for row in rows]),
        rollout_logprobs_BT=pad_rows([row.logprobs for row in rows]),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_learners(any_model: Any, tokenizer: Any, temperature: float) -> None:
    batch = as_batch(sample(any_model, tokenizer, temperature=temperature))
    assert batch.lengths_B.min() < batch.lengths_B.max(), "rows should end at different times"
    with torch.no_grad():
        logprobs_BT, _ = owned(any_model).completion_logprobs(batch, temperature=temperature)
    torch.testing.assert_close(logprobs_BT, batch.rollout_logprobs_BT, rtol=0, atol=1e-4)


def test_same_seed_same_completions_whatever_is_generated_beside_them(any_model: Any, tokenizer: Any) -> None:
    together = sample(any_model, tokenizer)
    apart = sample(any_model, tokenizer, max_rows=1)
    other = sample(any_model, tokenizer, seed=1)
    assert spoken(together) == spoken(apart)
    assert spoken(together) != spoken(other)


def test_groups_join_as_rows_finish(tokenizer: Any) -> None:
    """Room for one group at a time, prompts of different lengths, memory that held NaN before."""
    from tests.conftest import tiny_model

    model = tiny_model("qwen3", tokenizer)
    assert packs(model)
    for _ in range(3):
        litter = [torch.full((2, 2, 24, 2, 12, 8), float("nan")) for _ in range(8)]
        del litter
        assert spoken(sample(model, tokenizer, max_rows=16)) == spoken(sample(model, tokenizer))


def test_stop_reasons(any_model: Any, tokenizer: Any) -> None:
    completions = [completion for group in sample(any_model, tokenizer, group_size=32) for completion in group]
    for completion in completions:
        ended = completion.tokens[-1] == tokenizer.eos_token_id
        assert completion.stop == ("stop" if ended else "length")
        assert not (completion.tokens[:-1] == tokenizer.eos_token_id).any()
        assert len(completion.tokens) == 12 or ended
        assert len(completion.tokens) == len(completion.logprobs) == len(completion.mask)
        assert tokenizer.eos_token not in completion.text
    assert {completion.stop for completion in completions} == {"stop", "length"}


def test_stop_strings_and_tokens_end_a_completion_and_stay_in_it(any_model: Any, tokenizer: Any) -> None:
    for completion in (c for group in sample(any_model, tokenizer, group_size=32, stop=("12", "+")) for c in group):
        said = [stop for stop in ("12", "+") if stop in completion.text]
        assert bool(said) <= (completion.stop == "stop")
        assert not said or completion.text.endswith(tuple(said))
    star = tokenizer.convert_tokens_to_ids("*")
    groups = sample(any_model, tokenizer, group_size=32, stop_tokens=(star,))
    ended = [c for group in groups for c in group if (c.tokens == star).any()]
    assert ended
    assert all(c.stop == "stop" and c.tokens[-1] == star and "*" in c.text for c in ended)


@pytest.mark.parametrize(
    ("settings", "allowed"), [({"top_k": 2}, 2), ({"top_p": 0.3}, 17), ({"min_p": 0.5}, 17), ({"top_k": 1}, 1)]
)
def test_limits_and_their_logprobs(any_model: Any, tokenizer: Any, settings: dict[str, Any], allowed: int) -> None:
    """A first token is drawn from the cut distribution, and its log-probability is of that one."""
    groups = sample(any_model, tokenizer, group_size=64, max_tokens=1, **settings)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        with torch.no_grad():
            probs = torch.softmax(any_model(input_ids=prompt[None]).logits[0, -1], -1)
        ranked = probs.argsort(descending=True)
        if "top_p" in settings:
            allowed = int((probs[ranked].cumsum(0) - probs[ranked] < settings["top_p"]).sum())
        if "min_p" in settings:
            allowed = int((probs >= settings["min_p"] * probs.max()).sum())
        kept = ranked[:allowed]
        for completion in group:
            token = int(completion.tokens[0])
            assert token in kept
            expected = torch.log(probs[token] / probs[kept].sum())
            torch.testing.assert_close(completion.logprobs[0], expected, rtol=0, atol=1e-4)


@pytest.fixture(params=["compiled", "plain"])
def choose(request: pytest.FixtureRequest) -> Any:
    """Both ways of drawing a token: (scores [R, V], uniforms [R]) -> (tokens [R], logprobs [R])."""
    if request.param == "plain":
        return draw
    need_kernels()
    return sample_kernel()


def test_draw_follows_the_distribution(choose: Any) -> None:
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniforms = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = choose((7 + probs.log()).expand(len(uniforms), 4), uniforms)
    shares = torch.bincount(tokens, minlength=4) / len(uniforms)
    assert shares[1] == 0
    # Five standard deviations of a share of 200,000 draws.
    torch.testing.assert_close(shares, probs, rtol=0, atol=5 * (0.25 / len(uniforms)) ** 0.5)
    torch.testing.assert_close(logprobs, probs[tokens].log(), rtol=0, atol=1e-6)


def test_draw_never_takes_a_token_without_probability(choose: Any) -> None:
    probs = torch.tensor([0.0, 1.0, 0.0])
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert choose(probs.log().expand(3, 3), uniforms)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("V", [1, 511, 512, 513, 5000])
def test_draw_finds_the_token_and_logprob_of_a_plain_cumulative_sum(choose: Any, V: int) -> None:
    scores = 3 * torch.randn(64, V)
    scores[torch.rand(64, V) < 0.9] = -torch.inf
    scores[:, V // 3] = 1.0
    uniforms = torch.rand(64, dtype=torch.float64)
    weights = scores.double().exp()
    plain = torch.searchsorted(weights.cumsum(-1), ((1 - uniforms) * weights.sum(-1))[:, None])[:, 0]
    tokens, logprobs = choose(scores, uniforms)
    assert torch.equal(tokens, plain)
    expected = scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=1e-6)
    for uniform in (0.0, 1 - 2**-53):
        tokens, _ = choose(scores, torch.full((64,), uniform, dtype=torch.float64))
        assert (weights.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_draw_says_which_row_has_no_distribution(choose: Any, strange: float) -> None:
    scores = torch.randn(3, 600)
    scores[1, 555] = strange
    tokens, _ = choose(scores, torch.full((3,), 0.5, dtype=torch.float64))
    assert (tokens >= 600).tolist() == [False, True, False]


def test_a_sampler_in_bfloat16_follows_the_weights_of_the_model(tokenizer: Any) -> None:
    from groupwise.kernels.blocked_bf16 import why_not_bf16
    from tests.conftest import tiny_model

    model = tiny_model("qwen3", tokenizer)
    sampler = NativeSampler(owned(model), tokenizer, dtype=torch.bfloat16)
    assert sampler.model.decoder.packs()
    with torch.no_grad():
        next(model.parameters()).mul_(-1)
    sampler.load(owned(model), 3)
    completion = groups_of(sampler, 4)[0][0]
    assert [span.version for span in completion.versions] == [3]
    assert sampler.model.dtype == (torch.bfloat16 if why_not_bf16() else torch.float32) and model.dtype == torch.float32
    assert all(buffer.dtype == torch.float32 for buffer in sampler.model.module.buffers())
    tokens = torch.cat([PROMPTS[0], completion.tokens])[None]
    exact = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)[len(PROMPTS[0]) - 1 : -1]
    gap = completion.logprobs - exact.gather(1, completion.tokens[:, None])[:, 0]
    assert 0 < gap.abs().mean() < 0.2  # bfloat16 has eight bits, and the weights of this model are large


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_decoder_samples_and_learns_the_same(tokenizer: Any) -> None:
    from tests.conftest import tiny_model
    from tests.test_learner import gradients_of, random_batch

    model = tiny_model("qwen3", tokenizer)
    batch, before = random_batch(model), sample(model, tokenizer, group_size=4)
    gradients = gradients_of(model, batch)
    model.base_model.compile(dynamic=True)
    after = sample(model, tokenizer, group_size=4)
    for completions, again in zip(before, after, strict=True):
        for old, new in zip(completions, again, strict=True):
            assert old.text == new.text
            torch.testing.assert_close(old.logprobs, new.logprobs, rtol=0, atol=1e-4)
    for old, new in zip(gradients, gradients_of(model, batch), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-4 * float(old.abs().max()))
