"""`lownibble merge`: merge an adapter into its base's weights; measure first, then write shard by shard.

Weights stream from safetensors to safetensors one tensor at a time, so peak memory depends on the largest tensor, not the model.
The folder is written under a temporary name and renamed when complete; an interrupted merge resumes from its finished shards.
The loss is measured before anything is written (`measure.py`), and a 4-bit merge that loses much of the fine-tuning gain is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lownibble import record, stored, tensorfile
from lownibble.config import NEXT_TOKEN, PACKED, PREFERENCE, DataConfig, MergeConfig, QuantConfig, TrainConfig
from lownibble.data import Example, encode_for, load, sequences_of
from lownibble.errors import AdapterError, ConfigError, InputError, OutputError
from lownibble.exporting.measure import BASE, FAITHFUL, choose_rows, measure
from lownibble.exporting.weights import Tell, Weights, check_onto, say_nothing
from lownibble.lora.adapter_file import AdapterFile
from lownibble.lora.portable import CONFIG_FILE
from lownibble.lora.provenance import describe, other_weights
from lownibble.models import ModelSource, load_tokenizer, resolve
from lownibble.models.checkpoint import INDEX
from lownibble.training.microbatches import collator
from lownibble.training.output import hold

RECORD, _STATE = "merge.json", ".merging.json"
_LEFT_BEHIND = (
    "config.json", INDEX, "README.md", RECORD, "quantize_config.json", "quant_config.json", "hf_quant_config.json"
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = (
    _TEMPLATES,
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def merge(adapter: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Merge an adapter into its base and write the model to a folder; returns the record, also in OUTPUT/merge.json.

    Args:
        adapter: its folder.
        output: a folder that does not exist or is empty.
        options: of `MergeConfig`: onto, base, dtype, measure_tokens, ...
    Raises:
        AdapterError: the adapter is damaged, belongs to another base, or has a tensor that matches nothing.
        ConfigError: options that contradict each other or the adapter.
        OutputError: the folder is not empty, the disk is full, or the merge would lose the fine-tuning gain.
    """
    return run_merge(MergeConfig(adapter=str(adapter), output=str(output), **options))


def run_merge(config: MergeConfig, tell: Tell = say_nothing) -> dict[str, Any]:
    """`merge` from a `MergeConfig`; `tell` receives progress."""
    output = check_free(config.output)
    adapter = AdapterFile(config.adapter)
    source, quant = _base(config, adapter)
    weights = Weights(source, adapter, quant, config.quant, config.dtype)
    _check_base(config, adapter, weights)
    other_name = config.onto == "nf4" and config.onto != weights.packed_target  # 'nf4' has always meant: packed again
    if other_name:
        config = config.with_options(onto=weights.packed_target)
    if config.onto != "auto":
        check_onto(weights, config.onto)
    measured, rows = _measure(config, adapter, weights, tell) if config.measure_tokens else (None, None)
    onto, advice = _choose(config, weights, measured)
    advice += [f"'nf4': packed as {onto}, as its base was in training"] * other_name
    result = {
        **record.new("merge"),
        "status": "ok",
        "config": config.to_dict(),
        "environment": record.environment(),
        "base": {"model": source.name, "digest": weights.checkpoint.digest(), "stored": _codec(weights)},
        "onto": onto,
        "targets": weights.targets,
        "tensors_changed": len(weights.replaced.keys() | weights.edits.keys()),
        "measured": measured and {"data": rows, **measured},
        "advice": advice,
        "output": str(output),
    }
    write(weights, onto, output, result, adapter.folder, tell)
    return result


def check_free(path: str | Path) -> Path:
    """The absolute path of the folder to create; its parent is created.

    Raises:
        OutputError: it exists and is not empty, or cannot be created.
    """
    output = Path(path).expanduser()
    output = output.parent.resolve() / output.name if output.name not in ("", "..") else output.resolve()
    if output.is_symlink() or os.path.ismount(output) or output == Path.cwd():
        raise OutputError(f"'{output}' cannot be replaced as a whole. Choose a new folder as --output.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"'{output}' holds something already. Choose another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make '{output.parent}': {error.strerror}. Choose another --output.") from None
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"'{output.parent}' cannot be written. Choose another --output.")
    return output


