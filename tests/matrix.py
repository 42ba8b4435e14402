"""Every model of the zoo against its own forward pass, one unpadded row at a time: exact, refused with the reason, or broken.

    python -m tests.matrix                         all models, as a table
    python -m tests.matrix doge 'qwen*'            these
    python -m tests.matrix --ci --out matrix.md    those of `tests/test_zoo.py`; also written as Markdown

The exit status is 1 if any model is neither exact nor refused, or is not on the path that the zoo expects.
"""

import argparse
import copy
import fnmatch
import json
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.errors import UserError
from groupwise.models import LanguageModel
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Batch, Completion, pad_rows
from tests.zoo import VOCABULARY, ZOO, build, perturb, tokenizer

TOLERANCE = 1e-4
"""Of log-probabilities and entropies, in nats; of gradients relative to max(1, the largest element of the parameter's)."""
TEMPERATURE = 0.7
PATIENCE, IMPATIENCE = 20.0, 5.0
"""Seconds that one check of a model may take before it counts as hanging; and after another check of the model has hung."""
PROMPT_LENGTHS = (3, 11, 19)
ROW_LENGTHS = ((1, 24, 9), (13, 2), (17, 21))
"""Completion tokens of each prompt's rows."""
CUT = ((0, 3, 5), (1,), (2, 4, 6))
"""Rows of micro-batches, none of which has whole groups."""


@dataclass(slots=True)
class Outcome:
    """What was found of one model."""

    name: str
    training: str = "-"
    """"fast" (packed sequences), "general" (padded batches), or "-": not known."""
    generation: str = "-"
    logprobs: float | None = None
    """The largest error of a log-probability or an entropy of the learner."""
    gradients: float | None = None
    """The largest error of a gradient, relative to max(1, the largest element of the parameter's)."""
    sampler: float | None = None
    """The largest error of a log-probability of the sampler."""
    reload: str = "-"
    """Export and load: "same", "differs", or "-": could not be done."""
    command: str = "-"
    """Two steps by command line."""
    refusal: str = ""
    """Why it was refused."""
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """(what is wrong, in which check)."""
    crashes: list[tuple[str, str]] = field(default_factory=list)
    """(what was raised, in which check)."""
    seconds: float = 0.0

    @property
    def expected(self) -> str:
        return ZOO[self.name].expected

    @property
    def path(self) -> str:
        """The slower of the paths of training and generation, or "refused"."""
        if self.refusal:
            return "refused"
        return "fast" if {self.training, self.generation} == {"fast"} else "general"

    @property
    def verdict(self) -> str:
        broken = [what for what, found in (("WRONG", self.wrong), ("CRASH", self.crashes)) if found]
        if broken:
            return " and ".join(broken)
        return f"refused: {self.refusal}" if self.refusal else "exact"

    @property
    def sound(self) -> bool:
        """Exact, or refused with a reason."""
        return not (self.wrong or self.crashes)

    @property
    def as_expected(self) -> bool:
        """Sound, and no slower than the zoo says; what is exact need not be refused, nor run on the general path."""
        order = ("refused", "general", "fast")
        return self.sound and order.index(self.path) >= order.index(self.expected)

    def details(self) -> list[str]:
        """What is not as it should be, each kind of it once."""
        found = []
        for kind, events in (("WRONG", self.wrong), ("CRASH", self.crashes)):
            checks: dict[str, dict[str, None]] = {}
            for what, check in events:
                checks.setdefault(what, {})[check] = None
            found += [f"{kind}: {what} ({'; '.join(where)})" for what, where in checks.items()]
        if self.sound and not self.as_expected:
            found.append(f"expected {self.expected}, is {self.path}")
        return found


