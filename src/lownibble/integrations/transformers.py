"""Lownibble's packed layers for transformers, PEFT and TRL: `NF4Config` replaces `BitsAndBytesConfig`.

    from lownibble.integrations.transformers import NF4Config
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=NF4Config())
    model = get_peft_model(model, LoraConfig(...))

It also accepts BitsAndBytesConfig's option names, so that existing code changes only one import. `PackedConfig` is an alias of
it, for other codecs: `PackedConfig(quant_type="int8", pattern={"down_proj": {"quant_type": "nf4"}})`.

Importing this module registers a quantizer with transformers, through its public extension point. The layer is an `nn.Linear`
whose `weight` is the packed codes, as in bitsandbytes, because PEFT looks for that; it computes as `QuantLinear` does. The codes
are one column, whatever the codec: those of 8 bits as a matrix are taken for the weight by methods that read it, silently. What
asks for the weight's values (PEFT's DoRA) finds `dequantize`, by HQQ's names. Saved
checkpoints hold the codec's own tensors (nf4, fp4: bitsandbytes' tensors and names), so there is one format of packed files, and
`lownibble.load` reads them; their `quant_method` is 'lownibble', so this module must be imported before transformers loads them.

PEFT's `prepare_model_for_kbit_training` enables gradient checkpointing only for libraries that it knows: with these layers call
`model.gradient_checkpointing_enable()` yourself.

Rejected: `is_loaded_in_4bit` on the model. transformers then imports bitsandbytes to count parameters, and TRL casts adapters to
bfloat16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError
from lownibble.models import experts
from lownibble.models import packed as packed_files
from lownibble.models.direct import left_dense
from lownibble.models.load import DTYPES
from lownibble.quant import PackedWeight, eightbit, is_linear, is_transposed, layouts, matrix_shape, quantize
from lownibble.quant.linear import frozen_linear, frozen_matmul, with_data
from lownibble.quant.packed import restore, to_spec
from lownibble.registry import CODECS

METHOD = packed_files.OWN_METHOD
_INITIALISED = "_is_hf_initialized"  # tells transformers not to initialise a module randomly


_ALIASES = {
    "bnb_4bit_quant_type": "quant_type", "bnb_4bit_use_double_quant": "double_quant", "bnb_4bit_compute_dtype": "compute_dtype",
    "llm_int8_skip_modules": "skip_modules",
}  # fmt: skip
"""BitsAndBytesConfig's option names -> ours."""

