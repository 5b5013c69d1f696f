"""Steps of one token of each row, whose launches are the same from step to step, so that CUDA graphs replay them.

A step of an 8B model launches some 2,000 kernels, for each of which the host runs some Python: tens of milliseconds, where the
device needs a few. A graph takes the host out of it. It repeats the same kernels on the same memory, so

- rows are padded to a power of two with copies of the first one, which write the same keys and values to the same place;
- tokens, slots, positions and the adapters of the rows are copied to a tensor of the graph, in one copy from pinned memory;
- adapters are found through tables of addresses, so they come and go without a new graph. A larger rank than before, or a linear
  layer that no adapter had changed before, needs a new one.

A shape's first step runs without a graph, which compiles and loads its kernels; the second is captured. Where that fails, steps
stay without graphs. Nothing in a step waits for the device; who takes the logits to the host does.

Steps hold tensors and graphs, and not the model: so a cache can be kept with its model from call to call (`generate.py`).

On a CPU the same steps run without graphs: that is how they are tested without a GPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lownibble.kernels import ops, proven
from lownibble.kernels.capture import Capture, CudaCapture
from lownibble.kernels.decoded import scratch_buffers
from lownibble.kernels.decoder import Adapter, LowRank
from lownibble.kernels.rows import RANK_STEP, RowAdapters
from lownibble.transfers import to_device

_log = logging.getLogger(__name__)


class Run(Protocol):
    """A pass of the model over one token of each row; returns (B, vocabulary) logits."""

    def __call__(self, lines_LB: Tensor, adapters: RowAdapters | None) -> Tensor:
        """`lines_LB`: of the step, int64. All arguments are on the device."""


class Prepared(NamedTuple):
    """An adapter's branches on the device, and its lines of the tables, on the host."""

    branches: list[LowRank | None]
    pointers: Tensor
    ranks: Tensor
    scales: Tensor


def takes(adapter: Adapter) -> bool:
    """Whether an adapter is low-rank sums of linear layers: neither DoRA nor experts' branches."""
    if "takes" not in adapter.prepared:
        found = [branch for branches in adapter.of for branch in branches if branch]
        adapter.prepared["takes"] = all(branch.gain is None and branch.A.ndim == 2 for branch in found)
    return bool(adapter.prepared["takes"])


