"""groupwise beside transformers on one GPU: whole steps in turn, on Qwen3 of 0.6 and 1.7 billion parameters with random weights.

    python benchmarks/gpu.py --size 0.6B --out DIRECTORY --seconds 180
    python benchmarks/gpu.py --tiny --out DIRECTORY      the same path in small, on whatever machine this is

Needs PyTorch and transformers only. gpu.sh runs it. transformers: `generate` for all completions at once, then a learner on
padded rows (plain.py); both sides share one copy of the model weights, and each turn allocates its optimiser's moments anew.
Adds a line to DIRECTORY/gpu.jsonl after each turn and writes DIRECTORY/RESULTS-gpu.md anew; starts no turn that would not end
within the given seconds.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain
import torch
import transformers
from worker_groupwise import Step
from workloads import Work, new_model, parameters, prompts, tokenizer

LOAD = Work(
    prompts=32,
    prompt_tokens=512,
    group_size=8,
    max_tokens=512,
    endless=True,
    dtype="bfloat16",
    vocabulary=151_936,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
)
WORKS = {
    "0.6B": replace(LOAD, hidden=1024, mlp=3072, micro_batch_tokens=16_384, micro_batch_rows=16),
    "1.7B": replace(LOAD, hidden=2048, mlp=6144, prompts=16, max_tokens=384, micro_batch_tokens=8192, micro_batch_rows=8),
    "tiny": Work(prompts=2, prompt_tokens=16, group_size=4, max_tokens=16, endless=True, kv_heads=1, micro_batch_rows=4),
}
ROUNDS = 2
Report = dict[str, Any]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def synchronised() -> float:
    """The time, once the GPU has done all it was asked for."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


class Phase:
    """Seconds and the peak of the GPU's allocated memory of what runs within."""

    def __enter__(self) -> "Phase":
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        self._started = synchronised()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds = synchronised() - self._started
        self.gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else 0.0


def ours(step: Step) -> Report:
    """A whole step of groupwise."""
    adam = step.learner.optimiser.adam
    adam.state.clear()
    with Phase() as generation:
        answers = step.sample()
    with Phase() as training:
        batch = step.batch(answers)
        update = step.learner.update(batch)
    adam.state.clear()
    return report(generation, training, batch, update.step["loss"], update.step["grad_norm"])


def theirs(step: Step) -> Report:
    """A whole step of transformers."""
    with Phase() as generation:
        answers = plain.generate(step.module, step)
    adam = torch.optim.AdamW(step.module.parameters(), lr=1e-6, fused=True)
    with Phase() as training:
        batch = step.batch(answers)
        found = plain.update(step.module, adam, step, batch, step.work.micro_batch_rows)
    return report(generation, training, batch, **found)


def report(generation: Phase, training: Phase, batch: Any, loss: float, grad_norm: float) -> Report:
    return {
        "seconds": generation.seconds + training.seconds,
        "generation": generation.seconds,
        "training": training.seconds,
        "generation_gib": generation.gib,
        "training_gib": training.gib,
        "tokens": int(batch.lengths_B.sum()),
        "loss": loss,
        "grad_norm": grad_norm,
    }


SIDES: dict[str, Callable[[Step], Report]] = {"groupwise": ours, "transformers": theirs}


# --- what the machine can do, and what the work needs


def median_seconds(run: Callable[[], Any], times: int = 10) -> float:
    for _ in range(3):
        run()
    found = []
    for _ in range(times):
        started = synchronised()
        run()
        found.append(synchronised() - started)
    return statistics.median(found)


