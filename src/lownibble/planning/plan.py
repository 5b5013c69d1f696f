"""`lownibble plan`: what fits on which device, its speed and its cost, from a configuration."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lownibble import stored
from lownibble.arch import ModelShape, all_paths
from lownibble.config import METHODS, PARALLEL, Method, Parallel, PlanConfig, QuantConfig, TrainConfig
from lownibble.errors import ConfigError, ModelError
from lownibble.leaves import GROUPS
from lownibble.options import Options
from lownibble.planning import hardware, records
from lownibble.planning.calibrated import rows_of
from lownibble.planning.calibration import calibrated
from lownibble.planning.exchange import CutError, link_of, share
from lownibble.planning.fit import Verdict, chosen, fits_as_given, judge, largest, recommend
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan, StepOf, compiles, merge_aware, not_sharded, plan_memory
from lownibble.planning.models import find_config, find_shape
from lownibble.planning.speed import Range, SpeedPlan, dollars_of, plan_speed

MOST_ROWS, MOST_TOKENS = 4096, 1 << 20
"""Upper limits of the search for the largest batch and the longest row."""


class Ranks(NamedTuple):
    """How several GPUs train: their number; dollars for a million tokens; whether 'auto' is this way."""

    gpus: int
    parallel: Parallel
    dollars_per_million: Range | None = None
    is_auto: bool = False


@dataclass(frozen=True)
class Row:
    """A method on a device: whether it fits, its speed there, and the largest batch and row that fit with the same options; or on
    each of several devices, and the speed of all."""

    verdict: Verdict
    speed: SpeedPlan | None
    largest_batch_size: int | None
    largest_max_length: int | None
    ranks: Ranks | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.verdict.to_dict(), "speed": None if self.speed is None else self.speed.to_dict(),
            "largest_batch_size": self.largest_batch_size, "largest_max_length": self.largest_max_length, **self._of_ranks(),
        }  # fmt: skip

    def _of_ranks(self) -> dict[str, Any]:
        if self.ranks is None:
            return {}
        gpus, parallel, dollars, is_auto = self.ranks
        dollars_per_million = None if dollars is None else dollars._asdict()
        return {"gpus": gpus, "parallel": parallel, "is_auto": is_auto, "dollars_per_million_tokens": dollars_per_million}


@dataclass(frozen=True)
class Plan:
    """Result of `plan`.

    Attributes:
        rows: by device, then by number of GPUs and way of training on several, then by method.
        stored_as: how the model's weights are stored and what that means for the plan, in words; '' if they are dense.
        refused: method that was asked for with 'all', or 'fsdp' with 'auto', and is not planned -> why.
        advice: device -> method (None: nothing fits) and reasons; only where all methods were planned, for one GPU.
        memories: (device, method, options of training) -> the memory of the same run with them; for the page.
    """

    config: PlanConfig
    shape: ModelShape
    devices: tuple[Device, ...]
    rows: tuple[Row, ...]
    advice: Mapping[str, tuple[Method | None, list[str]]]
    stored_as: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    memories: _Memories | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        advice = {device: {"method": method, "reasons": reasons} for device, (method, reasons) in self.advice.items()}
        used = {"link": self.config.gpus, "network": self.config.gpus, "host": self.config.train.fsdp_cpu_offload}
        left_out = [figure for figure, is_used in used.items() if not is_used]
        sources = {
            device.name: {figure: source for figure, source in device.sources if figure not in left_out}
            for device in self.devices
        }  # fmt: skip
        return {
            "config": self.config.to_dict(), "parameters": self.shape.parameters,
            "planned_part": f"the text model of a {self.shape.wrapper}" if self.shape.wrapper else "the whole model",
            "traced": self.shape.counts is not None, "stored_as": self.stored_as or None, "refused": dict(self.refused),
            "rows": [row.to_dict() for row in self.rows],
            "advice": advice, "sources": sources,
        }  # fmt: skip


def plan(
    model: str | PlanConfig = "demo", *, step: StepOf | None = None, shape: ModelShape | None = None,
    refused: Mapping[Method, str] | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """Plan a training run of a model whose family is known; imports no torch. For any model: `rehearsal.plan.plan`.

    Args:
        model: 'demo', a bundled model, a config.json, a model folder or a hub id; or the whole configuration.
        step: runs the step instead of the planner's own tape (`rehearsal.trace.exact_step`).
        shape, refused: of a model that was built to be traced: its sizes, and the methods that it cannot be trained by.
        options: of `PlanConfig` (gpu, gpus, method, tokens, price, dtype), or of its groups by their own names (max_length=512).
    Raises:
        ConfigError, ModelError, TargetError: an invalid request; names what is valid.
    """
    config = configured(model, options)
    with _no_cycles_looked_for():
        return _plan(config, step, shape or find_shape(config.model), refused or {})


@contextmanager
def _no_cycles_looked_for() -> Iterator[None]:
    """Disable the cyclic garbage collector: a tape is many small objects, freed by reference counting, and the collector takes a
    fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _plan(config: PlanConfig, step: StepOf | None, shape: ModelShape, refused: Mapping[Method, str]) -> Plan:
    measured = records.find(config.records, config.model)
    config, stored_as = as_stored(config, shape)
    devices = _devices(config.gpu)
    methods = METHODS if config.method == "all" else (config.method,)
    not_planned: dict[str, str] = {method: why for method, why in refused.items() if method in methods}
    methods = tuple(method for method in methods if method not in not_planned)
    if not methods:
        raise ModelError(f"'{config.model}' cannot be planned: {' '.join(dict.fromkeys(not_planned.values()))}")
    planned = _Memories(config, shape, step)
    if _several(config):
        ways, no_way = _ways(config, shape, traced=planned.traced)
        of_ranks = [row for device in devices for row in _rows_of_ranks(config, shape, device, methods, ways, planned, no_way)]
        return Plan(config, shape, tuple(devices), tuple(of_ranks), {}, stored_as, not_planned | no_way, planned)
    rows: list[Row] = []
    advice: dict[str, tuple[Method | None, list[str]]] = {}
    for device in devices:
        offloads = _offloads(device, shape)

        def of_device(method: Method, train: TrainConfig, device: Device = device) -> MemoryPlan:
            return planned(device, method, train)

        verdicts = {method: judge(method, device, config.train, of_device, offloads) for method in methods}
        rows += [_row(config, shape, device, verdict, planned, alone=len(devices) == 1) for verdict in verdicts.values()]
        if len(methods) == len(METHODS):
            advice[device.name] = recommend({str(method): verdict for method, verdict in verdicts.items()}, measured)
    return Plan(config, shape, tuple(devices), tuple(rows), advice, stored_as, not_planned, planned)


