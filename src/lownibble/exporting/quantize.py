"""`lownibble quantize`: pack a model's linear layers, to nearest (rtn) or by GPTQ, and write the checkpoint.

By GPTQ the model never is in memory as a whole: calibration rows go through it one decoder layer at a time
(`calibration/layers.py`); each is read from the checkpoint when its turn comes, packed, run again for the next one's inputs,
written beside the output, and dropped. Then the checkpoint is written shard by shard as merges are (`merge.write`), with the
packed layers from those files. Memory: one layer's weights and second moments, and the hidden states of all calibration rows. An
interrupted run keeps the layers that are finished.

With `bits` each layer first gets a codec of its own (`calibration/mixed.py`). That takes one pass for gradients, with the model
packed in memory, and one over the dense layers.

Layers outside of the decoder layers, those whose inputs are all zero, and the experts of mixtures are rounded to nearest.
Parameters that several modules share (tied embeddings, a block that is used in several layers) are in memory all along.

The checkpoint is in a layout that others load (`models/formats/write.py`): bitsandbytes', compressed-tensors' or GPTQ's, or in
our own where none holds the codecs. What a layout holds of the scales is known before codes are chosen.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lownibble import record, stored, tensorfile
from lownibble.calibration import Moments, join_rows, row_length, walk
from lownibble.calibration.gptq import round_again
from lownibble.calibration.mixed import candidates, check_budget, choose, loss_increase, sample_tokens
from lownibble.config import NEXT_TOKEN, DataConfig, QuantConfig, QuantizeConfig, TrainConfig
from lownibble.data import encode_for, read, recipe_for, sequences_of
from lownibble.errors import ConfigError, InputError, ModelError, OutputError, QuantizationError
from lownibble.exporting.merge import check_free, write, write_whole
from lownibble.exporting.weights import Tell, Weights, say_nothing
from lownibble.memory.usage import trim_heap
from lownibble.models import ModelSource, load_tokenizer, pick_device, resolve, skeleton
from lownibble.models import packed as packed_files
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors, untie
from lownibble.models.formats.write import ToPack, leave_dense
from lownibble.models.formats.write import choose as choose_writer
from lownibble.models.info import decoder_layers
from lownibble.models.load import load, pack_experts, pick_dtype, place, place_shared
from lownibble.quant import PackedWeight, QuantLinear, layouts, matrix
from lownibble.training.output import hold

_STATE = "state.json"


def quantize_model(model: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Pack a model's linear layers and write the checkpoint to a folder; returns the record, also in OUTPUT/merge.json.

    Args:
        model: as `load` takes it, dense.
        output: a folder that does not exist or is empty.
        options: of `QuantizeConfig`: rounding, calibration, quant, ...
    Raises:
        ConfigError: the model is quantised already, or options do not suit it.
        DataError: too few calibration rows. QuantizationError: a layer cannot be packed (named).
        OutputError: the folder is not empty, or the disk is full.
    """
    return run_quantize(QuantizeConfig(model=str(model), output=str(output), **options))