def _codec(weights: Weights) -> str:
    return describe(weights.quant.to_dict() if weights.quant else None)


def _base(config: MergeConfig, adapter: AdapterFile) -> tuple[ModelSource, QuantConfig | None]:
    """The base, and its codec in training; None: dense, or the packed checkpoint's own codec."""
    facts = adapter.trained_on or {}
    name = config.base or facts.get("model") or adapter.base
    if not name:
        raise AdapterError(f"'{adapter.folder}' does not say what it was trained on. Name the base with --base.")
    source = resolve(name, config.revision or (None if config.base else facts.get("revision") or adapter.revision))
    if adapter.trained_on is not None:
        known = facts["quant"]
        said = known and QuantConfig(**{key: known[key] for key in PACKED if key in known})
        if config.trained_on is not None and (config.trained_on == "quantized") != bool(said):
            raise ConfigError(
                f"'{adapter.folder}' says that it was trained on {describe(known)} weights. Leave --trained-on out."
            )
        if config.quant not in (QuantConfig(), said):
            raise ConfigError(
                f"'{adapter.folder}' says that it was trained on {describe(known)} weights. Leave quant options out."
            )
        return source, said
    if _is_packed(source):
        if config.trained_on == "dense" or config.quant != QuantConfig():
            raise ConfigError(f"'{source.name}' is packed, with a codec of its own. Leave --trained-on and quant options out.")
        return source, None
    stored = config.trained_on or ("quantized" if config.onto == "dequantized" else None)
    if stored is None and config.onto == "original" and not config.measure_tokens:
        stored = "dense"  # does not affect what is written
    if stored is None:
        raise ConfigError(
            f"'{adapter.folder}' does not say whether its base was in 4 bits in training. Say --trained-on dense or quantized."
        )
    return source, config.quant if stored == "quantized" else None


def _is_packed(source: ModelSource) -> bool:
    return stored.codec(stored.of_folder(source.folder)) is not None


def _check_base(config: MergeConfig, adapter: AdapterFile, weights: Weights) -> None:
    if adapter.trained_on is None or config.any_base:
        return
    if different := other_weights(adapter.trained_on, {"model": weights.source.name, "digest": weights.checkpoint.digest()}):
        raise AdapterError(
            f"'{adapter.folder}' is an adapter of another base: {different}. Name its own with --base, or say --any-base."
        )


def _measure(config: MergeConfig, adapter: AdapterFile, weights: Weights, tell: Tell) -> tuple[dict[str, Any], str]:
    """The measurement, and the source of its rows."""
    data, objective, said = _data(config, adapter)
    tokenizer = load_tokenizer(_tokenizer_of(adapter, weights.source))
    train = TrainConfig(objective=objective, max_length=config.max_length)
    encoded = encode_for(load(data)[1], tokenizer, data, train).examples
    examples = [Example(ids, flags, each.origin) for each in encoded for ids, flags in sequences_of(each)]
    rows = choose_rows(examples, config.measure_tokens)
    return measure(weights, rows, collator(weights.model, tokenizer), tell), said


def _data(config: MergeConfig, adapter: AdapterFile) -> tuple[DataConfig, str, str]:
    """The rows to measure on, the objective that says how they are read, and where they are from."""
    if config.data.path != "run":
        return config.data, NEXT_TOKEN, config.data.path
    run = adapter.folder.resolve().parent / "record.json"
    if run.is_file():
        try:
            options = json.loads(run.read_text())["config"]
            data, objective = DataConfig(**options["data"]), options.get("train", {}).get("objective", NEXT_TOKEN)
            load(data)
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise ConfigError(
                f"The data of the run in '{run}' cannot be read again: {error} Name other rows with --data."
            ) from None
        known = objective if objective in PREFERENCE else NEXT_TOKEN
        return data, known, f"{data.path} (of the run that made the adapter)"
    return DataConfig(), NEXT_TOKEN, "demo (the adapter's own data are not known; name them with --data)"


