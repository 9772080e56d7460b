"""MLflow: a file store in OUTPUT; the experiment is the sweep, params are the flat spec, metrics curves and measures.

A measure is the metric `final/NAME`. A run that is exported again takes the place of the one before. MLflow opens a
file store where MLFLOW_ALLOW_FILE_STORE=true is set; `mlflow migrate-filestore` makes a data base of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.store.record import Status

if TYPE_CHECKING:
    from lorabench.store.export import Exported

LIBRARY, PACKAGE = "mlflow", "mlflow-skinny"
RUN_TAG = "lorabench.run_id"
MOST = 100
"""Params or metrics that the store takes at a time."""
STATUSES = {Status.DONE: "FINISHED", Status.CANCELLED: "KILLED"}


def write(runs: Iterable[Exported], folder: Path) -> None:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.absolute().as_uri())
    for run in runs:
        started, finished = int(1000 * run.started), int(1000 * run.finished)
        theirs = _begin(client, run, started)
        for params in _batches([Param(key, str(value)) for key, value in run.plain.items()]):
            client.log_batch(theirs, params=params)
        metrics = [
            Metric(key, value, started, int(row["step"]))
            for row in run.rows
            for key, value in row.items()
            if key != "step"
        ]
        metrics += [Metric(f"final/{key}", value, finished, 0) for key, value in run.measures.items()]
        for batch in _batches(metrics):
            client.log_batch(theirs, metrics=batch)
        client.set_terminated(theirs, STATUSES.get(run.status, "FAILED"), end_time=finished)


def _begin(client: Any, run: Exported, started: int) -> str:
    """MLflow's id of a new run in the place of one that was exported before."""
    found = client.get_experiment_by_name(run.project)
    experiment = found.experiment_id if found else client.create_experiment(run.project)
    for before in client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.run_id}'"):
        client.delete_run(before.info.run_id)
    tags = {RUN_TAG: run.run_id, "lorabench.status": str(run.status)}
    made: str = client.create_run(experiment, started, tags, run_name=run.run_id).info.run_id
    return made


def _batches(items: list[Any]) -> Iterable[list[Any]]:
    return (items[first : first + MOST] for first in range(0, len(items), MOST))
