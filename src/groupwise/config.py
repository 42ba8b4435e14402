"""The recipe file as one typed tree. Unknown keys are refused, with the nearest known one."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from groupwise.errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """[model]: what is trained, and what runs it."""

    path: str = "arithmetic-base"
    """A shipped model, a Hugging Face id, or a local directory."""
    device: str = "auto"
    """"auto" takes a CUDA device where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights, their gradients and the optimiser's moments."""
    compile: bool = False
    """Run the decoder through torch.compile; the first steps then take a minute more, and a C++ compiler is needed."""
    chat: bool | None = None
    """Whether prompts go through the tokenizer's chat template; left out: whenever it has one."""
    backend: Literal["auto", "kernels", "torch", "transformers"] = "auto"
    """What runs the model: "auto" takes the fastest that a trial finds exact, and says why it falls back; "kernels" refuses a
    model whose attention cannot run on packed sequences in C++; "torch" uses no C++; "transformers" runs padded batches through
    transformers' own attention."""


class RolloutsSection(Section):
    """[rollouts]: how completions are sampled."""

    sampler: str = "native"
    """The inference engine: "native", or a function of yours, "file.py:name", of ([rollouts], LanguageModel, tokenizer)."""
    group_size: Count = 16
    prompts_per_step: Count = 32
    max_tokens: Count = 64
    """Completion tokens, the end-of-sequence token included."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    min_p: Share = 0.0
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion; they stay part of it."""
    stop_tokens: list[Annotated[int, Field(ge=0)]] = []
    """Token ids that end a completion, in addition to the tokenizer's end-of-sequence token."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Generate with the weights rounded to this type, anew at each step; left out: with the model itself."""
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the keys and values that generation keeps; left out: the dtype of what generates, which is float32 where
    `dtype = "bfloat16"` runs on a CPU with AVX-512 BF16. In 16 bits long completions are faster on a CPU and take half the
    memory; what the rounding does to log-probabilities is reported as the gap between sampler and learner, which
    `algorithm.correction` takes into account."""
    max_rows: Count = 1024
    """Completions generated at once."""
    max_rounds: Count = 10
    """Dynamic sampling: how often to generate before a step goes on with the mixed groups it has."""
    max_age: Annotated[int, Field(ge=0)] = 0
    """Dynamic sampling: for how many steps mixed groups beyond the batch are kept for later batches; 0: dropped. Weights
    have moved on since they were sampled: `learner.old_logprobs = "sampler"` lets the ratio account for that."""


class LearnerSection(Section):
    """[learner]: how the policy is updated."""

    learning_rate: NotNegative = 1e-4
    minibatches: Count = 4
    """Optimiser updates per rollout batch."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser updates over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the end of training."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    micro_batch_tokens: Count = 4096
    """Tokens, prompts and completions, that go through the model at once; changes memory and time, not results. More suits
    a GPU; on a CPU this many keep the intermediate results in its caches."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matmuls run in it, with sums in float32, while weights, gradients and moments keep their dtype. On a GPU, and
    on a CPU without AVX-512 BF16, through torch.autocast, which runs attention in it too."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, more time."""
    share_prompts: bool = True
    """Run each prompt once per group; changes time, not results."""
    old_logprobs: Literal["sampler", "recompute"] = "recompute"
    """Where pi_old comes from: as the sampler returned it, or computed by the learner before the first update."""
    max_bad_updates: Count = 5
    """How many updates in a row may be skipped for a non-finite loss or gradient before the run stops."""


class CriticSection(Section):
    """The critic of algorithms that have one; a second copy of the model with a scalar head."""

    learning_rate: NotNegative = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0
    value_clip: Positive = 0.2
    """How far a value may move from the one before the update and still lower the loss."""


class TrackersSection(Section):
    """[trackers]: who else records the run."""

    names: list[str] = []
    """Further recorders of the run, as "file.py:name": called with the run's directory and recipe, they are given every event."""


