"""Regional compilation: torch.compile makes one decoder layer, and all layers of its kind run it.

What it brings: norms, rotary embedding and activation function are fused, and partly computed again in backward instead of being
saved. What it costs: some tens of seconds before the first step, and a C++ compiler on the machine. Whole models are not
compiled: it takes minutes, and the layers are all alike. Sizes are symbolic, so a batch of another length is no reason to
compile again. The first layer stays as it is where its input needs no gradient: it would be a graph of its own.

As with packing, the compiled layers are in place for a training step and taken back after it: evaluation, generation and the
caller see the model as it came.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lownibble
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora import count_parameters
from lownibble.models import attention

PAYS_AFTER_FLOPS = {"cpu": 1e14, "cuda": 5e15}
"""Type of device -> operations of a run (6 x parameters x tokens) from which the time saved exceeds the time to compile. CPU: by
`benchmarks/results/train-cpu.json` about ten to twenty seconds, for a tenth of each step. CUDA: ten seconds, for 22% of each step
(8B shapes on an H100, one measurement outside of this repository's records); 5e15 is between what that gives for an H100 and
for a card of a tenth of its speed, and a minute or less of either."""

IMPOSSIBLE = "not possible here: "
"""How the reason begins where `auto` would compile, and something is missing."""

GRAPHS = 64
"""Most graphs that torch keeps for the decoder layers of a process; past it a run ends instead of going on uncompiled."""


def choose(option: bool | Literal["auto"], model: Any, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Whether to compile for a run over `tokens` tokens, and why.

    Raises:
        ConfigError: compilation was asked for and cannot run here; says what is missing.
    """
    if option is False:
        return False, "torch_compile is off"
    if option == "auto":
        if device.type not in PAYS_AFTER_FLOPS:
            return False, f"it has not been measured on '{device.type}'; torch_compile=True tries it"
        flops, needed = 6 * count_parameters(model)[1] * tokens, PAYS_AFTER_FLOPS[device.type]
        reason = f"the run takes about {flops:.0e} operations; compiling pays from {needed:.0e}"
        if flops < needed:
            return False, reason
    obstacle = _obstacle(model, device)
    if obstacle and option is True:
        raise ConfigError(f"torch_compile=True cannot be done: {obstacle}. Use torch_compile=False (--torch-compile false).")
    if obstacle:
        return False, IMPOSSIBLE + obstacle
    return True, "torch_compile is on" if option is True else reason


def _obstacle(model: Any, device: torch.device) -> str:
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder, whose layers are of another form"
    if not repeated_layers(model):
        return f"the decoder layers of {type(model).__name__} are not known"
    if device.type == "cpu":
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "Python's headers are not installed (python3-dev)"
        with torchs_own_warnings_off():
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler
        try:
            found = shutil.which(get_cpp_compiler())
        except InvalidCxxCompiler:
            found = None
        if not found:
            return "torch finds no C++ compiler (g++, or what the environment variable CXX names)"
    return ""


def repeated_layers(model: Any) -> list[nn.Module]:
    """The decoder layers: what transformers names as the modules that are never split over devices."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@cache
def _operators() -> str:
    """A digest of the code behind the custom operators. torch keeps compiled graphs on disk and knows a graph by the names of its
    operators: without this, a graph compiled with an older version of Lownibble would be used with this one."""
    folder = Path(lownibble.__file__).parent
    files = sorted(file for room in ("kernels", "quant", "lora") for file in (folder / room).rglob("*.py"))
    return "lownibble-" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@contextmanager
def torchs_own_warnings_off() -> Iterator[None]:
    """For importing the compiler and compiling: its parts warn about each other, and a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


class Compiled:
    """The model's decoder layers, compiled; called, a context manager for training steps. The first use compiles."""

    def __init__(self, model: Any) -> None:
        layers = repeated_layers(model)
        if not model.get_input_embeddings().weight.requires_grad:
            layers = layers[1:]
        attention.keep_out_of_graphs()
        if _operators() not in torch.compiler.config.cache_key_tag:
            torch.compiler.config.cache_key_tag += _operators()
        with torchs_own_warnings_off():
            self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
                (layer, torch.compile(layer.forward, dynamic=True)) for layer in layers
            ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the layers are compiled.

        Raises:
            TrainingError: the layer cannot be compiled.
        """
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        before = [vars(layer).get("forward") for layer, _ in self.forwards]  # accelerate's hooks, for one
        for layer, forward in self.forwards:
            layer.forward = forward
        try:
            with config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True):
                yield
        except FailOnRecompileLimitHit as error:
            raise TrainingError(
                f"The decoder layers of this process came to more than {GRAPHS} graphs (ranks, kinds of layers and of batches "
                "each take one). Use torch_compile=False (--torch-compile false), or a process for each run."
            ) from error
        except TorchDynamoException as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"A decoder layer could not be compiled: {first_line} Use torch_compile=False (--torch-compile false)."
            ) from error
        finally:
            for (layer, _), own in zip(self.forwards, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own
