"""`lownibble bench decode`: token-by-token generation on a 4-bit base, next to the dense model and to bitsandbytes.

Each contender is its own process. A turn greedily continues the same prompt by the same number of tokens through transformers'
`generate`: `nf4` with Lownibble's decoding loop (`decoding/`); the others, including `nf4_layers`, with transformers' own. On a
CPU they take turns (`measuring/turns.py`); on CUDA they run one after another. The first round is warm-up and is not counted.
Random weights (`subject.py`) continue random token ids.

On CUDA one process more decodes eight requests at once, step by step as a server does: in each turn first with one adapter for
all (`eight_of_one`), then with an adapter for each (`eight_adapters`). Adapters are random, of rank 16 on all linear layers. Its
cache, and so its graphs, last for all turns, as a server's; `lownibble.decode` keeps those of the turn before, too. What plain
torch computed in the place of a kernel that failed there (`kernels/proven.py`) is in a contender's `plain_kernels`.

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
from lownibble.decoding import Decoder, choose, decode
from lownibble.errors import ConfigError, TrainingError
from lownibble.kernels import proven
from lownibble.kernels.decoder import Adapter, LowRank, Segment
from lownibble.measuring.turns import answer_turns, ratio, ratio_apart, reserved_stdout, spread
from lownibble.models import load, load_tokenizer, pick_device, pick_dtype, resolve

PROMPT = "The film follows a retired watchmaker who"
PROMPT_TOKENS = 16
"""Length of a random prompt."""
OURS, PEERS = ("dense", "nf4", "nf4_layers"), ("bitsandbytes",)
ON_CUDA = ("nf4", "eight_adapters", *PEERS, "dense", "nf4_layers")
"""Contenders on CUDA, in the order of what they are worth where time is short."""
REQUESTS, RANK, MOST_TOKENS = 8, 16, 1024
"""Requests at once, the rank of their adapters, and tokens that each has room for."""
RATIOS = (
    ("nf4", "dense"),
    ("nf4", "nf4_layers"),
    ("nf4", "bitsandbytes"),
    ("nf4_layers", "dense"),
    ("nf4_layers", "bitsandbytes"),
    ("eight_adapters", "eight_of_one"),
    ("eight_of_one", "nf4"),
)


def bench_decode(
    *, peers: bool = False, repeats: int = 5, tokens: int = 48, model: str = "demo", save: Save = lambda record: None
) -> dict[str, Any]:
    """Measure tokens/s of greedy decoding of one sequence; on CUDA of eight with adapters, too.

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
    names = [name for name in (ON_CUDA if cuda else OURS + PEERS) if peers or name not in PEERS]
    with subject(model) as found:
        workload = {"model": found.name, "new_tokens": tokens, "rounds": repeats}
        workload |= {"prompt_tokens": PROMPT_TOKENS, "random_weights": True} if found.random else {"prompt": PROMPT}
        program = "lownibble.bench.decode"
        commands = {name: Command(program, (name, str(found.folder)), name in PEERS) for name in names}

        def record(measured: Measured) -> dict[str, Any]:
            return {"workload": workload, **_record(_both(measured), ratio_apart if cuda else ratio), "missing": {}}

        if cuda:
            measured = one_after_another(commands, repeats, tokens, lambda so_far: save(record(so_far)))
        else:
            measured = in_turns(commands, repeats, tokens)
    if not measured.answers:
        raise TrainingError(f"No contender could be measured. {' '.join(measured.failed.values())}")
    return record(measured)


