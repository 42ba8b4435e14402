"""How long decoding steps, prefill, training and publishing take on a kind of GPU: from data sheets and measured efficiencies.

Measured on one H200 with Qwen3 of 0.6 and 1.7 billion parameters (benchmarks/RESULTS.md, "on a GPU"); everything else that is
assumed is a constant with a comment that says so.
"""

import math
from dataclasses import dataclass

from groupwise.cluster.planning.memory import BYTES, Load, Needs
from groupwise.cluster.planning.shape import ModelShape
from groupwise.config import Recipe
from groupwise.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU, from its maker's data sheet."""

    memory: float
    """Bytes."""
    flops: float
    """bfloat16, dense, per second."""
    bandwidth: float
    """Bytes of memory per second."""


GPUS = {
    "a10": Gpu(24e9, 125e12, 0.60e12),
    "a100": Gpu(80e9, 312e12, 2.04e12),
    "a100-40gb": Gpu(40e9, 312e12, 1.56e12),
    "b200": Gpu(180e9, 2250e12, 7.7e12),
    "h100": Gpu(80e9, 989e12, 3.35e12),
    "h200": Gpu(141e9, 989e12, 4.8e12),
    "l4": Gpu(24e9, 121e12, 0.30e12),
    "l40s": Gpu(48e9, 362e12, 0.86e12),
    "rtx-4090": Gpu(24e9, 165e12, 1.01e12),
}

MATMUL = 0.76
"""Of the data sheet's FLOP/s in a large matmul: 750 TFLOP/s measured of 989."""
MEMORY = 0.875
"""Of the data sheet's bandwidth in a copy: 4.2 TB/s measured of 4.8."""
LAYER_SECONDS = {"native": 0.38e-3, "vllm": 0.05e-3}
"""Of a layer in a decoding step, whatever the rows. Native: fitted to the two measured models. vLLM: assumed."""
STREAMED = {"native": 0.67, "vllm": 0.75}
"""Of the copy's bandwidth at which weights and keys are read. Native: fitted likewise. vLLM: assumed."""
PREFILL = 0.5
"""Of a matmul's FLOP/s in prefill and in a decoding step of many rows; assumed."""
TRAINING_1024, TRAINING_PER_DOUBLING = 0.24, 0.13
"""Of a matmul's FLOP/s in training with hidden size 1,024, and what is added with each doubling: measured there and at 2,048."""
LEAST_TRAINING, MOST_TRAINING = 0.05, 0.45
"""In training of much narrower and of wider models; assumed."""
WIDE = 15
"""How many times as long matmuls take in float32, which runs without tensor cores (67 of 989 TFLOP/s on an H100's data sheet)."""
LINK, NETWORK, NODE = 300e9, 50e9, 8
"""Bytes per second and GPU between up to NODE GPUs, and between more of them; assumed. Overlapped with computation."""
PUBLISH_SECONDS, PUBLISH_BYTES = 0.5, 2e9
"""Publishing weights takes so many seconds and one for each so many bytes (written, then read by all samplers); assumed."""


