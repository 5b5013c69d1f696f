"""Streaming model loader that quantises one tensor at a time.

The skeleton is built by transformers on the meta device; then one tensor at a time is read from safetensors, placed or
quantised, and dropped, so the memory peak is the final size plus the current tensor and its working copy. The checkpoint must
match exactly: a missing, extra or misshapen tensor is an error, where transformers would warn and use random weights.

Rejected: `from_pretrained` with a quantizer plug-in as the only path (it keeps several tensors in flight and tolerates
missing ones); the plug-in exists besides this loader, for users of transformers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoTokenizer

from lownibble import stored
from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.matching import is_part
from lownibble.models import compute, experts
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors, dtype_of, untie
from lownibble.models.dense_origin import DenseOrigin, read_dense, transposed_layers
from lownibble.models.direct import left_dense
from lownibble.models.info import decoder_layers, info
from lownibble.models.skeleton import empty_model, reason, skeleton
from lownibble.models.sources import ModelSource, resolve
from lownibble.quant import PackedWeight, QuantLinear, eightbit, is_linear, is_transposed, layouts, matrix_shape, quantize
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.experts import QuantExperts
from lownibble.quant.packed import PackedExperts
from lownibble.registry import CODECS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of the option `dtype` -> torch dtype."""


def pick_device(device: str = "auto") -> torch.device:
    """Resolve a device name; auto: CUDA if available, else the CPU.

    Raises:
        ModelError: the device does not exist or is not supported.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"There is no device '{device}'. Give auto, cpu, cuda or cuda:N.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"Device '{device}' is not supported. Give auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"Device '{device}' was asked for, but torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve a dtype name; auto: bfloat16 on CUDA, float32 on a CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def load(
    model: str = "demo", *, quant: str | QuantConfig | None = None, dtype: str | torch.dtype = "auto", device: str = "auto",
    revision: str | None = None, by_layer: ByLayer | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a language model (causal, or encoder-decoder) and its tokenizer, its linear weights dense or quantised.

    Args:
        model: 'demo', a folder in Hugging Face layout (one or many safetensors shards; also quantised ones, see
            `models/formats`), a .gguf file, or a hub id.
        quant: None for dense, the name of a codec ('nf4', 'int8', ...), or a `QuantConfig`. Layers of a quantised checkpoint
            keep their numbers if a codec holds them.
        dtype: of everything that is not quantised, and of the activations.
        device: where the model goes.
        revision: of a hub id.
        by_layer: takes the model while its weights come in, to shard it.
    Returns:
        (model, tokenizer): transformers' own classes; the model is in eval mode, and only its packed layers have
        `requires_grad=False`.
    Raises:
        ModelError: the model is missing, damaged or not supported, or has values beyond float16's where that is asked for; says
            which file or tensor.
        QuantizationError: a weight holds NaN or infinite values; names it.
    """
    config = QuantConfig(quant_type=quant) if isinstance(quant, str) else quant
    source = resolve(model, revision)
    target_device = pick_device(device)
    target_dtype = pick_dtype(dtype, target_device)
    empty = skeleton(source, target_dtype)
    tensors = ModelTensors(empty, Checkpoint(source))
    turned, size = transposed_layers(empty), sum(parameter.numel() for parameter in empty.parameters())
    read: Callable[[str], Tensor] | None = None
    if config is not None and not tensors.packed:
        read = partial(read_dense, tensors, turned)
    elif origin := stored.read_json(source.folder / "config.json").get(stored.ORIGIN):
        read = DenseOrigin(origin, source.name)
    _fill(empty, tensors, config, target_device, target_dtype, read, by_layer)
    _tell_dense_experts(empty, tensors)
    compute.decide(empty)
    empty.config._name_or_path = source.name
    info(empty).base = {"model": source.name, "revision": revision, "digest": tensors.checkpoint.digest()}
    if stored_as := tensors.stored_as or (f"GGUF {source.gguf_type}" if source.gguf_type else ""):
        info(empty).base["stored_as"] = stored_as
    if stored_as or tensors.decoded:
        _tell(tensors, stored_as or stored.method(tensors.checkpoint.stored), config, target_dtype, size)
    if by_layer:
        by_layer.finish(empty)
    return empty.eval(), load_tokenizer(source)


