"""Modules and tokenizers: shipped with the package, local, from the Hugging Face hub, new with random weights, or given."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from groupwise.errors import UserError, nearest
from groupwise.memory import need
from groupwise.models.adapters import adapter_layers, load_adapters
from groupwise.models.patches import is_observed
from groupwise.models.safety import refuse_kernels, refuse_pickles, show_logs

SHIPPED = ("arithmetic-base", "tools-base")
ADAPTER_CONFIG = "adapter_config.json"
MOST_LAYERS = 4096
"""Of a new model; to make a layer takes milliseconds, whatever its size."""
END, PAD = "<end>", "<pad>"


def shipped_path(name: str) -> Path:
    with as_file(files("groupwise") / "assets" / name) as path:
        return path


def resolve(path: str) -> str:
    """A shipped model's directory, a local directory, or a Hugging Face id left as it is.

    Raises:
        UserError: nothing of that name can be meant.
    """
    if path in SHIPPED:
        return str(shipped_path(path))
    if Path(path).is_dir():
        if not ((Path(path) / "config.json").is_file() or is_adapter(path)):
            raise UserError(f"no config.json in the directory {path}: not a Hugging Face model")
        return path
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"no model {path!r}: not a shipped one, a directory or a Hugging Face id{nearest(path, SHIPPED)}")
    return path


def directory_of(path: str) -> Path | None:
    """Where the files of a model are: a local directory, or its place in the cache of the Hugging Face hub; None: nowhere yet."""
    if Path(path).is_dir():
        return Path(path)
    if path in SHIPPED or path.count("/") != 1:
        return None
    try:
        return Path(cached_file(path, "config.json", local_files_only=True)).parent
    except (OSError, ValueError):  # not in the cache, or no id
        return None


def is_adapter(path: str) -> bool:
    """Whether a directory holds peft adapters and not a model."""
    return (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str) -> str:
    """The model at `path`, or if adapters are there the one that they belong to.

    Raises:
        UserError: they do not say which that is.
    """
    if not is_adapter(path):
        return path
    try:
        base = json.loads((Path(path) / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"{path}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    if not base:
        raise UserError(f"{path}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    return str(base)


@contextmanager
def _explained(path: str, *, own_code: bool = True) -> Iterator[None]:
    """Turn whatever transformers raises about a model's files into one message; `own_code`: a recipe can allow the model's."""
    transformers_logging.disable_progress_bar()
    show_logs()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files we do not control: missing, damaged, of another kind
        text = str(error) or type(error).__name__
        if "trust_remote_code" in text:
            allowed = "read that code, and if you trust it set model.trust_remote_code = true"
            raise UserError(
                f"the model {path!r} comes with Python code of its own, which loading it would run; "
                f"{allowed if own_code else 'such models cannot be used here'}"
            ) from error
        raise UserError(f"cannot load the model {path!r}: {text.splitlines()[0]}") from error


def load_module(path: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face causal language model at `path`, in evaluation mode (no dropout).

    Of a directory with adapters: their base, with the adapters merged into it. Weights are read from safetensors only, since
    loading others can run code.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    resolved = resolve(base_of(resolve(path)))
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    with _explained(path):
        for directory in {resolved, path}:
            refuse_pickles(directory)
        refuse_kernels(load_config(path, trust_remote_code=trust_remote_code), path)
        module = AutoModelForCausalLM.from_pretrained(resolved, dtype=dtype, **settings)
        if is_adapter(path):
            module = load_adapters(module, path)
            module.name_or_path = path  # adapters trained on it must not name the base without these
    check_finite(module, path)
    return module.eval()


def check_finite(module: Any, path: str) -> None:
    """Raises:
    UserError: a weight is infinite or NaN.
    """
    for name, parameter in module.named_parameters():
        # A sum of finite numbers is hardly ever not finite, and one pass over them; only then each is looked at.
        if parameter.is_floating_point() and not parameter.detach().sum(dtype=torch.float32).isfinite():
            bad = int((~parameter.detach().isfinite()).sum())
            if bad:
                raise UserError(
                    f"the model {path!r} has weights that are not finite: {bad} of {parameter.numel()} in {name}. Its file is "
                    "damaged, or its training diverged"
                )


def load_classifier(path: str) -> Any:
    """The sequence classifier with one output at `path`, in evaluation mode and float32. Weights are read from safetensors, and
    no code that comes with them is run.

    Raises:
        UserError: there is no such model, or its files hold no such head.
    """
    resolved = resolve(path)
    with _explained(path, own_code=False):
        refuse_pickles(resolved)
        refuse_kernels(AutoConfig.from_pretrained(resolved, trust_remote_code=False), path)
        module, info = AutoModelForSequenceClassification.from_pretrained(
            resolved,
            num_labels=1,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if missing:
        raise UserError(f"{path!r} is no reward model with one output: its weights lack {', '.join(missing[:3])}")
    return module.eval()


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of the model at `path`, without its weights."""
    with _explained(path):
        return AutoConfig.from_pretrained(model_path(path), trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer at `path`: of a shipped model, a local directory, or a Hugging Face id.

    Raises:
        UserError: there is none, or it has no end-of-sequence token.
    """
    with _explained(path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(path), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path!r} has no end-of-sequence token, so no completion could end")
    return tokenizer


def model_path(path: str) -> str:
    """Where the configuration and the weights are: for adapters, those of the model under them."""
    return resolve(base_of(resolve(path)))


def tokenizer_path(path: str) -> str:
    """Where the tokenizer is: adapters may have one of their own."""
    resolved = resolve(path)
    own = not is_adapter(resolved) or (Path(resolved) / "tokenizer_config.json").is_file()
    return resolved if own else model_path(path)


def stored_end_tokens(path: str, tokenizer: Any, *, trust_remote_code: bool = False) -> set[int]:
    """What `LanguageModel.end_tokens` is of the model at `path`, which is not loaded."""
    try:
        settings = GenerationConfig.from_pretrained(model_path(path))
    except OSError:  # it has none: transformers makes one of the model's configuration
        settings = GenerationConfig.from_model_config(load_config(path, trust_remote_code=trust_remote_code))
    return end_tokens(settings, tokenizer)


def end_tokens(settings: GenerationConfig | None, tokenizer: Any) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the generation settings; chat models may have several."""
    configured = getattr(settings, "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in more if token is not None)}


def stored_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype | None:
    """The dtype of the weights in the directory at `path`: as its configuration says, else as its files are; None: unknown."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    files = sorted(Path(model_path(path)).glob("*.safetensors"))
    if found is None and files:
        with _explained(path), safe_open(str(files[0]), "pt") as file:
            found = file.get_tensor(next(iter(file.keys()))).dtype
    return getattr(torch, found) if isinstance(found, str) else found


def character_tokenizer(
    characters: str, words: Sequence[str] = (), *, special: Sequence[str] = (), chat_template: str = ""
) -> PreTrainedTokenizerFast:
    """One token per character of `characters`, and an end and a padding token.

    Args:
        characters: of one token each.
        words: texts that are one token each, wherever they occur; of two that begin alike the longer is taken.
        special: special tokens; the last one ends a turn, in place of "<end>".
        chat_template: Jinja; empty: none.
    """
    end = special[-1] if special else END
    vocabulary = {token: i for i, token in enumerate([PAD, *(special or [END]), *characters, *words])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=PAD))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join([*(re.sub(r"(\W)", r"\\\1", word) for word in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=PAD, clean_up_tokenization_spaces=False)
    if chat_template:
        found.chat_template = chat_template
    return found


def new_module(architecture: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """A Hugging Face module with random weights; `architecture` is a transformers configuration: model_type and its settings.

    Raises:
        UserError: the model type is unknown.
    """
    settings = dict(architecture)
    model_type = str(settings.pop("model_type"))
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        raise UserError(f"unknown model_type {model_type!r}{nearest(model_type, known.keys())}")
    config_class = known[model_type]
    for key in settings:
        hint = nearest(key, [name for name in vars(config_class()) if not name.startswith("_")])
        if not hasattr(config_class(), key) and "did you mean" in hint:  # models also read settings without a default
            raise UserError(f"{model_type} has no setting {key!r}{hint}")
    for key, value in settings.items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:  # before the configuration lists each of them
            raise UserError(f"{key} = {value:,}: at most {MOST_LAYERS:,}")
    with _explained(model_type):
        config = config_class(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **settings,
        )
        _check_size(config)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _check_size(config: Any) -> None:
    """
    Raises:
        UserError: a new model's weights, gradients and AdamW's moments could not be held.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            shapes = [weight.numel() for weight in AutoModelForCausalLM.from_config(config, dtype=torch.float32).parameters()]
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"a model of this size cannot be made: {str(error).splitlines()[0]}") from error
    need(4 * 4 * sum(shapes), f"training a model of {sum(shapes):,} parameters")


def decoder_of(module: Any) -> Any:
    """The model without its output layer."""
    candidates = module.base_model, module.get_decoder(), getattr(module, "model", module)
    return next((found for found in candidates if found is not module), module)


def causal_model(module: Any) -> Any:
    """The transformers model in what was given.

    Raises:
        UserError: it is none, or forward hooks or a replaced forward on it would be bypassed, since only its decoder and output
            layer are called.
    """
    if hasattr(module, "_orig_mod"):
        raise UserError("torch.compile(model) hides the model's layers; give the model itself and set model.compile = true")
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            "peft's prompt learning changes the model's inputs, which groupwise gives to its decoder itself; use LoRA"
        )
    if not isinstance(inner, PreTrainedModel):
        raise UserError(f"{type(module).__name__} is not a transformers causal language model")
    if any(getattr(layer, "merged", False) for layer in adapter_layers(inner)):
        raise UserError("peft's adapters are merged into the model's weights; call unmerge_adapter() or merge_and_unload() first")
    for outer in {id(module): module, id(inner): inner}.values():
        if is_observed(outer):
            raise UserError(
                f"forward hooks or a replaced forward on {type(outer).__name__} would be bypassed: groupwise calls its decoder "
                f"(model.{inner.base_model_prefix}) and its output layer; attach them there"
            )
        if outer._compiled_call_impl is not None:
            raise UserError("model.compile() would be bypassed; compile the decoder instead: set model.compile = true")
    return inner
