"""`lownibble bench serve`: throughput with a different adapter per request, next to one shared adapter, PEFT and a merged model.

Each contender is its own process and they take turns (`measuring/turns.py`). A turn generates `tokens` greedy tokens for each of
`BATCH` requests with prompts of `PROMPT_TOKENS` random tokens, and reports generated tokens/s, prefill time included; every round
has new prompts, so none is cached. Ours go through the engine as requests of the HTTP server do. The adapters have rank 16 on
every linear layer, and values exactly representable in float16, the server's adapter dtype.

    ours_base                 no adapter
    ours_identical            one adapter for all requests
    ours_distinct             a different adapter for each request
    ours_alone                the same requests as ours_distinct, one after the other
    ours_uniform, ours_zipf   three batches of requests, adapters drawn from `ADAPTERS`, and an adapter budget for half of them:
                              loading and evicting included
    peft_mixed                PEFT's `adapter_names`, one batch
    peft_switching            PEFT's `set_adapter`, one request at a time
    merged                    the adapter merged into the weights, one batch: an upper bound for a shared adapter

PEFT and the merged model compute in float32 on the dequantised 4-bit base, so that greedy tokens can be compared: `same` is the
share of tokens that match ours_distinct. The first round is warm-up and is not counted.

Run as a program (`python -m lownibble.bench.serve NAME FOLDER`), this module is one of the processes.
"""

from __future__ import annotations

import queue
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lownibble.config import LoraConfig, ServeConfig
from lownibble.lora import add_lora, save_adapter
from lownibble.measuring.turns import TurnTaker, answer_turns, play, ratio, spread
from lownibble.models import load
from lownibble.quant import QuantLinear

BATCH, PROMPT_TOKENS, ADAPTERS, SEVERAL = 8, 32, 32, 3

OURS = ("ours_base", "ours_identical", "ours_distinct", "ours_alone", "ours_uniform", "ours_zipf")
PEERS = ("peft_mixed", "peft_switching", "merged")
RATIOS = (
    ("ours_distinct", "ours_identical"), ("ours_distinct", "ours_base"), ("ours_distinct", "ours_alone"),
    ("ours_uniform", "ours_identical"),
    ("ours_zipf", "ours_identical"), ("ours_distinct", "peft_mixed"), ("ours_distinct", "peft_switching"),
    ("ours_distinct", "merged"),
)  # fmt: skip
"""Pairs whose tokens/s are divided: above one, the first is faster."""


