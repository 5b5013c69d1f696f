"""Metrics for /metrics (prometheus-client): counters and latencies per model, and gauges of engine and registry set per scrape.

Latencies have one histogram over all requests, and a summary (count and sum) per model: a histogram for each of a thousand
adapters would take megabytes here and thirty thousand series in Prometheus.
"""

from __future__ import annotations

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics, generate_latest

from lownibble.kernels import proven
from lownibble.serve.engine import Engine
from lownibble.serve.registry import Registry
from lownibble.serve.request import End

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._all, self._process = CollectorRegistry(), psutil.Process()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lownibble_{name}", text, labels, registry=self._all)

        def times(name: str, text: str) -> tuple[Histogram, Summary]:
            of_all = Histogram(f"lownibble_{name}", text, registry=self._all, buckets=_SECONDS)
            return of_all, Summary(f"lownibble_model_{name}", text, ["model"], registry=self._all)

        self._requests = counter("requests", "Requests that ended.", "model", "reason")
        self._refused = counter("requests_refused", "Requests refused because too many waited.")
        self._read = counter("prompt_tokens", "Prompt tokens, those answered from the cache among them.", "model")
        self._reused = counter("prompt_tokens_reused", "Prompt tokens answered from the cache.", "model")
        self._made = counter("completion_tokens", "Tokens generated.", "model")
        self._first = times("time_to_first_token_seconds", "From submission to the first token.")
        self._each = times("time_per_token_seconds", "Of each token after the first, a request's mean.")
        gauges = {
            "requests_running": "Requests that have a slot.", "requests_waiting": "Requests that wait.",
            "adapter_bytes": "Bytes of the adapters held.", "adapters_held": "Adapters held.",
            "adapter_loads": "Adapters read since the start.", "adapter_hits": "Requests whose adapter was held.",
            "adapter_evictions": "Adapters that made room for others.",
            "adapters_not_taken": "Folders of adapters that cannot be served; /v1/models says why.",
            "cache_bytes": "Bytes of the key-value cache.",
            "drawing_bytes": "Bytes that drawing tokens on the device takes at most.",
            "graphs": "Whether steps on CUDA are replayed as graphs (0 or 1; on a CPU 0).",
            "plain_kernel_calls": "Calls that plain torch computes in place of kernels that failed here; the log says which.",
            "process_bytes": "Resident memory of the process.",
        }  # fmt: skip
        self._gauges = {name: Gauge(f"lownibble_{name}", text, registry=self._all) for name, text in gauges.items()}

    def ended(self, model: str, end: End) -> None:
        """Count a finished request."""
        self._requests.labels(model, end.reason).inc()
        self._read.labels(model).inc(end.prompt_tokens)
        self._reused.labels(model).inc(end.reused_tokens)
        self._made.labels(model).inc(end.completion_tokens)
        if end.first_s is not None:
            self._observe(self._first, model, end.first_s)
            if end.completion_tokens > 1:
                self._observe(self._each, model, (end.s - end.first_s) / (end.completion_tokens - 1))

    def _observe(self, times: tuple[Histogram, Summary], model: str, seconds: float) -> None:
        of_all, by_model = times
        of_all.observe(seconds)
        by_model.labels(model).observe(seconds)

    def refused(self) -> None:
        """Count a request rejected because the queue is full."""
        self._refused.inc()

    def render(self, engine: Engine, registry: Registry) -> str:
        """Render all metrics in Prometheus' text format."""
        now = {
            "requests_running": engine.running, "requests_waiting": engine.waiting, "adapter_bytes": registry.nbytes,
            "adapters_held": len(registry.held), "adapter_loads": registry.loads, "adapter_hits": registry.hits,
            "adapter_evictions": registry.evictions, "adapters_not_taken": len(registry.not_taken),
            "cache_bytes": engine.cache.nbytes, "drawing_bytes": engine.drawing_bytes,
            "graphs": int(engine.has_graphs), "plain_kernel_calls": sum(proven.calls.values()),
            "process_bytes": self._process.memory_info().rss,
        }  # fmt: skip
        for name, value in now.items():
            self._gauges[name].set(value)
        return generate_latest(self._all).decode()
