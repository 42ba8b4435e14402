"""Say in words whether runs learned, whether they are healthy, and what to change if not."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from groupwise.evidence import rules_learning as learning
from groupwise.evidence import rules_policy as policy
from groupwise.evidence.finding import Finding, say
from groupwise.evidence.runs import Run


def findings(run: Run) -> list[Finding]:
    """Apply every rule to a run; the worst findings come first."""
    return worst_first([finding for rule in RULES if (finding := rule(run)) is not None])


def shared_findings(runs: Sequence[Run]) -> list[Finding]:
    """Findings of runs that differ in their seed only, each title once: the numbers are of the first run that has it, the title says how many do."""
    found: dict[str, list[Finding]] = {}
    for run in runs:
        for finding in findings(run):
            found.setdefault(finding.title.en, []).append(finding)
    shown = [items[0] for items in found.values()]
    if len(runs) > 1:
        shown = [
            replace(item, title=say("words.in_runs", title=item.title, some=len(found[item.title.en]), all=len(runs)))
            for item in shown
        ]
    return worst_first(shown)


def worst_first(found: Sequence[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: ("unhealthy", "watch", "healthy").index(finding.kind))


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    learning.nothing_recorded,
    learning.events_recorded,
    learning.constant_reward,
    learning.failed_completions,
    policy.updates_too_large,
    learning.learned,
    learning.truncated_completions,
    policy.clip_too_tight,
    policy.entropy_explosion,
    policy.entropy_collapse,
    learning.zero_variance_groups,
    policy.sampler_mismatch,
    learning.length_growth,
)
