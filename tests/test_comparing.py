"""Differences between settings: the formulas against second ones, hand numbers, error rates by simulation, and what is said."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.evidence.comparing import compare, contrasts
from groupwise.evidence.document import document
from groupwise.evidence.naming import grouped
from groupwise.evidence.runs import open_run
from groupwise.evidence.statistics import Difference, detectable, difference, holm, seeds_needed
from groupwise.evidence.student import critical, power, shift_needed, two_sided
from groupwise.evidence.verdicts import as_text, comparisons
from groupwise.experiments.ladder import Ladder, Rung, as_markdown, cells, plan
from groupwise.experiments.ladder import compare as ladder_rows
from tests.pages import chromium, needs_browser, opened

NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def integral(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    half = (high - low) / 2
    return float(half * np.sum(WEIGHTS * function(low + half * (NODES + 1))))


def two_sided_by_density(t: float, freedom: float) -> float:
    """Twice the upper tail of the density, with t = tan(angle) to reach infinity."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    scale = math.sqrt(freedom)
    return 2 * integral(lambda a: constant * scale * np.cos(a) ** (freedom - 1), math.atan(t / scale), math.pi / 2)


def power_by_series(shift: float, freedom: float, bound: float) -> float:
    """P(|T| > bound) by Lenth's series of incomplete beta functions (Algorithm AS 243), these by quadrature."""

    def incomplete_beta(a: float, b: float, x: float) -> float:
        front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
        top = math.asin(math.sqrt(x))  # x = sin² angle takes the poles away
        return front * integral(lambda s: 2 * np.sin(s) ** (2 * a - 1) * np.cos(s) ** (2 * b - 1), 0.0, top)

    def below(t: float, shift: float) -> float:
        x, half = t * t / (freedom + t * t), shift * shift / 2
        total = statistics.NormalDist().cdf(-shift)
        for j in range(200):
            p = math.exp(-half + j * math.log(half) - math.lgamma(j + 1))
            q = shift / math.sqrt(2) * math.exp(-half + j * math.log(half) - math.lgamma(j + 1.5))
            total += 0.5 * (p * incomplete_beta(j + 0.5, freedom / 2, x) + q * incomplete_beta(j + 1, freedom / 2, x))
        return total

    return 2 - below(bound, shift) - below(bound, -shift)  # P(T < -bound) is P(T > bound) with the opposite shift


@pytest.mark.parametrize("freedom", [1, 2, 2.94, 4, 9, 30.5, 200])
def test_t_distribution_against_its_density(freedom: float) -> None:
    for t in (0.0, 0.01, 0.7, 2.0, 4.303, 30.0):
        assert two_sided(t, freedom) == pytest.approx(two_sided_by_density(t, freedom), rel=1e-9, abs=1e-14)
    for level in (0.3, 0.05, 0.001):
        assert two_sided(critical(level, freedom), freedom) == pytest.approx(level, rel=1e-10)


@pytest.mark.parametrize("freedom", [2, 2.94, 4, 9, 30.5])
def test_power_against_a_series(freedom: float) -> None:
    for level in (0.05, 0.05 / 7):
        bound = critical(level, freedom)
        for shift in (0.5, 2.0, 3.5, 6.0):
            assert power(shift, freedom, bound) == pytest.approx(power_by_series(shift, freedom, bound), abs=2e-6)
        assert power(0.0, freedom, bound) == pytest.approx(level, abs=2e-6)
        assert power(shift_needed(freedom, bound, 0.8), freedom, bound) == pytest.approx(0.8, abs=1e-5)


def test_quantiles_of_tables() -> None:
    shown = {(0.05, 2): 4.303, (0.05, 4): 2.776, (0.05, 10): 2.228, (0.01, 4): 4.604, (0.05, 30): 2.042}
    assert {key: round(critical(*key), 3) for key in shown} == shown


