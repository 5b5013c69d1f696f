"""What the host waits for in a training step. Oracle: every use of a value of a tensor that on a GPU would be on the device, seen
on a CPU: calls from Python, and operations of the dispatcher, which those in compiled layers are too."""

from contextlib import nullcontext

import pytest
import torch
from mixtures import folder_of
from waits import Waits

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.kernels import ops
from lownibble.kernels.types import of_expert
from lownibble.models.info import info
from lownibble.training.making import prepare
from lownibble.transfers import to_device

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


def trainer_of(model, data, **options):
    lora = options.pop("lora", {})
    quant = options.pop("quant", {})
    config = {"max_steps": 8, "batch_size": 4, "max_length": 32, "learning_rate": 1e-2, "torch_compile": False, **options}
    trainer, _ = prepare(RunConfig(
        model=str(model), method="qlora", dtype="bfloat16", data=DataConfig(path=str(data), **DATA), quant=QuantConfig(**quant),
        lora=LoraConfig(r=4, **lora), train=TrainConfig(**config),
    ))  # fmt: skip
    if not config.get("packing"):
        trainer.passes.check = lambda: found_on_a_gpu(trainer.passes)
    trainer.set_up()
    return trainer


def found_on_a_gpu(passes):
    passes._check_masks(passes.micro.batch([passes.micro.rows[0], min(passes.micro.rows, key=lambda row: len(row.input_ids))]))
    assert passes.mask_reason == ""
    assert not info(passes.model).needs_mask


def waits_of_a_step(trainer, step=2):
    steps = trainer.micro.steps()
    rows = [next(steps) for _ in range(step + 1)]
    for i in range(step):
        trainer.step(i, rows[i])
    with Waits(trainer.model) as waits:
        taken = trainer.step(step, rows[step])
    return waits.found, taken


CASES = {
    "eager": {},
    "compiled": {"torch_compile": True},
    "accumulated, dropout": {"gradient_accumulation_steps": 2, "lora": {"lora_dropout": 0.1}},
    "packed": {"packing": True},
    "checkpointed": {"gradient_checkpointing": True},
    "fp8": {"quant": {"compute": "fp8"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once_for_its_loss_and_norm(case, widen, tiny_data):
    with ln.use_backend("reference"):
        found, taken = waits_of_a_step(trainer_of(widen(num_hidden_layers=2), tiny_data, **CASES[case]))
    assert isinstance(taken, ln.training.events.Stepped)
    assert found == ["tolist"]


class _AtOnce:
    """The reference kernels, with products of experts that read nothing on the host, as a GPU: each row times its own matrix."""

    experts_at_once = True

    def __init__(self):
        self.kernels, self.calls = ops.backend("reference"), 0

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def _experts_of(self, rows, ends):
        return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype), right=True).clamp(max=len(ends) - 1)

    def matmul_experts(self, x, weights, ends, transposed, epilogue):
        self.calls += 1
        each = [of_expert(weights, expert) for expert in range(len(ends))]
        each = [w if isinstance(w, torch.Tensor) else self.dequantize_4bit(w, x.new_empty(w.shape)) for w in each]
        expert = self._experts_of(len(x), ends)
        matrices = torch.stack(each).to(x.dtype).index_select(0, expert)
        y = torch.bmm(x.unsqueeze(1), matrices if transposed else matrices.transpose(1, 2)).squeeze(1)
        if epilogue.low is None:
            return y
        factors = epilogue.factor.to(x.dtype).index_select(0, expert)
        return y + epilogue.scale * torch.bmm(epilogue.low.unsqueeze(1), factors).squeeze(1)

    def outer_experts(self, a, b, ends, scale, dtype):
        mine = (self._experts_of(len(a), ends) == torch.arange(len(ends)).unsqueeze(1)).to(dtype)
        return scale * torch.einsum("es,sp,sq->epq", mine, a.to(dtype), b.to(dtype))


def test_a_mixture_waits_for_no_rows_of_experts_where_kernels_take_all_at_once(tokenizer, tiny_data, tmp_path):
    folder, backend = folder_of("qwen3_moe", tmp_path / "model", tokenizer), _AtOnce()
    with ln.use_backend(backend):
        found, taken = waits_of_a_step(trainer_of(folder, tiny_data))
    assert isinstance(taken, ln.training.events.Stepped)
    assert found == ["tolist"]
    assert backend.calls
    with ln.use_backend("reference"):
        found, again = waits_of_a_step(trainer_of(folder, tiny_data))
    assert found == ["tolist"] * (1 + 2), "a loop over experts waits once in each of two layers"
    assert taken.loss == pytest.approx(again.loss, rel=0.01)


def test_transformers_own_masks_are_waited_for(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data)
    trainer.passes._attention = nullcontext
    with ln.use_backend("reference"):
        found, _ = waits_of_a_step(trainer)
    assert "__bool__" in found, "it looks for packed rows, where there is no mask; if not any more, our attention is not needed"


@pytest.mark.parametrize("wait", ["item", "nonzero", "mask", "bool"])
def test_the_modes_see_what_waits(wait, widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data)
    weight = trainer.model.get_input_embeddings().weight
    waiting = {
        "item": lambda: weight.sum().item(), "nonzero": lambda: (weight > 0).nonzero(), "mask": lambda: weight[weight > 0],
        "bool": lambda: bool((weight > 0).all()),
    }[wait]  # fmt: skip
    hook = trainer.model.get_input_embeddings().register_forward_hook(lambda *_: (waiting(), None)[1])
    with ln.use_backend("reference"):
        found, _ = waits_of_a_step(trainer)
    hook.remove()
    assert len(found) > 1


def test_a_skipped_step_is_decided_on_the_device(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    rows = next(trainer.micro.steps())
    hook = trainer.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * float("nan"))
    taken = trainer.step(0, rows)
    hook.remove()
    assert isinstance(taken, ln.training.events.Skipped)
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(float(state["step"]) == 0 and not state["exp_avg"].any() for state in trainer.optimizer.state.values())


class _Counting:
    """The reference kernels, counting the products with frozen weights by direction."""

    def __init__(self):
        self.kernels, self.counts = ops.backend("reference"), {False: 0, True: 0}

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def matmul_4bit(self, x_TC, weight, transposed, epilogue):
        self.counts[transposed] += 1
        return self.kernels.matmul_4bit(x_TC, weight, transposed, epilogue)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_frozen_product_is_computed_once_each_way(compiled, widen, tiny_data):
    backend = _Counting()
    with ln.use_backend(backend):
        trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, torch_compile=compiled)
        backend.counts = {False: 0, True: 0}
        trainer.step(0, next(trainer.micro.steps()))
    assert backend.counts == {False: 14, True: 11}, "the first layer's q, k and v need no gradient of their input"


def test_copies_to_a_gpu_are_queued():
    calls = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, **how):
            calls.append((device, how))

    to_device(Host(), "cuda:0")
    assert calls == ["pinned", ("cuda:0", {"non_blocking": True})]
    tensor = torch.ones(3)
    assert to_device(tensor, "cpu") is tensor
