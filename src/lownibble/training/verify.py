"""After saving: is what lies on the disk what was trained, and was something trained at all?

The peers' users report empty adapters, adapters that load as nothing, and models that never stop. Each check here is one of those
reports. What is on the disk must be right, or the run fails with it; the rest is said in the record and to the user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lownibble.data import Example
from lownibble.errors import OutputError, TrainingError
from lownibble.lora import load_adapter, set_adapter
from lownibble.lora.adapter import WEIGHTS_FILE, adapter_tensors
from lownibble.lora.inject import active_adapter, adapter_configs, lora_layers, remove_adapter

_READ_BACK = "lownibble_read_back"
_TOKENS = 16

LOGIT_TOLERANCE = 0.05
"""How far logits of the same adapter may be apart on a GPU, as a part of the largest: orders of summation in 16 bits."""


def check_finite(model: Any) -> None:
    """Before saving: the model's logits are finite.

    Raises:
        TrainingError: they are not.
    """
    if not bool(torch.isfinite(_logits(model)).all()):
        raise TrainingError(
            "After the last step the model gives logits that are not finite; nothing but the checkpoints was saved. Lower the "
            "learning rate and train again."
        )


def check_adapter(model: Any, folder: Path, examples: list[Example], end: int | None) -> tuple[dict[str, Any], list[str]]:
    """Facts about the saved adapter, and what a user should be told.

    Args:
        examples: what it was trained on; end: the end-of-sequence token.
    Raises:
        OutputError: read back, the adapter has other tensors than the one in memory, or gives other logits.
    """
    name = active_adapter(model)
    assert name is not None
    layers = list(lora_layers(model, name))
    zero = [path for path, layer in layers if not layer.adapter(name).lora_B.any()]
    facts = {
        "equal_after_reading_back": _reads_back(model, folder, name),
        "logits_compared": "bit for bit" if model.device.type == "cpu" else f"within {LOGIT_TOLERANCE:g} of the largest",
        "layers": len(layers),
        "layers_whose_B_is_zero": len(zero),
        **_facts(model, examples, end),
    }
    told = _told(facts)
    if layers and len(zero) == len(layers):
        told.append("every B of the adapter is zero: it changes nothing. No step was taken, or the learning rate was 0.")
    if not facts["equal_after_reading_back"]:
        raise OutputError(
            f"The adapter in '{folder}', read back, is not the one in memory. Resume with --resume to save it again; "
            "if it happens again, the disk is to be distrusted."
        )
    return facts, told


def check_model(model: Any, folder: Path, examples: list[Example], end: int | None) -> tuple[dict[str, Any], list[str]]:
    """As `check_adapter`, for a model that was trained in full: every tensor is compared with its file's.

    Raises:
        OutputError: a tensor is missing from the files, or differs.
    """
    expected = dict(model.state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if key in expected and not torch.equal(opened.get_tensor(key), expected.pop(key).cpu()):
                    raise OutputError(f"'{key}' in '{file}' is not what was trained. Resume with --resume to save it again.")
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [key for key in expected if key not in tied and isinstance(expected[key], Tensor)]
    if missing:
        raise OutputError(f"'{folder}' lacks {', '.join(missing[:5])}. Resume with --resume to save it again.")
    facts = {"equal_after_reading_back": True, **_facts(model, examples, end)}
    return facts, _told(facts)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    model.eval()
    device, vocabulary = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    tokens = torch.arange(_TOKENS, device=device) * 37 % vocabulary
    ids = tokens.unsqueeze(0)
    pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **pair).logits
    return logits


def _reads_back(model: Any, folder: Path, name: str) -> bool:
    """Whether the folder holds the active adapter's tensors and, loaded beside it, gives the same logits."""
    stored, held = load_file(folder / WEIGHTS_FILE), adapter_tensors(model, name)
    if stored.keys() != held.keys() or not all(torch.equal(stored[key], value.detach().cpu()) for key, value in held.items()):
        return False
    if adapter_configs(model)[name].bias != "none":
        return True  # only one adapter of a model may train its biases
    expected = _logits(model)
    load_adapter(model, folder, name=_READ_BACK)
    try:
        set_adapter(model, _READ_BACK)
        return _same(_logits(model), expected)
    finally:
        set_adapter(model, name)
        remove_adapter(model, _READ_BACK)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal on a CPU; on other devices, whose kernels may add up in another order each time, within `LOGIT_TOLERANCE`."""
    if found.device.type == "cpu":
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max().clamp(min=1))


def _facts(model: Any, examples: list[Example], end: int | None) -> dict[str, Any]:
    ended = sum(any(label and token == end for token, label in zip(e.input_ids, e.is_label, strict=True)) for e in examples)
    config = model.config.get_text_config()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and _weight(inputs).data_ptr() == _weight(outputs).data_ptr()
    return {
        "rows_that_train_the_end_of_sequence": ended,
        "rows": len(examples),
        "tied_weights": {"configured": bool(getattr(config, "tie_word_embeddings", False)), "tied": tied},
    }


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight if isinstance(weight, Tensor) else weight.codes


def _told(facts: dict[str, Any]) -> list[str]:
    told = []
    if facts["rows"] and not facts["rows_that_train_the_end_of_sequence"]:
        told.append(
            "no row trains the end-of-sequence token: the model will not learn to stop. Look at the template, or --max-length."
        )
    tied = facts["tied_weights"]
    if tied["configured"] and not tied["tied"]:
        told.append("the configuration ties input and output embeddings, and they are not tied any more.")
    return told
