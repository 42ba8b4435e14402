"""Imports go one way, and the algorithms know nothing of the rest."""

import ast
import re
import sys
from pathlib import Path

import pytest

import groupwise

ROOT = Path(groupwise.__file__).parent
LEVELS = [
    {"algorithms"},
    {"errors", "seeding", "kept", "thresholds", "text"},
    {"files", "memory", "terminal", "copies", "descriptors"},
    {"types", "kernels", "workers", "state"},
    {"guard"},
    {"plugins"},
    {"config"},
    {"models"},
    {"tasks", "environments", "rewards", "rollouts", "learner"},
    {"training", "evidence"},
    {"experiments", "trackers", "cluster"},
    {"api", "cli"},
    {"__init__", "__main__"},
]
"""Lowest first. A package imports from itself and from lower levels, those of the tasks' level also from each other."""
PEERS = next(rooms for rooms in LEVELS if "tasks" in rooms)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name: str) -> int:
    found = [i for i, rooms in enumerate(LEVELS) if name in rooms]
    assert found, f"{name} has no place in the house; give it a level"
    return found[0]


def test_imports_go_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        own = room(path)
        for name in imports(path):
            if name.startswith("groupwise."):
                other = name.split(".")[1]
                assert other == own or level(other) < level(own) or {own, other} <= PEERS, f"{path} imports {name}"


def test_learner_and_rollouts_do_not_see_each_other() -> None:
    for own, other in (("learner", "rollouts"), ("rollouts", "learner"), ("rewards", "tasks"), ("learner", "tasks")):
        for path in (ROOT / own).glob("*.py"):
            assert not any(name.startswith(f"groupwise.{other}") for name in imports(path)), path


def test_evidence_reads_run_directories_only_and_starts_nothing() -> None:
    for path in (ROOT / "evidence").rglob("*.py"):
        for name in imports(path):
            forbidden = ("learner", "rollouts", "training", "tasks", "models")
            assert not name.startswith(tuple(f"groupwise.{room}" for room in forbidden)), path
            assert name != "subprocess", path


@pytest.mark.parametrize(
    "pattern",
    [
        r"\.forward\s*=",  # a forward replaced
        r"[\"']forward[\"']\]\s*=",
        r"ContextVar",
        r"\._groupwise_",  # private attributes on the user's module
        r"_attn_implementation",
        r"model: Any",
        r"\.(weight|grad)\b",  # which a sharded module holds as shards
    ],
)
def test_only_models_touches_a_module(pattern: str) -> None:
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("models", "kernels"):
            found = [line for line in path.read_text().splitlines() if re.search(pattern, line)]
            assert not found, f"{path}: {found}"


def test_functions_fit_a_screen_and_files_an_idea() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"


def test_a_caught_exception_of_any_kind_is_explained() -> None:
    """Where everything is caught the code called is not ours, a comment says so, and the reason is kept: the error has a name."""
    for path in ROOT.rglob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or ast.Name("Exception")) == "Exception":
                assert node.name is not None and "#" in lines[node.lineno - 1], f"{path}:{node.lineno}"


def test_algorithms_import_torch_and_the_standard_library_only() -> None:
    for path in (ROOT / "algorithms").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "torch" or name.startswith("groupwise.algorithms"), f"{path}: {name}"


def test_no_algorithm_is_asked_for_its_name() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                asked = any(isinstance(side, ast.Attribute) and ast.unparse(side).endswith("algorithm.name") for side in sides)
                assert not asked, f"{path}:{node.lineno}"
