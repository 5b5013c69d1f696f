"""Two ranks that stay for all tests of a module, and a tiny model with data."""

import pytest
from ranks import Workers
from tiny_folders import tiny_data, tiny_model  # noqa: F401


@pytest.fixture(scope="session")
def two():
    workers = Workers(2)
    yield workers
    workers.close()
