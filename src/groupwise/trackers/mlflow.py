"""MLflow: the store that MLFLOW_TRACKING_URI names, else mlflow's default; with `offline = true`, RUN/trackers/mlflow.db."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from groupwise.config import dump
from groupwise.config.trees import flat
from groupwise.trackers.base import SAMPLE_COLUMNS, Opening

LONGEST_VALUE, MOST_PARAMS = 500, 100
"""What every store of mlflow takes: characters of a parameter, parameters at once."""


class MLflow:
    """A run of mlflow, found again by its id. `pass@1` becomes `pass_at_1`, since mlflow's names have no @."""

    def __init__(self, opening: Opening) -> None:
        home = opening.home.resolve()
        self.client: Any = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}" if opening.offline else None)
        if opening.identity is not None:
            self.identity = opening.identity
            self.client.update_run(self.identity, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(opening.project)
        artifacts = (home / "mlflow").as_uri() if opening.offline else None
        experiment = found.experiment_id if found else self.client.create_experiment(opening.project, artifacts)
        self.identity = str(self.client.create_run(experiment, run_name=opening.name).info.run_id)
        params = [Param(_allowed(key), str(value)[:LONGEST_VALUE]) for key, value in flat(opening.recipe).items()]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.identity, params=params[start : start + MOST_PARAMS])
        self.client.log_text(self.identity, dump(dict(opening.recipe)), "recipe.toml")

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        """mlflow has no histograms, so each bin is a number of its own."""
        each = {f"{key}/{i:02d}": value for key, sums in bins.items() for i, value in enumerate(sums)}
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(key), value, now, step) for key, value in {**numbers, **each}.items()]
        self.client.log_batch(self.identity, metrics=metrics)

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = {"columns": list(SAMPLE_COLUMNS), "data": [list(row) for row in rows]}  # the form of mlflow.log_table
        self.client.log_dict(self.identity, table, f"samples/step-{step:06d}.json")

    def write_report(self, step: int, page: Path) -> None:
        self.client.log_artifact(self.identity, str(page))

    def close(self) -> None:
        self.client.set_terminated(self.identity, "FINISHED")


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


def open_destination(opening: Opening) -> MLflow:
    return MLflow(opening)