class TrainingSection(Section):
    """[training]: how long, and what is saved when."""

    steps: Count = 100
    eval_every: Count = 25
    eval_problems: Count = 500
    checkpoint_every: Count = 25
    keep_checkpoints: Count = 2
    tokens_every: Annotated[int, Field(ge=0)] = 25
    """Every so many steps, the first one and the last included, every token is written to tokens/ as Parquet; 0: never."""


class Recipe(Section):
    """What `groupwise train` reads."""

    seed: int = 0
    model: ModelSection = ModelSection()
    task: dict[str, Any] = {"name": "arithmetic"}
    """`name`, then the task's own settings; see `groupwise.tasks`."""
    algorithm: dict[str, Any] = {"name": "dapo"}
    """`name`, then settings of the algorithm and of its parts; see `groupwise.named`."""
    rollouts: RolloutsSection = RolloutsSection()
    learner: LearnerSection = LearnerSection()
    critic: CriticSection = CriticSection()
    training: TrainingSection = TrainingSection()
    trackers: TrackersSection = TrackersSection()


class SftModelSection(Section):
    path: str = ""
    """The model to start from; empty: a new one."""
    device: str = "auto"
    chat: bool | None = None
    new: dict[str, Any] = {}
    """A new model: `model_type` and any other setting of its transformers configuration."""
    characters: str = ""
    """A new model's vocabulary, one token per character."""


class SftSection(Section):
    steps: Count = 1000
    batch_size: Count = 128
    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    micro_batch_tokens: Count = 16384
    """Padded tokens that go through the model at once; changes memory and time, not results."""
    max_tokens: Count = 64
    """The longest completion sampled for the pass rates recorded beside the model."""
    eval_problems: Count = 500


class SftRecipe(Section):
    """What `groupwise sft` reads."""

    seed: int = 0
    model: SftModelSection = SftModelSection()
    task: dict[str, Any] = {"name": "arithmetic"}
    sft: SftSection = SftSection()


class Source:
    """Where a tree of settings came from, so that a message can name the file and the line."""

    def __init__(self, path: Path, text: str, overrides: Sequence[str] = (), given: Iterable[str] = ()) -> None:
        """`overrides`: from --set; `given`: keys whose values came from Python."""
        self.path, self.text, self.overrides, self.given = path, text, tuple(overrides), tuple(given)

    def changed(self, table: str) -> set[str]:
        """The keys of a table that did not come from the file."""
        keys = [*(override.partition("=")[0].strip() for override in self.overrides), *self.given]
        return {key.removeprefix(f"{table}.") for key in keys if key.startswith(f"{table}.")}

    def place(self, key: str) -> str:
        """ "recipe.toml, line 3, learner.minibatch", or the --set that the key came from."""
        for override in self.overrides:
            if override.partition("=")[0].strip() == key:
                return f"--set {override}"
        if key in self.given:
            return f"{key}, given from Python"
        table = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
                table = header[1] + "."
                if header[1] == key:
                    return f"{self.path}, line {number}, [{key}]"
            elif (entry := re.match(r"\s*([\w.-]+)\s*=", line)) and table + entry[1] == key:
                return f"{self.path}, line {number}, {key}"
        return f"{self.path}, {key}"

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.place(key)}: {message}")


def shipped_recipes() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in (files("groupwise") / "recipes").iterdir())


def find_recipe(name: str | Path | None) -> Path:
    """The file that a recipe argument means: a path, a shipped recipe's name, or nothing for the embedded default.

    Raises:
        UserError: there is no such file and no such shipped recipe.
    """
    if name is None:
        name = "default"
    if str(name) in shipped_recipes():
        return Path(str(files("groupwise") / "recipes" / f"{name}.toml"))
    try:
        found = Path(name).is_file()
    except OSError:  # a name too long to be a file's
        found = False
    if not found:
        raise UserError(f"no recipe {str(name)!r}: neither a file nor a shipped recipe{nearest(str(name), shipped_recipes())}")
    return Path(name)


