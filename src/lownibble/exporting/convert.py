"""`lownibble export`: convert weights to another tool's format.

    from a model      safetensors (dense), bnb-4bit (packed; nf4 and fp4 byte-identical to bitsandbytes), gguf
    from an adapter   gguf, peft-per-expert (PEFT folder); peft (.gguf file)
    from either       ollama, vllm (folders that these serve; `engines.py`)

A packed checkpoint is not requantised: bnb-4bit copies its bytes, the dense formats dequantise them. To export an adapter
in a model format, merge it first, which measures the loss; a merged model that was measured to lose its fine-tuning gain in
4 bits is not packed unless forced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lownibble import record
from lownibble.config import ExportConfig, QuantConfig
from lownibble.errors import AdapterError, ConfigError, OutputError
from lownibble.exporting import engines, gguf
from lownibble.exporting.measure import BASE, FAITHFUL, LIVE
from lownibble.exporting.merge import RECORD, check_free, write
from lownibble.exporting.weights import DENSE_TARGETS, Tell, Weights, say_nothing
from lownibble.lora.adapter_file import AdapterFile
from lownibble.lora.apart import split
from lownibble.lora.portable import CONFIG_FILE, folder_of
from lownibble.lora.provenance import other_weights
from lownibble.models import ModelSource, resolve, skeleton
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors, untie
from lownibble.models.formats.write import BNB_TYPES, leave_dense
from lownibble.models.load import tied_aliases


def export(source: str | Path, output: str | Path, format: str, **options: Any) -> dict[str, Any]:
    """Write a model or an adapter in another format; returns what was written.

    Args:
        source: a model as `load` takes it, or an adapter: a folder or a .gguf file.
        output: a folder that does not exist or is empty; for gguf a file that does not exist.
        format: 'safetensors', 'bnb-4bit', 'gguf', 'peft', 'peft-per-expert', 'ollama' or 'vllm'.
        options: of `ExportConfig`: base, dtype, quant, ...
    Raises:
        ConfigError: the source cannot be written in that format.
        ModelError, AdapterError: the source is damaged or not supported.
        OutputError: the output already exists, or the disk is full.
    """
    return run_export(ExportConfig(source=str(source), output=str(output), format=format, **options))


def run_export(config: ExportConfig, tell: Tell = say_nothing) -> dict[str, Any]:
    """`export` from an `ExportConfig`; `tell` receives progress."""
    source, output = folder_of(config.source), _check(config)
    started = {**record.new("export"), "status": "ok", "config": config.to_dict(), "output": str(output)}
    if config.format in ("ollama", "vllm"):
        return {**started, **_engine(config, source, output, tell)}
    is_file = source.suffix == ".gguf" and source.is_file()
    if (source / CONFIG_FILE).is_file() or (is_file and gguf.is_adapter(source)):
        return {**started, **_adapter(config, source, output, is_file)}
    if config.format.startswith("peft") or config.base is not None:
        what = f"--format {config.format} is" if config.format.startswith("peft") else "--base is"
        raise ConfigError(f"{what} for adapters, and '{config.source}' is a model. Leave it out.")
    model = resolve(config.source, config.revision)
    auto = "float16" if config.format == "gguf" else "auto"
    dtype = auto if config.dtype == "auto" else config.dtype
    weights = Weights(model, None, None, config.quant, dtype if config.format != "gguf" else "float32")
    onto = weights.packed_target if config.format == "bnb-4bit" else "dequantized" if weights.packed else "original"
    kinds = set(weights.packed.values())
    if kinds and config.quant != QuantConfig():
        raise ConfigError(f"'{config.source}' is quantised already, as {weights.new_quant.quant_type}. Leave quant options out.")
    if config.format == "bnb-4bit" and kinds - set(BNB_TYPES):
        raise ConfigError(
            f"'{config.source}' is stored as {weights.tensors.stored_as or ' and '.join(sorted(kinds))}, not as nf4 or fp4. "
            "Export it with --format safetensors first, and that folder with --format bnb-4bit."
        )
    if config.format == "bnb-4bit" and (stacks := sorted(weights.experts.keys() & weights.requantized)):
        raise ConfigError(
            f"bitsandbytes has no place for the experts of a mixture ({stacks[0]}, ...: {weights.share(stacks):.0%} of the "
            f"model). Leave them dense: {leave_dense(stacks[0])}, or use lownibble quantize, whose own format has."
        )
    if config.format == "gguf":
        return {**started, **gguf.write_model(weights, onto, output, dtype, model, tell)}
    measured = _measured(model.folder)
    if onto == weights.packed_target and not weights.packed and not config.force:
        _check_kept(config.source, measured)
    facts = {
        "base": {"model": model.name, "digest": weights.checkpoint.digest()}, "tensors": len(weights.names), "measured": measured,
    }  # fmt: skip
    write(weights, onto, output, {**started, **facts}, tell=tell)
    return {**started, **facts}


def _measured(folder: Path) -> dict[str, Any] | None:
    """The merge measurement in this folder's merge.json; None if the model was not merged or not measured."""
    try:
        found = json.loads((folder / RECORD).read_text())["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _check_kept(source: str, measured: dict[str, Any] | None) -> None:
    """Raise if packing a merged model would lose its fine-tuning gain."""
    models = {} if measured is None else measured["models"]
    kept = next((figures["kept"] for name, figures in models.items() if name not in (LIVE, BASE, *DENSE_TARGETS)), 1.0)
    if kept < FAITHFUL:
        raise OutputError(
            f"'{source}' holds a merged adapter, which retains {max(0, kept):.0%} of its fine-tuning gain in 4 bits (under "
            f"{FAITHFUL:.0%}): nothing was written. Serve the base in 4 bits with the adapter beside it, take --format gguf "
            "--dtype q8_0, or --force."
        )


def _check(config: ExportConfig) -> Path:
    output = Path(config.output).expanduser()
    if config.format == "gguf":
        if output.exists():
            raise OutputError(f"'{output}' exists already. Choose another --output, a file such as model.gguf.")
    else:
        output = check_free(output)
        if config.dtype == "q8_0" and config.format != "ollama":
            raise ConfigError("--dtype q8_0 is for --format gguf and ollama. Choose another.")
    if config.format not in ("bnb-4bit", "vllm") and config.quant != QuantConfig():
        raise ConfigError("Options of the quantisation are for --format bnb-4bit and vllm. Leave them out.")
    if config.format == "bnb-4bit" and (config.quant.pattern or config.quant.quant_type not in BNB_TYPES):
        raise ConfigError(
            f"--format bnb-4bit is bitsandbytes' 4-bit format: {' or '.join(BNB_TYPES)} in all layers. Leave other codecs out."
        )
    return output


def _adapter(config: ExportConfig, source: Path, output: Path, is_file: bool) -> dict[str, Any]:
    formats = ("peft",) if is_file else ("gguf", "peft-per-expert")
    if config.format not in formats:
        if config.format == ("gguf" if is_file else "peft"):
            raise ConfigError(f"'{source}' is in that format already. Copy it.")
        said = " or ".join(formats)
        raise ConfigError(f"An adapter exports to {said}, not {config.format}. Merge it first: lownibble merge {source}")
    if config.dtype != "auto":
        raise ConfigError("Adapters are exported in float32. Leave --dtype out.")
    adapter = None if is_file else AdapterFile(source)
    facts = (adapter.trained_on if adapter else gguf.trained_on(source)) or {}
    source_of_base = _base_of(config, source, facts, adapter.base if adapter else None)
    base = _bare(source_of_base)
    if adapter is None:
        return gguf.read_adapter(source, base, output)
    if config.format == "peft-per-expert":
        return split(adapter, base, output)
    return gguf.write_adapter(adapter, base, output)


def _base_of(config: ExportConfig, source: Path, facts: dict[str, Any], named: str | None) -> ModelSource:
    """The base of the adapter `source`, which has the provenance `facts` and names `named`."""
    name = config.base or facts.get("model") or named
    if not name:
        raise AdapterError(f"'{source}' does not say what it was trained on. Name the base with --base.")
    found = resolve(name, config.revision or (None if config.base else facts.get("revision")))
    if facts and (other := other_weights(facts, {"model": name, "digest": Checkpoint(found).digest()})):
        raise AdapterError(f"'{source}' is an adapter of another base: {other}. Name its own with --base.")
    return found


def _bare(source: ModelSource) -> Any:
    """transformers' skeleton of an adapter's base, with a head of its own where the checkpoint has one."""
    base = skeleton(source, torch.float32)
    if tied_aliases(base):
        untie(base, ModelTensors(base, Checkpoint(source)).untied)
    return base


def _engine(config: ExportConfig, source: Path, output: Path, tell: Tell) -> dict[str, Any]:
    """Write a folder for Ollama or vLLM, from a model, an adapter or (vLLM) a folder of adapters."""
    adapters = {name: AdapterFile(folder) for name, folder in engines.adapters_of(source).items()}
    if config.format == "ollama" and not (source / CONFIG_FILE).is_file():
        adapters = {}
    if config.base is not None and not adapters:
        raise ConfigError(f"--base is for adapters, and '{config.source}' is a model. Leave it out.")
    bases = [_base_of(config, one.folder, one.trained_on or {}, one.base) for one in adapters.values()]
    if len({one.folder.resolve() for one in bases}) > 1:
        raise AdapterError(f"The adapters of '{source}' are of several bases. Export those of one base together.")
    model = bases[0] if bases else resolve(config.source, config.revision)
    base = _bare(model) if adapters else None
    if config.format == "vllm":
        if config.dtype != "auto":
            raise ConfigError("--format vllm keeps the types that weights are stored in. Leave --dtype out.")
        return engines.write_vllm(model, adapters, base, output, config.quant, tell)
    dtype = "float16" if config.dtype == "auto" else config.dtype
    return engines.write_ollama(model, next(iter(adapters.values()), None), base, output, dtype, tell)
