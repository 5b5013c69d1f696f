"""Page store of the paged optimiser: pages of bytes, of which a fixed number is resident.

Resident pages are in buffers that are allocated once and reused. Loading a page evicts the least recently used one, which is
written back first if it is dirty. One background thread does all copying, in request order: a prefetched page is read while the
caller works on another, and the evicted page is written in the background. All copies are explicit, so only this module decides
which pages are in memory: `resident_bytes` never exceeds the budget.

**On a CPU the other pages are in an anonymous temporary file** (it vanishes with the process, even a killed one), with its space
reserved on creation: a full disk shows before the first step, not in the middle of the run. It is read and written with `preadv`
and `pwritev` directly from and to the buffers. Rejected: a memory map. Touched mapped pages count towards the process's resident
set until the kernel reclaims them, the kernel would choose which pages are in memory, and a full disk would raise SIGBUS instead
of an error. The kernel may still cache parts of the file in otherwise free memory, which it gives up on demand.

**On CUDA the other pages are in pinned host memory**, copied on a separate stream. Rejected: managed memory, which faults page by
page when a kernel touches it, does not prefetch, and exists on CUDA only (bitsandbytes' paged optimisers use it).

Pages that were never written are zeros and take no backing memory. If a write fails, the page stays resident and dirty, so no
data is lost and the next use retries.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from lownibble.errors import ConfigError, OutputError, TrainingError


class Backing(Protocol):
    """Storage of pages that are not resident; used by one thread. `nbytes`: bytes of the pages it holds."""

    nbytes: int

    def read(self, page: int, into: Tensor) -> None: ...  # noqa: D102

    def write(self, page: int, source: Tensor) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class FileBacking:
    """Pages in an anonymous file in `folder` (default: the system's folder for temporary files)."""

    def __init__(self, folder: Path | None, n_pages: int, page_bytes: int) -> None:
        self._folder, self._page_bytes, self.nbytes = folder or Path(tempfile.gettempdir()), page_bytes, 0
        self._written: set[int] = set()
        total = n_pages * page_bytes
        try:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(
                f"Cannot make a file for the optimiser's pages in '{self._folder}': {error.strerror}. {self._remedy()}"
            ) from None
        self._end = weakref.finalize(self, file.close)
        self._file = file.fileno()
        try:
            _reserve(self._file, total)
        except OSError as error:
            self._end()
            raise OutputError(
                f"Cannot reserve {total / 2**20:,.0f} MiB for the optimiser's pages in '{self._folder}': {error.strerror}. "
                f"Free some space there, or: {self._remedy()}"
            ) from None

    def _remedy(self) -> str:
        return "Choose another --output (without one: another TMPDIR), or train with the unpaged optimiser."

    def read(self, page: int, into: Tensor) -> None:
        """Read a page into the buffer; zeros if it was never written, as in the file.

        No torch operation here or in `write`: it would start an OpenMP team for this thread, and with more threads than cores
        the main thread's team would stop spin-waiting for the rest of the run.
        """
        self._move(os.preadv, page, into)

    def write(self, page: int, source: Tensor) -> None:
        """Store a page."""
        self._move(os.pwritev, page, source)
        self._written.add(page)
        self.nbytes = len(self._written) * self._page_bytes

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._end()

    def _move(self, call: Any, page: int, buffer: Tensor) -> None:
        memory, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        try:
            while done < self._page_bytes:  # a signal may interrupt a call
                moved = call(self._file, [memory[done:]], page * self._page_bytes + done)
                if not moved:
                    raise OSError(0, "the file ended")
                done += moved
        except OSError as error:
            raise TrainingError(
                f"The optimiser's pages in '{self._folder}' cannot be read or written: {error.strerror}. Checkpoints are whole: "
                "free some space or choose a sound disk, then go on with --resume."
            ) from error


def _reserve(file: int, n_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
    else:  # macOS: a sparse file
        os.truncate(file, n_bytes)


class PinnedBacking:
    """Pages in pinned host memory, each allocated on its first write; copies run on a separate stream."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self._page_bytes, self.nbytes = page_bytes, 0
        self._pages: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream(device)

    def read(self, page: int, into: Tensor) -> None:
        """Copy a page into the buffer; zeros if it was never written."""
        with torch.cuda.stream(self._stream):
            if page in self._pages:
                into.copy_(self._pages[page], non_blocking=True)
            else:
                into.zero_()
        self._stream.synchronize()

    def write(self, page: int, source: Tensor) -> None:
        """Store a page."""
        if page not in self._pages:
            try:
                self._pages[page] = torch.empty(self._page_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise TrainingError(
                    f"There is no pinned host memory for the optimiser's pages after {self.nbytes / 2**20:,.0f} MiB: {error}. "
                    "Raise --optim-page-budget, or use an 8-bit optimiser."
                ) from error
            self.nbytes += self._page_bytes
        with torch.cuda.stream(self._stream):
            self._pages[page].copy_(source, non_blocking=True)
        self._stream.synchronize()

    def close(self) -> None:
        """Free the memory."""
        self._pages.clear()


class PageStore:
    """`n_pages` pages of `page_bytes` bytes, initially zero, of which as many are resident as fit into `budget_bytes`.

    For use from one thread. Without a budget, or with one that holds all pages, everything is resident and there is no backing
    file or memory and no background thread.

    Attributes:
        n_slots: number of pages that can be resident.
        reads, writes: pages loaded and written back so far.

    Raises:
        ConfigError: the budget is below one page.
        OutputError: the folder is not writable, or its disk has too little space.
    """

    def __init__(
        self, n_pages: int, page_bytes: int, budget_bytes: int | None = None, *,
        folder: Path | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        device = torch.device(device)
        self.n_pages, self.page_bytes = n_pages, page_bytes
        self.n_slots = n_pages if budget_bytes is None else min(n_pages, budget_bytes // page_bytes)
        self.reads = self.writes = 0
        if n_pages and not self.n_slots:
            raise ConfigError(
                f"The page budget must be at least one page, {page_bytes} bytes. Got {budget_bytes}. Raise --optim-page-budget."
            )
        self._cuda = device.type == "cuda"
        paged = self.n_slots < n_pages
        self._buffers = (torch.empty if paged else torch.zeros)(self.n_slots, page_bytes, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()
        self._slots: OrderedDict[int, int] = OrderedDict()  # resident page -> slot, least recently used first
        self._free = list(range(self.n_slots))
        self._pins: Counter[int] = Counter()  # page -> number of open uses
        self._changed: set[int] = set()  # dirty pages
        self._awaited: set[int] = set()  # prefetched and not used yet: evicted last
        self._asked: dict[int, Future[None]] = {}  # page -> its pending load
        self._ends: dict[int, torch.cuda.Event] = {}  # slot -> event: the device has finished its last use
        self._backing: Backing | None = None
        if not paged:
            self._slots.update((page, page) for page in range(n_pages))
            self._free.clear()
            return
        if self._cuda:
            torch.cuda.current_stream(device).synchronize()  # earlier uses of the buffers' memory have finished
            self._backing = PinnedBacking(device, page_bytes)
        else:
            self._backing = FileBacking(folder, n_pages, page_bytes)
        self._thread = ThreadPoolExecutor(1, "pages")

    @property
    def resident_bytes(self) -> int:
        """Bytes of the buffers in use."""
        return (self.n_slots - len(self._free)) * self.page_bytes

    @property
    def backing_bytes(self) -> int:
        """Bytes of pages in the backing file or memory."""
        return self._backing.nbytes if self._backing else 0

    def prefetch(self, pages: Iterable[int]) -> None:
        """Start loading pages in this order; more than `n_slots - 1` have no benefit. Returns at once."""
        if self._backing is None:
            return
        with self._lock:
            for page in pages:
                self._awaited.add(page)
                if page not in self._slots:
                    self._ask(page)

    @contextmanager
    def use(self, page: int, *, change: bool = True) -> Iterator[Tensor]:
        """The (page_bytes,) uint8 buffer of a page, pinned in place until the block ends.

        Args:
            change: whether the block writes into it.
        Raises:
            TrainingError: a page could not be read or written; contents are unchanged.
        """
        slot = self._pin(page)
        try:
            yield self._buffers[slot]
        finally:
            with self._lock:
                self._pins[page] -= 1
                if not self._pins[page]:
                    del self._pins[page]
                if change:
                    self._changed.add(page)
                if self._cuda and self._backing:
                    self._ends[slot] = torch.cuda.current_stream(self._buffers.device).record_event()

    def _pin(self, page: int) -> int:
        while True:
            with self._lock:
                self._awaited.discard(page)  # needed now, no longer a prefetch
                if page in self._slots:
                    self._slots.move_to_end(page)
                    self._pins[page] += 1
                    return self._slots[page]
                assert len(self._pins) < self.n_slots, "all resident pages are in use at once"
                load = self._ask(page)
            load.result()

    def _ask(self, page: int) -> Future[None]:
        if page not in self._asked:
            self._asked[page] = self._thread.submit(self._load, page)
        return self._asked[page]

    def _load(self, page: int) -> None:
        """On the background thread: make a page resident. Does nothing if no buffer is available: prefetching is best effort."""
        assert self._backing is not None
        slot, loaded = None, False
        try:
            if page not in self._slots:  # else its write-back failed and it is still resident
                slot = self._vacate(self._backing, page)
            if slot is not None:
                self._backing.read(page, self._buffers[slot])
                loaded = True
        finally:
            with self._lock:
                del self._asked[page]
                if loaded and slot is not None:
                    self._slots[page] = slot
                    self.reads += 1
                elif slot is not None:
                    self._free.append(slot)

    def _vacate(self, backing: Backing, page: int) -> int | None:
        """A slot to load a page into: a free one, or that of the least recently used page, written back if dirty; else None.

        A prefetch does not evict another prefetched page.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
            old = next((other for other in self._slots if other not in self._pins and other not in self._awaited), None)
            if old is None and page not in self._awaited:
                old = next((other for other in self._slots if other not in self._pins), None)
            if old is None:
                return None
            slot = self._slots.pop(old)
            self._awaited.discard(old)
        if slot in self._ends:
            self._ends.pop(slot).synchronize()
        if old in self._changed:
            try:
                backing.write(old, self._buffers[slot])
            except BaseException:
                with self._lock:
                    self._slots[old] = slot
                raise
            self._changed.discard(old)
            self.writes += 1
        return slot

    def close(self) -> None:
        """Release all pages and the backing file or memory."""
        if self._backing is not None:
            self._thread.shutdown(cancel_futures=True)
            self._backing.close()
        self._slots.clear()
        self._free = list(range(self.n_slots))
        self._buffers = self._buffers.new_empty(0)

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