def _tell(tensors: ModelTensors, stored_as: str, config: QuantConfig | None, dtype: torch.dtype, size: int) -> None:
    """Warn of what became of the weights of another tool's checkpoint, where it is not what was asked for; `size`: weights of the
    model."""
    said, name = [], str(dtype).removeprefix("torch.")
    again = f"packed again as {config.quant_type}" if config is not None else f"held in {name}; quantise them to save memory"
    if stored_as.startswith("GGUF") and not stored_as.endswith((" F32", " F16", " BF16", " file")):
        said.append(f"its weights were decoded to bfloat16 and {again}")
    kinds = " and ".join(sorted(set(tensors.packed.values())))
    if tensors.packed and config is not None and kinds != config.quant_type:
        said.append(f"its layers are kept as they are stored (as {kinds}), not packed as {config.quant_type}")
    linears = [key for key in tensors.decoded if key.endswith(".weight") and len(tensors.facts(key)[1]) == 2]
    dense = dict(tensors.model.named_parameters())
    others = [key for key in tensors.decoded.difference(linears) if key in dense]
    n_packed = len(tensors.decoded) - len(linears) - len(others)
    if linears:
        said.append(f"no codec here holds these numbers, so {len(linears)} weights were decoded and {again}")
    if n_packed:
        said.append(f"{n_packed} weights of experts were decoded and {again}")
    if others:
        share = sum(dense[key].numel() for key in others) / size
        said.append(
            f"{len(others)} tensors (fused experts and the like; {share:.0%} of the model) were decoded and are held in {name}"
        )
    if said:
        warnings.warn(f"'{tensors.checkpoint.name}' is stored as {stored_as}: {'; '.join(said)}.", stacklevel=3)


def _tell_dense_experts(model: Any, tensors: ModelTensors) -> None:
    """Warn of experts that are stored dense beside packed layers, unless config.json names them."""
    shapes, how = experts.shapes(model), tensors.checkpoint.stored
    held = [path for path, weight in experts.expert_weights(model).items() if isinstance(weight, nn.Parameter)]
    dense = [path for path in held if tensors.packed and path not in tensors.decoded and stored.is_quantised(how, path)]
    if dense:
        share = sum(math.prod(shapes[path]) for path in dense) / tensors.n_weights
        warnings.warn(
            f"'{tensors.checkpoint.name}' has its linear layers packed and the weights of experts dense ({dense[0]}, ...: "
            f"{share:.0%} of the model). Pack the dense model, with lownibble quantize or while loading, to save memory.",
            stacklevel=3,
        )


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model folder; a missing pad token becomes the end-of-sequence token (masked by position, not by id)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"'{source.name}' has no usable tokenizer: {reason(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def uninitialised(config: Mapping[str, Any], quant: QuantConfig | None, dtype: torch.dtype) -> Any:
    """The model of a config.json as `load` returns it, on the CPU, with uninitialised tensors; for tracing on fake tensors.

    Raises:
        ModelError: transformers does not support it.
    """
    with unset_fake_temporarily():  # torch 2.11 cannot move fake parameters to the meta device
        model = empty_model(config, dtype)
    to_quantize, device = quantizable(model, quant) if quant is not None else {}, torch.device("cpu")
    for key, parameter in list(model.named_parameters()):
        path, _, last = key.rpartition(".")
        tensor = torch.empty(parameter.shape, dtype=dtype)
        if key in to_quantize:
            how, rows = to_quantize[key], _as_rows(model, key, tensor)
            one = CODECS[how.quant_type].quantize(rows[0].contiguous(), how).with_dtype(dtype)
            _place_experts(model, key, PackedExperts.uninitialised(one, len(rows)), device)
        elif path in to_quantize and last == "weight":
            how = to_quantize[path]
            tensor = tensor.t().contiguous() if is_transposed(model.get_submodule(path)) else tensor
            _place_quantized(model, path, CODECS[how.quant_type].quantize(tensor, how).with_dtype(dtype), device)
        else:
            _set_tensor(model, key, tensor)
    with unset_fake_temporarily():  # of tied tensors one is on the meta device still
        model.tie_weights()
    for key, buffer in list(model.named_buffers()):
        _set_tensor(model, key, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def pack(model: nn.Module, quant: QuantConfig) -> None:
    """Pack the dense weights of a model where they are, those that `load` would.

    Raises:
        ConfigError, QuantizationError, ModelError: as `quantizable`.
    """
    stacks = experts.shapes(model)
    for path, how in quantizable(model, quant).items():
        if path in stacks:
            pack_experts(model, path, how)
        else:
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, QuantLinear.from_linear(linear, how, name=path))


