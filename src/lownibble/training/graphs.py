"""CUDA graphs: forward and backward of a microbatch, captured once for each shape and replayed as one launch.

A compiled QLoRA step of 8B shapes launches more than 5,000 kernels, for each of which the host runs some Python. Beside an
H100 that is as long as the device works, or longer (`benchmarks/results/train-cuda-uncaptured.json` has both times).
Replaying takes the host out of it.

A graph repeats the same kernels on the same memory, so a pass is made to fit:

- Shapes: rows are padded by an eighth of their length at most, places of labels by a quarter of their number. The first pass of a
  shape runs without a graph, which compiles and loads its kernels; the second is captured.
- Inputs are copied into tensors of the graph. The number of label tokens, which divides the loss, is one of them.
- Gradients are added to buffers that all graphs share; they become the `grad` of the parameters.
- Memory: graphs share a pool as large as the largest pass. A pass without a graph (evaluation, a shape's first) finds its memory
  beside the pool; where that runs out, graphs are disabled for the rest of the run.

Passes that draw random numbers, read sizes of each batch (packed rows), move data to the host, or get masks that are made anew
cannot be captured; `obstacle` gives the reason. Where a model's own code cannot be captured, graphs are disabled with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lownibble.data import IGNORE, Batch
from lownibble.kernels.capture import Capture, CudaCapture
from lownibble.kernels.decoded import scratch_buffers
from lownibble.lora import LowRank
from lownibble.models.head import hidden_states
from lownibble.models.info import info
from lownibble.transfers import to_device

MOST = 64
"""Graphs at most; passes of further shapes run without."""
FINEST = 16
"""Tokens by which lengths of rows and counts of label places differ at least."""

Run = Callable[[Batch, Tensor, bool], Tensor]
"""(batch on the device, label tokens of the step () float32, whether to measure) -> loss (); adds to parameters' gradients."""


def obstacle(model: Any, device: torch.device, *, packed: bool, plain_loss: bool, draws: bool) -> str:
    """Why passes of a model cannot be captured, or ''.

    Args:
        packed: rows are packed. plain_loss: the loss is the next-token one, which takes its divisor as a tensor.
        draws: passes draw random numbers (`draws_random`).
    """
    if device.type != "cuda":
        return f"there are none on '{device.type}'"
    if packed:
        return "packed rows have other bounds in each pass"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder"
    if not plain_loss:
        return "the objective has a loss of its own"
    if info(model).autocast is not None or not any(isinstance(m, LowRank) for m in model.modules()):
        return "the model is trained in full"
    if info(model).merge_aware is not None:
        return "merge-aware layers pack their weight between steps"
    return "random numbers (dropout) are drawn in each pass" if draws else ""