class Examination:
    """The checks of one model, each on its own: what one of them raises does not keep the others from running."""

    def __init__(self, name: str) -> None:
        self.outcome = Outcome(name)
        self.tokenizer = tokenizer()
        self.errors: dict[tuple[str, str], float] = {}
        """By column and check, where the error is too large."""
        self.patience = PATIENCE

    def run(self, directory: Path) -> Outcome:
        started = time.perf_counter()
        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        module = build(self.outcome.name)
        self.reference = Reference(copy.deepcopy(module))
        self.model: LanguageModel | None = None
        with self.check("taking it over"):
            model = LanguageModel(module)
            model.check_logits()
            self.model = model
        exported = directory / "model"
        if self.model is None:
            self.reference.module.save_pretrained(exported)
            self.tokenizer.save_pretrained(exported)
        else:
            self.of_the_learner()
            self.of_the_sampler()
            self.of_trained_weights()
            self.of_files(exported)
            with self.check("backends"):
                self.outcome.training, self.outcome.generation = paths(self.model)
        self.of_the_command_line(directory, exported)
        for column in ("logprobs", "gradients", "sampler"):
            checks = [check for other, check in self.errors if other == column]
            self.outcome.wrong += [(f"{column} off by up to {getattr(self.outcome, column):.2g}", check) for check in checks]
        self.outcome.seconds = time.perf_counter() - started
        return self.outcome

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Within: a UserError means that the model is refused, and any other exception that something crashed."""
        try:
            with time_limit(self.patience):
                yield
        except UserError as error:
            self.outcome.refusal = self.outcome.refusal or (str(error) if what == "taking it over" else f"{what}: {error}")
        except Exception as error:  # whatever a model's forward raises; the other checks, and the other models, go on
            self.crash(what, error)

    def crash(self, what: str, error: BaseException | None) -> None:
        self.outcome.crashes.append((_one_line(error), what))
        if isinstance(error, TimeoutError):
            self.patience = IMPATIENCE

    def compare(self, column: str, what: str, error: float) -> None:
        """Keep the largest error of a column, and say where it is too large."""
        setattr(self.outcome, column, max(error, getattr(self.outcome, column) or 0.0))
        if not error <= TOLERANCE:
            self.errors[column, what] = error

    def compare_rows(self, what: str, expected: "Expected", found: tuple[Tensor, Tensor]) -> None:
        for kind, ours, theirs in zip(("", ", entropies"), found, (expected.logprobs_BT, expected.entropy_BT), strict=True):
            self.compare("logprobs", what + kind, difference(ours, theirs))

    # --- the checks

    def of_the_learner(self) -> None:
        """Log-probabilities, entropies and gradients, however prompts are shared, layers checkpointed and batches cut."""
        model, batch = self.model, random_batch()
        assert model is not None
        expected: Expected | None = None
        with self.check("its own forward and backward pass; what fails there must be refused"):
            expected = self.reference.expected(batch)
        if expected is None:
            return
        for shared in (True, False):
            with self.check(f"share_prompts = {shared}, without gradient"), torch.no_grad():
                found = model.completion_logprobs(batch, temperature=TEMPERATURE, share_prompts=shared)
                self.compare_rows(f"share_prompts = {shared}", expected, found)
        for name, shared, running in (
            ("shared prompts", True, None),
            ("whole rows", False, None),
            ("checkpointed, shared prompts", True, {"checkpointing": True}),
            ("checkpointed, whole rows", False, {"checkpointing": True}),
        ):
            with self.check(name):
                self.compare_gradients(name, expected, [batch], running, share_prompts=shared)
        with self.check("micro-batches"):
            parts = [batch.select(torch.tensor(rows)) for rows in CUT]
            self.compare_gradients("micro-batches", expected, parts, {})

    def compare_gradients(
        self, what: str, expected: "Expected", parts: Sequence[Batch], running: dict[str, Any] | None, **settings: Any
    ) -> None:
        """Log-probabilities and gradients; `running`: settings of `LanguageModel.running`, None: outside of it."""
        model = self.model
        assert model is not None
        model.module.zero_grad(set_to_none=True)
        for part in parts:
            found: list[tuple[Tensor, Tensor]] = []
            if running is None:
                found.append(model.completion_logprobs(part, temperature=TEMPERATURE, **settings))
            else:
                with model.running(**running):
                    found.append(model.completion_logprobs(part, temperature=TEMPERATURE, **settings))
            (logprobs_BT, entropy_BT), T = found[0], part.tokens_BT.shape[1]
            rows = part.rows_B
            own = Expected(expected.logprobs_BT[rows, :T], expected.entropy_BT[rows, :T], {})
            self.compare_rows(what, own, (logprobs_BT.detach(), entropy_BT.detach()))
            (logprobs_BT * token_weights(len(expected.logprobs_BT))[rows, :T]).sum().backward()
        worst, where = gradient_difference(model.module, expected.gradients)
        self.compare("gradients", f"{what}, {where}", worst)
        model.module.zero_grad(set_to_none=True)

    def of_the_sampler(self) -> None:
        """Few rows, many rows, and so little room that requests join while others are generated."""
        with self.check("sampler, few rows"):
            self.sample("sampler, few rows", [(5, 1, 24), (12, 1, 24)])
        with self.check("sampler, many rows"):
            self.sample("sampler, many rows", [(3, 9, 24), (11, 9, 16), (19, 9, 24)])
        with self.check("sampler, joining"):
            self.sample("sampler, joining", [(3, 2, 4), (11, 2, 24), (19, 2, 7), (6, 2, 16), (13, 2, 10)], max_rows=4)

    def sample(self, what: str, wanted: Sequence[tuple[int, int, int]], max_rows: int = 1024) -> None:
        """`wanted`: tokens of the prompt, completions, most tokens of a completion."""
        assert self.model is not None
        sampler = NativeSampler(self.model, self.tokenizer, max_rows=max_rows)
        self.compare("sampler", what, self.reference.sampler_error(*sampled(sampler, wanted)))

    def of_trained_weights(self) -> None:
        """A model whose norms are 1 and whose biases are 0 is taken over and used; then all its parameters move."""
        module = build(self.outcome.name, constants=True)
        what, batch, wanted = "after training", random_batch(), [(5, 3, 24), (12, 3, 24)]
        with self.check(what):
            model = LanguageModel(module)
            model.check_logits()
            sampler = NativeSampler(model, self.tokenizer)
            with torch.no_grad():
                model.completion_logprobs(batch, temperature=TEMPERATURE)
            sampled(sampler, wanted)
            perturb(module)
            sampler.load(model, 1)
            trained = Reference(copy.deepcopy(module))
            with torch.no_grad():
                found = model.completion_logprobs(batch, temperature=TEMPERATURE)
            self.compare_rows(what, trained.expected(batch), found)
            self.compare("sampler", what, trained.sampler_error(*sampled(sampler, wanted)))

    def of_files(self, directory: Path) -> None:
        """What is exported and loaded again computes the same."""
        assert self.model is not None
        batch = random_batch()
        with self.check("export and load"), torch.no_grad():
            self.model.export(directory, self.tokenizer)
            loaded = LanguageModel.load(str(directory))
            ours = loaded.completion_logprobs(batch, temperature=TEMPERATURE)[0]
            error = difference(ours, self.reference.expected(batch).logprobs_BT)
            if error > TOLERANCE:
                theirs = Reference(AutoModelForCausalLM.from_pretrained(directory).eval()).expected(batch).logprobs_BT
                upstream = difference(theirs, self.reference.expected(batch).logprobs_BT)
                more = f" (transformers' own save and load: {upstream:.2g})" if upstream > TOLERANCE else ""
                self.outcome.wrong.append((f"logprobs off by {error:.2g}{more}", "export and load"))
            self.outcome.reload = "differs" if error > TOLERANCE else "same"

    def of_the_command_line(self, directory: Path, model: Path) -> None:
        """Two steps of `groupwise train`: exit code 0, or 2 with one message for what is refused."""
        if not (model / "config.json").is_file():
            return
        recipe, out = write_recipe(directory, model), directory / "run"
        with time_limit(self.patience):
            result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out)], env={"COLUMNS": "200"})
        self.outcome.command = f"exit {result.exit_code}"
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        if unexpected or "Traceback" in result.output:
            self.outcome.command = "traceback"
            self.crash("groupwise train", result.exception)
        elif result.exit_code == 0:
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            gaps = [float(line["sampler_gap_max"]) for line in lines if line.get("sampler_gap_max") is not None]
            self.outcome.command = f"gap {max(gaps):.0e}" if gaps else "no gap measured"
            if len(gaps) != 2 or max(gaps) > TOLERANCE:
                self.outcome.wrong.append((f"sampler_gap_max {', '.join(f'{gap:.2g}' for gap in gaps)}", "groupwise train"))
        elif result.exit_code == 2 and result.stderr.count("error: ") == 1:
            self.outcome.refusal = self.outcome.refusal or f"groupwise train: {result.stderr.strip()}"
        else:
            self.outcome.wrong.append((f"exit {result.exit_code}: {result.stderr.strip()[-200:]}", "groupwise train"))
        if self.model is None and self.outcome.refusal and result.exit_code == 0:
            self.outcome.wrong.append(("takes a model that LanguageModel refuses", "groupwise train"))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within: TimeoutError in the main thread after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)  # that of pytest-timeout, whose own limit does not hold any more in this test
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(slots=True)
class Expected:
    """What each row alone gives."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    gradients: dict[str, Tensor]
    """By name: of the sum of the log-probabilities, each times its token weight."""


