"""The server as a process. Oracle: its exit status, and what its clients got."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
from tiny_folders import write_t5

from lownibble.cli.main import main
from lownibble.config import ServeConfig
from lownibble.serve.server import run_server


def test_a_signal_ends_it_after_what_was_begun(base, adapters, forked):
    command = [
        sys.executable,
        "-m",
        "lownibble.cli.main",
        "serve",
        str(base),
        "--adapters",
        str(adapters),
        "--port",
        "0",
        "--max-context",
        "2000",
    ]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "http://" in line)
            url = line.split(" at ")[1].removesuffix("/v1\n")
            assert "model and 3 adapters" in line
            answers = []
            body = {"model": "one", "prompt": "w1", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
            asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60)))
            asking.start()
            while httpx.get(f"{url}/health").json()["running"] == 0 and not answers:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            asking.join(60)
            assert answers[0].json()["usage"]["completion_tokens"] == 1500
            assert process.wait(30) == 0
            assert json.loads(process.stdout.read())["status"] == "ok"
        finally:
            process.kill()


def test_who_comes_when_the_address_is_told_is_served(base, adapters):
    answers = []

    def ask(connection):
        with connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            answers.append(connection.recv(1000))
        signal.raise_signal(signal.SIGTERM)

    said = []

    def tell(text):
        said.append(text)
        if "http://" not in text:
            return
        port = int(text.rsplit(":")[-1].removesuffix("/v1"))
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        threading.Thread(target=ask, args=[connection]).start()

    run_server(ServeConfig(model=str(base), adapters=str(adapters), port=0, max_context=256), tell)
    assert answers[0].startswith(b"HTTP/1.1 200 OK")
    assert "the CPU's decoder" in said[1]


def test_what_cannot_be_served_is_said(base, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOWNIBBLE_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            "Cannot listen on 127.0.0.1:": [str(base), "--port", port],
            "is no folder. Name one whose sub-folders are adapters": [
                str(base),
                "--port",
                "0",
                "--adapters",
                str(tmp_path / "none"),
            ],
            "whoever reaches the server can use it. Give --api-key": [str(base), "--port", "0", "--host", "0.0.0.0"],
            "--cache-budget is": [str(base), "--port", "0", "--cache-budget", "1KB"],
            "nowhere": [str(tmp_path / "nowhere"), "--port", "0"],
        }
        for message, arguments in cases.items():
            assert main(["serve", *arguments]) == 2
            assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_decoded_is_refused(tmp_path, capsys):
    assert main(["serve", str(write_t5(tmp_path / "t5")), "--port", "0"]) == 2
    assert "cannot be decoded by Lownibble" in capsys.readouterr().err