def test_seeds_needed_as_tables_of_power_have_them() -> None:
    """Cohen's tables and G*Power, 80 % at 5 %: pairs with an effect of 0.5, 0.8, 1.0, 1.5 standard deviations."""
    for effect, pairs in {0.2: None, 0.5: 34, 0.8: 15, 1.0: 10, 1.5: 6}.items():
        assert seeds_needed(Difference(mean=effect, spreads=(1.0,), counts=(3,)), 0.05, 100) == pairs
    ten = Difference(mean=0.1, spreads=(1.0,), counts=(10,))
    assert detectable(ten, 0.05) == pytest.approx(1.0, abs=0.02)  # the other way round: ten pairs show an effect of 1


def test_differences_by_hand() -> None:
    """Pairs: changes 1, 2, 3, mean 2, standard error 1 / √3. Separate: variances 1 and 4, standard error √(1/3 + 4/3); 2 degrees
    of freedom for the test, Welch's own are (5/3)² / ((1/9 + 16/9) / 2) = 2.94."""
    pairs = difference({0: 5.0, 1: 7.0, 2: 1.0, 9: 4.0}, {0: 6.0, 1: 9.0, 2: 4.0, 8: 0.0})
    assert pairs is not None and pairs.paired and pairs.counts == (3,)
    assert (pairs.mean, pairs.error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert pairs.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    separate = difference({0: 1.0, 1: 2.0, 2: 3.0}, {3: 2.0, 4: 4.0, 5: 6.0, 6: math.nan})
    assert separate is not None and not separate.paired and separate.counts == (3, 3)
    assert (separate.mean, separate.error, separate.freedom) == pytest.approx((2.0, math.sqrt(5 / 3), 2))
    assert separate.shape == pytest.approx((5 / 3) ** 2 / ((1 / 9 + 16 / 9) / 2))
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 3.0, 2: 4.0}) is None
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])  # 4 x 0.01, 3 x 0.03, then not below that


def test_few_shared_seeds_do_not_throw_the_others_away() -> None:
    ten, three_of_them = {seed: seed % 3 for seed in range(10)}, {seed: seed % 4 for seed in range(7, 17)}
    found = difference(ten, three_of_them)
    assert found is not None and found.counts == (10, 10), "3 of 10 seeds are shared"
    most = difference(ten, {seed: seed % 4 for seed in range(4, 14)})
    assert most is not None and most.paired and most.counts == (6,)


def test_costs_that_are_equal_by_chance_are_no_certainty(tmp_path: Path) -> None:
    """All seeds rise alike; of 20 problems one less is reached 1 / 20 of the way earlier: less than that is not known."""
    runs = []
    for algorithm, size in (("grpo", 64.0), ("dapo", 65.0)):
        for seed in range(3):
            path = tmp_path / f"{algorithm}{seed}"
            path.mkdir()
            (path / "recipe.toml").write_text(f'seed = {seed}\n[algorithm]\nname = "{algorithm}"\n[training]\nsteps = 10\n')
            scores = [{"step": step, "eval/pass@1": step / 10, "eval_problems": 20.0} for step in (0, 10)]
            steps = [{"step": step, "reward/mean": 0.5, "rollouts/completions": size} for step in range(1, 11)]
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*scores, *steps]))
            runs.append(open_run(path))
    found = {item.outcomes.measure: item for item in compare(contrasts(grouped(runs)))}
    cost = found["completions"]
    assert cost.verdict == "open" and cost.found is not None and cost.found.spreads == pytest.approx((math.log(0.9 / 0.85),))


def test_seeds_that_are_equal_or_differ_by_one_problem_are_no_certainty() -> None:
    equal = difference({0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.75, 1: 0.75, 2: 0.75}, least=0.25)
    assert equal is not None and equal.p > 0.2
    nothing = difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert nothing is not None and nothing.p == 1.0 and detectable(nothing, 0.05) == 0.0
    huge = difference({seed: seed * 1e299 for seed in range(3)}, {seed: -seed * 2e299 for seed in range(3)})
    assert huge is not None and 0 < huge.p < 1


TRIALS = 2000


def share_below(level: float, draw: Callable[[random.Random], tuple[list[float], list[float], bool]]) -> float:
    """How often the p-value of two settings' values is below a level; `draw` also says whether they share seeds."""
    rng, below = random.Random(0), 0
    for _ in range(TRIALS):
        first, second, shared = draw(rng)
        found = difference(dict(enumerate(first)), dict(enumerate(second, 0 if shared else 1000)))
        assert found is not None
        below += found.p < level
    return below / TRIALS


