"""Peak memory of a learner and of a sampler, from a model's shape and a recipe.

Counted is what the code allocates: what autograd keeps for each layer, the output layer's blocks of logits, the optimiser's
state, the KV cache of all rows at their longest. `benchmarks/plan_memory.py` compares it with measured peaks. Where theory ends
there are constants: `SLACK` was measured, `CONTEXT` was not.
"""

import math
from dataclasses import dataclass, field

from groupwise.cluster.planning.shape import ModelShape
from groupwise.config import Recipe
from groupwise.models.head import ELSEWHERE, LOGITS_AT_ONCE

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SLACK = 1.03
"""What allocators lose between tensors, as a share: measured on a CPU, where peaks are 1 to 6 % above the sum of the tensors."""
CONTEXT = 1.0e9
"""Of a process on a GPU, outside PyTorch's allocator: CUDA's context and libraries. From public reports, not measured here."""
HEAD_BLOCKS = 3
"""Blocks of logits that the output layer holds at once in its backward pass, in float32: z, probabilities, their gradient."""
ROW_TOKEN = 28
"""Bytes per token of a row that the native sampler keeps beside the cache: id, log-probability, two float64 random numbers."""
BATCH_TOKEN = 48
"""Bytes per token of a rollout batch: ids, masks, log-probabilities of up to three models, advantages, token weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one process on one device."""

    held: dict[str, float]
    """What is there all the time, by name."""
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each phase takes besides; only the largest counts."""

    @property
    def parts(self) -> dict[str, float]:
        """What is there at the peak."""
        largest = max(self.phases.values(), key=lambda phase: sum(phase.values()), default={})
        return {name: size for name, size in {**self.held, **largest}.items() if size}

    @property
    def peak(self) -> float:
        return SLACK * sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a recipe's algorithm and settings keep beside the policy."""

    reference: bool = False
    critic: bool = False
    entropy_gradient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A rollout batch, in tokens."""

    prompts: int
    group: int
    prompt_tokens: float
    """Of a prompt, on average; `longest_prompt` is the longest."""
    longest_prompt: int
    tokens: float
    """Of a completion, on average."""
    max_tokens: int

    @property
    def packed(self) -> float:
        """Tokens that the learner runs, prompts once a group."""
        return self.prompts * (self.prompt_tokens + self.group * self.tokens)


def learner_memory(shape: ModelShape, recipe: Recipe, needs: Needs, load: Load, *, ranks: int = 1, gpu: bool = True) -> Memory:
    """Of each of `ranks` processes that a model is sharded over, or of the only one."""
    settings, wide = recipe.learner, BYTES[recipe.model.dtype]
    lora = recipe.model.lora
    trained = shape.parameters if lora is None else shape.adapter(lora.rank)
    weights = shape.parameters + (trained if lora is not None else 0)
    critic = trained if needs.critic else 0
    rounds = settings.precision == "bfloat16" and wide == 4
    narrow = 2 if rounds else wide
    held = {
        "weights": weights * wide / ranks,
        "AdamW's moments": 2 * trained * wide / ranks,
        "reference": shape.parameters * wide / ranks if needs.reference and lora is None else 0.0,
        "critic and its moments": (critic * 2 + (critic if lora else shape.parameters if critic else 0)) * wide / ranks,
    }
    split = max(1.0, load.packed / (ranks * settings.minibatches))
    tokens = min(float(settings.micro_batch_tokens), split)
    gradients = trained * wide / ranks
    working = {
        "activations": tokens * activations(shape, wide, narrow, checkpointing=settings.checkpointing, gpu=gpu),
        "backward pass of a layer": tokens * 3 * (shape.mlp_width + shape.hidden) * narrow,
        "a matrix's own gradient": min(trained, shape.largest_matrix) * wide if ranks == 1 else 0.0,
        "logits": logits(shape, tokens, gpu=gpu),
        "bfloat16 copies of weights": (shape.linear + shape.head) * 2 if rounds and ranks == 1 else 0.0,
        "gathered layers": gathered(shape, narrow) if ranks > 1 else 0.0,
        "rollout batch": load.prompts * load.group * load.max_tokens * BATCH_TOKEN,
    }
    several = split > tokens  # else the gradients arrive as the activations go
    update = {"gradients": gradients if several else 0.0, **working}
    step = {"gradients": gradients, "rollout batch": working["rollout batch"]}
    return Memory(held=held, phases={"update": update, "optimiser": step})


def activations(shape: ModelShape, wide: int, narrow: int, *, checkpointing: bool, gpu: bool) -> float:
    """Bytes per packed token that are kept for the backward pass.

    Of each layer: the residual stream twice, which the norms keep; their outputs; queries, keys, values and the output of
    attention; the MLP's gate, up and inner vectors, and on a GPU also SiLU's output, which the C++ kernel computes again.
    """
    mlp = (4 if gpu else 3) * shape.mlp_width + 2 * shape.hidden * shape.experts
    layer = 2 * shape.hidden * wide + (2 * shape.hidden + shape.attention + mlp) * narrow
    ends = 4 * shape.hidden * wide  # final norm, the rows of completions alone, and their gradient
    return ends + (layer + shape.layers * shape.hidden * wide if checkpointing else shape.layers * layer)


def logits(shape: ModelShape, tokens: float, *, gpu: bool) -> float:
    """Bytes of the output layer's blocks; flat in the vocabulary."""
    most = ELSEWHERE if gpu else LOGITS_AT_ONCE["cpu"]
    return HEAD_BLOCKS * 4 * min(float(most), tokens * shape.vocabulary)