def _offloads(device: Device, shape: ModelShape) -> bool:
    return device.kind == "cuda" and shape.counts is None and not shape.decoder_layers


def _several(config: PlanConfig) -> bool:
    """Whether the plan is of several GPUs.

    Raises:
        ConfigError: an option of several is given for one.
    """
    given = [f"'{name}' of PlanConfig" for name in sorted(config.model_fields_set & {"gpus_per_node", "link_gb_per_s"})]
    given += ["'parallel' of TrainConfig"] * (config.train.parallel != "auto")
    if given and not config.gpus:
        raise ConfigError(f"The {given[0]} is for several GPUs. Give their number (gpus), or leave it out.")
    return bool(config.gpus)


def _ways(config: PlanConfig, shape: ModelShape, *, traced: bool) -> tuple[tuple[Parallel, ...], dict[str, str]]:
    """The ways of training on several GPUs to plan, and those of 'auto' that cannot be -> why."""
    if config.train.parallel != "auto":
        return (config.train.parallel,), {}
    why = not_sharded(shape, config.train, config.lora, merge_aware=config.merge_aware, traced=traced)
    return (("ddp",), {"fsdp": why}) if why else (PARALLEL, {})


class Auto(NamedTuple):
    """What 'auto' is on several devices: the way; whether each can hold the whole run as it is; why fsdp cannot be, or ''."""

    parallel: Parallel
    fits: bool
    refusal: str


def auto(config: PlanConfig, device: Device, gpus: int) -> Auto:
    """What 'auto' is for a run by one method on so many devices, as `plan` marks it.

    Raises:
        as `plan`.
    """
    shape = find_shape(config.model)
    config, _ = as_stored(config, shape)
    ways, refused = _ways(config, shape, traced=False)
    assert config.method != "all"
    train, planned = share(config.train, gpus), _Memories(config, shape, None)
    verdict = _verdict_of_ranks(shape, device, config.method, train, "ddp", gpus, planned)
    found, fits = chosen(dict.fromkeys(ways, verdict), train), fits_as_given(verdict, train)  # fsdp whether that fits or not
    if found == "fsdp":
        try:
            planned(device, config.method, train, found, gpus)
        except CutError as error:
            return Auto("ddp", fits, str(error))
    return Auto(found, fits, refused.get("fsdp", ""))