def peaks(device: str) -> Report:
    """Measured: FLOP/s of a large bfloat16 matmul on random data, and bytes/s of a large copy, read and written."""
    n, size = (8192, 2**30) if on_gpu() else (256, 2**20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * n**3 / median_seconds(lambda: a @ b)
    source = torch.ones(size, device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return {"flops": flops, "bytes": 2 * 4 * size / median_seconds(lambda: target.copy_(source))}


def training_flops(work: Work, *, shared: bool) -> float:
    """Of an update, forward and backward, without what is computed again; `shared`: prompts once, not once per completion."""
    P, G, L, T = work.prompts, work.group_size, work.prompt_tokens, work.max_tokens
    head = work.hidden * work.vocabulary
    tokens = P * (L + G * T) if shared else P * G * (L + T)
    pairs = P * (L**2 / 2 + G * (T * L + T**2 / 2)) if shared else P * G * (L + T) ** 2 / 2
    attention = 4 * work.heads * work.head_dim * work.layers * pairs
    return 6 * (parameters(work) - head) * tokens + 6 * head * P * G * T + 3 * attention


def decoding_bytes(work: Work) -> float:
    """What all decoding steps must read: the weights, the keys and values of the completions, and those of each prompt once."""
    item = getattr(torch, work.dtype).itemsize
    of_token = 2 * item * work.layers * (work.kv_heads or work.heads) * work.head_dim
    rows = work.prompts * work.group_size
    each = item * parameters(work) + of_token * (rows * work.max_tokens / 2 + work.prompts * work.prompt_tokens)
    return work.max_tokens * each


# --- the results


def write_results(directory: Path) -> None:
    """RESULTS-gpu.md from gpu.jsonl."""
    lines = [json.loads(line) for line in (directory / "gpu.jsonl").read_text().splitlines()]
    text = ["# Results on a GPU", ""]
    for size in dict.fromkeys(line["size"] for line in lines):
        of_size = [line for line in lines if line["size"] == size]
        text += section(size, of_size)
    (directory / "RESULTS-gpu.md").write_text("\n".join(text))


def section(size: str, lines: list[Report]) -> list[str]:
    work, about = WORKS[size], next(line for line in lines if "machine" in line)
    text = [
        f"## {size}",
        "",
        f"{about['machine']}; measured there: bf16 matmul {about['flops'] / 1e12:.0f} TFLOP/s, "
        f"memory {about['bytes'] / 1e12:.2f} TB/s.",
        f"{work.prompts} prompts of {work.prompt_tokens} tokens, {work.group_size} completions each of {work.max_tokens} tokens; "
        f"{work.dtype}, vocabulary {work.vocabulary:,}. Medians; all rows are equally long, so padded rows have no padding.",
        "",
        *(f"- {what}: {how}" for what, how in about["backends"].items()),
        *(f"- failed: {line['side']}: {line['error']}" for line in lines if "error" in line),
        "",
        "| | turns | generation, tok/s | share of memory bound | training, tok/s | TFLOP/s (of matmul peak) | step, s "
        "| peak, GiB: generation | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    medians: dict[str, Report] = {}
    for side in SIDES:
        found = [line for line in lines if line.get("side") == side and "seconds" in line]
        if found:
            names = ("seconds", "generation", "training", "generation_gib", "training_gib", "tokens")
            median = medians[side] = {name: statistics.median(line[name] for line in found) for name in names}
            rate = training_flops(work, shared=side == "groupwise") / median["training"]
            bound = decoding_bytes(work) / about["bytes"]
            text.append(
                f"| {side} | {len(found)} | {median['tokens'] / median['generation']:,.0f} | {bound / median['generation']:.0%} "
                f"| {median['tokens'] / median['training']:,.0f} | {rate / 1e12:.0f} ({rate / about['flops']:.0%}) "
                f"| {median['seconds']:.2f} | {median['generation_gib']:.1f} | {median['training_gib']:.1f} |"
            )
    if len(medians) == 2:
        one, other = medians.values()
        ratios = [f"{name} {other[name] / one[name]:.2f}" for name in ("generation", "training", "seconds")]
        text += ["", f"Times faster than transformers: {', '.join(ratios)}."]
    return [*text, ""]


# --- running it


class Benchmark:
    """One size: its model on the device, and the turns of both sides."""

    def __init__(self, size: str, directory: Path, ends: float) -> None:
        self.size, self.directory, self.ends = size, directory, ends
        self.work, self.device = WORKS[size], "cuda" if on_gpu() else "cpu"
        self.module = new_model(self.work, self.device)

    def step(self, work: Work) -> Step:
        return Step(work, self.module, tokenizer(work), prompts(work))

    def record(self, line: Report) -> None:
        line = {"size": self.size, **line}
        with (self.directory / "gpu.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)
        write_results(self.directory)

    def run(self) -> None:
        name = torch.cuda.get_device_name() if on_gpu() else platform.processor() or platform.machine()
        versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        step = self.step(self.work)
        about = {"machine": f"{name}, {versions}", **peaks(self.device), "backends": step.model.backends()}
        if reason := step.model.fallback():
            about["backends"]["fallback"] = reason
        self.record(about)
        small = self.step(replace(self.work, prompts=2, max_tokens=min(16, self.work.max_tokens)))
        for side in SIDES:
            self.turn(side, small, {"warm_up": True})
        longest: dict[str, float] = {}
        for number in range(ROUNDS):
            for side in SIDES:
                if time.monotonic() + 1.2 * longest.get(side, 0.0) > self.ends:
                    print(f"no time is left for turn {number + 1} of {side}", flush=True)
                    continue
                started = time.monotonic()
                self.turn(side, step, {"turn": number + 1})
                longest[side] = time.monotonic() - started

    def turn(self, side: str, step: Step, about: Report) -> None:
        if on_gpu():
            torch.cuda.empty_cache()  # the other side's, in blocks of other sizes
        try:
            found = SIDES[side](step)
        except Exception as error:  # one side may run out of memory; the other's turns still count
            step.module.zero_grad(set_to_none=True)
            self.record({**about, "side": side, "error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"})
            return
        if "warm_up" in about:
            print(json.dumps({"side": side, **about, **found}), flush=True)
        else:
            self.record({**about, "side": side, **found})

    def profile(self) -> None:
        """Which kernels take the time of some decoding steps of all rows, and of training on a few groups: profile-SIZE.txt."""
        sampling = self.step(replace(self.work, max_tokens=min(24, self.work.max_tokens)))
        step = self.step(replace(self.work, prompts=min(4, self.work.prompts)))
        batch = step.batch(step.sample())
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu() else [])]
        texts = []
        for name, run in (("sampler", sampling.sample), ("learner", lambda: step.learner.update(batch))):
            run()
            with torch.profiler.profile(activities=kinds) as profiled:
                run()
                synchronised()
            by = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
            texts.append(f"# {name}\n" + profiled.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90))
        (self.directory / f"profile-{self.size}.txt").write_text("\n\n".join(texts))


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[size for size in WORKS if size != "tiny"], default="0.6B")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0, help="No turn is started that would end later than this.")
    parser.add_argument("--profile", action="store_true", help="In the end, if half a minute is left.")
    arguments = parser.parse_args()
    if not (arguments.tiny or on_gpu()):
        raise SystemExit("no CUDA device here; --tiny runs the same path in small")
    arguments.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark("tiny" if arguments.tiny else arguments.size, arguments.out, started + arguments.seconds)
    benchmark.run()
    if arguments.profile and time.monotonic() + 30 < benchmark.ends:
        benchmark.profile()


if __name__ == "__main__":
    sys.exit(main())
