"""`lownibble bench train`: the training step of LoRA and QLoRA next to peers.

Without `data`, fixed work: `batch_size` x `length` tokens per step, all of them labels, next to PEFT and PEFT + bitsandbytes
(`contender.py`), and next to the machine's matrix-product throughput (`matmul.py`). With `data`, real rows of uneven length: our
packed runs next to TRL's SFTTrainer, padded and packed (`trl_run.py`), in tokens/s without padding.

Each contender is its own process and they take turns (`measuring/turns.py`). The first round is warm-up and is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lownibble.config import DataConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import Dataset
from lownibble.data import load as load_data
from lownibble.errors import BackendError, DataError
from lownibble.measuring.turns import TurnTaker, play, ratio, spread
from lownibble.models import pick_device
from lownibble.quant import eightbit

Answers = dict[str, list[dict[str, Any]]]

RATIOS = (
    ("qlora", "lora"), ("qlora_int8", "lora"), ("qlora_int8", "qlora"), ("qlora_eager", "lora_eager"), ("lora", "lora_eager"),
    ("qlora", "qlora_eager"), ("lora", "peft_lora"), ("qlora", "peft_lora"), ("qlora", "peft_bnb_qlora"),
    ("qlora_eager", "peft_bnb_qlora"), ("qlora_int8", "peft_bnb_qlora"), ("qlora", "trl"), ("qlora", "trl_packed"),
    ("qlora_int8", "trl"), ("qlora_int8", "trl_packed"),
)  # fmt: skip
"""Pairs whose tokens/s are divided, round by round."""


def bench_train(
    *, peers: bool = False, repeats: int = 5, steps: int | None = None, batch_size: int | None = None, length: int | None = None,
    data: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure training steps on the embedded model.

    Args:
        peers: measure the peers too (they must be installed).
        repeats: counted rounds of `steps` steps per contender (default 2; 1 with `data`).
        batch_size: rows per step (default 4); with `data`, packs if the contender packs (default 2: all contenders are in memory
            at once).
        length: tokens per row (default 256); with `data`, the maximum row length and the pack length (default 512).
        data: rows of `messages`; None for fixed work.
    Raises:
        DataError: the data are not rows of messages.
        TrainingError: a contender's process failed.
    """
    length, batch_size, steps = length or (512 if data else 256), batch_size or (2 if data else 4), steps or (1 if data else 2)
    config = DataConfig(path=data or "demo", mask_prompt=False)  # TRL's default: the loss is taken on every token
    rows = load_data(config)[0] if data else None
    with ExitStack() as stack:
        work = (batch_size, length)
        commands = _real_rows(stack, rows, config, peers, *work) if rows else _fixed_work(peers, *work)
        takers = []
        for name, command in commands.items():  # sequentially, so that loading does not disturb another's memory figures
            takers.append(stack.enter_context(TurnTaker(name, *command)))
            takers[-1].ready()
            print(f"bench train: {name} is ready", file=sys.stderr)
        answers = play(takers, repeats, steps)
    facts = {taker.name: taker.facts for taker in takers}
    limit = _limit(answers.pop("matmul", []), facts.get("lora_eager", {}))
    figures = {name: _figures(given, facts[name], limit) for name, given in answers.items()}
    rates = {name: _rates(given) for name, given in answers.items()}
    ratios = {f"{a}_vs_{b}": ratio(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n}: peak GiB": f["peak_bytes"] / 2**30 for n, f in figures.items()}
    headlines |= {f"{n}: share of the matmul limit": f["limit_share"]["median"] for n, f in figures.items() if "limit_share" in f}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    workload = {"model": "demo", "data": data, "batch_size": batch_size, "length": length, "r": 16, "targets": "all-linear"}
    if rows:
        workload |= {"data_rows": len(rows.rows), "data_digest": rows.digest}
    workload |= {"rounds": repeats, "steps_per_round": steps}
    return {"workload": workload, "limit": limit, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _int8() -> tuple[str, ...]:
    """The contender with 8-bit products, if the device supports them."""
    try:
        eightbit.choose("int8", pick_device())
    except BackendError:
        return ()
    return ("qlora_int8",)


def _fixed_work(peers: bool, batch_size: int, length: int) -> dict[str, tuple[str, ...]]:
    names = ("lora", "qlora", *_int8(), "lora_eager", "qlora_eager", *(("peft_lora", "peft_bnb_qlora") if peers else ()))
    commands = {name: ("lownibble.bench.contender", name, str(batch_size), str(length)) for name in names}
    return {"matmul": ("lownibble.bench.matmul",), **commands}


def _real_rows(
    stack: ExitStack, rows: Dataset, config: DataConfig, peers: bool, batch_size: int, length: int
) -> dict[str, tuple[str, ...]]:
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
    commands: dict[str, tuple[str, ...]] = {"qlora": ("lownibble.measuring.turns", exact)}
    commands |= {name: ("lownibble.measuring.turns", spec("int8")) for name in _int8()}
    if peers:
        commands["trl"] = ("lownibble.bench.trl_run", exact, "padded")
        commands["trl_packed"] = ("lownibble.bench.trl_run", exact, "packed")
    return commands


def _rates(given: list[dict[str, Any]]) -> list[float]:
    return [answer["tokens"] / answer["seconds"] for answer in given[1:]]


def _limit(given: list[dict[str, Any]], lora: dict[str, Any]) -> dict[str, Any]:
    """The machine's matrix-product FLOP/s in each round, and the matrix-product FLOPs per token."""
    if not given:
        return {}
    rates = [answer["flops"] / answer["seconds"] for answer in given[1:]]
    return {"flops_per_s": spread(rates), "rounds": rates, "flops_per_token": lora["flops_per_token"]}


def _figures(given: list[dict[str, Any]], facts: dict[str, Any], limit: dict[str, Any]) -> dict[str, Any]:
    rates = _rates(given)
    figures = {"tokens_per_s": spread(rates), "peak_bytes": max(answer["peak_bytes"] for answer in given), **facts}
    if any("padded_tokens" in answer for answer in given):
        figures["padding_share"] = 1 - sum(a["tokens"] for a in given) / sum(a["padded_tokens"] for a in given)
    if any("losses" in answer for answer in given):
        figures["losses"] = [loss for answer in given for loss in answer["losses"]]
    if limit:
        work = [rate * limit["flops_per_token"] for rate in rates]
        figures["limit_share"] = ratio(work, limit["rounds"])
    return figures