def find_gpu(name: str) -> Gpu:
    """
    Raises:
        UserError: there is none of this name.
    """
    if (found := GPUS.get(name.lower())) is None:
        raise UserError(f"--gpu: no data of {name!r}{nearest(name.lower(), GPUS)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Times of one model on one kind of GPU."""

    shape: ModelShape
    recipe: Recipe
    needs: Needs
    load: Load
    gpu: Gpu
    decoding: float = 1.0
    """Factor of a decoding step's time, from a measured run."""
    training: float | None = None
    """Completion tokens per second and GPU, from a measured run; None: from the constants above."""

    @property
    def engine(self) -> str:
        return "vllm" if self.recipe.rollouts.sampler == "vllm" else "native"

    @property
    def shards(self) -> int:
        """GPUs that a sampler is split over."""
        return max(1, self.recipe.cluster.gpus_per_sampler) if self.engine == "vllm" else 1

    @property
    def _cached_tokens(self) -> float:
        """Tokens that an average row attends to: its prompt, shared with its group, and half of what it will have."""
        return self.load.prompt_tokens / self.load.group + self.load.tokens / 2

    def step_seconds(self, rows: int) -> float:
        """Of a decoding step: each layer's fixed time, then weights and keys are read, or multiplied if that takes longer."""
        vllm = self.engine == "vllm"
        settings = self.recipe.rollouts
        of_weights = 2 if vllm else BYTES[settings.dtype or self.recipe.model.dtype]
        of_cache = 2 if vllm else BYTES[settings.cache_dtype or settings.dtype or self.recipe.model.dtype]
        read = self.shape.read(rows) * of_weights + rows * self.shape.cached(math.ceil(self._cached_tokens), vllm=vllm) * of_cache
        reading = read / self.shards / (self.gpu.bandwidth * MEMORY * STREAMED[self.engine])
        multiplying = rows * self._flops_seconds / self.shards
        return self.decoding * (LAYER_SECONDS[self.engine] * self.shape.layers + max(reading, multiplying))

    @property
    def _flops_seconds(self) -> float:
        """Of a token's forward pass."""
        return 2 * self.shape.active / (self.gpu.flops * MATMUL * PREFILL)

    def prefill_seconds(self, tokens: float) -> float:
        return tokens * self._flops_seconds / self.shards

    def learn_seconds(self, tokens: int, ranks: int) -> float:
        """Of a training step on so many completion tokens: passes over them and their prompts, or the network if it is slower."""
        settings, lora = self.recipe.learner, self.recipe.model.lora is not None
        packed = self.load.prompts * self.load.prompt_tokens + tokens
        # In units of a forward pass: forward and backward (of adapters without the gradients of matrices), recomputation, others.
        passes = (2 if lora else 3) + (1 if settings.checkpointing else 0)
        passes *= self.recipe.rollouts.epochs
        passes += int(settings.old_logprobs == "recompute") + int(self.needs.reference)
        passes += (4 if self.needs.critic else 0) * self.recipe.rollouts.epochs
        share = TRAINING_1024 + TRAINING_PER_DOUBLING * math.log2(self.shape.hidden / 1024)
        share = min(MOST_TRAINING, max(LEAST_TRAINING, share))
        narrow = 2 if settings.precision == "bfloat16" else BYTES[self.recipe.model.dtype]
        peak = self.gpu.flops if narrow == 2 else self.gpu.flops / WIDE
        computing = passes * 2 * self.shape.active * packed / (ranks * peak * MATMUL * share)
        if self.training is not None:
            computing = tokens / (self.training * ranks)
        if ranks == 1:
            return computing
        micro_batches = max(settings.minibatches, math.ceil(packed / (ranks * settings.micro_batch_tokens)))
        sent = passes * micro_batches * self.shape.parameters * narrow * (ranks - 1) / ranks
        return max(computing, sent / (LINK if ranks <= NODE else NETWORK))

    def publish_seconds(self) -> float:
        return PUBLISH_SECONDS + self.shape.parameters * BYTES[self.recipe.model.dtype] / PUBLISH_BYTES

    def load_seconds(self, rows: int) -> float:
        """For which a sampler stands still: keys and values of its rows are computed again."""
        return self.prefill_seconds(rows * self._cached_tokens)

    def assumptions(self) -> list[str]:
        """In words, for the reader of a plan."""
        if self.training is not None:
            first = f"decoding and training as fast as in the given run: {self.training:,.0f} completion tokens/s learnt per GPU"
        else:
            first = "efficiencies measured on one H200 with models of 0.6 and 1.7 billion parameters; " + (
                "vLLM's are assumed" if self.engine == "vllm" else "those of larger models are extrapolated"
            )
        return [
            first,
            f"a decoding step takes {1000 * self.step_seconds(1):.1f} ms for one row, "
            f"{1000 * self.step_seconds(256):.1f} ms for 256",
            f"publishing weights takes {self.publish_seconds():.1f} s; sharded learners exchange {LINK / 1e9:.0f} GB/s, "
            f"{NETWORK / 1e9:.0f} GB/s beyond {NODE} GPUs (assumed)",
            "rewards take no longer than generation",
        ]
