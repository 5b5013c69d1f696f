"""`lownibble bench train`: the training step of LoRA and QLoRA next to peers.

Without `data`, fixed work: `batch_size` x `length` tokens per step, all of them labels (`contender.py`), next to the peers that
are installed (`peers.py`) and to the device's matrix-product throughput (`matmul.py`). With `data`, real rows of uneven length:
our packed runs next to TRL's SFTTrainer, padded and packed (`trl_run.py`), in tokens/s without padding.

Each contender is its own process; they take turns on a CPU, and run one after another on CUDA (`processes.py`). There
Lownibble's QLoRA runs once more at the end (`qlora_again`): the difference from the first time is the drift. The first round is
warm-up and is not counted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lownibble.bench.peers import installed
from lownibble.bench.processes import Command, Measured, Save, in_turns, one_after_another
from lownibble.bench.subject import subject
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import Dataset
from lownibble.data import load as load_data
from lownibble.errors import BackendError, ConfigError, DataError, TrainingError
from lownibble.measuring.turns import ratio, ratio_apart, spread
from lownibble.memory.planned import device_of
from lownibble.models import pick_device
from lownibble.planning.memory import plan_memory
from lownibble.planning.models import find_shape
from lownibble.planning.speed import flops_per_token
from lownibble.quant import eightbit

Record = dict[str, Any]

_QLORA = ("qlora", "qlora_int8", "qlora_fp8")
RATIOS = (
    *((name, "lora") for name in _QLORA), *((name, "qlora") for name in _QLORA[1:]), ("qlora_eager", "lora_eager"),
    ("lora", "lora_eager"), ("qlora", "qlora_eager"), ("lora", "peft_lora"), ("qlora", "peft_lora"),
    ("qlora", "peft_bnb_qlora"), ("qlora_eager", "peft_bnb_qlora"), *((name, "peft_bnb_qlora") for name in _QLORA[1:]),
    *((name, peer) for peer in ("unsloth_qlora", "peft_bnb_liger", "torchao_qlora") for name in _QLORA),
    ("qlora", "trl"), ("qlora", "trl_packed"), ("qlora_int8", "trl"), ("qlora_int8", "trl_packed"), ("qlora_again", "qlora"),
)  # fmt: skip
"""Pairs whose tokens/s are divided."""


def bench_train(
    *, peers: bool = False, repeats: int = 5, steps: int | None = None, batch_size: int | None = None, length: int | None = None,
    data: str | None = None, model: str = "demo", only: str | None = None, save: Save = lambda record: None,
) -> Record:  # fmt: skip
    """Measure training steps.

    Args:
        peers: measure the installed peers too, and say which are not; with `data`, TRL, which must be installed.
        repeats: counted rounds of `steps` steps per contender (default 2; 1 with `data`).
        batch_size: rows per step (default 4); with `data`, packs if the contender packs (default 2: all contenders are in memory
            at once).
        length: tokens per row (default 256, on CUDA 1024); with `data`, the maximum row length and the pack length (default 512).
        data: rows of `messages`; None for fixed work.
        model: what to train; see `subject.py`. With `data`, 'demo' only.
        only: contenders to measure, in order, separated by commas; default: all.
        save: called with the record so far, after each contender that ran alone.
    Raises:
        DataError: the data are not rows of messages.
        ModelError, ConfigError: the model cannot be measured.
        TrainingError: a contender of ours failed; on CUDA, all contenders.
    """
    if data and model != "demo":
        raise ConfigError("Real rows are measured on the embedded model. Leave --model or --data out.")
    cuda = pick_device().type == "cuda"
    length = length or (512 if data else 1024 if cuda else 256)
    batch_size, steps = batch_size or (2 if data else 4), steps or (1 if data else 2)
    config = DataConfig(path=data or "demo", mask_prompt=False)  # TRL's default: the loss is taken on every token
    rows = load_data(config)[0] if data else None
    workload: Record = {"model": model, "data": data, "batch_size": batch_size, "length": length, "r": 16}
    workload["targets"] = "all-linear"
    if rows:
        workload |= {"data_rows": len(rows.rows), "data_digest": rows.digest}
    workload |= {"rounds": repeats, "steps_per_round": steps}
    with ExitStack() as stack:
        missing: dict[str, str] = {}
        if rows:
            commands, flops = _real_rows(stack, rows, config, peers, batch_size, length), None
        else:
            found = stack.enter_context(subject(model))
            workload |= {"model": found.name, "random_weights": found.random}
            commands, missing = _fixed_work(peers, str(found.folder), batch_size, length)
            flops = _flops_per_token(str(found.folder), batch_size, length)
        commands = _chosen(commands, only)
        alone = cuda and not rows

        def record(measured: Measured) -> Record:
            made = _record(workload, flops, measured, ratio_apart if alone else ratio)
            return made if rows else {**made, "failed": measured.failed, "missing": missing}

        if alone:
            measured = one_after_another(commands, repeats, steps, lambda so_far: save(record(so_far)))
        else:
            measured = in_turns(commands, repeats, steps)
    if not measured.answers.keys() - {"matmul"}:
        raise TrainingError(f"No contender could be measured. {' '.join(measured.failed.values())}")
    return record(measured)


def _record(workload: Record, flops: float | None, found: Measured, divide: Callable[..., dict[str, float]]) -> Record:
    limit = _limit(found.answers.get("matmul", []), flops)
    measured = {name: given for name, given in found.answers.items() if name != "matmul"}
    figures = {name: _figures(given, found.facts[name], limit, divide) for name, given in measured.items()}
    rates = {name: _rates(given) for name, given in measured.items()}
    ratios = {f"{a}_vs_{b}": divide(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n}: peak GiB": f["peak_bytes"] / 2**30 for n, f in figures.items()}
    headlines |= {f"{n}: share of the matmul limit": f["limit_share"]["median"] for n, f in figures.items() if "limit_share" in f}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    return {"workload": workload, "limit": limit, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _eight_bit() -> tuple[str, ...]:
    """The contender with 8-bit products: fp8 where the device has it, else int8, else none."""
    for compute in ("fp8", "int8"):
        try:
            eightbit.choose(compute, pick_device())
        except BackendError:
            continue
        return (f"qlora_{compute}",)
    return ()


def _fixed_work(peers: bool, folder: str, batch_size: int, length: int) -> tuple[dict[str, Command], dict[str, str]]:
    """Name -> program and its arguments; and the peers that cannot run -> why."""
    kind, work = pick_device().type, (folder, str(batch_size), str(length))
    eight_bit = _eight_bit()
    names = ("lora", "qlora", *eight_bit, "lora_eager", "qlora_eager") if kind == "cpu" else ("qlora", "lora", *eight_bit)
    there, missing = installed(kind) if peers else ([], {})
    commands = {"matmul": Command("lownibble.bench.matmul")}
    commands |= {name: Command("lownibble.bench.contender", (name, *work)) for name in names}
    commands |= {name: Command("lownibble.bench.peers", (name, *work), may_fail=True) for name in there}
    if kind != "cpu":
        commands["qlora_again"] = Command("lownibble.bench.contender", ("qlora_again", *work))
    return commands, missing


def _chosen(commands: dict[str, Command], only: str | None) -> dict[str, Command]:
    """The measurement of the limit, and the contenders that are asked for."""
    if only is None:
        return commands
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in commands:
            raise ConfigError(f"There is no contender '{name}' here. There are: {', '.join(sorted(commands))}.")
    return {name: commands[name] for name in ("matmul", *names) if name in commands}


def _flops_per_token(folder: str, batch_size: int, length: int) -> float:
    """FLOPs of a step's matrix products per token, the same for all contenders, by the planner's formula."""
    shape, train = find_shape(folder), TrainConfig(batch_size=batch_size, max_length=length)
    plan = plan_memory(shape, device_of(pick_device()), "lora", quant=QuantConfig(), lora=LoraConfig(r=16), train=train)
    return flops_per_token(shape, "lora", plan.adapters_per_token, train)


def _real_rows(
    stack: ExitStack, rows: Dataset, config: DataConfig, peers: bool, batch_size: int, length: int
) -> dict[str, Command]:
    if "messages" not in rows.rows[0].fields:
        raise DataError(f"'{config.path}' has no rows of 'messages'. Give an instruction data set in chat form.")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def spec(compute: Literal["exact", "int8"]) -> str:
        train = TrainConfig(batch_size=batch_size, max_length=length, packing=True, max_steps=1000, torch_compile=True)
        run = RunConfig(method="qlora", data=config, quant=QuantConfig(compute=compute), train=train)
        path = folder / f"{compute}.json"
        path.write_text(json.dumps(run.to_dict()))
        return str(path)

    exact = spec("exact")
    commands = {"qlora": Command("lownibble.measuring.turns", (exact,))}
    if "qlora_int8" in _eight_bit():
        commands["qlora_int8"] = Command("lownibble.measuring.turns", (spec("int8"),))
    if peers:
        commands["trl"] = Command("lownibble.bench.trl_run", (exact, "padded"))
        commands["trl_packed"] = Command("lownibble.bench.trl_run", (exact, "packed"))
    return commands


def _rates(given: list[Record]) -> list[float]:
    return [answer["tokens"] / answer["seconds"] for answer in given[1:]]


def _limit(given: list[Record], flops_per_token: float | None) -> Record:
    """The device's matrix-product FLOP/s in each round, and the matrix-product FLOPs per token."""
    if not given:
        return {}
    rates = [answer["flops"] / answer["seconds"] for answer in given[1:]]
    return {
        "flops_per_s": spread(rates), "rounds": rates, "flops_per_token": flops_per_token, "library": given[-1].get("library")
    }  # fmt: skip


def _figures(given: list[Record], facts: Record, limit: Record, divide: Callable[..., dict[str, float]]) -> Record:
    rates = _rates(given)
    figures = {"tokens_per_s": spread(rates), "peak_bytes": max(answer["peak_bytes"] for answer in given), **facts}
    if "reserved_bytes" in given[-1]:
        figures["reserved_bytes"] = given[-1]["reserved_bytes"]  # of all rounds: it only grows
    if any("padded_tokens" in answer for answer in given):
        figures["padding_share"] = 1 - sum(a["tokens"] for a in given) / sum(a["padded_tokens"] for a in given)
    if any("losses" in answer for answer in given):
        figures["losses"] = [loss for answer in given for loss in answer["losses"]]
    if limit:
        figures["limit_share"] = divide([rate * limit["flops_per_token"] for rate in rates], limit["rounds"])
    return figures
