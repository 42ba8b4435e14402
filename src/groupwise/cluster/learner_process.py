"""The process that learns: `python -m groupwise.cluster.learner_process RECIPE --host HOST --port PORT`, or several by torchrun.

RECIPE is a run's settings, whole, as in its recipe.toml. Process 0 serves at once, and loads the model meanwhile; what is wrong
with that is the answer to the first call. Whoever calls must know the secret in the environment variable TOKEN. The processes run
until somebody kills them.
"""

import argparse
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from groupwise.config import Recipe, load
from groupwise.copies import copies
from groupwise.learner.base import Learner
from groupwise.learner.local import LocalLearner
from groupwise.learner.serving import Server
from groupwise.learner.sharded import build
from groupwise.models import load_tokenizer
from groupwise.training.algorithm import build_algorithm
from groupwise.training.setup import load_for_training

TOKEN = "GROUPWISE_LEARNER_TOKEN"
"""The environment variable with the secret."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The learner of a run of several processes.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the process that trains, whose checkpoint needs this one
    if copies() > 1:  # when one process ends, torchrun sends it to the others, and process 0 has yet to say why
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ.get("RANK", "0")) == 0:
        Server(arguments.host, arguments.port, os.environ[TOKEN]).run(partial(make, arguments.recipe))
    with suppress(SystemExit):
        make(arguments.recipe)
    while True:  # the end of one process would have torchrun end process 0, which has yet to say what is wrong
        signal.pause()


def make(path: Path) -> tuple[Learner, Any]:
    """The learner of a recipe, and the tokenizer that is exported with its model. With several processes it does not return on
    those after the first, which take part in what that one is asked for.

    Raises:
        UserError: it cannot be made of the recipe, or there is not enough memory.
    """
    recipe, source = load(path, Recipe)
    algorithm = build_algorithm(recipe.algorithm, source)
    policy = partial(load_for_training, recipe, source, algorithm, copies())
    learner: Learner = build(recipe, algorithm, policy) if copies() > 1 else LocalLearner.build(recipe, algorithm, policy())
    return learner, load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)


if __name__ == "__main__":
    main()