@pytest.mark.parametrize(
    ("first", "second", "ratio", "shared"),
    [(3, 3, 1, True), (5, 5, 5, True), (3, 3, 5, False), (3, 10, 0.5, False), (5, 8, 1, False)],
)
def test_equal_settings_are_called_different_in_at_most_one_of_twenty(
    first: int, second: int, ratio: float, shared: bool
) -> None:
    def draw(rng: random.Random) -> tuple[list[float], list[float], bool]:
        own = [rng.gauss(0, 1) for _ in range(max(first, second))]  # what a seed's problems do to both
        one = [shared * own[i] + rng.gauss(0, 1) for i in range(first)]
        return one, [shared * own[i] + rng.gauss(0, ratio) for i in range(second)], shared

    assert share_below(0.05, draw) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / TRIALS)


@pytest.mark.parametrize(("effect", "shared", "level"), [(1.0, True, 0.05), (1.5, True, 0.05 / 5), (1.2, False, 0.05)])
def test_the_stated_number_of_seeds_shows_the_difference_in_four_of_five(effect: float, shared: bool, level: float) -> None:
    pilot = Difference(mean=effect, spreads=(1.0,) if shared else (0.6, 1.4), counts=(3,) if shared else (3, 3))
    needed = seeds_needed(pilot, level, 100)
    assert needed is not None

    def draw(rng: random.Random) -> tuple[list[float], list[float], bool]:
        if shared:
            return [0.0] * needed, [rng.gauss(effect, 1) for _ in range(needed)], True
        return [rng.gauss(0, 0.6) for _ in range(needed)], [rng.gauss(effect, 1.4) for _ in range(needed)], False

    assert 0.77 < share_below(level, draw) < 0.87


# Runs as files.


def write_run(path: Path, name: str, seed: int, score: float, **options: float) -> Path:
    """A run of twenty `steps`, evaluated every five, whose score rises to a value; `done` steps of it, `per_step` completions."""
    done, problems, per_step = int(options.get("done", 20)), int(options.get("problems", 500)), options.get("per_step", 256.0)
    path.mkdir(parents=True)
    task = "[task]\nname = 'arithmetic'\ngrades = [1]\n" if options.get("easy") else ""
    steps = int(options.get("steps", 20))
    recipe = f"seed = {seed}\n[algorithm]\nname = '{name}'\n[training]\nsteps = {steps}\n{task}"
    (path / "recipe.toml").write_text(recipe)
    lines = []
    for step in range(done + 1):
        if step:
            lines.append({"step": step, "reward/mean": 0.5, "rollouts/completions": per_step, "seconds/rollouts": per_step / 100})
        if step % 5 == 0:
            value = score - (score - 0.3) * math.exp(-step / 5)
            lines.append({"step": step, "eval/pass@1": round(value * problems) / problems, "eval_problems": problems})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def setting(home: Path, name: str, scores: list[float], first_seed: int = 0, **options: float) -> list[Path]:
    return [write_run(home / f"{name}-{seed}", name, seed, score, **options) for seed, score in enumerate(scores, first_seed)]


def said(paths: list[Path]) -> list[str]:
    return [line.plain.replace("\u00a0", " ") for line in as_text(grouped(map(open_run, paths)))]


CLEAR = [0.90, 0.91, 0.92, 0.91]


