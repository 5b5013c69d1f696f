"""Verify a saved result: do the files hold what was trained, and was anything trained at all?

Each check covers a problem that users of similar libraries report: empty adapters, adapters that load without effect, models
that never stop generating. Wrong files fail the run; other findings go into the record and to the user as warnings.
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
from lownibble.lora.active import active_adapter, adapter_configs, lora_layers, remove_adapter
from lownibble.lora.adapter import file_tensors
from lownibble.lora.portable import WEIGHTS_FILE
from lownibble.memory.usage import local
from lownibble.models.conversion import stored_names
from lownibble.models.info import pass_device

_READ_BACK = "lownibble_read_back"
_TOKENS = 16

LOGIT_TOLERANCE = 0.05
"""Maximum difference between logits of the same adapter on a GPU, relative to the largest: summation order in 16 bits."""


def check_finite(model: Any) -> None:
    """Check before saving that the model's logits are finite.

    Raises:
        TrainingError: they are not.
    """
    if not bool(torch.isfinite(_logits(model)).all()):
        raise TrainingError(
            "After the last step the model gives logits that are not finite; nothing but the checkpoints was saved. Lower the "
            "learning rate and train again."
        )


def check_adapter(
    model: Any, folder: Path, examples: list[Example], end: int | None, *, runs: bool = True
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Read a saved adapter back and compare it; returns facts for the record, and warnings for the user.

    Args:
        examples: the training examples; end: the end-of-sequence token.
        runs: whether the model can be run for its logits; else only tensors are compared.
    Raises:
        OutputError: the adapter read back has other tensors than the one in memory, or produces other logits.
    """
    name = active_adapter(model)
    assert name is not None
    layers = list(lora_layers(model, name))
    zero = [path for path, layer in layers if not layer.adapter(name).lora_B.any()]
    facts = {
        "equal_after_reading_back": _reads_back(model, folder, name, runs),
        "logits_compared": _how_compared(model, name) if runs else "no: layers are sharded; tensors bit for bit",
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


def check_model(
    model: Any, folder: Path, examples: list[Example], end: int | None, *, runs: bool = True
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """As `check_adapter`, for full fine-tuning: compares every tensor with the one in its file.

    Raises:
        OutputError: a tensor is missing from the files, or differs.
    """
    expected = stored_names(model, dict(model.state_dict()))  # experts may be stored one by one
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
    device, vocabulary = pass_device(model), model.config.get_text_config().vocab_size
    tokens = torch.arange(_TOKENS, device=device) * 37 % vocabulary
    ids = tokens.unsqueeze(0)
    pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **pair).logits
    return logits


def _reads_back(model: Any, folder: Path, name: str, runs: bool) -> bool:
    """Whether the folder holds the active adapter's tensors and, loaded as a second adapter, produces the same logits."""
    stored, held = load_file(folder / WEIGHTS_FILE), file_tensors(model, name)
    if stored.keys() != held.keys() or not all(torch.equal(stored[key], value.detach().cpu()) for key, value in held.items()):
        return False
    if not runs or adapter_configs(model)[name].bias != "none":
        return True  # only one adapter may train biases, so a second cannot be loaded to compare logits
    expected = _logits(model)
    load_adapter(model, folder, name=_READ_BACK)
    try:
        set_adapter(model, _READ_BACK)
        return _same(_logits(model), expected)
    finally:
        set_adapter(model, name)
        remove_adapter(model, _READ_BACK)


def _how_compared(model: Any, name: str) -> str:
    if adapter_configs(model)[name].bias != "none":
        return "no: biases are trained in place; tensors bit for bit"
    return "bit for bit" if pass_device(model).type == "cpu" else f"within {LOGIT_TOLERANCE:g} of the largest"


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal on a CPU; within `LOGIT_TOLERANCE` on other devices, whose kernels may sum in varying order."""
    if found.device.type == "cpu":
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max().clamp(min=1))


def _facts(model: Any, examples: list[Example], end: int | None) -> dict[str, Any]:
    ended = sum(any(label and token == end for token, label in zip(e.input_ids, e.is_label, strict=True)) for e in examples)
    config = model.config.get_text_config()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and local(_weight(inputs)).data_ptr() == local(_weight(outputs)).data_ptr()
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
