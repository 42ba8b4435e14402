"""What each part of the fast path saves alone, on the work `reasoning`: one thing taken away at a time, in turn.

python benchmarks/savings.py
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from worker_groupwise import Step
from workloads import WORKS, make

PAIRS = 3


def padded_sampler(step: Step) -> dict[str, float]:
    with mock.patch("groupwise.rollouts.native.packs", return_value=False):
        return step.run()


@contextmanager
def layer_by_layer() -> Iterator[None]:
    with (
        mock.patch("groupwise.attention.decoding.plan", return_value=None),
        mock.patch("groupwise.rollouts.packed_weights.plan", return_value=None),
    ):
        yield


def not_in_one_call(step: Step) -> dict[str, float]:
    with layer_by_layer():
        return step.run()


def weights_as_they_are(step: Step) -> dict[str, float]:
    with layer_by_layer(), mock.patch("groupwise.rollouts.native.PackedWeights", return_value=nullcontext()):
        return step.run()


def without_kernel(step: Step) -> dict[str, float]:
    with layer_by_layer(), mock.patch("groupwise.attention.decoding.decode_kernel", return_value=None):
        return step.run()


def layers_as_they_are(step: Step) -> dict[str, float]:
    with layer_by_layer(), mock.patch.object(step.model.base_model, "_groupwise_fused", []):
        return step.run()


def padded_attention(step: Step) -> dict[str, float]:
    with mock.patch("groupwise.attention.packed.has_kernel", return_value=False):
        return step.run()


def padded_learner(step: Step) -> dict[str, float]:
    with (
        mock.patch("groupwise.learner.logprobs.packs", return_value=False),
        mock.patch("groupwise.learner.local.packs", return_value=False),
    ):
        return step.run()


def unshared_prompts(step: Step) -> dict[str, float]:
    settings = step.learner.settings
    step.learner.settings = settings.model_copy(update={"share_prompts": False})
    report = step.run()
    step.learner.settings = settings
    return report


VARIANTS: dict[str, Callable[[Step], dict[str, float]]] = {
    "everything": Step.run,
    "sampler: transformers' cache, padded": padded_sampler,
    "sampler: a step not in one call, but layer by layer": not_in_one_call,
    "sampler: layer by layer, weights not in panels": weights_as_they_are,
    "sampler: layer by layer, attention in PyTorch": without_kernel,
    "both: layer by layer, norms, rotations and gated products as transformers has them": layers_as_they_are,
    "both: attention over prompts and completions in PyTorch, on padded rows": padded_attention,
    "learner: prompts shared, but padded": padded_learner,
    "learner: prompts run for every row, padded": unshared_prompts,
}


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as directory:
        make(WORKS["reasoning"], Path(directory))
        step = Step(WORKS["reasoning"], Path(directory))
        step.run()
        reports: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        for _ in range(PAIRS):
            for name, variant in VARIANTS.items():
                reports[name].append(variant(step))
    print("| | generation, tok/s | training, s |")
    print("|---|---|---|")
    for name, found in reports.items():
        rate = statistics.median(report["tokens"] / report["generation"] for report in found)
        training = statistics.median(report["training"] for report in found)
        print(f"| {name} | {rate:,.0f} | {training:.2f} |")


if __name__ == "__main__":
    main()
