"""The named algorithms, and how flat settings become an `Algorithm`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from groupwise.algorithms.algorithm import PARTS, Algorithm
from groupwise.algorithms.part import OwnPart, nearest


@dataclass(frozen=True, slots=True)
class Entry:
    """A named algorithm: how it differs from the defaults, in a line, and where it comes from."""

    settings: Mapping[str, Any]
    summary: str
    paper: str


_GRPO = {"beta": 0.04}
_GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
NAMED: dict[str, Entry] = {
    "ppo": Entry(
        {"advantage": "gae", "kl_reward": 0.05},
        "a learned critic's advantages, token ratios, a KL penalty in the reward",
        "arXiv 1707.06347",
    ),
    "reinforce": Entry(
        {"scale": "none", "bounds": "none", "surrogate": "policy_gradient"},
        "reward minus the group's mean, times log pi",
        "Williams 1992",
    ),
    "grpo": Entry(_GRPO, "rewards normalised within the group, token ratios, k3 penalty", "arXiv 2402.03300"),
    "grpo_process": Entry({**_GRPO, "advantage": "process"}, "GRPO on rewards of steps", "arXiv 2402.03300"),
    "dapo": Entry(
        {
            "clip_high": 0.28,
            "aggregation": "token_mean",
            "dynamic_sampling": True,
            "overlong_cache": 0.2,
            "outcome_rewards": (1.0, -1.0, -1.0),
        },
        "decoupled clip, dynamic sampling, token-level loss, overlong shaping",
        "arXiv 2503.14476",
    ),
    "gspo": Entry(_GSPO, "one ratio per sequence: the geometric mean of its tokens'", "arXiv 2507.18071"),
    "gspo_token": Entry({**_GSPO, "ratio": "sequence_token"}, "GSPO with advantages per token", "arXiv 2507.18071"),
    "dcpo": Entry(
        {
            "advantage": "smoothed",
            "bounds": "dynamic",
            "clip_low": 0.16,
            "clip_high": 0.2,
            "ratio_cap": 10.0,
            "aggregation": "sequence_sum",
            "outcome_rewards": (1.0, 0.0, -1.0),
        },
        "clip bounds by token probability, advantages smoothed over visits",
        "arXiv 2509.02333",
    ),
    "dr_grpo": Entry({"scale": "none", "aggregation": "constant"}, "GRPO without the std and without 1/|o|", "arXiv 2503.20783"),
    "lite_ppo": Entry(
        {"scale": "batch", "aggregation": "token_mean"}, "group mean, batch std, token-level loss", "arXiv 2508.08221"
    ),
    "rloo": Entry(
        {"advantage": "leave_one_out", "bounds": "none", "surrogate": "policy_gradient", "aggregation": "constant"},
        "reward minus the mean of the group's others, one action: the whole sequence",
        "arXiv 2402.14740",
    ),
    "reinforce_pp": Entry(
        {"advantage": "reward_to_go", "kl_reward": 0.01, "aggregation": "token_mean"},
        "rewards to go with a KL penalty, whitened over the batch's tokens; token ratios",
        "arXiv 2501.03262",
    ),
    "cispo": Entry(
        {"surrogate": "cispo", "bounds": "none", "ratio_cap": 5.0, "aggregation": "token_mean"},
        "the ratio clipped as a weight, so that every token keeps its gradient",
        "arXiv 2506.13585",
    ),
    "sapo": Entry({"surrogate": "sapo", "bounds": "none"}, "a smooth gate in place of the clip", "arXiv 2511.20347"),
    "gmpo": Entry(
        {"surrogate": "gmpo", "bounds": "exponential", "clip_low": 0.4, "clip_high": 0.4},
        "the geometric mean of clipped token ratios",
        "arXiv 2507.20673",
    ),
    "dppo": Entry(
        {"surrogate": "dppo", "bounds": "none", "aggregation": "token_mean"},
        "tokens masked by how far their probability moved",
        "arXiv 2602.04879",
    ),
    "vespo": Entry(
        {"surrogate": "vespo", "bounds": "none", "aggregation": "token_mean"},
        "log pi weighted by a smooth kernel of the whole sequence's ratio",
        "arXiv 2602.10693",
    ),
    "gdpo": Entry(
        {"advantage": "decoupled"},
        "each of several rewards normalised within the group, their sum over the batch",
        "arXiv 2601.05242",
    ),
    "maxrl": Entry(
        {"scale": "mean", "aggregation": "token_mean"},
        "advantages over the group's pass rate: hard prompts count more",
        "arXiv 2602.02710",
    ),
}
"""Name -> how it differs from the defaults of the parts."""


def named(name: str, **changes: Any) -> Algorithm:
    """A named algorithm with its paper's defaults, some of them changed.

    Args:
        name: one of `NAMED`, or "custom" for the plain defaults.
        changes: settings of the algorithm and of its parts, flat; a part by name, or one of your own: a function, or a frozen
            dataclass (its fields are then settings too) or a value of one.

    Raises:
        ValueError: an unknown name or setting (the nearest known one is in the message), a setting that no chosen part reads,
            or a mix without meaning.
    """
    if name not in NAMED and name != "custom":
        raise ValueError(f"there is no algorithm {name!r}{nearest(name, NAMED)}")
    settings = merged(name, changes)
    parts: dict[str, Any] = {}
    read = set(PARTS)
    for kind in PARTS:
        target = target_of(kind, settings[kind])
        own = {key: settings[key] for key in part_settings(target) if key in settings}
        parts[kind] = target(**own) if isinstance(target, type) else target
        read |= own.keys()
    general: dict[str, Any] = {key: settings[key] for key in general_settings() if key in settings}
    for key in changes:
        if key not in read and key not in general:
            raise ValueError(f"{key}: {_why_unread(key, settings)}")
    references = {kind: choice.reference for kind in PARTS if isinstance(choice := settings[kind], OwnPart)}
    return Algorithm(name=name, references=references, **parts, **general)


def merged(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a named algorithm with the changes, every kind of part chosen."""
    defaults = Algorithm()
    settings = {kind: defaults.choice(kind) for kind in PARTS}
    settings |= NAMED[name].settings if name in NAMED else {}
    settings |= changes
    # Bounds that the named algorithm brought do not bind a surrogate that reads none.
    surrogate = target_of("surrogate", settings["surrogate"])
    if not getattr(surrogate, "reads_bounds", True) and not {"bounds", "clip_low", "clip_high"} & changes.keys():
        settings["bounds"] = "none"
    return settings