def bench_serve(*, peers: bool = False, repeats: int = 6, tokens: int = 32) -> dict[str, Any]:
    """Measure throughput on the embedded model.

    Args:
        peers: measure PEFT too (it must be installed).
        repeats: counted rounds of `tokens` new tokens per request.
    Raises:
        TrainingError: a contender's process failed.
    """
    names = OURS + (PEERS if peers else ())
    with tempfile.TemporaryDirectory(prefix="lownibble-serve-") as folder, ExitStack() as stack:
        adapter_bytes = write_adapters(Path(folder), ADAPTERS)
        takers = [stack.enter_context(TurnTaker(name, "lownibble.bench.serve", name, folder)) for name in names]
        for taker in takers:
            taker.ready()
        answers = play(takers, repeats, tokens)
    speeds = {name: [answer["tokens_per_s"] for answer in given[1:]] for name, given in answers.items()}
    figures: dict[str, dict[str, Any]] = {name: {"tokens_per_s": spread(found)} for name, found in speeds.items()}
    for name in ("ours_alone", "peft_mixed", "peft_switching"):
        if name in answers:
            figures[name]["same"] = _same(answers[name][1:], answers["ours_distinct"][1:])
    for name in ("ours_uniform", "ours_zipf"):
        figures[name] |= {key: answers[name][-1][key] for key in ("adapter_loads", "adapter_hits", "adapter_evictions")}
    ratios = {f"{a}_vs_{b}": ratio(speeds[a], speeds[b]) for a, b in RATIOS if a in speeds and b in speeds}
    headlines = {f"{name}: tokens/s": found["tokens_per_s"]["median"] for name, found in figures.items()}
    headlines |= {name: found["median"] for name, found in ratios.items()}
    workload = {
        "model": "demo", "requests": BATCH, "prompt_tokens": PROMPT_TOKENS, "new_tokens": tokens, "rounds": repeats, "r": 16,
        "adapters": ADAPTERS, "requests_of_several": SEVERAL * BATCH, "adapter_bytes": adapter_bytes,
    }  # fmt: skip
    return {"workload": workload, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _same(ones: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    pairs = [
        (a, b)
        for one, other in zip(ones, others, strict=True)
        for ours, theirs in zip(one["outputs"], other["outputs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float(sum(a == b for a, b in pairs) / len(pairs))


def write_adapters(folder: Path, n: int, kind: str = "a", **options: Any) -> int:
    """Write n different adapters with small weights, 'a0' and on; returns the bytes of one in float16.

    kind: what their names begin with. options: of `LoraConfig`.
    """
    model, _ = load("demo", quant="nf4", dtype=torch.float32)
    add_lora(model, LoraConfig(r=16, **options))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for number in range(n):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.copy_((0.02 * torch.randn(parameter.shape, generator=generator)).half())
        save_adapter(model, folder / f"{kind}{number}")
    return sum(2 * parameter.numel() for parameter in trained.values())


def _prompts(seed: int, n: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(n)]


def _names(mix: str, seed: int) -> list[str | None]:
    """The adapter of each request of a round."""
    draw, everyone = random.Random(seed), [f"a{number}" for number in range(ADAPTERS)]
    if mix == "uniform":
        return [draw.choice(everyone) for _ in range(SEVERAL * BATCH)]
    if mix == "zipf":
        return list(draw.choices(everyone, [1 / (rank + 1) for rank in range(ADAPTERS)], k=SEVERAL * BATCH))
    if mix == "base":
        return [None] * BATCH
    return ["a0"] * BATCH if mix == "identical" else list(everyone[:BATCH])


def _put(told: queue.Queue[tuple[int, Any]], index: int, event: Any) -> None:
    told.put((index, event))


def answers(
    engine: Any, prompts: Sequence[list[int]], names: Sequence[str | None], tokens: int
) -> tuple[list[list[int]], list[Any]]:  # fmt: skip
    """The tokens and the `End` of each request; all are sent at once, `names` are their adapters."""
    from lownibble.serve.request import End, Failed, Piece, Request

    told: queue.Queue[tuple[int, Any]] = queue.Queue()
    outputs: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, End] = {}
    engine.submit(
        *(
            Request(prompt, tokens, partial(_put, told, index), adapter=name, ignore_eos=True)
            for index, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        )
    )
    while len(ends) < len(prompts):
        index, event = told.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece) and event.token is not None:
            outputs[index].append(event.token.token)
        if isinstance(event, End):
            ends[index] = event
    return outputs, [ends[index] for index in range(len(prompts))]


def _ours(mix: str, folder: Path) -> Callable[[int], dict[str, Any]]:
    from lownibble.serve.server import make_service

    several = mix in ("uniform", "zipf")
    budget = "160MB" if several else "1GB"  # about half of 32 adapters of 9.8 MB
    service = make_service(
        ServeConfig(model="demo", adapters=str(folder), max_batch=BATCH, max_context=256, adapter_budget=budget)
    )
    rounds = iter(range(10_000))

    def do(tokens: int) -> dict[str, Any]:
        seed = next(rounds)
        names = _names(mix, seed)
        prompts, outputs, at_once = _prompts(seed, len(names)), [], 1 if mix == "alone" else len(names)
        began = time.perf_counter()
        for begin in range(0, len(names), at_once):
            sent = slice(begin, begin + at_once)
            outputs += answers(service.engine, prompts[sent], names[sent], tokens)[0]
        seconds = time.perf_counter() - began
        registry = service.registry
        return {
            "tokens_per_s": len(names) * tokens / seconds, "outputs": outputs, "adapter_loads": registry.loads,
            "adapter_hits": registry.hits, "adapter_evictions": registry.evictions,
        }  # fmt: skip

    return do


def _dense() -> Any:
    """The embedded model in float32 with the dequantised weights of the 4-bit base."""
    packed, _ = load("demo", quant="nf4", dtype=torch.float32)
    dense, _ = load("demo", dtype=torch.float32)
    for path, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(path).weight = torch.nn.Parameter(module.weight.dequantize(torch.float32), requires_grad=False)
    return dense


def _theirs(name: str, folder: Path) -> Callable[[int], dict[str, Any]]:
    import peft

    names = [f"a{number}" for number in range(BATCH)]
    model: Any = peft.PeftModel.from_pretrained(_dense(), str(folder / "a0"), adapter_name="a0")
    if name == "merged":
        model = model.merge_and_unload()
    else:
        for other in names[1:]:
            model.load_adapter(str(folder / other), other)
    model.eval()
    rounds = iter(range(10_000))

    def generate(prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
        found: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return found

    def do(tokens: int) -> dict[str, Any]:
        prompts, outputs = _prompts(next(rounds), BATCH), []
        began = time.perf_counter()
        with torch.inference_mode():
            if name == "peft_switching":
                for adapter, prompt in zip(names, prompts, strict=True):
                    model.set_adapter(adapter)
                    outputs += generate([prompt], tokens)
            else:
                outputs = generate(prompts, tokens, **({"adapter_names": names} if name == "peft_mixed" else {}))
        return {"tokens_per_s": BATCH * tokens / (time.perf_counter() - began), "outputs": outputs}

    return do


def main(name: str, folder: str) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    do = _ours(name.removeprefix("ours_"), Path(folder)) if name in OURS else _theirs(name, Path(folder))
    answer_turns({"contender": name}, do)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
