"""Requests that a machine made up from /openapi.json. Oracle: schemathesis, and the shape of OpenAI's errors."""

import schemathesis
from hypothesis import HealthCheck, given, settings


def test_the_server_does_not_fall_over(live):
    schema = schemathesis.openapi.from_url(f"{live(max_output=8).url}/openapi.json")
    seen = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        seen[operation.label] = answers_to(operation.as_strategy())
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/load_lora_adapter", "GET /v1/models"} <= seen.keys()
    assert seen["GET /v1/models"] == {200}
    assert 400 in seen["POST /v1/completions"] | seen["POST /v1/chat/completions"]


def answers_to(cases):
    """Statuses of the answers to such requests, each of which must be one that a client can use."""
    statuses = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=cases)
    def ask(case):
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    ask()
    return statuses
