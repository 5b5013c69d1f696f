"""The C heap in training. Oracle: the resident set (faults cannot tell: with transparent huge pages one is up to 512 pages)."""

import ctypes

import psutil
import pytest
import torch

from lownibble.memory import usage

MIB = 2**20
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


def resident():
    return psutil.Process().memory_info().rss


def test_what_is_freed_is_kept_inside_and_given_back_behind():
    usage.trim_heap()
    before = resident()
    with usage.kept_heap():
        blocks = [torch.empty(24 * MIB, dtype=torch.uint8).fill_(1) for _ in range(10)]
        del blocks
        held = resident()
    assert held > before + 200 * MIB
    assert resident() < held - 200 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    trimmed = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(usage, "trim_heap", lambda: trimmed.append(1))
    with usage.kept_heap():
        pass
    assert not trimmed
