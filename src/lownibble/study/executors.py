"""Executors of a study's jobs: each takes jobs and yields (index, record) of each as it ends.

`local` is this machine. `ray` is a Ray cluster (RAY_ADDRESS), or a Ray instance started on this machine if there is none; models
and data must have the same paths on all of its machines. Leaving the iteration kills the jobs that are still running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from lownibble.errors import ConfigError
from lownibble.study import jobs

Executor = Callable[[Sequence[dict[str, Any]], int], Iterator[tuple[int, dict[str, Any]]]]
"""(jobs, maximum concurrent jobs) -> (index, record) in order of completion."""


def local(work: Sequence[dict[str, Any]], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run jobs on this machine, one process each."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(jobs.perform, job): index for index, job in enumerate(work)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(jobs.alive):
                process.kill()


def on_ray(work: Sequence[dict[str, Any]], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run jobs on a Ray cluster; each is a task that requests one CPU (Ray's default).

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("The executor 'ray' needs Ray. Install it: pip install 'lownibble[ray]'.") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    task = ray.remote(jobs.perform)
    waiting: list[tuple[int, dict[str, Any]]] = list(enumerate(work))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, job = waiting.pop(0)
                running[task.remote(job)] = index
            done, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done[0])
            try:
                yield index, ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield index, {"status": "failed", "error": f"Ray: {str(error).splitlines()[0]}"}
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


EXECUTORS: dict[str, Executor] = {"local": local, "ray": on_ray}