def _choose(config: MergeConfig, weights: Weights, measured: dict[str, Any] | None) -> tuple[str, list[str]]:
    """The target to write, and advice on each target.

    Raises:
        ConfigError: 'auto' without a measurement.
        OutputError: a 4-bit merge that loses the fine-tuning gain, or was not measured, and is not forced.
    """
    if measured is None:
        if config.onto == "auto":
            raise ConfigError("--onto auto goes by the measurement. Name a target, or leave --measure-tokens above 0.")
        if config.onto == weights.packed_target and not (config.force or weights.merge_aware):
            raise OutputError(
                "A merge packed into 4 bits was not measured and may have lost the fine-tuning gain. Measure it, or --force."
            )
        return config.onto, ["not measured"]
    models = measured["models"]
    advice = [f"{target}: {_verdict(models, measured['layers'][target], target)}" for target in weights.targets]
    best = min(weights.targets, key=lambda target: models[target]["label_tokens"]["kl"])
    onto = best if config.onto == "auto" else config.onto
    kept = models[onto]["kept"]
    if onto == weights.packed_target and kept < FAITHFUL and not config.force:
        raise OutputError(
            f"Packed into 4 bits again, the model retains {max(0, kept):.0%} of the fine-tuning gain (under {FAITHFUL:.0%}): "
            "nothing was "
            f"written. Merge onto {best} ({models[best]['kept']:.1%} kept) and quantise when serving, keep the adapter apart, or "
            "--force."
        )
    if onto != best and models[onto]["kept"] < models[best]["kept"] - 0.01:
        advice.append(f"'{best}' is nearer to the unmerged adapter than '{onto}'")
    if models[BASE]["label_tokens"]["kl"] < 1e-4:
        advice.append("the adapter hardly changes what the base says of these rows; look at the data, or at the adapter")
    return onto, advice


def _verdict(models: dict[str, Any], layers: dict[str, Any], target: str) -> str:
    figures = models[target]["label_tokens"]
    worst, kept = layers["error_over_delta_worst"], models[target]["kept"]
    text = f"retains {max(0.0, kept):.1%} of the fine-tuning gain (KL {figures['kl']:.2g}, same top-1 token "
    text += f"{figures['top1_agreement']:.1%}"
    text += f", perplexity {figures['perplexity']:.4g} against {models['live']['label_tokens']['perplexity']:.4g})"
    if worst is not None and worst > 1:
        text += f"; largest weight error in a layer is {worst:.2g} x its LoRA delta"
    return text if kept >= FAITHFUL else f"{text}; not faithful"


def write(
    weights: Weights, onto: str, output: Path, result: dict[str, Any], tokenizer_first: Path | None = None,
    tell: Tell = say_nothing,
) -> None:  # fmt: skip
    """Write the model to `output` atomically, with `result` as its record; resumes an interrupted write of the same merge.

    Raises:
        OutputError: not enough disk space, or the folder cannot be written.
    """
    shards = _shards(weights, onto)
    aside = output.parent / f".{output.name}.merging"
    identity = hashlib.sha256(json.dumps(_identity(weights, onto, shards), sort_keys=True).encode()).hexdigest()
    with hold(aside):
        try:
            state = aside / _STATE
            resumed = state.is_file() and state.read_text() == identity
            for file in aside.iterdir():
                if file.is_dir():
                    shutil.rmtree(file)
                elif file.name != ".lock" and not (resumed and file.name in (_STATE, *shards)):
                    file.unlink()
            state.write_text(identity)
            todo = {name: entries for name, entries in shards.items() if not (aside / name).is_file()}
            _check_room(aside, todo)
            for number, (name, entries) in enumerate(todo.items(), len(shards) - len(todo)):
                tell("writing shards", number, len(shards))
                _write_shard(weights, onto, aside / name, entries)
            tell("writing shards", len(shards), len(shards))
            _write_rest(weights, onto, aside, shards, tokenizer_first)
            record.write(aside / RECORD, result)
            if output.is_dir():
                output.rmdir()  # empty: see `check_free`
            state.unlink()
            (aside / ".lock").unlink()
            aside.rename(output)
        except InputError as error:
            if not isinstance(error, OutputError) or not any((aside / name).is_file() for name in shards):
                shutil.rmtree(aside, ignore_errors=True)  # the inputs are at fault, or no shard is finished
            raise
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"Cannot write '{output}': {error}. Free some space and run the same command again: finished shards are kept."
            ) from error


