"""Shards in host memory: on CPUs, where nothing moves, runs equal those without bit for bit; on a card, see the memory.

Oracle on a card: the same run with its shards there. Kernels of the CPU round the optimiser's step in another way.
"""

import pytest
import torch
from ranks import Workers
from test_parity import RESULT, assert_close, forget, in_ranks, options, tensors  # noqa: F401

OFFLOADED = {"fsdp_cpu_offload": True}
STATE = "checkpoints/step-000004/state.safetensors"


@pytest.mark.slow
def test_offloaded_shards_train_as_others_and_checkpoints_are_exchanged(two, options, tmp_path):  # noqa: F811
    wanted = options(max_steps=4, save_steps=2)
    plain, offloaded = (tmp_path / name for name in ("plain", "offloaded"))
    whole, _ = two.train(in_ranks(wanted, "fsdp", tmp_path, output_dir=str(plain)))
    first, second = two.train(in_ranks(wanted, "fsdp", tmp_path, **OFFLOADED, output_dir=str(offloaded)))
    assert "error" not in first, first
    assert first["losses"] == second["losses"] == whole["losses"]
    assert [first[key] for key in ("norms", "evaluations")] == [whole[key] for key in ("norms", "evaluations")]
    held = [tensors(plain), tensors(plain, STATE)]
    for name, expected in zip((RESULT, STATE), held, strict=True):
        assert (offloaded / name).read_bytes() == (plain / name).read_bytes()
        assert expected
    assert {memory["host_bytes"] for memory in first["parallel"]["memory"]} == {0}, "a CPU has one memory"
    for folder, now in ((plain, OFFLOADED), (offloaded, {})):
        forget(folder, 4)
        resumed, _ = two.train(in_ranks(wanted, "fsdp", tmp_path, **now, resume=True, output_dir=str(folder)))
        assert "error" not in resumed, resumed
        assert resumed["losses"] == whole["losses"]
        for name, expected in zip((RESULT, STATE), held, strict=True):
            assert_close(tensors(folder, name), expected, atol=0)


@pytest.fixture(scope="module")
def cards():
    """A process for each card, up to two; they see the cards by their own numbers."""
    workers = Workers(min(2, torch.cuda.device_count()), "cpu:gloo,cuda:nccl")
    yield workers
    workers.close()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_on_cards(cards, deep_model, options, tmp_path, method, optim):  # noqa: F811
    rate = 1e-3 if method == "full" else 1e-2
    wanted = options(method, {"r": 16}, optim=optim, learning_rate=rate, max_steps=4, save_steps=2, deterministic=True)
    wanted |= {"model": str(deep_model), "device": "auto", "dtype": "float32"}
    runs, folders = {}, {name: tmp_path / name for name in ("plain", "offloaded")}
    for name, train in (("plain", {}), ("offloaded", OFFLOADED)):
        answers = cards.train(in_ranks(wanted, "fsdp", tmp_path, **train, output_dir=str(folders[name])))
        assert "error" not in answers[0], answers[0]
        runs[name] = answers[0]
    atol = 2e-5 if optim == "adamw" else 2e-3
    plain, offloaded = runs["plain"], runs["offloaded"]
    assert offloaded["losses"] == pytest.approx(plain["losses"], abs=atol)
    assert offloaded["evaluations"] == pytest.approx(plain["evaluations"], abs=atol)
    if optim == "adamw":
        name = "model/model.safetensors" if method == "full" else RESULT
        assert_close(tensors(folders["offloaded"], name), tensors(folders["plain"], name), atol=1e-4)
    for on_card, on_host in zip(*(run["parallel"]["memory"] for run in (plain, offloaded)), strict=True):
        kinds = [f"{kind}_bytes" for kind in ("weights", "codes", "constants", "adapters", "gradients", "optimizer")]
        assert [on_host[kind] for kind in kinds[:-1]] == [on_card[kind] for kind in kinds[:-1]]
        assert on_host["host_bytes"] == sum(on_host[kind] for kind in kinds)
        assert on_card["host_bytes"] == 0
        if method != "qlora":  # whose start looks at layers' inputs, in passes
            assert on_host["load_peak_bytes"] < 2.5 * on_host["largest_group_bytes"] + 2**21
        saved = on_card["train_peak_bytes"] - on_host["train_peak_bytes"]
        likely = [memory["planned"]["planned_bytes"]["likely"] for memory in (on_card, on_host)]
        assert saved > 0.5 * sum(on_card[kind] for kind in kinds[:4])
        assert saved == pytest.approx(likely[0] - likely[1], rel=0.15)  # of each alone, libraries' workspaces are a good part
        if optim == "adamw":  # 8-bit states are in whole pages
            assert sum(on_host["planned"]["plan"]["host_kinds"].values()) == pytest.approx(on_host["host_bytes"], rel=0.02)
    forget(folders["offloaded"], 4)
    answers = cards.train(in_ranks(wanted, "fsdp", tmp_path, resume=True, output_dir=str(folders["offloaded"])))
    assert "error" not in answers[0], answers[0]
    assert answers[0]["losses"] == pytest.approx(offloaded["losses"], abs=atol)
