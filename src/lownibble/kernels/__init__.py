"""Kernel operations and their backends."""
