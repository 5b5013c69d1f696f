"""Memory of a training run: its step on a tape, by kind and by phase of the step, as three figures.

- *allocated*: peak bytes of all tensors. Counted on the tape; the only figure that needs no further model.
- *reserved*: what torch's caching allocator takes from a CUDA device for them (`allocator.py`). None on a CPU.
- *device*: total device memory used. CUDA: reserved, the driver's context and the libraries' workspaces. CPU: the process's
  resident set size: Python with its libraries, the tensors, and the C heap's fragmentation.

Each has an interval. `lownibble bench plan` compares plans with runs on a CPU (`benchmarks/results/plan-cpu.json`), and tests
hold allocated on a CPU to 0.5%, and to the peaks of two runs with compiled layers on one H100 to 2%. The intervals on CUDA are a
guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lownibble.arch import Linear, ModelShape, all_paths, expert_paths, paths
from lownibble.config import (
    CORRECT,
    KEEP_THEIR_START,
    LOOK_AT_INPUTS,
    PREFERENCE,
    Checkpointing,
    LoraConfig,
    Parallel,
    QuantConfig,
    TrainConfig,
)
from lownibble.config import Method as MethodName
from lownibble.errors import ConfigError, InputError, TargetError
from lownibble.lora import targets
from lownibble.lora.held import held
from lownibble.matching import is_part
from lownibble.optim import specs
from lownibble.options import n_bytes
from lownibble.planning.allocator import reserved_bytes
from lownibble.planning.calibrated import Rows, run_calibration
from lownibble.planning.exchange import BUFFER_BYTES, CutError, Exchange, cuts_a_block, not_on_shards
from lownibble.planning.experts import goes_by_expert
from lownibble.planning.hardware import TOKENIZER, VOCAB, Device
from lownibble.planning.linear import Method, Runtime, chunk_bytes
from lownibble.planning.step import Batch, run_step
from lownibble.planning.tape import BFLOAT16, FLOAT32, Tape
from lownibble.planning.tiles import is_long
from lownibble.quant import layouts

KINDS = ("weights", "codes", "constants", "adapters", "gradients", "optimizer", "activations", "workspace")
"""Kinds of memory, in display order."""

OF_RANKS = ("gathered", "communication")
"""Kinds of memory that only one of several ranks has: tensors gathered from all, and buffers that are sent and received."""

FUSED = ("nf4", "fp4", *layouts.GROUPED)
"""Codecs with matmul kernels that dequantise internally, on CPUs with AVX-512."""

TILED = ("nf4", "fp4")
"""Codecs onto which a kernel packs the sum of an int8 base and an adapter tile by tile, on CPUs (`quant/sums.py`)."""

ITEMSIZE = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": BFLOAT16}


PASS_UNKNOWN = (
    "The planner knows the calibration pass of init_lora_weights='{}' for decoders of the families of its own tape, without an "
    "adapted head. Leave init_lora_weights out to plan without."
)

PAYS_AFTER_FLOPS = {"cpu": 1e14, "cuda": 5e15}
"""Device type -> FLOPs of a run (6 x parameters x tokens) from which compiling saves more time than it takes. CPU: compilation
takes about ten to twenty seconds and saves a tenth of each step (`benchmarks/results/train-cpu.json`). CUDA: ten seconds, and 22%
of each step (8B shapes on an H100, one measurement outside this repository's records); 5e15 lies between the break-even points of
an H100 and of a card with a tenth of its speed, and is a minute or less of work on either. Also used in training."""

StepOf = Callable[[MethodName, Runtime, Batch, Checkpointing, int], Tape]
"""(method, runtime, batch, checkpointing, microbatches) -> a step's allocations, without optimiser states."""


class Interval(NamedTuple):
    """Bytes: lower bound, likely, upper bound."""

    low: int
    likely: int
    high: int


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a training step on a device.

    Attributes:
        kinds: bytes by kind at the peak. instants: peak bytes in each phase of the step.
        worst: the phase with the peak.
        simulated_bytes: reserved by the simulated caching allocator. pass_bytes: sum of all allocations of a microbatch,
            simultaneous or not.
        parameters, trained_parameters: elements. adapters_per_token: of the trained ones of adapters, those that a token passes
            through.
        host_bytes: host memory for offloaded checkpoints, or for a rank's offloaded shards, gradients and optimiser states; torch
            rounds what is pinned (all but the states) up to powers of two.
        host_kinds: bytes of those shards, gradients and states by kind, as they are; empty if they are on the device.
        compiled: whether the step is one of compiled decoder layers.
        exchange: what ranks exchange, of a plan of one of several.
        vocab: entries of the vocabulary; a tokenizer of 250,000 takes as much memory as a small model.
    """

    kinds: dict[str, int]
    instants: dict[str, int]
    worst: str
    simulated_bytes: int
    pass_bytes: int
    parameters: int
    trained_parameters: int
    on_device: Device
    host_bytes: int = 0
    compiled: bool = False
    adapters_per_token: int = 0
    exchange: Exchange | None = None
    host_kinds: Mapping[str, int] = field(default_factory=dict)
    vocab: int = 0

    def on(self, device: Device) -> MemoryPlan:
        """The same plan on another device with an equal `Device.alike`."""
        return replace(self, on_device=device)

    def after(self, name: str, before: MemoryPlan) -> MemoryPlan:
        """This plan with the peak of something that comes before the step, and leaves only what the step has too."""
        instants = {name: before.instants[before.worst], **self.instants}
        worst = max(instants, key=lambda each: instants[each])
        kinds = before.kinds if worst == name else self.kinds
        simulated = max(before.simulated_bytes, self.simulated_bytes)
        return replace(self, instants=instants, worst=worst, kinds=kinds, simulated_bytes=simulated)

    @property
    def allocated(self) -> Interval:
        """Peak bytes of tensors."""
        n, (less, more) = self.instants[self.worst], self.on_device.allocated_error
        return Interval(int(n * (1 - less)), n, int(n * (1 + more)))

    @property
    def reserved(self) -> Interval | None:
        """Bytes reserved by the caching allocator; None on a CPU."""
        if self.on_device.kind == "cpu":
            return None
        allocated = self.allocated
        highest = int(max(self.simulated_bytes, allocated.high) * (1 + self.on_device.reserved_error))
        return Interval(allocated.low, self.simulated_bytes, highest)

    @property
    def device(self) -> Interval:
        """Bytes of device memory used; on a CPU the process's resident set size."""
        device, reserved = self.on_device, self.reserved
        if reserved is not None:
            return Interval(*(each + device.context_bytes + device.workspace_bytes for each in reserved))
        entries = max(0, self.vocab - VOCAB)
        parts = zip(device.process_bytes, TOKENIZER, device.heap_share, self.allocated, strict=True)
        return Interval(*(int(own + entry * entries + share * self.pass_bytes + each) for own, entry, share, each in parts))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kinds": self.kinds, "instants": self.instants, "worst": self.worst, "allocated_bytes": self.allocated._asdict(),
            "reserved_bytes": None if self.reserved is None else self.reserved._asdict(),
            "device_bytes": self.device._asdict(), "parameters": self.parameters,
            "trained_parameters": self.trained_parameters, "host_bytes": self.host_bytes,
            "compiled": self.compiled, **({"host_kinds": {**self.host_kinds}} if self.host_kinds else {}),
            **({} if self.exchange is None else {"exchange_bytes": self.exchange._asdict()}),
        }  # fmt: skip


