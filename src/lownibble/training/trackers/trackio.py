"""Trackio: a local database (TRACKIO_DIR), or a Space (TRACKIO_SPACE_ID). Its interface is wandb's."""

from __future__ import annotations

import os
from pathlib import Path

from lownibble.training.trackers.tracker import About, Status, Tracker


class Trackio(Tracker):
    """A run in Trackio; record and adapter are an artifact of type 'model'."""

    module = "trackio"

    def __init__(self, about: About) -> None:
        import trackio

        self.id = about.id if about.resumed else f"{about.name}-{about.id[:6]}"  # a run is resumed by its name
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "lownibble"), name=self.id, config=about.config,
            resume="allow" if about.resumed else "never", embed=False,
        )  # fmt: skip

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log figures."""
        self.run.log(figures, step=step)

    def end(self, status: Status, files: list[Path]) -> None:
        """Log the artifact, and finish."""
        import trackio

        if files:
            artifact = trackio.Artifact(self.id, type="model")
            for path in files:
                artifact.add_dir(str(path), name=path.name) if path.is_dir() else artifact.add_file(str(path))
            self.run.log_artifact(artifact)
        self.run.finish()
