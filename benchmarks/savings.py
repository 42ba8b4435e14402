"""What each part of the fast path saves alone, on the work `reasoning`: one thing taken away at a time, in turn.

python benchmarks/savings.py
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from worker_groupwise import Step
from workloads import WORKS, make

from groupwise.models import BACKENDS, Backend

PAIRS = 3
AUTO = BACKENDS["auto"]
LAYERWISE = replace(AUTO, one_call_step=False)
VARIANTS: dict[str, tuple[Backend, Backend]] = {
    "everything": (AUTO, AUTO),
    "sampler: padded batches through transformers": (BACKENDS["transformers"], AUTO),
    "sampler: a decoding step layer by layer, not in one call": (LAYERWISE, AUTO),
    "sampler: layer by layer, weights not in blocked layout": (replace(LAYERWISE, blocked_weights=False), AUTO),
    "sampler: layer by layer, attention in PyTorch": (replace(LAYERWISE, attention_kernels=False), AUTO),
    "both: layer by layer, RMSNorm, RoPE and SwiGLU as transformers has them": (replace(LAYERWISE, layer_kernels=False),) * 2,
    "learner: attention in PyTorch, on padded rows": (AUTO, replace(AUTO, attention_kernels=False)),
    "learner: padded batches through transformers, prompts run for every row": (AUTO, BACKENDS["transformers"]),
}
"""Backends of the sampler and of the learner."""


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as directory:
        make(WORKS["reasoning"], Path(directory))
        steps = {
            name: Step.load(WORKS["reasoning"], Path(directory), sampling=sampling, learning=learning)
            for name, (sampling, learning) in VARIANTS.items()
        }
        for step in steps.values():
            step.run()
        reports: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for _ in range(PAIRS):
            for name, step in steps.items():
                reports[name].append(step.run())
    print("| | generation, tok/s | training, s |")
    print("|---|---|---|")
    for name, found in reports.items():
        rate = statistics.median(report["tokens"] / report["generation"] for report in found)
        training = statistics.median(report["training"] for report in found)
        print(f"| {name} | {rate:,.0f} | {training:.2f} |")


if __name__ == "__main__":
    main()