def plan_memory(
    shape: ModelShape, device: Device, method: MethodName, *, quant: QuantConfig, lora: LoraConfig, train: TrainConfig,
    dtype: str = "auto", adapter_dtype: str = "float32", batch: Batch | None = None, step: StepOf | None = None,
    rounded: Mapping[str, QuantConfig] | None = None, calibration: Rows | None = None, compiled: bool = False,
    parallel: Parallel | None = None, ranks: int = 1,
) -> MemoryPlan:  # fmt: skip
    """The memory of a step, on one of several ranks with `parallel`.

    Args:
        batch: its largest microbatch; default: the largest possible, where every row has `max_length` tokens, all but the first
            with a label.
        step: runs the step instead of the planner's own tape.
        rounded: path of each layer of a merge-aware run that computes with a second packed weight -> its codec; `quant` is then
            what the base is held in.
        calibration: rows of the calibration pass, if the initialisation looks at layers' inputs; None: it is not counted.
        compiled: the run compiles decoder layers (see `compiles`); those that run in tiles of tokens are not, nor those of
            mixtures with packed or adapted experts. Only on CUDA: plans for a CPU are of layers that are not compiled.
        parallel, ranks: how several ranks train (`exchange.py`), and their number. With fsdp adapters are rounded where they are
            used, not once a pass, and passes are not replayed as CUDA graphs: tensors come and go.
    Raises:
        TargetError: LoRA's targets match nothing in this model.
        ConfigError: an option that the planner does not support. CutError: parts would cut blocks of an 8-bit optimiser.
    """
    if train.gradient_checkpointing == "offload" and (device.kind != "cuda" or shape.decoder_layers):
        why = "it has an encoder" if shape.decoder_layers else "a CPU has no other memory"
        raise ConfigError(
            f"'{shape.name}' cannot be planned with offloaded checkpoints: {why}. Use --gradient-checkpointing true."
        )
    if train.objective in PREFERENCE and shape.decoder_layers:
        raise ConfigError(f"'{shape.name}' has an encoder, which objective '{train.objective}' is not for. Leave it out.")
    shards = ranks if parallel == "fsdp" else 0
    if shards and (why := not_sharded(shape, train, lora, merge_aware=bool(rounded), traced=step is not None)):
        raise ConfigError(f"'{shape.name}' cannot be planned with fsdp: {why}. Use --parallel ddp.")
    size = itemsize(device, method, dtype)
    adapted = {} if method == "full" or shape.counts else _ranks(shape, lora)
    batch, passes = batch or _largest(train), min(2, train.gradient_accumulation_steps)
    tiled = bool(train.gradient_checkpointing) and is_long(batch.rows * batch.length)
    of_adapter = ITEMSIZE[adapter_dtype]
    if rounded and (step is not None or of_adapter != FLOAT32 or lora.use_dora):
        raise ConfigError(
            "The planner knows merge-aware training of the families of its own tape, with plain adapters in float32. Leave "
            "merge_aware out, or --exact, adapter_dtype and use_dora."
        )
    if step is not None and of_adapter != FLOAT32:
        raise ConfigError(f"A traced step is Lownibble's, whose adapters are in float32. Got adapter_dtype '{adapter_dtype}'.")
    trained = list(_trained(shape, method, adapted, size, of_adapter, lora.use_dora))
    n_trained = sum(n for n, _ in trained)
    rounded = rounded or {}
    ways = None
    if shape.counts is None:
        packed = packed_layers(shape, quant) if method == "qlora" else {}
        fused = {path for path in packed if rounded.get(path, quant.for_layer(path)).quant_type in FUSED}
        computed_with = {path: _specs_of(linear, rounded[path]) for path, linear in paths(shape) if path in rounded}
        by_tiles = {path for path, how in rounded.items() if device.kind == "cpu" and how.quant_type in TILED}
        ways = Method(method == "full", packed, fused, adapted, of_adapter, lora.use_dora, computed_with, by_tiles)
    offloaded = bool(shards) and train.fsdp_cpu_offload and device.kind == "cuda"
    compiled = compiled and not tiled and not (ways and goes_by_expert(shape, ways))
    run = _runtime(device, size, compiled, shards, offloaded=offloaded)
    if step is None:
        assert ways is not None
        tape = run_step(shape, ways, run, batch, checkpointing=train.gradient_checkpointing, passes=passes)
    else:
        tape = step(method, run, batch, train.gradient_checkpointing, passes)
    if method != "full" and lora.init_lora_weights in KEEP_THEIR_START:
        tape.hold([n * each for n, each in trained], "adapters")  # buffers, which every rank has whole
    trained = tape.parts if shards else trained
    if shards and any(cuts_a_block(n, shards, train.optim) for n, _ in trained):
        raise CutError(f"{shards} processes would cut blocks of {train.optim}'s moments. Use adamw, or --parallel ddp.")
    if device.kind == "cuda" and method != "full" and not shards:
        tape.hold([n * size for n, each in trained if each > size], "adapters")  # rounded once a pass
        if tape.compiled and _replays(train, lora):
            tape.hold([n * each for n, each in trained], "gradients")  # those that graphs add to
    states = state_bytes(trained, train, device.kind, max(1, shards))
    if offloaded:
        tape.hold_on_host([n * each for n, each in trained], "gradients", pinned=True)
        tape.hold_on_host(states, "optimizer", pinned=False)
    else:
        tape.hold(states, "optimizer")
    if parallel == "ddp":
        tape.exchange = Exchange("ddp", 0, 0, n_trained * FLOAT32)
        tape.insert("all-reduce", min(n_trained * FLOAT32, BUFFER_BYTES), "communication")
    found = _read(tape, passes, shape, device, n_trained)
    if method != "full":
        found = replace(found, adapters_per_token=_active_adapters(shape, adapted, lora.use_dora))
    init = str(lora.init_lora_weights)
    if calibration is None or not needs_pass(method, init):
        return found
    if ways is None or shape.decoder_layers or "lm_head" in adapted:
        raise ConfigError(PASS_UNKNOWN.format(init))
    before = _read(run_calibration(shape, ways, replace(run, compiled=False), calibration, init), 1, shape, device, 0)
    return found.after("calibration", before)


