"""Plans: memory against measured peaks, times in simple cases, the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from groupwise.cluster.planning import planner, search
from groupwise.cluster.planning.lengths import as_found, lognormal
from groupwise.cluster.planning.memory import Load, Memory, Needs, learner_memory, sampler_memory
from groupwise.cluster.planning.rates import GPUS, Rates, find_gpu
from groupwise.cluster.planning.shape import ModelShape, shape_of
from groupwise.config import Recipe, Source
from groupwise.errors import UserError
from groupwise.models import load_config
from groupwise.models.adapters import add_adapters
from tests.test_cli import run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QWEN = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151_936}
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "vocab_size": 100}
WIDE = {"hidden_size": 32, "intermediate_size": 64, **SMALL}
MOE = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def config_of(kind: str, **settings: Any) -> Any:
    return AutoConfig.for_model(kind, **settings)


def qwen(hidden: int, mlp: int) -> ModelShape:
    return shape_of(config_of("qwen3", hidden_size=hidden, intermediate_size=mlp, tie_word_embeddings=True, **QWEN))


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate(sections)


# --- shapes


@pytest.mark.parametrize(
    ("kind", "more"),
    [("qwen3", {}), ("llama", {}), ("gemma3_text", {"sliding_window": 16}), ("qwen3_moe", MOE), ("deepseek_v3", LATENT)],
)
def test_parameters_are_those_of_the_model(kind: str, more: dict[str, Any]) -> None:
    config = config_of(kind, **{**WIDE, **more})
    shape, module = shape_of(config), AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert shape.root + 3 * shape.largest_layer >= shape.parameters
    assert shape.linear <= shape.parameters


def test_adapters_are_counted_as_they_are_made() -> None:
    from types import SimpleNamespace

    config = config_of("qwen3", **WIDE)
    module = add_adapters(AutoModelForCausalLM.from_config(config), SimpleNamespace(rank=4, alpha=8.0, targets=[]), seed=0)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert shape_of(config).adapter(4) == trained


def test_what_a_cache_keeps_of_a_token() -> None:
    grouped = shape_of(config_of("qwen3", **WIDE))
    assert (
        grouped.cached(10) == grouped.cached(10, vllm=True) == 10 * 3 * 2 * 2 * 8
    )  # tokens, layers, keys and values, heads, size
    windows = shape_of(
        config_of("gemma3_text", **WIDE, sliding_window=16, layer_types=[*["sliding_attention"] * 2, "full_attention"])
    )
    assert windows.cached(100) == 100 * 3 * 32  # the native sampler keeps what is outside windows
    assert windows.cached(100, vllm=True) == (16 + 16 + 100) * 32
    latent = shape_of(config_of("deepseek_v3", **{**WIDE, **LATENT}))
    assert latent.cached(10, vllm=True) == 10 * 3 * (12 + 4)  # a latent and a rotary key, shared by all heads


def test_a_token_of_a_mixture_uses_only_its_experts() -> None:
    shape = shape_of(config_of("qwen3_moe", **WIDE, **MOE))
    expert = 3 * 32 * 16  # gate, up and down
    assert shape.parameters - shape.active == 3 * 6 * expert + 100 * 32  # 6 of 8 experts in 3 layers, and the embedding
    assert (shape.experts, shape.mlp_width) == (2, 2 * 16)
    assert shape.read(1) == shape.active
    assert shape.read(2) == shape.active + 3 * 8 * expert * (1 - 0.75**2 - 0.25)  # an expert is left out by each with 6/8
    assert shape.read(1000) == shape.parameters - 100 * 32


# --- memory


@pytest.mark.parametrize(
    ("hidden", "mlp", "prompts", "tokens", "micro_batch", "training", "generating"),
    [(1024, 3072, 32, 512, 16_384, 26.1, 17.5), (2048, 6144, 16, 384, 8192, 26.4, 9.8)],
)
def test_peaks_that_were_measured_on_an_h200(
    hidden: int, mlp: int, prompts: int, tokens: int, micro_batch: int, training: float, generating: float
) -> None:
    """benchmarks/RESULTS.md, "on a GPU": one update, its optimiser without moments yet, weights and cache in bfloat16."""
    shape = qwen(hidden, mlp)
    recipe = recipe_of(
        model={"dtype": "bfloat16"},
        rollouts={"prompts_per_step": prompts, "group_size": 8, "max_tokens": tokens},
        learner={"minibatches": 1, "micro_batch_tokens": micro_batch},
    )
    load = Load(prompts=prompts, group=8, prompt_tokens=512, longest_prompt=512, tokens=tokens, max_tokens=tokens)
    learner = learner_memory(shape, recipe, Needs(), load)
    learner = Memory(held={"weights": learner.held["weights"]}, phases=learner.phases)
    sampler = sampler_memory(shape, recipe, load, rows=8 * prompts, prompts=prompts)
    assert learner.peak / 2**30 == pytest.approx(training, rel=0.1)
    assert sampler.peak / 2**30 == pytest.approx(generating, rel=0.1)


def test_a_peak_measured_here() -> None:
    """The second smallest of those in benchmarks/plan_memory.py: the peak of the smallest varies by 5 % between processes."""
    code = "import sys; import plan_memory as m; size = m.SIZES['30M']; print(m.predicted(size, 'learner')['peak'])"
    measured, predicted = (
        float(subprocess.run([sys.executable, *command], cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout)
        for command in (["plan_memory.py", "--one", "30M", "learner"], ["-c", code])
    )
    assert predicted == pytest.approx(measured, rel=0.1)


def test_what_memory_depends_on() -> None:
    shape = qwen(1024, 3072)
    load = Load(prompts=32, group=8, prompt_tokens=100, longest_prompt=100, tokens=400, max_tokens=512)

    def peak(ranks: int = 1, needs: Needs | None = None, **sections: Any) -> float:
        return learner_memory(shape, recipe_of(**sections), needs or Needs(), load, ranks=ranks).peak

    plain = peak()
    assert peak(learner={"checkpointing": True}) < plain
    assert peak(learner={"precision": "bfloat16"}) < plain
    assert peak(model={"dtype": "bfloat16"}) < 0.6 * plain
    assert peak(learner={"micro_batch_tokens": 1024}) < plain
    assert peak(model={"lora": {"rank": 8}}) < peak() - 2.9 * 4 * shape.parameters  # no moments and gradients of the model
    assert peak(needs=Needs(reference=True)) == pytest.approx(plain + 1.02 * 4 * shape.parameters)
    assert peak(needs=Needs(critic=True)) == pytest.approx(plain + 1.02 * 12 * shape.parameters)
    assert peak(ranks=8) < plain
    half = shape_of(config_of("qwen3", **{**QWEN, "vocab_size": 75_968}, hidden_size=1024, intermediate_size=3072))
    blocks = [learner_memory(one, recipe_of(), Needs(), load).parts["logits"] for one in (shape, half)]
    assert blocks[0] == blocks[1]  # flat in the vocabulary


# --- times and splits


def rates_of(shape: ModelShape, gpu: str = "h200", **sections: Any) -> Rates:
    load = Load(prompts=32, group=8, prompt_tokens=512, longest_prompt=512, tokens=512, max_tokens=512)
    return Rates(shape=shape, recipe=recipe_of(**sections), needs=Needs(), load=load, gpu=find_gpu(gpu))


def test_times_that_were_measured_on_an_h200() -> None:
    """benchmarks/RESULTS.md: 17,852 tokens/s generated in 256 rows and 40,329 learnt, of 0.6 billion parameters."""
    rates = rates_of(qwen(1024, 3072), model={"dtype": "bfloat16"}, learner={"old_logprobs": "sampler", "minibatches": 1})
    assert 256 / rates.step_seconds(256) == pytest.approx(17_852, rel=0.15)
    tokens = 32 * 8 * 512
    assert tokens / rates.learn_seconds(tokens, 1) == pytest.approx(40_329, rel=0.25)


def test_faster_gpus_and_more_learners_take_less_time() -> None:
    shape = qwen(2048, 6144)
    seconds = [rates_of(shape, gpu).step_seconds(64) for gpu in ("l4", "a100", "h100", "h200", "b200")]
    assert seconds == sorted(seconds, reverse=True)
    rates = rates_of(shape)
    assert rates.learn_seconds(100_000, 4) < rates.learn_seconds(100_000, 1)


def test_every_option_fits_and_its_settings_are_a_recipes() -> None:
    rates = rates_of(qwen(2048, 6144), learner={"checkpointing": True, "precision": "bfloat16"}, rollouts={"dtype": "bfloat16"})
    options = search.search(rates, 8, lognormal(200, 1.0, 512))
    assert [option.staleness for option in options] == list(search.STALENESS)
    for option in options:
        assert option.samplers + option.learners <= 8
        assert max(option.sampler.peak, option.learner.peak) <= search.budget(rates)
        cluster = {key.removeprefix("cluster."): value for key, value in option.settings().items()}
        assert Recipe.model_validate({"cluster": cluster}).cluster.samplers == option.samplers
        assert option.outcome.largest_age <= option.largest_age == option.staleness + (option.staleness > 0)
    assert options[1].outcome.seconds < options[0].outcome.seconds


def test_a_model_that_is_too_large_is_refused_with_what_would_fit() -> None:
    shape = shape_of(config_of("qwen3", hidden_size=4096, intermediate_size=12288, **QWEN))
    with pytest.raises(UserError, match=r"learner takes .* What would fit: .*\[model.lora\] rank = 16.* GPUs for the learner"):
        search.search(rates_of(shape, "a100", rollouts={"dtype": "bfloat16"}), 3, lognormal(200, 1.0, 512))
    with pytest.raises(UserError, match=r"a sampler takes .* for one group"):
        search.search(rates_of(shape, "l4"), 8, lognormal(200, 1.0, 512))
    with pytest.raises(UserError, match="What would fit"):
        search.search(rates_of(shape, "l4"), 1, lognormal(200, 1.0, 512))


def test_kinds_of_gpus() -> None:
    assert find_gpu("H200") is GPUS["h200"]
    with pytest.raises(UserError, match="did you mean 'h200'"):
        find_gpu("h201")
    with pytest.raises(UserError, match=r"no data of 'foo'; known: a10, a100, [^:]*$"):
        find_gpu("foo")


def test_lengths() -> None:
    random = np.random.default_rng(0)
    found = lognormal(100, 0.5, 10_000)(random, 100_000)
    assert found.mean() == pytest.approx(100, rel=0.02)
    assert found.std() == pytest.approx(50, rel=0.05)
    assert set(lognormal(100, 0.0, 10_000)(random, 9)) == {100}
    assert lognormal(100, 2.0, 150)(random, 1000).max() == 150
    assert set(as_found(np.array([3, 5]))(random, 100)) == {3, 5}


# --- the command


def test_the_default_recipe_is_planned_for_one_gpu_and_for_several() -> None:
    one, several = run("plan"), run("plan", "--gpus", 4, "--gpu", "h200")
    assert one.exit_code == several.exit_code == 0, one.output + several.output
    assert "one process samples and learns in turn" in one.stdout
    assert "--set cluster.samplers=" in several.stdout
    assert "AdamW's moments" in several.stdout
    assert "assumed: completion lengths are lognormal" in several.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h20"], "--gpu: no data of 'h20'; did you mean"),
        (["no-such-recipe"], "no recipe"),
        (["--set", "rollouts.max_tokens=100000"], "exceed the model's"),
        (["--set", "model.path=nowhere"], "model.path"),
        (["--rates", "nowhere"], "not a run directory"),
        (["--set", "rollouts.sampler=http://a:1"], "servers at addresses run already"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str) -> None:
    result = run("plan", "--gpus", 2, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_rates_of_a_run(tmp_path: Path) -> None:
    """A simulated synchronous step then takes as long as the run's did, and learning goes at its pace."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "recipe.toml").write_text("[cluster]\nsamplers = 2\nlearners = 1\n")
    record = {"step": 1, "reward/mean": 0.5, "seconds/rollouts": 12.0, "seconds/learner": 4.0}
    record |= {"rollouts/completions": 512, "length/mean": 40.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**record, "step": step}) + "\n" for step in (1, 2, 3)))
    recipe = recipe_of(rollouts={"max_tokens": 100})
    found = planner.plan(recipe, Source(tmp_path / "x.toml", ""), gpus=4, gpu="h100", run=tmp_path, variation=0.0)
    assert "lengths" in found.notes[0]
    assert "5,120 completion tokens/s" in found.notes[1]  # 512 * 40 / 4
    # A decoding step of so few rows takes as long with twice as many of them, so one sampler needs no longer than the run's two.
    assert (one := found.options[0]).staleness == 0
    assert one.outcome.seconds == pytest.approx(12.0 + 4.0 / one.learners + 0.5, rel=0.05)


