"""Contenders of the training benchmark, here in this process. Oracles: PEFT's losses; a count of a step's products."""

import json
from types import SimpleNamespace

import pytest
import torch
from shapes import CONFIG, write_shape

from lownibble.bench import contender, peers, steps
from lownibble.bench.subject import random_ids, subject
from lownibble.bench.train import _flops_per_token


@pytest.fixture
def model(tmp_path):
    with subject(write_shape(tmp_path)) as found:
        yield str(found.folder)


def _losses(build, name, model, count=2):
    torch.manual_seed(0)
    built = build(name, model, random_ids(CONFIG["vocab_size"], 4, 2, 16))
    return [built.step(number) for number in range(count)], built


def test_the_work_of_a_step_is_the_planners_formula():
    """Counted on the embedded model at 4 x 256 by torch's formulas, operation by operation (train-cpu.json of 2026-11-23).

    The formula also has a second forward of attention's scores in backward, and the first layer's input gradient.
    """
    assert _flops_per_token("demo", 4, 256) == pytest.approx(592_268_544, rel=0.015)


@pytest.mark.parametrize(("ours", "theirs"), [("lora", "peft_lora"), ("qlora", "peft_bnb_qlora")])
def test_contenders_do_the_same_work_as_peers(model, peft, bitsandbytes, ours, theirs):
    (first, *rest), built = _losses(contender.build, ours, model)
    (expected, *others), peer = _losses(peers.build, theirs, model)
    assert first == pytest.approx(expected, rel=1e-5)
    assert rest == pytest.approx(others, rel=1e-3)  # A is random: the second step differs a little
    trained = [sum(p.numel() for p in each.model.parameters() if p.requires_grad) for each in (built, peer)]
    assert trained[0] == trained[1] > 0


def test_a_contender_says_how_it_ran(model):
    _, built = _losses(contender.build, "qlora_eager", model, count=1)
    facts = built.facts()
    assert (facts["compute"], facts["compiled"], facts["max_tokens"]) == ("exact", False, None)
    _, built = _losses(contender.build, "lora", model, count=1)
    assert "compiling pays from" in built.facts()["compile_reason"], "what 'auto' decided for a run of 10,000 steps"


def test_torchao_takes_the_same_step(model, peft):
    pytest.importorskip("torchao")
    (first, second), _ = _losses(peers.build, "torchao_qlora", model)
    (expected, _), _ = _losses(contender.build, "qlora_eager", model)
    assert first == pytest.approx(expected, rel=0.01)
    assert second != first


def test_peers_that_are_not_there_are_listed(monkeypatch):
    there = {"peft", "bitsandbytes", "unsloth"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: package in there or None)
    found, missing = peers.installed("cuda")
    assert found == ["unsloth_qlora", "peft_bnb_qlora", "peft_lora"]
    assert missing == {"peft_bnb_liger": "not installed: liger_kernel", "torchao_qlora": "not installed: torchao"}
    assert peers.installed("cpu")[1]["unsloth_qlora"] == "needs CUDA"


def test_launches_are_those_of_kernels_and_graphs():
    names = {"cudaLaunchKernel": 5330, "cuLaunchKernelEx": 2487, "cudaLaunchKernelExC": 384, "cudaGraphLaunch": 1}
    others = {"cudaLaunchHostFunc": 7, "aten::mm": 9, "cudaMemcpyAsync": 3, "void gemmLaunchKernel()": 2}
    averages = [SimpleNamespace(key=key, count=count) for key, count in {**names, **others}.items()]
    assert steps.launches(averages) == 5330 + 2487 + 384 + 1


def test_kernels_are_those_of_the_device_the_longest_first():
    types = torch.autograd.DeviceType

    def average(key, kind, us, count=1):
        return SimpleNamespace(
            key=key, count=count, device_type=kind, self_device_time_total=us, is_user_annotation=key == "region"
        )

    averages = [
        average("aten::mm", types.CPU, 0), average("gemm" * 100, types.CUDA, 5000.0, 3), average("norm", types.CUDA, 9000.4),
        average("Memcpy HtoD", types.CUDA, 1000.0), average("launched by the host", types.CPU, 7.0),
        average("region", types.CUDA, 15000.0),
    ]  # fmt: skip
    found = steps.kernels(averages, count=2)
    assert found["device_ms"] == pytest.approx(15.0004)
    assert [(each["name"], each["calls"], each["ms"]) for each in found["kernels"]] == [
        ("norm", 1, 9.0), ("gemm" * 30, 3, 5.0),
    ]  # fmt: skip


def test_turns_go_on_where_the_first_step_ended(model, monkeypatch, tmp_path):
    taken = []

    def build(folder, ids_NBT):
        assert ids_NBT.shape == (steps.COUNT, 2, 16)
        return steps.Built(lambda number: taken.append(number) or float(number), torch.nn.Linear(2, 3), lambda: {"told": True})

    monkeypatch.setattr("sys.stdin", iter(["2\n", "1\n"]))
    with (tmp_path / "answers").open("w") as out:
        steps.take_turns(build, model, 2, 16, out)
    facts, first, second = map(json.loads, (tmp_path / "answers").read_text().splitlines())
    assert (facts["trainable_parameters"], facts["told"], facts["launches_per_step"]) == (9, True, None)
    assert taken == [0, 1, 2, 3]
    assert (first["tokens"], first["losses"], second["losses"]) == (64, [0.0, 1.0, 2.0], [3.0])
    assert first["reserved_bytes"] is None