class Reference:
    """A model's own forward pass, `module(input_ids=row)`, on one unpadded row at a time."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._of: dict[tuple[int, ...], Expected] = {}

    def row(self, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Log-probabilities and entropies [T], and the module: a fresh copy, since some keep state between calls (RoPE)."""
        module = copy.deepcopy(self.module)
        module.config.get_text_config().use_cache = False  # RWKV and xLSTM write their states in place, which autograd refuses
        logits = module(input_ids=torch.cat([prompt, tokens])[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs_TV = torch.log_softmax(logits / TEMPERATURE, -1)
        return logprobs_TV.gather(1, tokens[:, None])[:, 0], -(logprobs_TV.exp() * logprobs_TV).sum(-1), module

    def expected(self, batch: Batch) -> Expected:
        key = tuple(batch.tokens_BT.flatten().tolist())
        if key not in self._of:
            zeros, weights_BT = torch.zeros(batch.tokens_BT.shape), token_weights(len(batch))
            found = Expected(zeros.clone(), zeros.clone(), {})
            for row, length in enumerate(batch.lengths_B.tolist()):
                prompt = batch.prompts[int(batch.group_ids_B[row])]
                with torch.enable_grad():
                    logprobs_T, entropy_T, module = self.row(prompt, batch.tokens_BT[row, :length])
                    (logprobs_T * weights_BT[row, :length]).sum().backward()
                found.logprobs_BT[row, :length] = logprobs_T.detach()
                found.entropy_BT[row, :length] = entropy_T.detach()
                for name, parameter in module.named_parameters():
                    before = found.gradients.get(name, 0)
                    found.gradients[name] = before + (0 if parameter.grad is None else parameter.grad.detach())
            self._of[key] = found
        return self._of[key]

    @torch.no_grad()
    def sampler_error(self, prompts: Sequence[Tensor], groups: Sequence[Sequence[Completion]]) -> float:
        """The largest error of the sampler's log-probabilities."""
        rows = [(prompt, row) for prompt, group in zip(prompts, groups, strict=True) for row in group]
        return max(difference(row.logprobs, self.row(prompt, row.tokens)[0]) for prompt, row in rows)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where one of them is not finite."""
    found = (ours.float() - theirs.float()).abs().max()
    return float(torch.nan_to_num(found, nan=torch.inf))


def gradient_difference(module: Any, expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a gradient, relative to max(1, the largest element of the parameter's), and the parameter's name."""
    worst, where = 0.0, ""
    for name, parameter in module.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs = torch.as_tensor(expected[name], dtype=ours.dtype).expand_as(ours)
        error = difference(ours, theirs) / max(1.0, float(theirs.abs().max()))
        if error > worst:
            worst, where = error, name
    return worst, where


def token_weights(rows: int) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(5))[:, : max(map(max, ROW_LENGTHS))]


def random_batch() -> Batch:
    """Ragged prompts, each with ragged completions, one of which is a single token."""
    generator = torch.Generator().manual_seed(3)
    lengths = [length for group in ROW_LENGTHS for length in group]
    tokens_BT = pad_rows([torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths])
    return Batch(
        rows_B=torch.arange(len(lengths)),
        prompts=tuple(torch.randint(2, VOCABULARY, (length,), generator=generator) for length in PROMPT_LENGTHS),
        group_ids_B=torch.tensor([group for group, rows in enumerate(ROW_LENGTHS) for _ in rows]),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor(lengths),
        mask_BT=pad_rows([torch.ones(length, dtype=torch.bool) for length in lengths]),
        rollout_logprobs_BT=torch.zeros(tokens_BT.shape),
    )


def sampled(sampler: NativeSampler, wanted: Sequence[tuple[int, int, int]]) -> tuple[list[Tensor], list[tuple[Completion, ...]]]:
    """Prompts and their completions."""
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length, _, _ in wanted]
    requests = [
        Request(prompt=prompt, n=n, sampling=Sampling(max_tokens=tokens, temperature=TEMPERATURE), seed=11 + i)
        for i, (prompt, (_, n, tokens)) in enumerate(zip(prompts, wanted, strict=True))
    ]
    return prompts, generate_all(sampler, requests)


