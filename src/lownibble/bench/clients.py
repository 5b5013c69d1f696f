"""Clients of `lownibble bench soak`: well-behaved ones, and every kind of misbehaving one.

They use the standard library only, so that exactly the bytes written here are sent.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import Any

_JSON = "content-type: application/json"
PATIENCE_S = 120.0
"""Socket timeout of a well-behaved client in seconds; a request that times out counts as lost."""


class Tally:
    """Thread-safe counts of request outcomes, shared by the clients."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.answered = self.refused = self.tokens = self.repeated = self.same = 0
        self.lost: Counter[str] = Counter()
        self.server_errors = 0
        self.bad: dict[str, Counter[str]] = {}
        self._answers: dict[Any, str] = {}

    def well(self, key: Any, text: str, tokens: int) -> None:
        """Count a correctly answered request, and whether a repeated one got the same text as the first time."""
        with self._lock:
            self.answered, self.tokens = self.answered + 1, self.tokens + tokens
            if key in self._answers:
                self.repeated, self.same = self.repeated + 1, self.same + (self._answers[key] == text)
            self._answers.setdefault(key, text)

    def refuse(self) -> None:
        """Count a request that was answered with 429 and will be retried."""
        with self._lock:
            self.refused += 1

    def lose(self, why: str) -> None:
        """Count a failed request of a well-behaved client; `why` begins with the HTTP status, if there was one."""
        with self._lock:
            self.lost[why] += 1
            self.server_errors += why.startswith("5")

    def misbehaved(self, kind: str, outcome: str) -> None:
        """Count the outcome of one kind of misbehaviour."""
        with self._lock:
            self.bad.setdefault(kind, Counter())[outcome] += 1
            self.server_errors += outcome.startswith("5")


class _RefusedError(ValueError):
    """A response other than 200 or 429; the message is its status and body."""


class WellBehaved:
    """Client that requests adapters by popularity, streamed or not, one request at a time."""

    def __init__(
        self, address: tuple[str, int], tally: Tally, pick: Callable[[random.Random], int], tokens: int, seed: int
    ) -> None:
        self.address, self.tally, self.pick, self.tokens, self.draw = address, tally, pick, tokens, random.Random(seed)

    def run(self, until: float) -> None:
        """Send requests until that time (`time.monotonic`)."""
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        while time.monotonic() < until:
            number, variant, stream = self.pick(self.draw), self.draw.randrange(2), self.draw.random() < 0.5
            words = random.Random(2 * number + variant)  # the same prompt is sent to the same adapter again later
            prompt = [words.randrange(100, 40_000) for _ in range(words.randrange(16, 49))]
            body = {
                "model": f"a{number}", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True,
                "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {}),
            }  # fmt: skip
            try:
                while (text := self._ask(connection, body)) is None:
                    self.tally.refuse()
                    time.sleep(1.0)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.tally.lose(str(error) if isinstance(error, _RefusedError) else f"{type(error).__name__}: {error}")
                connection.close()
            else:
                self.tally.well((number, variant), text, self.tokens)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> str | None:
        """Return the completion; None if the server is full (429)."""
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read().decode()
        if answer.status == 429:
            return None
        if answer.status != 200:
            raise _RefusedError(f"{answer.status} {content[:200]}")
        if not body["stream"]:
            parts = [json.loads(content)]
        else:
            events = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
            if events[-1] != "[DONE]":
                raise ValueError("the stream broke off")
            parts = [json.loads(event) for event in events[:-1]]
        if parts[-1]["usage"]["completion_tokens"] != body["max_tokens"]:
            raise ValueError("tokens are missing")
        return "".join(choice["text"] for part in parts for choice in part["choices"])


