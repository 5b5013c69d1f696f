"""TensorBoard: event files in OUTPUT/tensorboard, beside the record and the adapter, which are not copied into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lownibble.training.trackers.tracker import About, Status, Tracker


class TensorBoard(Tracker):
    """`tensorboard --logdir OUTPUT`."""

    module = "tensorboard"
    needs_folder = True

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert about.folder is not None
        self.writer: Any = SummaryWriter(str(about.folder / "tensorboard"))
        self.writer.add_text("config", f"```json\n{json.dumps(about.config, indent=2)}\n```")

    def log(self, figures: dict[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def end(self, status: Status, files: list[Path]) -> None:
        """Close the file."""
        self.writer.close()
