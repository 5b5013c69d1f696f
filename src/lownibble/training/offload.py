"""Gradient checkpoints in host memory: what backward keeps of each decoder layer, its input, leaves the device until it is
needed.

With checkpointing the inputs are the only activations whose number grows with the layers: 32 of 1.07 GB each for one row of
131,072 tokens of an 8B model. Each is copied to pinned host memory on a second stream while its layer runs, and copied back
while the layer after it is in backward, so the copies take no time as long as a layer's computation takes longer. The last
layer's input is used where it is.

The layer runs under `torch.utils.checkpoint`, inside `saved_tensors_hooks` that recognise its input among what the checkpoint
saves. The values are the same ones, so results are bit-identical to checkpointing on the device. transformers' own checkpointing
is off: it is inside the layer's forward or outside of it, by version. The layer's forward may be a compiled one.

The device's tensors are freed at defined places, not when a copy happens to end: an input is held until the next layer begins,
whose stream then waits for the copy; its caller holds it as long anyway. (With `Tensor.record_stream` a host that runs ahead of
the device would find no free memory and allocate more.) Buffers for copying back are allocated on the computing stream, so all
memory is in one pool.

Rejected: `torch.autograd.graph.save_on_cpu`, and transformers' `offload=True`, which uses it: both copies are on the computing
stream, which waits for them. Offloading what attention saves, too: it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lownibble.errors import ConfigError, TrainingError
from lownibble.models.forwards import Forward, replaced_forwards
from lownibble.models.info import decoder_layers

REMEDY = "Use --gradient-checkpointing true."


class PinnedMemoryError(TrainingError, MemoryError):
    """The host has not enough memory to pin; handled as the device's running out is."""


class Copies(Protocol):
    """Asynchronous copies between a device and the host. An event is what `wait` takes."""

    def store(self, x: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy `x` to the host: (the copy, its event)."""

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy `host` back: (the tensor on the device, its event)."""

    def wait(self, event: Any) -> None:
        """Let the device's later work wait for a copy."""


class PinnedCopies:
    """Copies to pinned host memory, on a stream of their own.

    Raises:
        ConfigError: there is no pinned memory here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            torch.empty(1, pin_memory=True)
        except RuntimeError as error:
            raise ConfigError(
                f"Checkpoints cannot be offloaded: pinned host memory cannot be had here ({_first_line(error)}). {REMEDY}"
            ) from error
        self.stream = torch.cuda.Stream(device)

    def store(self, x: Tensor) -> tuple[Tensor, Any]:
        """See `Copies`.

        Raises:
            PinnedMemoryError: there is not enough pinned memory.
        """
        try:
            host = torch.empty_like(x, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise PinnedMemoryError(
                f"{x.nbytes / 1e9:.2f} GB of pinned host memory, for the input of one decoder layer, could not be had "
                f"({_first_line(error)}). {REMEDY}"
            ) from error
        return host, self._copy(host, x)

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """See `Copies`."""
        x = torch.empty_like(host, device=self.device)
        return x, self._copy(x, host)

    def wait(self, event: Any) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, to: Tensor, of: Tensor) -> Any:
        """Queue a copy after what has been queued on the current stream: what is read has been written, what is overwritten has
        been read."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(of, non_blocking=True)
            return self.stream.record_event()


COPIES: dict[str, Callable[[torch.device], Copies]] = {"cuda": PinnedCopies}
"""Device type -> how it copies to the host. A CPU has no other memory."""


def obstacle(model: Any, device: torch.device) -> str:
    """Why a model's checkpoints cannot be offloaded from this device, or ""."""
    if device.type not in COPIES:
        return f"tensors on '{device.type}' are in the host's memory already"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder, whose output all layers of the decoder read"
    if not decoder_layers(model):
        return f"the decoder layers of {type(model).__name__} are not known"
    return ""


@dataclass
class _Input:
    """A layer's input: on the host, and on the device (None: not now). `event`: of the copy that began last."""

    number: int
    host: Tensor
    event: Any
    device: Tensor | None


class _Inputs:
    """The inputs of the layers of one forward pass, in the order of their calls."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._all: list[_Input] = []

    def store(self, x: Tensor) -> _Input:
        """Begin to copy an input to the host; the one before it leaves the device."""
        if self._all:
            self._take(self._all[-1])
        found = _Input(len(self._all), *self._copies.store(x), x)
        self._all.append(found)
        return found

    def load(self, wanted: _Input) -> Tensor:
        """The input on the device; begins to copy back the one before it."""
        self._fetch(wanted)
        x = self._take(wanted)
        if wanted.number:
            self._fetch(self._all[wanted.number - 1])
        return x

    def close(self) -> None:
        """Wait for copies of what is still on the device, after a pass that ended early: its memory is free for others now."""
        for held in self._all:
            if held.device is not None:
                self._take(held)

    def _fetch(self, wanted: _Input) -> None:
        if wanted.device is None:
            wanted.device, wanted.event = self._copies.fetch(wanted.host)

    def _take(self, held: _Input) -> Tensor:
        """The tensor on the device, after its copy; it is no longer held here."""
        self._copies.wait(held.event)
        x, held.device = held.device, None
        assert x is not None
        return x


class Offloaded:
    """The model's decoder layers, checkpointed with their inputs on the host; calling it gives a context manager for the forward
    and backward pass of one microbatch. `copies`: instead of the device's own, for a step that is only traced.

    Raises:
        ConfigError: this cannot be done for this model or on this device.
    """

    def __init__(self, model: Any, device: torch.device, copies: Copies | None = None) -> None:
        why = obstacle(model, device)
        if why:
            raise ConfigError(f"Checkpoints cannot be offloaded: {why}. {REMEDY}")
        self.layers = list(decoder_layers(model).values())
        self.copies = copies or COPIES[device.type](device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the layers are checkpointed."""
        inputs = _Inputs(self.copies)
        try:
            with replaced_forwards((layer, partial(_checkpointed, layer.forward, inputs)) for layer in self.layers):
                yield
        finally:
            inputs.close()


def _checkpointed(forward: Forward, inputs: _Inputs, *args: Any, **kwargs: Any) -> Any:
    """`forward` under a checkpoint whose first argument, the hidden states, is kept in `inputs`."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if not args or not isinstance(args[0], Tensor):
        raise ConfigError(
            f"Checkpoints cannot be offloaded: a decoder layer is not called with its hidden states first. {REMEDY}"
        )
    place = _place(args[0])

    def pack(saved: Tensor) -> Tensor | _Input:
        saved = saved.detach()  # an output saved with its own graph would be a cycle
        return inputs.store(saved) if _place(saved) == place else saved

    def unpack(kept: Tensor | _Input) -> Tensor:
        return inputs.load(kept) if isinstance(kept, _Input) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _place(x: Tensor) -> tuple[int, int, torch.Size]:
    return int(x.untyped_storage()._cdata), int(x.storage_offset()), x.shape


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
