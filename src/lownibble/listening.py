"""What the servers (`serve`, `studio`) share: their socket, their end on a signal, and whom they answer.

Without a key a server listens on this machine only, and answers to addresses only: a page elsewhere whose name is made to resolve
to this machine (DNS rebinding) sends its own name as Host.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvicorn

from lownibble.errors import ConfigError


class Server(uvicorn.Server):
    """Exits normally after SIGINT or SIGTERM: uvicorn would re-raise it after shutdown and the exit status would say 'killed'."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM as requests to end."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; called before anything slow, so that a port in use is reported at once.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            stack.pop_all()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot listen on {host}:{port}: {why}. Choose another --host or --port.") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Its address as a URL, without a slash at the end."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def ask_for_key(host: str, key: str | None, danger: str) -> None:
    """Refuse to listen where other machines reach a server without a key; `danger` says what they could do.

    Raises:
        ConfigError: `host` is no loopback address, and there is no key.
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and key is None:
        raise ConfigError(
            f"'{host}' can be reached from other machines, and {danger}. Give --api-key (or LOWNIBBLE_API_KEY), or leave --host "
            "out."
        )


def is_address(host: str, own: str) -> bool:
    """Whether a Host header is localhost, an IP address, or the server's configured host."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() in ("localhost", own.lower()):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