def not_sharded(shape: ModelShape, train: TrainConfig, lora: LoraConfig, *, merge_aware: bool, traced: bool) -> str:
    """Why a run cannot be done, or planned, with fsdp, or ''. `traced`: its step is."""
    if found := not_on_shards(train, lora, merge_aware=merge_aware):
        return f"it does not go with {found[0]}"
    if traced or shape.counts is not None:
        return "the planner knows it for the families of its own tape, not for a step that is traced"
    return "the planner knows it for decoders, and this model has an encoder" if shape.decoder_layers else ""


def _replays(train: TrainConfig, lora: LoraConfig) -> bool:
    """Whether the passes of a run with compiled layers are replayed as CUDA graphs, as far as its options tell (see
    `training/graphs.py`)."""
    against = train.packing or lora.lora_dropout or train.memory_budget or train.gradient_checkpointing == "offload"
    against = against or train.objective in PREFERENCE  # whose loss is no sum over tokens
    return train.cuda_graphs is not False and not against


def compiles(
    shape: ModelShape, device: Device, train: TrainConfig, *, merge_aware: bool = False, tokens: int | None = None
) -> bool:  # fmt: skip
    """Whether a run compiles its decoder layers, as `training/compiling.choose`; never on a CPU, whose plans are of layers that
    are not compiled, nor for a model of no known family: compiling what is traced takes minutes with some. `tokens`: of the run;
    None: enough of them."""
    if device.kind == "cpu" or train.torch_compile is False or shape.decoder_layers or shape.counts or merge_aware:
        return False
    return train.torch_compile is True or tokens is None or 6 * shape.parameters * tokens >= PAYS_AFTER_FLOPS[device.kind]


