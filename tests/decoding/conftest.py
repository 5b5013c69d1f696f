"""Tests of decoders run on one thread: their models are too small for more."""

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """See above."""
