"""SwanLab. SWANLAB_API_KEY, SWANLAB_PROJ_NAME, SWANLAB_MODE=offline or local; local files in OUTPUT/swanlog."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lownibble.training.trackers.tracker import About, Status, Tracker

STATES = {"finished": "success", "failed": "crashed", "killed": "aborted"}


class SwanLab(Tracker):
    """A run in SwanLab; record and adapter are files of the run."""

    module = "swanlab"

    def __init__(self, about: About) -> None:
        import swanlab

        mode = os.environ.get("SWANLAB_MODE")
        again = {"id": about.id, "resume": "allow"} if mode in (None, "online", "cloud") else {}  # others cannot resume
        self.run: Any = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", "lownibble"), name=about.name, config=about.config,
            log_dir=str(about.folder / "swanlog") if about.folder else None, mode=mode, **again,
        )  # fmt: skip

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log figures."""
        self.run.log(figures, step=step)

    def end(self, status: Status, files: list[Path]) -> None:
        """Save the files, and finish."""
        import swanlab

        for path in files:
            swanlab.save(str(path / "*" if path.is_dir() else path), base_path=path.parent, policy="now")
        swanlab.finish(state=STATES[status], error="the run failed" if status == "failed" else None)
