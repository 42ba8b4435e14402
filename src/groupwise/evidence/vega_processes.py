"""Figures of runs in several processes: how old what is trained on is, and who waits for whom."""

from groupwise.evidence.charts import Figure, Groups, figure, lines

AGES = {"cluster/age_mean": "mean", "cluster/age_max": "largest"}
QUEUES = {
    "cluster/groups_under_way": "groups being made",
    "cluster/groups_finished": "groups that wait for their step",
    "cluster/waiting": "requests that wait for a sampler",
}
IDLE = {"cluster/idle/learner": "learner", "cluster/idle": "samplers (mean)"}
FAULTS = {
    "cluster/sampler_restarts": "samplers started again",
    "cluster/learner_restarts": "learner started again",
    "cluster/reissued": "requests made again",
}


def ages(groups: Groups) -> Figure | None:
    return figure(
        "age", "Age of what is trained on",
        "Steps between the weights that a group was begun with and those that it trains: at most cluster.staleness, and "
        "(cluster.window − 1) / rollouts.prompts_per_step more, rounded up.",
        lines(groups, AGES, y="age (steps)"),
    )  # fmt: skip


def queues(groups: Groups) -> Figure | None:
    return figure(
        "queues", "Queues", "When each step's groups were complete; requests after its updates.",
        lines(groups, _used(groups, QUEUES), y="count"),
    )  # fmt: skip


def idle(groups: Groups) -> Figure | None:
    return figure(
        "idle", "Idle shares",
        "Share of the time in which the learner waited for groups, and samplers had no request. Whoever is idle should have fewer "
        "processes (cluster.samplers, cluster.learners).",
        lines(groups, IDLE, y="share of the time", percent=True),
    )  # fmt: skip


def faults(groups: Groups) -> Figure | None:
    return figure(
        "restarts", "Restarts", "Processes that died or were silent and were started again in each step, and what that cost.",
        lines(groups, _used(groups, FAULTS), y="count"),
    )  # fmt: skip


def _used(groups: Groups, names: dict[str, str]) -> dict[str, str]:
    """Those that are not 0 throughout."""
    return {key: name for key, name in names.items() if any(any(run.values(key)) for runs in groups.values() for run in runs)}