def run_quantize(config: QuantizeConfig, tell: Tell = say_nothing, rows: Tensor | None = None) -> dict[str, Any]:
    """`quantize_model` from a `QuantizeConfig`; `tell` receives progress. `rows`: calibration rows instead of the configured
    ones, token ids (rows, tokens)."""
    output = check_free(config.output)
    source = resolve(config.model, config.revision)
    if how := stored.of_folder(source.folder):
        raise ConfigError(
            f"'{config.model}' is quantised already, as {stored.title(how) or stored.method(how)}. Give the dense checkpoint "
            "that it was made from."
        )
    weights = Weights(source, None, None, config.quant)
    if weights.packed_target not in weights.targets:
        raise ConfigError(
            f"The layers of '{config.model}' are Conv1D, which no packed checkpoint holds. Quantise it while loading."
        )
    names = candidates(config.quant.quant_type) if config.bits is not None else ()
    shapes = {path: weights.rows(path) for path in sorted(weights.requantized)}
    if config.bits is not None and (stacks := sorted(shapes.keys() & weights.experts.keys())):
        raise ConfigError(
            f"--bits chooses codecs for linear layers, and '{config.model}' is a mixture: its experts ({stacks[0]}, ...) are "
            f"{weights.share(stacks):.0%} of the model. Leave --bits out, or leave the experts dense: "
            f"{leave_dense(stacks[0])}."
        )

    def ways(quant: QuantConfig) -> dict[str, list[ToPack]]:
        ways = {path: _ways(path, shape, quant.for_layer(path), names) for path, shape in shapes.items()}
        return {path: [ToPack(shapes[path], how) for how in of.values()] for path, of in ways.items()}

    writer, why = choose_writer(config.format, config.quant, ways)
    result = {
        **record.new("quantize"), "status": "ok", "config": config.to_dict(), "environment": record.environment(),
        "base": {"model": source.name, "digest": weights.checkpoint.digest()}, "layers": len(weights.requantized),
        "format": writer.name, "other_formats": why, "output": str(output),
        "dense_experts": weights.share(weights.experts.keys() - weights.requantized),
    }  # fmt: skip
    config = config.with_options(quant=writer.options(config.quant))
    if config.rounding == "gptq" or config.bits is not None:
        if weights.model.config.is_encoder_decoder:
            raise ConfigError(
                f"'{config.model}' has an encoder: calibration is for models with a decoder alone. Use --method rtn, without "
                "--bits."
            )
        rows = _calibration_rows(config, source, weights.model) if rows is None else rows
        result["calibration"] = {"tokens": rows.numel(), "row_tokens": rows.shape[1]}
    if config.bits is not None:
        assert rows is not None
        weights.writer = writer
        quant, result["mixed"] = _mix(source, weights, config, names, rows, tell)
        config = config.model_copy(update={"quant": quant})  # chosen, not asked for: a pattern beside `bits` is refused
    weights = Weights(source, None, None, config.quant)
    weights.writer = writer
    origin = str(Path(config.model).expanduser().resolve()) if Path(config.model).expanduser().exists() else config.model
    weights.changes[stored.ORIGIN] = {
        "model": origin, "revision": config.revision, "digest": weights.checkpoint.digest(),
    }  # fmt: skip
    result["quant"] = config.quant.to_dict()
    if config.rounding == "rtn":
        write(weights, weights.packed_target, output, result, tell=tell)
        return result
    assert rows is not None
    aside = output.parent / f".{output.name}.gptq"
    with hold(aside), _space_errors(output), _of_no_use_after_errors(aside):
        errors = _pack_layers(source, weights, config, rows, aside, tell)
        weights.ready, weights.ready_id = (lambda path: _read(aside, path, config.quant)), (aside / _STATE).read_text()
        result |= _summary(errors, weights.requantized)
        write(weights, weights.packed_target, output, result, tell=tell)
        shutil.rmtree(aside, ignore_errors=True)
    return result


def _mix(
    source: ModelSource, weights: Weights, config: QuantizeConfig, names: tuple[str, ...], rows_BT: Tensor, tell: Tell
) -> tuple[QuantConfig, Any]:
    """The configuration that gives each layer a codec of `names`, at most `config.bits` bits a weight in the mean, as they are
    written, and facts for the record.

    Raises:
        ConfigError: no choice of codecs is that small.
    """
    assert config.bits is not None
    shapes = {path: weights.rows(path) for path in sorted(weights.requantized)}
    ways = {path: _ways(path, shape, config.quant.for_layer(path), names) for path, shape in shapes.items()}
    dtypes = {path: weights.kept_dtype(f"{path}.weight") for path in shapes}
    sizes = {
        path: {name: weights.writer.n_bytes(ToPack(shapes[path], how), dtypes[path]) for name, how in of.items()}
        for path, of in ways.items()
    }
    n_weights = sum(shape.numel() for shape in shapes.values())
    check_budget(sizes, config.bits * n_weights / 8)  # before minutes of work
    tell("gradients", 0, 1)
    model, _ = load(config.model, quant=config.quant, device=config.device, revision=config.revision)
    tokens = sample_tokens(model, rows_BT, list(shapes))
    del model
    tell("gradients", 1, 1)
    costs: dict[str, dict[str, float]] = {}

    def visit(empty: Any, found: Mapping[str, Moments]) -> None:
        for path in found.keys() & tokens.keys():
            weight = matrix(empty.get_submodule(path)).float()
            costs[path] = {
                name: loss_increase(weight, weights.writer.quantize(weight, how, dtypes[path], name=path), tokens[path])
                for name, how in ways[path].items()
            }

    _walk_layers(source, weights, config, rows_BT, visit, partial(tell, "measuring layers"))
    for path in shapes.keys() - costs.keys():  # outside of the decoder layers, or reached by no token
        costs[path] = {name: float(size == min(sizes[path].values())) for name, size in sizes[path].items()}
    chosen = choose(costs, sizes, config.bits * n_weights / 8)
    quant = QuantConfig.of_layers({path: ways[path][name] for path, name in chosen.items()}, config.quant.skip_modules)
    reached = 8 * sum(sizes[path][name] for path, name in chosen.items()) / n_weights
    return quant, {"bits": reached, "codecs": chosen, "costs": costs}


