"""`lownibble bench gptq`: perplexity of the embedded model packed to nearest, by our GPTQ, and by the published one.

Each way runs in its own process over the same calibration rows, and is evaluated on the same held-out ones. The published
algorithm is a plain transcription (`published`) over the dense model in memory: zero points, each group's scale found when its
first column is reached, with and without act-order. So the difference is in the algorithm, and in memory: `quantize_model` holds
one decoder layer, writes what it holds of the scales in the model's 16 bits, and evaluates what it wrote.

The embedded model's rows are 576 and 1536 long, so groups are of 64, which divides both, not of 128. Its weights come from a
4-bit file (Q4_1, groups of 32), decoded: int4 starts from what lies near such a grid. Few tokens, so that it takes minutes.

GPTQModel itself is not run: its distribution is built from source for one kind of GPU, and cannot be installed here.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lownibble.calibration import Moments, join_rows, walk
from lownibble.config import DataConfig, QuantConfig
from lownibble.data import encode, read
from lownibble.errors import ConfigError
from lownibble.exporting.quantize import quantize_model
from lownibble.models.head import Head, for_comparing, hidden_states
from lownibble.models.load import load, quantizable

GROUP, BLOCK = 64, 128
TOKENS, LENGTH, HELD_OUT = 2048, 256, 4096

CASES = {
    "int4": QuantConfig(quant_type="int4", block_size=GROUP),
    "int3": QuantConfig(quant_type="int3", block_size=GROUP),
    "nf4": QuantConfig(quant_type="nf4", block_size=GROUP),
}
BITS = {"int4": 4, "int3": 3}
"""Cases for which there is a published algorithm."""


def bench_gptq(*, peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Pack in each way and evaluate.

    Raises:
        ConfigError: `peers` or `repeats` is given; neither applies.
    """
    if peers or repeats != 1:
        raise ConfigError(
            "'bench gptq' packs once in each way, beside a transcription of the published algorithm. GPTQModel is not run: it is "
            "built from source for a GPU. Leave --peers and --repeats out."
        )
    found = {"dense": _run(None, "dense")}
    for name in CASES:
        for way in ("rtn", "gptq", *(("published", "published, act-order") if name in BITS else ())):
            found[f"{name} {way}"] = _run(name, way)
    over = {
        f"{name} gptq / {way}": found[f"{name} gptq"]["perplexity"] / found[f"{name} {way}"]["perplexity"]
        for name in BITS
        for way in ("rtn", "published", "published, act-order")
    }
    return {
        "workload": {
            "model": "demo", "data": "demo", "group": GROUP, "tokens": TOKENS, "row_tokens": LENGTH, "held_out_tokens": HELD_OUT,
        },
        "ways": found,
        "perplexity_ratios": over,
        "headlines": {**{f"{name}: perplexity": way["perplexity"] for name, way in found.items()}, **over},
    }  # fmt: skip


def _run(case: str | None, way: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_measure, case, way).result()
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
    print(f"bench gptq: {case or ''} {way}: {figures}", file=sys.stderr)
    return found


def _measure(case: str | None, way: str) -> dict[str, float]:
    """Pack and evaluate. The peak is that of the resident set while packing, less what the process had before."""
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if case is not None and way in ("rtn", "gptq"):
            rows = {"calibration": "demo", "calibration_tokens": TOKENS, "max_length": LENGTH} if way == "gptq" else {}
            quantize_model("demo", Path(folder) / "out", rounding=way, quant=CASES[case], device="cpu", **rows)
            seconds, peak = time.perf_counter() - start, _peak()
            model, tokenizer = load(str(Path(folder) / "out"), device="cpu")
        else:
            model, tokenizer = load("demo", device="cpu")
            if case is not None:
                _pack_published(model, tokenizer, BITS[case], way.endswith("act-order"))
            seconds, peak = time.perf_counter() - start, _peak()
        return {"perplexity": perplexity(model, _rows(tokenizer, 1, HELD_OUT)), "seconds": seconds, "peak_bytes": peak - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rows(tokenizer: Any, side: int, n_tokens: int) -> Tensor:
    """Joined rows of the demo's training (0) or test (1) side."""
    dataset = read("demo")[side]
    assert dataset is not None
    encoded = encode(dataset, tokenizer, DataConfig(path="demo"), LENGTH)
    return join_rows([each.input_ids for each in encoded.examples], n_tokens, LENGTH)


def perplexity(model: Any, rows_BT: Tensor) -> float:
    """exp of the mean cross-entropy of each row's next tokens."""
    total, count = 0.0, 0
    with for_comparing(model):
        head = Head(model)
        for row_T in rows_BT:
            logits = head(hidden_states(model, row_T[None], None)[0, :-1]).float()
            total += float(cross_entropy(logits, row_T[1:], reduction="sum"))
            count += len(row_T) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _pack_published(model: Any, tokenizer: Any, bits: int, act_order: bool) -> None:
    """Replace the weights by those that the published algorithm rounds them to."""

    def visit(found: Mapping[str, Moments]) -> None:
        for path, moments in found.items():
            weight = model.get_submodule(path).weight
            weight.data = published(weight.data.float(), moments.matrix, bits, GROUP, act_order).to(weight.dtype)

    walk(model, _rows(tokenizer, 0, TOKENS), list(quantizable(model, QuantConfig())), visit)


def published(weight_NK: Tensor, moments_KK: Tensor, bits: int, group: int, act_order: bool) -> Tensor:
    """The weight as GPTQ rounds it: `GPTQ.fasterquant` and `Quantizer.find_params` of github.com/IST-DASLab/gptq, transcribed.

    Asymmetric, without `mse`, `percdamp` 0.01, blocks of 128 columns.

    Args:
        weight_NK: (N, K) float32. moments_KK: the inputs' second moments, at any scale. bits: of a code.
        group: columns of a group, in the order in which they are rounded. act_order: columns with strong inputs first.
    """
    top = 2**bits - 1
    W, H = weight_NK.clone(), moments_KK.clone()
    columns = W.shape[1]
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    perm = torch.argsort(torch.diag(H), descending=True) if act_order else torch.arange(columns)
    W, H = W[:, perm], H[perm][:, perm]
    Q = torch.zeros_like(W)
    diag = torch.arange(columns)
    H[diag, diag] += 0.01 * torch.mean(torch.diag(H))
    H = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(H, upper=True)
    for i1 in range(0, columns, BLOCK):
        i2 = min(i1 + BLOCK, columns)
        W1, Hinv1 = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        Q1, Err1 = torch.zeros_like(W1), torch.zeros_like(W1)
        for i in range(i2 - i1):
            if (i1 + i) % group == 0:
                scale, zero = _find_params(W[:, i1 + i : i1 + i + group], top)
            w, d = W1[:, i], Hinv1[i, i]
            q = scale * (torch.clamp(torch.round(w / scale) + zero, 0, top) - zero)
            Q1[:, i] = q
            err1 = (w - q) / d
            W1[:, i:] -= err1.unsqueeze(1).matmul(Hinv1[i, i:].unsqueeze(0))
            Err1[:, i] = err1
        Q[:, i1:i2] = Q1
        W[:, i2:] -= Err1.matmul(Hinv[i1:i2, i2:])
    return Q[:, torch.argsort(perm)]


def _find_params(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of a group, (N,)."""
    low, high = x.min(1).values.clamp(max=0), x.max(1).values.clamp(min=0)
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / top
    return scale, torch.round(-low / scale)
