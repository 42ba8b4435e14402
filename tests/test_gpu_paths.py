"""What a GPU runs, here on a CPU: decoding steps of fixed sizes, and flex attention. Graphs and their kernels need a GPU."""

import gc
import shutil
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from groupwise.models import LanguageModel
from groupwise.models.attention import decoding, training_flex
from groupwise.models.attention.attend import PLAIN, AttentionForm
from groupwise.models.attention.cuda_graphs import FixedSteps
from groupwise.models.attention.decoding_torch import StepLayout
from groupwise.models.attention.training import PackedAttention
from groupwise.models.caches import Caches
from groupwise.models.decoder import Decoder, HeadShape
from tests.conftest import owned, packs, tiny_model
from tests.test_sampler import sample, spoken


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding as on a GPU: steps of fixed sizes, no C++ kernels."""
    original = LanguageModel.decoding_cache

    def with_fixed_steps(model: LanguageModel, *sizes: int, dtype: Any) -> Any:
        return original(model, *sizes, dtype=dtype, fixed=True)

    monkeypatch.setattr(LanguageModel, "decoding_cache", with_fixed_steps)


@pytest.mark.parametrize("settings", [{}, {"max_rows": 16, "group_size": 12}, {"group_size": 30}], ids=["few", "joining", "many"])
def test_steps_of_fixed_sizes_say_the_same(
    any_model: Any, tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not packs(any_model):
        pytest.skip("its attention falls back to padded batches")
    expected = sample(any_model, tokenizer, max_tokens=40, **settings)
    sizes: set[tuple[int, ...]] = set()
    steps: list[tuple[int, ...]] = []

    class Counted(FixedSteps):
        def __call__(self, step: Any, tokens_R: Tensor, at: Any) -> Tensor:
            hidden_RH = super().__call__(step, tokens_R, at)
            sizes.update(self._captured)
            steps.append((len(tokens_R), at.window))
            return hidden_RH

    request.getfixturevalue("fixed")
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
        pytest.skip("its attention falls back to padded batches")
    model = owned(any_model)
    assert model.decoder.packs()
    why_not_exact = model.caches.why_not_exact
    assert why_not_exact(fixed=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "attend_newest", lambda *arguments: arguments[4] * 0)
        assert why_not_exact(fixed=True) == "steps of generation and full forward passes give different hidden states"

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no graph for this")

    monkeypatch.setattr(FixedSteps, "_capture", failing)
    assert "RuntimeError: no graph for this" in str(why_not_exact(fixed=True))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma"])
def test_a_step_needs_no_synchronisation_with_the_gpu(architecture: str, tokenizer: Any) -> None:
    """Or it could not be captured. With tensors that hold no numbers, whatever asks for one raises."""
    # As on a GPU no layer runs on kernels for the CPU.
    state = owned(tiny_model(architecture, tokenizer), "torch").decoding_cache(2, 5, 16, 8, fixed=True)
    at = StepLayout(*torch.ones(3, 16, dtype=torch.long), torch.tensor([3, 5]), width=8, window=8)

    def asking(tokens_R: Tensor, at: StepLayout) -> Tensor:
        return state.run_step(tokens_R, at) * int(at.written_R.max())

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fixed = StepLayout(*map(mode.from_tensor, at.tensors()), width=8, window=8)
        tokens_R = mode.from_tensor(torch.ones(16, dtype=torch.long))
        assert state.run_step(tokens_R, fixed).shape == (16, 32)
        with pytest.raises(DataDependentOutputException):
            asking(tokens_R, fixed)


def test_a_rollouts_memory_goes_with_it(tokenizer: Any) -> None:
    """Not when Python next looks for cycles, of which a GPU knows nothing."""
    model = owned(tiny_model("qwen3", tokenizer))
    state = model.decoding_cache(1, 3, 16, 4, fixed=True)
    with torch.inference_mode():
        state.prefill([torch.tensor([3, 4, 5])], [2])
        state.step(torch.tensor([6, 7]))
    remains = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert remains() is None
    finally:
        gc.enable()


def test_rows_are_as_many_as_a_gpu_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = dict.fromkeys(range(28), HeadShape(kv_heads=8, size=128))
    decoder = SimpleNamespace(device=torch.device("cuda"), shapes=shapes, dtype=torch.bfloat16, state_elements=0)
    model = LanguageModel.__new__(LanguageModel)
    model.decoder, model.caches = decoder, Caches(decoder)
    for name, found in (("mem_get_info", (50e9, 80e9)), ("memory_reserved", 12e9), ("memory_allocated", 2e9)):
        monkeypatch.setattr(torch.cuda, name, lambda _, found=found: found)
    # 28 layers x 2 x 8 heads x 128 x 1,024 tokens x 2 bytes are 117.4 MB a row; 0.6 of 60 GB.
    assert int(model.affordable_rows(1024)) == 306
    assert int(model.affordable_rows(1024, torch.float32)) == 153
    decoder.state_elements = 28 * 8 * 128 * 2 * 1024 // 2  # in float32 as much as the keys and values
    assert int(model.affordable_rows(1024)) == 153
    decoder.device = torch.device("cpu")
    assert model.affordable_rows(1024) == float("inf")


@pytest.mark.parametrize("frozen", ["nothing", "the embedding", "everything"])
def test_the_trial_takes_a_gradient_where_there_is_one(frozen: str, tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    if frozen != "nothing":
        (model if frozen == "everything" else model.get_input_embeddings()).requires_grad_(False)
    assert packs(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrong_gradient_is_found_out(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Decoder.run_packed

    def halved(*arguments: Any) -> Tensor:
        output = run(*arguments)
        return output / 2 + output.detach() / 2  # the same output

    monkeypatch.setattr(Decoder, "run_packed", halved)
    assert not packs(tiny_model("qwen3", tokenizer))


def test_which_tokens_attend_to_which_by_hand() -> None:
    # Two prompts of 2 and 1 tokens, then rows of 2 tokens of the second and 1 token of the first.
    visible = training_flex.visible(torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([2, 1]), "cpu")
    tokens = torch.arange(6)
    found = visible(tokens, tokens, tokens[:, None], tokens[None])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert found.int().tolist() == expected
    prompts_alone = training_flex.visible(torch.tensor([2, 1]), torch.zeros(0).long(), torch.zeros(0).long(), "cpu")
    tokens = torch.arange(3)
    assert prompts_alone(tokens, tokens, tokens[:, None], tokens[None]).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (4, 2)])
def test_flex_attention_is_the_packed_attention(heads: int, shared: int) -> None:
    lengths, prompts, rows = [70, 1, 130], torch.tensor([0, 0, 2, 1]), torch.tensor([40, 3, 100, 60])
    layout = PackedAttention(lengths, prompts, rows, "cpu")
    N = len(layout.positions_N)
    query, key, value = torch.randn(N, heads, 16), torch.randn(N, heads // shared, 16), torch.randn(N, heads // shared, 16)
    found = training_flex.attention(query, key, value, layout.block_mask(), 0.3)
    torch.testing.assert_close(found, layout(0, query, key, value, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("form", [PLAIN, AttentionForm(window=30, softcap=2.0)], ids=["plain", "window and soft cap"])
def test_compiled_flex_attention_is_compiled_once(form: AttentionForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths; at its limit of compilations PyTorch would give up, and take memory of the square of N."""
    monkeypatch.setattr(training_flex, "_compiled", lambda function, _: training_flex._compile(function))
    for count in range(4, 8):
        lengths = torch.randint(20, 200, (3,)).tolist()
        layout = PackedAttention(lengths, torch.randint(0, 3, (count,)), torch.randint(1, 150, (count,)), "cpu")
        N = len(layout.positions_N)
        query, key, value = torch.randn(N, 4, 16), torch.randn(N, 2, 16), torch.randn(N, 2, 16)
        graphs = counters["stats"]["unique_graphs"]
        with torch.no_grad():
            found = training_flex.attention(query, key, value, layout.block_mask(form.window), 0.3, form)
        torch.testing.assert_close(found, layout(0, query, key, value, 0.3, form), rtol=1e-4, atol=1e-5)
        assert count == 4 or counters["stats"]["unique_graphs"] == graphs


def test_a_device_without_packed_attention_falls_back_and_says_so(tokenizer: Any) -> None:
    model = owned(tiny_model("qwen3", tokenizer).to("meta"))
    assert not model.decoder.packs()
    assert "there is no packed attention for the device 'meta'" in str(model.fallback())
