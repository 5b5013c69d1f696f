"""The tiny model and data on disk."""

from tiny_folders import tiny_data, tiny_model  # noqa: F401
