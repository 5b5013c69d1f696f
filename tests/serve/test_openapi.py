"""Requests that a machine made up from /openapi.json. Oracle: schemathesis, and the shape of OpenAI's errors."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

schema = schemathesis.pytest.from_fixture("openapi")


@pytest.fixture
def openapi(live):
    return schemathesis.openapi.from_url(f"{live(max_output=8).url}/openapi.json")


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_server_does_not_fall_over(case):
    answer = case.call()
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
