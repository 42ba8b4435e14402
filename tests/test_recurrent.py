"""Recurrent layers: each kernel against its formula in float64, and packed sequences and generation against each row alone."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from groupwise.kernels import recurrent as kernels
from groupwise.kernels.recurrent import PackedSequences
from groupwise.models import LanguageModel
from groupwise.models.recurrent import RecurrentForward, RecurrentRows, States
from groupwise.models.trials import generate
from tests.conftest import need_kernels
from tests.matrix import TEMPERATURE, TOLERANCE, Reference, difference, gradient_difference, random_batch, token_weights
from tests.zoo import build

PROMPTS, COMPLETIONS = torch.tensor([5, 1, 37]), torch.tensor([4, 20, 0, 1, 33])
OF_PROMPT = torch.tensor([0, 2, 1, 1, 2])


def close(ours: Tensor, wide: Tensor, tolerance: float = 5e-6) -> None:
    most = float(wide.abs().max()) if wide.numel() else 0.0
    torch.testing.assert_close(ours.double(), wide.double(), rtol=1e-5, atol=tolerance * most + 1e-30)


def with_gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """The output, and the gradient of a random sum of it with respect to each input."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    given = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), given)]


def rows_of(flat: Tensor) -> list[Tensor]:
    return list(torch.split(flat, [*PROMPTS.tolist(), *COMPLETIONS.tolist()]))


def one_by_one(run: Any, *inputs: Tensor) -> Tensor:
    """A recurrence `run(state or None, inputs of a sequence) -> (outputs, state)` over the packed sequences."""
    sequences = list(zip(*map(rows_of, inputs), strict=True))
    outputs, states = [], []
    for sequence in sequences[: len(PROMPTS)]:
        output, state = run(None, *sequence)
        outputs.append(output)
        states.append(state)
    for prompt, sequence in zip(OF_PROMPT.tolist(), sequences[len(PROMPTS) :], strict=True):
        outputs.append(run(states[prompt], *sequence)[0])
    return torch.cat(outputs)


