"""CUDA graphs: forward and backward of a microbatch, captured once for each shape and replayed as one launch.

A compiled QLoRA step of 8B shapes launches more than 5,000 kernels, for each of which the host takes 20 to 80 microseconds of
Python. Beside an H100 that is as long as the device works, or longer (`benchmarks/results/train-cuda.json` has both times).
Replaying takes the host out of it.

A graph repeats the same kernels on the same memory, so a pass is made to fit:

- Shapes: rows are padded to a multiple of a sixteenth of the longest row, places of labels to a multiple of a quarter of the
  tokens. The first pass of a shape runs without a graph, which compiles and loads its kernels; the second is captured.
- Inputs are copied into tensors of the graph. The number of label tokens, which divides the loss, is one of them.
- Gradients are added to buffers that all graphs share; they become the `grad` of the parameters.
- Memory: graphs share a pool as large as the largest pass. A pass without a graph (evaluation, a shape's first) finds its memory
  beside the pool; where that runs out, graphs are given up (`drop`) and the run goes on without.

Passes that draw random numbers with seeds of the host, read sizes of each batch (packed rows) or move data to the host cannot be
captured: `obstacle`. If a model's own code cannot, capturing fails, the reason is kept, and the run goes on without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lownibble.data import IGNORE, Batch
from lownibble.kernels.decoded import scratch_buffers
from lownibble.lora import LowRank
from lownibble.models.info import info
from lownibble.transfers import to_device

MOST = 64
"""Graphs at most; passes of further shapes run without."""
LENGTHS, PLACES = 16, 4
"""Lengths of rows, and counts of label places, that are told apart: a longer row is padded to the next."""

Run = Callable[[Batch, Tensor], Tensor]
"""(batch on the device, label tokens of the step () float32) -> loss (); adds to the parameters' gradients."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Captures a pass: -> a function that replays it, and the tensor that its loss is in afterwards."""


def obstacle(model: Any, device: torch.device, *, packed: bool, plain_loss: bool) -> str:
    """Why passes of a model cannot be captured, or ''.

    Args:
        packed: rows are packed. plain_loss: the loss is the next-token one, which takes its divisor as a tensor.
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
    return "dropout draws other numbers in each pass" if draws_random(model) else ""


def draws_random(model: Any) -> bool:
    """Whether a training pass draws random numbers (dropout)."""
    modules = list(model.modules())
    if any((isinstance(m, nn.Dropout) and m.p > 0) or (isinstance(m, LowRank) and m.dropout > 0) for m in modules):
        return True
    config = model.config.get_text_config().to_dict()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in config.items())


class CudaCapture:
    """Captures passes into CUDA graphs of one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture `run`, which is not executed, from the current stream; not the default one."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device.index]
        before = generator.get_state()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                loss = run()
        except BaseException:  # where capturing fails, torch leaves its stream set, and the generator believing that it goes on
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(stream.device)
            fresh.set_state(before)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        return graph.replay, loss


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
        run: the pass. parameters: those that are trained. longest: tokens of the longest row of the run.
        grow: rows can be padded freely (the model needs no attention mask).
        capture: how passes are captured; default: into CUDA graphs.
    Attributes:
        obstacle: why there are no graphs any more, or ''.
    """

    def __init__(
        self, run: Run, parameters: Sequence[nn.Parameter], device: torch.device, longest: int, *, grow: bool,
        capture: Capture | None = None,
    ) -> None:  # fmt: skip
        self._run, self._parameters, self._device, self._longest, self._grow = run, list(parameters), device, longest, grow
        self._capture = capture or CudaCapture()
        self._inputs: dict[tuple[int, ...], _Inputs] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._buffers: list[Tensor] = []
        self.obstacle = ""

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, batch: Batch, n_total: int) -> Tensor:
        """Accumulate the gradients of a microbatch, on the host or the device; returns its loss, () float32, on the device."""
        if not self.obstacle:
            batch = fitted(batch, self._longest, grow=self._grow)
        key = (*batch.input_ids.shape, len(batch.label_places[0]), batch.is_padded)
        if self.obstacle or (key not in self._inputs and len(self._inputs) >= MOST):
            total = torch.full((), n_total, dtype=torch.float32, device=self._device)
            return self._run(batch.to(self._device), total)
        first = key not in self._inputs
        inputs = self._inputs.setdefault(key, _Inputs(batch, self._device))
        inputs.set(batch, n_total)
        if not first and key not in self._graphs:
            self._add(key, inputs)
        if key in self._graphs:
            return self._replay(self._graphs[key])
        return self._run(inputs.batch, inputs.total)

    def drop(self, reason: str) -> bool:
        """Give up all graphs and their memory, from now on; returns whether there were any."""
        had, self.obstacle = bool(self._graphs), self.obstacle or reason
        self._graphs.clear()
        self._inputs.clear()
        self._buffers.clear()
        return had

    def _add(self, key: tuple[int, ...], inputs: _Inputs) -> None:
        if not self._buffers:
            self._buffers = [torch.zeros_like(parameter) for parameter in self._parameters]
        trained: list[int] = []

        def run() -> Tensor:
            before = [parameter.grad for parameter in self._parameters]
            self._set_gradients([None] * len(before))
            try:
                loss = self._run(inputs.batch, inputs.total)
                found = {index: p.grad for index, p in enumerate(self._parameters) if p.grad is not None}
                torch._foreach_add_([self._buffers[index] for index in found], list(found.values()))
            finally:
                self._set_gradients(before)
            trained[:] = found
            return loss

        try:
            replay, loss = self._capture(run)
        except (
            Exception
        ) as error:  # of the model's own code, or of torch; a pass without a graph shows what is wrong, if anything
            self.drop(f"capturing failed: {_origin(error)}")
        else:
            self._graphs[key] = _Graph(replay, loss, trained, scratch_buffers())

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


def _origin(error: BaseException) -> str:
    """The first error of those that a failed capture raises; the last one is that it was not completed."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def fitted(batch: Batch, longest: int, *, grow: bool) -> Batch:
    """A batch of the host, padded so that shapes repeat; its label places are padded with labels that are ignored.

    Args:
        longest: tokens of the longest row of the run, to which rows are padded at most.
        grow: pad rows; False: label places only.
    """
    B, T = batch.input_ids.shape
    if grow:
        extra = max(T, min(longest, _next(T, -(-longest // LENGTHS)))) - T
        last = batch.input_ids[:, -1:].expand(B, extra)
        batch = replace(
            batch, input_ids=torch.cat([batch.input_ids, last], 1),
            attention_mask=nn.functional.pad(batch.attention_mask, (0, extra)),
            labels=nn.functional.pad(batch.labels, (0, extra), value=IGNORE),
        )  # fmt: skip
    places, labels = batch.label_places
    tokens = batch.input_ids.numel()
    padding = (0, min(tokens, _next(len(places), -(-tokens // PLACES))) - len(places))
    batch.places = nn.functional.pad(places, padding), nn.functional.pad(labels, padding, value=IGNORE)
    batch.padded = batch.is_padded or grow
    return batch


def _next(count: int, step: int) -> int:
    """The next multiple of `step`, at least one."""
    return max(1, -(-count // step)) * step


def decided(option: bool | Literal["auto"], compiled: bool, found: str) -> str:
    """Why a run has no graphs, or '': with 'auto' it has them where layers are compiled.

    Args:
        found: the `obstacle`.
    """
    if option is False:
        return "cuda_graphs is off"
    if not found and option == "auto" and not compiled:
        return "layers are not compiled, as the run is short"
    return found
