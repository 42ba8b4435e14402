"""Inputs for fuzz.py, each made from a seed: recipes, ladders, sft recipes, datasets and run directories, damaged or absurd.

A case writes its files below a directory and gives the arguments of a `groupwise` command.
"""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from groupwise.algorithms.named import general_settings
from groupwise.config import Recipe, SftRecipe, find_recipe, is_sft, shipped_recipes
from groupwise.experiments.ladder import Ladder, claim, find_ladder, load_ladder, shipped_ladders
from groupwise.tasks.base import TASKS

DEEP = 10_000
DIGITS = "9" * 5000
ARABIC = "مرحبا"
NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1e-9", "nan", "inf", "-inf", "1e308", "-1e308", "10000000", "1000000000000", "-7e9",
           "9223372036854775807", "-9223372036854775808", "9223372036854775808", DIGITS, "-" + DIGITS, "0x" + "f" * 5000,
           "1e" + DIGITS, "1" * 400 + ".5", "true", "false"]  # fmt: skip
TEXTS = ["", "x", "auto", "none", "native", "grpo", "cuda:99", "meta", "日本語 🙂", ARABIC, "\u202eabc", "a\tb", "x" * 100_000, "/dev/zero",
         ".", "/", "..", "~", "missing.py:name", "broken.py:name", "http://127.0.0.1:9", "a/b", "{prompt}", "{", "%s", "[red]x[/red]",
         "[/]", "\\u0000", "\\u001b[31mred", "nul\\u0000.jsonl", "data.jsonl", "recipe.toml", "file:///etc/passwd"]  # fmt: skip
OTHERS = ["[]", "{}", "[1, 2]", "[[1]]", '["a", 1, true]', "{ a = 1 }", "[{}]", '[{ name = "a" }]', "1979-05-27T07:32:00Z", "1979-05-27",
          "07:32:00", "[" * DEEP + "]" * DEEP, "[" * 80 + "1" + "]" * 80, "{ a = " * 90 + "1" + " }" * 90,
          "[" + "1, " * 20_000 + "]"]  # fmt: skip
KEYS = [
    "x",
    "",
    "日本語",
    "learning_rat",
    "a.b",
    'a"b',
    "a\\nb",
    "k" * 50_000,
    "[red]",
    "__class__",
    "model_config",
    "\\u001b[31m",
    "0",
    "-",
]
PATHS = ["directory", "fifo", "/dev/zero", "/dev/null", "missing.toml", "n" * 5000, "loop", "bad\udcff.toml", "new\nline.toml", "", "-",
         "/proc/self/mem", "unreadable.toml", "a\u202eb.toml"]  # fmt: skip

Case = list[str]
"""Arguments of `groupwise`."""


def quoted(text: str) -> str:
    """A TOML string; escapes that the text spells stay escapes."""
    return '"' + text.replace('"', '\\"').replace("\n", "\\n") + '"'


def value(rng: random.Random) -> str:
    """TOML text of a value: a number, a text or something else, often absurd."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(NUMBERS)
    return quoted(rng.choice(TEXTS)) if kind < 0.8 else rng.choice(OTHERS)


def keys_of(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a tree of settings."""
    found = []
    for name, field in kind.model_fields.items():
        key = prefix + (field.alias or name)
        tables = [item for item in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(item, type)]
        table = next((item for item in tables if issubclass(item, BaseModel)), None)
        found += [key, *(keys_of(table, f"{key}.") if table else [])]
    return found


RECIPE_KEYS = [
    *keys_of(Recipe),
    *(f"task.{name}" for task in TASKS.values() for name in task.model_fields),
    *(f"algorithm.{name}" for name in ("advantage", "aggregation", "selection", "allocation", *general_settings())),
]
NEW_MODEL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
             "max_position_embeddings", "model_type", "vocab_size", "rope_theta", "num_experts", "layer_types", "dtype")  # fmt: skip
