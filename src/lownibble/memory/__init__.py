"""Measured memory, planned memory, and fitting a run to a memory budget."""
