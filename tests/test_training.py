"""The whole path: a run learns, repeats bit for bit, resumes bit for bit, and leaves what it promises."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.algorithms import NAMED, named
from groupwise.config import Recipe
from groupwise.models import Chat, LanguageModel
from groupwise.rollouts.groups import Rollouts
from groupwise.tasks.arithmetic import score_answer
from groupwise.training.batching import make_batch, minibatches
from groupwise.training.collect import Collector, sampling_of
from groupwise.training.credit import CreditAssigner, last_token, reward_parts, step_positions
from groupwise.training.supply import is_selected
from groupwise.types import Completion, Group, LogprobBatch, Problem, Score, TrainingBatch, VersionSpan, upgrade
from tests.test_cli import run


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick") / "run"
    result = run("train", "quick", "--out", out)
    assert result.exit_code == 0, result.output
    assert "What it learned" in result.stdout
    return out


def test_quick_learns(quick: Path) -> None:
    rates = [row["eval/pass@1"] for row in metrics_of(quick) if "eval/pass@1" in row]
    lengths = [row["eval/length"] for row in metrics_of(quick) if "eval/length" in row]
    assert rates[-1] > rates[0] + 0.25
    assert lengths[-1] > lengths[0] + 2


def test_sampler_and_learner_agree(quick: Path) -> None:
    assert all(row["sampler_gap_max"] <= 1e-4 for row in metrics_of(quick) if "sampler_gap_max" in row)


def test_run_directory(quick: Path) -> None:
    steps = [row["step"] for row in metrics_of(quick) if "loss" in row]
    assert steps == list(range(1, 17))
    assert 'name = "dapo"' in (quick / "recipe.toml").read_text()
    assert "minibatches = 4" in (quick / "recipe.toml").read_text()
    assert "--- best: reward 1" in (quick / "rollouts" / "step-000001.txt").read_text()
    row = next(row for row in metrics_of(quick) if "loss" in row)
    for key in ("clip_fraction", "entropy", "groups/all_wrong", "rollouts/rounds", "length/mean", "grad_norm", "utilisation"):
        assert key in row


def test_saved_model_loads_and_answers(quick: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quick / "model")
    tokenizer = AutoTokenizer.from_pretrained(quick / "model")
    inputs = tokenizer("4+3=", return_tensors="pt")
    said = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(said[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).split("\n")[-1] == "7"


def test_eval_of_a_run_and_of_a_model(quick: Path) -> None:
    trained = run("eval", quick, "--samples", "4", "--set", "training.eval_problems=50")
    base = run("eval", "arithmetic-base", "quick", "--set", "training.eval_problems=50")
    assert trained.exit_code == base.exit_code == 0, trained.output + base.output
    assert "pass@4" in trained.stdout and "avg@4" in trained.stdout

    def rate(text: str) -> float:
        return float(next(line for line in text.splitlines() if "pass@1" in line).replace("│", " ").split()[-1])

    assert rate(trained.stdout) > rate(base.stdout)


SHORT = ["--set", "training.steps=4", "--set", "training.checkpoint_every=2", "--set", "training.eval_problems=20"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--set", "algorithm.name=grpo", "--set", "learner.warmup_steps=3"],
        ["--set", "algorithm.name=dcpo", "--set", "task.problems=24"],
        ["--set", "rollouts.max_age=2", "--set", "learner.old_logprobs=sampler", "--set", "rollouts.top_p=0.8"],
        ["--set", "algorithm.name=ppo", "--set", "algorithm.kl_target=1e-3"],
        ["--set", "algorithm.allocation=thompson", "--set", "algorithm.candidates=2", "--set", "task.problems=40"],
        [
            "--set",
            "algorithm.name=gdpo",
            "--set",
            "task.steps_weight=0.5",
            "--set",
            "algorithm.allocation=hit_utility",
            "--set",
            "task.problems=24",
        ],
    ],
)
def test_same_seed_same_bits_also_across_a_resume(tmp_path: Path, extra: list[str]) -> None:
    for name in ("one", "two"):
        assert run("train", "quick", "--out", tmp_path / name, *SHORT, *extra).exit_code == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)

    # As if the second run had been killed after its first checkpoint and in the middle of writing.
    cut = tmp_path / "two"
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "model")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = run("train", "--resume", cut)
    assert resumed.exit_code == 0, resumed.output
    assert all(torch.equal(value, weights(cut)[key]) for key, value in one.items())
    drop = ("seconds/rollouts", "seconds/learner", "seconds/logprobs", "seconds/scoring", "tokens_per_second", "memory/peak_mib")
    for row, again in zip(metrics_of(tmp_path / "one"), metrics_of(cut), strict=True):
        assert {key: value for key, value in row.items() if key not in drop} == {k: v for k, v in again.items() if k not in drop}

    other = run("train", "quick", "--out", tmp_path / "three", *SHORT, *extra, "--set", "seed=1")
    assert other.exit_code == 0
    assert not all(torch.equal(value, weights(tmp_path / "three")[key]) for key, value in one.items())


def test_resume_takes_changed_settings_and_finished_runs(quick: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(quick, out)
    again = run("train", "--resume", out)
    assert again.exit_code == 0, again.output
    assert metrics_of(out) == metrics_of(quick)
    longer = run("train", "--resume", out, "--set", "training.steps=17", "--set", "learner.learning_rate=1e-9")
    assert longer.exit_code == 0, longer.output
    last = next(row for row in metrics_of(out) if row["step"] == 17 and "loss" in row)
    assert last["learning_rate"] == 1e-9
    assert "steps = 17" in (out / "recipe.toml").read_text()
    other = run("train", "--resume", out, "--set", "algorithm.name=ppo")
    assert other.exit_code == 2
    assert "a run goes on with the algorithm it began with" in other.stderr


def test_a_dataset_run_resumes_and_is_evaluated_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the recipe when it is written, and absolute in the run's directory."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": {i + 1}}}\n' for i in range(9)))
    (project / "mine.py").write_text(
        "def reward(problem, completions):\n    return [float(text.endswith(problem.answer)) for text in completions]\n"
        "def loss(terms):\n    return -terms.log_ratio_BT.exp() * terms.advantages_BT, terms.log_ratio_BT > 9\n"
    )
    (project / "r.toml").write_text(
        "[task]\nname = 'dataset'\npath = 'data.jsonl'\nreward = 'mine.py:reward'\n"
        "[algorithm]\nname = 'grpo'\nsurrogate = 'mine.py:loss'\nbeta = 0.0\n"
        "[rollouts]\nprompts_per_step = 4\n[learner]\nold_logprobs = 'sampler'\n"
        "[training]\nsteps = 2\ncheckpoint_every = 1\neval_problems = 4\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run("train", "../project/r.toml", "--out", "out").exit_code == 0
    longer = run("train", "--resume", "out", "--set", "training.steps=3")
    assert longer.exit_code == 0, longer.output
    assert run("eval", "out").exit_code == 0


def test_steps_in_which_everything_is_filtered_are_passed_over(tmp_path: Path) -> None:
    small = ["training.steps=2", "training.eval_problems=4", "rollouts.prompts_per_step=4", "rollouts.max_tokens=1"]
    sets = [part for item in [*small, "algorithm.overlong_filter=true"] for part in ("--set", item)]
    result = run("train", "grpo", "--out", tmp_path / "run", *sets)
    assert result.exit_code == 0, result.output
    assert "no completion can be learnt from" in result.stdout


def test_weights_that_diverge_stop_the_run_with_a_message(tmp_path: Path) -> None:
    sets = ["learner.learning_rate=1e30", "training.eval_problems=4"]
    result = run("train", "quick", "--out", tmp_path / "run", *(part for item in sets for part in ("--set", item)))
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert "a lower learning rate" in result.stderr.lower()


@pytest.mark.parametrize("extra", [[], ["--set", "rollouts.cache_dtype=bfloat16"]], ids=["float32", "bfloat16 keys"])
def test_a_sampler_of_another_distribution_stops_a_run_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    """Logits a tenth too large, as a wrong step of generation might give; with keys in 16 bits a gap is to be expected."""
    right = LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda *arguments: 1.1 * right(*arguments))
    sets = ["--set", "training.eval_problems=4", "--set", "training.steps=1", *extra]
    result = run("train", "quick", "--out", tmp_path / "run", *sets)
    assert result.exit_code == (0 if extra else 1), result.output
    assert extra or "though both run in float32 on the same weights" in " ".join(result.stderr.split())


def test_dynamic_sampling_gives_up_with_a_report(tmp_path: Path) -> None:
    """Answers that cannot be said: every group is all wrong."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "two"}}\n' for i in range(4)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[task]\nname = 'dataset'\npath = 'data.jsonl'\n"
        "[rollouts]\nprompts_per_step = 2\nmax_rounds = 3\n[learner]\nminibatches = 2\n"
    )
    result = run("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "0 groups to train on after 3 rounds" in result.stderr
    assert "and 18 prompts: 18 all wrong" in result.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-000000/manifest.json"))


METHODS = ["opsm", "band", "mopps", "hora", "grpo-top-p", "grpo-epochs"]
"""Recipes of parts that no named algorithm has."""


@pytest.mark.parametrize("name", [*NAMED, *METHODS, "default"])
def test_every_shipped_recipe_runs_two_steps(tmp_path: Path, name: str) -> None:
    small = ["training.steps=2", "training.eval_problems=10", "rollouts.prompts_per_step=4", "rollouts.group_size=8"]
    result = run("train", name, "--out", tmp_path / "run", *(part for item in small for part in ("--set", item)))
    assert result.exit_code == 0, result.output
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)
    numbers = [value for row in rows for values in row.values() for value in (values if isinstance(values, list) else [values])]
    nothing_to_average = [key for row in rows for key, value in row.items() if value is None]
    assert set(nothing_to_average) <= {"clip/high_probability", "length/finished"}
    assert all(math.isfinite(value) for value in numbers if value is not None)


