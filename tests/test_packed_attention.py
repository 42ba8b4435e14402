"""Attention in training, with the compiled kernel and without, against attention row by row in float64."""

import pytest
import torch
from torch import Tensor

from groupwise.kernels.packed_attention import PackedRows, unsupported
from groupwise.models.attention import training
from groupwise.models.attention.training import PackedAttention
from groupwise.models.attention.training_padded import PaddedBlocks
from tests.conftest import need_kernels

SCALE = 0.3


@pytest.fixture(params=["compiled", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the attention runs in C++ (and then not in PyTorch) or in PyTorch."""
    if request.param == "plain":
        return False
    need_kernels()
    monkeypatch.setattr(training, "PaddedBlockAttention", None)
    return True


def plain(prompts: list[int], group_ids: list[int], lengths: list[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k s) v, "Attention is all you need", section 3.2.1: a prompt's token sees the prompt up to itself, a
    completion's token the whole prompt and the completion up to itself."""
    starts = torch.tensor([0, *prompts, *lengths]).cumsum(0).tolist()
    share = query.shape[1] // key.shape[1]
    outputs = []
    for row, length in enumerate(prompts + lengths):
        before: list[int] = []
        if row >= len(prompts):
            prompt = group_ids[row - len(prompts)]
            before = list(range(starts[prompt], starts[prompt] + prompts[prompt]))
        for token in range(starts[row], starts[row] + length):
            seen = before + list(range(starts[row], token + 1))
            heads = [
                (SCALE * key[seen, h // share] @ query[token, h]).softmax(0) @ value[seen, h // share]
                for h in range(query.shape[1])
            ]
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


RAGGED = ([5, 1, 40], [2, 0, 0, 1, 2, 2], [7, 1, 33, 0, 20, 16])
MANY = ([3, 2], [i % 2 for i in range(14)], [45] * 14)
"""More than one set of rows for each prompt, the rows of one between those of the other."""
ALONE = ([9, 2], [], [])


@pytest.mark.parametrize("rows", [RAGGED, MANY, ALONE], ids=["ragged", "many", "prompts alone"])
@pytest.mark.parametrize(("heads", "shared", "size"), [(3, 1, 64), (4, 4, 16), (2, 2, 24), (6, 2, 20), (1, 1, 6), (2, 1, 1)])
def test_outputs_and_gradients_are_those_of_attention_row_by_row(
    kernels: bool, rows: tuple[list[int], list[int], list[int]], heads: int, shared: int, size: int
) -> None:
    prompts, group_ids, lengths = rows
    N = sum(prompts + lengths)
    inputs = [torch.randn(N, heads, size), *(torch.randn(N, heads // shared, size) for _ in range(2))]
    weights = torch.randn(N, heads, size)
    layout = PackedAttention(
        prompts, torch.tensor(group_ids, dtype=torch.long), torch.tensor(lengths, dtype=torch.long), "cpu", kernels=kernels
    )

    ours = [x.clone().requires_grad_() for x in inputs]
    output = layout(0, *ours, SCALE)
    gradients = torch.autograd.grad((output * weights).sum(), ours)
    wide = [x.double().requires_grad_() for x in inputs]
    expected = plain(prompts, group_ids, lengths, *wide)
    wide_gradients = torch.autograd.grad((expected * weights).sum(), wide)
    for one, other in zip([output, *gradients], [expected, *wide_gradients], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6 * float(other.detach().abs().max()))
    with torch.no_grad():
        assert torch.equal(layout(0, *inputs, SCALE), output)


def test_far_scores_neither_overflow_nor_vanish(kernels: bool) -> None:
    """Scores around 10,000 either way: all weight on one token, and finite gradients."""
    layout = PackedAttention([2], torch.tensor([0, 0]), torch.tensor([3, 1]), "cpu", kernels=kernels)
    key = torch.zeros(6, 1, 8)
    key[:, 0, 0] = torch.tensor([0.0, 5e4, -5e4, 3e4, 0.0, -1e4])
    query, value = torch.zeros(6, 1, 8), torch.randn(6, 1, 8)
    query[:, 0, 0] = 1
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = layout(0, *leaves, SCALE)
    torch.testing.assert_close(output[:, 0], value[[0, 1, 1, 1, 1, 1], 0])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), leaves))


def test_a_nan_key_reaches_the_queries_that_attend_to_it_and_no_others(kernels: bool) -> None:
    layout = PackedAttention([2, 2], torch.tensor([0, 1]), torch.tensor([2, 2]), "cpu", kernels=kernels)
    query, key, value = (torch.randn(8, 2, 8) for _ in range(3))
    key[1, 1] = torch.nan  # the last token of the first prompt, whose completion is at 4 and 5
    found = layout(0, query, key, value, SCALE).isnan().all(-1)
    assert found.nonzero().tolist() == [[1, 1], [4, 1], [5, 1]]


def test_values_narrower_than_keys_are_not_for_the_kernel() -> None:
    query, key, value = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 8)
    assert unsupported(query, key, value) is not None
    assert unsupported(query.double(), key.double(), key.double()) is not None


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    need_kernels()
    inputs = [torch.randn(sum(MANY[0] + MANY[2]), heads, 16) for heads in (4, 2, 2)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = PackedAttention(MANY[0], torch.tensor(MANY[1]), torch.tensor(MANY[2]), "cpu")(0, *leaves, SCALE)
            found.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_prompt_with_many_rows_is_cut_into_sets_of_some_size() -> None:
    rows = PackedRows(torch.tensor([300, 4]), torch.tensor([0, 1] * 8), torch.full((16,), 100))
    sets = [rows.order[a:b].tolist() for a, b in zip(rows.sets[:-1].tolist(), rows.sets[1:].tolist(), strict=True)]
    assert sorted(row for rows_of_set in sets for row in rows_of_set) == list(range(18))
    of_first = [len(found) for found in sets if found[0] >= 2 and found[0] % 2 == 0]
    assert sorted(of_first) == [2, 3, 3], "as many rows as have the tokens of their prompt"
    assert all(len(set(rows.prompts[found].tolist())) == 1 for found in sets)


def test_padded_blocks_put_rows_of_similar_length_together() -> None:
    blocks = PaddedBlocks(torch.tensor([2]), torch.zeros(4, dtype=torch.long), torch.tensor([100, 1, 90, 2]), "cpu")
    assert [layout.shape for layout in blocks.rows] == [(2, 100), (2, 2)]
