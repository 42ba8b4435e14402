"""What a worker process runs for the task reasoning-gym: the library's generators."""

from functools import cache
from json import dumps, loads
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS


def names() -> list[str]:
    """Of its generators."""
    return sorted(DATASETS)


def entry(name: str, config: dict[str, Any], seed: int, size: int, index: int) -> tuple[str, str]:
    """Question and answer at an index of what a generator makes."""
    found = _dataset(name, dumps(config), seed, size)[index]
    return str(found["question"]), "" if found["answer"] is None else str(found["answer"])


@cache
def _dataset(name: str, config: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **loads(config))