def test_surplus_groups_wait_for_the_next_batch_and_no_longer(tmp_path: Path) -> None:
    """The keep-rate starts at what the last step saw, so rounds overshoot; what is left over is used, or gets too old."""
    out = tmp_path / "run"
    sets = ["rollouts.max_age=1", "training.steps=6", "training.eval_problems=4", "rollouts.prompts_per_step=6"]
    assert run("train", "quick", "--out", out, *(part for item in sets for part in ("--set", item))).exit_code == 0
    rows = [row for row in metrics_of(out) if "loss" in row]
    assert rows[0]["groups/reused"] == 0
    assert sum(row["groups/reused"] for row in rows) > 0
    assert all(row["groups/kept"] == 6 for row in rows)


def test_dcpo_remembers_prompts_and_uses_groups_that_agree(tmp_path: Path) -> None:
    """On a pool that is revisited, uniform groups get advantages from the second visit on, and not before."""
    out = tmp_path / "run"
    pool = ["algorithm.name=dcpo", "task.problems=16", "training.steps=3", "training.eval_problems=10"]
    assert run("train", "quick", "--out", out, *(part for item in pool for part in ("--set", item))).exit_code == 0
    first, second, _ = (row for row in metrics_of(out) if "loss" in row)
    assert first["groups/zero_variance"] > 0
    assert first["utilisation"] == pytest.approx(1 - first["groups/zero_variance"])
    assert second["utilisation"] > 1 - second["groups/zero_variance"]