def tied_aliases(model: nn.Module) -> set[str]:
    """Duplicate names of tied parameters."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def quantizable(model: nn.Module, config: QuantConfig) -> dict[str, QuantConfig]:
    """Path -> configuration of each layer that `config` packs: every plain `nn.Linear` that is neither skipped nor tied, nor read
    by the model's code outside of the layer, and the weights of experts.

    Warns:
        UserWarning: layers stay dense because the model's code reads their weights (named), or experts because nothing is known
            of how it computes with them.
    Raises:
        ConfigError: an entry of skip_modules or pattern matches nothing, or a codec does not support an option (layer named).
        QuantizationError: a codec does not support a layer's shape (layer named).
        ModelError: no layer is left to pack.
    """
    shared = tied_aliases(model)
    tied_parameters = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in shared}
    linears = {path: m for path, m in model.named_modules() if is_linear(m)}
    tied = [path for path, linear in linears.items() if id(linear.weight) in tied_parameters]
    may = (path for path in linears if path not in tied and not is_part(path, config.skip_modules))
    never = [*tied, *left_dense(model, may)]
    shapes: dict[str, Sequence[int]] = {path: matrix_shape(linear) for path, linear in linears.items()}
    shapes |= experts.shapes(model)
    experts.tell_unknown(model)
    found = layouts.choose(shapes, config, ["lm_head"], never)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear module to quantise (skip_modules: {', '.join(config.skip_modules)}; linear: "
            f"{_last_names(shapes) or 'none'}). Load it with quant=None."
        )
    return found


def repacked(model: nn.Module, packed: Iterable[str]) -> set[str]:
    """Those of the `packed` layers that a packed checkpoint holds packed: transformers reads some dense, as T5's wo."""
    dense = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return {path for path in packed if not is_part(path, dense)}


def _last_names(paths: Any) -> str:
    return ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))


class ByLayer(Protocol):
    """Takes a model while it is loaded, layer by layer."""

    def begin(self, model: Any) -> None:
        """Take up the model, before its weights are there."""

    def fill(self, model: Any, layers: Sequence[str], place: Callable[[str], None]) -> None:
        """Let `place` read the weights of each decoder layer, by its path, and with '' all others, in any order."""

    def finish(self, model: Any) -> None:
        """All weights are there."""


def _fill(
    model: Any, tensors: ModelTensors, config: QuantConfig | None, device: torch.device, dtype: torch.dtype,
    read: Callable[[str], Tensor] | None, by_layer: ByLayer | None,
) -> None:  # fmt: skip
    packed, name = tensors.packed, tensors.checkpoint.name
    if config is not None and packed:
        linears = [path for path, module in model.named_modules() if is_linear(module)]
        if why := stored.contradiction(config, packed, tensors.packed_options, linears):
            raise ModelError(f"'{name}': {why}. Its quantised layers stay as they are: leave quant options out.")
    known = info(model)
    if config is not None:
        known.asked_compute = config.compute
        eightbit.choose(config.compute, device)  # before a weight is read
    untie(model, tensors.untied)
    to_quantize = quantizable(model, config) if config is not None and not packed else {}
    held_in = dtype_of(model, dtype)
    stacks = experts.shapes(model)

    def place_key(key: str) -> None:
        tensor = tensors.read(key)
        path, _, last = key.rpartition(".")
        own = getattr(model.get_submodule(path), last)
        _check_shape(tensors, key, tensor, own)
        dense = held_in(key, own.dtype)
        _check_range(tensors, key, tensor, dtype if key in to_quantize or (path in to_quantize and last == "weight") else dense)
        if key in to_quantize:
            rows = _as_rows(model, key, packable(tensor)).to(device)
            _place_experts(model, key, quantize_experts(rows, to_quantize[key], name=key).with_dtype(dtype), device)
        elif path in to_quantize and last == "weight":
            rows = packable(tensor.t().contiguous() if is_transposed(model.get_submodule(path)) else tensor)
            quantized = quantize(rows.to(device), to_quantize[path], name=key).with_dtype(dtype)
            _place_quantized(model, path, quantized, device)
        else:
            known.stored_dtypes[key] = str(tensors.facts(key)[0]).removeprefix("torch.")
            _set_tensor(model, key, tensor.to(device=device, dtype=dense, copy=True))  # no file stays mapped

    known.read_dense = read
    if by_layer:
        by_layer.begin(model)
    layers = [*decoder_layers(model)] if by_layer else []
    packed_in, dense_in = _by_layer(sorted(packed), layers), _by_layer(tensors.dense(), layers)

    def place_all(layer: str) -> None:
        for path in packed_in.get(layer, ()):
            place_packed = _place_experts if path in stacks else _place_quantized
            place_packed(model, path, tensors.read_packed(path, dtype), device)
        for key in dense_in.get(layer, ()):
            place_key(key)
        if not layer:
            place_shared(model, tensors)
            for name, buffer in model.named_buffers():  # not in checkpoints: rotary frequencies and the like
                _set_tensor(model, name, buffer.to(device))

    if by_layer:
        by_layer.fill(model, layers, place_all)
    else:
        place_all("")


