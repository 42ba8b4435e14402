"""What of a run is to be in which process, as its recipe asks, and what such a run cannot do."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from groupwise.algorithms import PARTS
from groupwise.config import ClusterSection, Recipe, Source
from groupwise.errors import nearest
from groupwise.plugins import is_reference
from groupwise.rollouts.samplers import SAMPLERS
from groupwise.rollouts.vllm import LEAST_TEMPERATURE, SET_BY

SamplerKind = Literal["native", "vllm", "addresses", "own"]
HERE = ("localhost", "127.0.0.1", "::1")
"""Hosts that are this machine."""


def sampler_kind(recipe: Recipe) -> SamplerKind:
    """What `rollouts.sampler` names. Anything unknown counts as an address."""
    sampler = recipe.rollouts.sampler
    if sampler == "native":
        return "native"
    if sampler == "vllm":
        return "vllm"
    own = isinstance(sampler, str) and (is_reference(sampler) or sampler in SAMPLERS)
    return "own" if own else "addresses"


def addresses(recipe: Recipe) -> list[str]:
    """The servers that sample and run already."""
    if sampler_kind(recipe) != "addresses":
        return []
    sampler = recipe.rollouts.sampler
    return [item.rstrip("/") for item in ([sampler] if isinstance(sampler, str) else sampler)]


def started_samplers(recipe: Recipe) -> int:
    """How many samplers the run starts in processes of their own."""
    return max(1, recipe.cluster.samplers) if sampler_kind(recipe) == "vllm" else recipe.cluster.samplers


def samples_elsewhere(recipe: Recipe) -> bool:
    """Whether other processes sample."""
    return started_samplers(recipe) > 0 or sampler_kind(recipe) == "addresses"


def learns_elsewhere(recipe: Recipe) -> bool:
    """Whether other processes learn. This one then loads no model."""
    return recipe.cluster.learners > 0


def has_processes(recipe: Recipe) -> bool:
    """Whether the run has other processes that compute."""
    return samples_elsewhere(recipe) or learns_elsewhere(recipe)


def spans_machines(recipe: Recipe) -> bool:
    """Whether processes of the run may be on other machines than this one."""
    far = any(urlsplit(address).hostname not in HERE for address in addresses(recipe))
    return far or (recipe.cluster.launcher == "ray" and bool(recipe.cluster.ray_address))


def uses_gpus(recipe: Recipe) -> bool:
    """Whether pieces of the run that are started are to have GPUs."""
    return recipe.model.device != "cpu" and (recipe.model.device != "auto" or torch.cuda.is_available())


def gpus_per_sampler(recipe: Recipe) -> int:
    return recipe.cluster.gpus_per_sampler if uses_gpus(recipe) else 0


def described(recipe: Recipe, logs: Path) -> str:
    """What of the run is where, in a line; empty: everything is in this process. `logs`: the directory of the processes' logs."""
    if not has_processes(recipe):
        return ""
    count, learners, kind = started_samplers(recipe), recipe.cluster.learners, sampler_kind(recipe)
    samplers = f"{count} {'native sampler' if kind == 'native' else 'vLLM server'}{'s' * (count > 1)}"
    if kind == "addresses":
        samplers = f"samples at {', '.join(addresses(recipe))}"
    sharded = f", sharded over {learners} processes" if learners > 1 else ""
    learner = f"a learner{sharded}" if learners else ""
    started = " and ".join([learner] * bool(learner) + [samplers] * bool(count))
    where = "by Ray" if recipe.cluster.launcher == "ray" else "on this machine"
    parts = [samplers] * (kind == "addresses") + [f"starts {where}: {started}; their logs are in {logs}"] * bool(started)
    return "; ".join(parts)


def in_one_process(recipe: Recipe) -> Recipe:
    """The same recipe, with everything in this process."""
    sampler = recipe.rollouts.sampler if sampler_kind(recipe) == "own" else "native"
    rollouts = recipe.rollouts.model_copy(update={"sampler": sampler})
    return recipe.model_copy(update={"cluster": ClusterSection(), "rollouts": rollouts})