class Misbehaving:
    """Client that cycles through all kinds of misbehaviour and records the server's responses."""

    def __init__(self, address: tuple[str, int], tally: Tally, seed: int) -> None:
        self.address, self.tally, self.draw = address, tally, random.Random(seed)

    def run(self, until: float) -> None:
        """Misbehave until that time."""
        kinds = (
            self.slow_reader, self.leaves_in_the_middle, self.leaves_at_once, self.giant_body, self.giant_body_in_parts,
            self.half_a_body, self.malformed_body, self.no_http, self.unknown_adapter, self.damaged_adapter, self.traversal,
        )  # fmt: skip
        while time.monotonic() < until:
            for kind in kinds:
                try:
                    outcome = kind()
                except (OSError, http.client.HTTPException) as error:
                    outcome = type(error).__name__
                self.tally.misbehaved(kind.__name__, outcome)

    def _open(self, window: int | None = None) -> socket.socket:
        made = socket.socket()
        if window:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        made.settimeout(30.0)
        made.connect(self.address)
        return made

    def _post(self, path: str, content: bytes, announced: int | None = None) -> bytes:
        length = len(content) if announced is None else announced
        return f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{_JSON}\r\ncontent-length: {length}\r\n\r\n".encode() + content

    def _status(self, connection: socket.socket) -> str:
        return http_status(connection.recv(4096))

    def _send(self, path: str, content: bytes) -> str:
        with self._open() as connection:
            connection.sendall(self._post(path, content))
            return self._status(connection)

    def _question(self, model: object = "a0", tokens: int = 64) -> bytes:
        prompt = [self.draw.randrange(100, 40_000) for _ in range(32)]
        asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        return json.dumps(asked).encode()

    def slow_reader(self) -> str:
        """Read a stream byte by byte."""
        with self._open(window=2048) as connection:
            connection.sendall(self._post("/v1/completions", self._question()))
            first = connection.recv(20)
            for _ in range(40):
                time.sleep(0.05)
                connection.recv(1)
            return http_status(first)

    def leaves_in_the_middle(self) -> str:
        """Disconnect after the first bytes of a stream."""
        with self._open() as connection:
            connection.sendall(self._post("/v1/completions", self._question()))
            return self._status(connection)

    def leaves_at_once(self) -> str:
        """Disconnect without reading the response."""
        with self._open() as connection:
            connection.sendall(self._post("/v1/completions", self._question()))
        return "gone"

    def giant_body(self) -> str:
        """Announce a content length above the server's limit."""
        with self._open() as connection:
            connection.sendall(self._post("/v1/completions", b"x" * 1000, announced=1 << 40))
            return self._status(connection)

    def giant_body_in_parts(self) -> str:
        """Send a chunked body above the server's limit."""
        with self._open() as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n{_JSON}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
            )
            try:
                for _ in range(64):
                    connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass  # rejected before the end
            return self._status(connection)

    def half_a_body(self) -> str:
        """Send part of a body, wait and disconnect."""
        with self._open() as connection:
            connection.sendall(self._post("/v1/completions", b'{"model": "a0"', announced=1000))
            time.sleep(0.5)
        return "gone"

    def malformed_body(self) -> str:
        """Send an invalid request body."""
        wrong = (
            b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"model": 5}', b'{"model": "a0", "prompt": {}}',
            b'{"model": "a0", "prompt": "x", "max_tokens": -1}', b'{"model": "a0", "prompt": "x", "temperature": NaN}',
            b'{"model": "a0", "prompt": "\\ud800"}', b"[" * 5000, self._question("a0", 10**9),
        )  # fmt: skip
        return self._send("/v1/completions", self.draw.choice(wrong))

    def no_http(self) -> str:
        """Send bytes that are not HTTP."""
        with self._open() as connection:
            connection.sendall(
                self.draw.choice((b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 100, b"GET\r\n\r\n", b"HELO x\r\n\r\n"))
                + b"\r\n\r\n"
            )
            return self._status(connection)

    def unknown_adapter(self) -> str:
        """Request an adapter that does not exist."""
        return self._send("/v1/completions", self._question("nobody"))

    def damaged_adapter(self) -> str:
        """Request an adapter with NaN weights."""
        return self._send("/v1/completions", self._question("damaged"))

    def traversal(self) -> str:
        """Send path-traversal names as the model, in the body or in the URL."""
        name = self.draw.choice(
            ("../a0", "../../etc/passwd", "/etc/passwd", "a0/../a1", "..", ".", "a0\x00", "%2e%2e%2fa0", "~root")
        )
        if self.draw.random() < 0.5:
            return self._send("/v1/completions", self._question(name))
        with self._open() as connection:
            connection.sendall(f"GET /v1/models/{name.replace(chr(0), '%00')} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
            return self._status(connection)


def http_status(head: bytes) -> str:
    """Return the status code in the first bytes of a response; 'closed' if there is none."""
    parts = head.split(b" ", 2)
    return parts[1].decode("ascii", "replace") if len(parts) > 1 and head.startswith(b"HTTP/") else "closed"
