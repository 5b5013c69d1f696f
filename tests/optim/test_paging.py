"""The page store. Oracle: a dict of bytes; for failures, the store's own contents before them."""

import errno
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lownibble.errors import ConfigError, OutputError, TrainingError
from lownibble.optim.paging import FileBacking, PageStore

PAGE = 256


def _filled(value):
    return torch.full((PAGE,), value, dtype=torch.uint8)


@given(
    n_pages=st.integers(1, 7),
    slots=st.integers(1, 8),
    steps=st.lists(
        st.tuples(st.sampled_from(["read", "write", "prefetch"]), st.lists(st.integers(0, 6), min_size=1, max_size=5)),
        max_size=40,
    ),
    spare=st.integers(0, PAGE - 1),
)
@settings(max_examples=150)
def test_the_store_is_a_dict_of_bytes(n_pages, slots, steps, spare):
    held, budget = {}, slots * PAGE + spare
    with PageStore(n_pages, PAGE, budget) as store:
        for number, (action, pages) in enumerate(steps):
            pages = [page % n_pages for page in pages]
            if action == "prefetch":
                store.prefetch(pages)
            for page in pages if action != "prefetch" else ():
                with store.use(page, change=action == "write") as buffer:
                    assert torch.equal(buffer, held.get(page, _filled(0)))
                    if action == "write":
                        held[page] = _filled(number + 1)
                        buffer.copy_(held[page])
            assert store.resident_bytes <= budget
        for page in range(n_pages):
            with store.use(page, change=False) as buffer:
                assert torch.equal(buffer, held.get(page, _filled(0)))


def test_two_pages_in_use_stay_where_they_are():
    with PageStore(4, PAGE, 2 * PAGE) as store:
        with store.use(0) as first, store.use(1) as second:
            store.prefetch([2, 3])
            first.fill_(1), second.fill_(2)
        for page in (2, 3):
            with store.use(page) as buffer:
                buffer.fill_(page + 1)
        for page in range(4):
            with store.use(page) as buffer:
                assert torch.equal(buffer, _filled(page + 1))


def test_the_least_recently_used_page_goes():
    with PageStore(4, PAGE, 3 * PAGE) as store:
        for page in (0, 1, 2, 0, 3):  # 1 goes for 3
            with store.use(page):
                pass
        assert (store.reads, store.writes) == (4, 1)
        for page in (0, 2, 3):
            with store.use(page):
                pass
        assert store.reads == 4
        with store.use(1):
            pass
        assert store.reads == 5


def test_pages_that_were_only_read_are_not_written_back():
    with PageStore(3, PAGE, PAGE) as store:
        for page in (0, 1, 2, 0):
            with store.use(page, change=False) as buffer:
                assert not buffer.any()
        assert store.writes == 0
        assert store.backing_bytes == 0


def test_a_budget_for_all_pages_needs_no_file_and_no_thread(tmp_path):
    before = threading.active_count()
    with PageStore(3, PAGE, 3 * PAGE, folder=tmp_path / "absent") as store, store.use(2) as buffer:
        assert not buffer.any()
        assert threading.active_count() == before
    with PageStore(3, PAGE, folder=tmp_path / "absent") as store:
        assert store.resident_bytes == 3 * PAGE


def test_the_file_has_no_name_and_its_space_is_reserved(tmp_path):
    free = os.statvfs(tmp_path)
    with PageStore(1000, 1 << 12, 1 << 12, folder=tmp_path):
        assert list(tmp_path.iterdir()) == []
        assert os.statvfs(tmp_path).f_bfree < free.f_bfree - 900 or free.f_fsid != os.statvfs(tmp_path).f_fsid


def test_a_store_that_is_dropped_ends_its_thread_and_file():
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    store = PageStore(3, PAGE, PAGE)
    with store.use(0), pytest.raises(AssertionError), store.use(1):
        pass
    store.prefetch([1])
    thread = next(iter(store._thread._threads))
    del store
    gc.collect()
    thread.join(5)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


def test_a_budget_below_a_page_is_refused():
    with pytest.raises(ConfigError, match="at least one page"):
        PageStore(3, PAGE, PAGE - 1)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"(?s)Cannot make a file.*absent.*--output"):
        PageStore(3, PAGE, PAGE, folder=tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        PageStore(3, PAGE, PAGE, folder=tmp_path)


def test_a_disk_without_room_is_refused_at_the_start(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"Cannot reserve 10 MiB .* No space left on device"):
        PageStore(10, 1 << 20, 1 << 20, folder=tmp_path)


def test_a_limit_on_file_sizes_is_refused_at_the_start(tmp_path, forked):
    """A real failure of the reservation, not a simulated one."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from lownibble.optim.paging import PageStore;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "PageStore(10, 1 << 20, 1 << 20, folder=Path(sys.argv[1]))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "OutputError: Cannot reserve 10 MiB" in found.stderr


@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_failing_disk_loses_nothing(monkeypatch, failing):
    with PageStore(3, PAGE, PAGE) as store:
        for page in range(3):
            with store.use(page) as buffer:
                buffer.fill_(page + 1)
        sick = True

        def call(name):
            real = getattr(os, name)

            def moved(file, buffers, place):
                if sick:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(file, [buffers[0][:100]], place)  # short, as after a signal

            monkeypatch.setattr(os, name, moved)

        call("pwritev" if failing == "write" else "preadv")
        store.prefetch([0])  # fails in the background: it was advice
        with pytest.raises(TrainingError, match=r"(?s)No space left on device.*--resume"), store.use(0):
            pass
        sick = False
        for page in (2, 0, 1):
            with store.use(page) as buffer:
                assert torch.equal(buffer, _filled(page + 1))


def test_memory_stays_within_the_budget():
    """The process's own peak, in a process of its own: 64 MiB of pages through 4 MiB."""
    code = (
        "import resource, torch; from lownibble.optim.paging import PageStore\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with PageStore(64, 1 << 20, 4 << 20) as store:\n"
        "    for page in [*range(64), *range(64)]:\n"
        "        with store.use(page) as buffer: buffer.fill_(1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) * (1 if sys.platform == "linux" else 1 / 1024) < 12 << 10  # KiB: the budget, a thread, its stack


def test_a_short_file_is_an_error():
    backing = FileBacking(None, 2, PAGE)
    backing.write(1, _filled(1))
    os.ftruncate(backing._file, PAGE)
    with pytest.raises(TrainingError, match="the file ended"):
        backing.read(1, _filled(0))
    backing.close()
