"""Who may use the studio: whoever can send a request can start processes, so each request is checked before it is read.

Its Host (a page whose name was made to resolve to this machine sends that name), its Origin (a page of another server cannot use
the browser against this one), its Content-Type (forms cannot send ours), its size, and the key if there is one, which the page
keeps as a cookie that says only that its sender knew it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers

from lownibble.listening import is_address

MOST_BODY = 4 << 20
"""Bytes of a JSON body."""


def cookie(headers: Headers) -> str:
    """The cookie's name, by port: browsers send the cookies of all ports of a host."""
    port = re.search(r":(\d+)$", headers.get("host", ""))
    return f"studio-{port[1] if port else ''}"


def ticket(key: str) -> str:
    """The cookie's value: known to who knows the key, and of characters that a cookie may have."""
    return hmac.new(key.encode(), b"lownibble studio", hashlib.sha256).hexdigest()


class Gate:
    """Middleware: refuses foreign Hosts, Origins and Content-Types, requests without the key, and bodies that are too large."""

    def __init__(self, app: Callable[..., Awaitable[None]], host: str, key: str | None) -> None:
        self.app, self.host, self.key = app, host, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse a request, or hand it on."""
        refused = self._refusal(scope) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def _refusal(self, scope: Any) -> Response | None:
        headers, path, posts = Headers(scope=scope), scope["path"], scope["method"] not in ("GET", "HEAD")
        host = headers.get("host", "")
        if not self.key and not is_address(host, self.host):
            return _no(403, f"Without a key the studio answers to its address only, not to '{host[:100]}'. Open it by that.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return _no(403, "This request comes from a page of another server.")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and path.startswith("/api"):
            return _no(403, "This request comes from a page of another server.")
        kind = headers.get("content-type", "").partition(";")[0]
        if posts and kind != ("application/octet-stream" if path == "/api/upload" else "application/json"):
            return _no(415, "The body must be JSON; that of an upload application/octet-stream.")
        size = headers.get("content-length", "0")
        if posts and path != "/api/upload" and (not size.isdecimal() or int(size) > MOST_BODY or "transfer-encoding" in headers):
            return _no(413, f"The body is larger than {MOST_BODY >> 20} MB, or does not say how large it is.")
        if self.key and path.startswith("/api/") and path != "/api/key" and not self._has_key(headers):
            return _no(401, "The studio asks for its key: it was given as --api-key or LOWNIBBLE_API_KEY.")
        return None

    def _has_key(self, headers: Headers) -> bool:
        assert self.key is not None
        cookies = dict(pair.strip().partition("=")[::2] for pair in headers.get("cookie", "").split(";"))
        bearer, kept = headers.get("authorization", "").removeprefix("Bearer "), cookies.get(cookie(headers), "")
        pairs = (bearer, self.key), (kept, ticket(self.key))
        same = [hmac.compare_digest(given.encode(), right.encode()) for given, right in pairs]  # compare all: constant time
        return any(same)


def _no(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)
