"""`lownibble bench decode`: token-by-token generation on a 4-bit base, next to the dense model and to bitsandbytes.

Each contender is its own process and they take turns (`measuring/turns.py`). A turn greedily continues the same prompt by the
same number of tokens through transformers' `generate`: `nf4` with Lownibble's decoding loop (`decoding/`) on a CPU; the others,
including `nf4_layers`, with transformers' own. The first round is warm-up and is not counted.

Run as a program (`python -m lownibble.bench.decode NAME`), this module is one of the processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from lownibble.decoding import decode
from lownibble.measuring.turns import TurnTaker, answer_turns, play, ratio, spread
from lownibble.models import load, load_tokenizer, pick_device, pick_dtype, resolve

PROMPT = "The film follows a retired watchmaker who"
OURS, PEERS = ("dense", "nf4", "nf4_layers"), ("bitsandbytes",)
RATIOS = (("nf4", "dense"), ("nf4", "nf4_layers"), ("nf4", "bitsandbytes"))


def bench_decode(*, peers: bool = False, repeats: int = 5, tokens: int = 48) -> dict[str, Any]:
    """Measure tokens/s of greedy decoding of one sequence on the embedded model.

    Args:
        peers: measure bitsandbytes' layers too (it must be installed).
        repeats: counted rounds of `tokens` new tokens per contender.
    Raises:
        TrainingError: a contender's process failed.
    """
    names = OURS + (PEERS if peers else ())
    with ExitStack() as stack:
        takers = [stack.enter_context(TurnTaker(name, "lownibble.bench.decode", name)) for name in names]
        for taker in takers:
            taker.ready()
        answers = play(takers, repeats, tokens)
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in answers.items()}
    ratios = {f"{a}_vs_{b}": ratio(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    figures = {name: {"tokens_per_s": spread(rates[name]), "text": answers[name][-1]["text"]} for name in names}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    workload = {"model": "demo", "prompt": PROMPT, "new_tokens": tokens, "rounds": repeats}
    return {"workload": workload, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _bitsandbytes() -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device()
    dtype = pick_dtype("auto", device)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    folder = resolve("demo").folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, **placed).eval()


CONTENDERS: dict[str, Callable[[], Any]] = {
    "dense": lambda: load("demo")[0],
    "nf4": lambda: load("demo", quant="nf4")[0],
    "nf4_layers": lambda: load("demo", quant="nf4")[0],
    "bitsandbytes": _bitsandbytes,
}
"""Name -> factory of the model."""


def main(name: str) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    model, tokenizer = CONTENDERS[name](), load_tokenizer(resolve("demo"))
    prompt = tokenizer(PROMPT, return_tensors="pt").to(pick_device())
    loop = {"custom_generate": decode} if name == "nf4" and prompt["input_ids"].device.type == "cpu" else {}

    def do(tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                **prompt,
                **loop,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[0, prompt["input_ids"].shape[1] :].tolist()  # synchronises with the GPU
        seconds = time.perf_counter() - began
        return {"tokens": len(new), "seconds": seconds, "text": tokenizer.decode(new)}

    answer_turns({"contender": name}, do)


if __name__ == "__main__":
    main(sys.argv[1])
