"""Say in words whether runs learned, whether they are healthy, and what to change if not."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from groupwise.evidence import rules_learning as learning
from groupwise.evidence import rules_policy as policy
from groupwise.evidence.finding import EARLY, Finding, say
from groupwise.evidence.naming import short_names
from groupwise.evidence.runs import Run


def findings(run: Run) -> list[Finding]:
    """Apply every rule to a run; the worst findings come first."""
    found = []
    for rule in RULES:
        finding = rule(run)
        if finding is not None and finding.kind == "unhealthy" and rule in SYMPTOMS and len(run.steps) < EARLY:
            finding = replace(finding, kind="watch")
        if finding is not None:
            found.append(finding)
    return worst_first(found)


def shared_findings(runs: Sequence[Run]) -> list[Finding]:
    """Findings of runs that differ in their seed only, each title once: the numbers are of the first run that has it, which the text
    names; the title says how many do.
    """
    found: dict[str, list[Finding]] = {}
    for run, name in zip(runs, short_names(runs), strict=True):
        for finding in findings(run):
            if len(runs) > 1:
                finding = replace(finding, text=say("words.of_run", run=name, text=finding.text))
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
    policy.sampler_mismatch,
    learning.learned,
    policy.updates_too_large,
    learning.truncated_completions,
    policy.clip_too_tight,
    policy.entropy_explosion,
    policy.entropy_collapse,
    learning.zero_variance_groups,
    learning.length_growth,
)
SYMPTOMS = {
    learning.constant_reward,
    policy.updates_too_large,
    learning.truncated_completions,
    policy.clip_too_tight,
    policy.entropy_explosion,
}
"""Rules whose findings may pass: they call no run unhealthy before it has done `EARLY` steps."""
