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
    monkeypatch.setattr(families, "turns", lambda *_, **__: iter([(0, "fast", report), (1, "fast", report)]))
    with pytest.raises(SystemExit, match="Llama"):
        run(families, monkeypatch, "--families", "Llama", "--out", tmp_path / "F.md")
    assert "**not measured, the fast side fell back**: no kernels" in (tmp_path / "F.md").read_text()
    assert len((tmp_path / "F.jsonl").read_text().splitlines()) == 1


def test_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    out = tmp_path / "L.md"
    arguments = ("--lengths", 8, "--longest", 0, "--pairs", 0, "--prompts", 1, "--threads", 1, "--dtypes", "float32", "bfloat16")
    run(lengths, monkeypatch, *arguments, "--out", out)
    written = out.read_text()
    assert "| Seconds of a step | 8 | exponent |" in written and "Steps, float32 over bfloat16, by length:" in written
    gaps = written.split("| Gap, mean |")[1].splitlines()
    exact, narrow = (float(gaps[row].split("|")[2]) for row in (2, 3))
    assert 0 <= exact < 1e-5 < narrow < 1e-1


def test_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(pairs, monkeypatch, ROOT, ROOT, "--works", "short", "--pairs", 1, "--scale", 0.02, "--out", tmp_path / "P.md")
    assert "| short |" in (tmp_path / "P.md").read_text() and "step: old / new" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="its worker imports"):
        pairs.peer(tmp_path)
