"""`lownibble bench parity --peers`: numerical parity with bitsandbytes and PEFT. Nothing is timed.

On the embedded model: every linear weight is quantised by both (nf4 and fp4, double quantisation on and off, block sizes 64 and
128) and the bytes are compared; both take ten LoRA steps from the same initial weights and the losses are compared; an adapter
saved by either is loaded by the other and the logits are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.config import LoraConfig, QuantConfig
from lownibble.errors import ConfigError
from lownibble.lora import add_lora, load_adapter, lora_layers, save_adapter, set_adapter
from lownibble.models import load, resolve
from lownibble.optim import make_optimizer
from lownibble.quant import quantize
from lownibble.training.loss import label_loss

STEPS, LEARNING_RATE = 10, 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bench_parity(*, peers: bool = False, repeats: int | None = None) -> dict[str, Any]:
    """Compare with bitsandbytes and PEFT, which must be installed.

    Raises:
        ConfigError: `peers` is false, `repeats` is given, or a peer is not installed.
    """
    if not peers or repeats is not None:
        raise ConfigError("bench parity compares with bitsandbytes and PEFT, once: give --peers and no --repeats.")
    try:
        import bitsandbytes.functional  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"A peer is missing ({error}). Run: pip install 'lownibble[peers]'") from None
    codes, losses, adapters = _codes(), _losses(), _adapters()
    headlines = {
        "tensors with other bytes than bitsandbytes'": sum(setting["different"] for setting in codes),
        "tensors compared": sum(setting["tensors"] for setting in codes),
        "largest relative difference of a loss from PEFT's": losses["max_relative_difference"],
        "largest change that the adapter makes to a logit": adapters["adapter_changes_logits_by"],
        "our adapter in PEFT: largest difference of a logit": adapters["ours_in_peft_max_difference"],
        "PEFT's adapter here: largest difference of a logit": adapters["peft_here_max_difference"],
    }
    return {"codes": codes, "losses": losses, "adapters": adapters, "headlines": headlines}


def _weights() -> Iterator[Tensor]:
    """The embedded model's linear weights in bfloat16, and random float32 weights of odd shapes."""
    model, _ = load("demo", dtype="bfloat16")
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight.detach()
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 5), (7, 129), (128, 96), (1000, 33)):
        yield torch.randn(shape, generator=generator)


def _codes() -> list[dict[str, Any]]:
    import bitsandbytes.functional as bnb

    settings: list[dict[str, Any]] = [
        {"quant_type": kind, "double_quant": double, "block_size": size, "tensors": 0, "different": 0}
        for kind, double, size in itertools.product(("nf4", "fp4"), (True, False), (64, 128))
    ]
    for weight in _weights():
        for setting in settings:
            kind, double, size = setting["quant_type"], setting["double_quant"], setting["block_size"]
            ours = quantize(weight, QuantConfig(quant_type=kind, double_quant=double, block_size=size))
            held = ours.tensors()
            codes, state = bnb.quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=double)
            pairs: list[tuple[Any, Any]] = [(held["codes"], codes), (held["absmax"], state.absmax)]
            if double:
                pairs += [(held["nested_absmax"], state.state2.absmax), (held["offset"], state.offset)]
            setting["tensors"] += 1
            setting["different"] += any(not torch.equal(a.view(-1), b.view(-1)) for a, b in pairs)
    return settings


def _batches() -> Tensor:
    return torch.randint(100, 40000, (STEPS, 2, 48), generator=torch.Generator().manual_seed(0))


def _ours(**options: Any) -> Any:
    model, _ = load("demo", dtype="float32")
    return add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, **options)).train()


def _theirs(**options: Any) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve("demo").folder, dtype=torch.float32)
    return peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    )


def _losses() -> dict[str, Any]:
    """Losses of `STEPS` AdamW steps by both, from the same initial adapter."""
    ours, theirs = _ours(), _theirs()
    with torch.no_grad():
        for path, layer in lora_layers(ours, "default"):
            their_layer = theirs.base_model.model.get_submodule(path)
            their_layer.lora_A["default"].weight.copy_(layer.adapters["default"].lora_A)
    both: tuple[list[float], list[float]] = ([], [])
    optimizers = [make_optimizer("adamw", model.parameters(), LEARNING_RATE, 0.0) for model in (ours, theirs)]
    for input_ids in _batches():
        losses = (
            label_loss(ours, input_ids, torch.ones_like(input_ids), input_ids),
            theirs(input_ids=input_ids, labels=input_ids).loss,
        )
        for loss, optimizer, kept in zip(losses, optimizers, both, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append(float(loss.detach()))
    difference = max(abs(a - b) / b for a, b in zip(*both, strict=True))
    return {"ours": both[0], "peft": both[1], "max_relative_difference": difference}


def _adapters() -> dict[str, float]:
    """Largest logit differences after loading each other's saved adapters; B is random so that adapters change the logits."""
    import peft

    input_ids = _batches()[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = _ours(init_lora_weights=False).eval()
        save_adapter(ours, Path(folder) / "ours")
        logits = ours(input_ids=input_ids).logits
        set_adapter(ours, None)
        changed = float((ours(input_ids=input_ids).logits - logits).abs().max())
        del ours
        theirs = _theirs(init_lora_weights=False).eval()
        with contextlib.redirect_stdout(None):
            theirs.save_pretrained(str(Path(folder) / "peft"))
        their_logits = theirs(input_ids=input_ids).logits
        loaded = peft.PeftModel.from_pretrained(theirs.unload(), str(Path(folder) / "ours")).eval()
        ours_in_peft = float((loaded(input_ids=input_ids).logits - logits).abs().max())
        del loaded, theirs
        model, _ = load("demo", dtype="float32")
        load_adapter(model, Path(folder) / "peft")
        peft_here = float((model(input_ids=input_ids).logits - their_logits).abs().max())
    return {
        "adapter_changes_logits_by": changed,
        "ours_in_peft_max_difference": ours_in_peft,
        "peft_here_max_difference": peft_here,
    }
