"""Models: sources of weights, and the streaming loader."""

from lownibble.models.load import load, load_tokenizer, pick_device, pick_dtype
from lownibble.models.skeleton import skeleton
from lownibble.models.sources import ModelSource, resolve

__all__ = ["ModelSource", "load", "load_tokenizer", "pick_device", "pick_dtype", "resolve", "skeleton"]