def needs_pass(method: MethodName, init: str) -> bool:
    """Whether a calibration pass is run for an initialisation; what corrects a packed base needs none on a dense one."""
    return init in LOOK_AT_INPUTS and (method == "qlora" or (method == "lora" and init not in CORRECT))


def sequences_of_row(train: TrainConfig) -> int:
    """Sequences of a row in a training pass: two of a pair of answers."""
    return 2 if train.objective in ("dpo", "orpo") else 1


def _largest(train: TrainConfig) -> Batch:
    if train.packing:
        return Batch(1, train.batch_size * train.max_length, train.batch_size * (train.max_length - 1))
    sequences = train.batch_size * sequences_of_row(train)
    return Batch(sequences, train.max_length, sequences * (train.max_length - 1))


def itemsize(device: Device, method: MethodName, dtype: str) -> int:
    """Bytes per element of weights and activations; 'auto': float32 for full fine-tuning and on a CPU, else bfloat16."""
    if dtype == "auto":
        return FLOAT32 if method == "full" or device.kind == "cpu" else BFLOAT16
    return ITEMSIZE[dtype]


def _runtime(device: Device, size: int, compiled: bool = False, shards: int = 0, *, offloaded: bool = False) -> Runtime:
    if device.kind == "cpu":
        fast = device.avx512 and size == FLOAT32
        return Runtime(size, fused=fast, kernel_attention=fast, decode_buffers=1, shards=shards)
    chunk = chunk_bytes(device.memory_bytes)
    return Runtime(
        size, fused=False, kernel_attention=False, decode_buffers=2, round_to=512, cuda=True, chunk_bytes=chunk,
        compiled=compiled, shards=shards, offloaded=offloaded,
    )  # fmt: skip


