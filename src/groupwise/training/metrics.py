"""Metrics of a training step other than those of its updates."""

import math
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from groupwise.algorithms.diagnostics import effective_share
from groupwise.training.collect import Collected
from groupwise.training.metrics_file import TRAINED
from groupwise.types import Completion, Group, Outcome

ZERO_VARIANCE: tuple[Outcome, ...] = ("all_correct", "all_wrong", "equal")


def rollout_metrics(collected: Collected, version: int) -> dict[str, float]:
    """Of everything that was generated, whether it was kept or not; of what was kept, where nothing was generated.

    `version`: updates that the learner had taken when the rollouts were complete.
    """
    seen = collected.seen or collected.groups
    completions = [completion for group in seen for completion in group.completions]
    finished = [len(completion.tokens) for completion in completions if completion.stop == "stop"]
    scores = [score for group in seen for score in group.scored]
    graded = any(score.correct is None for score in scores)
    outcomes = Counter(group.outcome for group in seen)
    dropped = {reason: len(groups) for reason, groups in collected.dropped.items()}
    names: tuple[Outcome, ...] = ("equal", "mixed") if graded else ("all_correct", "all_wrong", "mixed")
    scored_groups = max(1, len(seen) - outcomes["failed"])
    shares = {name: outcomes[name] / scored_groups for name in names}
    failures = Counter(score.failure for group in seen for score in group.scores if score.failure is not None)
    ages = [version - completion.oldest_version for group in collected.groups for completion in group.completions]
    return {
        **({} if graded else {"train/pass_rate": sum(score.correct is True for score in scores) / max(1, len(scores))}),
        TRAINED: sum(score.reward for score in scores) / max(1, len(scores)),
        **{f"failed/{cause}": float(count) for cause, count in failures.items()},
        **{f"groups/{name}": share for name, share in shares.items()},
        "groups/zero_variance": sum(outcomes[name] for name in ZERO_VARIANCE) / scored_groups,
        "groups/failed": outcomes["failed"] / len(seen),
        "groups/kept": float(len(collected.groups)),
        "groups/smallest": float(min(len(group.completions) for group in seen)),
        "groups/largest": float(max(len(group.completions) for group in seen)),
        "rollouts/completions": float(sum(len(group.completions) for group in collected.seen)),
        "rollouts/rounds": float(collected.rounds),
        "rollouts/age": sum(ages) / len(ages),
        "groups/reused": float(collected.reused),
        "groups/too_old": float(len(collected.expired)),
        "dropped/zero_variance": float(sum(dropped.get(name, 0) for name in ZERO_VARIANCE)),
        **{f"dropped/{name}": float(dropped.get(name, 0)) for name in ("failed", "unselected", "surplus")},
        "length/mean": sum(len(completion.tokens) for completion in completions) / len(completions),
        "length/finished": sum(finished) / len(finished) if finished else math.nan,
        "length/truncated": sum(completion.stop == "length" for completion in completions) / len(completions),
        **turn_metrics(completions),
        **collected.metrics,
    }


def turn_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Of conversations: turns of the policy, tool calls and calls that could not be read in each; the shares of calls that failed
    and of turns that the limit of tokens cut. Nothing where no completion has turns."""
    if not any(completion.turns for completion in completions):
        return {}
    said = [turn for completion in completions for turn in completion.said]
    results = [turn for completion in completions for turn in completion.turns if turn.role == "tool"]
    calls = sum(turn.calls for turn in said)
    return {
        "turns/mean": len(said) / len(completions),
        "turns/truncated": sum(c.stop == "length" and c.turns[-1].role == "assistant" for c in completions) / len(said),
        "tools/calls": calls / len(completions),
        "tools/errors": sum(turn.errors for turn in results) / max(1, calls + sum(turn.errors for turn in said)),
        "tools/unread": sum(turn.errors for turn in said) / len(completions),
    }


def reward_metrics(groups: Sequence[Group], rewards: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the scored completions that were kept: the standard deviation of their rewards, before a KL penalty; the parts of these
    by name, as they were given; and what the reward logged.

    `rewards`: from `reward_parts`.
    """
    scored_B = torch.tensor([score.failure is None for group in groups for score in group.scores])
    parts = {f"reward/part/{name}": values_B[scored_B] for name, values_B in rewards.items()}
    rewards_B = torch.stack(list(parts.values())).sum(0)
    scores = [score for group in groups for score in group.scored]
    for name in dict.fromkeys(name for score in scores for name in score.components):
        values = [score.components[name] for score in scores if name in score.components]
        parts[f"reward/part/task/{name}"] = torch.tensor(values)
    for name in dict.fromkeys(name for score in scores for name in score.metrics):
        parts[f"reward/logged/{name}"] = torch.tensor([score.metrics[name] for score in scores if name in score.metrics])
    return {
        "reward/shaped_spread": float(rewards_B.std(correction=0)),
        **{name: float(values_B.mean()) for name, values_B in parts.items()},
    }


def weighted_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the scored completions that were kept: the mean of the reward that advantages are made of, and of what it is the sum of.

    `parts`: from `CreditAssigner.parts`; empty where scoring failed.
    """
    scored = [part for part in parts if part]
    names = dict.fromkeys(name for part in scored for name in part)
    means = {name: sum(part.get(name, 0.0) for part in scored) / len(scored) for name in names}
    return {
        "reward/shaped_mean": sum(means.values()) if scored else math.nan,
        **{f"reward/weighted/{name}": mean for name, mean in means.items()},
    }


def advantage_metrics(advantages_BT: Tensor, mask_BT: Tensor, groups: Sequence[Group]) -> dict[str, float]:
    """Of the completions that could be scored: the share with a non-zero advantage, the effective share, and the number without a
    trained token.

    `groups`: those whose completions are the rows.
    """
    scored_B = torch.tensor([score.failure is None for group in groups for score in group.scores])
    mask_BT = mask_BT[scored_B]
    advantages_B = torch.where(mask_BT, advantages_BT[scored_B], 0).abs().amax(1)
    return {
        "utilisation": float((advantages_B != 0).float().mean()),
        "utilisation/effective": effective_share(advantages_B),
        "dropped/filtered": float((~mask_BT.any(1)).sum()),
    }


def peak_mib() -> float:
    """The most memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_kib() / 1024


def peak_resident_kib() -> int:
    """Of this process alone: getrusage also counts, since fork and exec, the one that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return int(found.split()[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
