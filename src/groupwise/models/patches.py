"""The one way in which groupwise replaces a module's forward, and what it must not replace or bypass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Forwards = Iterable[tuple[Any, Callable[..., Any]]]


@contextmanager
def patched(forwards: Forwards) -> Iterator[None]:
    """Within: each module runs the given forward. Afterwards the one that was there before is back, whoever put it there."""
    forwards = list(forwards)
    # Through __dict__, since Module.__setattr__ would take 2 % of a generation's time.
    spaces: list[dict[str, Any]] = [module.__dict__ for module, _ in forwards]
    before = [attributes.get("forward") for attributes in spaces]
    try:
        for attributes, (_, forward) in zip(spaces, forwards, strict=True):
            attributes["forward"] = forward
        yield
    finally:
        for attributes, own in zip(spaces, before, strict=True):
            if own is None:
                attributes.pop("forward", None)  # the class's own is visible again
            else:
                attributes["forward"] = own


def has_own_forward(module: Any) -> bool:
    """Whether somebody has put a forward on this very module, in place of its class's."""
    return "forward" in vars(module)


def is_hooked(module: Any) -> bool:
    """Whether hooks want this module to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = torch.nn.modules.module
    return any(hooks) or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def is_observed(module: Any) -> bool:
    """Whether hooks or a forward of its own want this module to be called, so that its weights must not be used around it."""
    return has_own_forward(module) or is_hooked(module)


def is_compiled(module: Any) -> bool:
    """Whether the module, or one inside it, runs through torch.compile, which must see the modules as they are."""
    return any(inner._compiled_call_impl is not None for inner in module.modules())
