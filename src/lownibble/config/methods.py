"""Methods as a comparison and a study take them: one of `METHODS`, and parts that change it: 'qlora+nf3+gptq+qera'.

full, lora, qlora       the method itself
nf3, int4, ...          qlora: the codec of the base (quant_type)
gptq                    qlora: the base is packed by GPTQ over the training rows first, as `lownibble quantize` does
3.5bits                 qlora: layers get codecs of their own, so many bits a weight in the mean
exact                   qlora: the base's products are computed in the activations' dtype, not in 8 bits (compute)
merge-aware             qlora: trained for the packed merge
qera, pissa, ...        the adapter's start (init_lora_weights)
dora, rslora            the adapter's kind (use_dora, use_rslora)
lora-plus               B learns at 16 times A's rate (loraplus_lr_ratio)
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from lownibble.errors import ConfigError
from lownibble.options import Options
from lownibble.registry import CODECS, INITS

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)

Parallel = Literal["ddp", "fsdp"]
"""How several ranks train: each holds the whole model, or a part of every parameter."""
PARALLEL: tuple[Parallel, ...] = get_args(Parallel)

_BITS = re.compile(r"(\d+(?:\.\d+)?)bits")

_OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"quantize": {"rounding": "gptq"}},
    "exact": {"quant": {"compute": "exact"}},
    "merge-aware": {"merge_aware": True},
    "dora": {"lora": {"use_dora": True}},
    "rslora": {"lora": {"use_rslora": True}},
    "lora-plus": {"train": {"loraplus_lr_ratio": 16.0}},
}

_OF_THE_BASE = ("quant", "quantize", "merge_aware")
"""What only a method with a packed base has."""


class MethodSpec(Options):
    """A method and its options."""

    method: Method
    lora: dict[str, Any] = Field({}, description="options of [lora]")
    quant: dict[str, Any] = Field({}, description="options of [quant]")
    train: dict[str, Any] = Field({}, description="options of [train]")
    dtype: str = Field("auto", description="as in a run's configuration")
    merge_aware: bool = Field(False, description="as in a run's configuration")
    quantize: dict[str, Any] = Field(
        {}, description="the base is packed first, over the training rows, with these options of `lownibble quantize`: rounding, "
        "bits, format, calibration_tokens, max_length, seed",
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_what_is_set(self) -> MethodSpec:
        for group in ("lora", "quant"):
            if getattr(self, group) and (self.method == "full" or (self.method != "qlora" and group in _OF_THE_BASE)):
                what = f"cannot be used with method '{self.method}': it is for {_whose(group)}"
                raise ConfigError(f"The '{group}' of a method {what}. Leave it out.")
        return self


def method_named(text: str) -> MethodSpec:
    """The method that a name like 'qlora+int3+gptq' stands for.

    Raises:
        ConfigError: a part is unknown, given twice, or does not go with the method.
    """
    method, *parts = text.split("+")
    if method not in METHODS:
        raise ConfigError(f"The method '{text}' must begin with one of {', '.join(METHODS)}. {_near(method, METHODS)}")
    found: dict[str, Any] = {"method": method}
    for part in parts:
        for group, options in _part(part, text).items():
            if method == "full" or (method != "qlora" and group in _OF_THE_BASE):
                raise ConfigError(f"The '{part}' of the method '{text}' is for {_whose(group)}. Leave it out.")
            if not isinstance(options, dict):
                twice, found[group] = group in found, options
            else:
                twice = bool(found.get(group, {}).keys() & options.keys())
                found[group] = {**found.get(group, {}), **options}
            if twice:
                raise ConfigError(f"The '{part}' of the method '{text}' says again what another part does. Give one of them.")
    if "bits" in found.get("quantize", {}):
        found["quantize"].setdefault("rounding", "rtn")
    return MethodSpec(**found)


def _part(part: str, text: str) -> dict[str, Any]:
    if bits := _BITS.fullmatch(part):
        return {"quantize": {"bits": float(bits[1])}}
    if part in CODECS:
        return {"quant": {"quant_type": part}}
    if part in _OTHERS:
        return _OTHERS[part]
    if part in INITS:
        return {"lora": {"init_lora_weights": part}}
    raise ConfigError(
        f"The method '{text}' has an unknown part '{part}'. {_near(part, [*CODECS, *_OTHERS, *INITS])}Parts: a codec "
        f"({', '.join(CODECS)}), the adapter's start ({', '.join(INITS)}), {', '.join(_OTHERS)}, or bits as in '3.5bits'."
    )


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"Did you mean '{near[0]}'? " if near else ""


def _whose(group: str) -> str:
    return "qlora" if group in _OF_THE_BASE else "lora and qlora"


def _name_means_method(value: Any) -> Any:
    return method_named(value) if isinstance(value, str) else value


NamedMethod = Annotated[MethodSpec, BeforeValidator(_name_means_method, json_schema_input_type=MethodSpec | str)]
"""A method with its options, or its name alone."""