def check_processes(recipe: Recipe, source: Source) -> None:
    """Refuse what the recipe's processes could not do together exactly as one process would, or would not read.

    Raises:
        UserError: naming the key.
    """
    _check_sampler(recipe, source)
    _check_read(recipe, source)
    _check_asynchronous(recipe.cluster, samples_elsewhere(recipe), source)
    _check_launcher(recipe, source)
    if has_processes(recipe):
        check_devices(recipe, source)
    if sampler_kind(recipe) == "vllm":
        _check_vllm(recipe, source)
    if learns_elsewhere(recipe):
        _check_importable(recipe, source)


def _check_sampler(recipe: Recipe, source: Source) -> None:
    kind, cluster, sampler = sampler_kind(recipe), recipe.cluster, recipe.rollouts.sampler
    for address in addresses(recipe):
        if address in ("vllm", *SAMPLERS):
            raise source.error("rollouts.sampler", f"a list holds addresses: write {address!r} without one")
        if not is_address(address):
            known = nearest(address, ("vllm", *SAMPLERS))
            text = f"there is no sampler {address!r}{known} (an address is written as http://host:port)"
            raise source.error("rollouts.sampler", text)
    if len(set(addresses(recipe))) < len(addresses(recipe)):
        raise source.error("rollouts.sampler", "names an address twice")
    if kind == "own" and (cluster.samplers or cluster.learners):
        key = "samplers" if cluster.samplers else "learners"
        text = f"a sampler of your own ({sampler}) runs in this process with the learner: leave cluster.{key} out"
        raise source.error(f"cluster.{key}", text)
    if kind == "addresses" and cluster.samplers:
        raise source.error("cluster.samplers", "servers at addresses run already, and none is started: leave it out")
    if learns_elsewhere(recipe) and not samples_elsewhere(recipe):
        text = "0 means that this process samples, and with cluster.learners above 0 it has no model: set it to 1 or more"
        raise source.error("cluster.samplers", text)


