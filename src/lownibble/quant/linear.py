"""QuantLinear: a frozen linear layer with a packed weight of any codec.

The packed tensors are `nn.Parameter(requires_grad=False)` under the codec's names, so `state_dict`, `.to()`, safetensors and
sharding treat them like any other weight. Casting the module (`.half()`, `.to(bfloat16)`) must not touch float32 constants,
so `_apply` is narrowed to moves between devices.

Matmuls are exact (`PackedWeight.matmul`) or in 8 bits (`eightbit.py`); the dequantised weight is not kept. Only the packed
tensors are saved for backward, with `save_for_backward`, which sharding, offloading and checks of in-place changes rely on. With
few rows and no gradient (token-by-token generation) a fused matrix-vector kernel reads the codes directly, if the codec has one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from lownibble.config import QuantConfig
from lownibble.kernels import ops
from lownibble.kernels.types import NO_EPILOGUE, Rows8bit
from lownibble.quant import eightbit
from lownibble.quant.codecs import quantize
from lownibble.quant.packed import PackedWeight, from_spec, restore, to_spec

MATVEC_MAX_ROWS = 4
"""Up to this many rows the fused kernel beats dequantise-then-multiply (AVX-512, 2 threads; see `lownibble bench kernels`)."""


def _conv1d() -> type | None:
    """transformers' Conv1D (GPT-2's linear layer, its weight stored as (in, out)), if transformers has been imported."""
    found: type | None = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in, out)."""
    kind = _conv1d()
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that may be packed or adapted: `nn.Linear` in what it computes, or Conv1D."""
    return is_plain_linear(module) or is_transposed(module)


def matrix(linear: nn.Module) -> Tensor:
    """The dense weight of a linear layer as (out, in)."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.t() if is_transposed(linear) else weight


def matrix_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; computes nothing, also where its weight is on the meta device and tensors have no values."""
    one, other = linear.weight.shape  # type: ignore[union-attr, misc]
    return (other, one) if is_transposed(linear) else (one, other)


@cache
def _computes_linear(kind: Any) -> bool:
    """Whether a subclass with a forward of its own computes x W^T + bias all the same (Falcon's), found by trying: routers and
    their like do something else, or need more than a weight and a bias."""
    with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):  # what is found is kept for all that follows
        numbers = torch.linspace(-1, 1, 20, dtype=torch.float32)
        x, weight, bias = numbers.view(4, 5), numbers[:15].view(3, 5).square(), numbers[:3].exp()
        probe = kind.__new__(kind)
        nn.Module.__init__(probe)
        probe.in_features, probe.out_features = 5, 3
        probe.weight, probe.bias = nn.Parameter(weight), nn.Parameter(bias)
        try:
            y = kind.forward(probe, x)
            return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, weight, bias))
        except Exception:
            return False


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` does; a subclass with its own `forward` (a router) does not count."""
    if not isinstance(module, nn.Linear):
        return False
    kind: Any = type(module)
    return kind.forward is nn.Linear.forward or _computes_linear(kind)


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T for a frozen packed W; saves only the packed tensors. `rows`: x in 8 bits, or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, rows: Rows8bit | None) -> Tensor:
        tensors = weight.tensors()
        ctx.save_for_backward(*tensors.values())
        ctx.rest = weight.facts(), tuple(tensors), None if rows is None else rows.codes.dtype
        ctx.backend = ops.chosen()
        if rows is not None:
            return eightbit.forward(rows, weight, NO_EPILOGUE, x.dtype)
        return weight.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        facts, names, code_type = ctx.rest
        weight = restore(facts, dict(zip(names, ctx.saved_tensors, strict=True)))
        with ops.keeping(ctx.backend):
            if code_type is not None:
                return eightbit.backward(dy, weight, NO_EPILOGUE, code_type), None, None
            return weight.matmul(dy, transposed=True), None, None


