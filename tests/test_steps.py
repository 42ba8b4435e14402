"""What a GPU runs, here on a CPU: steps of fixed sizes, and flex attention. Their graphs and compiled kernels need a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.attention import decoding, flexible, packs
from groupwise.attention.packed import Packed
from groupwise.attention.steps import FixedSteps
from tests.conftest import tiny_model
from tests.test_rollouts_native import sample, spoken


@pytest.mark.parametrize("settings", [{}, {"max_rows": 16, "group_size": 12}, {"group_size": 30}], ids=["few", "joining", "many"])
def test_steps_of_fixed_sizes_say_the_same(
    any_model: Any, tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs(any_model):
        pytest.skip("its attention takes the general path")
    expected = sample(any_model, tokenizer, max_tokens=40, **settings)
    sizes: set[tuple[int, ...]] = set()
    steps: list[tuple[int, ...]] = []

    class Counted(FixedSteps):
        def __call__(self, tokens_R: Tensor, at: Any) -> Tensor:
            hidden_RH = super().__call__(tokens_R, at)
            sizes.update(self._captured)
            steps.append((len(tokens_R), at.window))
            return hidden_RH

    monkeypatch.setattr(decoding, "_fixed", lambda _: True)
    monkeypatch.setattr(decoding, "FixedSteps", Counted)
    monkeypatch.setattr(decoding, "WINDOW", 8)
    found = sample(any_model, tokenizer, max_tokens=40, **settings)
    assert spoken(found) == spoken(expected)
    for one, other in zip(sum(found, ()), sum(expected, ()), strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
    assert steps and len(sizes) < len(steps)
    assert all(rows % 16 == 0 and (window % 8 == 0 or window == 40) for rows, window in steps)


def test_steps_are_tried_before_a_gpu_takes_them(any_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs(any_model):
        pytest.skip("its attention takes the general path")
    monkeypatch.setattr(decoding, "_fixed", lambda _: True)
    assert decoding._trial(any_model)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "attend_newest", lambda *arguments: arguments[4] * 0)
        assert not decoding._trial(any_model), "a wrong attention is found out"

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no graph for this")

    monkeypatch.setattr(FixedSteps, "_capture", failing)
    assert not decoding._trial(any_model), "and so is one that fails"


def test_what_a_token_sees_by_hand() -> None:
    # Two prompts of 2 and 1 tokens, then rows of 2 tokens of the second and 1 token of the first.
    seen = flexible.sees(torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([2, 1]), "cpu")
    tokens = torch.arange(6)
    found = seen(tokens, tokens, tokens[:, None], tokens[None])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert found.int().tolist() == expected


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (4, 2)])
def test_flex_attention_is_the_packed_attention(heads: int, shared: int) -> None:
    lengths, prompts, rows = [70, 1, 130], torch.tensor([0, 0, 2, 1]), torch.tensor([40, 3, 100, 60])
    layout = Packed(lengths, prompts, rows, "cpu")
    N = len(layout.positions_N)
    query, key, value = torch.randn(N, heads, 16), torch.randn(N, heads // shared, 16), torch.randn(N, heads // shared, 16)
    found = flexible.attention(query, key, value, layout.block_mask, 0.3)
    torch.testing.assert_close(found, layout(0, query, key, value, 0.3), rtol=1e-4, atol=1e-5)


def test_a_device_without_a_packed_path_takes_the_general_one(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer).to("meta")
    assert not packs(model)
    assert "general path" in str(decoding.slower_path(model))