@torch.no_grad()
def draws_random(model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> bool:
    """Whether a training pass draws random numbers (dropout, a router's noise), found out by one."""
    device, training = input_ids_BT.device, model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        before = _generators(device)
        model.train()
        try:
            hidden_states(model, input_ids_BT, attention_mask_BT)
        finally:
            model.train(training)
        return any(not torch.equal(a, b) for a, b in zip(before, _generators(device), strict=True))


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Inputs:
    """The tensors that a shape's passes read."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch, self.total = batch.to(device), torch.empty((), dtype=torch.float32, device=device)

    def set(self, batch: Batch, n_total: int) -> None:
        """Take a batch of the host, of the same shape."""
        for name in ("input_ids", "attention_mask", "labels"):
            into: Tensor = getattr(self.batch, name)
            into.copy_(to_device(getattr(batch, name), into.device))
        for own, given in zip(self.batch.label_places, batch.label_places, strict=True):
            own.copy_(to_device(given, own.device))
        self.total.fill_(n_total)


class _Graph(NamedTuple):
    replay: Callable[[], object]
    loss: Tensor
    trained: list[int]
    """Indices of the parameters that get a gradient."""
    held: list[Tensor]
    """Buffers shared with passes without a graph: not to be freed before the graph."""


class Graphs:
    """Runs microbatches, from the second of a shape on by replaying its graph.

    Args:
        run: the pass; with True, it is the one that is measured.
        parameters: those that are trained.
        limit: tokens beyond which no batch is padded, as far as it has fewer; called for each.
        capture: how passes are captured; default: into CUDA graphs.
    Attributes:
        obstacle: why there are no graphs any more, or ''.
    """

    def __init__(
        self, run: Run, parameters: Sequence[nn.Parameter], device: torch.device, limit: Callable[[], int],
        capture: Capture | None = None,
    ) -> None:  # fmt: skip
        self._run, self._parameters, self._device, self._limit = run, list(parameters), device, limit
        self._capture = capture or CudaCapture()
        self._inputs: dict[tuple[int, ...], _Inputs] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._buffers: list[Tensor] = []
        self.obstacle = ""

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, batch: Batch, n_total: int, measured: bool = False) -> Tensor:
        """Accumulate the gradients of a microbatch of the host; returns its loss, () float32, on the device.

        Args:
            measured: this pass is measured, so it runs without a graph.
        """
        grown = batch if self.obstacle else fitted(batch, self._limit())
        key = (*grown.input_ids.shape, len(grown.label_places[0]))
        first = key not in self._inputs
        if self.obstacle or (first and len(self._inputs) >= MOST):
            total = torch.full((), n_total, dtype=torch.float32, device=self._device)
            return self._run(batch.to(self._device), total, measured)
        if first:
            self._inputs[key] = _Inputs(grown, self._device)
        inputs = self._inputs[key]
        inputs.set(grown, n_total)
        if not (first or measured or key in self._graphs):
            self._add(key, inputs)
        if key in self._graphs and not measured:
            return self._replay(self._graphs[key])
        return self._run(inputs.batch, inputs.total, measured)

    def drop(self, reason: str) -> bool:
        """Go on without graphs and free their memory, if there are any; returns whether there were."""
        had = bool(self._graphs)
        if had:
            self._disable(reason)
        return had

    def _disable(self, reason: str) -> None:
        self.obstacle = reason
        self._graphs.clear()
        self._inputs.clear()
        self._buffers.clear()

    def _add(self, key: tuple[int, ...], inputs: _Inputs) -> None:
        trained: list[int] = []

        def run() -> Tensor:
            before = [parameter.grad for parameter in self._parameters]
            self._set_gradients([None] * len(before))
            try:
                loss = self._run(inputs.batch, inputs.total, False)
                found = {index: p.grad for index, p in enumerate(self._parameters) if p.grad is not None}
                torch._foreach_add_([self._buffers[index] for index in found], list(found.values()))
            finally:
                self._set_gradients(before)
            trained[:] = found
            return loss

        held = scratch_buffers()
        try:
            for parameter in self._parameters[len(self._buffers) :]:
                self._buffers.append(torch.zeros_like(parameter))
            replay, loss = self._capture(run)
        except Exception as error:
            # of the model's own code, or of torch; a pass without a graph shows what is wrong, if anything
            self._disable(f"capturing failed: {(str(error).splitlines() or [type(error).__name__])[0]}")
        else:
            self._graphs[key] = _Graph(replay, loss, trained, [*held, *scratch_buffers()])

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _replay(self, graph: _Graph) -> Tensor:
        empty: list[Tensor] = []
        for index in graph.trained:
            parameter, buffer = self._parameters[index], self._buffers[index]
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:  # of a pass without a graph
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        graph.replay()
        return graph.loss.clone()


def fitted(batch: Batch, limit: int) -> Batch:
    """A batch of the host, padded so that shapes repeat; its label places are padded with labels that are ignored.

    Args:
        limit: tokens that it may have; a batch that would have more is not padded.
    """
    B, T = batch.input_ids.shape
    extra = _next(T, 8) - T
    if extra and B * (T + extra) <= limit:
        last = batch.input_ids[:, -1:].expand(B, extra)
        batch = replace(
            batch, input_ids=torch.cat([batch.input_ids, last], 1),
            attention_mask=nn.functional.pad(batch.attention_mask, (0, extra)),
            labels=nn.functional.pad(batch.labels, (0, extra), value=IGNORE),
        )  # fmt: skip
    places, labels = batch.label_places
    padding = (0, min(batch.input_ids.numel(), _next(len(places), 4)) - len(places))
    batch = replace(batch)  # the caller's keeps its own
    batch.places = nn.functional.pad(places, padding), nn.functional.pad(labels, padding, value=IGNORE)
    batch.padded = True
    return batch


def _next(count: int, parts: int) -> int:
    """The next of the sizes that divide each doubling into `parts`, and differ by `FINEST` at least."""
    step = max(FINEST, (1 << max(0, count - 1).bit_length()) // (2 * parts))
    return max(1, -(-count // step)) * step


def decided(option: bool | Literal["auto"], not_compiled: str, budgeted: bool, found: str) -> str:
    """Why a run has no graphs, or '': with 'auto' it has them where layers are compiled and memory is not limited.

    Args:
        not_compiled: why layers are not compiled, or ''. found: the `obstacle`.
    """
    if option is False:
        return "cuda_graphs is off"
    if not found and option == "auto" and (not_compiled or budgeted):
        return f"layers are not compiled: {not_compiled}" if not_compiled else "the memory budget was fitted without"
    return found
