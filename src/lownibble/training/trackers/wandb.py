"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, WANDB_API_KEY; local files in OUTPUT/wandb.

Curves are by 'train/global_step', as transformers has them, and not by wandb's own step: that one may only rise, and a resumed
run goes back to its checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

from lownibble.training.trackers.tracker import About, Status, Tracker

STEP = "train/global_step"


class Wandb(Tracker):
    """A run in wandb; record and adapter are an artifact of type 'model'."""

    module = "wandb"

    def __init__(self, about: About) -> None:
        import wandb

        self.name = about.name
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lownibble"), name=about.name, id=about.id, resume="allow",
            config=about.config, dir=str(about.folder) if about.folder else None, settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log figures with the step as one of them."""
        self.run.log({**figures, STEP: step})

    def end(self, status: Status, files: list[Path]) -> None:
        """Log the artifact, and finish."""
        import wandb

        if files:
            artifact = wandb.Artifact(f"run-{self.run.id}", type="model", description=self.name)
            for path in files:
                artifact.add_dir(str(path), name=path.name) if path.is_dir() else artifact.add_file(str(path))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=0 if status == "finished" else 1)
