"""The JSON of `POST /inference/v1/generate`: token ids in; out come token ids, log-probabilities and which weights made them.

The shapes are those of vLLM 0.32, so that a client may send the same to a `vllm serve`. What vLLM has no field for is under
"groupwise", in requests and in choices: random numbers shared by a group, handles of kept completions, kept sets, and
log-probabilities as the bytes of their float32, which take a fifth of the size and of the time of decimal numbers.
"""

import base64
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from groupwise.errors import RunError, UserError, nearest
from groupwise.kept import KeptTokens
from groupwise.rollouts.base import Request, Sampling
from groupwise.types import Completion, VersionSpan

GENERATE = "/inference/v1/generate"
"""Body: `GenerateBody`; response: what `encode_answer` gives, and the names of request and model."""
LOAD = "/load"
"""Body: `LoadBody`; response: {"id": that of the weights}. Refused (400, with the reason) where the weights are not this model's.
Requests in flight go on with the new weights, from keys and values that these have computed."""
PAUSE, RESUME = "/pause", "/resume"
"""PAUSE?mode=keep: no decoding step from now on, and RESUME goes on; =wait: finish what runs before; =abort: end it."""
HEALTH = "/health"
"""Response: {"id": of the weights, "model": the path it was started with, "waiting": requests, "rows": being generated, "kept":
completions that can be continued, "steps": decoding steps so far, "paused": whether, "seconds": since the start}. While rows are
being generated and `steps` stands still, the engine hangs."""
Count = Annotated[int, Field(ge=1, lt=2**31)]
NotNegative = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Stop = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]


class Aborted(RunError):
    """The server ended the request before it was finished, as `/pause?mode=abort` makes it."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Body)


class SamplingParameters(Body):
    """vLLM's `sampling_params`, as far as the native engine knows them; penalties only where they change nothing."""

    n: Count = 1
    max_tokens: Count = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: take the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: TopK = 0
    """0 and -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Seed | None = None
    """None: another one for each request."""
    stop: Stop | list[Stop] | None = None
    stop_token_ids: list[Token] | None = None
    logprobs: Literal[0] | None = None
    """0: the log-probability of each sampled token."""
    prompt_logprobs: Literal[0] | None = None
    """0: the log-probability of each token of the prompt but the first, at the temperature 1."""
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    repetition_penalty: One = 1
    detokenize: bool = True
    """This and the next two say how text is made of tokens; the route returns no text."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def sampling(self) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            stop=tuple(stop),
            stop_tokens=tuple(self.stop_token_ids or ()),
        ).greedy_as_limit()


class NativeFields(Body):
    """What only the native engine does; see `Request`."""

    offset: Annotated[int, Field(ge=0, le=2**32)] = 0
    """Limited, since random numbers are passed over one by one while nothing else runs."""
    keep: bool = False
    continues: NotNegative | None = None


class GenerateBody(Body):
    """A request."""

    token_ids: Annotated[list[Token], Field(min_length=1)]
    sampling_params: SamplingParameters = SamplingParameters()
    groupwise: NativeFields | None = None
    """Given: choices have a field of this name too, which holds log-probabilities and kept sets."""
    model: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    """Without effect: no key or value outlives the weights that made it."""

    def request(self) -> Request:
        native, parameters = self.groupwise or NativeFields(), self.sampling_params
        return Request(
            prompt=torch.tensor(self.token_ids),
            sampling=parameters.sampling(),
            seed=secrets.randbits(56) if parameters.seed is None else parameters.seed,
            offset=native.offset,
            n=parameters.n,
            keep=native.keep,
            continues=native.continues,
        )


class LoadBody(Body):
    """Weights to sample from."""

    directory: str
    """As `Learner.publish` writes it."""
    id: Annotated[str, Field(min_length=1)]
    """What `weight_versions` calls these weights from now on."""


def parsed(kind: type[Kind], body: Any) -> Kind:
    """A body that has been read from JSON, checked.

    Raises:
        UserError: naming the field that is unknown, unsupported or of the wrong type.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            problem = f"is unknown or unsupported{_near(kind, place)}"
        elif isinstance(given := first["input"], bool | int | float | str):
            problem = f"{first['msg']}, not {given!r:.60}"
        else:
            problem = str(first["msg"])
        raise UserError(f"{'.'.join(place) or 'the body'}: {problem}") from error


def _near(kind: type[Body], place: list[str]) -> str:
    """ ", did you mean …?" for an unknown field at that place."""
    for part in place[:-1]:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        found = [one for one in getattr(annotation, "__args__", (annotation,)) if isinstance(one, type) and issubclass(one, Body)]
        if not found:
            return ""
        kind = found[0]
    return nearest(place[-1], list(kind.model_fields))


# --- requests


def sampling_params(sampling: Sampling, seed: int, n: int = 1) -> dict[str, Any]:
    """vLLM's `sampling_params` for a request; log-probabilities are asked for by `logprobs` or by "groupwise" beside them."""
    return {
        "n": n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_tokens),
        "seed": seed,
    }


def encode_request(request: Request) -> dict[str, Any]:
    """The body of a request to the native engine."""
    return {
        "token_ids": request.prompt.tolist(),
        "sampling_params": sampling_params(request.sampling, request.seed, request.n),
        "groupwise": {"offset": request.offset, "keep": request.keep, "continues": request.continues},
    }