def _identity(weights: Weights, onto: str, shards: dict[str, dict[str, tensorfile.Entry]]) -> dict[str, Any]:
    """Everything the written bytes depend on; the base by its digest."""
    adapter = weights.adapter
    content = adapter and [_sha256(file) for file in (adapter.path, adapter.folder / CONFIG_FILE)]
    return {
        "base": weights.checkpoint.digest(), "adapter": content, "onto": onto, "dtype": weights.dtype,
        "shards": {name: sorted(entries) for name, entries in shards.items()},
        "ready": weights.ready_id, "format": weights.writer.name if onto == weights.packed_target else None,
        "codec": [quant and quant.to_dict() for quant in (weights.quant, weights.new_quant)],
    }  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(weights: Weights, onto: str) -> dict[str, dict[str, tensorfile.Entry]]:
    """Shard file name -> its tensors, sharded as the base."""
    shards: dict[str, dict[str, tensorfile.Entry]] = {}
    for names in weights.stored_together:
        shard = shards.setdefault(weights.shard_of(names[0]), {})
        shard |= {key: tensorfile.Entry(dtype, shape) for key, (dtype, shape) in weights.layout(names, onto).items()}
    return dict(sorted(shards.items()))


def _check_room(folder: Path, shards: dict[str, dict[str, tensorfile.Entry]]) -> None:
    needed = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"The merged model needs {needed / 1e9:.2f} GB in '{folder.parent}', where {free / 1e9:.2f} GB are free. "
            "Nothing was written. Free some space, or choose another --output."
        )


def _write_shard(weights: Weights, onto: str, path: Path, entries: dict[str, tensorfile.Entry]) -> None:
    def parts() -> Any:
        for names in weights.stored_together:
            if weights.shard_of(names[0]) != path.name:
                continue
            made = weights.written(names, onto)
            for key, tensor in made.items():
                yield key, 0, tensor.contiguous()
            del made, tensor

    write_whole(path, entries, parts())


def write_whole(path: Path, entries: dict[str, tensorfile.Entry], parts: Iterable[tuple[str, int, Tensor]]) -> None:
    """`tensorfile.write` of a file that is there whole or not at all, after a power cut, too."""
    part = path.with_name(f"{path.name}.part")
    try:
        tensorfile.write(part, entries, parts, {"format": "pt"})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_rest(
    weights: Weights, onto: str, folder: Path, shards: dict[str, dict[str, tensorfile.Entry]], tokenizer_first: Path | None
) -> None:
    """Write everything but the weights: configuration, index, tokenizer and the base's other files."""
    own_tokenizer = tokenizer_first is not None and _has_tokenizer(tokenizer_first)
    for origin in (weights.source.folder, tokenizer_first if own_tokenizer else None):
        if origin is None:
            continue
        for file in sorted(origin.iterdir()):
            left = file.name.startswith(("adapter_", ".")) or file.name in _LEFT_BEHIND or file.name.endswith(_WEIGHT_FILES)
            other = origin is not tokenizer_first and own_tokenizer and file.name.startswith(_TOKENIZER_FILES)
            if file.is_file() and not left and not other:
                shutil.copyfile(file, folder / file.name)
            elif file.is_dir() and file.name == _TEMPLATES and not other:
                shutil.copytree(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(_config_json(weights, onto), indent=2) + "\n")
    if set(shards) != {"model.safetensors"}:
        total = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, entries in shards.items() for key in entries},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config_json(weights: Weights, onto: str) -> dict[str, Any]:
    """The base's config.json with the merge's changes; `quantization_config` only if the result is packed."""
    config = {**weights.config}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"]}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in (*stored.KEYS, stored.ORIGIN):
                part.pop(key, None)
            part |= {key: value for key, value in weights.changes.items() if key in part or part is config}
    dtypes = {kept for name in weights.names if (kept := weights.kept_dtype(name)).is_floating_point}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if onto == weights.packed_target:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        dense = weights.dense_layers(weights.requantized)
        config["quantization_config"] = weights.writer.config_json(weights.new_quant, sorted(weights.requantized), dense, dtype)
    return config


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _tokenizer_of(adapter: AdapterFile, source: ModelSource) -> ModelSource:
    """The adapter's own tokenizer (it has any added tokens), else the base's."""
    return ModelSource(adapter.folder, str(adapter.folder)) if _has_tokenizer(adapter.folder) else source
