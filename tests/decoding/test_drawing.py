"""Sampling on the device. Oracle: the host's sampler, its tokens for greedy requests and its distribution for others."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lownibble.decoding.drawing import Drawer, How, most_bytes
from lownibble.serve.sampling import Sampler, Sampling

V = 50
CPU = torch.device("cpu")


def logits(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_rows_get_the_hosts_tokens():
    """Over many steps, with penalties, in slots of their own; one of another request that is drawn beside them."""
    hows = [How(), How(presence_penalty=0.7), How(frequency_penalty=0.4, repetition_penalty=1.6), How(repetition_penalty=0.8)]
    prompts = [[1, 2], [3], [4, 5, 6, 4], [7, 8]]
    drawer = Drawer(6, V, CPU)
    slots = [4, 0, 2, 5]
    for slot, how, prompt in zip(slots, hows, prompts, strict=True):
        drawer.begin(slot, how, prompt)
    drawer.begin(1, How(temperature=1.0, top_k=3), [1])
    hosts = [Sampler(Sampling(**how._asdict()), prompt) for how, prompt in zip(hows, prompts, strict=True)]
    said = []
    for step in range(30):
        rows = logits(5, step % 3)
        found = drawer(rows, [*slots, 1]).tolist()
        expected = [host(row).token for host, row in zip(hosts, rows[:4], strict=True)]
        assert found[:4] == expected
        said.append(tuple(expected))
    assert len(set(said)) > 3, "penalties change what is said"


HOWS = {
    "temperature": How(temperature=0.7),
    "top_k": How(temperature=1.3, top_k=5),
    "top_p": How(temperature=0.9, top_p=0.6),
    "min_p": How(temperature=1.0, min_p=0.2),
    "all": How(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05, presence_penalty=0.5, repetition_penalty=1.3),
}


def distribution(sampler, row, monkeypatch):
    """(V,) the probabilities with which the host's sampler draws each token: what it hands to torch, place by place."""
    probability, drawn = torch.zeros(V, dtype=torch.float64), []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda values, n, generator: drawn.append(values) or torch.tensor([len(drawn) - 1]))
        for place in range(V):
            if place and place == len(drawn[0]):
                break
            token = sampler._draw(sampler._edited(row))
            probability[token] = drawn[-1][place] / drawn[-1].sum()
    return probability


@pytest.mark.parametrize("name", HOWS)
def test_others_are_drawn_from_the_hosts_distribution(name, monkeypatch):
    """Frequencies of 4000 rows, a seed each; a deviation of five standard deviations comes once in a million tokens."""
    how, rows, prompt = HOWS[name], 4000, [0, 1, 2, 3, 4, 5]
    row = logits(1, 5)[0]
    expected = distribution(Sampler(Sampling(**how._asdict()), prompt), row, monkeypatch)
    assert float(expected.sum()) == pytest.approx(1)
    drawer = Drawer(rows, V, CPU)
    for slot in range(rows):
        drawer.begin(slot, how, prompt, seed=slot)
    found = torch.bincount(drawer(row.repeat(rows, 1), range(rows)), minlength=V).double() / rows
    assert not found[expected == 0].any()
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt() + 1 / rows).all())


def test_a_seed_draws_the_same_whatever_else_is_running():
    how = How(temperature=1.0)
    rows = logits(3, 9)

    def tokens(slot, others):
        drawer = Drawer(4, V, CPU)
        for other in others:
            drawer.begin(other, How(temperature=2.0, top_k=9), [1], seed=other)
        drawer.begin(slot, how, [3], seed=12345)
        return [int(drawer(row.repeat(1 + len(others), 1), [*others, slot])[-1]) for row in rows]

    assert tokens(0, []) == tokens(3, [1, 2])
    drawer = Drawer(1, V, CPU)
    drawer.begin(0, how, [3], seed=0)
    assert len({int(drawer(rows[:1], [0])) for _ in range(20)}) > 3, "each token has its own number"


def test_splitmix64_is_the_published_one():
    """The first three words of the reference implementation for the seed 1234567."""
    drawer = Drawer(1, V, CPU)
    drawer.begin(0, How(temperature=1.0), [1], seed=1234567)
    words = []
    for _ in range(3):
        words.append(float(drawer._uniform(torch.tensor([0]))))
        drawer._made += 1
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words == [(word >> 11) * 2.0**-53 for word in published]


def test_a_row_that_is_not_finite_has_no_token():
    drawer = Drawer(2, V, CPU)
    rows = logits(2)
    rows[1, 7] = float("nan")
    drawer.begin(0, How(), [1])
    drawer.begin(1, How(temperature=1.0), [1])
    assert drawer(rows, [0, 1]).tolist() == [int(rows[0].argmax()), -1]


def test_rows_that_are_drawn_one_after_another_are_drawn_as_all_at_once(monkeypatch):
    hows, found = [How(), *HOWS.values()], []
    for at_once in (10**9, 2 * V, 1):
        monkeypatch.setattr("lownibble.decoding.drawing._AT_ONCE", at_once)
        drawer = Drawer(len(hows), V, CPU)
        for slot, how in enumerate(hows):
            drawer.begin(slot, how, [1, 2], seed=slot)
        found.append([drawer(logits(len(hows), step), range(len(hows))).tolist() for step in range(4)])
    assert found[0] == found[1] == found[2]
    assert len({tuple(said) for said in found[0]}) > 2


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            storage = made.untyped_storage() if isinstance(made, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._goes, storage._cdata, storage.nbytes())
        return out

    def _goes(self, key, nbytes):
        self._known.remove(key)
        self.now -= nbytes


@pytest.mark.parametrize(("rows", "vocabulary"), [(64, 256_000), (8, 256_000), (96, 32_000), (2, 50)])
def test_working_memory_is_bounded(rows, vocabulary):
    """Tensors of these sizes, without values. What sorting takes inside the operation, values and places again, is not seen."""
    sorts = 32 * min(rows * vocabulary, max(2**21, vocabulary))
    with FakeTensorMode(), Held() as held:
        drawer = Drawer(rows, vocabulary, CPU)
        for slot in range(rows):
            drawer.begin(slot, HOWS["all"], [1, 2])
        row = torch.zeros(rows, vocabulary, dtype=torch.bfloat16)
        before = held.now
        held.most = 0
        drawer(row, range(rows))
        counts = rows * vocabulary * 5
        assert before - row.nbytes - counts < 200 * rows + 1000, "seeds and options"
        assert held.most - before <= most_bytes(rows, vocabulary) - counts - sorts + 200 * rows + 1000
        assert held.most - before > 0.8 * (most_bytes(rows, vocabulary) - counts - sorts), "the bound is no excuse"
