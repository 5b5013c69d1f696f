"""Lownibble inside other libraries."""
