"""Capturing work of a device in CUDA graphs, which are replayed as one launch; for training passes and decoding steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Captures a pass: -> a function that replays it, and the tensor that its result is in afterwards."""


ALONE = threading.RLock()
"""Held for a capture, and for waiting for a whole device: CUDA refuses to wait while any thread captures, whose capture fails."""


class CudaCapture:
    """Captures passes into CUDA graphs of one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture `run`, which is not executed, from the current stream; not the default one.

        Raises:
            RuntimeError: the first error of those that a failed capture raises; torch's last is that it was not completed.
        """
        with ALONE:
            return self._captured(run)

    def _captured(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device.index]
        before, first = generator.get_state(), None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    result = run()
                except Exception as error:
                    first = error
                    raise
        except Exception as error:  # torch leaves its stream set, and the generator believing that the capture goes on
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(stream.device)
            fresh.set_state(before)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise RuntimeError(str(first or error)) from error
        return graph.replay, result
