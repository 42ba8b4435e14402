"""The benchmarks run, in small: families.py, lengths.py and pairs.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import families
import lengths
import pairs
import pytest
from families import FAMILIES, active_parameters
from workloads import WORKS, Work, as_json, new_model, parameters, scaled

from tests.conftest import need_kernels

ROOT = Path(__file__).parent.parent


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def test_all_families_have_about_the_active_weights_of_qwen3_and_do_the_same_work() -> None:
    base = WORKS["reasoning"]
    assert active_parameters(base) == parameters(base)
    for name, work in FAMILIES.items():
        assert active_parameters(work) == pytest.approx(parameters(base), rel=0.05), name
        shape = work.prompts, work.prompt_tokens, work.group_size, work.max_tokens, work.hidden, work.vocabulary
        assert shape == (16, 200, 16, 256, 192, 64), name


def test_active_weights_by_hand() -> None:
    """Hidden size 8, a layer: a head of 4 is 4 x 8 x 4 weights, the router 4 x 8, two experts 2 x 3 x 8 x 6; 64 x 8 logits."""
    work = replace(FAMILIES["Qwen3-MoE"], hidden=8, layers=1, heads=1, kv_heads=1, head_dim=4)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "tie_word_embeddings": False}
    assert active_parameters(replace(work, architecture=settings)) == 128 + 32 + 288 + 512


def test_architecture_reaches_the_configuration() -> None:
    config = new_model(FAMILIES["Gemma 3"], "meta").config
    assert config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    assert (config.sliding_window, config.query_pre_attn_scalar, config.num_key_value_heads) == (128, 64, 1)


def test_workers_of_earlier_versions_are_told_only_what_they_know() -> None:
    assert json.loads(as_json(WORKS["reasoning"])) == {
        "prompts": 16,
        "prompt_tokens": 200,
        "group_size": 16,
        "max_tokens": 256,
    }
    assert json.loads(as_json(replace(WORKS["short"], backend="torch")))["backend"] == "torch"


def test_scaling_takes_prompts_first_and_then_length() -> None:
    def shape(scale: float) -> tuple[int, int, int]:
        work: Work = scaled(WORKS["reasoning"], scale)
        return work.prompts, work.prompt_tokens, work.max_tokens

    assert shape(1) == (16, 200, 256) and shape(0.25) == (4, 200, 256) and shape(1 / 16) == (2, 100, 128)


def test_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a TRL that ends at once."""
    need_kernels()
    out, trl = tmp_path / "F.md", tmp_path / "trl" / "bin" / "python"
    trl.parent.mkdir(parents=True)
    trl.symlink_to("/bin/false")
    run(
        families,
        monkeypatch,
        "--families",
        "Gemma 2",
        "--scale",
        0.005,
        "--pairs",
        1,
        "--threads",
        1,
        "--peers",
        tmp_path,
        "--out",
        out,
    )
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(line["turn"], line["side"]) for line in lines] == [(0, "fast"), (0, "trl"), (1, "fast"), (1, "fallback")]
    assert lines[0]["paths"]["fallback"] is None and "padded" in lines[-1]["paths"]["generation"]
    written = out.read_text()
    assert "| Gemma 2 | 2.36 | 1, 1, 0 |" in written and "Step against the fallback: median" in written
    assert "**trl failed**: exit code 1: no message" in written


def test_a_fast_side_that_falls_back_is_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"generation": "padded", "training": "padded", "fallback": "no kernels", "details": {}}
    report = {"seconds": 1.0, "generation": 0.5, "training": 0.5, "tokens": 8, "peak_mib": 1.0, "paths": paths}
    monkeypatch.setattr(families, "turns", lambda *_, **__: (turn for turn in [(0, "fast", report), (1, "fast", report)]))
    with pytest.raises(SystemExit, match="Llama"):
        run(families, monkeypatch, "--families", "Llama", "--out", tmp_path / "F.md")
    assert "**not measured, the fast side fell back**: no kernels" in (tmp_path / "F.md").read_text()
    assert len((tmp_path / "F.jsonl").read_text().splitlines()) == 1


def test_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    out = tmp_path / "L.md"
    arguments = ("--lengths", 8, "--longest", 0, "--pairs", 0, "--prompts", 1, "--threads", 1, "--dtypes", "bfloat16")
    run(lengths, monkeypatch, *arguments, "--out", out)
    written = out.read_text()
    assert "| Seconds of a step | 8 | exponent |" in written
    narrow = float(written.split("| Gap, mean |")[1].splitlines()[2].split("|")[2])
    exact = lengths.gap(replace(lengths.BASE, threads=1), 8, "float32")["sampler_gap_mean"]
    assert 0 <= exact < 1e-5 < narrow < 1e-1


def test_growth_of_lengths_by_hand() -> None:
    """Four times the length, eight times the seconds: an exponent of 1.5; the step of 32 tokens is not fitted."""
    found = {"float32": {2: {"seconds": 1.0}, 8: {"seconds": 8.0}, 32: {"seconds": 9.0}}}
    assert lengths.table("s", found, "seconds", ".1f", without=32)[-1] == "| float32 | 1.0 | 8.0 | 9.0 | 1.50 |"
    assert lengths.faster({**found, "bfloat16": {2: {"seconds": 0.5}}}) == ["Steps, float32 over bfloat16, by length: 2.00."]


def test_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single pairs by hand: 2 s for 10 tokens over 1 s for 10, and 3 s for 10 over 2 s for 20."""

    def report(seconds: float, tokens: int) -> dict[str, float]:
        return {"seconds": seconds, "generation": seconds, "training": seconds, "tokens": tokens, "peak_mib": 10.0}

    results = {"old": [report(2, 10), report(3, 10)], "new": [report(1, 10), report(2, 20)]}
    monkeypatch.setattr(pairs, "compare", lambda *_: results)
    run(pairs, monkeypatch, ROOT, ROOT, "--works", "short", "--pairs", 2, "--out", tmp_path / "P.md")
    written = (tmp_path / "P.md").read_text()
    assert "| short | 2.50 | 1.50 | 2.50 (2.00 to 3.00) |" in written and "| 1.00 (1.00 to 1.00) |" in written
    with pytest.raises(SystemExit, match="its worker imports"):
        pairs.peer(tmp_path)