# --- completions


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answers a request with, besides the names of things."""

    completions: Sequence[Completion]
    aborted: int = 0
    """Instead of completions: so many choices that were ended by `/pause?mode=abort`."""
    prompt_logprobs: Tensor | None = None
    """float32 [L - 1], of the tokens of the prompt but the first."""


def encode_answer(body: GenerateBody, answer: Answer, name_of: Callable[[int], str]) -> dict[str, Any]:
    """The fields of a response that come from the engine.

    Args:
        name_of: the id of the weights that a version of `Completion.versions` stands for.
    """
    choices = []
    for index, completion in enumerate(answer.completions):
        tokens = completion.tokens.tolist()
        choice = {
            "index": index,
            "token_ids": tokens,
            "logprobs": None,
            "finish_reason": completion.stop,
            "weight_versions": encode_versions(completion, name_of),
        }
        if body.sampling_params.logprobs is not None:
            pairs = zip(tokens, completion.logprobs.tolist(), strict=True)
            choice["logprobs"] = {"content": [{"token_id": token, "logprob": logprob} for token, logprob in pairs]}
        if body.groupwise is not None:
            choice["groupwise"] = _native_fields(completion)
        choices.append(choice)
    choices += [{"index": index, "token_ids": [], "finish_reason": "abort"} for index in range(answer.aborted)]
    prompt = None if answer.prompt_logprobs is None else _encode_prompt(body.token_ids, answer.prompt_logprobs)
    return {"choices": choices, "prompt_logprobs": prompt}


def encode_versions(completion: Completion, name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Which weights made which tokens."""
    return [{"version": name_of(span.version), "start": span.start, "end": span.end} for span in completion.versions]


def _native_fields(completion: Completion) -> dict[str, Any]:
    kept = completion.kept
    return {
        "text": completion.text,
        "logprobs": _encode_array(completion.logprobs, "<f4"),
        "handle": completion.handle,
        "kept": None
        if kept is None
        else {"words": _encode_array(kept.words, "<i4"), "ends": _encode_array(kept.ends, "<i8"), "vocabulary": kept.vocabulary},
    }


def decode_answer(
    body: Mapping[str, Any],
    n: int,
    *,
    version_of: Callable[[str], int],
    text_of: Callable[[list[list[int]]], list[str]],
) -> tuple[Completion, ...]:
    """The completions of a response, of the native engine or of vLLM.

    Args:
        n: how many were asked for.
        version_of: how many optimiser updates had made the weights of that id.
        text_of: decodes the tokens of completions that come without their text, as vLLM's do.

    Raises:
        Aborted: the server ended the request before it was finished.
        RunError: the response lacks something, or contradicts itself.
    """
    try:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise Aborted("the server ended the request before it was finished")
        if len(choices) != n:
            raise ValueError(f"{len(choices)} completions for a request of {n}")
        tokens = [choice["token_ids"] for choice in choices]
        native = [choice.get("groupwise") for choice in choices]
        texts = text_of(tokens) if None in native else [fields["text"] for fields in native]
        return tuple(_decode_choice(choice, text, version_of) for choice, text in zip(choices, texts, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the response is not one of {GENERATE}: {type(error).__name__}: {error}") from error


def _decode_choice(choice: Mapping[str, Any], text: str, version_of: Callable[[str], int]) -> Completion:
    tokens, native = torch.tensor(choice["token_ids"], dtype=torch.long), choice.get("groupwise") or {}
    if native:
        logprobs = _decode_array(native["logprobs"], "<f4")
    else:
        logprobs = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]], dtype=torch.float32)
    if not len(tokens) or len(tokens) != len(logprobs):
        raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
    if not logprobs.isfinite().all():
        raise ValueError("log-probabilities that are not finite")
    if (stop := choice["finish_reason"]) not in ("stop", "length"):
        raise ValueError(f"finish_reason is {stop!r}")
    spans = [VersionSpan(span["start"], span["end"], version_of(span["version"])) for span in choice["weight_versions"]]
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != len(tokens) or ends != sorted(ends):
        raise ValueError(f"weight_versions do not cover {len(tokens)} tokens: {choice['weight_versions']}")
    kept = native.get("kept")
    return Completion(
        text=text,
        tokens=tokens,
        logprobs=logprobs,
        mask=torch.ones(len(tokens), dtype=torch.bool),
        stop=stop,
        versions=tuple(spans),
        kept=None
        if kept is None
        else KeptTokens(
            words=_decode_array(kept["words"], "<i4"), ends=_decode_array(kept["ends"], "<i8"), vocabulary=kept["vocabulary"]
        ),
        handle=native.get("handle"),
    )


# --- log-probabilities of a given text


def encode_probe(tokens: Tensor) -> dict[str, Any]:
    """The body that asks for the log-probabilities of given tokens (int64 [L], at least two), and samples one more, which is the
    least that the route gives."""
    parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "seed": 0}
    return {"token_ids": tokens.tolist(), "sampling_params": parameters}


def decode_probe(body: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """float32 [L - 1]: the log-probability of each of these tokens but the first.

    Raises:
        RunError: the response lacks something.
    """
    try:
        entries = body["prompt_logprobs"][1:]
        pairs = zip(entries, tokens.tolist()[1:], strict=True)
        return torch.tensor([entry[str(token)]["logprob"] for entry, token in pairs], dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"the response has no log-probabilities of the prompt: {type(error).__name__}: {error}") from error


def _encode_prompt(tokens: list[int], logprobs: Tensor) -> list[dict[str, dict[str, float]] | None]:
    pairs = zip(tokens[1:], logprobs.tolist(), strict=True)
    return [None, *({str(token): {"logprob": logprob}} for token, logprob in pairs)]


# --- arrays


def _encode_array(tensor: Tensor, kind: str) -> str:
    return base64.b64encode(tensor.cpu().numpy().astype(kind, copy=False).tobytes()).decode()


def _decode_array(text: str, kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), kind).copy())
