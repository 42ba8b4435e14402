"""What a model is tried on before it runs in our way: a few sequences, each compared with itself alone in its own forward."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL_WINDOW = 6
"""Windows are this small on trial, so that short sequences are longer than them."""
WINDOWS = re.compile(r"window(?!.*layers)|attention_chunk|local_attention|index_topk")
"""In the name of a setting or an attribute that holds how many tokens a layer attends to."""
LENGTHS = {"cpu": ((5, 19), (21, 4, 7, 26)), "cuda": ((100, 60), (200, 3, 80, 130))}
"""Tokens of two prompts, and of the two completions of each: longer than a small window, ragged, and on a GPU enough for flex
attention to take its training kernels."""


@dataclass(frozen=True, slots=True)
class TrialRows:
    """Two prompts with two ragged completions each."""

    prompts: list[Tensor]
    completions: list[Tensor]
    prompt_R: Tensor
    """The prompt of each completion, on the CPU."""

    def row(self, i: int) -> Tensor:
        """A completion with its prompt in front."""
        return torch.cat([self.prompts[int(self.prompt_R[i])], self.completions[i]])


def trial_rows(
    vocab_size: int, pad_token: int | None, device: torch.device, limit: int | None, *, with_padding: bool
) -> TrialRows:
    """
    Args:
        vocab_size: tokens are drawn from so many.
        pad_token: the padding token, whose embedding may be zero.
        with_padding: whether it is among the tokens, since a sampler may draw it: equal scores, as a zero gives them, are told
            apart by some models in a way that depends on the batch. Otherwise it is not, since its gradient may be NaN.
        device: of the tokens.
        limit: the most tokens of a prompt and completion together; None: no limit.
    """
    prompts, rows = LENGTHS.get(device.type, LENGTHS["cpu"])
    counts = [n if limit is None else max(1, min(n, limit // 2 - 1)) for n in (*prompts, *rows)]
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab_size, (sum(counts),), generator=random)
    if pad_token is not None and with_padding:
        drawn[::9] = pad_token
    elif pad_token is not None:
        drawn = torch.where(drawn == pad_token, (pad_token + 1) % vocab_size, drawn)
    tokens = torch.split(drawn.to(device), counts)
    return TrialRows(list(tokens[:2]), list(tokens[2:]), torch.tensor([0, 0, 1, 1]))


@contextmanager
def small_windows(module: Any) -> Iterator[None]:
    """Within: attention windows of a model are at most `SMALL_WINDOW`, in its own forward and in ours."""
    owners = [module.config, module.config.get_text_config(), *module.modules()]
    before: list[tuple[Any, str, int]] = []
    try:
        for owner in {id(owner): owner for owner in owners}.values():
            for name, size in list(vars(owner).items()):
                if type(size) is int and size > SMALL_WINDOW and WINDOWS.search(name):
                    before.append((owner, name, size))
                    setattr(owner, name, SMALL_WINDOW)
        yield
    finally:
        for owner, name, size in before:
            setattr(owner, name, size)


@contextmanager
def no_constants(module: Any) -> Iterator[None]:
    """Within: parameters that are constant, as at the start of training, are random, so that nothing they switch off is missed.

    A mask that is learned, an adapter or a gate often starts at zero and adds nothing until it has been trained.
    """
    random = torch.Generator().manual_seed(0)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter in module.parameters():
            if _is_constant(parameter.detach()):
                noise = torch.randn(parameter.shape, generator=random) * 0.1
                before.append((parameter, parameter.data))
                parameter.data = parameter.data + noise.to(parameter)
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


@contextmanager
def first_trained(module: Any) -> Iterator[list[Tensor]]:
    """Within: another parameter of the same values stands in for the embedding, or the first trained one, and is given.

    So a gradient can be taken without calling hooks that somebody has put on the parameter. Empty where nothing is trained. The
    embedding's gradient is a sum over few tokens, so it is exact in 16 bits too, where that of a layer may be mostly rounding.
    """
    owned = ((inner, name, parameter) for inner in module.modules() for name, parameter in inner.named_parameters(recurse=False))
    trained = [(inner, name) for inner, name, parameter in owned if parameter.requires_grad]
    if not trained:
        yield []
        return
    embedding = module.get_input_embeddings()
    found = next(((embedding, name) for name, _ in embedding.named_parameters(recurse=False)), trained[0])
    owner, name = found
    parameter = owner._parameters[name]
    stand_in = torch.nn.Parameter(parameter.data)
    stand_in.register_hook(lambda _: None)  # type: ignore[no-untyped-call] # else the learner's embedding would add the gradient in place, unseen
    owner._parameters[name] = stand_in
    try:
        yield [stand_in]
    finally:
        owner._parameters[name] = parameter


def _is_constant(parameter: Tensor) -> bool:
    flat = parameter.flatten()
    first = flat[:16]
    return len(flat) > 0 and bool((first == flat[0]).all()) and bool((flat == flat[0]).all())


def generate(cache: Any, trial: TrialRows) -> list[Tensor]:
    """For each completion of a trial, its prompt's last hidden state and those of its tokens but the last, through a cache."""
    hidden: list[list[Tensor]] = [[] for _ in trial.completions]
    if cache.joins:
        first = cache.prefill(trial.prompts[:1], [2])
        rows = [0, 1]
        hidden[0].append(first[0])
        hidden[1].append(first[0])
        rows = _advance(cache, trial, hidden, rows)
        cache.reserve(2, len(trial.prompts[1]), 4, max(map(len, trial.completions)))
        joined = cache.prefill(trial.prompts[1:], [2])
        rows += [2, 3]
        hidden[2].append(joined[0])
        hidden[3].append(joined[0])
    else:
        of_prompts = cache.prefill(trial.prompts, [2, 2])
        rows = [0, 1, 2, 3]
        for row, prompt in enumerate(trial.prompt_R.tolist()):
            hidden[row].append(of_prompts[prompt])
    while rows:
        rows = _advance(cache, trial, hidden, rows)
    return [torch.stack(found) for found in hidden]


def _advance(cache: Any, trial: TrialRows, hidden: list[list[Tensor]], rows: list[int]) -> list[int]:
    """Drop rows that have reached their end, and run one token of each of the others; returns which they are, in order."""
    device = trial.prompts[0].device
    keep_R = torch.tensor([len(hidden[row]) < len(trial.completions[row]) for row in rows], device=device)
    if not keep_R.all():
        rows = [rows[i] for i in cache.keep(keep_R).tolist()]
    if rows:
        tokens_R = torch.stack([trial.completions[row][len(hidden[row]) - 1] for row in rows])
        for row, found in zip(rows, cache.step(tokens_R), strict=True):
            hidden[row].append(found.clone())
    return rows


def tolerance_in(dtype: torch.dtype) -> float:
    """How near two ways of computing the same hidden states come in a dtype, relative to the largest."""
    return max(1e-4, 10 * torch.finfo(dtype).eps)


def described(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