@torch.library.custom_op("lownibble::frozen_matmul", mutates_args=())
def frozen_matmul(x_TK: Tensor, weight: list[Tensor], spec: str, out_features: int, rows: list[Tensor]) -> Tensor:
    """Custom operator for torch.compile, which cannot trace packed weights: (T, K) -> (T, N). `rows`: `eightbit.rows_of(x)`."""
    frozen = from_spec(spec, weight)
    rows_8bit = eightbit.of_tensors(rows, x_TK)
    return frozen.matmul(x_TK) if rows_8bit is None else eightbit.forward(rows_8bit, frozen, NO_EPILOGUE, x_TK.dtype)


@frozen_matmul.register_fake
def _(x_TK, weight, spec, out_features, rows):  # type: ignore[no-untyped-def]
    return x_TK.new_empty((x_TK.shape[0], out_features))  # `len` would make a number of a symbol, and a graph of each


@torch.library.custom_op("lownibble::frozen_matmul_backward", mutates_args=())
def _frozen_matmul_backward(
    dy_TN: Tensor, weight: list[Tensor], spec: str, in_features: int, code_type: torch.dtype | None
) -> Tensor:
    frozen = from_spec(spec, weight)
    if code_type is not None:
        return eightbit.backward(dy_TN, frozen, NO_EPILOGUE, code_type)
    return frozen.matmul(dy_TN, transposed=True)