def is_sft(path: Path) -> bool:
    """Whether a recipe is for `groupwise sft`: it has an [sft] table."""
    return re.search(r"^\s*\[sft\]", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


Tree = TypeVar("Tree", Recipe, SftRecipe)


def load(
    path: Path, kind: type[Tree], overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> tuple[Tree, Source]:
    """Read a recipe file and what it extends, apply `--set key=value` overrides (values in TOML, or bare strings), check it.

    `changes`: values by dotted key from Python, applied last. With another algorithm.name the file's [algorithm] is dropped.

    Raises:
        UserError: one message with a line for each thing that is wrong.
    """
    tree, text = read_tree(path)
    source = Source(path, text, overrides, changes or ())
    name_before = _algorithm_name(tree)
    for override in overrides:
        apply_override(tree, override)
    for key, value in (changes or {}).items():
        set_key(tree, key, value, place=key)
    if _algorithm_name(tree) != name_before:  # another algorithm starts from its own defaults
        tree["algorithm"] = {key: value for key, value in tree["algorithm"].items() if key in source.changed("algorithm")}
    try:
        return kind.model_validate(tree), source
    except ValidationError as error:
        raise explain(error, kind, source) from error


def _algorithm_name(tree: dict[str, Any]) -> Any:
    section = tree.get("algorithm")
    return section.get("name") if isinstance(section, dict) else None


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """A recipe file's tree, laid over that of the recipe that it `extends`: a file beside it, or a shipped one; and its text.

    Raises:
        UserError: it cannot be read, or it extends itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    base = tree.pop("extends", None)
    if base is None:
        return tree, text
    source = Source(path, text)
    if not isinstance(base, str):
        raise source.error("extends", f"expected a shipped recipe's name or a file, not {base!r}")
    beside = path.parent / base
    try:
        found = beside if beside.is_file() else find_recipe(base)
    except UserError as error:
        raise source.error("extends", str(error)) from error
    if found.resolve() in seen or found.resolve() == path.resolve():
        raise source.error("extends", f"{base!r} extends this file in turn")
    return merge_trees(read_tree(found, (*seen, path.resolve()))[0], tree), text


def merge_trees(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of `tree` from "key=value"."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"--set {override}: expected key=value, as in --set learner.learning_rate=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    set_key(tree, key.strip(), parsed, place=f"--set {override}")


def set_key(tree: dict[str, Any], key: str, value: Any, *, place: str) -> None:
    """Set a dotted key of `tree`; `place` is named in the message if that cannot be done."""
    *tables, last = key.split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{place}: {name} is a value, not a table")
    tree[last] = value


def explain(error: ValidationError, kind: Any, source: Source, prefix: str = "") -> UserError:
    """pydantic's findings as one message, each with its place, and the nearest known key for an unknown one."""
    lines = []
    for finding in error.errors():
        location = [str(part) for part in finding["loc"]]
        if kind.model_fields.get(location[0]) and not _is_table(kind.model_fields[location[0]].annotation):
            location = location[:1]  # below a value are only its place in a list and pydantic's names of alternatives
        key = prefix + ".".join(location)
        if finding["type"] == "extra_forbidden":
            message = f"unknown key{nearest(location[-1], _known_keys(kind, location[:-1]))}"
        else:
            message = f"{finding['msg'][0].lower()}{finding['msg'][1:]}, not {finding['input']!r}"
        lines.append(str(source.error(key, message)))
    return UserError("\n".join(dict.fromkeys(lines)))


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _known_keys(kind: Any, location: Iterable[str]) -> list[str]:
    for part in location:
        kind = kind.model_fields[part].annotation
    return list(kind.model_fields)


def dump(tree: dict[str, Any]) -> str:
    """TOML text of a tree of settings; a setting that is None is left out."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return value

    return tomli_w.dumps(without_none(tree))