def make_group(rewards: list[float], lengths: list[int], truncated: list[bool], prompt: str = "1+1=") -> Group:
    return Group(
        problem=Problem(id=prompt, prompt=prompt, answer="2"),
        prompt_tokens=torch.tensor([3, 4]),
        completions=tuple(
            Completion(
                text="2",
                tokens=torch.full((length,), 5),
                logprobs=torch.full((length,), -1.0),
                mask=torch.ones(length, dtype=torch.bool),
                stop="length" if cut else "stop",
                versions=(VersionSpan(0, length, 0),),
            )
            for length, cut in zip(lengths, truncated, strict=True)
        ),
        scores=tuple(Score(reward=r, correct=r > 0, verdict="correct" if r > 0 else "wrong") for r in rewards),
    )


def test_overlong_filter_takes_truncated_completions_out_of_the_loss_and_the_baseline() -> None:
    group = make_group([1, 0, 0, 1], [2, 3, 4, 4], [False, False, True, True])
    for in_baseline, expected in [(False, [0.7071068, -0.7071068, 0, 0]), (True, [0.8660254, -0.8660254, 0, 0])]:
        algorithm = named("grpo", beta=0.0, overlong_filter=True, overlong_in_baseline=in_baseline, advantage_eps=0.0)
        batch = make_batch([group], algorithm)
        assert batch.mask_BT.sum(1).tolist() == [2, 3, 0, 0]
        batch = assigned([group], algorithm, with_logprobs(batch), max_tokens=4)
        torch.testing.assert_close(batch.advantages_BT[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_shaped_rewards_by_hand() -> None:
    """DAPO prices verdicts at 1 and -1 and takes off up to 1 over the last fifth of 20 tokens: 16, 18 and 20."""
    group = make_group([1, 0, 1, 1], [5, 16, 18, 20], [False] * 4)

    def shaped(name: str) -> list[float]:
        total: torch.Tensor = sum(reward_parts([group], named(name), 20).values())
        return total.tolist()

    assert shaped("dapo") == [1.0, -1.0, 0.5, 0.0]
    assert shaped("grpo") == [1.0, 0.0, 1.0, 1.0]


def test_minibatches_are_whole_groups_each_once_and_shuffled() -> None:
    groups = [make_group([1, 0], [2, 3], [False, False], prompt=f"{i}+1=") for i in range(6)]
    batch = make_batch(groups, named("grpo"))
    batch = assigned(groups, named("grpo"), with_logprobs(batch))
    for count, sizes in [(4, [2, 4, 2, 4]), (6, [2] * 6), (100, [2] * 6), (1, [12])]:
        parts = list(minibatches(batch, count, seed=0))
        assert sorted(len(part) for part in parts) == sorted(sizes)
        assert all(len(part.prompts) * 2 == len(part) for part in parts)


def spoken(text: str, tokenizer: Any, task_score: Score, ended: bool = True) -> Group:
    ids = tokenizer(text).input_ids + ([tokenizer.eos_token_id] if ended else [])
    completion = Completion(
        text=text,
        tokens=torch.tensor(ids),
        logprobs=torch.zeros(len(ids)),
        mask=torch.ones(len(ids), dtype=torch.bool),
        stop="stop" if ended else "length",
        versions=(VersionSpan(0, len(ids), 0),),
    )
    problem = Problem(id="7+3*4-5", prompt="7+3*4-5=", answer="14")
    return Group(problem=problem, prompt_tokens=torch.tensor([3]), completions=(completion,), scores=(task_score,))


def test_steps_end_at_their_tokens(tokenizer: Any) -> None:
    """Line ends at characters 7, 12, 15, so at tokens 6, 11, 14; the last step owns the end token, 15."""
    problem = Problem(id="7+3*4-5", prompt="7+3*4-5=", answer="14")
    for text, ended, expected in [
        ("\n7+12-5\n19-5\n14", True, ([1, 1, 1], [6, 11, 15])),
        ("\n7+12-5\n18-5\n1", False, ([1, 0, 0], [6, 11, 13])),
        ("14", True, ([1], [2])),
        ("", True, ([0], [0])),
    ]:
        group = spoken(text, tokenizer, score_answer(problem, text), ended)
        assert step_positions([group], tokenizer) == [expected]


def test_steps_end_at_their_tokens_where_a_token_is_less_than_a_character() -> None:
    """Byte-level tokens: "é" is two of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={mark: i for i, mark in enumerate([*alphabet, "<end>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    byte_level = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    group = spoken("éa b", byte_level, Score(reward=1, correct=True, steps=((1, 0.5), (4, 1.0))))
    assert len(group.completions[0].tokens) == 6
    assert step_positions([group], byte_level) == [([0.5, 1.0], [1, 5])]


def with_logprobs(batch: Any, **changes: Any) -> LogprobBatch:
    """A batch whose policy, reference and critic are the same everywhere, but for the changes."""
    shape = batch.tokens_BT.shape
    zeros = {name: torch.zeros(shape) for name in ("old_logprobs_BT", "ref_logprobs_BT", "values_BT")}
    return upgrade(LogprobBatch, batch, **{**zeros, **changes})


def assigned(groups: list[Group], algorithm: Any, batch: LogprobBatch, max_tokens: int = 8) -> TrainingBatch:
    rewards = reward_parts(groups, algorithm, max_tokens)
    return CreditAssigner(algorithm, None, max_tokens).assign(batch, groups, rewards, policy_moved=True)[0]


def test_kl_is_subtracted_from_the_reward() -> None:
    """Two tokens of log ratio 0.5 each at coefficient 0.1: 0.1 off a completion's reward, 0.05 off each token's."""
    group = make_group([1, 0], [2, 2], [False, False])
    batch = make_batch([group], named("dr_grpo"))
    shift = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    batch = with_logprobs(batch, old_logprobs_BT=-1 + shift, ref_logprobs_BT=-torch.ones(2, 2))
    credited = assigned([group], named("dr_grpo", kl_reward=0.1), batch)
    torch.testing.assert_close(credited.advantages_BT[:, 0], torch.tensor([0.45, -0.45]))
    returns_BT = assigned([group], named("ppo", gae_lambda=1.0, kl_reward=0.1), batch).returns_BT
    torch.testing.assert_close(returns_BT, torch.tensor([[0.9, 0.95], [0.0, 0.0]]))


def test_reinforce_pp_charges_each_token_for_its_own_kl_and_those_after_it() -> None:
    """Rewards to go 0.9, 0.95 and 0, 0: mean 0.4625, deviation (Bessel) 0.53443, so 0.8186, 0.9122, -0.8654, -0.8654."""
    group = make_group([1, 0], [2, 2], [False, False])
    shift = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    batch = make_batch([group], named("reinforce_pp"))
    batch = with_logprobs(batch, old_logprobs_BT=-1 + shift, ref_logprobs_BT=-torch.ones(2, 2))
    found = assigned([group], named("reinforce_pp", kl_reward=0.1), batch).advantages_BT
    torch.testing.assert_close(found, torch.tensor([[0.8186, 0.9122], [-0.8654, -0.8654]]), rtol=0, atol=2e-4)


def test_the_kl_coefficient_waits_for_the_first_update() -> None:
    """Before it the policy is the reference, so a KL of 0 says nothing about the coefficient."""
    group = make_group([1, 0], [2, 2], [False, False])
    algorithm = named("ppo", kl_reward=0.1, kl_target=0.01)
    batch = with_logprobs(make_batch([group], algorithm))
    rewards = reward_parts([group], algorithm, 8)
    assigner = CreditAssigner(algorithm, None, 8)
    assert assigner.assign(batch, [group], rewards, policy_moved=False)[1]["kl_reward/coefficient"] == 0.1
    assert assigner.assign(batch, [group], rewards, policy_moved=True)[1]["kl_reward/coefficient"] == 0.05


@pytest.mark.parametrize("in_baseline", [False, True])
def test_a_group_that_is_selected_only_through_a_truncated_answer_does_not_fill_the_batch(in_baseline: bool) -> None:
    filtered = named("dapo", overlong_filter=True, overlong_in_baseline=in_baseline)
    only_truncated_wrong = make_group([1, 1, 0], [2, 3, 8], [False, False, True])
    assert is_selected(only_truncated_wrong, named("dapo"))
    assert is_selected(only_truncated_wrong, filtered) == in_baseline  # in the baseline it gives the others an advantage
    assert not is_selected(make_group([1, 0], [8, 8], [True, True]), filtered)


def collector_of(script: Any, tokenizer: Any, recipe: Recipe, algorithm: Any) -> Collector:
    rollouts = Rollouts(sampler=script, task=script, chat=Chat.build(tokenizer), sampling=sampling_of(recipe.rollouts))
    return Collector(rollouts, recipe, algorithm)


class Script:
    """A task, and a sampler, for a `Collector`: the outcomes of each group in turn."""

    def __init__(self, outcomes: list[list[float]]) -> None:
        self.outcomes = iter(outcomes)

    def problem(self, position: int, seed: int) -> Problem:
        return Problem(id=f"p{position % 3}", prompt="1+1=", answer="2")

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        return [Score(reward=r, correct=r > 0) for r in next(self.outcomes)]

    async def generate(self, request: Any) -> tuple[Completion, ...]:
        return make_group([0.0] * request.n, [2] * request.n, [False] * request.n).completions


def test_every_group_is_remembered_once_whether_it_waits_for_a_later_batch_or_not(tokenizer: Any) -> None:
    """Mixed groups beyond the batch are trained on later, and counted then; what is never trained on is counted at once."""
    mixed, same = [1.0, 0.0], [1.0, 1.0]
    script = Script([mixed, mixed, mixed, same, mixed, mixed])
    algorithm = named("dcpo", dynamic_sampling=True)
    settings = {"group_size": 2, "prompts_per_step": 2, "max_age": 5, "max_tokens": 8}
    recipe = Recipe.model_validate({"rollouts": settings, "learner": {"minibatches": 1}})
    collector = collector_of(script, tokenizer, recipe, algorithm)
    collector.keep_rate = 0.5  # so that the first round asks for four groups
    first, second = collector.collect(0), collector.collect(1)
    counted = [id(g) for c in (first, second) for g in (*c.groups, *c.never_trained)]
    waiting = [id(group) for _, group in collector.surplus]
    assert second.reused == 1
    assert len(counted) == len(set(counted)), "no group is counted twice"
    assert sorted(counted + waiting) == sorted(id(g) for c in (first, second) for g in c.seen), "and none is forgotten"


def test_last_token_of_ragged_rows_with_holes() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert last_token(mask).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
