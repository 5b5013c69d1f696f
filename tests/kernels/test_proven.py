"""Kernels that are held against plain torch before they are trusted: here on a CPU, where they run in Triton's interpreter and
are taken for untried ones. Faults are put into what they give."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_few_rows import WEIGHTS, tables

import lownibble as ln
from lownibble import record
from lownibble.errors import BackendError, ConfigError
from lownibble.kernels import ops, proven, reference, rows
from lownibble.kernels.capture import ALONE
from lownibble.kernels.decoder import LowRank
from lownibble.kernels.rows import Attending

pytest.importorskip("triton")
from lownibble.kernels import triton_decode, triton_few

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="faults are put into kernels in the interpreter")


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """As on a card on which nothing has run yet."""
    for name in ("refused", "calls", "_forms"):
        monkeypatch.setattr(proven, name, type(getattr(proven, name))())
    monkeypatch.setattr(
        proven, "trusted", lambda kernel, form, device: kernel not in proven.refused and (kernel, form) in proven._forms
    )
    with ln.use_backend("triton"):
        yield


def product(T):
    weight = WEIGHTS["nf4"]()
    N, K = weight.shape
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).bfloat16()
    dense = reference.dequantize_4bit(weight, torch.empty(N, K))
    return ops.gemv_4bit(x, weight), x.float() @ dense.t()


def attention():
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16), (3, 2, 50, 16), (3, 2, 50, 16)))
    slots, positions = torch.tensor([2, 0]), torch.tensor([41, 3])
    given = q, keys, values, slots, positions, Attending()
    return ops.attend_slots(*given), rows.attend_slots(*given)


def branches():
    generator = torch.Generator().manual_seed(2)
    A, B, x = (torch.randn(shape, generator=generator) for shape in ((16, 40), (30, 16), (2, 40)))
    adapters = tables([[None, LowRank(A, B, 0.5), None]], torch.float32)._replace(at=torch.tensor([0, -1]))
    y, expected = torch.ones(2, 30), torch.ones(2, 30)
    ops.add_low_rank_rows(y, x, adapters, 1)
    rows.add_low_rank_rows(expected, x, adapters, 1)
    return y, expected


CASES = {
    "one_row": (lambda: product(1), triton_few, "product"),
    "few_rows": (lambda: product(3), triton_few, "product"),
    "attend_slots": (attention, triton_decode, "attend_slots"),
    "low_rank_rows": (branches, triton_decode, "add_low_rank_rows"),
}


def check(case):
    found, expected = (each.float() for each in case())
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("kernel", CASES)
def test_a_kernel_that_gives_what_torch_gives_is_compared_once(kernel, monkeypatch):
    case, module, name = CASES[kernel]
    run, ran = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *given: ran.append(1) or run(*given))
    compared = []
    monkeypatch.setattr(proven, "prove", lambda *given, prove=proven.prove: compared.append(given[0]) or prove(*given))
    check(case)
    check(case)
    assert (compared, len(ran)) == ([kernel], 2)
    assert (proven.words(), proven.calls) == ("", {})


def fails(*given):
    raise RuntimeError("PassManager::run failed\nand more")


def gives_wrong(run):
    def wrong(*given):
        y = run(*given)
        (given[0] if y is None else y).mul_(-1)
        return y

    return wrong


@pytest.mark.parametrize("fault", ["fails", "gives something else", "gives NaN"])
@pytest.mark.parametrize("kernel", CASES)
def test_plain_torch_computes_in_the_place_of_a_kernel_that_cannot_be_trusted(kernel, fault, monkeypatch, caplog):
    case, module, name = CASES[kernel]
    run = getattr(module, name)

    def nan(*given):
        y = run(*given)
        return (given[0] if y is None else y).fill_(torch.nan)

    monkeypatch.setattr(module, name, {"fails": fails, "gives NaN": nan}.get(fault) or gives_wrong(run))
    for _ in range(3):
        check(case)
    assert {*proven.refused} == {kernel}
    assert ("PassManager::run failed" if fault == "fails" else "differ from torch's by") in proven.words()
    assert proven.calls == {kernel: 3}
    assert caplog.text.count(f"'{kernel}' cannot be used") == 1, "said once"


def test_lack_of_memory_is_no_fault_of_a_kernel(monkeypatch):
    def exhausted(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_few, "product", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        product(1)
    assert not proven.refused


def test_a_kernel_that_ends_the_context_is_named_with_the_way_around(monkeypatch):
    monkeypatch.setattr(triton_decode, "attend_slots", fails)
    monkeypatch.setattr(proven, "is_lost", lambda device: True)
    monkeypatch.setitem(proven.refused, "one_row", "it failed")
    with pytest.raises(BackendError, match="LOWNIBBLE_PLAIN_KERNELS=one_row,attend_slots"):
        attention()


def test_results_that_say_nothing_prove_nothing():
    for value in (0.0, torch.nan):
        y = torch.full((2,), value)
        assert proven.prove("one_row", 1, lambda y=y: y, lambda y=y: y) is y
    assert not proven.refused
    assert not proven._forms
    assert proven.prove("one_row", 1, lambda: torch.ones(2), lambda: torch.zeros(2)).tolist() == [0, 0]


def test_kernels_that_the_environment_names_do_not_run(monkeypatch):
    monkeypatch.setenv(proven.VARIABLE, "few_rows, attend_slots")
    assert [*proven._named()] == ["few_rows", "attend_slots"]
    monkeypatch.setenv(proven.VARIABLE, "gemv")
    with pytest.raises(ConfigError, match="names 'gemv'"):
        proven._named()


def test_records_say_which_kernels_were_replaced(monkeypatch):
    assert "plain_kernels" not in record.environment()
    monkeypatch.setitem(proven.refused, "one_row", "it failed")
    assert record.environment()["plain_kernels"] == {"one_row": "it failed"}


def test_nobody_waits_for_the_device_while_a_graph_is_captured(monkeypatch):
    waited, device = threading.Event(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.set())
    with ThreadPoolExecutor(1) as other:
        with ALONE:
            lost = other.submit(proven.is_lost, device)
            assert not waited.wait(0.05)
        assert lost.result(10) is False
    assert waited.is_set()
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert proven.is_lost(device)
