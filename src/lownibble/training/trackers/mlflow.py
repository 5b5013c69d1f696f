"""MLflow. MLFLOW_TRACKING_URI (default: a database in the working directory), MLFLOW_EXPERIMENT_NAME.

By the client and not by MLflow's global active run, which belongs to the caller. Figures are sent in the background, so that a
step does not wait for a server; errors are reported at the end.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from lownibble.training.trackers.tracker import About, Status, Tracker

STATES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
LONGEST = 6000
"""Characters of a parameter that MLflow takes."""


class MLflow(Tracker):
    """A run in MLflow; options are its parameters, record and adapter its artifacts."""

    module = "mlflow"

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lownibble")
        found = self.client.get_experiment_by_name(experiment)
        if about.resumed:
            self.id = about.id
            self.client.update_run(self.id, status="RUNNING")
        else:
            where = found.experiment_id if found else self.client.create_experiment(experiment)
            self.id = self.client.create_run(where, run_name=about.name).info.run_id
            options = [Param(name, str(value)[:LONGEST]) for name, value in about.options.items()]
            self.client.log_batch(self.id, params=options)
        self.sent: list[Any] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send figures in the background."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self.sent.append(self.client.log_batch(self.id, metrics=metrics, synchronous=False))

    def end(self, status: Status, files: list[Path]) -> None:
        """Wait for what was sent, log the artifacts and end the run; the first error is raised when all of it was tried."""
        errors: list[Exception] = []
        try:
            for act in (*(sent.wait for sent in self.sent), *(partial(self._keep, path) for path in files)):
                try:
                    act()
                except Exception as error:
                    errors.append(error)
            if errors:
                raise errors[0]
        finally:
            self.client.set_terminated(self.id, STATES[status])

    def _keep(self, path: Path) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), path.name)
        else:
            self.client.log_artifact(self.id, str(path))
