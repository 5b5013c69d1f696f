"""One contender of the training benchmark, in its own process: `python -m lownibble.bench.contender NAME B T`.

It builds its model, then takes turns (`measuring/turns.py`): a turn is some training steps on the next fixed batches. All
contenders do the same work: same weights, batches, rank, targets, optimiser and gradient clipping; loss on every token. They run
in bfloat16 on CUDA if available, else in float32 on the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lownibble.config import DataConfig, LoraConfig, QuantConfig
from lownibble.data import load as load_data
from lownibble.kernels import ops, plain
from lownibble.lora import add_lora
from lownibble.measuring.turns import answer_turns
from lownibble.memory import usage
from lownibble.models import load, load_tokenizer, pick_device, pick_dtype, resolve
from lownibble.models.attention import head_dim, kernel_obstacle, segment_attention
from lownibble.optim import make_optimizer
from lownibble.training.compiling import Compiled
from lownibble.training.loss import label_loss

LEARNING_RATE, CLIP, R, ALPHA = 2e-4, 1.0, 16, 32
StepLoss = Callable[[Tensor], Tensor]


def _ours(quant: QuantConfig | None, compiled: bool = True) -> tuple[nn.Module, StepLoss]:
    model, _ = load("demo", quant=quant)
    add_lora(model, LoraConfig(r=R, lora_alpha=ALPHA))
    layers = Compiled(model) if compiled else nullcontext
    attention = nullcontext if kernel_obstacle(model) else segment_attention

    def loss(input_ids_BT: Tensor) -> Tensor:
        with layers(), attention(model):
            return label_loss(model, input_ids_BT, torch.ones_like(input_ids_BT), input_ids_BT)

    return model, loss


def _peft(quantized: bool) -> tuple[nn.Module, StepLoss]:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device()
    dtype = pick_dtype("auto", device)
    extra: dict[str, Any] = {}
    if quantized:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if device.type != "cpu":
        extra["device_map"] = {"": device}
    base = AutoModelForCausalLM.from_pretrained(resolve("demo").folder, dtype=dtype, **extra)
    if quantized:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))

    def loss(input_ids_BT: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):  # k-bit prep makes norms and head float32
            found: Tensor = model(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss
        return found

    return model, loss


CONTENDERS: dict[str, Callable[[], tuple[nn.Module, StepLoss]]] = {
    "lora": lambda: _ours(None),
    "qlora": lambda: _ours(QuantConfig(compute="exact")),
    "qlora_int8": lambda: _ours(QuantConfig(compute="int8")),
    "lora_eager": lambda: _ours(None, compiled=False),
    "qlora_eager": lambda: _ours(QuantConfig(compute="exact"), compiled=False),
    "peft_lora": lambda: _peft(quantized=False),
    "peft_bnb_qlora": lambda: _peft(quantized=True),
}
"""Name -> factory of the model and its loss on (B, T) token ids."""


def batches(batch_size: int, length: int) -> Tensor:
    """(N, B, T) token ids: the demo's training sentences, concatenated and cut into rows."""
    tokenizer = load_tokenizer(resolve("demo"))
    train, _ = load_data(DataConfig(max_rows=2000))
    ids = torch.tensor(tokenizer("\n".join(str(row.fields["text"]) for row in train.rows))["input_ids"])
    count = len(ids) // (batch_size * length)
    return ids[: count * batch_size * length].view(count, batch_size, length)


def main(name: str, batch_size: int, length: int) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    if name.startswith("peft"):
        import peft  # noqa: F401 - before the baseline, so that a peer's imports do not count as its memory
    device = pick_device()
    data_NBT = batches(batch_size, length).to(device)
    usage.reset_peak(device)
    baseline = usage.used_bytes(device)
    torch.manual_seed(0)
    model, loss_of = CONTENDERS[name]()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained, LEARNING_RATE, 0.0)
    step = 0

    def do(steps: int) -> dict[str, Any]:
        nonlocal step
        seconds, losses = 0.0, []
        for _ in range(steps):
            began = time.perf_counter()
            loss = loss_of(data_NBT[step % len(data_NBT)])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))  # synchronises with the GPU
            seconds += time.perf_counter() - began
            step += 1
        return {
            "tokens": steps * batch_size * length,
            "seconds": seconds,
            "losses": losses,
            "peak_bytes": usage.peak_bytes(device) - baseline,
        }

    facts: dict[str, Any] = {"trainable_parameters": sum(p.numel() for p in trained)}
    if name == "lora_eager":  # all contenders have the same matrix products; these are torch's and can be counted
        flops = _flops(lambda: loss_of(data_NBT[0])) + _attention_flops(model, batch_size, length)
        facts["flops_per_token"] = flops / (batch_size * length)
    elif name in ("lora", "qlora", "qlora_int8"):
        began = time.perf_counter()
        torch.autograd.backward(loss_of(data_NBT[0]))
        facts["compile_seconds"] = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    with nullcontext() if name.startswith("peft") else usage.kept_heap():  # ours with the heap setting of a run
        answer_turns(facts, do)


class _Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, except attention's, with torch's own formulas.

    Not `FlopCounterMode`: it tracks modules through the backward pass, and fails if a forward pass calls autograd (our loss).
    """

    total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        product = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
        if product in flop_registry and "dot_product" not in str(func):
            self.total += flop_registry[product](*args, **(kwargs or {}), out_val=out)
        return out


class _CountedBranches:
    """The current kernel backend, with the products of the head and of the low-rank branch done by torch so that they can be
    counted."""

    matmul_dense = staticmethod(plain.matmul_dense)
    low_rank, low_rank_backward = staticmethod(plain.low_rank), staticmethod(plain.low_rank_backward)

    def __init__(self) -> None:
        self.kernels = ops.current(pick_device())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)


def _flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products, except attention's, in one forward and backward pass."""
    with ops.use_backend(cast(ops.Backend, _CountedBranches())), _Products() as counted:
        torch.autograd.backward(loss())
    return int(counted.total)


def _attention_flops(model: Any, batch_size: int, length: int) -> int:
    """FLOPs of causal attention's two products in forward and four in backward: masked keys not counted, no recomputation.

    torch has no formula for its CPU kernel, and on CUDA counts the keys that the causal mask excludes.
    """
    config = model.config.get_text_config()
    pairs = length * (length + 1) // 2
    width: int = config.num_attention_heads * head_dim(config)
    return 6 * 2 * batch_size * pairs * width * int(config.num_hidden_layers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