def paths(model: LanguageModel) -> tuple[str, str]:
    """ "fast" or "general", for training and for generation, as `LanguageModel.backends` tells people."""
    found = model.backends()
    fast = {"training": ("packed sequences",), "decoding": ("one C++ call", "layer by layer")}
    return tuple("fast" if found[what].startswith(begins) else "general" for what, begins in fast.items())  # type: ignore[return-value]


RECIPE = """
seed = 1
[model]
path = "{model}"
[task]
name = "dataset"
path = "data.jsonl"
reward = "reward.py:reward"
[algorithm]
name = "dr_grpo"
[rollouts]
group_size = 4
prompts_per_step = 2
max_tokens = 12
[learner]
minibatches = 1
learning_rate = 1e-2
[training]
steps = 2
eval_every = 2
eval_problems = 2
checkpoint_every = 2
tokens_every = 0
"""
REWARD = "def reward(problem, completions):\n    return [sum(map(ord, text)) % 7 / 7 for text in completions]\n"


def write_recipe(directory: Path, model: Path) -> Path:
    """A recipe with rewards that differ within groups, and prompts of 3 to 11 tokens."""
    prompts = [("12345678901"[: 3 + i % 9], i) for i in range(20)]
    lines = [json.dumps({"prompt": f"{text[:-2]}{i % 10}=", "answer": ""}) for text, i in prompts]
    (directory / "data.jsonl").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    (directory / "reward.py").write_text(REWARD)
    recipe = directory / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model))
    return recipe


