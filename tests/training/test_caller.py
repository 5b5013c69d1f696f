"""What training leaves of the caller's process, and what reaches the threads that autograd runs backward on.

Oracles: the state before; a thread of the test's own in the place of autograd's (on CPUs backward runs in the caller's thread).
"""

import threading

import pytest
import torch
from torch import nn

import lownibble as ln
from lownibble.errors import ConfigError
from lownibble.kernels import decoded, ops, reference
from lownibble.lora.layer import LoraLinear
from lownibble.models.head import check_head
from lownibble.models.info import info
from lownibble.quant import QuantLinear
from lownibble.training.loss import check_unmasked


class Counting:
    """The reference, and how often each operation was called."""

    name, device_types = "counting", None

    def __init__(self):
        self.calls = []

    def __getattr__(self, operation):
        def call(*arguments, **options):
            self.calls.append(operation)
            return getattr(reference, operation)(*arguments, **options)

        return call


@pytest.mark.parametrize("adapted", [True, False])
def test_use_backend_reaches_backward_on_another_thread(adapted):
    layer = QuantLinear.from_linear(nn.Linear(64, 48))
    if adapted:
        layer = LoraLinear(layer)
        layer.add("a", r=4, alpha=8, dropout=0.0, use_rslora=False)
    counting = Counting()
    with ln.use_backend(counting):
        y = layer(torch.randn(9, 64, requires_grad=True))
    forward = len(counting.calls)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert forward > 0
    assert "matmul_4bit" in counting.calls[forward:]
    assert ops.chosen() is None


def test_decode_buffers_of_all_threads_are_freed():
    ready, go = threading.Event(), threading.Event()

    def hold():
        decoded.scratch(torch.Size([1000]), torch.float32, torch.device("cpu"))
        ready.set()
        go.wait()

    decoded.release_scratch()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    decoded.scratch(torch.Size([10]), torch.float32, torch.device("cpu"))
    try:
        assert decoded.release_scratch() == 4 * (1000 + 10)
        assert decoded.release_scratch() == 0
    finally:
        go.set()
        thread.join()


def test_the_callers_random_numbers_stay_where_they_were(tiny_run):
    model, tokenizer, data = tiny_run
    ln.add_lora(model, ln.LoraConfig(r=2, lora_dropout=0.3))
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.get_rng_state()
    ln.train(model, tokenizer, data, ln.TrainConfig(max_steps=2, batch_size=2, max_length=16))
    assert torch.equal(torch.get_rng_state(), before)


def test_float16_is_refused_with_a_remedy(tiny_run):
    model, tokenizer, data = tiny_run
    ln.add_lora(model.half(), ln.LoraConfig(r=2))
    with pytest.raises(ConfigError, match=r"float16 is not done: .*loss scaling\. Use --dtype bfloat16"):
        ln.train(model, tokenizer, data, ln.TrainConfig(max_steps=1, batch_size=2, max_length=16))


def test_masters_train_in_mixed_precision_where_asked(tiny_run):
    """What full fine-tuning does on CUDA, on a CPU: float32 weights and gradients, forward passes in bfloat16."""
    model, tokenizer, data = tiny_run
    info(model).autocast = torch.bfloat16
    seen = set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    result = ln.train(model, tokenizer, data, ln.TrainConfig(max_steps=2, batch_size=2, max_length=16))
    assert torch.bfloat16 in seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(loss > 0 for loss in result.losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_heads_check_knows_dtypes(tiny, dtype):
    for family in ("llama", "gemma2"):
        check_head(tiny(family, dtype=dtype))


def test_causal_rows_padded_on_the_right_need_no_mask(tiny, batch):
    ids, mask, _ = batch()
    assert check_unmasked(tiny(), ids, mask)
    model = tiny()
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"] + (
        0 if kwargs.get("attention_mask") is None else 1)}), with_kwargs=True)  # fmt: skip
    assert not check_unmasked(model, ids, mask), "a model whose mask changes other tokens keeps it"
    assert info(model).needs_mask
