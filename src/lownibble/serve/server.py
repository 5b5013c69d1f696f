"""The server process: load the base, open the adapter folder, listen, and drain running requests on shutdown."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn

from lownibble.config import ServeConfig
from lownibble.decoding import choose
from lownibble.errors import ConfigError, ModelError
from lownibble.kernels import proven
from lownibble.listening import Server, address_of, ask_for_key, listen
from lownibble.models import load
from lownibble.options import n_bytes
from lownibble.serve.engine import Engine
from lownibble.serve.http import app
from lownibble.serve.registry import Registry
from lownibble.serve.service import Limits, Service


def make_service(config: ServeConfig) -> Service:
    """Build the service of `http.app`: model, registry and a running engine.

    Raises:
        ConfigError: a budget is too small, or a key is empty.
        ModelError: the model is missing, damaged, not supported by any decoder, or has no fast tokenizer.
        AdapterError: the adapter folder is missing.
    """
    model, tokenizer = load(config.model, quant=config.quant, revision=config.revision)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"'{config.model}' has no fast tokenizer (tokenizer.json). Save its tokenizer again with transformers.")
    folder = None if config.adapters is None else Path(config.adapters).expanduser()
    decoder = choose(model)
    known = (Path(config.model).name if Path(config.model).exists() else config.model, "base", config.model)
    names = tuple(dict.fromkeys(known))
    registry = Registry(
        decoder, folder, n_bytes(config.adapter_budget), max_rank=config.max_rank,
        max_bytes=None if config.max_adapter is None else n_bytes(config.max_adapter),
        dtype=getattr(torch, config.adapter_dtype), any_base=config.any_base,
        reserved=names,
    )  # fmt: skip
    engine = Engine(
        decoder, tokenizer, registry, max_batch=config.max_batch, max_context=config.max_context, max_queue=config.max_queue,
        cache_budget=n_bytes(config.cache_budget),
    )  # fmt: skip
    keys = [config.api_key, os.environ.get("LOWNIBBLE_API_KEY")], [config.admin_key, os.environ.get("LOWNIBBLE_ADMIN_KEY")]
    if any(key is not None and not key.strip() for key in (*keys[0], *keys[1])):
        raise ConfigError(
            "A key is empty (--api-key, --admin-key, LOWNIBBLE_API_KEY or LOWNIBBLE_ADMIN_KEY). Set it, or unset it."
        )
    return Service(
        engine, registry, tokenizer, names, keys[0][0] or keys[0][1], keys[1][0] or keys[1][1],
        Limits(n_bytes(config.max_body), config.max_prompt, config.max_output, config.max_requests), config.host,
    )  # fmt: skip


def run_server(config: ServeConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C; `tell` is called with the address once the server listens.

    Raises:
        ConfigError: the address cannot be used, or can be reached from elsewhere and there is no key. Also raises as
            `make_service`.
    """
    ask_for_key(config.host, config.api_key or os.environ.get("LOWNIBBLE_API_KEY"), "whoever reaches the server can use it")
    listener = listen(config.host, config.port)
    with listener:
        _open_many_files()
        service = make_service(config)
        address = address_of(listener)
        server = Server(
            uvicorn.Config(
                app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=int(config.drain_seconds) or 1,
                h11_max_incomplete_event_size=64 << 10, timeout_keep_alive=30,
            )
        )  # fmt: skip
        if config.preload:
            service.registry.examine(preload=True)
        names = service.registry.names()
        listener.listen(server.config.backlog)  # uvicorn would only after `tell`: early clients would be refused
        tell(f"{service.names[0]} and {len(names)} adapter{'s' * (len(names) != 1)} at {address}/v1")
        threading.Thread(target=_report, args=(service, tell), name="report", daemon=True).start()
        server.run(sockets=[listener])
        service.engine.close(0)
    return {"status": "ok", "address": address, "adapters": len(names)}


def _report(service: Service, tell: Callable[[str], None]) -> None:
    """Tell which decoder there is and how many adapters are in memory; check all, and tell which are not taken and why."""
    registry = service.registry
    tell(f"decoder: {service.engine.decoder.note}; adapters in memory: {len(registry.held)} ({registry.nbytes / 1e6:.1f} MB)")
    if (slots := service.engine.cache.slots) < service.engine.max_batch:
        tell(f"at most {slots} requests run at once: --cache-budget has no room for --max-batch {service.engine.max_batch}")
    for kernel, why in proven.refused.items():
        tell(f"plain torch in place of the kernel '{kernel}': {why}")
    registry.examine()
    for name, why in registry.not_taken.items():
        tell(f"not taken: '{name}': {why}")


def _open_many_files() -> None:
    """Raise the soft limit of open files (usually about a thousand) to the hard limit, to allow as many connections."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