def _verdict_of_ranks(
    shape: ModelShape, device: Device, method: Method, train: TrainConfig, way: Parallel, gpus: int, planned: _Memories
) -> Verdict:  # fmt: skip
    def of_rank(method: Method, train: TrainConfig) -> MemoryPlan:
        return planned(device, method, train, way, gpus)

    return judge(method, device, train, of_rank, offloads=way == "ddp" and _offloads(device, shape))


def _rows_of_ranks(
    config: PlanConfig, shape: ModelShape, device: Device, methods: tuple[Method, ...], ways: tuple[Parallel, ...],
    planned: _Memories, refused: dict[str, str],
) -> Iterator[Row]:  # fmt: skip
    """Numbers of GPUs x ways x methods on one kind of device. `refused`: gets fsdp -> why, where one of 'auto' cannot be.

    Raises:
        ConfigError: the device is this machine's CPU, whose memory ranks share.
    """
    if device.kind == "cpu":
        raise ConfigError(
            "The 'gpus' of PlanConfig are for GPUs; processes on a CPU share its memory. Leave gpus out, or name a gpu."
        )
    for gpus in dict.fromkeys(config.gpus):
        link, train = link_of(device, gpus, config.gpus_per_node, config.link_gb_per_s), share(config.train, gpus)
        verdicts: dict[tuple[Parallel, Method], Verdict] = {}
        for way, method in product(ways, methods):
            try:
                verdicts[way, method] = _verdict_of_ranks(shape, device, method, train, way, gpus, planned)
            except CutError as error:
                if len(ways) == 1:
                    raise
                refused[way] = str(error)
        of_auto = {
            method: chosen({way: verdicts[way, method] for way in ways if (way, method) in verdicts}, train) for method in methods
        }  # fmt: skip
        for (way, method), verdict in verdicts.items():
            speed = plan_speed(
                shape, device, method, verdict.train, verdict.memory, tokens=config.tokens, price=config.price, cards=gpus,
                link=link,
            )  # fmt: skip
            ranks = Ranks(gpus, way, _dollars_per_million(config, device, speed, gpus), of_auto[method] == way)
            yield Row(verdict, speed, None, None, ranks)


def _dollars_per_million(config: PlanConfig, device: Device, speed: SpeedPlan | None, gpus: int) -> Range | None:
    if speed is None:
        return None
    hours = Range(*(1e6 / rate / 3600 for rate in reversed(speed.tokens_per_s)))
    return dollars_of(hours, device, config.price, gpus)


def as_stored(config: PlanConfig, shape: ModelShape | None = None) -> tuple[PlanConfig, str]:
    """The configuration for weights as they are stored, and what to say of them: quantised ones keep their codec, and only qlora
    trains on them.

    Raises:
        ModelError: their format is not known. ConfigError: another method or codec is asked for.
    """
    folder = Path(config.model).expanduser()
    how = stored.of_folder(folder) if folder.is_dir() else stored.of(find_config(config.model))
    stored.check(how, config.model)
    if not how:
        return config, ""
    codec = stored.codec(how)
    if config.merge_aware:
        raise ConfigError(
            f"'{config.model}' is stored quantised, as {stored.title(how) or stored.method(how)}; merge-aware training rounds "
            "dense weights. Give the checkpoint that it was made from, or leave merge_aware out."
        )
    if codec is None:
        return config, f"stored as {stored.title(how) or stored.method(how)}, whose numbers no codec here holds: decoded first"
    name = stored.named(how, codec)
    if config.method != "all" and (why := stored.why_not(how, config.method)):
        raise ConfigError(f"'{config.model}' cannot be planned with {config.method}: {why}")
    shape = shape or find_shape(config.model)
    linears = shape.counts.linears if shape.counts else {path: linear.in_features for path, linear in all_paths(shape).items()}
    quantised = [path for path in linears if stored.is_quantised(how, path)]
    held = {path: stored.of_layer(codec.for_layer(path), linears[path]) for path in quantised}
    if not held and not stored.only_experts(how):
        raise ModelError(f"'{config.model}' is stored as {name}, and config.json names no layer of the model that is. Check it.")
    if why := stored.contradiction(config.quant, held, held.__getitem__, [*linears, "lm_head"]):
        raise ConfigError(f"'{config.model}' is stored as {name}: {why}. Its layers stay as they are: leave quant options out.")
    dense = ["lm_head", *sorted(linears.keys() - held.keys())]
    quant = QuantConfig.of_layers(held, dense) if held else codec.with_options(skip_modules=dense)
    quant = quant.with_options(compute=config.quant.compute)
    head = "; its quantised head is planned dense" if how.get("lm_head") is True else ""
    said = f"stored as {name}, and trained on as it is, with qlora{head}"
    return config.with_options(quant=quant, method="qlora"), said