def _one_line(error: BaseException | None) -> str:
    """The kind and the first line of an exception, and where in groupwise it came through last."""
    if error is None:
        return "unknown"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/groupwise/" in frame.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}{where}"


def examine(name: str) -> Outcome:
    """All checks of one model of the zoo."""
    with tempfile.TemporaryDirectory() as directory:
        return Examination(name).run(Path(directory))


# --- the table

COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "model": lambda o: o.name,
    "training": lambda o: o.training,
    "generation": lambda o: o.generation,
    "logprobs": lambda o: _number(o.logprobs),
    "gradients": lambda o: _number(o.gradients),
    "sampler": lambda o: _number(o.sampler),
    "save, load": lambda o: o.reload,
    "train": lambda o: o.command,
    "verdict": lambda o: o.verdict if not o.sound or o.as_expected else f"{o.verdict} (expected {o.expected})",
    "s": lambda o: f"{o.seconds:.1f}",
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def summary(outcomes: Sequence[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        kind = outcome.verdict.partition(":")[0]
        kind = f"exact, {outcome.path} path" if kind == "exact" else kind
        counts[kind] = counts.get(kind, 0) + 1
    as_expected = sum(outcome.as_expected for outcome in outcomes)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{len(outcomes)} models: {found}; {as_expected} as expected"


def as_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(*COLUMNS, title=summary(outcomes))
    for outcome in outcomes:
        style = "red" if not outcome.sound else "" if outcome.as_expected else "yellow"
        table.add_row(*(column(outcome) for column in COLUMNS.values()), style=style)
    return table


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    lines = [summary(outcomes), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(column(o).replace("|", "\\|") for column in COLUMNS.values()) + " |" for o in outcomes]
    details = [f"- **{outcome.name}**: {'; '.join(outcome.details())}" for outcome in outcomes if outcome.details()]
    return "\n".join([*lines, *(["", "What is not as it should be:", "", *details] if details else []), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Every model of the zoo against its own forward.")
    parser.add_argument("names", nargs="*", help="models of the zoo, or patterns such as 'qwen*'; left out: all")
    parser.add_argument("--ci", action="store_true", help="only those that tests/test_zoo.py runs")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown to this file")
    given = parser.parse_args(arguments)
    names = [name for name in ZOO if not given.names or any(fnmatch.fnmatch(name, pattern) for pattern in given.names)]
    names = [name for name in names if ZOO[name].ci or not given.ci]
    if not names:
        parser.error(f"no model of the zoo is called {' or '.join(given.names)}")
    console, outcomes = Console(width=200, highlight=False), []
    for name in names:
        try:
            outcome = examine(name)
        except Exception as error:  # one model must not stop the others
            outcome = Outcome(name, crashes=[(_one_line(error), "building it")])
        outcomes.append(outcome)
        console.print(
            f"{name}: {outcome.verdict}, {outcome.path} path ({outcome.seconds:.1f} s)",
            *outcome.details(),
            sep="\n  ",
            markup=False,
        )
        if given.out is not None:
            given.out.write_text(as_markdown(outcomes))
    console.print(as_table(outcomes))
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
