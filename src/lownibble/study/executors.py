"""Executors of a study's jobs: each takes jobs and yields (index, record) of each as it ends.

`local` is this machine: each job has GPUs of its own where there are enough (`devices.slots`). `ray` is a Ray cluster
(RAY_ADDRESS), or a Ray instance started on this machine if there is none; models and data must have the same paths on all of its
machines, and Ray deals the GPUs. Leaving the iteration kills the jobs that are still running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from lownibble.errors import ConfigError
from lownibble.study import devices, jobs, processes

Started = Callable[[int], None]

Executor = Callable[[Sequence[dict[str, Any]], int, int, Started], Iterator[tuple[int, dict[str, Any]]]]
"""(jobs, maximum concurrent jobs, GPUs of each, called with the index of a job that starts, from any thread) -> (index, record)
in order of completion."""


def nobody_told(index: int) -> None:
    """For who does not ask which jobs start."""


def local(
    work: Sequence[dict[str, Any]], workers: int, gpus: int = 1, started: Started = nobody_told
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Run jobs on this machine, in processes of their own.

    Raises:
        ConfigError: it has too few GPUs.
    """
    free: SimpleQueue[list[str] | None] = SimpleQueue()
    for slot in devices.slots(workers, gpus):
        free.put(slot)

    def perform(index: int, job: dict[str, Any]) -> dict[str, Any]:
        slot = free.get()
        try:
            started(index)
            return jobs.perform({**job, "devices": slot})
        finally:
            free.put(slot)

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(perform, index, job): index for index, job in enumerate(work)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes.alive):
                process.kill()


def on_ray(
    work: Sequence[dict[str, Any]], workers: int, gpus: int = 1, started: Started = nobody_told
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Run jobs on a Ray cluster; each is a task that requests so many GPUs, or as many CPUs where the cluster has no GPUs.

    Raises:
        ConfigError: Ray is not installed, or no machine of the cluster has so many: the task would wait for ever.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("The executor 'ray' needs Ray. Install it: pip install 'lownibble[ray]'.") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    task = ray.remote(**_requests(ray.nodes(), gpus))(jobs.perform)
    waiting: list[tuple[int, dict[str, Any]]] = list(enumerate(work))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, job = waiting.pop(0)
                running[task.remote(job)] = index
                started(index)
            done, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done[0])
            try:
                yield index, ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield index, {"status": "failed", "error": f"Ray: {str(error).splitlines()[0]}"}
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _requests(nodes: Sequence[dict[str, Any]], gpus: int) -> dict[str, int]:
    """What a task requests of a cluster with these nodes (`ray.nodes()`)."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    kind = "GPU" if any(node.get("GPU") for node in there) else "CPU"
    most = max((int(node.get(kind, 0)) for node in there), default=0)
    if gpus > most:
        raise ConfigError(f"No machine of the Ray cluster has {gpus} {kind}s; the largest has {most}. Lower --gpus-per-cell.")
    return {f"num_{kind.lower()}s": gpus}


EXECUTORS: dict[str, Executor] = {"local": local, "ray": on_ray}
