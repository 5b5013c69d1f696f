"""Benchmarks of serving. Oracle: a batch of different adapters says what each says alone; a server that fails is noticed."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lownibble.bench import prefix, serve
from lownibble.bench.clients import Misbehaving, Tally, WellBehaved
from lownibble.bench.soak import bench_soak
from lownibble.errors import ConfigError
from lownibble.serve import engine, server
from lownibble.serve.server import make_service


@pytest.mark.slow
def test_a_batch_says_what_each_adapter_says_alone(tmp_path, monkeypatch):
    serve.write_adapters(tmp_path, serve.BATCH)
    services = []
    monkeypatch.setattr(server, "make_service", lambda config: services.append(make_service(config)) or services[-1])
    distinct, alone, identical = (serve._ours(mix, tmp_path)(3) for mix in ("distinct", "alone", "identical"))
    assert [len(output) for output in distinct["outputs"]] == [3] * serve.BATCH
    assert serve._same([distinct], [alone]) == 1
    assert serve._same([distinct], [identical]) < 1
    assert distinct["adapter_loads"] == serve.BATCH
    assert identical["adapter_loads"] == 1
    for service in services:
        service.engine.close(0)


def test_waves_read_what_must_be_read_and_say_the_same(monkeypatch):
    for name, value in {"REQUESTS": 4, "PREFIX_TOKENS": 24, "OWN_TOKENS": 8}.items():
        monkeypatch.setattr(prefix, name, value)
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 8)  # prompts longer than half of a step wait for those that begin alike
    found = prefix.bench_prefix(repeats=1, tokens=2)
    read = {name: wave["read"] for name, wave in found["waves"].items()}
    own = 8 - len(prefix.INVOCATION)
    assert read == pytest.approx({
        "without": 1, "cold": (2 * 32 + 2 * own) / (4 * 32), "warm": own / 32, "activated without": 1,
        "activated": (32 + 8 + 2 * own) / (4 * 32),
    })  # fmt: skip
    assert [found["waves"][name]["same"] for name in ("cold", "activated")] == [1, 1]
    with pytest.raises(ConfigError, match="no peers"):
        prefix.bench_prefix(peers=True)


@pytest.mark.slow
def test_a_short_soak():
    found = bench_soak(repeats=0.1, adapters=12, loaded=5)
    soak, held = found["soak"], found["loaded"]
    assert soak["well_behaved"]["answered"] > 0
    assert soak["well_behaved"]["lost"] == 0, soak["well_behaved"]["why"]
    assert soak["misbehaviour"] > 0
    assert (soak["server_errors"], soak["left_running"], soak["exit_status"]) == (0, 0, 0)
    assert soak["adapters"]["loads"] > 0
    assert held["adapters"] == 5
    assert held["ratio"] == pytest.approx(1, abs=0.1)


ANSWERS = {
    "an error": (500, b"{}"),
    "a stream that breaks off": (200, b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'),
    "missing tokens": (200, b'{"choices": [{"text": ""}], "usage": {"completion_tokens": 3}}'),
    "no JSON": (200, b"oops"),
}


@pytest.fixture
def answering():
    """`answering(status, content)`: address of a server that always answers so."""
    servers = []

    def _answering(status, content):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_address

    yield _answering
    for made in servers:
        made.shutdown()
        made.server_close()


@pytest.mark.parametrize("kind", ANSWERS)
def test_clients_that_mean_well_notice(answering, kind):
    tally = Tally()
    client = WellBehaved(answering(*ANSWERS[kind]), tally, lambda draw: draw.randrange(3), tokens=4, seed=0)
    client.run(time.monotonic() + 0.3)
    assert tally.answered == 0
    assert sum(tally.lost.values()) > 0


def test_answers_that_differ_are_counted():
    tally = Tally()
    for text in ("a", "a", "b"):
        tally.well(("question",), text, 1)
    assert (tally.answered, tally.repeated, tally.same) == (3, 2, 1)


def test_what_misbehaving_clients_get_is_noted(answering):
    tally = Tally()
    client = Misbehaving(answering(503, b""), tally, seed=0)
    tally.misbehaved("unknown_adapter", client.unknown_adapter())
    tally.misbehaved("traversal", client.malformed_body())
    assert tally.bad == {"unknown_adapter": {"503": 1}, "traversal": {"503": 1}}
