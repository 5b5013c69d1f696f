"""The C heap in training. Oracles: the kernel's count of page faults, and the resident set."""

import ctypes
import resource

import psutil
import pytest
import torch

from lownibble.memory import usage

MIB = 2**20
PAGES = 24 * MIB // resource.getpagesize()
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(24 * MIB, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_that_was_freed_costs_no_faults_again():
    """At first it may: what other tests left free may be in pieces, with a small block behind each."""
    with usage.kept_heap():
        faults = [faults_of_a_block() for _ in range(8)]
    assert min(faults) < PAGES / 2 < faults_of_a_block()


def test_what_is_free_is_given_back():
    with usage.kept_heap():
        blocks = [torch.empty(24 * MIB, dtype=torch.uint8).fill_(1) for _ in range(10)]
        del blocks
        held = psutil.Process().memory_info().rss
    assert psutil.Process().memory_info().rss < held - 200 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    trimmed = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(usage, "trim_heap", lambda: trimmed.append(1))
    with usage.kept_heap():
        pass
    assert not trimmed
