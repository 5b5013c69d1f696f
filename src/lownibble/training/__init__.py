"""Training: loss, loop, checkpoints, events and sinks."""

from lownibble.training.events import Evaluated, Event, Finished, Saved, Started, Stepped
from lownibble.training.run import TrainResult, run, train
from lownibble.training.sinks import JsonlSink, ProgressSink, Sink

__all__ = [
    "Evaluated", "Event", "Finished", "JsonlSink", "ProgressSink", "Saved", "Sink", "Started", "Stepped", "TrainResult",
    "run", "train",
]  # fmt: skip