def test_report_says_which_is_better_and_what_would_decide_the_rest(tmp_path: Path) -> None:
    grpo = setting(tmp_path, "grpo", [0.80, 0.81, 0.82, 0.80])
    dapo = setting(tmp_path, "dapo", CLEAR, per_step=512)
    gspo = setting(tmp_path, "gspo", [0.80, 0.84, 0.80, 0.83])
    result = CliRunner().invoke(app, ["report", *map(str, [*grpo, *dapo, *gspo]), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    output = result.output.replace("\u00a0", " ")
    assert "better  dapo against grpo: Held-out pass@1 89.9% against 79.8%, a difference of +10.1 points" in output
    assert "worse  dapo against grpo" in output  # twice the completions in each step: more until the score was reached
    assert "open  gspo against grpo" in output and "worse  gspo against dapo" in output
    assert "of each setting instead of 4 would show it with a probability of 80%" in output
    shapes = comparisons(grouped(map(open_run, [*grpo, *dapo, *gspo])))
    assert [item["measure"] for item in shapes[:3]] == ["score", "completions", "seconds"]
    ends = [shapes[0]["low"], shapes[0]["middle"], shapes[0]["high"]]
    assert [round(100 * end, 1) for end in ends if end is not None] == [9.3, 10.1, 10.9]
    assert "种子间的波动不足以解释" in shapes[0]["text"]["zh"]
    assert document([open_run(path) for path in [*grpo, *dapo, *gspo]])["comparisons"] == shapes


def test_too_few_seeds_are_said_instead_of_compared(tmp_path: Path) -> None:
    one = setting(tmp_path / "one", "grpo", [0.80]) + setting(tmp_path / "one", "dapo", [0.95])
    assert "one seed each. That is more than the noise of two evaluations of 500 problems explains" in said(one)[0]
    near = setting(tmp_path / "near", "grpo", [0.80]) + setting(tmp_path / "near", "dapo", [0.81])
    assert "The noise of two evaluations of 500 problems alone could explain that" in said(near)[0]
    two = setting(tmp_path / "two", "grpo", [0.80, 0.81]) + setting(tmp_path / "two", "dapo", [0.95, 0.95, 0.94])
    assert said(two)[0].startswith("unknown") and "from 3 and 2 seeds: too few" in said(two)[0]
    again = setting(tmp_path / "first", "grpo", [0.8] * 3) + setting(tmp_path / "second", "grpo", [0.8] * 3)
    again = [*again, *setting(tmp_path / "third", "dapo", [0.95, 0.95])]
    assert "from 2 and 3 seeds" in said(again)[0] and "count as one seed" in said(again)[0]
    begun = setting(tmp_path / "begun", "grpo", [0.8] * 3, done=3) + setting(tmp_path / "begun", "dapo", CLEAR, done=3)
    assert said(begun) == ["unknown  dapo against grpo: There is no evaluation of both after a training step."]
    many = [path for name in ("grpo", "dapo", "gspo", "dcpo") for path in setting(tmp_path / "many", name, [0.8])]
    assert said(many) == [
        "unknown  3 pairs of settings have too few seeds to be compared: at least 3 of each setting are needed."
    ]


def test_runs_that_have_not_finished_are_compared_where_all_are(tmp_path: Path) -> None:
    paths = setting(tmp_path, "grpo", [0.80, 0.81, 0.82]) + setting(tmp_path, "dapo", CLEAR, done=12)
    paths += setting(tmp_path, "dapo", [0.9], first_seed=7, done=2)
    line = said(paths)[0]
    assert "Compared at step 10" in line and "Runs without an evaluation after a training step are not counted: 1." in line


def test_other_problems_and_equal_settings_are_said(tmp_path: Path) -> None:
    easy = setting(tmp_path / "easy", "grpo", CLEAR) + setting(tmp_path / "easier", "grpo", CLEAR, easy=1)
    line = said(easy)[0]
    assert "With every seed the two are equal" in line or "probability" in line
    assert "The settings differ in task.grades" in line
    short = setting(tmp_path / "short", "dapo", CLEAR, done=15, steps=15)
    assert "After 15 training steps against 20." in said([*easy[:4], *short])[0]


def test_a_ladder_is_compared_as_ablate_does(tmp_path: Path) -> None:
    names = ["grpo", "gspo", "dcpo", "dapo"]
    for place, name in enumerate(names, 1):
        for seed in range(3):
            write_run(tmp_path / f"{place}-{name}" / f"seed-{seed}", name, seed, 0.8 + 0.01 * place + 0.001 * seed)
    paths = sorted(tmp_path.glob("*/seed-*"))
    (tmp_path / "plan.json").write_text("{}")
    rungs = "rungs = [" + ", ".join(f'{{ name = "{name}" }}' for name in names) + "]\n"
    for text, against in (("", ["grpo", "grpo", "grpo"]), ("cumulative = true", names[:3])):
        (tmp_path / "ladder.toml").write_text(rungs + text)
        pairs = contrasts(grouped(open_run(path) for path in reversed(paths)))
        assert [(first.name, second.name) for first, second in pairs] == list(zip(against, names[1:], strict=True))
        assert len(compare(pairs)) >= 3
    (tmp_path / "ladder.toml").write_text("cumulative = ")  # damaged: the runs can be compared all the same
    assert len(contrasts(grouped(open_run(path) for path in paths))) == 3


def test_a_ladder_stars_what_seeds_do_not_explain(tmp_path: Path) -> None:
    rungs = [Rung(name=name) for name in ("GRPO", "far", "near", "not run")]
    ladder = Ladder(title="Four rungs", rungs=rungs)
    jobs = plan(ladder, tmp_path, seeds=4)
    scores = {0: [0.80, 0.81, 0.82, 0.80], 1: CLEAR, 2: [0.80, 0.84, 0.80, 0.83]}
    for job in jobs:
        if job.rung in scores:
            write_run(job.path, f"rung{job.rung}", job.seed, scores[job.rung][job.seed])
            (job.path / "model").mkdir()
    rows = ladder_rows(ladder, jobs)
    assert [cells(row)[3] for row in rows] == ["", "+0.101 ± 0.008 *", "+0.010 ± 0.039", ""]
    assert [row.score.count for row in rows] == [4, 4, 4, 0]
    written = as_markdown(ladder, rows)
    assert (
        "- near against GRPO: Held-out pass@1 80.8% against 79.8%" in written and "seeds of each setting instead of 4" in written
    )


def test_absurd_numbers_of_a_damaged_file_are_compared_like_others(tmp_path: Path) -> None:
    paths = setting(tmp_path, "grpo", [0.8, 0.8, 0.8]) + setting(tmp_path, "dapo", [0.9, 0.9, 0.9])
    for value, problems in ((1e299, -3), (-1e299, 0), (5e-324, 10**18), (7.0, 1)):
        for path in paths[1:5]:
            evaluations = [
                {"step": step, "eval/pass@1": value * (step == 20), "eval_problems": problems} for step in range(0, 21, 5)
            ]
            (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
        shapes = comparisons(grouped(map(open_run, paths)))
        assert shapes and json.dumps(shapes, allow_nan=False)


@needs_browser
def test_the_page_draws_each_interval_and_folds_what_is_not_known(tmp_path: Path) -> None:
    paths = setting(tmp_path, "grpo", [0.80, 0.81, 0.82, 0.80]) + setting(tmp_path, "dapo", CLEAR)
    paths += setting(tmp_path, "gspo", [0.80, 0.84, 0.80, 0.83])
    paths += [path for name in ("dcpo", "rloo", "ppo", "cispo") for path in setting(tmp_path, name, [0.8])]
    assert CliRunner().invoke(app, ["report", *map(str, paths), "--out", str(tmp_path / "page.html")]).exit_code == 0
    with chromium() as browser:
        page, wrong = opened(browser, tmp_path / "page.html", viewport={"width": 390, "height": 800}, locale="zh-CN")
        part = page.locator("#comparing")
        part.locator(".compared").first.wait_for()
        assert part.locator(".compared.better").count() >= 1 and part.locator("details .compared.unknown").count() == 4
        assert part.locator("details .compared.unknown").first.is_hidden()
        part.locator("summary").click()
        page.click("#language")  # another language, and what was opened stays open
        assert part.locator("details .compared.unknown").first.is_visible()
        assert "Differences between seeds do not explain that." in part.inner_text()
        better, still_open = (part.locator(f".compared.{verdict}").first for verdict in ("better", "open"))
        for row, excludes_zero in ((better, True), (still_open, False)):
            zero, whisker = (row.locator(f".{name}").bounding_box() for name in ("zero", "whisker"))
            assert (zero["x"] < whisker["x"] or zero["x"] > whisker["x"] + whisker["width"]) == excludes_zero
        assert wrong == []
