"""Peers of the training benchmark, each in its own process: `python -m lownibble.bench.peers NAME MODEL B T`.

Each is used as its own documentation does for a step of this size: no gradient checkpointing, adapters of float32 under autocast
on CUDA, torch's fused AdamW there. PEFT + bitsandbytes goes without `prepare_model_for_kbit_training`, whose float32 head and
norms would take more memory. The torchao peer is PEFT's LoRA on linear layers whose weights are torchao's `NF4Tensor`.

A peer is imported before anything else, because Unsloth changes what is imported after it: nothing of Lownibble that imports
transformers is imported at the top of this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lownibble.bench.steps import ALPHA, CLIP, LEARNING_RATE, Built, R, take_turns
from lownibble.measuring.turns import reserved_stdout

SKIPPED_HEAD = "lm_head"


class Peer(NamedTuple):
    """Packages in the order in which they are imported, how the model is made, and whether there is a version for CPUs."""

    packages: tuple[str, ...]
    make: Callable[[str, int], nn.Module]
    on_cpu: bool = False


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _pretrained(folder: str, bits4: bool = False) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    extra: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    if bits4:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=_dtype()
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(), **extra)


def _adapted(base: Any) -> nn.Module:
    import peft

    lora = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)  # type: ignore[no-any-return]


def _peft(folder: str, length: int) -> nn.Module:
    return _adapted(_pretrained(folder))


def _peft_experts(folder: str, length: int, dtype: torch.dtype) -> nn.Module:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["gate_up_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(base, lora)  # type: ignore[no-any-return]


def _bitsandbytes(folder: str, length: int) -> nn.Module:
    return _adapted(_pretrained(folder, bits4=True))


def _liger(folder: str, length: int) -> nn.Module:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    base = _pretrained(folder, bits4=True)
    _apply_liger_kernel_to_instance(base)
    return _adapted(base)


def _torchao(folder: str, length: int) -> nn.Module:
    try:
        from torchao.quantization import to_nf4
    except ImportError:  # before torchao 0.18
        from torchao.dtypes.nf4tensor import to_nf4

    base = _pretrained(folder)
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and path != SKIPPED_HEAD:
            module.weight = nn.Parameter(to_nf4(module.weight.detach()), requires_grad=False)
    return _adapted(base)


def _unsloth(folder: str, length: int) -> nn.Module:
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(
        model_name=folder, max_seq_length=length, dtype=_dtype(), load_in_4bit=True, local_files_only=True
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(  # type: ignore[no-any-return]
        base, r=R, lora_alpha=ALPHA, target_modules=names, lora_dropout=0, bias="none", use_gradient_checkpointing=False
    )


PEERS = {
    "unsloth_qlora": Peer(("unsloth",), _unsloth),
    "peft_bnb_liger": Peer(("peft", "bitsandbytes", "liger_kernel"), _liger),
    "peft_bnb_qlora": Peer(("peft", "bitsandbytes"), _bitsandbytes, on_cpu=True),
    "torchao_qlora": Peer(("peft", "torchao"), _torchao, on_cpu=True),
    "peft_lora": Peer(("peft",), _peft, on_cpu=True),
}
"""Name -> peer, in order of interest."""

EXPERTS = {
    "peft_float32": Peer(("peft",), partial(_peft_experts, dtype=torch.float32), on_cpu=True),
    "peft_bfloat16": Peer(("peft",), partial(_peft_experts, dtype=torch.bfloat16), on_cpu=True),
}
"""Peers with adapters on the experts of a mixture, by the dtype of the base: bitsandbytes leaves fused experts dense."""


def installed(device_type: str, peers: Mapping[str, Peer] = PEERS) -> tuple[list[str], dict[str, str]]:
    """Peers that can be tried on a device, and those that cannot -> why. Nothing is imported."""
    there, missing = [], {}
    for name, peer in peers.items():
        absent = [package for package in peer.packages if importlib.util.find_spec(package) is None]
        if absent:
            missing[name] = f"not installed: {', '.join(absent)}"
        elif device_type == "cpu" and not peer.on_cpu:
            missing[name] = "needs CUDA"
        else:
            there.append(name)
    return there, missing


def build(name: str, model: str, ids_NBT: Tensor) -> Built:
    """The peer `name`."""
    from lownibble.optim import make_optimizer

    device, dtype = _device(), _dtype()
    made = (PEERS | EXPERTS)[name].make(model, ids_NBT.shape[2]).train()
    ids_NBT = ids_NBT.to(device)
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if device.type == "cuda":
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True)
    else:
        optimizer = make_optimizer("adamw", trained, LEARNING_RATE, 0.0)

    def step(number: int) -> float:
        ids_BT = ids_NBT[number % len(ids_NBT)]
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            loss = made(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return Built(step, made)


def main(name: str, model: str, batch_size: int, length: int) -> None:
    """Import the peer `name`, build it and take turns until standard input ends."""
    with reserved_stdout() as out:
        for package in (PEERS | EXPERTS)[name].packages:
            importlib.import_module(package)
        take_turns(lambda *work: build(name, *work), model, batch_size, length, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