def test_rates_of_another_kind_of_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    record = {"step": 1, "reward/mean": 0.5, "seconds/rollouts": 1.0, "seconds/learner": 4.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**record, "rollouts/completions": 512, "length/mean": 40.0}) + "\n")
    for text, message in (
        ("[cluster]\nsamplers = 2\nstaleness = 1\n", r"is asynchronous \(cluster.staleness\)"),
        ('[model]\npath = "another"\n', "has trained another model, another; the recipe's is "),
    ):
        (tmp_path / "recipe.toml").write_text(text)
        with pytest.raises(UserError, match=message):
            planner.plan(Recipe(), Source(tmp_path / "x.toml", ""), gpus=4, gpu="h100", run=tmp_path)


def test_bounds_that_the_recipe_excludes_are_left_out(tmp_path: Path) -> None:
    recipe = recipe_of(rollouts={"max_age": 2})
    found = planner.plan(recipe, Source(tmp_path / "x.toml", ""), gpus=4, gpu="h100", prompt_tokens=20)
    assert [option.staleness for option in found.options] == [0]
    assert "rollouts.max_age" in found.notes[-1]


def test_only_the_configuration_is_read(tmp_path: Path) -> None:
    config = config_of("qwen3", hidden_size=8192, intermediate_size=29_568, **{**QWEN, "num_hidden_layers": 80})
    config.save_pretrained(tmp_path)
    result = run(
        "plan", "--gpus", 64, "--gpu", "h200", "--prompt-tokens", 300, "--set", f"model.path={tmp_path}", "--set",
        "model.dtype=bfloat16", "--set", "rollouts.sampler=vllm", "--set", "cluster.gpus_per_sampler=4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{shape_of(load_config(str(tmp_path))).parameters:,}" in result.stdout
