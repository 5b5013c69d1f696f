"""Trace the memory of a real training step: transformers' modules and our code run on fake tensors, for models of any size.

Fake tensors have shapes but no data (`FakeTensorMode`), so a 65B step runs on two cores. A dispatch mode records every storage
that an operation allocates, and a finaliser records when it is freed. The kernels are `kernels/traced.py`. The result is a tape
like the planner's, so that everything downstream (kinds, instants, the caching allocator) is the same code.

An active dispatch mode makes autograd's engine accumulate gradients out of place, where a real step adds in place into tensors
that nothing else references (the engine treats a mode like a tensor subclass). An addition in backward whose first operand is
freed before the next allocation is therefore recorded as in place. The planner's tape is checked against the profiler, which has
no such flaw; this trace is a second opinion, and the only one for modules that the planner's tape does not implement. It runs as
on a CPU: for CUDA it counts the logits (at most one chunk) in the dequantisation buffer, while a real CUDA step allocates them
separately.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lownibble.config import Checkpointing, LoraConfig, Method, QuantConfig
from lownibble.kernels import ops
from lownibble.kernels.decoded import release_scratch
from lownibble.kernels.traced import Traced
from lownibble.lora import add_lora
from lownibble.lora.activated import for_shapes
from lownibble.memory.usage import kind_of
from lownibble.models.attention import CAUSAL, causal_obstacle, kernel_obstacle, segment_attention
from lownibble.models.head import check_head_unseen
from lownibble.models.info import body, compute_again
from lownibble.models.load import uninitialised
from lownibble.planning.linear import Runtime
from lownibble.planning.memory import StepOf
from lownibble.planning.step import Batch
from lownibble.planning.tape import Tape, pinned_bytes
from lownibble.planning.tiles import is_long
from lownibble.quant.codebook import codebook, dynamic8, dynamic8_lookup
from lownibble.rehearsal.compiled import backend as backend_of
from lownibble.training.compiling import Compiled, obstacle_to, torchs_own_warnings_off
from lownibble.training.loss import chunks_of, loss_at
from lownibble.training.offload import Offloaded
from lownibble.training.tiles import Tiled

_TYPES = {4: torch.float32, 2: torch.bfloat16}


@dataclass
class _Pending:
    """A gradient sum that may have been accumulated in place into its first operand."""

    key: int
    number: int
    first: int


class _Recorder(TorchDispatchMode):
    """Dispatch mode that records the allocation and release of every storage on a tape."""

    def __init__(self, round_to: int) -> None:
        super().__init__()
        self.tape, self.backward, self.fused = Tape(round_to), False, False
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        self._pending: _Pending | None = None
        self._unseen = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch.compile works under this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the storages it allocates."""
        out = func(*args, **(kwargs or {}))
        first = _key(args[0]) if self.backward and func is torch.ops.aten.add.Tensor else None
        for tensor in () if self._unseen else tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and _key(tensor) not in self._numbers:
                self._comes(tensor, first)
        return out

    def _comes(self, tensor: torch.Tensor, first: int | None) -> None:
        self.settle()
        storage, key, number = tensor.untyped_storage(), _key(tensor), len(self._sizes)
        size = 0 if self.fused else -(-storage.nbytes() // self.tape.round_to) * self.tape.round_to
        self.tape.kinds.append("activations")
        self._sizes.append(size)
        self._numbers[key] = number
        weakref.finalize(storage, self._goes, key)
        if first is not None and size == self._sizes[self._numbers.get(first, number)]:
            self._pending = _Pending(key, number, first)
        else:
            self.tape.change(number, size)

    def settle(self) -> None:
        """Record a pending sum as an allocation of its own, since its first operand is still alive."""
        if self._pending is not None:
            number, self._pending = self._pending.number, None
            self.tape.change(number, self._sizes[number])

    def _goes(self, key: int) -> None:
        number, pending = self._numbers.pop(key), self._pending
        if pending is not None and key == pending.first:  # the sum was accumulated in place
            self._numbers[pending.key], self._pending = number, None
        elif pending is not None and key == pending.key:
            self._pending = None
        else:
            self.tape.change(number, -self._sizes[number])

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Storages allocated inside the block are not recorded, and neither is when they are freed."""
        self._unseen = True
        try:
            yield
        finally:
            self._unseen = False

    def call(self, tensor: torch.Tensor, kind: str) -> None:
        """Set the kind of a tensor's storage."""
        self.tape.kinds[self._numbers[_key(tensor)]] = kind


class _HostCopies:
    """`offload.Copies` of a traced step: the host's tensors are not recorded, and their bytes are counted apart."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder, self._bytes = recorder, 0

    def store(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._bytes += pinned_bytes(x.nbytes)
        self._recorder.tape.host_bytes = max(self._recorder.tape.host_bytes, self._bytes)
        with self._recorder.unseen():
            return x.clone(), None

    def fetch(self, host: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(host).copy_(host), None

    def wait(self, event: None) -> None:
        """The copy has ended."""


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def exact_step(config: Mapping[str, Any], quant: QuantConfig, lora: LoraConfig) -> StepOf:
    """Return a step function that `planning` uses instead of its own tape; see `trace_step`."""

    def step(method: Method, run: Runtime, batch: Batch, checkpointing: Checkpointing, passes: int) -> Tape:
        return trace_step(
            config, method, run, batch, quant=quant, lora=lora, checkpointing=checkpointing, passes=passes
        )  # fmt: skip

    return step


def trace_step(
    config: Mapping[str, Any], method: Method, run: Runtime, batch: Batch, *, quant: QuantConfig, lora: LoraConfig,
    checkpointing: Checkpointing = False, passes: int = 1, fake: bool = True,
) -> Tape:  # fmt: skip
    """Trace a step's allocations, in the form of `planning.step.run_step` (optimiser states left out).

    Args:
        config: the contents of a model's config.json.
        run: runtime of the target device, which the trace does not need. With compiled layers, see `compiled.py`, the tape says
            whether they are: layers that cannot be compiled are traced as they are.
        fake: False runs on real tensors, for tests.
    Raises:
        ModelError: transformers does not know this model. TargetError: LoRA's targets match nothing.
    """
    recorder = _Recorder(run.round_to)
    backend = Traced(fused=run.fused, attention=run.kernel_attention, cross_entropy=run.cuda, experts_at_once=run.cuda)
    with without_values(backend, fake=fake), recorder:
        model = uninitialised(config, quant if method == "qlora" else None, _TYPES[run.itemsize])
        if method == "full":
            model.requires_grad_(True)
        else:
            add_lora(model, for_shapes(lora))
        _name_parameters(recorder, model)
        model.train()
        if checkpointing is True:
            compute_again(model)
        recorder.tape.mark("model")
        _leave_out_masks(recorder, model, batch.length)
        tiled = _tiled(recorder, model) if checkpointing and is_long(batch.rows * batch.length) else None
        with chunks_of(run.chunk_bytes, shared=not run.cuda):
            layers = _compiled(recorder, model, run, batch) if run.compiled and not tiled else None
            recorder.tape.compiled = layers is not None
            for _ in range(passes):
                with ExitStack() as stack:
                    stack.enter_context(_attention(model))
                    if tiled:
                        stack.enter_context(tiled())
                    if layers:
                        stack.enter_context(layers())
                    if checkpointing == "offload":
                        offloaded = Offloaded(model, torch.device("cuda"), _HostCopies(recorder))
                        stack.enter_context(offloaded())
                    _pass(recorder, model, batch)
        recorder.tape.mark("update")
    return recorder.tape


def check(config: Mapping[str, Any], quant: QuantConfig | None) -> None:
    """Check, on fake tensors, that a model can be trained here.

    Raises:
        ModelError: it cannot; says why. Whatever else the model's own code raises on tensors without values.
    """
    with without_values(Traced(fused=False, attention=False, cross_entropy=False, experts_at_once=False)):
        check_head_unseen(uninitialised(config, quant, torch.bfloat16))


@contextmanager
def without_values(backend: Traced, *, fake: bool = True) -> Iterator[None]:
    """Run the block on fake tensors, with kernels that only allocate; not `fake`: with those kernels alone."""
    for table in ("nf4", "fp4"):  # cached for the process, so created outside the fake mode
        codebook(table, "cpu")
    dynamic8("cpu"), dynamic8_lookup("cpu")
    release_scratch()
    told = logging.getLogger(FakeTensorMode.__module__)  # it logs what is raised anyway
    was_off, told.disabled = told.disabled, True
    try:
        with warnings.catch_warnings(), FakeTensorMode() if fake else nullcontext(), ops.use_backend(backend):
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a cache key only, never dereferenced
            yield
    finally:
        told.disabled = was_off
        release_scratch()  # it holds fake tensors


def _name_parameters(recorder: _Recorder, model: nn.Module) -> None:
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            recorder.call(tensor, kind_of(module, name))
        for buffer in module.buffers(recurse=False):
            recorder.call(buffer, "weights")


def _leave_out_masks(recorder: _Recorder, model: Any, length: int) -> None:
    """Give a model SDPA without the mask (T x T) that transformers makes for tensors without values, but not for full rows; where
    its code reads no mask itself, as DeepSeek's sparse attention does."""
    if model.config.is_encoder_decoder or not kernel_obstacle(model) or causal_obstacle(model, length):
        return
    model.set_attn_implementation(CAUSAL)
    try:
        with recorder.unseen(), torch.no_grad():
            body(model)(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception:
        model.set_attn_implementation("sdpa")
    release_scratch()


def _attention(model: Any) -> AbstractContextManager[Any]:
    """Our kernel where it runs, else what the model is set to."""
    return nullcontext() if kernel_obstacle(model) else segment_attention(model)


def _tiled(recorder: _Recorder, model: Any) -> Tiled | None:
    """What runs in tiles, found by a pass that is not recorded; None for a model with an encoder, as in training."""
    if model.config.is_encoder_decoder:
        return None
    with recorder.unseen():
        found = Tiled(model, torch.zeros(2, dtype=torch.int64), compare=False)
        release_scratch()
    return found


def _compiled(recorder: _Recorder, model: Any, run: Runtime, batch: Batch) -> Compiled | None:
    """The model's compiled layers, by a pass that is not recorded: compiling makes tensors of its own. None if they cannot be."""
    if obstacle_to(model, torch.device("meta")):
        return None
    torch._dynamo.reset()  # a layer's code keeps the graphs of earlier traces, and their number is limited
    with recorder.unseen(), torchs_own_warnings_off():
        layers = Compiled(model, recompute=run.cuda, backend=backend_of(recorder, run.cuda))
        try:
            with _attention(model), layers():
                _loss(model, batch).backward()
        except Exception:  # of the model's own code or torch's: the tape says that these layers are not compiled
            return None
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            release_scratch()
    return layers


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    places, labels = (torch.zeros(batch.labels, dtype=torch.int64) for _ in range(2))
    return loss_at(model, ids, None, places, labels)


def _pass(recorder: _Recorder, model: Any, batch: Batch) -> None:
    """Trace one forward and backward pass."""
    loss = _loss(model, batch)
    recorder.tape.mark("loss")
    recorder.backward = True
    loss.backward()
    recorder.backward = False
    recorder.settle()
    for parameter in model.parameters():
        if parameter.grad is not None:
            recorder.call(parameter.grad, "gradients")
    del loss
    recorder.tape.mark("backward")