SFT_KEYS = [
    *keys_of(SftRecipe),
    *(f"model.new.{name}" for name in NEW_MODEL),
    *(f"task.habits.{n}" for n in ("x", "working_share")),
]
LADDER_KEYS = [*keys_of(Ladder), "set.rollouts.group_size"]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut short, emptied, repeated, with bytes or lines changed, inserted or removed."""
    data = bytes(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        lines = data.split(b"\n")
        line = rng.randrange(len(lines))
        match rng.randrange(10):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[at + rng.randrange(1, 40) :]
            case 2:
                data = data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8))) + data[at:]
            case 3:
                data = b"\n".join([*lines[:line], *lines[line + 1 :]])
            case 4:
                data = b"\n".join([*lines[: line + 1], *lines[line:]])
            case 5:
                data = b"\n".join([*lines[:line], rng.choice(NUMBERS + OTHERS).encode(), *lines[line:]])
            case 6:
                data = (
                    data[:at]
                    + rng.choice([b"\x00", b'"', b"[", b"]", b"{", b"=", b"\xff", b"\r", "\u2028".encode(), b"'''"])
                    + data[at:]
                )
            case 7:
                data = b"\xef\xbb\xbf" + data
            case 8:
                data = data[: at // 2] + data[at:]
            case 9:
                data = rng.choice(
                    [b"", b"\n", b"\x00" * 100, data * 2, data.decode(errors="replace").encode("utf-16"), data.upper()]
                )
    return data


def place_oddities(home: Path) -> None:
    """What the odd paths name: a directory, a fifo, a loop of links, a file of no name in UTF-8, code that fails."""
    (home / "directory").mkdir()
    os.mkfifo(home / "fifo")
    (home / "loop").symlink_to("loop")
    for name in ("bad\udcff.toml", "new\nline.toml", "a\u202eb.toml"):
        (home / name).write_text("seed = 1\nextends = 'quick'\n")
    (home / "broken.py").write_text("raise ValueError('broken')\n")
    (home / "unreadable.toml").write_bytes(b"\xff\xfe\x00")


def tree_text(rng: random.Random, keys: Sequence[str], count: int) -> str:
    """Lines that set some keys to values, which may contradict each other."""
    lines = []
    for _ in range(count):
        key = (
            rng.choice(keys)
            if rng.random() < 0.85
            else f"{rng.choice(['', 'model.', 'task.', 'rollouts.'])}{quoted(rng.choice(KEYS))}"
        )
        lines.append(f"{key} = {value(rng)}")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def whole(rng: random.Random) -> str:
    """A file that is odd as a whole."""
    return rng.choice(
        [
            "", "\n", "\ufeffseed = 1\n", "a." * DEEP + "b = 1\n", "[" + "a." * DEEP + "b]\n", "[a]\n[a]\n", "[[task]]\n", "task = 1\n",
            "[" * DEEP, "extends = 'recipe.toml'\n", "extends = 'other.toml'\n", "extends = 'fifo'\n", "extends = 1\n",
            f"extends = '{'x' * 5000}'\n", "extends = ''\n", "extends = '/'\n", "\n".join(f"k{i} = {i}" for i in range(20_000)),
            "\n".join(f"[t{i}]\nx = 1" for i in range(5000)), "x = '''" + "y" * 3_000_000 + "'''\n", "# " + "c" * 3_000_000 + "\n",
            "seed = 1 # \x07\n", '"a\\nb" = 1\n', '"a.b" = 1\n', "'' = 1\n", "seed.x = 1\n", "[model]\n" * 3, "algorithm = 'grpo'\n",
            "[task]\nname = 'dataset'\npath = 'data.jsonl'\nsources = 1\n", "[[task.sources]]\nweight = 1e400\n",
            "[task]\nname = 'dataset'\n" + "[[task.sources]]\npath = 'x.jsonl'\nweight = 1e-300\n" * 3,
        ]
    )  # fmt: skip


def settings_file(rng: random.Random, home: Path, shipped: Callable[[], bytes], keys: Sequence[str], base: str) -> str:
    """Write one file of settings, and return the path to give."""
    place_oddities(home)
    (home / "other.toml").write_text("extends = 'recipe.toml'\n")
    path, kind = home / "recipe.toml", rng.random()
    if kind < 0.06:
        return str(home / rng.choice(PATHS))
    if kind < 0.36:
        path.write_bytes(damaged(rng, shipped()))
    elif kind < 0.5:
        path.write_text(whole(rng))
    else:
        path.write_text(base + tree_text(rng, keys, rng.choice([1, 1, 1, 2, 4])))
    return str(path)


def overrides(rng: random.Random, keys: Sequence[str]) -> list[str]:
    """Now and then a --set or two."""
    sets: list[str] = []
    while rng.random() < 0.15:
        pair = f"{rng.choice(keys)}={value(rng)}"
        sets += [
            "--set",
            rng.choice([pair, pair, pair, rng.choice(KEYS), f"{'a.' * 500}b=1", f"={value(rng)}", damaged_text(rng, pair)]),
        ]
    return sets


def damaged_text(rng: random.Random, text: str) -> str:
    return damaged(rng, text.encode()).decode(errors="replace").replace("\x00", "")


def recipe(rng: random.Random, home: Path) -> Case:
    names = [name for name in shipped_recipes() if not is_sft(find_recipe(name))]
    base = f"extends = {quoted(rng.choice(names))}\ntraining.eval_problems = 8\n"
    path = settings_file(rng, home, lambda: find_recipe(rng.choice(names)).read_bytes(), RECIPE_KEYS, base)
    return [rng.choice(["check", "check", "data"]), path, *overrides(rng, RECIPE_KEYS)]


def sft(rng: random.Random, home: Path) -> Case:
    names = [name for name in shipped_recipes() if is_sft(find_recipe(name))]
    base = f"extends = {quoted(names[0])}\nsft.eval_problems = 8\n"
    if rng.random() < 0.3:
        base = "model.path = 'arithmetic-base'\n"
    path = settings_file(rng, home, lambda: find_recipe(rng.choice(names)).read_bytes(), SFT_KEYS, base)
    sets = overrides(rng, SFT_KEYS)
    return ["sft", path, *sets, "--out", str(home / "model")] if rng.random() < 0.6 else ["check", path, *sets]


def ladder(rng: random.Random, home: Path) -> Case:
    names = shipped_ladders()
    rungs = "".join(
        f"[[rungs]]\nname = {quoted(rng.choice([name, name, name, *TEXTS]))}\n"
        + (f"set = {{ {quoted(rng.choice(RECIPE_KEYS))} = {value(rng)} }}\n" if rng.random() < 0.4 else "")
        for name in rng.choice(["ab", "abc", "abc", "a"])
    )
    keys = [key for key in LADDER_KEYS if key != "title"]
    given = settings_file(rng, home, lambda: find_ladder(rng.choice(names)).read_bytes(), keys, "title = 'fuzz'\n")
    path = home / "recipe.toml"
    if path.exists() and rng.random() < 0.6:
        with path.open("a") as file:
            file.write(rungs)
    return ["ablate", given, "--out", str(home / "out")]


# --- datasets

ROW = [
    '{"prompt": "1+1=", "answer": "2"}', '{"prompt": "x", "answer": ' + DIGITS + "}", '{"prompt": "x", "answer": 1e999}',
    '{"prompt": "x", "answer": NaN}', '{"prompt": "x", "a": ' + "[" * DEEP + "]" * DEEP + ', "answer": "1"}',
    '{"prompt": "x", "a": ' + "[" * 63 + "]" * 63 + ', "answer": "1"}', '{"a": ' * DEEP + "1" + "}" * DEEP,
    '{"prompt": "\\ud800", "answer": "1"}', '{"prompt": "x", "answer": "\\udfff"}', '{"\\ud800": 1, "prompt": "x", "answer": "1"}',
    '{"prompt": "a\\u0000b", "answer": "1"}', '{"prompt": 5, "answer": "1"}', '{"prompt": ["x"], "answer": "1"}', '{"prompt": [], "answer": 1}',
    '{"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}', '{"prompt": [{"role": ["user"], "content": "hi"}], "answer": "1"}',
    '{"prompt": [{"role": {"a": 1}, "content": "hi"}], "answer": "1"}', '{"prompt": [{"role": "user", "content": 5}], "answer": "1"}',
    '{"prompt": [{"role": "user", "content": "", "tool_calls": 5}], "answer": "1"}', '{"prompt": null, "answer": null}',
    '{"prompt": [{"role": "tool", "tool_calls": [{"function": {"name": 5}}]}], "answer": "1"}',
    '{"prompt": "g", "answer": "1", "grade": {"a": 1}}', '{"prompt": "g2", "answer": "1", "grade": [1]}', '{"prompt": "g3", "answer": "1", "grade": 7}',
    '{"prompt": "g4", "answer": "1", "grade": "easy"}', '{"prompt": "e", "answer": "1", "environment": {"a": 1}}', '{"prompt": "s", "answer": "1", "solution": [1]}',
    '{"prompt": {"a": 1}, "answer": {"b": 2}}', '{"answer": "1"}', '{"prompt": "x"}', "{}", "[]", "5", "null", '"x"', "{", "", " ", "\x00", "\ufeff{}",
    '{"prompt": "' + "y" * 200_000 + '", "answer": "1"}', '{"nums": [1, 2], "target": 3}', '{"nums": {"a": 1}, "target": "x"}', '{"nums": "12", "target": 3}',
    '{"nums": [' + "1," * 5000 + '1], "target": 3}', '{"problem": "p", "tests": "[]", "answer": "1", "solution": "\\\\boxed{1}"}', '{"problem": 5, "tests": {"a": 1}}',
    '{"question": "q", "answer": "#### 5"}', '{"question": "q", "answer": {"a": 1}}', '{"prompt": "v", "reward_model": {"ground_truth": "1"}, "extra_info": {"index": [1]}}',
    '{"prompt": "v", "reward_model": "x"}', '{"prompt": "e", "answer": "1", "prompt": "f"}', '{"prompt": "e", "answer": ' + "1" * 4000 + "}",
    '{"prompt": "c", "answer": "1", "completion": 5}', '{"prompt": "c", "answer": "1", "metadata": {"": null}, "name": "x", "step": 1}',
]  # fmt: skip
CODE_ROWS = [
    json.dumps({"problem": "p", "tests": tests})
    for tests in [
        '[{"input": "1", "output": "1"}]', "[" * DEEP + "]" * DEEP, "[" * DEEP, '{"inputs": ["1"], "outputs": ["1"]}', '{"inputs": [], "outputs": []}',
        json.dumps({"fn_name": "f", "inputs": ["[" * DEEP + "]" * DEEP], "outputs": ["1"]}), json.dumps({"fn_name": "f", "inputs": ["1"], "outputs": ["[" * DEEP]}),
        json.dumps([{"type": "functional", "fn_name": "f", "input": '{"a":' * DEEP + "1" + "}" * DEEP, "output": "1"}]),
        '[{"type": "functional", "fn_name": "f", "input": "' + DIGITS + '", "output": "1"}]', '[{"input": ' + "[" * 900 + "]" * 900 + ', "output": "1"}]',
        '[{"type": ["x"], "input": "1", "output": "1"}]', '[{"type": {"a": 1}, "input": "1", "output": "1"}]', '[{"fn_name": ["f"], "input": "1", "output": "1"}]',
        '{"fn_name": {"a": 1}, "inputs": ["1"], "outputs": ["1"]}', '{"fn_name": "f()\\nimport os", "inputs": ["1"], "outputs": ["1"]}',
        '[{"input": null, "output": {"a": 1}}]', '[{"input": "\\ud800", "output": "\\udfff"}]', "5", "null", "", "{}", '[{"input": "1"}]', "NaN", '[{"input": NaN, "output": 1e999}]',
    ]
]  # fmt: skip
"""With tests as text, as datasets of programs have them."""
PRESETS = ["", "", "", "", "gsm8k", "math", "verl", "dapo", "countdown", "code", "aime24"]


def rows(rng: random.Random, preset: str) -> list[str]:
    """Good rows, and one or more odd ones; for programs mostly those with odd tests."""
    programs = preset == "code" and rng.random() < 0.8
    good = [json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(rng.choice([0, 1, 12, 12, 12]))]
    good = [CODE_ROWS[0]] * len(good) if programs else good
    for _ in range(rng.choice([1, 1, 2, 4])):
        good.insert(rng.randrange(len(good) + 1), rng.choice(CODE_ROWS if programs else ROW))
    if rng.random() < 0.004:
        good.append(json.dumps({"prompt": "z" * 10_000_000, "answer": "1"}))
    return good


def table(rng: random.Random) -> bytes:
    """A Parquet file with columns of odd types."""
    n = rng.choice([0, 1, 8])
    columns: dict[str, Any] = {"prompt": [f"{i}+1=" for i in range(n)], "answer": [str(i + 1) for i in range(n)]}
    odd: list[Any] = [
        list(range(n)), [None] * n, [{"a": i} for i in range(n)], [[i] for i in range(n)], [b"\xff"] * n, [float("nan")] * n, [True] * n,
        [[{"role": "user", "content": "x", "n": None}]] * n, pa.array([0] * n, pa.timestamp("ns")), pa.array([2**63 - 1] * n, pa.timestamp("us")),
        pa.array([10**9] * n, pa.duration("s")), pa.array([None] * n, pa.null()), [f"{i}" for i in range(n)],
    ]  # fmt: skip
    for _ in range(rng.choice([0, 1, 2])):
        columns[rng.choice(["prompt", "answer", "grade", "x", "environment"])] = rng.choice(odd)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def data(rng: random.Random, home: Path) -> Case:
    form = rng.choice(["jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet", "ndjson", "txt", ""])
    preset = rng.choice(PRESETS)
    if form == "parquet":
        content = table(rng)
    elif form in ("csv", "tsv"):
        cells = rng.choice(["prompt,answer", "prompt,prompt", "prompt,", "", "prompt,answer,grade"]) + "\n"
        content = (cells + "".join(f"{i}+1=,{i}\n" for i in range(9)) + rng.choice(ROW).replace("\n", "")).encode(
            errors="replace"
        )
    elif form == "json":
        content = ("[" + ",".join(line for line in rows(rng, preset) if line.strip()) + "]").encode(errors="replace")
    else:
        content = "\n".join(rows(rng, preset)).encode(errors="replace")
    if rng.random() < 0.25:
        content = damaged(rng, content)
    name = rng.choice(["data", "data", "data", "日本", "a b", "x\u202ey"]) + (f".{form}" if form else "")
    (home / name).write_bytes(content)
    if rng.random() < 0.03:
        (home / name).unlink()
        rng.choice([(home / name).mkdir, lambda: os.mkfifo(home / name), lambda: (home / name).symlink_to("nowhere")])()
    reward = rng.choice(["exact", "last_line", "gsm8k", "countdown", "math"])
    lines = ["extends = 'quick'", "training.eval_problems = 4", "[task]", "name = 'dataset'", f"path = {quoted(name)}"]
    lines += [f"preset = '{preset}'"] if preset else [f"reward = '{reward}'"]
    lines += ["streaming = true", "shuffle_block = 4"] if rng.random() < 0.15 else []
    lines += [
        f"{rng.choice(['id_key', 'answer_key', 'prompt_key'])} = {quoted(rng.choice(['grade', 'answer', 'x', 'prompt', 'a.b', '']))}"
    ] * (rng.random() < 0.15)
    (home / "recipe.toml").write_text("\n".join(lines) + "\n")
    if rng.random() < 0.1:
        sft_lines = ["[model]", "path = 'arithmetic-base'", *lines[2:], "[sft]", "steps = 1"]
        (home / "recipe.toml").write_text("\n".join(sft_lines) + "\n")
        return ["sft", str(home / "recipe.toml"), "--out", str(home / "model")]
    return [rng.choice(["data", "data", "check"]), str(home / "recipe.toml")]


# --- run directories

LINES = [
    "5", "null", "[1]", '"x"', "{}", '{"step": null}', '{"step": "1"}', '{"step": -5, "reward/mean": 1}', '{"step": 1e300, "reward/mean": 1}',
    '{"step": [1]}', '{"step": 1.5, "entropy": 1, "reward/mean": 0}', '{"step": 3, "reward/mean": "x", "entropy": "high"}',
    '{"step": 3, "reward/mean": 1, "entropy": {"a": 1}}', '{"step": 3, "reward/mean": 1, "entropy": [1, 2]}',
    '{"step": 3, "reward/mean": 1, "by_probability/tokens": 5, "by_length/rows": [1]}', '{"step": 3, "eval/pass@1": "x"}',
    '{"step": 3, "reward/mean": 1, "by_probability/tokens": [1, 2], "by_probability/clipped_low": ["x"]}',
    '{"step": 3, "eval/pass@1": 7}', '{"step": 3, "eval/pass@1": null}', '{"step": 2, "eval/reward": 1e308}', '{"step": 3, "reward/mean": NaN, "entropy": Infinity}',
    '{"step": 4, "reward/mean": 1, "rollouts/completions": "many", "seconds/rollouts": []}', '{"step": ' + DIGITS + "}", "[" * DEEP, '{"step": 2, "x": ' + "[" * DEEP + "]" * DEEP + "}",
    '{"step": true, "reward/mean": 1}', '{"step": 9223372036854775807, "reward/mean": 1, "entropy": 0.1}', '{"step": 1, "reward/mean": 1e400}', "\ufeff{}",
    '{"step": 7, "reward/mean": 1, "approx_kl": 1e308, "grad_norm": 1e-320, "length/mean": -5}', '{"step": 8, "reward/mean": 1, "unknown of the future": {"a": [1]}}',
    '{"step": 3, "eval/pass@1": 0.5, "eval_problems": "x"}', '{"step": 5, "eval/reward": 0.5}', '{"step": 3, "eval/pass@1": 0.5, "eval_problems": -4}',
]  # fmt: skip
RECIPES = [
    "", "seed = 'x'\n", "seed = 1e300\n", "seed = nan\n", "algorithm = 5\n", "[algorithm]\nname = 5\n", "[algorithm]\nname = 'of the future'\nnew = 1\n",
    "[training]\nsteps = 'x'\neval_problems = 'many'\n", "training = 1\n", "[rollouts]\ntop_p = 'x'\nmax_age = []\n", "rollouts = []\n", "learner = 2\n",
    "[learner]\nlearning_rate = 1979-05-27\n", "[future]\nx = 1\n", "x = " + "[" * DEEP + "]" * DEEP + "\n", "x = " + DIGITS + "\n", "trackers = 5\n",
    "[algorithm]\nname = 'grpo'\nclip_low = 'x'\nclip_high = []\n", "[trackers]\nnames = 5\n",
]  # fmt: skip
EVENTS = [
    '{"step": 1, "text": "x", "kind": "warning", "name": "entropy_collapse", "advice": "y"}',
    '{"step": "x"}',
    '{"text": 5, "step": 2, "kind": []}',
    "5",
    "{}",
]
SEGMENTS = ['{"segment": 0, "first_step": 1, "recipe": {}, "changed": {}}', '{"segment": 1, "first_step": 2, "changed": {"learner.learning_rate": [1e-4, 1e-5]}}',
            '{"segment": 1, "first_step": "x", "changed": 5}', '{"segment": 2, "first_step": 2, "changed": {"a": 1}, "started": 5}', "5", "null"]  # fmt: skip


def damage_run(rng: random.Random, run: Path) -> None:
    """One or more kinds of damage to a copy of a run."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    for _ in range(rng.choice([1, 1, 2, 3])):
        match rng.randrange(9):
            case 0 | 1:
                lines = (
                    (run / "metrics.jsonl").read_text(errors="replace").splitlines() if (run / "metrics.jsonl").is_file() else []
                )
                for _ in range(rng.choice([1, 1, 3])):
                    lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
                (run / "metrics.jsonl").write_text("\n".join(lines) + rng.choice(["", "\n"]))
            case 2:
                (run / "recipe.toml").write_text(rng.choice(RECIPES))
            case 3:
                with (run / rng.choice(["events.jsonl", "segments.jsonl"])).open("a") as file:
                    file.write("\n".join(rng.choices(EVENTS + SEGMENTS, k=3)) + "\n")
            case 4:
                _odd_tokens(rng, run)
            case 5:
                path = rng.choice(files)
                if path.is_file():
                    path.unlink()
                    rng.choice(
                        [
                            path.mkdir,
                            lambda path=path: path.symlink_to("nowhere"),
                            lambda: None,
                            lambda path=path: os.mkfifo(path),
                        ]
                    )()
            case 6:
                path = rng.choice(files)
                if path.is_file():
                    path.write_bytes(rng.choice([b"", path.read_bytes()[: path.stat().st_size // 2], b"\x00" * 50]))
            case _:
                path = rng.choice([run / "metrics.jsonl", run / "recipe.toml", rng.choice(files)])
                if path.is_file():
                    path.write_bytes(damaged(rng, path.read_bytes()))


def _odd_tokens(rng: random.Random, run: Path) -> None:
    """Token files with columns missing or of other types, or none."""
    for path in sorted((run / "tokens").glob("step-*.parquet")):
        if path.is_file():
            try:
                tokens = pq.read_table(path)
            except Exception:  # damaged before
                continue
            name = rng.choice(tokens.column_names)
            kind = rng.randrange(4)
            if kind == 0:
                tokens = tokens.drop([name])
            elif kind == 1:
                odd = rng.choice([["x"], [None], [[1]], [float("inf")], [-(2**60)], [1e308]])
                tokens = tokens.set_column(tokens.column_names.index(name), name, pa.array(odd * len(tokens)))
            elif kind == 2:
                tokens = tokens.slice(0, rng.choice([0, 1, 3]))
            else:
                tokens = pa.table({name: tokens[name]})
            pq.write_table(tokens, path)
    if rng.random() < 0.3:
        (run / "tokens").mkdir(exist_ok=True)
        (run / "tokens" / rng.choice(["step-x.parquet", "step-99999999999999999999.parquet", "step-²2.parquet"])).write_bytes(b"")


def foreign(rng: random.Random, run: Path) -> None:
    """A directory that is no run, or hardly."""
    run.mkdir()
    for name in rng.sample(["recipe.toml", "metrics.jsonl", "tokens", "model", "config.json", ".lock"], rng.randrange(5)):
        if name in ("tokens", "model"):
            (run / name).mkdir()
        else:
            (run / name).write_bytes(rng.choice([b"", b"{}\n", b"[]", b"x = 1\n", b"\xff\xfe", b"\x00"]))


def runs(rng: random.Random, home: Path, sound: Path) -> Case:
    run = home / "run"
    if rng.random() < 0.1:
        foreign(rng, run)
    else:
        shutil.copytree(sound, run)
        damage_run(rng, run)
    command = rng.choice(["report", "report", "report", "explore", "eval", "track", "ablate"])
    match command:
        case "report":
            both = [str(sound)] if rng.random() < 0.2 else []
            return ["report", *rng.sample([str(run), *both], len(both) + 1), "--out", str(home / "page.html")]
        case "explore":
            return ["explore", str(run), "--no-open", "--out", str(home / "page.html")]
        case "eval":
            return ["eval", str(run), "--set", "training.eval_problems=2", "--set", "rollouts.max_tokens=4"]
        case "track":
            return ["track", str(run), "--to", "tensorboard"]
    return _half_written_ladder(rng, home, run)


def _half_written_ladder(rng: random.Random, home: Path, run: Path) -> Case:
    """Directories of a ladder whose runs are damaged, missing or foreign."""
    (home / "ladder.toml").write_text(
        "title = 'l'\nrecipe = 'quick'\nseeds = 1\n[[rungs]]\nname = 'a'\n[[rungs]]\nname = 'b'\nset = { 'learner.learning_rate' = 1e-5 }\n"
    )
    out = home / "out"
    settings, recipe_path = load_ladder(home / "ladder.toml")
    claim(settings, home / "ladder.toml", recipe_path, out)
    for name in ("1-a", "2-b"):
        if rng.random() < 0.8:
            (out / name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(
                run,
                out / name / "seed-0",
                symlinks=True,
                ignore=lambda folder, names: [
                    n for n in names if not (Path(folder) / n).exists() or (Path(folder) / n).is_fifo()
                ],
            )
    if rng.random() < 0.2:
        (out / "plan.json").write_bytes(rng.choice([b"", b"{", b"5", b"\xff", b"[]"]))
    return ["ablate", str(home / "ladder.toml"), "--out", str(out)]