def _both(measured: Measured) -> Measured:
    """The turns with one adapter as those of a contender of their own."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, given in measured.answers.items():
        if "of_one" in given[0]:
            answers["eight_of_one"] = [{**answer, "seconds": answer["of_one"]} for answer in given]
        answers[name] = given
    return measured._replace(answers=answers)


def _record(measured: Measured, divide: Callable[..., dict[str, float]]) -> dict[str, Any]:
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in measured.answers.items()}
    ratios = {f"{a}_vs_{b}": divide(rates[a], rates[b]) for a, b in RATIOS if a in rates and b in rates}
    figures = {
        name: {"tokens_per_s": spread(rates[name]), "text": given[-1]["text"], "plain_kernels": given[-1]["plain_kernels"]}
        for name, given in measured.answers.items()
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
    "eight_adapters": lambda folder: load(folder, quant="nf4")[0],
    "bitsandbytes": _bitsandbytes,
}
"""Name -> factory of the model of a folder."""


def random_adapter(decoder: Decoder, seed: int) -> Adapter:
    """Branches for all linear layers, small enough to leave the model's outputs what they are."""
    generator = torch.Generator(decoder.model.device).manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        how: dict[str, Any] = {"generator": generator, "device": decoder.model.device, "dtype": decoder.model.dtype}
        return torch.randn(shape, **how).mul_(0.01)

    def branch(path: str) -> LowRank:
        linear = decoder.model.get_submodule(path)
        return LowRank(drawn(RANK, linear.in_features), drawn(linear.out_features, RANK), 1.0)

    return Adapter([[branch(path) for path in paths] for paths in decoder.paths])


def _several(model: Any, prompt: torch.Tensor) -> Callable[[int], dict[str, Any]]:
    """A turn continues the prompt `REQUESTS` times at once, with one adapter for all and then with one for each. Steps of a token
    each are timed, prompts are not."""
    decoder, n = choose(model), len(prompt)
    adapters = [random_adapter(decoder, seed) for seed in range(REQUESTS)]
    cache = decoder.cache(REQUESTS, MOST_TOKENS)

    def seconds(of_rows: list[Adapter], tokens: int) -> float:
        slots, segments = torch.arange(REQUESTS), [Segment(row, row + 1, one) for row, one in enumerate(of_rows)]
        logits = torch.cat([decoder.prompt(prompt, slot, cache, adapter=one) for slot, one in enumerate(of_rows)])
        chosen = logits.argmax(-1).cpu()
        began = time.perf_counter()
        for done in range(tokens):
            logits = decoder.step(chosen, slots, torch.full((REQUESTS,), n + done), cache, segments=segments)
            chosen = logits.argmax(-1).cpu()  # waits for the device
        return time.perf_counter() - began

    @torch.inference_mode()
    def do(tokens: int) -> dict[str, Any]:
        if n + tokens > MOST_TOKENS:
            raise ConfigError(
                f"{tokens} new tokens are more than eight requests have room for. Ask for at most {MOST_TOKENS - n}."
            )
        of_one = seconds(adapters[:1] * REQUESTS, tokens)
        took = {"seconds": seconds(adapters, tokens), "of_one": of_one}
        return {"tokens": REQUESTS * tokens, **took, "text": None, "plain_kernels": dict(proven.refused)}

    return do


def _one(model: Any, ids: torch.Tensor, tokenizer: Any, *, ours: bool, random: bool) -> Callable[[int], dict[str, Any]]:
    """A turn continues the prompt once through `generate`."""
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loop = {"custom_generate": decode} if ours else {}

    def do(tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                **prompt, **loop, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        new = output[0, ids.shape[1] :].tolist()  # synchronises with the GPU
        seconds = time.perf_counter() - began
        text = None if random else tokenizer.decode(new)
        return {"tokens": len(new), "seconds": seconds, "text": text, "plain_kernels": dict(proven.refused)}

    return do


def main(name: str, folder: str) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    with reserved_stdout() as out:
        model, tokenizer, device = CONTENDERS[name](folder), load_tokenizer(resolve(folder)), pick_device()
        config = read_config(Path(folder))
        if RANDOM in config:
            ids = random_ids(config["vocab_size"], 1, 1, PROMPT_TOKENS)[0]
        else:
            ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        do = (
            _several(model, ids[0])
            if name == "eight_adapters"
            else _one(model, ids.to(device), tokenizer, ours=name == "nf4", random=RANDOM in config)
        )
        answer_turns({"contender": name}, do, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
