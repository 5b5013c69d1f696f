"""`lownibble bench kernels` on small shapes, on each device that is here. Oracle: the figures' own definitions, never a speed."""

import json
import math

import pytest
import torch

from lownibble.bench import kernels as bench
from lownibble.quant import layouts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_every_figure_is_measured_on_the_devices_own_kernels(monkeypatch, bitsandbytes, device):
    monkeypatch.setattr(bench, "SHAPES_NK", [(128, 128), (32, 64)])
    monkeypatch.setattr(bench, "CUDA_LOGITS_LV", (16, 1000))
    monkeypatch.setattr(bench, "CUDA_EXPERTS_ENK", (4, 64, 128))
    monkeypatch.setattr(bench, "CUDA_EXPERT_ROWS", 40)
    record = bench.bench_kernels(repeats=2, device=device)
    json.dumps(record, allow_nan=False)
    assert record["environment"]["device_type"] == device
    assert record["environment"]["kernels"] == bench.NATIVE[device][0]
    assert record["dtype"] == ("float32" if device == "cpu" else "bfloat16")
    assert record["peers_missing"] is None
    assert all(value > 0 and math.isfinite(value) for value in record["headlines"].values())
    figures = next(iter(record["threads"].values()))["dequantize_4bit"]["128x128"]
    assert figures["out_bytes"] == 128 * 128 * (4 if device == "cpu" else 2)
    assert {"native", "fill", "bitsandbytes", "bitsandbytes_kernel", "native_allocating", "reference"} <= figures["times"].keys()
    grouped = next(iter(record["threads"].values()))["grouped"]["32x64"]
    assert grouped.keys() == layouts.GROUPED.keys()
    assert all(each["ratio_vs_fill"] > 0 and each["ratio_gemv_vs_dense"] > 0 for each in grouped.values())
    assert list(next(iter(record["threads"].values())).get("cross_entropy", {})) == ["16x1000"] * (device == "cuda")
    assert list(next(iter(record["threads"].values())).get("experts", {})) == ["40x4x64x128"] * (device == "cuda")
    assert all(t["min_us"] <= t["median_us"] <= t["max_us"] for t in figures["times"].values())


def test_the_loss_is_measured_with_its_gradient():
    figures = bench._bench_cross_entropy(16, 1000, 3, torch.device("cpu"))
    assert figures["times"].keys() == {"native", "fill", "torch"}
    assert figures["logits_bytes"] == 4 * 16 * 1000
    assert figures["ratio_vs_torch"] > 0 < figures["ratio_vs_fill"]


def test_products_of_experts_are_measured_both_ways_next_to_a_loop_and_torchs():
    found = bench._bench_experts((4, 64, 128), 40, 2, torch.device("cpu"))
    assert found.keys() == {"forward", "transposed"}
    for figures in found.values():
        assert figures["times"].keys() == {"native", "loop", "torch_on_decoded"}
        assert min(figures["ratio_vs_loop"], figures["ratio_vs_torch_on_decoded"], figures["TFLOPps"]) > 0


def test_groups_of_cuda_that_fail_do_not_lose_the_rest(monkeypatch):
    """On a CPU in the place of a card."""
    saved = []
    monkeypatch.setattr(bench, "SHAPES_NK", [(32, 64), (16, 64)])
    monkeypatch.setattr(bench, "CUDA_LOGITS_LV", (16, 1000))
    monkeypatch.setattr(bench, "CUDA_EXPERTS_ENK", (4, 64, 128))
    monkeypatch.setattr(bench, "CUDA_EXPERT_ROWS", 40)
    monkeypatch.setattr(bench, "_bench_cross_entropy", lambda *_: 1 / 0)
    groups = bench._cuda_groups(1, torch.device("cpu"))
    record = {"grouped": {}}
    failed = bench._measure(record, groups, lambda: saved.append(json.dumps(record)))
    assert failed == {"cross_entropy": "ZeroDivisionError: division by zero"}
    assert list(record["experts"]) == ["40x4x64x128"]
    assert saved == ['{"grouped": {}}'] * 2


def test_without_peers_the_record_says_so(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES_NK", [(32, 64), (16, 64)])
    record = bench.bench_kernels(repeats=1, peers=False, device="cpu")
    assert record["peers_missing"] == "not asked for"
    assert {value is None for name, value in record["headlines"].items() if "bitsandbytes" in name} == {True}