def _ranks(shape: ModelShape, lora: LoraConfig, *, merge_aware: bool = False) -> dict[str, int]:
    """Path of each adapted linear, experts' included -> its rank."""
    for option, value, off in (("bias", lora.bias, "none"), ("modules_to_save", lora.modules_to_save, [])):
        if value != off:
            raise ConfigError(f"The planner does not know '{option}'. Got {value!r}. Leave it out to plan without.")
    linears = [path for path, _ in paths(shape)]
    try:
        matched = targets.match_targets([*linears, "lm_head"], lora, head="lm_head")
        of_experts = targets.match_experts([path for path, _ in expert_paths(shape)], lora)
        targets.check_ranks(lora, [*matched, *of_experts], of_file=False)
        targets.check_experts(lora, of_experts, merge_aware=merge_aware)
    except TargetError as error:
        raise TargetError(f"'{shape.name}': {error}") from None
    if lora.use_dora and (lora.lora_dropout or "lm_head" in matched):
        what = f"lora_dropout. Got {lora.lora_dropout}" if lora.lora_dropout else "an adapted lm_head"
        raise ConfigError(f"The planner does not know use_dora with {what}. Leave it out to plan without.")
    return {path: targets.rank_of(path, lora) for path in [*matched, *of_experts]}


def packed_layers(shape: ModelShape, quant: QuantConfig) -> dict[str, list[layouts.TensorSpec]]:
    """Path of each packed linear, experts' included -> its codes, then each of its constants."""
    linears = all_paths(shape)
    try:
        chosen = layouts.choose({path: linear.shape for path, linear in linears.items()}, quant, ["lm_head"])
    except InputError as error:
        raise type(error)(f"'{shape.name}': {error}") from None
    if not shape.tied and "lm_head" not in quant.skip_modules:
        raise ConfigError("The planner does not know a quantised head. Leave 'lm_head' in skip_modules to plan without.")
    return {path: _specs_of(linear, chosen[path]) for path, linear in linears.items() if path in chosen}


def merge_aware(shape: ModelShape, quant: QuantConfig, lora: LoraConfig) -> tuple[QuantConfig, dict[str, QuantConfig]]:
    """How a merge-aware run holds its base, and path -> codec of the layers that compute packed as `quant` says; see
    `lora/merge_aware.held_as`.

    Raises:
        ConfigError: nothing is rounded, or the family is not known. TargetError: there are adapters on experts.
    """
    if shape.counts is not None:
        raise ConfigError(f"The planner does not know merge-aware training of '{shape.name}'. Leave merge_aware out.")
    shapes = {path: linear.shape for path, linear in all_paths(shape).items()}
    leaves = {path: quant.for_layer(path) for path in packed_layers(shape, quant)}
    adapted = _ranks(shape, lora, merge_aware=True).keys()
    rounded = [path for path in leaves if path in adapted and not is_part(path, shape.family.kept_dense)]
    return QuantConfig.of_layers(held(leaves, shapes, rounded), quant.skip_modules), {path: leaves[path] for path in rounded}


def _specs_of(linear: Linear, how: QuantConfig) -> list[layouts.TensorSpec]:
    """A packed linear's codes, then each of its constants."""
    return list(layouts.of_layer(linear.shape, how).values())