def is_address(text: str) -> bool:
    """Whether it is written as http://host:port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket without its other one, or a port that is no number up to 65535
        return False


def _check_read(recipe: Recipe, source: Source) -> None:
    """Refuse settings of [cluster] that this run would not read."""
    cluster, kind, stale = recipe.cluster, sampler_kind(recipe), recipe.cluster.staleness > 0
    samples, starts = started_samplers(recipe), bool(started_samplers(recipe) or recipe.cluster.learners)
    asynchronous, servers = "cluster.staleness is above 0", "rollouts.sampler = 'vllm'"
    where = {
        "window": (stale, asynchronous),
        "partial": (stale, asynchronous),
        "ray_address": (cluster.launcher == "ray", "cluster.launcher = 'ray'"),
        "gpus_per_sampler": (samples > 0, "cluster.samplers is above 0"),
        "vllm": (kind == "vllm", servers),
        "vllm_arguments": (kind == "vllm", servers),
        "timeout": (has_processes(recipe), "the run has other processes"),
        "max_restarts": (starts, "the run starts other processes"),
    }
    for key, (is_read, text) in where.items():
        if not is_read and getattr(cluster, key) != ClusterSection.model_fields[key].get_default():
            raise source.error(f"cluster.{key}", f"is read only where {text}")


def _check_asynchronous(cluster: ClusterSection, elsewhere: bool, source: Source) -> None:
    if cluster.staleness and not elsewhere:
        text = "this process cannot sample while it learns: set cluster.samplers to 1 or more, or staleness to 0"
        raise source.error("cluster.staleness", text)


def _check_launcher(recipe: Recipe, source: Source) -> None:
    cluster = recipe.cluster
    starts = started_samplers(recipe) or cluster.learners
    if cluster.launcher == "ray" and not starts:
        raise source.error("cluster.launcher", "starts nothing: set cluster.samplers or cluster.learners")
    if cluster.weights and not samples_elsewhere(recipe):
        raise source.error("cluster.weights", "no other process samples, so that no weights are published")
    if cluster.weights and not Path(cluster.weights).is_dir():
        raise source.error("cluster.weights", f"there is no directory {cluster.weights}")
    if cluster.weights and not os.access(cluster.weights, os.W_OK):
        raise source.error("cluster.weights", f"{cluster.weights} cannot be written")


def check_devices(recipe: Recipe, source: Source) -> None:
    """Refuse a device that all processes of a run would share.

    Raises:
        UserError: naming the key.
    """
    device, cluster = recipe.model.device, recipe.cluster
    if device not in ("auto", "cpu", "cuda"):
        text = f"{device!r}: processes of a run are given devices one by one: 'auto', 'cpu' or 'cuda'"
        raise source.error("model.device", text)
    if sampler_kind(recipe) == "native" and cluster.samplers and cluster.gpus_per_sampler > 1:
        raise source.error("cluster.gpus_per_sampler", "the native sampler runs on one GPU; vLLM splits the model over several")


def check_head(recipe: Recipe, config: Any, source: Source) -> None:
    """Refuse an adapter that unties the output layer from the embeddings where samplers of other processes keep it tied.

    Args:
        config: the model's.

    Raises:
        UserError: naming the key.
    """
    lora = recipe.model.lora
    if lora is None or not samples_elsewhere(recipe) or not getattr(config, "tie_word_embeddings", False):
        return
    for target in lora.targets:
        if target.rpartition(".")[2] == "lm_head":
            text = (
                f"{target!r} is tied to the embeddings in this model, and an adapter would untie it, which samplers in other "
                "processes cannot load: leave it out, or sample in this process"
            )
            raise source.error("model.lora.targets", text)


def _check_vllm(recipe: Recipe, source: Source) -> None:
    rollouts = recipe.rollouts
    if rollouts.cache_dtype is not None:
        text = "is the native sampler's; vLLM has --kv-cache-dtype, for cluster.vllm_arguments"
        raise source.error("rollouts.cache_dtype", text)
    for argument in recipe.cluster.vllm_arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if name in SET_BY:
            text = f"{argument!r}: {SET_BY[name]} decides on this"
            raise source.error("cluster.vllm_arguments", text)
    if rollouts.temperature < LEAST_TEMPERATURE:
        text = f"vLLM samples at {LEAST_TEMPERATURE:g} instead, without a word: choose as much or more"
        raise source.error("rollouts.temperature", text)
    limits: Sequence[tuple[str, bool]] = (
        ("top_p", rollouts.top_p < 1),
        ("top_k", rollouts.top_k > 0),
        ("min_p", rollouts.min_p > 0),
    )
    for key, limited in limits:
        if limited:
            text = (
                "vLLM does not say which tokens it left out, without which the learner cannot compute what it sampled from: "
                "leave it out, or sample with 'native'"
            )
            raise source.error(f"rollouts.{key}", text)


def _check_importable(recipe: Recipe, source: Source) -> None:
    """Parts given from Python can be used by the learner's process only if it can load them from a file."""
    for key in PARTS:
        reference = getattr(recipe.algorithm.get(key), "reference", None)
        if reference is None:
            continue
        file, _, name = reference.rpartition(":")
        if not Path(file).is_file() or "." in name or "<" in name:
            text = f"{reference} is in no file from which the learner's process could load it: put it into one"
            raise source.error(f"algorithm.{key}", text)


def check_gpus(recipe: Recipe, source: Source, there: int) -> None:
    """Refuse a run whose pieces need more GPUs than this machine has.

    Raises:
        UserError: naming the key.
    """
    if not uses_gpus(recipe):
        return
    learners, samplers, each = max(1, recipe.cluster.learners), started_samplers(recipe), gpus_per_sampler(recipe)
    if (needed := learners + samplers * each) > there:
        text = f"{learners} for learning and {samplers} x {each} for sampling are {needed} GPUs, and {there} are here"
        raise source.error("cluster.samplers" if samplers else "cluster.learners", text)
