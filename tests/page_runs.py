"""Run directories for tests of pages, written by the classes that write those of a training, with numbers made up."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from groupwise.config import Recipe, dump
from groupwise.text import json_line
from groupwise.training.events import Warned
from groupwise.training.events_file import EventsFile
from groupwise.training.segments import Segment, write_segments
from tests.hostile_texts import TEXTS

SAFE = [text.encode(errors="replace").decode() for text in TEXTS.values()]
"""Hostile texts that a file can hold: half a surrogate pair is no UTF-8."""


def metrics(step: int, steps: int, draw: random.Random, constant: bool = False) -> dict[str, Any]:
    """A training step's record, as training writes it."""
    done, noise = step / steps, 0.05 * draw.gauss(0, 1)
    right = min(1.0, max(0.0, 0.2 + 0.6 * done + noise))
    return {
        "step": step, "time": 3.0 * step,
        "train/pass_rate": right, "reward/mean": right - 0.1, "reward/shaped_mean": right - 0.1, "reward/shaped_spread": 0.4,
        "reward/part/task": right, "reward/part/overlong": -0.1, "entropy": 0.6 - 0.3 * done + noise / 5, "loss": noise,
        "approx_kl": abs(noise) / 50, "clip_fraction": 0.01, "gradient_norm": math.exp(noise), "utilisation": 0.7 + noise,
        "groups/zero_variance": 0.3, "groups/all_correct": 0.2, "groups/all_wrong": 0.1, "length/mean": 12 + 30 * done + noise,
        "length/truncated": 0.0 if constant else 0.01 + abs(noise) / 9, "skipped_updates": 0.0, "sampler_gap_mean": 1e-6,
        "spread/token": 0.1, "rollouts/completions": 64.0, "seconds/rollouts": 2.0 + noise, "seconds/learner": 1.0,
        "seconds/step": 3.0, "tokens_per_second": 1000 + 99 * noise, "by_probability/tokens": [100.0] * 11,
        "by_probability/clipped_low": [1.0] * 11, "by_probability/clipped_high": [2.0] * 11,
    }  # fmt: skip


def write_run(
    path: Path,
    *,
    steps: int = 20,
    seed: int = 0,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    texts: Sequence[str] = ("2+3=", "5", "2+3 is 5"),
    notes: Sequence[str] = (),
) -> Path:
    """A finished run.

    Args:
        sections: of its recipe, beside what a recipe has that sets nothing.
        texts: its prompts, answers, completions, roles and the names of its rewards are these in turn. A run of more than 1,000
            steps has those of tokens/ only.
        notes: texts of events.
    """
    path.mkdir(parents=True)
    tree: dict[str, Any] = Recipe().model_dump(by_alias=True)
    tree["training"] |= {"steps": steps}
    for name, values in (sections or {}).items():
        tree[name] |= values
    tree["seed"] = seed
    (path / "recipe.toml").write_text(dump(tree), encoding="utf-8")
    write_segments(path, [Segment(segment=0, first_step=1, recipe=tree)])
    draw, every = random.Random(seed), max(1, steps // 8)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            if step:
                file.write(json.dumps(metrics(step, steps, draw)) + "\n")
            if step % every == 0:
                score = 0.2 + 0.5 * step / steps + 0.03 * draw.random()
                file.write(json.dumps({"step": step, "time": 3.0 * step, "eval/pass@1": score, "eval_problems": 200.0}) + "\n")
    events = EventsFile(path / "events.jsonl")
    for i, note in enumerate(notes):
        events.record(Warned(step=1 + i % steps, name="entropy", text=note, advice=note))
    if steps <= 1000:
        _write_texts(path, steps, texts)
    for step in (1, steps):
        _write_tokens(path, step, texts)
    return path


def _write_texts(path: Path, steps: int, texts: Sequence[str]) -> None:
    """The best and worst completions, and those of held-out problems."""
    lines = []
    for i in range(2 * len(texts)):
        prompt, answer, said = (texts[(i // 2 + shift) % len(texts)] for shift in (0, 1, 2))
        lines.append(
            {"prompt": prompt, "answer": answer, "completion": said, "reward": float(i % 2 == 0), "tokens": len(said),
             "parts": {answer[:500]: 0.5, "task": 0.5}, "correct": i % 2 == 0, "stop": "length" if i % 3 else "stop",
             "turns": [[prompt[:200], 0, len(said) // 2]]}
        )  # fmt: skip
    for name, ranks in (("rollouts", ("best", "worst")), ("evaluations", None)):
        (path / name).mkdir()
        found = [line if ranks is None else {"rank": ranks[i % 2], **line} for i, line in enumerate(lines)]
        for step in range(1, steps + 1) if ranks else (0, steps):
            kept = found if step in (0, 1, steps) else found[:2]
            (path / name / f"step-{step:06d}.jsonl").write_text(
                "".join(json_line(line) + "\n" for line in kept), encoding="utf-8"
            )


def _write_tokens(path: Path, step: int, texts: Sequence[str], groups: int = 4, rows: int = 3, length: int = 30) -> None:
    (path / "tokens").mkdir(exist_ok=True)
    draw = random.Random(step)
    found = []
    for row in range(groups * rows):
        prompt, answer, word = (texts[(row // rows + shift) % len(texts)] for shift in (0, 1, 2))
        of_row = {
            "group": row // rows, "row": row, "prompt": prompt[:20_000], "answer": answer[:1000], "reward": float(row % 2),
            "reward_parts": json.dumps({word[:200]: float(row % 2)}), "correct": row % 2 == 1, "stop": "stop",
        }  # fmt: skip
        for place in range(length):
            ours, ratio, text = place > 5, math.exp(draw.gauss(0, 0.2)), texts[(row * length + place) % len(texts)]
            learnt = {
                "advantage": (-1.0) ** (row + 1), "logprob": draw.uniform(-3, 0), "old_logprob": draw.uniform(-3, 0),
                "ratio": ratio, "low": 0.8, "high": 1.28, "entropy": draw.random(), "clipped": not 0.8 < ratio < 1.28,
            }  # fmt: skip
            said = {"position": place, "token": place, "text": text[:1000], "trained": ours, "turn": int(ours)}
            learnt = {name: value if ours else None for name, value in learnt.items()}
            found.append({**of_row, **said, **learnt, "role": "assistant" if ours else word[:80]})
    pq.write_table(pa.Table.from_pylist(found), path / "tokens" / f"step-{step:06d}.parquet")


def hostile_runs(home: Path) -> list[Path]:
    """Two runs whose names, recipes, events, prompts, completions and rewards attack who shows them; 1 MB in one text."""
    names = ["<img src=x onerror=window.owned=1> \u202e[31m", "a \x1b[31m'\"><script>window.owned=1<" + "9" * 150]
    return [
        write_run(
            home / name.replace("/", "∕"),
            seed=seed,
            steps=6,
            texts=SAFE,
            notes=[text[:20_000] for text in SAFE],
            sections={
                "task": {"name": "dataset", "path": SAFE[-3], "prompt": "</script><script>window.owned=1</script>"},
                "algorithm": {"clip_high": 0.2 + seed / 10},
                "model": {"name": "\x1b]0;owned\x07<svg onload=window.owned=1>" + str(seed)},
            },
        )
        for seed, name in enumerate(names)
    ]
