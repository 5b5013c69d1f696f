"""The studio's process: lock the folder, listen, and leave jobs running when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from lownibble.config import StudioConfig
from lownibble.errors import ConfigError
from lownibble.listening import Server, address_of, ask_for_key, listen
from lownibble.studio.launched import opened
from lownibble.studio.routes import app


def run_studio(config: StudioConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Serve the page until SIGTERM or Ctrl-C; `tell` is called with the address once it listens.

    Raises:
        ConfigError: the address cannot be used, or can be reached from elsewhere and there is no key.
        OutputError: another studio has the folder, or it cannot be written.
    """
    key = config.api_key or os.environ.get("LOWNIBBLE_API_KEY")
    if key is not None and not (key.strip() and key.isascii()):
        raise ConfigError("The key (--api-key or LOWNIBBLE_API_KEY) must be ASCII text, and not empty. Set another, or unset it.")
    ask_for_key(config.host, key, "whoever reaches the studio can start processes")
    with opened(Path(config.folder)) as jobs, listen(config.host, config.port) as listener:
        address = f"{address_of(listener)}/"
        jobs.announce(address)
        made = app(jobs, host=config.host, api_key=key)
        server = Server(uvicorn.Config(made, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
        listener.listen(server.config.backlog)
        tell(f"Studio of '{config.folder}': {address}")
        server.run(sockets=[listener])
    return {"status": "ok", "address": address, "folder": config.folder}
