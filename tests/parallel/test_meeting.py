"""Processes that torchrun starts again find each other, whatever an earlier start left in its store."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from lownibble import launch
from lownibble.config import DataConfig, RunConfig, TrainConfig
from lownibble.training import distributed, output
from lownibble.training.distributed import Ranks
from lownibble.training.run import _for_ranks


@pytest.fixture
def port():
    """Of a store that outlives the processes, as torchrun's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # which serves until then


def store_of(port, seconds=20):
    patience = timedelta(seconds=seconds)
    return PrefixStore(launch.PREFIX, TCPStore("127.0.0.1", port, timeout=patience, wait_for_workers=False))


class Start:
    """Ranks that meet, each in a thread; they come when they are told."""

    def __init__(self, port, world):
        self.port, self.world, self.names, self.threads = port, world, {}, []

    def come(self, *ranks):
        for rank in ranks:
            self.threads.append(threading.Thread(target=self._meet, args=(rank,)))
            self.threads[-1].start()
        return self

    def _meet(self, rank):
        self.names[rank] = distributed._meet(store_of(self.port), rank, self.world, timedelta(seconds=20))

    def name(self):
        for thread in self.threads:
            thread.join()
        assert len(self.names) == self.world
        (name,) = set(self.names.values())
        return name


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_start_has_a_name_of_its_own_whoever_comes_first(port, first):
    earlier = Start(port, 3).come(0, 1, 2).name()
    start = Start(port, 3).come(first)
    start.threads[0].join(0.3)
    assert not start.names  # it waits for the others, and takes no part in what was
    assert start.come(*{0, 1, 2} - {first}).name() != earlier


def test_ranks_that_died_while_they_met_do_not_count(port):
    store = store_of(port)
    store.set(distributed._CALL, "dead0")
    store.set("dead0/1", "dead1")
    store.set("dead0/2", "dead2")  # the first rank was killed before it answered
    assert not Start(port, 3).come(1, 2, 0).name().startswith("dead")


def test_a_rank_that_does_not_come(port):
    with pytest.raises(RuntimeError):
        distributed._meet(store_of(port, 1), 0, 2, timedelta(seconds=1))
    with pytest.raises(RuntimeError, match="rank 0 did not answer"):  # that call is left, and nobody behind it
        distributed._meet(store_of(port, 1), 1, 2, timedelta(seconds=1))


def test_what_an_earlier_start_said_does_not_silence_this_one(port, monkeypatch):
    store_of(port).set(launch.ERROR, "out of disk")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_SECONDS", 1)
    assert not launch.should_tell("out of disk")
    Start(port, 2).come(0, 1).name()
    assert launch.should_tell("out of disk")


def test_all_ranks_resume_though_only_one_machine_has_counted(monkeypatch, tmp_path):
    output.begin(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(Ranks, "most", lambda self, count: max(count, 1))  # another agent has restarted its processes
    monkeypatch.setattr(Ranks, "from_first", lambda self, make: make())
    config = RunConfig(model="m", data=DataConfig(path="d"), train=TrainConfig(output_dir=str(tmp_path)))
    assert _for_ranks(config, Ranks(0, 2, "ddp")).train.resume
