"""What is bit-reproducible. On a CPU: what `deterministic` sets; on a GPU, marked `gpu`: the same bits from two runs."""

import os

import pytest
import torch

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.kernels import ops
from lownibble.training.determinism import WORKSPACE, deterministic
from lownibble.training.making import prepare

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


def test_torch_takes_deterministic_algorithms_inside_the_block_only(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ[WORKSPACE] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.ones(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0. Set it to :4096:8 or :16:8"), deterministic():
        pass


def losses_of(model, data, **options):
    train, lora = {"torch_compile": False, **options.pop("train", {})}, options.pop("lora", {})
    trainer, _ = prepare(RunConfig(
        model=str(model), method="qlora", dtype="bfloat16", data=DataConfig(path=str(data), **DATA),
        quant=QuantConfig(compute=options.pop("compute", "exact")), lora=LoraConfig(r=4, **lora),
        train=TrainConfig(max_steps=6, batch_size=4, max_length=32, learning_rate=1e-2, **train),
    ))  # fmt: skip
    trainer.set_up()
    steps = trainer.micro.steps()
    losses = [trainer.step(number, next(steps)).loss for number in range(6)]
    return losses, [p.detach().cpu() for p in trainer.model.parameters() if p.requires_grad]


CASES = {
    "exact": {}, "compiled": {"train": {"torch_compile": True}}, "graphs": {"train": {"cuda_graphs": True}},
    "fp8": {"compute": "fp8"}, "dropout": {"lora": {"lora_dropout": 0.1}},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "8-bit paged AdamW": {"train": {"optim": "paged_adamw_8bit"}}, "trained head": {"lora": {"modules_to_save": ["lm_head"]}},
    "DoRA": {"lora": {"use_dora": True}}, "packed": {"train": {"packing": True}},
}  # fmt: skip
"""The table in docs/train.md."""


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_two_runs_have_the_same_bits(case, widen, tiny_data):
    if case == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no float8 units")
    model, options = widen(num_hidden_layers=2), CASES[case]
    asked = {**options, "train": {**options.get("train", {}), "deterministic": True}}
    (first, trained), (second, again) = losses_of(model, tiny_data, **asked), losses_of(model, tiny_data, **asked)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(trained, again, strict=True))


@pytest.mark.gpu
def test_products_and_kernels_repeat_their_bits():
    """Without asking: what the docs say of every run."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(512, 1024, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = ln.quantize(torch.randn(2048, 1024, generator=generator, device="cuda"))
    labels = torch.randint(0, 2048, (512,), generator=generator, device="cuda")
    lora_B = torch.randn(2048, 16, generator=generator, device="cuda")

    def once():
        logits = x @ weight.dequantize(torch.bfloat16).t()
        low = ops.low_rank_backward(logits.clone(), x, x[:, :16].contiguous(), lora_B, 2.0)
        return ops.cross_entropy(logits, labels, 1 / 512), logits, *low

    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
