"""The tiny model on disk."""

from tiny_folders import tiny_model  # noqa: F401