def linear_attention(
    state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    epsilon: float,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """Yang, Kautz and Hatamizadeh 2024, equation 10, token by token; without `delta` Dao and Gu 2024, equation 1."""
    H = value.shape[1]
    if epsilon:
        query, key = (x / (x.square().sum(-1, keepdim=True) + epsilon).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(H // x.shape[1], 1) for x in (query * scale, key))
    S = query.new_zeros(H, key.shape[2], value.shape[2]) if state is None else state
    outputs = [value[:0]]
    for q, k, v, log_decay, b in zip(query, key, value, g, beta, strict=True):
        S = S * log_decay.exp().reshape(H, -1, 1)
        u = v - torch.einsum("hde,hd->he", S, k) if delta else v
        S = S + k[:, :, None] * (b[:, None] * u)[:, None]
        outputs.append(torch.einsum("hde,hd->he", S, q)[None])
    return torch.cat(outputs), S


def inputs_of(K: int, H: int, D: int, E: int, per_row: bool, N: int) -> list[Tensor]:
    torch.manual_seed(0)
    g = -torch.nn.functional.softplus(torch.randn(N, H, *([D] if per_row else []))) * torch.logspace(-2, 1.5, N).view(
        -1, 1, *([1] if per_row else [])
    )
    return [torch.randn(N, K, D), torch.randn(N, K, D), torch.randn(N, H, E), g[torch.randperm(N)], torch.rand(N, H)]


FORMS = [
    (1, 1, 8, 8, True, False),
    (2, 4, 8, 16, True, False),
    (3, 3, 64, 64, True, False),
    (1, 2, 24, 96, True, False),
    (2, 2, 16, 32, True, True),
    (1, 4, 16, 24, False, False),
    (2, 4, 64, 128, False, False),
]


@pytest.mark.parametrize(("K", "H", "D", "E", "delta", "per_row"), FORMS)
def test_recurrence_is_its_formula(K: int, H: int, D: int, E: int, delta: bool, per_row: bool) -> None:
    need_kernels()
    settings: dict[str, Any] = {"scale": D**-0.5, "epsilon": 1e-6 if delta else 0.0, "delta": delta}
    layout = PackedSequences(PROMPTS, OF_PROMPT, COMPLETIONS)
    inputs = inputs_of(K, H, D, E, per_row, int(PROMPTS.sum() + COMPLETIONS.sum()))
    if not delta:
        inputs[0], inputs[1] = inputs[0] / D**0.5, inputs[1] / D**0.5
    ours = with_gradients(lambda *x: kernels.recurrence(*x, layout, **settings)[0], *inputs)
    formula = lambda state, *x: linear_attention(state, *x, **settings)  # noqa: E731
    wide = with_gradients(lambda *x: one_by_one(formula, *x), *(x.double() for x in inputs))
    for one, other in zip(ours, wide, strict=True):
        close(one, other)


@pytest.mark.parametrize(("K", "H", "D", "E", "delta", "per_row"), FORMS)
def test_steps_go_on_where_prompts_end(K: int, H: int, D: int, E: int, delta: bool, per_row: bool) -> None:
    need_kernels()
    settings: dict[str, Any] = {"scale": D**-0.5, "epsilon": 1e-6, "delta": delta}
    inputs = inputs_of(K, H, D, E, per_row, 12)
    layout = PackedSequences(torch.tensor([6, 6]), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    _, states = kernels.recurrence(*inputs, layout, **settings)
    wide = linear_attention(None, *(x[:6].double() for x in inputs), **settings)[1]
    close(states[0], wide)
    rows, before = states[[0, 0]], states.clone()
    after = inputs_of(K, H, D, E, per_row, 8)
    for t in range(4):
        output = kernels.recurrence_step(*(x[2 * t : 2 * t + 2] for x in after), rows, **settings)
        expected, wide = linear_attention(wide, *(x[2 * t : 2 * t + 1].double() for x in after), **settings)
        close(output[:1], expected)
    close(rows[0], wide)
    assert torch.equal(states, before)
    assert not torch.allclose(rows[0], rows[1])


def convolution(state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    every = torch.cat([x.new_zeros(K, x.shape[1]) if state is None else state, x])
    terms = [every[k + 1 : k + 1 + len(x)] * weight[:, k] for k in range(K)]
    z = sum(terms) if bias is None else sum(terms) + bias
    return z * torch.sigmoid(z) if silu else z, every[len(every) - K :]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("C", "K"), [(5, 4), (130, 3), (64, 2)])
def test_convolution_is_its_formula(silu: bool, biased: bool, C: int, K: int) -> None:
    need_kernels()
    layout = PackedSequences(PROMPTS, OF_PROMPT, COMPLETIONS)
    torch.manual_seed(0)
    N = int(PROMPTS.sum() + COMPLETIONS.sum())
    inputs = [torch.randn(N, C), torch.randn(C, K), torch.randn(C) if biased else None]
    ours = with_gradients(lambda *x: kernels.convolve(*x, layout, silu=silu), *inputs)

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return one_by_one(lambda state, rows: convolution(state, rows, weight, bias, silu), x)

    wide = with_gradients(formula, *(None if x is None else x.double() for x in inputs))
    for one, other in zip(ours, wide, strict=True):
        close(one, other)
    state = torch.randn(3, C, K)
    x, weight, bias = torch.randn(3, C), *inputs[1:]
    assert weight is not None
    expected, moved = convolution(state[1].t(), x[1:2], weight, bias, silu)
    close(kernels.convolve_step(x, weight, bias, state, silu=silu)[1:2], expected)
    assert torch.equal(state[1], moved.t())


@pytest.mark.parametrize("skip", [True, False])
def test_mamba2_step_is_its_formula(skip: bool) -> None:
    need_kernels()
    torch.manual_seed(0)
    R, H, G, P, N = 3, 4, 2, 12, 20
    x, dt, A, B, C = torch.randn(R, H, P), torch.rand(R, H), -torch.rand(H) * 3, torch.randn(R, G, N), torch.randn(R, G, N)
    D, state = torch.randn(H) if skip else None, torch.randn(R, H, P, N)
    wide = state.double() * (dt * A).double().exp()[..., None, None]
    wide = wide + (dt[..., None] * x).double()[..., None] * B.repeat_interleave(2, 1).double()[:, :, None]
    expected = torch.einsum("rhpn,rhn->rhp", wide, C.repeat_interleave(2, 1).double())
    close(kernels.mamba2_step(x, dt, A, B, C, D, state), expected if D is None else expected + x * D[:, None])
    close(state, wide)


# --- layers


MODELS = ["qwen3_next", "kimi_linear", "falcon_h1", "nemotron_h", "lfm2"]
"""The gated delta rule, with a decay of each row; Mamba2, with a clamped time step; convolutions alone."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    transformers.logging.set_verbosity_error()
    return LanguageModel(build(request.param))


def layers_of(model: LanguageModel) -> list[RecurrentForward]:
    assert model.decoder.packs()
    return model.decoder.recurrent


def layout_of() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([7, 3]), torch.tensor([1, 0, 1, 0]), torch.tensor([4, 9, 1, 0])


def globals_of(layer: RecurrentForward) -> dict[str, Any]:
    """What transformers' functions are now, in the layer's own file."""
    space = vars(__import__(type(layer.module).__module__, fromlist=["x"]))
    return {name: value for name, value in space.items() if callable(value)}


def test_packed_sequences_are_rows_of_their_own(model: LanguageModel) -> None:
    for layer in layers_of(model):
        rows = RecurrentRows(*layout_of(), "cpu")
        hidden_NH = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output_NH, states = rows.run(layer, hidden_NH)
            prompts, completions = torch.split(hidden_NH, [10, 14])
            of_prompt = torch.split(prompts, layout_of()[0].tolist())
            for prompt, row, found in zip(
                layout_of()[1].tolist(),
                torch.split(completions, layout_of()[2].tolist()),
                torch.split(output_NH[10:], layout_of()[2].tolist()),
                strict=True,
            ):
                # Without a cache, through the forward as transformers has it.
                alone = layer.module(torch.cat([of_prompt[prompt], row])[None])[0]
                close(found, alone[len(of_prompt[prompt]) :], 2e-5)
        assert layer.reason is None or not kernels.recurrent_kernels()
        assert all(len(state) == 2 for state in states.tensors())


def test_gradients_of_packed_sequences_are_those_of_padded_rows(model: LanguageModel) -> None:
    layer = layers_of(model)[0]
    rows = RecurrentRows(*layout_of(), "cpu")
    hidden_NH, weights_NH = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for run in (rows.run, rows.run_apart):
        leaf = hidden_NH.clone().requires_grad_()
        parameters = [parameter for parameter in layer.module.parameters() if parameter.requires_grad]
        found = torch.autograd.grad((run(layer, leaf)[0] * weights_NH).sum(), [leaf, *parameters], allow_unused=True)
        gradients.append([x for x in found if x is not None])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 2e-5)


def test_steps_go_on_from_the_states_of_prompts(model: LanguageModel) -> None:
    """With rows that leave and join, as the cache does it; states of rows with the same prompt are not shared."""
    for layer in layers_of(model):
        prompts = torch.tensor([7, 3]), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        random = torch.Generator().manual_seed(2)
        hidden_NH, tokens_TRH = torch.randn(10, 32, generator=random), torch.randn(3, 4, 32, generator=random)
        with torch.no_grad():
            _, states = RecurrentRows(*prompts, "cpu").run(layer, hidden_NH)
            rows = states.select(torch.tensor([0, 0, 1]))
            first_RH = layer(tokens_TRH[0, :3, None], rows)[:, 0]
            rows = States.cat([rows, states.select(torch.tensor([1]))])
            rows.keep(torch.tensor([0, 3, 2]))  # the second row leaves, and the last one takes its slot
            second_RH = layer(tokens_TRH[1, [0, 3, 2], None], rows)[:, 0]
            expected = {0: hidden_NH[:7], 1: hidden_NH[:7], 2: hidden_NH[7:], 3: hidden_NH[7:]}
            for row in range(3):
                expected[row] = torch.cat([expected[row], tokens_TRH[0, row, None]])
                close(first_RH[row], layer.module(expected[row][None])[0, -1], 2e-5)
            for slot, row in enumerate([0, 3, 2]):
                alone = layer.module(torch.cat([expected[row], tokens_TRH[1, row, None]])[None])[0, -1]
                close(second_RH[slot], alone, 2e-5)


def test_training_and_generation_are_each_row_alone(model: LanguageModel) -> None:
    batch, reference = random_batch(), Reference(model.module)
    expected = reference.expected(batch)
    logprobs_BT, _ = model.completion_logprobs(batch, temperature=TEMPERATURE)
    model.module.zero_grad()
    (logprobs_BT * token_weights(len(batch))[:, : logprobs_BT.shape[1]]).sum().backward()
    assert difference(logprobs_BT.detach(), expected.logprobs_BT) < TOLERANCE
    assert gradient_difference(model.module, expected.gradients)[0] < TOLERANCE
    assert model.why_not_decoding() is None
    trial = model.decoder.trial_rows()
    with torch.no_grad():
        hidden = generate(model.decoding_cache(1, 11, 2, 14), trial)
        for i, found in enumerate(hidden):
            alone = model.decoder.alone(trial.row(i))[len(trial.prompts[int(trial.prompt_R[i])]) - 1 :]
            close(found, alone[: len(found)], 1e-4)


def test_a_step_clamps_as_the_scan_does() -> None:
    """transformers' own steps do not, so that its generation is another model than its training."""
    module = build("nemotron_h")
    layer = next(layer for layer in module.modules() if hasattr(layer, "time_step_limit"))
    layer.time_step_limit = (0.3, 0.7)
    for backend in ("auto", "torch"):
        model = LanguageModel(module, backend)
        assert model.why_not_decoding() is None, backend


def test_zamba2_generates_on_a_cache() -> None:
    model = LanguageModel(build("zamba2"))
    model.why_not_decoding()
    assert type(model.decoding_cache(1, 4, 2, 4)).__name__ == "PaddedCache"


def test_nothing_is_left_behind(model: LanguageModel) -> None:
    layers = layers_of(model)
    before = [globals_of(layer) for layer in layers]
    with torch.no_grad():
        model.completion_logprobs(random_batch(), temperature=TEMPERATURE)
        generate(model.decoding_cache(1, 11, 2, 14), model.decoder.trial_rows())
    for layer, functions in zip(layers, before, strict=True):
        assert globals_of(layer) == functions
        assert "forward" not in vars(layer.module)
        assert layer.own.layout is None
        assert not layer.own.kernels


def test_functions_that_somebody_has_replaced_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    module = build("qwen3_next")
    model = LanguageModel(module)
    layer, calls = layers_of(model)[0], []
    space = __import__(type(layer.module).__module__, fromlist=["x"])
    original = space.torch_chunk_gated_delta_rule
    monkeypatch.setattr(space, "torch_chunk_gated_delta_rule", lambda *x, **named: calls.append(1) or original(*x, **named))
    assert not layer.own.intact
    batch = random_batch()
    with torch.no_grad():
        found = model.completion_logprobs(batch, temperature=TEMPERATURE)[0]
    assert calls
    assert difference(found, Reference(module).expected(batch).logprobs_BT) < TOLERANCE


def test_a_replaced_forward_of_a_layer_is_called() -> None:
    module = build("lfm2")
    model = LanguageModel(module)
    layer, calls = layers_of(model)[0].module, []
    own = layer.forward
    layer.forward = lambda *x, **named: calls.append(1) or own(*x, **named)
    batch = random_batch()
    with torch.no_grad():
        found = model.completion_logprobs(batch, temperature=TEMPERATURE)[0]
    assert calls
    assert not model.decoder.packs()
    assert difference(found, Reference(module).expected(batch).logprobs_BT) < TOLERANCE


def test_hooks_of_a_layer_are_called(model: LanguageModel) -> None:
    calls: list[int] = []
    layer = layers_of(model)[0].module
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.completion_logprobs(random_batch(), temperature=TEMPERATURE)
    handle.remove()
    assert calls


def test_a_layer_that_computes_something_else_keeps_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    model = LanguageModel(build("falcon_h1"))
    wrong = kernels.convolve
    monkeypatch.setattr("groupwise.models.recurrent_forward.convolve", lambda *x, **named: 1.01 * wrong(*x, **named))
    batch = random_batch()
    with torch.no_grad():
        found = model.completion_logprobs(batch, temperature=TEMPERATURE)[0]
    assert model.decoder.packs()
    assert "computes something else" in model.decoder.reasons["recurrent layers"]
    assert difference(found, Reference(model.module).expected(batch).logprobs_BT) < TOLERANCE


def test_other_dtypes_run_as_transformers_has_them() -> None:
    model = LanguageModel(build("qwen3_next")).copy(torch.bfloat16)
    layer = model.decoder.recurrent[0]
    with torch.no_grad():
        layer(torch.randn(2, 3, 32, dtype=torch.bfloat16), States())
    assert not layer.on_kernels(torch.randn(2, 3, 32, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer.on_kernels(torch.randn(2, 3, 32))


def test_states_append_as_the_cache_of_transformers() -> None:
    states = States()
    assert not states.has_previous_state()
    assert states.get_conv_state(0) is None
    assert states.get_recurrent_state(0) is None
    x = torch.arange(12.0).view(1, 2, 6)
    assert torch.equal(states.update_conv_state(x[..., :1], 0, conv_kernel_size=3), torch.nn.functional.pad(x[..., :1], (2, 0)))
    assert states.has_previous_state()
    every = states.update_conv_state(x[..., 1:], 0, conv_kernel_size=3)
    assert torch.equal(every, torch.nn.functional.pad(x, (2, 0)))
    assert torch.equal(states.conv[0], x[..., -3:])
    states.update_recurrent_state(x, 0)
    chosen = states.select(torch.tensor([0, 0]))
    chosen.recurrent[0][0] += 1
    assert torch.equal(chosen.recurrent[0][1], x[0])
    assert torch.equal(states.recurrent[0], x)
    joined = States.cat([chosen, states])
    joined.keep(torch.tensor([2, 1]))
    assert torch.equal(joined.recurrent[0], torch.stack([x[0], x[0]]))