def _ways(path: str, shape: torch.Size, how: QuantConfig, names: tuple[str, ...]) -> dict[str, QuantConfig]:
    """Codec -> configuration, for those of `names` that suit a layer's shape; without names, how it is."""
    if not names:
        return {how.quant_type: how}
    ways = {}
    for name in names:
        with suppress(ConfigError, QuantizationError):
            ways[name] = QuantConfig(quant_type=name, block_size=how.block_size, double_quant=how.double_quant)
            layouts.layout(shape, ways[name])
            continue
        ways.pop(name, None)
    if not ways:
        layouts.layout(shape, QuantConfig(quant_type=names[0], block_size=how.block_size))  # says why
    return ways


@contextmanager
def _of_no_use_after_errors(aside: Path) -> Iterator[None]:
    """Remove the finished layers after an error that the same command would meet again; they are kept where it may go on."""
    try:
        yield
    except InputError as error:
        if not isinstance(error, OutputError):
            shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def _space_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"Cannot write beside '{output}': {error}. Free some space and run the same command again: finished layers are kept."
        ) from error


def _calibration_rows(config: QuantizeConfig, source: ModelSource, model: Any) -> Tensor:
    """Token ids (rows, tokens): rows of the data, of preferences the chosen answers; joined first and cut then."""
    data = DataConfig(path=config.calibration)
    rows = next(side for side in read(config.calibration) if side is not None)
    objective = "dpo" if recipe_for(rows, data).form == "preference" else NEXT_TOKEN
    train = TrainConfig(objective=objective, max_length=config.calibration_tokens)
    encoded = encode_for(rows, load_tokenizer(source), data, train)
    chosen = [sequences_of(each)[0][0] for each in encoded.examples]
    return join_rows(chosen, config.calibration_tokens, row_length(model, config.max_length), config.seed)


def _summary(errors: Mapping[str, tuple[float, float]], packed: set[str]) -> dict[str, Any]:
    """Relative squared errors of the layers' outputs over the calibration rows, by GPTQ and rounded to nearest."""
    ratios = [gptq / nearest for gptq, nearest in errors.values() if nearest]
    return {
        "output_errors": {path: {"gptq": gptq, "rtn": nearest} for path, (gptq, nearest) in errors.items()},
        "error_over_rtn_median": statistics.median(ratios) if ratios else None,
        "rounded_to_nearest": sorted(packed - errors.keys()),
    }


def _pack_layers(
    source: ModelSource, weights: Weights, config: QuantizeConfig, rows_BT: Tensor, folder: Path, tell: Tell
) -> dict[str, tuple[float, float]]:
    """Pack the layers inside decoder layers by GPTQ, into files of `folder`; returns path -> output errors (gptq, rtn)."""
    _check_state(folder, config, weights, rows_BT)
    errors: dict[str, tuple[float, float]] = {}

    def visit(model: Any, found: Mapping[str, Moments]) -> None:
        for path, moments in found.items():
            linear: Any = model.get_submodule(path)
            weight, how = matrix(linear).float(), config.quant.for_layer(path)
            dtype = weights.kept_dtype(f"{path}.weight")
            made = nearest = weights.writer.quantize(weight, how, dtype, name=path, statistics=moments.diagonal)
            has_inputs = bool(moments.diagonal.any())  # else no rounding is better than another
            if has_inputs:
                made = _kept(folder, path, config.quant) or _by_gptq(weight, moments, nearest, path)
                if not _file(folder, path).exists():
                    _write(folder, path, made)
            made = made.to(weight.device).with_dtype(linear.weight.dtype)
            if has_inputs:
                errors[path] = _error(weight, made, moments), _error(weight, nearest, moments)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantLinear(made, linear.bias))

    _walk_layers(source, weights, config, rows_BT, visit, partial(tell, "packing layers"))
    return errors


