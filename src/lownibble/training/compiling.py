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

PAYS_AFTER_FLOPS = {"cpu": 1e14, "cuda": 2e16}
"""Type of device -> operations of a run (6 x parameters x tokens) from which the time saved exceeds the time to compile. CPU: see
`benchmarks/results/train-cpu.json` (ten seconds, one part in ten of a step); CUDA: a guess, nothing was measured."""


def choose(option: bool | Literal["auto"], model: Any, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Whether to compile for a run over `tokens` tokens, and why.

    Raises:
        ConfigError: compilation was asked for and cannot run here; says what is missing.
    """
    if option is False:
        return False, "torch_compile is off"
    obstacle = _obstacle(model, device)
    if option is True:
        if obstacle:
            raise ConfigError(f"torch_compile=True cannot be done: {obstacle}. Use torch_compile=False (--torch-compile false).")
        return True, "torch_compile is on"
    if obstacle:
        return False, obstacle
    flops = 6 * count_parameters(model)[1] * tokens
    needed = PAYS_AFTER_FLOPS[device.type]
    pays = flops >= needed
    return pays, f"the run takes about {flops:.0e} operations; compiling pays from {needed:.0e}"


def _obstacle(model: Any, device: torch.device) -> str:
    if device.type not in PAYS_AFTER_FLOPS:
        return f"it is not tested on '{device.type}'"
    if not repeated_layers(model):
        return f"the decoder layers of {type(model).__name__} are not known"
    if device.type == "cpu":
        compiler = sysconfig.get_config_var("CXX") or "g++"
        names = (compiler.split()[0], "g++", "clang++")
        if not any(shutil.which(name) for name in names):
            return "there is no C++ compiler here (g++)"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "Python's headers are not installed (python3-dev)"
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
    files = sorted(file for room in ("kernels", "quant", "lora") for file in (folder / room).glob("*.py"))
    return "lownibble-" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@contextmanager
def _torchs_own_warnings_off() -> Iterator[None]:
    """The compiler's parts warn about each other (deprecated functions that they import); a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


class Compiled:
    """The model's decoder layers, compiled; a context manager for training steps. The first use compiles."""

    def __init__(self, model: Any) -> None:
        layers = repeated_layers(model)
        if not model.get_input_embeddings().weight.requires_grad:
            layers = layers[1:]
        attention.keep_out_of_graphs()
        torch.compiler.config.cache_key_tag = _operators()
        with _torchs_own_warnings_off():
            self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
                (layer, torch.compile(layer.forward, dynamic=True)) for layer in layers
            ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the layers are compiled.

        Raises:
            TrainingError: the layer cannot be compiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        for layer, forward in self.forwards:
            layer.forward = forward
        try:
            with _torchs_own_warnings_off():
                yield
        except TorchDynamoException as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"A decoder layer could not be compiled: {first_line} Use torch_compile=False (--torch-compile false)."
            ) from error
        finally:
            for layer, _ in self.forwards:
                del layer.forward