def configured(model: str | PlanConfig, options: Mapping[str, Any]) -> PlanConfig:
    """The configuration of a plan: as given, or of a model's name and options of `plan`."""
    if isinstance(model, PlanConfig):
        return model
    values: dict[str, Any] = {"model": model}
    groups: dict[str, dict[str, Any]] = {}
    owners = {name: group for group in GROUPS if group in PlanConfig.model_fields for name in _options(group).model_fields}
    for name, value in options.items():
        if name in owners:
            groups.setdefault(owners[name], {})[name] = value
        else:
            values[name] = value
    return PlanConfig(**values, **{group: _options(group)(**given) for group, given in groups.items()})


def _options(group: str) -> type[Options]:
    default: Options = PlanConfig.model_fields[group].default
    return type(default)


def _devices(gpu: str) -> list[Device]:
    given = [gpu] if "=" in gpu else [name for name in gpu.split(",") if name.strip()]
    names = hardware.names() if gpu == "all" else given
    if not names:
        raise ConfigError(f"The 'gpu' of PlanConfig must name a device, or be 'all'. Got {gpu!r}.")
    return [calibrated(hardware.device(name)) for name in names]


class _Memories:
    """Cache of memory plans: devices with an equal `Device.alike` share one, with their own intervals."""

    def __init__(self, config: PlanConfig, shape: ModelShape, step: StepOf | None) -> None:
        self._config, self._shape, self._step = config, shape, step
        self.traced = step is not None
        folder = Path(config.model)
        lost = bool(stored.of_folder(folder)) and stored.ORIGIN not in stored.read_json(folder / "config.json")
        self._starts_plainly = config.merge_aware or bool(shape.decoder_layers) or lost  # 'auto', as in training/starts.py
        self._made: dict[tuple[tuple[str, bool, int], Method, str, Parallel | None, int], MemoryPlan] = {}

    def __call__(
        self, device: Device, method: Method, train: TrainConfig, parallel: Parallel | None = None, ranks: int = 1
    ) -> MemoryPlan:
        ranks = ranks if parallel == "fsdp" else 1  # with ddp each rank holds the same, however many there are
        key = (device.alike, method, train.model_dump_json(), parallel, ranks)
        if key not in self._made:
            config, lora = self._config, self._config.lora
            if lora.init_lora_weights == "auto" and self._starts_plainly:
                lora = lora.with_options(init_lora_weights=True)
            quant, rounded = merge_aware(self._shape, config.quant, lora) if config.merge_aware else (config.quant, None)
            self._made[key] = plan_memory(
                self._shape,
                device,
                method,
                quant=quant,
                rounded=rounded,
                lora=lora,
                train=train,
                dtype=config.dtype,
                adapter_dtype=config.adapter_dtype,
                step=self._step,
                calibration=rows_of(config.data.calibration_tokens, train.max_length),
                compiled=compiles(self._shape, device, train, merge_aware=config.merge_aware, tokens=config.tokens),
                parallel=parallel,
                ranks=ranks,
            )
        return self._made[key].on(device)


def _row(config: PlanConfig, shape: ModelShape, device: Device, verdict: Verdict, planned: _Memories, *, alone: bool) -> Row:
    speed = plan_speed(shape, device, verdict.method, verdict.train, verdict.memory, tokens=config.tokens, price=config.price)

    def largest_of(option: str, most: int) -> int:
        def need(value: int) -> int:
            return planned(device, verdict.method, verdict.train.with_options(**{option: value})).device.high

        return largest(getattr(verdict.train, option), most, device.memory_bytes, need)

    if not (alone and verdict.fits) or planned.traced:
        return Row(verdict, speed, None, None)
    return Row(verdict, speed, largest_of("batch_size", MOST_ROWS), largest_of("max_length", MOST_TOKENS))