_FIXED = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_storage": (torch.uint8, "uint8"), "quant_method": METHOD}
"""Options of BitsAndBytesConfig that have a fixed value here."""


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How linear weights are packed: the options and defaults of `lownibble.QuantConfig`, or BitsAndBytesConfig's names for them.

    Args:
        compute: as QuantConfig's; 'auto' is exact here, since it is unknown whether the model is trained.
        compute_dtype: dtype of the matmuls; None: that of the activations.
        skip_modules: linear modules left unquantised; None: the output head and what is tied to it.
        pattern: other codecs by module name or regular expression, as QuantConfig's.
        options: the same options under BitsAndBytesConfig's names.
    Raises:
        ConfigError: an invalid value, or an unknown option.
    """

    def __init__(
        self, quant_type: str = "nf4", block_size: int | str = 64, double_quant: bool = True, compute: str = "auto",
        compute_dtype: str | torch.dtype | None = None, skip_modules: list[str] | None = None,
        pattern: dict[str, dict[str, Any]] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.quant_method = METHOD
        given: dict[str, Any] = {
            "quant_type": quant_type,
            "double_quant": double_quant,
            "compute_dtype": compute_dtype,
            "skip_modules": skip_modules,
        }
        given |= {_ALIASES[name]: value for name, value in options.items() if name in _ALIASES}
        for name, only in _FIXED.items():
            if name in options and options[name] not in (only if isinstance(only, tuple) else (only,)):
                raise ConfigError(f"The '{name}' of NF4Config cannot be {options[name]!r}. Leave it out.")
        unknown = {name: value for name, value in options.items() if name not in _ALIASES.keys() | _FIXED.keys()}
        self.compute_dtype = _dtype_name(given.pop("compute_dtype"))
        self.skip_modules = given.pop("skip_modules")
        checked = QuantConfig(block_size=block_size, compute=compute, pattern=pattern or {}, **given, **unknown)
        self.quant_type, self.block_size, self.double_quant = checked.quant_type, checked.block_size, checked.double_quant
        self.compute, self.pattern = checked.compute, checked.pattern

    @property
    def options(self) -> QuantConfig:
        """These options as a `QuantConfig`."""
        return QuantConfig(
            quant_type=self.quant_type, block_size=self.block_size, double_quant=self.double_quant, compute=self.compute,
            pattern=self.pattern,
        )  # fmt: skip


PackedConfig = NF4Config


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ConfigError(f"The 'compute_dtype' of NF4Config must be one of {', '.join(DTYPES)}. Got {dtype!r}.")
    return name


class NF4Linear(nn.Linear):
    """`nn.Linear` with a packed weight: `weight` holds the codes, `packed` also the quantisation constants.

    The constants are not buffers: transformers re-creates buffers that are not in the checkpoint after loading.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, config: NF4Config, path: str = "") -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.options, self.compute = config.options.for_layer(path), "exact"
        self.compute_dtype = None if config.compute_dtype is None else DTYPES[config.compute_dtype]
        codes = next(iter(layouts.layout((out_features, in_features), self.options).values()))
        empty = torch.empty((math.prod(codes.shape), 1), dtype=getattr(torch, codes.dtype), device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        self._packed: PackedWeight | None = None
        self._spec = ""
        self.transposed = False

    def hold(self, packed: PackedWeight) -> Tensor:
        """Set the packed weight; returns its codes (n, 1), to be assigned to `weight`."""
        self._packed, self.compute, self._spec = packed, eightbit.choose(self.options.compute, packed.device), to_spec(packed)
        if self.compute in eightbit.CODE_TYPES:
            eightbit.check_weight(packed, "a linear layer", self.compute)
        return _column(packed)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight.

        Raises:
            ConfigError: something has put other values into `weight`.
        """
        assert self._packed is not None, "the weights are not loaded yet"
        name, codes = next(iter(self._packed.tensors().items()))
        found = self.weight.data
        if codes.data_ptr() != found.data_ptr():  # moved or copied
            if found.dtype != codes.dtype or not torch.equal(found, _column(self._packed).to(found.device)):
                raise ConfigError(
                    "The codes of a packed layer were replaced, as by PEFT's merge, which needs a dense weight. Load the model "
                    "again, and merge the saved adapter with lownibble merge."
                )
            self._packed = restore(self._packed.facts(), {**self._packed.tensors(), name: found.view(codes.shape)})
        return self._packed

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - HQQ's
        """The codes by HQQ's name: layers that have it are asked to `dequantize` by PEFT, which else takes `weight` as it is."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight (out_features, in_features) that the layer computes with, float32."""
        return self.packed.dequantize(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        cast, code_type = x.to(self.compute_dtype or x.dtype), eightbit.CODE_TYPES.get(self.compute)
        if not torch.compiler.is_compiling():
            return frozen_linear(cast, self.packed, self.bias, code_type).to(x.dtype)
        assert self._packed is not None
        codes, *constants = self._packed.tensors().values()
        rows = eightbit.rows_of(cast, code_type)
        parts = [self.weight.view(codes.shape), *constants]
        y: Tensor = frozen_matmul(cast.reshape(-1, self.in_features), parts, self._spec, self.out_features, rows)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # Moves between devices pass through, casts affect only the bias: packed tensors keep their dtypes.
        if self._packed is None:
            super()._apply(fn, recurse)
            return self
        self._packed = self.packed.to(fn(self.packed.tensors()[next(iter(self.packed.tensors()))]).device)
        self.weight = with_data(self.weight, _column(self._packed))  # type: ignore[arg-type]
        if self.bias is not None:
            self.bias = with_data(self.bias, fn(self.bias.data))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            parts, codes = self._parts(prefix), f"{prefix}weight"
            own = destination[codes].view(parts[codes].shape)
            destination.update({**{key: tensor.clone() for key, tensor in parts.items() if key != codes}, codes: own})

    def _parts(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of the packed weight as checkpoints have them, under keys that begin with `prefix`."""
        path = _path(prefix)
        return {prefix + key.removeprefix(f"{path}."): part for key, part in packed_files.pack(path, self.packed).items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        parts = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}weight")}
        if len(parts) > 1:
            path = _path(prefix)
            stored = {f"{path}.{key.removeprefix(prefix)}": value for key, value in parts.items()}
            quant_type = packed_files.packed_modules(stored).get(path, "nf4")
            held = self.hold(packed_files.unpack(stored, path, quant_type, torch.float32, "the state"))
            self.weight.data = state_dict[f"{prefix}weight"] = held.to(self.weight.device)
            for key in parts.keys() - {f"{prefix}weight"}:
                del state_dict[key]
        elif parts and self._packed is not None:  # codes without the constants that belong to them
            missing_keys: list[str] = rest[2]
            missing_keys += sorted(self._parts(prefix).keys() - parts.keys())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.options.quant_type}"


def _path(prefix: str) -> str:
    """The path of a layer whose entries of a state begin with `prefix`; of one on its own, 'layer'."""
    return prefix.removesuffix(".") or "layer"


def _column(packed: PackedWeight) -> Tensor:
    """The codes (n, 1) of a packed weight."""
    return next(iter(packed.tensors().values())).view(-1, 1)


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Pack a dense weight while loading: returns its codes; the layer keeps the constants."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, Tensor]:
        assert model is not None
        found = {}
        for name, value in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, NF4Linear)
            tensor = value[0] if isinstance(value, list) else value
            rows = tensor.t().contiguous() if layer.transposed else tensor
            found[name] = layer.hold(quantize(rows, layer.options, name=name))
            setattr(layer, _INITIALISED, True)
        return found


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """Load the tensors of a packed layer: returns its codes; the layer keeps the constants."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str | None = None, **_: Any
    ) -> dict[str, Any]:
        if len(input_dict) == 1:  # a layer that is not packed
            return input_dict
        assert model is not None
        assert full_layer_name is not None
        path = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(path)
        assert isinstance(layer, NF4Linear)
        parts = {f"{path}.{key}": value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        quant_type = packed_files.packed_modules(parts)[path]
        codes = layer.hold(packed_files.unpack(parts, path, quant_type, torch.float32, "the checkpoint"))
        setattr(layer, _INITIALISED, True)
        return {"weight": codes}


def _keys(file: str) -> list[str]:
    with safe_open(file, "pt") as handle:
        found: list[str] = list(handle.keys())
    return found


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer that `from_pretrained` uses to load a model with an `NF4Config`."""

    requires_calibration = False
    quantization_config: NF4Config

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Names of the tensors in which a layer's `weight` is stored, for the codecs of the configuration."""
        config = self.quantization_config.options
        kinds = {config.quant_type, *(how.get("quant_type", config.quant_type) for how in config.pattern.values())}
        found: dict[str, None] = {}
        for kind in sorted(kinds):
            for double_quant in (True, False):
                how = QuantConfig(quant_type=kind, double_quant=double_quant)
                stored = CODECS[kind].written("LAYER", (4096, 4096), how)
                found |= dict.fromkeys(key.removeprefix("LAYER.") for key in stored)
        return {"weight": sorted(found, key=len, reverse=True)}  # the first that a key begins with counts

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Reject a device map that offloads part of the model to CPU or disk."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if len(places) > 1 and places & {"cpu", "disk"}:
            raise ConfigError("NF4Config cannot keep part of a model on the CPU or the disk. Give device_map one device.")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        config = self.quantization_config
        self._check_experts(model, checkpoint_files or [])
        skipped = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        chosen = [
            (path, module) for path, module in model.named_modules()
            if is_linear(module) and should_convert_module(path, skipped)
        ]  # fmt: skip
        direct = left_dense(model, [path for path, _ in chosen])
        chosen = [(path, linear) for path, linear in chosen if path not in direct]
        layouts.choose({path: matrix_shape(linear) for path, linear in chosen}, config.options.with_options(skip_modules=[]))
        for path, linear in chosen:
            n_out, n_in = matrix_shape(linear)
            layer = NF4Linear(n_in, n_out, linear.bias is not None, config, path)
            layer.transposed = is_transposed(linear)
            if not self.pre_quantized:  # before 5.23 transformers casts a dense weight to this dtype before it is packed
                layer.weight = nn.Parameter(layer.weight.to(linear.weight.dtype), requires_grad=False)
            model.set_submodule(path, layer.requires_grad_(False))
        return model

    def _check_experts(self, model: Any, files: list[str]) -> None:
        """Refuse packed experts of mixtures, which transformers has no place for; warn of those that stay dense.

        Raises:
            ConfigError: the checkpoint holds packed experts.
        """
        shapes = experts.shapes(model)
        if not shapes:
            return
        keys = {key for file in files for key in _keys(file)} if self.pre_quantized else set()
        if packed := sorted(shapes.keys() & packed_files.packed_modules(keys)):
            raise ConfigError(
                f"The checkpoint holds the experts of a mixture packed ({packed[0]}, ...), which transformers cannot load. "
                "Load it with lownibble.load."
            )
        share = sum(math.prod(shape) for shape in shapes.values()) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"The experts of {type(model).__name__} ({next(iter(shapes))}, ...: {share:.0%} of the model) stay dense: NF4Config "
            "packs linear layers. lownibble.load packs experts, too.",
            stacklevel=2,
        )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # The layers' state dict is already in checkpoint format: no reverse conversion when the model is saved.
        model._weight_conversions = [
            each for each in model._weight_conversions
            if not any(isinstance(op, _Deserialize) for op in getattr(each, "operations", ()))
        ]  # fmt: skip
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` does: dense layers with the values that the packed ones compute with, in `dtype`."""
        packed = [(path, module) for path, module in model.named_modules() if isinstance(module, NF4Linear)]
        for path, module in packed:
            weight, turned = module.dequantize().to(dtype or model.dtype), module.transposed
            sizes = (module.out_features, module.in_features) if turned else (module.in_features, module.out_features)
            with torch.device("meta"):
                dense: Any = Conv1D(*sizes) if turned else nn.Linear(*sizes)
            dense.weight = nn.Parameter(weight.t().contiguous() if turned else weight)
            dense.bias = None if module.bias is None else nn.Parameter(module.bias.data.to(weight.dtype))
            model.set_submodule(path, dense.train(module.training))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a tensor of the checkpoint is the weight of a packed layer."""
        path, name = param_name.rpartition(".")[::2]
        return name == "weight" and isinstance(model.get_submodule(path), NF4Linear)

    @property
    def quantized_element_size(self) -> float:
        """Bytes per byte of codes, including constants (transformers multiplies it by the number of code bytes)."""
        return 1.04

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs a dense weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The operations that load packed weights."""
        names = self.serialized_names.items() if self.pre_quantized else ()
        return [WeightConverter(stored, target, [_Deserialize(self)]) for target, stored in names]

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True
