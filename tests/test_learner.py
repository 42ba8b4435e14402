"""The learner's promises: its log-probabilities are the model's, and a step's gradient does not depend on how it is cut."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.config import LearnerSection
from groupwise.errors import RunError
from groupwise.learner.local import LocalLearner
from groupwise.learner.micro_batches import cut_rows
from groupwise.learner.optimiser import Step
from groupwise.models import LanguageModel, checkpoint, new_module
from groupwise.types import Batch, TrainingBatch, pad_rows
from tests.conftest import owned, tiny_model

PROMPT_LENGTHS, GROUP_SIZE = (3, 7, 5), 4


def random_batch(model: Any, seed: int = 0) -> TrainingBatch:
    """Three groups of four ragged completions, one row of one token, one token inside a row not trained on."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    lengths = [1, *torch.randint(2, 9, (len(PROMPT_LENGTHS) * GROUP_SIZE - 1,), generator=generator).tolist()]
    tokens_BT = pad_rows([torch.randint(2, vocabulary, (length,), generator=generator) for length in lengths])
    mask_BT = pad_rows([torch.ones(length, dtype=torch.bool) for length in lengths])
    mask_BT[1, 0] = False
    old_BT = torch.where(mask_BT, -2 + 0.5 * torch.randn(tokens_BT.shape, generator=generator), 0)
    return TrainingBatch(
        rows_B=torch.arange(len(lengths)),
        prompts=tuple(torch.randint(2, vocabulary, (length,), generator=generator) for length in PROMPT_LENGTHS),
        group_ids_B=torch.arange(len(PROMPT_LENGTHS)).repeat_interleave(GROUP_SIZE),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor(lengths),
        mask_BT=mask_BT,
        rollout_logprobs_BT=old_BT,
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=old_BT - 0.1,
        advantages_BT=torch.where(mask_BT, torch.randn(len(lengths), 1, generator=generator), 0),
    )


def plain_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Each row alone, unpadded, through the model's own forward."""
    result = torch.zeros(batch.tokens_BT.shape)
    for row, length in enumerate(batch.lengths_B.tolist()):
        prompt = batch.prompts[int(batch.group_ids_B[row])]
        tokens = torch.cat([prompt, batch.tokens_BT[row, :length]])
        logits = model(input_ids=tokens[None]).logits[0].float() / temperature
        logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        result[row, :length] = logprobs.gather(1, tokens[len(prompt) :, None])[:, 0]
    return result


@pytest.mark.parametrize("share_prompts", [True, False])
def test_logprobs_are_those_of_the_models_own_forward(any_model: Any, share_prompts: bool) -> None:
    batch = random_batch(any_model)
    with torch.no_grad():
        ours, entropy_BT = owned(any_model).completion_logprobs(batch, temperature=0.7, share_prompts=share_prompts)
        theirs = plain_logprobs(any_model, batch, temperature=0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    inside = torch.arange(ours.shape[1]) < batch.lengths_B[:, None]
    assert (entropy_BT[inside] > 0).all()
    assert (entropy_BT[~inside] == 0).all()


def gradient(model: Any, batch: Batch, algorithm: str = "dapo", **settings: Any) -> Tensor:
    """The gradient of one update, before the optimiser sees it."""
    section = LearnerSection(**settings)
    learner = LocalLearner(owned(model), named(algorithm), section, updates=10, temperature=1.0, max_tokens=16)
    taken: list[Tensor] = []

    def keep(loss: float) -> Step:
        taken.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return Step(0.0, 0.0, 0)

    learner.optimiser.step = keep  # type: ignore[method-assign]
    model.zero_grad(set_to_none=True)
    learner.update(batch)
    model.zero_grad(set_to_none=True)
    return taken[0]


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_gradient_does_not_depend_on_the_cut(any_model: Any, algorithm: str) -> None:
    batch = random_batch(any_model)
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    whole = gradient(any_model, batch, algorithm)
    assert whole.norm() > 1e-3
    for other, settings in [
        (batch, {"micro_batch_tokens": 1}),
        (batch, {"micro_batch_tokens": 40}),
        (batch, {"share_prompts": False}),
        (batch, {"share_prompts": False, "micro_batch_tokens": 60}),
        (shuffled, {}),
        (shuffled, {"micro_batch_tokens": 50}),
    ]:
        error = (gradient(any_model, other, algorithm, **settings) - whole).norm() / whole.norm()
        assert error <= 1e-5, (settings, float(error))


def test_padding_changes_nothing(any_model: Any) -> None:
    batch = random_batch(any_model)
    wide = replace(
        batch,
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, 5))
            for name in ("tokens_BT", "mask_BT", "advantages_BT", "rollout_logprobs_BT", "old_logprobs_BT", "ref_logprobs_BT")
        },
    )
    whole = gradient(any_model, batch)
    assert (gradient(any_model, wide) - whole).norm() / whole.norm() <= 1e-5


