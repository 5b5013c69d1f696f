"""Measure the share of this device's peak FLOP/s that training reaches: three short steps per method, on a few model layers.

The layers have the model's own sizes and random weights, so any decoder-only model known to the planner can be calibrated for,
also one that does not fit here. If the device's peaks are not known (a CPU the first time, a GPU that is not in the table), they
are measured too (a large matrix product, a large copy). Steps are of next-token training from LoRA's plain start, whatever is
asked for: other objectives do more of the same work, and a start is over before the first step. The share is computed from the
step time minus the planned time of moving bytes: the inverse of `planning/speed.py`. It is stored for later plans
(`planning/calibration.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lownibble import record
from lownibble.arch import ModelShape, read_shape, text_part
from lownibble.config import METHODS, NEXT_TOKEN, PREFERENCE, Method, PlanConfig, TrainConfig
from lownibble.data import Example
from lownibble.errors import ConfigError
from lownibble.lora import add_lora
from lownibble.lora.activated import for_shapes
from lownibble.memory.planned import device_of
from lownibble.models import pick_device, pick_dtype
from lownibble.models.load import pack
from lownibble.optim import close_states
from lownibble.planning import calibration, hardware
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan, plan_memory
from lownibble.planning.models import find_config
from lownibble.planning.speed import moved_bytes, step_flops
from lownibble.rehearsal.products import flops_per_s, least_seconds
from lownibble.training.loop import Trainer

LAYERS, STEPS, SHARE = 4, 3, 0.5
"""Maximum number of layers; timed steps, after one warm-up step; share of the device's memory that they may use."""

COPY_BYTES = 2**28
"""Bytes of the tensor that is copied."""

MARGIN = 0.2
"""Relative widening of the measured interval on both sides, for more layers, other lengths and batches, and other times."""

_NEXT_TOKEN = {"objective": NEXT_TOKEN} | {
    name: TrainConfig.model_fields[name].default for names in PREFERENCE.values() for name in names
}


def calibrate(config: PlanConfig) -> dict[str, Any]:
    """Measure each method's share of peak FLOP/s (`efficiency`: low, likely, high) and step times; store and return them.

    Raises:
        ModelError: the model is not known.
        ConfigError: no method's steps fit here, the model has an encoder, or another device was requested.
    """
    config = config.with_options(
        train=config.train.with_options(**_NEXT_TOKEN), lora=config.lora.with_options(init_lora_weights=True)
    )
    torch_device = pick_device()
    device, contents = device_of(torch_device), text_part(find_config(config.model))
    name = "cpu" if torch_device.type == "cpu" else hardware.known_as(device.name)
    in_table = name == "cpu" or name in hardware.names()
    known = calibration.calibrated(hardware.device(name) if in_table else device)
    flops, bandwidth = known.flops or flops_per_s(torch_device), known.bandwidth or _copy(torch_device)
    if not in_table:  # such a GPU is named by its figures
        name = f"memory={device.memory_bytes / 2**30:.1f},bandwidth={bandwidth / 1e9:.0f},tflops={flops / 1e12:.0f}"
    if config.gpu not in ("all", name):
        raise ConfigError(f"--calibrate measures the device that is here: --gpu {name}. Got '{config.gpu}'.")
    methods = METHODS if config.method == "all" else (config.method,)
    measured = {}
    for method in methods:
        found = _few_layers(config, method, contents, device)
        if found is not None:
            measured[method] = _measure(config, method, *found, torch_device, flops, bandwidth)
    if not measured:
        raise ConfigError(f"Not even one layer of '{config.model}' can be trained here. Lower --batch-size or --max-length.")
    entry = {
        "created": record.new("calibration")["created"], "model": config.model, "flops": flops, "bandwidth": bandwidth,
        "efficiency": {method: each["efficiency"] for method, each in measured.items()}, "measured": measured,
    }  # fmt: skip
    if not in_table:
        calibration.keep(device.name, entry)  # where the next calibration of this GPU looks
    return {"device": name, "file": str(calibration.keep(name, entry)), **entry}


def _few_layers(
    config: PlanConfig, method: Method, contents: Mapping[str, Any], device: Device
) -> tuple[dict[str, Any], ModelShape, MemoryPlan] | None:
    """Config of the model with the most layers that fit (4, 2 or 1), its shape and its plan; None if not even one fits."""
    shape = read_shape(contents, config.model)
    if shape.decoder_layers:
        raise ConfigError(f"'{config.model}' has an encoder; only decoder-only models can be calibrated for so far.")
    layers = shape.layers
    for count in (n for n in (LAYERS, 2, 1) if n <= max(1, layers)):
        few = {**contents, "num_hidden_layers": count}
        if few.get("layer_types"):
            few["layer_types"] = few["layer_types"][:count]
        shape = read_shape(few, config.model)
        plan = plan_memory(
            shape, device, method, quant=config.quant, lora=config.lora, train=config.train, dtype=config.dtype
        )  # fmt: skip
        if plan.device.high <= SHARE * device.memory_bytes:
            return few, shape, plan
    return None


def _measure(
    config: PlanConfig, method: Method, contents: dict[str, Any], shape: ModelShape, plan: MemoryPlan, device: torch.device,
    flops: float, bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    train = config.train.with_options(max_steps=STEPS + 1, torch_compile=False, memory_budget=None, output_dir=None, resume=False)
    model = _model(config, method, contents, device)
    rows = list(_rows(train.batch_size * train.gradient_accumulation_steps, train.max_length, shape.vocab))
    trainer = Trainer(model, _Padding(), rows, rows[:1], train)
    try:
        trainer.set_up()
        steps = [trainer.step(number, step) for number, step in zip(range(STEPS + 1), trainer.micro.steps(), strict=False)]
    finally:
        close_states(trainer.optimizer)
    seconds = sorted(step.seconds for step in steps[1:])
    work, moved = step_flops(shape, method, plan, train), moved_bytes(plan, method, train)
    shares = [work / max(each - moved / bandwidth, each / 10) / flops for each in reversed(seconds)]
    low, high = shares[0] * (1 - MARGIN), shares[-1] * (1 + MARGIN)
    return {
        "layers": shape.layers, "step_s": seconds, "step_flops": work, "moved_bytes": moved,
        "efficiency": [low, shares[len(shares) // 2], high],
    }  # fmt: skip


class _Padding:
    """The only tokenizer attribute that the trainer uses."""

    pad_token_id = 0


def _rows(count: int, length: int, vocab: int) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        yield Example(ids, [True] * length, f"calibration {number}")


def _model(config: PlanConfig, method: Method, contents: Mapping[str, Any], device: torch.device) -> Any:
    """The model with random weights on `device`: quantised for qlora, with an adapter except for full fine-tuning."""
    values = {key: value for key, value in contents.items() if key != "model_type"}
    dtype = torch.float32 if method == "full" and config.dtype == "auto" else pick_dtype(config.dtype, device)
    wanted = AutoConfig.for_model(contents["model_type"], **values)
    with torch.random.fork_rng([]):  # initialised on the CPU; the caller's generator state is kept
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(wanted, dtype=dtype, trust_remote_code=False)
    if method == "qlora":
        pack(model, config.quant)
    model.to(device)
    if method != "full":
        add_lora(model, for_shapes(config.lora))
    return model


def _copy(device: torch.device) -> float:
    """Bytes/s of a large copy, reads plus writes."""
    a = torch.ones(COPY_BYTES // 4, device=device)
    out = torch.empty_like(a)
    return 2.0 * a.nbytes / least_seconds(lambda: out.copy_(a))