@_frozen_matmul_backward.register_fake
def _(dy_TN, weight, spec, in_features, code_type):  # type: ignore[no-untyped-def]
    return dy_TN.new_empty((dy_TN.shape[0], in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, spec, _, rows = inputs
    ctx.save_for_backward(*weight)
    ctx.rest = spec, x_TK.shape[1], [tensor.dtype for tensor in rows]
    ctx.backend = ops.chosen()


def _differentiate(ctx: Any, dy_TN: Tensor) -> tuple[Any, ...]:
    weight, (spec, in_features, row_types) = list(ctx.saved_tensors), ctx.rest
    with ops.keeping(ctx.backend):
        dx = _frozen_matmul_backward(dy_TN, weight, spec, in_features, row_types[0] if row_types else None)
    return dx, [None] * len(weight), None, None, [None] * len(row_types)


frozen_matmul.register_autograd(_differentiate, setup_context=_save)


def frozen_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, code_type: torch.dtype | None) -> Tensor:
    """x (..., K) -> (..., N) with a packed weight (N, K) and a bias, in x's dtype; 8-bit matmuls if `code_type` is given.

    Few rows without gradient are exact.
    """
    N, K = weight.shape
    x_TK = x.reshape(-1, K)
    has_gradient = (torch.is_grad_enabled() and x.requires_grad) or unpack_dual(x).tangent is not None
    if not has_gradient and _is_few(x_TK, weight):
        y_TN = weight.matvec(x_TK)
    else:
        y_TN = _FrozenMatmul.apply(x_TK, weight, None if code_type is None else eightbit.shared_rows(x, code_type))
    return _with_bias(y_TN, bias).view(*x.shape[:-1], N)


def _is_few(x_TK: Tensor, weight: PackedWeight) -> bool:
    """Whether a kernel that reads the codes beats decoding the weight first. Some backends have one for more rows."""
    if len(x_TK) <= MATVEC_MAX_ROWS:
        return True
    takes_few = getattr(ops.current(x_TK.device), "takes_few", None)
    return takes_few is not None and takes_few(x_TK, weight.four_bit or weight.grouped)


def _with_bias(y_TN: Tensor, bias: Tensor | None) -> Tensor:
    return y_TN if bias is None else y_TN + bias.to(y_TN.dtype)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Use exact matmuls inside the block, for comparisons that 8-bit matmuls would disturb."""
    before = [(layer, layer.compute) for layer in model.modules() if isinstance(layer, QuantLinear)]
    for layer, _ in before:
        layer.compute = "exact"
    try:
        yield
    finally:
        for layer, compute in before:
            layer.compute = compute


def with_data(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """The parameter with this data; another one where torch cannot exchange them, as to and from the meta device."""
    if not torch._has_compatible_shallow_copy_type(parameter.data, data):
        return nn.Parameter(data, requires_grad=parameter.requires_grad)
    parameter.data = data
    return parameter


class QuantLinear(nn.Module):
    """`nn.Linear` with a frozen packed weight.

    Parameters (all without gradient): the codec's tensors by its own names, the codes first (for nf4 and fp4 `codes` and
    `absmax`, with double quantisation `nested_absmax` and `offset`), and `bias` (out_features,) when there is one. `compute`:
    'exact' (in the activations' dtype), 'int8' or 'fp8' (see `eightbit.py`; few rows without gradient are exact regardless).

    A state dict does not name its codec: that of an fp4 layer is loaded into one of nf4, and read as nf4. Files name theirs.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, *, compute: str = "exact") -> None:
        super().__init__()
        self.compute = compute
        self._view: tuple[tuple[int, ...], PackedWeight] | None = None
        self.out_features, self.in_features = weight.shape[-2:]
        tensors = weight.tensors()
        self.facts, self.names, self.spec = weight.facts(), tuple(tensors), to_spec(weight)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant: str | QuantConfig = "nf4", *, name: str = "weight") -> QuantLinear:
        """Quantise a dense linear layer; `name` is the weight's name in errors."""
        config = QuantConfig(quant_type=quant) if isinstance(quant, str) else quant
        weight = quantize(matrix(linear).contiguous(), config, name=name)
        return cls(weight, linear.bias, compute=eightbit.choose(config.compute, weight.device))

    @property
    def weight(self) -> PackedWeight:
        """The packed weight, (out_features, in_features); cached, and rebuilt when a parameter is replaced or moved."""
        held = self._parameters
        tensors = [held[name] for name in self.names]
        state = (*map(id, tensors), tensors[0].data_ptr())  # type: ignore[union-attr]
        if self._view is None or self._view[0] != state:
            self._view = (state, restore(self.facts, dict(zip(self.names, tensors, strict=True))))  # type: ignore[arg-type]
        return self._view[1]

    @property
    def flat(self) -> list[Tensor]:
        """The weight's tensors, for custom operators; with `spec` see `packed.from_spec`."""
        return [getattr(self, name) for name in self.names]

    @property
    def quant_type(self) -> str:
        """Name of the codec."""
        return str(self.facts["quant_type"])

    @property
    def block_size(self) -> int | str | None:
        """Weights per block; None if the codec has no blocks."""
        size: int | str | None = self.facts.get("block_size")
        return size

    @property
    def code_type(self) -> torch.dtype | None:
        """Code dtype of 8-bit matmuls; None if matmuls are exact."""
        return eightbit.CODE_TYPES.get(self.compute)

    @property
    def codec(self) -> str:
        """Type and block size, e.g. 'nf4/64'."""
        return f"{self.quant_type}/{self.facts.get('block_size', '')}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        """State without the cached packed weight: a copy rebuilds it, and files do not store it."""
        return {**self.__dict__, "_view": None}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), computed in x's dtype."""
        if not torch.compiler.is_compiling():
            return frozen_linear(x, self.weight, self.bias, self.code_type)
        rows = eightbit.rows_of(x, self.code_type)
        y_TN: Tensor = frozen_matmul(x.reshape(-1, self.in_features), self.flat, self.spec, self.out_features, rows)
        return _with_bias(y_TN, self.bias).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # Packed tensors keep their dtypes whatever the model is cast to; moves between devices pass through.
        for name, parameter in list(self.named_parameters(recurse=False)):
            moved = fn(parameter.data)
            as_it_is = name == "bias" or moved.dtype == parameter.dtype
            setattr(self, name, with_data(parameter, moved if as_it_is else parameter.data.to(moved.device)))
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        double = ", double_quant" if self.facts.get("double_quant") else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.codec}{double}"
            f"{'' if self.code_type is None else f', {self.compute} compute'}"
        )
