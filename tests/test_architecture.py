"""Imports go one way, and the algorithms know nothing of the rest."""

import ast
import sys
from pathlib import Path

import groupwise

ROOT = Path(groupwise.__file__).parent
LEVELS = [
    {"algorithms", "errors", "seeding"},
    {"types", "plugins", "kernels"},
    {"models", "config", "attention"},
    {"tasks", "rewards", "rollouts", "learner"},
    {"training", "evidence"},
    {"cluster"},
    {"cli"},
    {"__init__", "__main__"},
]
"""Lowest first; a room imports from its own level's room or from lower levels, rooms of level four also from each other."""
PEERS = LEVELS[3]


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


def test_evidence_reads_run_directories_only() -> None:
    for path in (ROOT / "evidence").glob("*.py"):
        for name in imports(path):
            assert not name.startswith(tuple(f"groupwise.{room}" for room in ("learner", "rollouts", "training", "tasks"))), path


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
