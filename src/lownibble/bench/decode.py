"""`lownibble bench decode`: token-by-token generation on a 4-bit base, next to the dense model and to bitsandbytes.

Each contender is its own process. A turn greedily continues the same prompt by the same number of tokens through transformers'
`generate`: `nf4` with Lownibble's decoding loop (`decoding/`) on a CPU; the others, including `nf4_layers`, with transformers'
own. On a CPU they take turns (`measuring/turns.py`); on CUDA, where there is no loop of ours, they run one after another. The
first round is warm-up and is not counted. Random weights (`subject.py`) continue random token ids.

Run as a program (`python -m lownibble.bench.decode NAME MODEL`), this module is one of the processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lownibble.arch import read_config
from lownibble.bench.processes import Command, Measured, Save, in_turns, one_after_another
from lownibble.bench.subject import RANDOM, random_ids, subject
from lownibble.decoding import decode
from lownibble.errors import TrainingError
from lownibble.measuring.turns import answer_turns, ratio, ratio_apart, reserved_stdout, spread
from lownibble.models import load, load_tokenizer, pick_device, pick_dtype, resolve

PROMPT = "The film follows a retired watchmaker who"
PROMPT_TOKENS = 16
"""Length of a random prompt."""
OURS, PEERS = ("dense", "nf4", "nf4_layers"), ("bitsandbytes",)
RATIOS = (
    ("nf4", "dense"),
    ("nf4", "nf4_layers"),
    ("nf4", "bitsandbytes"),
    ("nf4_layers", "dense"),
    ("nf4_layers", "bitsandbytes"),
)
NOT_ON_CUDA = {"nf4": "Lownibble's decoding loop runs on CPUs only"}


def bench_decode(
    *, peers: bool = False, repeats: int = 5, tokens: int = 48, model: str = "demo", save: Save = lambda record: None
) -> dict[str, Any]:
    """Measure tokens/s of greedy decoding of one sequence.

    Args:
        peers: measure bitsandbytes' layers too; where they cannot be, the record says why.
        repeats: counted rounds of `tokens` new tokens per contender.
        model: what to decode with; see `subject.py`.
        save: called with the record so far, after each contender that ran alone.
    Raises:
        ModelError, ConfigError: the model cannot be measured.
        TrainingError: a contender of ours failed; on CUDA, all contenders.
    """
    cuda = pick_device().type == "cuda"
    names = [name for name in OURS + PEERS * peers if not (cuda and name in NOT_ON_CUDA)]
    with subject(model) as found:
        workload = {"model": found.name, "new_tokens": tokens, "rounds": repeats}
        workload |= {"prompt_tokens": PROMPT_TOKENS, "random_weights": True} if found.random else {"prompt": PROMPT}
        program = "lownibble.bench.decode"
        commands = {name: Command(program, (name, str(found.folder)), name in PEERS) for name in names}

        def record(measured: Measured) -> dict[str, Any]:
            return {
                "workload": workload,
                **_record(measured, ratio_apart if cuda else ratio),
                "missing": NOT_ON_CUDA if cuda else {},
            }

        if cuda:
            measured = one_after_another(commands, repeats, tokens, lambda so_far: save(record(so_far)))
        else:
            measured = in_turns(commands, repeats, tokens)
    if not measured.answers:
        raise TrainingError(f"No contender could be measured. {' '.join(measured.failed.values())}")
    return record(measured)


def _record(measured: Measured, divide: Callable[..., dict[str, float]]) -> dict[str, Any]:
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in measured.answers.items()}
    ratios = {f"{a}_vs_{b}": divide(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    figures = {
        name: {"tokens_per_s": spread(rates[name]), "text": given[-1]["text"]} for name, given in measured.answers.items()
    }  # fmt: skip
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    return {"contenders": figures, "ratios": ratios, "failed": measured.failed, "headlines": headlines}


def _bitsandbytes(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device()
    dtype = pick_dtype("auto", device)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, **placed).eval()


CONTENDERS: dict[str, Callable[[str], Any]] = {
    "dense": lambda folder: load(folder)[0],
    "nf4": lambda folder: load(folder, quant="nf4")[0],
    "nf4_layers": lambda folder: load(folder, quant="nf4")[0],
    "bitsandbytes": _bitsandbytes,
}
"""Name -> factory of the model of a folder."""


def main(name: str, folder: str) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    with reserved_stdout() as out:
        model, tokenizer, device = CONTENDERS[name](folder), load_tokenizer(resolve(folder)), pick_device()
        config = read_config(Path(folder))
        if RANDOM in config:
            ids = random_ids(config["vocab_size"], 1, 1, PROMPT_TOKENS)[0]
        else:
            ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        prompt = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
        loop = {"custom_generate": decode} if name == "nf4" and device.type == "cpu" else {}

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
            new = output[0, ids.shape[1] :].tolist()  # synchronises with the GPU
            seconds = time.perf_counter() - began
            return {"tokens": len(new), "seconds": seconds, "text": None if RANDOM in config else tokenizer.decode(new)}

        answer_turns({"contender": name}, do, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
