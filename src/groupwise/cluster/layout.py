"""Which processes a recipe asks for, and the commands that start them."""

from pathlib import Path

from groupwise.cluster.learner_process import TOKEN
from groupwise.cluster.piece import Piece
from groupwise.config import Recipe
from groupwise.rollouts import vllm
from groupwise.training.processes import gpus_per_sampler, sampler_kind, started_samplers, uses_gpus

LEARNER = "learner"
GRACE = 5.0
"""Seconds that vLLM has to end by itself."""
PYTHON = ["{python}", "-m"]
AT = ["--host", "{host}", "--port", "{port}"]


def sampler_name(index: int) -> str:
    return f"sampler {index}"


def sampler_pieces(recipe: Recipe, settings: Path) -> list[Piece]:
    """The samplers that the run starts.

    Args:
        settings: the recipe, whole, in a file that they see.
    """
    count, gpus = started_samplers(recipe), gpus_per_sampler(recipe)
    environment, grace = dict[str, str](), 0.0
    if sampler_kind(recipe) == "vllm":
        command, environment = vllm.command(recipe, host="{host}", port="{port}", gpus=gpus)
        grace = GRACE
    else:
        device = [] if gpus else ["--set", "model.device=cpu"]
        command = [*PYTHON, "groupwise", "serve", str(settings), *AT, *device]
    # Where learning and sampling take turns, each has all cores.
    share = count + (max(1, recipe.cluster.learners) if recipe.cluster.staleness else 0)
    return [
        Piece(name=sampler_name(index), command=command, environment=environment, gpus=gpus, processes=share, grace=grace)
        for index in range(count)
    ]


def learner_piece(recipe: Recipe, settings: Path, token: str) -> Piece:
    """The learner that the run starts.

    Args:
        token: the secret that whoever calls it must know.
    """
    count = recipe.cluster.learners
    share = count + (started_samplers(recipe) if recipe.cluster.staleness else 0)
    shards = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"] if count > 1 else []
    command = [*PYTHON, *shards, "groupwise.cluster.learner_process", str(settings), *AT]
    gpus = count if uses_gpus(recipe) else 0
    return Piece(name=LEARNER, command=command, environment={TOKEN: token}, gpus=gpus, processes=share)