def prepared(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Prepared:
    """An adapter for a device, kept with it; copies only what cannot be used as it is."""
    key = f"rows in {dtype} on {device}"
    if key not in adapter.prepared and adapter.unscaled:
        same, of = prepared(adapter.unscaled, dtype, device), [branch for of_layer in adapter.of for branch in of_layer]
        branches = [held and own and LowRank(held.A, held.B, own.scale) for held, own in zip(same.branches, of, strict=True)]
        scales = torch.tensor([own.scale if own else 0.0 for own in of], dtype=torch.float32)
        adapter.prepared[key] = Prepared(branches, same.pointers, same.ranks, scales)
    elif key not in adapter.prepared:
        branches = []
        for branch in (branch for of_layer in adapter.of for branch in of_layer):
            if branch is None:
                branches.append(None)
                continue
            missing = -len(branch.A) % RANK_STEP
            A = torch.nn.functional.pad(branch.A, (0, 0, 0, missing)) if missing else branch.A
            B = torch.nn.functional.pad(branch.B, (0, missing)) if missing else branch.B
            branches.append(LowRank(_held(A, dtype, device), _held(B, dtype, device), branch.scale))
        pointers = [[one.A.data_ptr(), one.B.data_ptr()] if one else [0, 0] for one in branches]
        ranks = [len(one.A) // RANK_STEP if one else 0 for one in branches]
        scales = torch.tensor([one.scale if one else 0.0 for one in branches], dtype=torch.float32)
        tables = torch.tensor(pointers), torch.tensor(ranks, dtype=torch.int32), scales
        adapter.prepared[key] = Prepared(branches, *tables)
    found: Prepared = adapter.prepared[key]
    return found


def _held(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix as kernels read it, in 16 bytes at once."""
    held = matrix.to(device, dtype).contiguous()
    return held if held.data_ptr() % 16 == 0 else held.clone()


class _Tables:
    """The adapters of the latest step, on the device."""

    def __init__(self, places: int, linears: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.pointers = torch.zeros(places, linears, 2, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(places, linears, dtype=torch.int32, device=device)
        self.scales = torch.zeros(places, linears, dtype=torch.float32, device=device)
        self.largest_r, self.touched = 0, frozenset[int]()
        self._held: list[Adapter] = []
        self._branches: list[list[LowRank | None]] = []  # holds the memory that the addresses point to

    def take(self, adapters: list[Adapter]) -> bool:
        """Put a step's adapters in their places; returns whether graphs captured before do not do for them."""
        if len(adapters) == len(self._held) and all(a is b for a, b in zip(adapters, self._held, strict=True)):
            return False
        lines = [prepared(adapter, self._dtype, self._device) for adapter in adapters]
        for name in ("pointers", "ranks", "scales"):
            table: Tensor = getattr(self, name)
            table[: len(lines)].copy_(to_device(torch.stack([getattr(one, name) for one in lines]), self._device))
        self._held, self._branches = adapters, [one.branches for one in lines]
        before = self.largest_r, self.touched
        self.largest_r = max(self.largest_r, *(int(one.ranks.max()) * RANK_STEP for one in lines))
        self.touched |= {i for one in lines for i, branch in enumerate(one.branches) if branch}
        # without the kernel a pass holds the branches themselves, not where their addresses are
        by_address = ops.current(self._device).name == "triton" and "low_rank_rows" not in proven.refused
        return (self.largest_r, self.touched) != before or not by_address

    def rows(self, places_B: Tensor) -> RowAdapters:
        """The adapters of rows, by their places."""
        tables = self.pointers, self.ranks, self.scales
        return RowAdapters(places_B, *tables, self.largest_r, self._dtype, self.touched, self._branches)


class _Streams(threading.local):
    """This thread's stream of each device. Not one for each cache: cuBLAS keeps a workspace of some 32 MB for every stream that
    it has worked on. Not one for all threads: a graph that is captured would take up what another thread queues."""

    def __init__(self) -> None:
        self._of: dict[torch.device, Any] = {}

    def of(self, device: torch.device) -> Any:
        if device not in self._of:
            self._of[device] = torch.cuda.Stream(device)
        return self._of[device]


_streams = _Streams()


class _Captured(NamedTuple):
    replay: Callable[[], object]
    logits: Tensor
    held: list[Tensor]
    """Buffers shared with other passes: not to be freed before the graph."""


class StaticSteps:
    """The steps of one cache.

    Args:
        most: rows of a step at most. linears: branches of an adapter. dtype: of the activations.
        capture: how steps are captured; default: into CUDA graphs on a CUDA device, not at all elsewhere.
    Attributes:
        obstacle: why there are no graphs, or ''.
    """

    def __init__(
        self, most: int, linears: int, dtype: torch.dtype, device: torch.device, capture: Capture | None = None
    ) -> None:  # fmt: skip
        self._device = device
        self._capture = capture or (CudaCapture() if device.type == "cuda" else None)
        self.obstacle = "" if self._capture else f"there are none on '{device.type}'"
        with torch.inference_mode(False):
            self._tables = _Tables(most, linears, dtype, device)
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[tuple[int, bool], _Captured | None] = {}
        """By rows and whether there are adapters; None: the shape has run once."""

    def __call__(self, lines: Sequence[Sequence[int]], adapters: Sequence[Adapter | None], run: Run) -> Tensor:
        """(B, vocabulary) logits, valid until the next step.

        Args:
            lines: what the pass takes of each row: its token, its slot, and so on; as many in every step.
            run: the pass; a graph of an earlier one is taken for it.
        """
        distinct = list({id(one): one for one in adapters if one}.values())
        places = {id(one): place for place, one in enumerate(distinct)}
        of_rows = [-1 if one is None else places[id(one)] for one in adapters]
        B, rows = len(adapters), 1 << (len(adapters) - 1).bit_length()
        inputs = torch.tensor([[*line, *[line[0]] * (rows - B)] for line in (*lines, of_rows)])
        with self._own_stream():
            if distinct and self._tables.take(distinct):
                self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}
            if rows not in self._inputs:
                with torch.inference_mode(False):
                    self._inputs[rows] = torch.empty_like(inputs, device=self._device)
            self._inputs[rows].copy_(to_device(inputs, self._device))
            return self._logits(rows, bool(distinct), run)[:B]

    def _logits(self, rows: int, adapted: bool, run_pass: Run) -> Tensor:
        inputs, key = self._inputs[rows], (rows, adapted)

        def run() -> Tensor:
            return run_pass(inputs[:-1], self._tables.rows(inputs[-1]) if adapted else None)

        if self._capture is None or self.obstacle or key not in self._graphs:
            logits = run()
            self._graphs.setdefault(key, None)
            return logits
        graph = self._graphs[key]
        if graph is None:
            held = scratch_buffers()
            try:
                replay, logits = self._capture(run)
            except RuntimeError as error:
                self.obstacle = f"a step cannot be captured ({str(error).partition(chr(10))[0][:120]})"
                self._graphs.clear()
                _log.warning("Decoding falls back to eager execution without CUDA graphs, which is slower: %s.", self.obstacle)
                return run()
            graph = self._graphs[key] = _Captured(replay, logits, [*held, *scratch_buffers()])
        graph.replay()
        return graph.logits

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Work of the block is on a stream of its own, after all that was queued before and before all that is queued after it:
        graphs are not captured from the default stream."""
        if self._device.type != "cuda":
            yield
            return
        before: Any = torch.cuda.current_stream(self._device)
        own = _streams.of(self._device)
        own.wait_stream(before)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            before.wait_stream(own)