def test_cut_rows_covers_every_row_once_within_the_budget() -> None:
    batch = Batch(
        rows_B=torch.arange(5),
        prompts=(torch.ones(10), torch.ones(4)),
        group_ids_B=torch.tensor([0, 1, 0, 1, 0]),
        tokens_BT=torch.zeros(5, 30, dtype=torch.long),
        lengths_B=torch.tensor([30, 2, 6, 20, 1]),
        mask_BT=torch.ones(5, 30, dtype=torch.bool),
        rollout_logprobs_BT=torch.zeros(5, 30),
    )
    cuts = [rows.tolist() for rows in cut_rows(batch, 80, padded=True)]
    assert sorted(row for rows in cuts for row in rows) == [0, 1, 2, 3, 4]
    assert cuts == [[0, 2], [4, 1, 3]]  # 2 x (10 + 30); 3 x (4 + 20), which the one token of row 4 shares
    packed = [rows.tolist() for rows in cut_rows(batch, 45, padded=False)]
    assert packed == [[0], [2, 4, 1, 3]]  # 10 + 30; 10 + 6, 1, 4 + 2, 20


def test_an_update_that_is_not_finite_is_skipped_and_several_stop_the_run(tokenizer: Any) -> None:

    model = tiny_model("qwen3", tokenizer)
    learner = LocalLearner(
        owned(model), named("grpo", beta=0.0), LearnerSection(max_bad_updates=3), updates=10, temperature=1.0, max_tokens=16
    )
    learner.model.check_logits()
    batch = random_batch(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def update(bad: bool) -> float:
        """With a final norm that makes every hidden state infinite, or with the model as it is."""
        norm = model.base_model.norm
        handle = norm.register_forward_hook(lambda *arguments: arguments[-1] * float("inf")) if bad else None
        found = learner.update(batch).latest["skipped_updates"]
        if handle is not None:
            handle.remove()
        return found

    assert update(bad=True) == 1
    assert update(bad=True) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert update(bad=False) == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert learner.version == 1
    update(bad=True)
    update(bad=True)
    with pytest.raises(RunError, match="3 updates in a row"):
        update(bad=True)


def test_check_logits_knows_every_architecture(any_model: Any) -> None:
    owned(any_model).check_logits()


def test_rows_that_teach_nothing_are_not_run_and_change_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    model = tiny_model("qwen3", tokenizer)
    batch = random_batch(model)
    idle_B = torch.arange(len(batch)) % 3 == 0
    batch = replace(batch, advantages_BT=torch.where(idle_B[:, None], 0, batch.advantages_BT))
    seen: list[int] = []
    original = LanguageModel.completion_logprobs

    def counted(model: LanguageModel, part: Batch, **settings: Any) -> Any:
        seen.append(len(part))
        return original(model, part, **settings)

    monkeypatch.setattr(LanguageModel, "completion_logprobs", counted)
    skipped = gradient(model, batch)
    assert seen == [int((~idle_B).sum())]
    monkeypatch.setattr("groupwise.algorithms.Algorithm.zero_advantage_is_idle", False)
    whole = gradient(model, batch)
    assert (skipped - whole).norm() / whole.norm() <= 1e-5


def gradients_of(model: Any, batch: Batch, **settings: Any) -> list[Tensor]:
    """The gradient that one update of DAPO takes, by parameter."""
    return update_for_gradients(model, **settings)(batch)


def update_for_gradients(model: Any, **settings: Any) -> Callable[[Batch], list[Tensor]]:
    """Such an update, after the trials of what runs the model."""
    learner = LocalLearner(
        owned(model),
        named("dapo", overlong_cache=0.0),
        LearnerSection(learning_rate=0.0, **settings),
        updates=10,
        temperature=1.0,
        max_tokens=16,
    )
    found: list[Tensor] = []

    def take(_: float) -> Step:
        found.extend(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)
        return Step(0.0, 0.0, 0)

    def update(batch: Batch) -> list[Tensor]:
        learner.update(batch)
        model.zero_grad(set_to_none=True)
        return found

    learner.optimiser.step = take  # type: ignore[method-assign]
    learner.model.decoder.packs()
    return update


def test_checkpointing_gives_the_same_gradient_and_keeps_less(any_model: Any) -> None:
    batch = random_batch(any_model)

    def kept(checkpointed: bool) -> tuple[list[Tensor], int]:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        update = update_for_gradients(any_model, checkpointing=checkpointed)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return update(batch), sum(sizes.values())

    (plain, plain_bytes), (ours, our_bytes) = kept(False), kept(True)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert our_bytes < 0.7 * plain_bytes
    assert not any("forward" in vars(module) for module in any_model.modules())


def test_checkpointing_brings_no_dropout(tokenizer: Any) -> None:
    """OPT's layers read whether they are in training themselves."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    model = new_module({"model_type": "opt", "max_position_embeddings": 64, "dropout": 0.5, **sizes}, tokenizer, seed=0)
    batch = random_batch(model)
    plain, ours = gradients_of(model, batch), gradients_of(model, batch, checkpointing=True)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_bfloat16_products_leave_weights_and_gradients_in_float32(any_model: Any) -> None:
    batch = random_batch(any_model)
    exact, rough = (
        torch.cat([g.flatten() for g in gradients_of(any_model, batch, precision=p)]) for p in ("float32", "bfloat16")
    )
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=0) > 0.98


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 5])
def test_gradients_in_place_are_autograds_own(tokenizer: Any, tied: bool, padding: int | None) -> None:
    """Of embedding and output layer, over two backward passes; the padding token's embedding is not taught."""
    from groupwise.models.gradients import gradients_in_place

    model = tiny_model("qwen3", tokenizer)
    if tied:
        model.lm_head.weight = model.base_model.embed_tokens.weight
    model.base_model.embed_tokens.padding_idx = padding
    batch = random_batch(model)
    assert (batch.tokens_BT == 5).any()

    def gradients(in_place: bool) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for weight in (1.0, -0.3):
            with gradients_in_place(model) if in_place else nullcontext():
                logprobs_BT, _ = owned(model).completion_logprobs(batch)
            (weight * logprobs_BT.square()).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours, plain = gradients(True), gradients(False)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    with gradients_in_place(model):
        logprobs_BT, _ = owned(model).completion_logprobs(batch)
    returned = torch.autograd.grad(logprobs_BT.sum(), [model.lm_head.weight], allow_unused=True)
    assert returned == (None,), "what is added in place is not returned too"
    assert not any("forward" in vars(module) for module in model.modules())
    model.zero_grad(set_to_none=True)


def test_the_embeddings_gradient_adds_in_the_same_order_every_time() -> None:
    """Thousands of tokens of few kinds, on two threads."""
    from groupwise.models.gradients import gradients_in_place

    embedding = torch.nn.Embedding(5, 256)
    model = torch.nn.Sequential(embedding)
    tokens, weight = torch.randint(5, (4000,)), torch.randn(4000, 256)

    def gradient() -> Tensor:
        embedding.weight.grad = None
        with gradients_in_place(model):
            (embedding(tokens) * weight).sum().backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad.clone()

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(10))


def test_weights_that_are_not_contiguous_are_loaded(tokenizer: Any, tmp_path: Path) -> None:
    module = tiny_model("llama", tokenizer)
    weights = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    for parameter in weights:
        parameter.data = parameter.data.t().contiguous().t()
    before = [parameter.detach().clone() for parameter in weights]
    checkpoint.save_weights(module, tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in weights:
            parameter.zero_()
    checkpoint.load_weights(module, tmp_path / "model")
    assert not any(parameter.is_contiguous() for parameter in weights)
    assert all(torch.equal(parameter, expected) for parameter, expected in zip(weights, before, strict=True))
