"""The process that learns: `python -m groupwise.cluster.learner_process RECIPE --host HOST --port PORT`.

RECIPE is a run's settings, whole, as in its recipe.toml. The process serves at once, and loads the model meanwhile; what is wrong
with that is the answer to the first call. Whoever calls must know the secret in the environment variable TOKEN.
"""

import argparse
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from groupwise.config import Recipe, load
from groupwise.learner.base import Learner
from groupwise.learner.local import LocalLearner
from groupwise.learner.serving import Server
from groupwise.models import load_tokenizer
from groupwise.training.algorithm import build_algorithm
from groupwise.training.setup import load_policy
from groupwise.training.sizes import check_training

TOKEN = "GROUPWISE_LEARNER_TOKEN"
"""The environment variable with the secret."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The learner of a run of several processes.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, signal.SIG_IGN
        )  # Ctrl-C is for the process that trains, which then needs this one for its checkpoint
    Server(arguments.host, arguments.port, os.environ[TOKEN]).run(partial(make, arguments.recipe))


def make(path: Path) -> tuple[Learner, Any]:
    """The learner of a recipe, and the tokenizer that is exported with its model.

    Raises:
        UserError: it cannot be made of the recipe, or there is not enough memory.
    """
    recipe, source = load(path, Recipe)
    algorithm = build_algorithm(recipe.algorithm, source)
    model = load_policy(recipe, source)
    check_training(recipe, algorithm, model, source)
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    return LocalLearner.build(recipe, algorithm, model), tokenizer


if __name__ == "__main__":
    main()
