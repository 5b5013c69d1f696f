"""Out of memory on one rank of several: all shrink alike, or go on alike. Ranks are threads here; one that communicates without
the others breaks the barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lownibble.config import TrainConfig
from lownibble.data import Example
from lownibble.training.distributed import Ranks
from lownibble.training.evaluate import Evaluator
from lownibble.training.fitting import Fitting, MemoryGoneError

LENGTHS = [10 - row // 6 for row in range(24)]


@pytest.fixture
def ranks():
    barrier, given = threading.Barrier(2, timeout=10), {}

    class InThreads(Ranks):
        def _reduced(self, counts, how):
            given[self.rank] = list(counts)
            barrier.wait()
            columns = list(zip(given[0], given[1], strict=True))
            barrier.wait()
            return [max(column) if how == dist.ReduceOp.MAX else sum(column) for column in columns]

    return [InThreads(rank, 2, "ddp") for rank in range(2)]


@pytest.fixture
def fittings(ranks):
    """Of two ranks, the first of which has captured a graph and can pin memory."""
    return [_fitting(each, graphs=[object()] * each.is_first) for each in ranks]


def _fitting(ranks, graphs):
    def drop_graphs(reason):
        had = bool(graphs)
        graphs.clear()
        return had

    passes = SimpleNamespace(
        drop_graphs=drop_graphs, set_checkpointing=lambda how: None, can_checkpoint=True, can_offload=ranks.is_first
    )
    micro = SimpleNamespace(max_tokens=None, dealt=lambda rows: rows[ranks.rank], tokens=sum)
    rows = [Example([1] * length, [True] * length, str(row)) for row, length in enumerate(LENGTHS)]
    evaluator = Evaluator(rows, None, None, 4, torch.device("cpu"))
    evaluator.ranks = ranks
    return Fitting(TrainConfig(), micro, passes, evaluator, torch.device("cpu"), ranks)


def on_both(fittings, call):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, fittings))


def test_graphs_of_one_rank_are_given_up_by_all_before_a_step_gets_smaller(fittings):
    rows = [[[8, 8]], [[20, 20]]]
    on_both(fittings, lambda fitting: fitting.shrink_step(3, rows))
    assert [fitting.micro.max_tokens for fitting in fittings] == [None, None]
    on_both(fittings, lambda fitting: fitting.shrink_step(3, rows))
    assert [fitting.micro.max_tokens for fitting in fittings] == [20, 20]


def test_an_evaluation_begins_again_with_every_row_once(fittings):
    for expected in ([None, None], [20, 20]):
        on_both(fittings, lambda fitting: fitting.shrink_evaluation(3))
        assert [fitting.evaluator.max_tokens for fitting in fittings] == expected
        shares = [[row for rows, counts in fitting.evaluator._batches(LENGTHS) if counts for row in rows] for fitting in fittings]
        assert sorted(shares[0] + shares[1]) == list(range(24))


def test_what_one_rank_cannot_do_none_does(fittings):
    rows = [[[8]], [[8]]]
    for checkpointing in (False, True):  # of the first, the graphs
        on_both(fittings, lambda fitting: fitting.shrink_step(3, rows))
        assert [fitting.fit.gradient_checkpointing for fitting in fittings] == [checkpointing] * 2

    def ends(fitting):
        with pytest.raises(MemoryGoneError):
            fitting.shrink_step(3, rows)

    on_both(fittings, ends)