def _by_layer(names: Iterable[str], layers: Sequence[str]) -> dict[str, list[str]]:
    """The names below each decoder layer's path, and under '' all others."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(next((layer for layer in layers if name.startswith(f"{layer}.")), ""), []).append(name)
    return found


def place(model: Any, tensors: ModelTensors, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Read dense tensors into the model, and move its buffers to the device.

    Raises:
        ModelError: a tensor has another shape than the configuration says, or values beyond the dtype's.
    """
    held_in = dtype_of(model, dtype)
    for key in names:
        tensor = tensors.read(key)
        path, _, last = key.rpartition(".")
        own = getattr(model.get_submodule(path), last)
        _check_shape(tensors, key, tensor, own)
        wanted = held_in(key, own.dtype)
        _check_range(tensors, key, tensor, wanted)
        _set_tensor(model, key, tensor.to(device=device, dtype=wanted, copy=True))  # no file stays mapped
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:
            _set_tensor(model, name, buffer.to(device))


def place_shared(model: Any, tensors: ModelTensors) -> None:
    """Give names of tied parameters the tensor that they share."""
    for alias, source in tensors.shared.items():
        path, _, last = alias.rpartition(".")
        model.get_submodule(path).register_parameter(last, model.get_parameter(source))


def _check_shape(tensors: ModelTensors, key: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ModelError(
            f"'{tensors.checkpoint.name}': tensor '{key}' has shape {tuple(tensor.shape)}, the configuration says "
            f"{tuple(own.shape)}. The weights and config.json do not belong together."
        )


def _check_range(tensors: ModelTensors, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ModelError if values of a tensor become infinite in float16, whose range alone is smaller than others'."""
    if dtype != torch.float16 or tensor.dtype not in (torch.bfloat16, torch.float32, torch.float64) or not tensor.numel():
        return
    largest = max(map(abs, map(float, tensor.aminmax())))
    if math.isfinite(largest) and torch.tensor(largest, dtype=torch.float64, device="cpu").to(dtype).isinf():
        raise ModelError(
            f"'{tensors.checkpoint.name}': tensor '{key}' has a value of {largest:g}, and float16 ends at "
            f"{torch.finfo(dtype).max:g}. Take --dtype bfloat16 (dtype='bfloat16'), or float32."
        )


def packable(tensor: Tensor) -> Tensor:
    """A checkpoint's dense tensor in a type that codecs take: float64 and float8 in float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in DTYPES.values() else tensor


def _set_tensor(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, last = key.rpartition(".")
    module = model.get_submodule(path)
    if last in module._buffers:
        module._buffers[last] = tensor
    else:
        frozen = isinstance(module, QuantLinear)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and not frozen))


def _as_rows(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """The weights (E, out, in) of a container's parameter, which may hold them turned."""
    path, _, _ = key.rpartition(".")
    return tensor.transpose(1, 2) if model.get_submodule(path).is_transposed else tensor


def pack_experts(model: nn.Module, key: str, how: QuantConfig) -> None:
    """Pack the dense weights of experts that the parameter `key` of the model holds."""
    dense = model.get_parameter(key).detach()
    packed = quantize_experts(_as_rows(model, key, dense), how, name=key).with_dtype(dense.dtype)
    _place_experts(model, key, packed, dense.device)


def _place_experts(model: nn.Module, key: str, weight: PackedWeight, device: torch.device) -> None:
    path, _, name = key.rpartition(".")
    container: Any = model.get_submodule(path)
    if tuple(weight.shape) != experts.shape_of(container, name):
        raise ModelError(f"The packed weight of '{key}' has shape {tuple(weight.shape)}; config.json says otherwise.")
    experts.place(container, name, QuantExperts(weight).to(device))


def _place_quantized(model: nn.Module, path: str, weight: PackedWeight, device: torch.device) -> None:
    linear: Any = model.get_submodule(path)
    if weight.shape != matrix_shape(linear):
        raise ModelError(f"The packed weight of '{path}' has shape {tuple(weight.shape)}; config.json says otherwise.")
    parent, _, last = path.rpartition(".")
    layer = QuantLinear(weight).to(device)
    if linear.bias is not None:  # still on the meta device when its shard comes later
        layer.register_parameter("bias", linear.bias.requires_grad_(False))
    setattr(model.get_submodule(parent), last, layer)
