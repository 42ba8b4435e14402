"""Peak memory of a learner and of a sampler, from a model's shape and a recipe.

Counted is what the code allocates: what autograd keeps for each layer, the output layer's blocks of logits, the optimiser's
state, the KV cache of all rows at their longest. `benchmarks/plan_memory.py` compares it with measured peaks. Where theory ends
there are constants: `CONTEXT` is assumed, the slacks were fitted to measurements.
"""

import math
from dataclasses import dataclass, field

from groupwise.cluster.planning.shape import ModelShape
from groupwise.config import Recipe
from groupwise.models.head import ELSEWHERE, LOGITS_AT_ONCE

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SLACK = 1.02
"""What PyTorch's allocator of a GPU needs, over the sum of the tensors; fitted to the four peaks in benchmarks/RESULTS.md."""
SAMPLER_SLACK, LEARNER_HEAP = 1.13, 104 * 2**20
"""On a CPU, what glibc's heap keeps of freed tensors: a share in a sampler, so many bytes in a learner. Fitted: peaks are lower
by this with an mmap threshold of 64 KiB, with which freed tensors are given back."""
CONTEXT = 1.0e9
"""Of a process on a GPU, outside PyTorch's allocator: CUDA's context and libraries. From public reports, not measured here."""
HEAD_BLOCKS = 3
"""Blocks of logits that the output layer holds at once in its backward pass, in float32: z, probabilities, their gradient."""
TRIAL = 6
"""Gradients and copies of the embedding that `Decoder.packs` holds when it tries the model, before anything else is there."""
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
    slack: float = SLACK
    heap: float = 0.0
    """What the peak is more than the parts: as a share, and in bytes."""

    @property
    def parts(self) -> dict[str, float]:
        """What is there at the peak."""
        largest = max(self.phases.values(), key=lambda phase: sum(phase.values()), default={})
        return {name: size for name, size in {**self.held, **largest}.items() if size}

    @property
    def peak(self) -> float:
        return sum(self.parts.values()) * self.slack + self.heap


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
    precision = Precision.of(recipe, gpu=gpu)
    narrow, rounds = precision.inputs, precision.inputs < wide
    held = {
        "weights": weights * wide / ranks,
        "AdamW's moments": 2 * trained * wide / ranks,
        "reference": shape.parameters * wide / ranks if needs.reference and lora is None else 0.0,
        "critic and its moments": (critic * 2 + (critic if lora else shape.parameters if critic else 0)) * wide / ranks,
    }
    gradients = {"gradients": trained * wide / ranks}
    batch = {"rollout batch": load.prompts * load.group * load.max_tokens * BATCH_TOKEN}
    fixed = {
        "a matrix's own gradient": min(trained, shape.largest_matrix) * wide if ranks == 1 else 0.0,
        "bfloat16 copies of weights": (shape.linear + shape.head) * 2 if rounds and ranks == 1 else 0.0,
        "gathered layers": gathered(shape, narrow) if ranks > 1 else 0.0,
    }

    def micro_batch(tokens: float) -> dict[str, float]:
        tokens *= 1 - load.prompts * load.group / load.packed  # a completion's last token predicts nothing and is not run
        return {
            "activations": tokens * activations(shape, precision, checkpointing=settings.checkpointing, gpu=gpu),
            "backward pass of a layer": tokens * 2 * (shape.mlp_width + shape.hidden) * precision.between,
            "logits": logits(shape, tokens, gpu=gpu),
            **fixed,
            **batch,
        }

    # An update's first micro-batch finds no gradients yet: they arrive as the activations go.
    split, most = load.packed / (ranks * settings.minibatches), float(settings.micro_batch_tokens)
    phases = {"first": micro_batch(min(most, split)), "optimiser": gradients | batch}
    if split > most:
        phases["later"] = gradients | micro_batch(min(most, split - most))
    return Memory(held=held, phases=phases, slack=SLACK if gpu else 1.0, heap=0.0 if gpu else LEARNER_HEAP)


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a number."""

    weights: int
    """Also of the residual stream."""
    inputs: int
    """Of what linear layers keep of their inputs."""
    between: int
    """Of what other operations keep."""
    copies: bool = False
    """Whether inputs are copies of what other operations keep too."""

    @classmethod
    def of(cls, recipe: Recipe, *, gpu: bool) -> "Precision":
        wide = BYTES[recipe.model.dtype]
        if recipe.learner.precision != "bfloat16" or wide == 2:
            return cls(wide, wide, wide)
        return cls(4, 2, 2) if gpu else cls(4, 2, 4, copies=True)  # on a CPU only linear layers run in it


def activations(shape: ModelShape, precision: Precision, *, checkpointing: bool, gpu: bool) -> float:
    """Bytes per packed token that are kept for the backward pass.

    Of each layer: the residual stream twice, which the norms keep; their outputs; queries, keys, values and the output of
    attention; the MLP's gate, up and inner vectors, and on a GPU also SiLU's output, which the C++ kernel computes again.
    """
    routed = 2 * shape.hidden * shape.experts
    inputs = 2 * shape.hidden + shape.mlp_width + routed + (shape.attended if precision.copies else 0)
    between = shape.attention + (3 if gpu else 2) * shape.mlp_width
    layer = 2 * shape.hidden * precision.weights + inputs * precision.inputs + between * precision.between
    ends = 4 * shape.hidden * precision.weights  # final norm, the rows of completions alone, and their gradient
    return ends + (layer + shape.layers * shape.hidden * precision.weights if checkpointing else shape.layers * layer)


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
    phases = {"generation": generation(shape, recipe, load, rows=rows, prompts=prompts, gpu=gpu, vllm=vllm, shards=shards)}
    if not vllm:
        phases["trial"] = {"trial of the model": TRIAL * shape.head * of_weights}
    return Memory(
        held=held,
        phases=phases,
        slack=SLACK if gpu else SAMPLER_SLACK,
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