def _trained(
    shape: ModelShape, method: MethodName, ranks: Mapping[str, int], size: int, of_adapter: int, use_dora: bool
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """(elements, bytes per element) of every trained parameter."""
    if shape.counts is not None:
        yield from (
            ((n, size) for n in shape.counts.parameters) if method == "full" else ((n, of_adapter) for n in shape.counts.adapters)
        )
        return
    if method == "full":
        sizes = [math.prod(linear.shape) for linear in all_paths(shape).values()]
        yield shape.parameters - sum(sizes), size
        yield from ((n, size) for n in sizes)
        return
    for linear, n in _adapters(shape, ranks, use_dora):
        yield (linear.experts or 1) * n, of_adapter


def _adapters(shape: ModelShape, ranks: Mapping[str, int], use_dora: bool) -> Iterator[tuple[Linear, int]]:
    """(adapted linear, elements) of every parameter of an adapter, for one expert."""
    linears = {**all_paths(shape), "lm_head": Linear("lm_head", shape.hidden, shape.vocab, bias=False)}
    for path, r in ranks.items():
        linear = linears[path]
        for parameter in targets.parameter_shapes(linear.in_features, linear.out_features, r, use_dora).values():
            yield linear, math.prod(parameter)


def _active_adapters(shape: ModelShape, ranks: Mapping[str, int], use_dora: bool) -> int:
    """Elements of the adapters that a token passes through."""
    if shape.counts is not None:
        return shape.counts.active_adapters
    return sum((shape.active_experts if linear.experts else 1) * n for linear, n in _adapters(shape, ranks, use_dora))


def state_bytes(trained: list[tuple[int, int]], train: TrainConfig, device_type: str, shards: int = 1) -> list[int]:
    """Bytes of the optimiser states in memory, per parameter or part of one; the resident total if paged.

    Raises:
        ConfigError: a page budget that the optimiser would refuse: it is not paged, or the budget is below one page.
    """
    each = [-(-specs.spec(train.optim).state_bytes(shards * n, size) // shards) for n, size in trained]
    given = n_bytes(train.optim_page_budget) if train.optim_page_budget else None
    specs.check_paged(train.optim, given)
    if not specs.is_paged(train.optim):
        return each
    budget = specs.page_budget(sum(each), given)
    specs.check_budget(budget, specs.page_bytes(sum(each), budget, device_type))
    return [specs.resident_bytes(sum(each), budget, device_type)]


def _from_model(tape: Tape) -> list[tuple[int, int]]:
    """Events from the built model onwards; storages that live only while it is built are omitted, since the allocator gives all
    of them back."""
    made, end = tape.marks[0][1], tape.marks[-1][1]
    sizes: dict[int, int] = {}
    for key, n in tape.events[:made]:
        sizes[key] = sizes.get(key, 0) + n
    return [*((key, n) for key, n in sizes.items() if n), *tape.events[made:end]]


def _read(tape: Tape, passes: int, shape: ModelShape, device: Device, n_trained: int) -> MemoryPlan:
    used = peak = at = 0
    instants: dict[str, int] = {}
    ends = iter(tape.marks)
    name, end, _ = next(ends)
    for place, (_, n) in enumerate(tape.events[: tape.marks[-1][1]]):
        while place >= end:
            name, end, _ = next(ends)
        used += n
        if place < tape.marks[0][1] - 1:
            continue  # while the model is built
        instants[name] = max(instants.get(name, 0), used)
        if used > peak:
            peak, at = used, place
    worst = max(instants, key=lambda each: instants[each])
    kinds = dict.fromkeys((*KINDS, *OF_RANKS) if tape.exchange else KINDS, 0)
    for key, n in tape.events[: at + 1]:
        kinds[tape.kinds[key]] += n
    simulated = reserved_bytes(_from_model(tape)) if device.kind == "cuda" else 0
    of_passes = sum(n for _, n in tape.events[tape.marks[0][1] : tape.marks[-1][1]] if n > 0) // passes
    return MemoryPlan(
        kinds, instants, worst, simulated, of_passes, shape.parameters, n_trained, device, tape.host_bytes, tape.compiled,
        exchange=tape.exchange, host_kinds=tape.host_kinds, vocab=shape.vocab,
    )  # fmt: skip
