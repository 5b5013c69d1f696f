"""Pages of bytes, of which a fixed number is resident: the store under the paged optimiser.

Resident pages lie in buffers that are allocated once and reused. When another page is wanted, the least recently used one
gives up its buffer; it is written back first if it was changed since. One background thread does all the copying, in the
order asked: a page asked for ahead of its use is read while the caller works on another, and the page that it displaces is
written behind the caller's back. Copies are explicit, so what is in memory is what this module put there: `resident_bytes`
never exceeds the budget.

**On a CPU the rest is in a file**, without a name (it vanishes with the process, also with one that is killed), its space
reserved when it is made: a full disk is found before the first step, not in the middle of the run. It is read and written
with `preadv` and `pwritev` straight into the buffers. Not through a memory map: mapped pages that were touched count as the
process's memory until the kernel takes them back, which page is in memory would be the kernel's choice, and a full disk would
be a signal (SIGBUS) instead of an error. The kernel may still keep parts of the file in memory that nobody else needs; it
gives them up on demand.

**On CUDA the rest is in pinned host memory**, copied on a stream of its own. Not managed memory: it faults page by page when
a kernel touches it, reads nothing ahead, and exists on CUDA only (bitsandbytes' paged optimisers use it).

Pages that were never written are zeros and cost nothing outside. A failed write leaves the page where it was, changed and
resident, so nothing is lost by the failure itself, and the next use tries again.
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
from lownibble.optim.specs import PAGE_BYTES


class Backing(Protocol):
    """Where pages are that are not resident. One thread uses it. `nbytes`: what it holds."""

    nbytes: int

    def read(self, page: int, into: Tensor) -> None: ...  # noqa: D102

    def write(self, page: int, source: Tensor) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class FileBacking:
    """Pages in a file without a name in `folder` (default: the system's folder for temporary files)."""

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
        """Fill the buffer with a page; one never written is zeros, as the file has it.

        No torch operation here or in `write`: it would give this thread a team of OpenMP threads, and with more threads than
        cores the main thread's no longer wait actively for each other, in the whole run.
        """
        self._move(os.preadv, page, into)

    def write(self, page: int, source: Tensor) -> None:
        """Store a page."""
        self._move(os.pwritev, page, source)
        self._written.add(page)
        self.nbytes = len(self._written) * self._page_bytes

    def close(self) -> None:
        """Remove the file."""
        self._end()

    def _move(self, call: Any, page: int, buffer: Tensor) -> None:
        memory, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        try:
            while done < self._page_bytes:  # a signal may cut a call short
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
    else:  # macOS: a file with holes
        os.truncate(file, n_bytes)


class PinnedBacking:
    """Pages in pinned host memory, each allocated when it is first written; copies on a stream of their own."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self._page_bytes, self.nbytes = page_bytes, 0
        self._pages: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream(device)

    def read(self, page: int, into: Tensor) -> None:
        """Fill the buffer with a page; one never written is zeros."""
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
        """Give the memory back."""
        self._pages.clear()


class PageStore:
    """`n_pages` pages of `page_bytes` bytes, zeros at first, of which as many are resident as fit into `budget_bytes`.

    One thread uses it. Without a budget, or with one that is large enough, everything is resident and there is no file and no
    thread.

    Attributes:
        n_slots: how many pages can be resident.
        reads, writes: pages brought in and written back so far.

    Raises:
        ConfigError: the budget is below one page.
        OutputError: the folder cannot be written, or its disk has no room.
    """

    def __init__(
        self, n_pages: int, page_bytes: int = PAGE_BYTES, budget_bytes: int | None = None, *,
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
        self._pins: Counter[int] = Counter()  # page -> uses that have not ended
        self._changed: set[int] = set()
        self._awaited: set[int] = set()  # asked for ahead and not used yet: they go last
        self._asked: dict[int, Future[None]] = {}  # pages that the background thread will load
        self._ends: dict[int, torch.cuda.Event] = {}  # slot -> when the device is done with its last use
        self._backing: Backing | None = None
        if not paged:
            self._slots.update((page, page) for page in range(n_pages))
            self._free.clear()
            return
        if self._cuda:
            torch.cuda.current_stream(device).synchronize()  # whoever had this memory before is done with it
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
        """Bytes of pages held outside."""
        return self._backing.nbytes if self._backing else 0

    def prefetch(self, pages: Iterable[int]) -> None:
        """Start to load pages that will be used soon, in this order; more than `n_slots - 1` are of no use. Returns at once."""
        if self._backing is None:
            return
        with self._lock:
            for page in pages:
                self._awaited.add(page)
                if page not in self._slots:
                    self._ask(page)

    @contextmanager
    def use(self, page: int, *, change: bool = True) -> Iterator[Tensor]:
        """The (page_bytes,) uint8 buffer of a page; it stays where it is until the block ends.

        Args:
            change: whether the block writes into it.
        Raises:
            TrainingError: a page could not be read or written; contents are as before.
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
                self._awaited.discard(page)  # not awaited: wanted now
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
        """On the background thread: make a page resident. Where no buffer can be had, nothing happens: it was advice."""
        assert self._backing is not None
        slot, loaded = None, False
        try:
            if page not in self._slots:  # it came back when its write failed
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
        """A slot to load a page into: a free one, or that of the least recently used page, written back if it was changed.

        A page that is only asked for ahead takes no place from another such page.
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
        """Drop all pages and the file."""
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