def target_of(kind: str, choice: Any) -> Callable[..., Any]:
    """What a choice of a part means: a function, a value, or a class to be made with its settings.

    Raises:
        ValueError: there is no part of that name.
    """
    if isinstance(choice, OwnPart):
        return choice.target
    if callable(choice):
        own: Callable[..., Any] = choice
        return own
    if not isinstance(choice, str) or choice not in PARTS[kind]:
        raise ValueError(f"{kind}: there is no {choice!r}{nearest(choice, PARTS[kind])}")
    return PARTS[kind][choice].make


def part_settings(target: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a part's class with their types; none for a function or a value that is made already."""
    if not (isinstance(target, type) and is_dataclass(target)):
        return {}
    return {field.name: field.type for field in fields(target)}


def general_settings() -> dict[str, Any]:
    """The settings of every algorithm that belong to no part, with their types."""
    return {field.name: field.type for field in fields(Algorithm) if field.name not in {*PARTS, "name", "references"}}


def _why_unread(key: str, settings: Mapping[str, Any]) -> str:
    owners: dict[str, list[str]] = {}
    for kind, choices in PARTS.items():
        for name, choice in choices.items():
            if key in part_settings(choice.make):
                owners.setdefault(kind, []).append(name)
    if not owners:
        known = {key for choices in PARTS.values() for choice in choices.values() for key in part_settings(choice.make)}
        return f"no algorithm has this setting{nearest(key, {*PARTS, *general_settings(), *known})}"
    chosen = " and ".join(f"{kind} = {settings[kind]!r}" for kind in owners)
    readers = "; ".join(f"{kind} {', '.join(names)}" for kind, names in owners.items())
    return f"{chosen} does not use it; it belongs to {readers}"
