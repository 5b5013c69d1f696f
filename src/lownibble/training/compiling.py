"""Regional compilation: torch.compile compiles one decoder layer, and all layers of its kind share the graph.

Benefit: norms, rotary embedding and activation function are fused, and partly recomputed in backward instead of saved. Cost: some
tens of seconds before the first step, and a C++ compiler on the machine. Whole models are not compiled: that takes minutes, and
the layers are all alike. Shapes are dynamic, so a new batch length does not recompile. The first layer is not compiled if its
input needs no gradient, which would take a separate graph.

What a layer saves for backward is chosen by torch's partitioner, which by default saves every tensor that a matmul of backward
reads: outputs of norms and of the activation function too, although they follow elementwise from tensors that are saved anyway.
On CUDA those are computed again (`RECOMPUTED`): at 8B shapes and 4 x 1024 tokens 184 of 569 MB a layer, for writing and reading
them once more in backward. On a CPU bandwidth is what a step is short of, and memory less so.

As with packing, the compiled forwards are installed for a training step and removed after it: evaluation, generation and the
caller see the original model.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lownibble
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora import count_parameters
from lownibble.models import attention, experts
from lownibble.models.forwards import Forward, replaced_forwards
from lownibble.models.info import decoder_layers, info, pass_device
from lownibble.planning.memory import PAYS_AFTER_FLOPS

RECOMPUTED = {"ban_recompute_materialized_backward": False}
"""Options of `torch._functorch.config`: elementwise results that a matmul of backward reads are computed again, not saved."""

IMPOSSIBLE = "not possible here: "
"""Prefix of the reason if `auto` would compile but a requirement is missing."""

GRAPHS = 64
"""Recompile limit for the decoder layers of a process; exceeding it ends the run instead of falling back to eager."""


def choose(option: bool | Literal["auto"], model: Any, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Decide whether to compile for a run over `tokens` tokens, and why.

    Raises:
        ConfigError: compilation was requested but is not possible here (says what is missing).
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
    obstacle = obstacle_to(model, device)
    if obstacle and option is True:
        raise ConfigError(f"torch_compile=True cannot be done: {obstacle}. Use torch_compile=False (--torch-compile false).")
    if obstacle:
        return False, IMPOSSIBLE + obstacle
    return True, "torch_compile is on" if option is True else reason


def obstacle_to(model: Any, device: torch.device) -> str:
    """Why a model's decoder layers cannot be compiled on a device, or ''."""
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder, whose layers are of another form"
    if info(model).merge_aware is not None:
        return "merge-aware layers pack their weight between steps, out of a graph's sight"
    if experts.goes_by_expert(model):
        return (
            "packed or adapted experts have a pass of their own, at whose products a compiled graph would end, which does not pay"
        )
    if not decoder_layers(model):
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


@cache
def _operators() -> str:
    """A digest of the custom operators' source. torch caches compiled graphs on disk keyed by operator names: without this, a
    graph compiled with another version of Lownibble could be reused."""
    folder = Path(lownibble.__file__).parent
    files = sorted(file for room in ("kernels", "quant", "lora", "models") for file in (folder / room).rglob("*.py"))
    return "lownibble-" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@contextmanager
def torchs_own_warnings_off() -> Iterator[None]:
    """Suppress torch's internal warnings while importing the compiler and compiling; users cannot act on them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


class Compiled:
    """The model's compiled decoder layers; calling it gives a context manager for training steps. Compiles on first use.

    Args:
        recompute: save less for backward, and compute it again; default: on CUDA.
        join: join the low-rank products of layers that read the same input (`lora/joined.py`); default: on CUDA.
        backend: of torch.compile; another than 'inductor' joins them itself.
    """

    def __init__(
        self, model: Any, *, recompute: bool | None = None, join: bool | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:  # fmt: skip
        layers = list(decoder_layers(model).values())
        on_cuda = pass_device(model).type == "cuda"
        self._saving = RECOMPUTED if (on_cuda if recompute is None else recompute) else {}
        self._join = on_cuda if join is None else join
        if not model.get_input_embeddings().weight.requires_grad:
            layers = layers[1:]
        attention.keep_out_of_graphs()
        if _operators() not in torch.compiler.config.cache_key_tag:
            torch.compiler.config.cache_key_tag += _operators()
        with torchs_own_warnings_off():
            self.forwards: list[tuple[nn.Module, Forward]] = [
                (layer, torch.compile(layer.forward, dynamic=True, backend=backend)) for layer in layers
            ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the layers run their compiled forward.

        Raises:
            TrainingError: a layer cannot be compiled, or there are more than `GRAPHS` graphs.
        """
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._functorch import config as partitioner

        try:
            limit = config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
            with replaced_forwards(self.forwards), limit, partitioner.patch(self._saving), self._joining():
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

    def _joining(self) -> AbstractContextManager[Any]:
        if not self._join:
            return nullcontext()
        with torchs_own_warnings_off():
            from torch._inductor import config

            from lownibble.lora.joined import JoinLowRank
        patched: AbstractContextManager[Any] = config.patch(joint_custom_pre_pass=JoinLowRank())
        return patched
