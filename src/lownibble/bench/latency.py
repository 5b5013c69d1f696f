"""`lownibble bench latency`: generation latency with no adapter, with an adapter, and with the adapter merged.

Each contender is its own process and they take turns (`measuring/turns.py`). A turn greedily continues one prompt through
transformers' `generate` and records the time to the first token (prefill) and the median time of the later tokens.
`qlora_decode` is the 4-bit base with its adapter in our own decoding loop (`custom_generate=lownibble.decode`) on a CPU. The
adapter has rank 16 on every linear layer; the merged models are written by `lownibble.merge`. The first round is warm-up and is
not counted.

Run as a program (`python -m lownibble.bench.latency NAME FOLDER`), this module is one of the processes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lownibble.config import LoraConfig
from lownibble.decoding import decode
from lownibble.exporting.merge import merge
from lownibble.lora import add_lora, load_adapter, save_adapter
from lownibble.measuring.turns import TurnTaker, answer_turns, play, ratio, spread
from lownibble.models import load, load_tokenizer, pick_device, pick_dtype, resolve

PROMPT = "The film follows a retired watchmaker who is asked by his granddaughter to repair the clock of the town hall. " * 4
ADAPTERS = {"dense": None, "nf4": "nf4"}
"""Adapter folder -> quantisation of its base; None: dense."""

OURS = ("base", "lora", "merged", "qlora_base", "qlora", "qlora_merged", "qlora_decode")
PEERS = ("peft_lora", "peft_merged")
RATIOS = (
    ("lora", "base"), ("merged", "base"), ("qlora", "qlora_base"), ("qlora", "base"), ("qlora_merged", "base"),
    ("qlora_decode", "base"), ("peft_lora", "base"), ("peft_merged", "base"), ("lora", "peft_lora"),
)  # fmt: skip
"""Pairs whose latencies are divided: above one, the first is slower."""


def bench_latency(*, peers: bool = False, repeats: int = 8, tokens: int = 32) -> dict[str, Any]:
    """Measure time to first token and time per later token on the embedded model.

    Args:
        peers: measure PEFT's adapter too (it must be installed).
        repeats: counted rounds of `tokens` new tokens per contender.
    Raises:
        TrainingError: a contender's process failed.
    """
    names = OURS + (PEERS if peers else ())
    with tempfile.TemporaryDirectory(prefix="lownibble-latency-") as folder, ExitStack() as stack:
        _write_adapters(Path(folder))
        takers = [stack.enter_context(TurnTaker(name, "lownibble.bench.latency", name, folder)) for name in names]
        for taker in takers:
            taker.ready()
        answers = play(takers, repeats, tokens)
    figures: dict[str, dict[str, Any]] = {}
    ratios: dict[str, dict[str, Any]] = {}
    for what in ("first_token_s", "token_s"):
        seconds = {name: [answer[what] for answer in given[1:]] for name, given in answers.items()}
        for name in names:
            figures.setdefault(name, {"text": answers[name][-1]["text"]})[what] = spread(seconds[name])
        for a, b in RATIOS:
            if a in seconds and b in seconds:
                ratios.setdefault(f"{a}_vs_{b}", {})[what] = ratio(seconds[a], seconds[b])
    headlines = {f"{n}: ms a token": 1000 * found["token_s"]["median"] for n, found in figures.items()}
    headlines |= {f"{n} (a token)": found["token_s"]["median"] for n, found in ratios.items()}
    workload = {"model": "demo", "prompt": PROMPT, "new_tokens": tokens, "rounds": repeats}
    return {"workload": workload, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _write_adapters(folder: Path) -> None:
    for name, quant in ADAPTERS.items():
        model, _ = load("demo", quant=quant)
        save_adapter(add_lora(model, LoraConfig(r=16, init_lora_weights="gaussian")), folder / name)
        merge(folder / name, folder / f"{name}-merged", onto="dequantized" if quant else "original", measure_tokens=0)


def _ours(quant: str | None, adapter: Path | None) -> Any:
    model, _ = load("demo", quant=quant)
    return model if adapter is None else load_adapter(model, adapter)


def _peft(folder: Path, merged: bool) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    device = pick_device()
    base = AutoModelForCausalLM.from_pretrained(resolve("demo").folder, dtype=pick_dtype("auto", device)).to(device)
    model = peft.PeftModel.from_pretrained(base, str(folder / "dense"))
    return model.merge_and_unload() if merged else model  # type: ignore[operator]


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "base": lambda folder: _ours(None, None),
    "lora": lambda folder: _ours(None, folder / "dense"),
    "merged": lambda folder: load(str(folder / "dense-merged"))[0],
    "qlora_base": lambda folder: _ours("nf4", None),
    "qlora": lambda folder: _ours("nf4", folder / "nf4"),
    "qlora_merged": lambda folder: load(str(folder / "nf4-merged"))[0],
    "qlora_decode": lambda folder: _ours("nf4", folder / "nf4"),
    "peft_lora": lambda folder: _peft(folder, merged=False),
    "peft_merged": lambda folder: _peft(folder, merged=True),
}
"""Name -> factory of the model."""


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Stopping criterion that never stops generation and records when each token was ready."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main(name: str, folder: str) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    model, tokenizer = CONTENDERS[name](Path(folder)).eval(), load_tokenizer(resolve("demo"))
    prompt = tokenizer(PROMPT, return_tensors="pt").to(pick_device())
    loop = {"custom_generate": decode} if name == "qlora_decode" and prompt["input_ids"].device.type == "cpu" else {}

    def do(tokens: int) -> dict[str, Any]:
        clock, began = _Clock(), time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                **prompt, **loop, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        later = [b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)]
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :].tolist())
        return {"first_token_s": clock.stamps[0] - began, "token_s": statistics.median(later), "text": text}

    answer_turns({"contender": name}, do)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
