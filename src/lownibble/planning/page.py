"""A plan as one HTML page: memory by kind for each method, and what fits on which device, with sliders for batch and length.

The page embeds a precomputed grid of plans; it computes only sums and loads nothing external. Each cell is what the plan itself
would be with that batch and length. Plans whose steps are traced have no page: a cell takes seconds there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lownibble.config import CHECKPOINTING, Checkpointing, Method, TrainConfig
from lownibble.errors import ConfigError, OutputError
from lownibble.planning import hardware
from lownibble.planning.memory import MemoryPlan
from lownibble.planning.plan import Plan

_TEMPLATE = Path(__file__).with_name("page.html")
CHECKPOINTING_WORDS: dict[Checkpointing, str] = {False: "off", True: "on", "offload": "offloaded"}
BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32), (128, 256, 512, 1024, 2048, 4096)
"""Slider values, in addition to the plan's own."""

TRACED = (
    "The page of --html has hundreds of plans, and each step of this one is traced, which takes seconds. Leave --html out; for a "
    "model whose family the planner knows, leave --exact out."
)


def write_page(plan: Plan, path: str | Path) -> Path:
    """Write the page, creating its folder; returns its path.

    Raises:
        ConfigError: the plan's steps are traced. OutputError: it cannot be written.
    """
    text = json.dumps(_data(plan)).replace("<", "\\u003c")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror}. Give another --html.") from None
    return path


def _data(plan: Plan) -> dict[str, Any]:
    memories = plan.memories
    if memories is None or memories.traced:
        raise ConfigError(TRACED)
    config, train, base = plan.config, plan.config.train, plan.devices[0]
    batches = sorted({*BATCHES, train.batch_size})
    lengths = sorted({*LENGTHS, train.max_length})
    how = train.gradient_checkpointing
    ways = CHECKPOINTING if how == "offload" else CHECKPOINTING[:-1]
    methods = list(dict.fromkeys(row.verdict.method for row in plan.rows))

    def cell(method: Method, options: TrainConfig) -> dict[str, Any]:
        found = memories(base, method, options)
        return {"kinds": _kinds(found), "device": list(found.device)}

    def grid(method: Method) -> list[list[list[dict[str, Any]]]]:
        """Cells indexed by checkpointing, batch and length."""
        return [
            [[cell(method, way.with_options(batch_size=rows, max_length=length)) for length in lengths] for rows in batches]
            for way in (train.with_options(gradient_checkpointing=each) for each in ways)
        ]

    others = plan.devices if base.kind == "cpu" else [hardware.device(name) for name in hardware.names()]
    shown = {device.name: device for device in (*plan.devices, *others)}
    return {
        "title": f"{plan.shape.name}: what training takes", "methods": methods,
        "about": f"{plan.shape.parameters / 1e9:.2f}e9 parameters; optimiser {train.optim}, LoRA rank {config.lora.r}"
        f"{', packed' if train.packing else ''}. Bytes on the device at the worst instant of a step.",
        "note": f"Bars are of {base.title}; other devices are counted with the same tensors and a context of their own. "
        "A setting fits where the upper end of its interval does; 'may fit' where only the lower end does.",
        "batch": batches, "length": lengths, "context": base.context_bytes + base.workspace_bytes,
        "chosen": {"batch": train.batch_size, "length": train.max_length, "checkpointing": ways.index(how)},
        "checkpointing": [CHECKPOINTING_WORDS[way] for way in ways],
        "grid": {method: grid(method) for method in methods},
        "devices": [
            {"title": d.title, "memory": d.memory_bytes, "context": d.context_bytes + d.workspace_bytes} for d in shown.values()
        ],
    }  # fmt: skip


def _kinds(found: MemoryPlan) -> dict[str, int]:
    return {kind: n for kind, n in found.kinds.items() if n}