def _walk_layers(
    source: ModelSource, weights: Weights, config: QuantizeConfig, rows_BT: Tensor,
    visit: Callable[[Any, Mapping[str, Moments]], None], tell: Callable[[int, int], None],
) -> None:  # fmt: skip
    """`calibration.walk` over a checkpoint, of which one decoder layer is in memory at a time; `visit` gets the model, too. The
    experts of a mixture are packed, rounded to nearest, before their layer runs.

    Raises:
        ConfigError: the model's decoder layers are not known.
    """
    device = pick_device(config.device)
    dtype = pick_dtype("auto", device)
    model = skeleton(source, dtype)
    tensors = ModelTensors(model, Checkpoint(source))
    untie(model, tensors.untied)
    layers = decoder_layers(model)
    stacks = weights.requantized & weights.experts.keys()
    packed = weights.requantized - stacks
    inside = {layer: [path for path in packed if path.startswith(f"{layer}.")] for layer in layers}
    if not any(inside.values()):
        raise ConfigError(f"The decoder layers of {type(model).__name__} are not known. Use --method rtn, without --bits.")
    names, shared = list(tensors.dense()), {*tensors.shared.values()}
    head = model.get_output_embeddings()
    unused = {f"{path}.{name}" for path, module in model.named_modules() if module is head for name in ("weight", "bias")}
    outside = [name for name in names if name in shared or not (name in unused or _is_inside(name, layers))]
    place(model, tensors, outside, device, dtype)
    place_shared(model, tensors)
    done = 0

    @contextmanager
    def around(layer: str) -> Iterator[None]:
        nonlocal done
        tell(done, len(layers))
        place(model, tensors, [name for name in names if name.startswith(f"{layer}.") and name not in shared], device, dtype)
        for path in stacks:
            if path.startswith(f"{layer}."):
                pack_experts(model, path, config.quant.for_layer(path))
        yield
        for name, _ in list(layers[layer].named_children()):
            setattr(layers[layer], name, nn.Identity())  # frees its tensors
        trim_heap()
        done += 1
        tell(done, len(layers))

    walk(model, rows_BT, [path for paths in inside.values() for path in paths], partial(visit, model), around)


def _is_inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _by_gptq(weight: Tensor, moments: Moments, nearest: PackedWeight, path: str) -> PackedWeight:
    try:
        return round_again(weight, moments, nearest)
    except QuantizationError as error:
        raise QuantizationError(f"'{path}' cannot be packed by GPTQ: {error}") from None


def _error(weight: Tensor, packed: PackedWeight, moments: Moments) -> float:
    """Mean squared error of the layer's output over the calibration rows, relative to its mean square."""
    off = weight - packed.dequantize(torch.float32)
    return float(((off @ moments.matrix) * off).sum() / ((weight @ moments.matrix) * weight).sum().clamp(min=1e-30))


def _check_state(folder: Path, config: QuantizeConfig, weights: Weights, rows_BT: Tensor) -> None:
    """Keep finished layers of the same run only."""
    tokens = hashlib.sha256(rows_BT.numpy().tobytes()).hexdigest()
    facts = {
        "base": weights.checkpoint.digest(), "quant": config.quant.to_dict(), "format": weights.writer.name,
        "rows": [list(rows_BT.shape), tokens],
    }  # fmt: skip
    state = json.dumps(facts, sort_keys=True)
    file = folder / _STATE
    if not file.is_file() or file.read_text() != state:
        for old in folder.glob("*.safetensors"):
            old.unlink()
        file.write_text(state)


def _file(folder: Path, path: str) -> Path:
    return folder / f"{path}.safetensors"


def _write(folder: Path, path: str, packed: PackedWeight) -> None:
    tensors = {key: tensor.cpu() for key, tensor in packed_files.pack(path, packed).items()}
    entries = {key: tensorfile.Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_whole(_file(folder, path), entries, ((key, 0, tensor.contiguous()) for key, tensor in tensors.items()))


def _kept(folder: Path, path: str, quant: QuantConfig) -> PackedWeight | None:
    """The packed weight in a layer's file of an earlier run; None if there is none, or it is damaged, which is then removed."""
    try:
        return _read(folder, path, quant)
    except KeyError:
        return None
    except (SafetensorError, ModelError):
        _file(folder, path).unlink()
        return None


def _read(folder: Path, path: str, quant: QuantConfig) -> PackedWeight:
    """The packed weight in a layer's file. Raises KeyError if there is none."""
    file = _file(folder, path)
    if not file.exists():
        raise KeyError(path)
    return packed_files.unpack(load_file(file), path, quant.for_layer(path).quant_type, torch.float32, f"'{file}'")