def gathered(shape: ModelShape, narrow: int) -> float:
    """Bytes that FSDP2 gathers: two layers (one ahead) and the root group, and their gradients until these are scattered, with
    a buffer in float32. As torch.distributed.fsdp documents it; not measured."""
    return 2 * shape.largest_layer * narrow + shape.root * narrow + (shape.largest_layer + shape.root) * (narrow + 4)


def sampler_memory(
    shape: ModelShape,
    recipe: Recipe,
    load: Load,
    *,
    rows: int,
    prompts: float,
    gpu: bool = True,
    vllm: bool = False,
    shards: int = 1,
) -> Memory:
    """Of a sampler that generates `rows` completions of `prompts` prompts at once; `shards`: GPUs that vLLM splits it over."""
    settings = recipe.rollouts
    of_weights = 2 if vllm else BYTES[settings.dtype or recipe.model.dtype]
    held = {"weights": shape.parameters * of_weights / shards}
    return Memory(
        held=held,
        phases={"generation": generation(shape, recipe, load, rows=rows, prompts=prompts, gpu=gpu, vllm=vllm, shards=shards)},
    )


def row_bytes(shape: ModelShape, recipe: Recipe, load: Load, *, vllm: bool = False) -> float:
    """Bytes of a completion at its longest, and its share of its prompt, in the sampler."""
    settings = recipe.rollouts
    of_cache = 2 if vllm else BYTES[settings.cache_dtype or settings.dtype or recipe.model.dtype]
    prompt = shape.cached(load.longest_prompt, vllm=vllm) / load.group
    return (shape.cached(load.max_tokens, vllm=vllm) + prompt) * of_cache + shape.state * 4 + load.max_tokens * ROW_TOKEN


def generation(
    shape: ModelShape, recipe: Recipe, load: Load, *, rows: int, prompts: float, gpu: bool, vllm: bool = False, shards: int = 1
) -> dict[str, float]:
    """Bytes besides the weights. vLLM prefills in chunks of a few thousand tokens, the native sampler all new prompts at once."""
    settings = recipe.rollouts
    of_weights = 2 if vllm else BYTES[settings.dtype or recipe.model.dtype]
    of_cache = 2 if vllm else BYTES[settings.cache_dtype or settings.dtype or recipe.model.dtype]
    prefilled = min(prompts * load.longest_prompt, 8192 if vllm else math.inf)
    width = 4 * shape.hidden + max(shape.attention, 3 * shape.mlp_width)
    copies = 0.0 if gpu else (shape.linear + shape.head) * (2 if settings.dtype == "bfloat16" else 4)
    return {
        "blocked copies of weights": copies,
        "KV cache of completions": rows * (shape.cached(load.max_tokens, vllm=vllm) * of_cache + shape.state * 4) / shards,
        "KV cache of prompts": prompts * shape.cached(load.longest_prompt, vllm=vllm) * of_cache / shards,
        "prefill": prefilled * width * of_weights,
        "logits of a step": rows * shape.vocabulary * 4 * (4 if gpu else 2),
        "tokens and random numbers": rows * load.max_tokens * ROW_TOKEN,
    }
