"""Render the measured figures in README.md and docs/*.md from the records: `python tools/readme.py [--check]`.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is rendered from the records under benchmarks/results/ and studies/,
never typed; one line is rendered between them on theirs. Every section of `SECTIONS` must appear on exactly one page; those of
CUDA, of preferences and of a new user are empty where there is no record. With --check nothing is written, and the exit code is 1
if a page differs from the records.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lownibble.study.hardware import CARDS, MODELS, NUMBERS, TRAIN, fewest_cards
from lownibble.study.report import study_page
from lownibble.study.table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

CONTENDERS = {
    "train-cpu": {
        "lora": "Lownibble LoRA",
        "qlora": "Lownibble QLoRA",
        "qlora_int8": "Lownibble QLoRA, `--compute int8`",
        "lora_eager": "Lownibble LoRA, not compiled",
        "qlora_eager": "Lownibble QLoRA, not compiled",
        "peft_lora": "PEFT LoRA",
        "peft_bnb_qlora": "PEFT + bitsandbytes QLoRA",
    },
    "train-real-cpu": {
        "qlora": "Lownibble QLoRA, packed",
        "qlora_int8": "Lownibble QLoRA, packed, `--compute int8`",
        "trl": "TRL + bitsandbytes, padded",
        "trl_packed": "TRL + bitsandbytes, packed",
    },
    "dropin-cpu": {
        "trl_lownibble": "TRL + Lownibble layers",
        "trl_lownibble_int8": 'TRL + Lownibble layers, `compute="int8"`',
        "trl_bitsandbytes": "TRL + bitsandbytes layers",
    },
    "decode-cpu": {
        "dense": "dense, transformers `generate`",
        "nf4": "NF4, `lownibble.decode`",
        "nf4_layers": "NF4, transformers `generate`",
        "bitsandbytes": "bitsandbytes NF4, transformers `generate`",
    },
    "latency-cpu": {
        "base": "dense base",
        "lora": "dense base + LoRA",
        "merged": "dense base, LoRA merged",
        "qlora_base": "NF4 base",
        "qlora": "NF4 base + LoRA",
        "qlora_merged": "NF4 base, LoRA merged (dense)",
        "qlora_decode": "NF4 base + LoRA, `lownibble.decode`",
        "peft_lora": "PEFT: dense base + LoRA",
        "peft_merged": "PEFT: dense base, LoRA merged",
    },
    "serve-cpu": {
        "ours_base": "no adapter",
        "ours_identical": "one adapter for all requests",
        "ours_distinct": "one adapter per request",
        "ours_alone": "one adapter per request, sent one after the other",
        "ours_uniform": "adapters drawn uniformly, cache holds half of them",
        "ours_zipf": "adapters drawn by Zipf's law, cache holds half of them",
        "peft_mixed": "PEFT, mixed batch (`adapter_names`)",
        "peft_switching": "PEFT, switching (`set_adapter`)",
        "merged": "adapter merged into the weights",
    },
    "paging-cpu": {
        "full": "full fine-tuning, AdamW",
        "full_paged": "full fine-tuning, paged AdamW",
        "lora": "LoRA, AdamW",
        "lora_paged": "LoRA, paged AdamW",
    },
}
"""Record -> its contenders' names -> how a reader would call them."""

CONTENDERS["train-cpu"] |= {"torchao_qlora": "PEFT + torchao NF4"}
CONTENDERS["train-cuda"] = {
    **CONTENDERS["train-cpu"],
    "qlora_fp8": "Lownibble QLoRA, `--compute fp8`",
    "qlora_again": "Lownibble QLoRA, again at the end",
    "peft_bnb_liger": "PEFT + bitsandbytes QLoRA + Liger",
    "unsloth_qlora": "Unsloth QLoRA",
}
CONTENDERS["experts-cpu"] = {
    "qlora_eager": "Lownibble QLoRA",
    "qlora_int8_eager": "Lownibble QLoRA, `--compute int8`",
    "peft_float32": "PEFT, dense float32",
    "peft_bfloat16": "PEFT, dense bfloat16",
}
CONTENDERS["decode-cuda"] = CONTENDERS["decode-cpu"] | {
    "eight_of_one": "NF4, 8 requests at once, one adapter for all",
    "eight_adapters": "NF4, 8 requests at once, an adapter for each",
}

FIGURES = {
    "tensors with other bytes than bitsandbytes'": "quantised tensors that differ from bitsandbytes' in any byte",
    "tensors compared": "quantised tensors compared",
    "largest relative difference of a loss from PEFT's": "training loss: largest relative difference from PEFT",
    "largest change that the adapter makes to a logit": "logits: largest change made by the adapter (for scale)",
    "our adapter in PEFT: largest difference of a logit": "Lownibble adapter loaded in PEFT: largest logit difference",
    "PEFT's adapter here: largest difference of a logit": "PEFT adapter loaded in Lownibble: largest logit difference",
    "dequantize 4096x4096 / fill of the same memory": "dequantise 4096x4096, against filling the same memory",
    "dequantize 576x1536 / fill of the same memory": "dequantise 576x1536, against filling the same memory",
    "dequantize 4096x4096 / bitsandbytes dequantize_4bit (which allocates)": (
        "dequantise 4096x4096, against bitsandbytes `dequantize_4bit` (allocates its output; ours does not)"
    ),
    "dequantize 4096x4096 / bitsandbytes' kernel alone, same output": (
        "dequantise 4096x4096, against the bitsandbytes kernel alone, preallocated output"
    ),
    "dequantize 4096x4096 / bitsandbytes, both allocating": "dequantise 4096x4096, against bitsandbytes, both allocating",
    "quantize 4096x4096 / bitsandbytes": "quantise 4096x4096, against bitsandbytes",
    "matrix-vector 4096x4096 / dense float32": "matrix-vector product 4096x4096, against dense float32",
    "matrix-vector 4096x4096 / bitsandbytes matmul_4bit, float32": (
        "matrix-vector product 4096x4096, against bitsandbytes `matmul_4bit`, float32"
    ),
    "matrix-vector 4096x4096 / bitsandbytes layer, bfloat16": (
        "matrix-vector product 4096x4096, against the bitsandbytes layer, bfloat16"
    ),
}
"""Headlines of the parity and kernel records, in plain terms."""

FAULTS = {
    "one error, then same bits as an undisturbed run": "stops with one error message, then resumes bit-identically",
    "same bits as an undisturbed run": "bit-identical to an uninterrupted run",
    "killed before the first checkpoint": "killed before the first checkpoint",
    "killed while it saved the result": "killed while saving the result",
    "killed while it wrote a checkpoint": "killed while writing a checkpoint",
    "all damaged: refused, with the damage named": "all checkpoints damaged: refused, with the damage named",
    "the one before is used, ": "falls back to the previous checkpoint, ",
    "for good: ends with the last good checkpoint, module named": "persistent: ends at the last good checkpoint, module named",
    "the step is skipped, module named": "step skipped, module named",
    "smaller passes, the same losses to rounding": "retried with smaller microbatches, same losses up to rounding",
    "saved, with a warning that it could not be read back": "saved, with a warning that it could not be verified",
    "within the smaller budget, the same losses to rounding": "stays within the smaller budget, same losses up to rounding",
    "refused, the first run has the same bits as an undisturbed run": "second one refused, first run unaffected (bit-identical)",
    "full disk": "disk full",
    "memory runs out": "out of memory",
    "smaller memory budget on resuming": "resumed with a smaller memory budget",
    "two processes on one folder": "two processes, one output folder",
    "embedded, qlora": "demo model, QLoRA",
    "small, lora": "tiny model, LoRA",
    "small, full": "tiny model, full fine-tuning",
}
"""What the fault record says -> the same in plain terms. Longer phrases come before those they contain."""


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def _where(record: dict[str, Any]) -> str:
    found = record["environment"]
    return f"{found['device']}, {found['threads']} threads, kernels: {found['kernels']} ({found.get('kernel_isa', 'torch')})"


def compare() -> str:
    """The comparison on the embedded default."""
    record = _record("compare-cpu")
    advice = f"Recommendation: **{record['advice']['method']}**. {' '.join(record['advice']['reasons'])}"
    return f"{markdown(record['methods'])}\n\n{advice}\n\n({_where(record)}; `benchmarks/results/compare-cpu.json`)"


def compare_seeds() -> str:
    """The same with several seeds: what it can tell."""
    record = _record("compare-seeds-cpu")
    lines = [f"Recommendation: **{record['advice']['method']}**.", "", *(f"- {reason}" for reason in record["advice"]["reasons"])]
    source = f"{record['config']['seeds']} seeds; {_where(record)}; `benchmarks/results/compare-seeds-cpu.json`"
    return "\n".join(lines) + f"\n\n({source})"


def _turns(name: str, what: Callable[[dict[str, Any]], str], peak: bool = True) -> str:
    """Contenders that took turns: their rates, and the ratios within a round."""
    record = _record(name)
    share = any("limit_share" in figures for figures in record["contenders"].values())
    names = CONTENDERS[name]
    columns = ["", "tokens/s, median (min to max)", *["peak GiB"] * peak, *["share of the matmul limit"] * share]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for contender, figures in record["contenders"].items():
        cells = [names[contender], _spread(figures["tokens_per_s"], 0 if peak else 1)]
        if peak:
            cells.append(f"{figures['peak_bytes'] / 2**30:.2f}")
        if share:
            cells.append(f"{figures['limit_share']['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ratio of tokens/s within a round | median (min to max) |", "| --- | ---: |"]
    lines += [f"| {_pair(name, pair)} | {_spread(ratio, 2)} |" for pair, ratio in record["ratios"].items()]
    work = record["workload"]
    source = f"{what(work)}, {work['rounds']} interleaved rounds; {_where(record)}; `benchmarks/results/{name}.json`"
    return "\n".join(lines) + f"\n\n({source})"


def _pair(name: str, pair: str) -> str:
    above, below = pair.split("_vs_")
    return f"{CONTENDERS[name][above]} / {CONTENDERS[name][below]}"


def _spread(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def study() -> str:
    """The articles' study: LoRA against QLoRA, task by task."""
    summary = json.loads((ROOT / "studies" / "articles" / "summary.json").read_text())
    lines = [
        "| task | score | LoRA - QLoRA (95% interval) | verdict | steps to a common loss, LoRA / QLoRA | tokens/s, LoRA / QLoRA "
        "| peak memory, LoRA / QLoRA |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for group in summary["groups"]:
        pair = next((p for p in group["pairs"] if (p["a"], p["b"]) == ("lora", "qlora")), None)
        if pair is None:
            continue
        test = pair["equivalence"]
        found = pair["scores"][test["metric"]]
        said = study_page.verdict(pair)
        ratios = [study_page.ratio(pair[f"{name}_ratio"]) for name in ("steps", "speed", "memory")]
        lines.append(f"| {' | '.join([group['task'], test['metric'], study_page.signed(found), said, *ratios])} |")
    counts = summary["counts"]
    return "\n".join(lines) + f"\n\n({counts['finished']} of {counts['cells']} runs finished; `studies/articles/summary.json`)"


def train() -> str:
    """The training step next to peers, at fixed work."""
    found = _turns("train-cpu", lambda w: f"{w['batch_size']} x {w['length']} tokens a step, r={w['r']} {w['targets']}")
    earlier = _record("train-intel-cpu")
    pairs = ("qlora_vs_peft_bnb_qlora", "qlora_int8_vs_peft_bnb_qlora", "lora_vs_peft_lora")
    ratios = "; ".join(f"{_pair('train-cpu', pair)} {_spread(earlier['ratios'][pair], 2)}" for pair in pairs)
    return found + (
        f"\n\nAn earlier version on a processor for which torch's MKL uses AVX-512: {ratios} "
        f"({_where(earlier)}; `benchmarks/results/train-intel-cpu.json`)."
    )


def train_real() -> str:
    """Training on real rows of uneven length next to TRL."""
    return _turns(
        "train-real-cpu",
        lambda w: f"{w['batch_size']} rows or packs of up to {w['length']} tokens a step, r={w['r']} {w['targets']}",
    )


def preference() -> str:
    """Steps of preference objectives next to TRL; empty without a record."""
    if (record := _there("preference-cpu")) is None:
        return ""
    columns = ["", "rows/s, median (min to max)", "/ TRL", "/ TRL, reference precomputed", "peak GiB", "TRL's"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for name, found in record["objectives"].items():
        ratios, peaks = found["ratios"], found["peak_bytes"]
        cells = [
            name, _spread(found["rows_per_s"]["ours"], 2),
            *(_spread(ratios[peer], 2) if peer in ratios else "-" for peer in ("trl", "trl_precomputed")),
            *(f"{peaks[whose] / 2**30:.2f}" if whose in peaks else "-" for whose in ("ours", "trl")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if record["failed"]:
        absent = "; ".join(f"{name} ({' '.join(why.split())[:160]})" for name, why in record["failed"].items())
        lines += ["", f"Not measured: {absent}."]
    work = record["workload"]
    source = (
        f"{work['model']}, {work['batch_size']} rows a step, r={work['r']} {work['targets']}, {work['rounds']} interleaved "
        f"rounds; {_where(record)}; `benchmarks/results/preference-cpu.json`"
    )
    head = "Steps beside TRL's trainers, the same rows in the same order (DPO's and ORPO's are two sequences each):"
    return "\n".join([head, "", *lines, "", f"({source})"])


def new_user() -> str:
    """A new user's way through the studio; empty without a record."""
    if (record := _there("new-user-cpu")) is None:
        return ""
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
    before, after = record["evaluation_losses"]
    return (
        f"Measured, from `pip install` in a new environment to the answers of base and adapter, trained on {record['rows']} rows "
        f"by the page alone: {record['total_seconds'] / 60:.1f} minutes ({steps}); evaluation loss {before:.2f} before and "
        f'{after:.2f} after. To "{record["question"]}", of which no row speaks, the adapter answers: '
        f'"{record["answers"]["adapter"]}" The machine\'s load was {min(record["load"]):.0f} to '
        f"{max(record['load']):.0f} on {record['cpus']} processors. ({_where(record)}; `benchmarks/results/new-user-cpu.json`)"
    )


def experts() -> str:
    """The training step of a mixture, and its time by the number of active experts; empty without a record."""
    record = _there("experts-cpu")
    if record is None:
        return ""
    body = _turns(
        "experts-cpu",
        lambda w: (
            f"{w['active']} of {w['experts']} experts, {w['batch_size']} x {w['length']} tokens a step, r={w['r']} on "
            f"{w['targets']}"
        ),
    )
    times = record["by_active"]
    lines = ["| active experts | seconds a step, median (min to max) |", "| ---: | ---: |"]
    lines += [f"| {k} | {_spread(seconds, 2)} |" for k, seconds in times["seconds"].items()]
    last = (
        f"The line {times['constant_s']:.2f} s + {times['per_active_s']:.3f} s per active expert is at most "
        f"{times['furthest']:.0%} away from them."
    )
    return "\n\n".join([body, "\n".join(lines), last])


def decode() -> str:
    """Token-by-token generation."""
    return _turns("decode-cpu", lambda w: f"{w['new_tokens']} tokens, one sequence, greedy", peak=False)


def dropin() -> str:
    """TRL on two kinds of 4-bit layers."""
    return _turns("dropin-cpu", lambda w: f"{w['batch_size']} rows a step, r={w['r']} {w['targets']}")


def serve() -> str:
    """Different adapters in one batch."""
    record = _record("serve-cpu")
    work, against = record["workload"], {"ours_distinct": "1"}
    for name in record["contenders"]:
        if (found := record["ratios"].get(f"ours_distinct_vs_{name}")) is not None:
            against[name] = _spread(found, 2)
    columns = ["", "tokens/s, median (min to max)", "one adapter per request / this row", "same greedy tokens"]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: |"]
    for name, found in record["contenders"].items():
        same = f"{found['same']:.1%}" if "same" in found else ""
        shown = CONTENDERS["serve-cpu"][name]
        lines.append(f"| {shown} | {_spread(found['tokens_per_s'], 0)} | {against.get(name, '')} | {same} |")
    source = f"{work['requests']} concurrent requests, {work['prompt_tokens']} prompt + {work['new_tokens']} new tokens, "
    source += f"rank {work['r']}; {work['adapters']} adapters where they are drawn"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/serve-cpu.json`)"


def prefix() -> str:
    """Prompts that begin alike."""
    record = _record("prefix-cpu")
    work, waves, ratios = record["workload"], record["waves"], record["ratios"]
    names = {
        "without": "without the prefix cache", "cold": "with it, a prefix that nobody has sent before",
        "warm": "with it, a prefix that each adapter has read before",
        "activated without": "activated adapters, without the prefix cache",
        "activated": "activated adapters with it, a prefix that nobody has sent before",
    }  # fmt: skip
    columns = ["", "median time to first token, s", "last, s", "/ without", "prompt tokens read", "same greedy tokens"]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, found in waves.items():
        against = _spread(ratios[f"{name}_vs_without"], 2) if f"{name}_vs_without" in ratios else "1"
        same = f"{found['same']:.1%}" if "same" in found else ""
        times = [_spread(found[key], 1) for key in ("first_token_s", "last_first_token_s")]
        lines.append(f"| {names[name]} | {times[0]} | {times[1]} | {against} | {found['read']:.0%} | {same} |")
    source = (
        f"{work['requests']} requests at once, of {work['adapters']} adapters; prompts of {work['prefix_tokens']} common and "
    )
    source += f"{work['own_tokens']} own tokens, rank {work['r']}, {work['rounds']} interleaved rounds"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/prefix-cpu.json`)"


def latency() -> str:
    """First token and those after it."""
    record = _record("latency-cpu")
    lines = ["| | time to first token, ms | time per further token, ms |", "| --- | ---: | ---: |"]
    for name, found in record["contenders"].items():
        times = [_spread({k: 1000 * v for k, v in found[what].items()}, 1) for what in ("first_token_s", "token_s")]
        lines.append(f"| {' | '.join([CONTENDERS['latency-cpu'][name], *times])} |")
    lines += ["", "| ratio of times within a round | first token | further token |", "| --- | ---: | ---: |"]
    for pair, found in record["ratios"].items():
        times = [_spread(found[what], 2) for what in ("first_token_s", "token_s")]
        lines.append(f"| {' | '.join([_pair('latency-cpu', pair), *times])} |")
    work = record["workload"]
    source = f"{work['new_tokens']} tokens, one sequence, greedy, {work['rounds']} interleaved rounds"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/latency-cpu.json`)"


def merge() -> str:
    """What merges keep, and their memory."""
    record = _record("merge-cpu")
    tune, memory = record["tune"], record["memory"]
    columns = ["merged onto", "fine-tuning gain retained", "KL, nats per token", "same top-1 token", "perplexity"]
    columns += ["weight error / LoRA delta, median (worst)", "peak memory / allowance"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for name, found in tune["models"].items():
        at, layers = found["label_tokens"], tune["layers"].get(name)
        kl = f"{at['kl']:.2g} ± {at['kl_standard_error']:.1g}" if "kl" in at else ""
        cells = [
            {"live": "(unmerged adapter)", "base": "(base, no adapter)"}.get(name, name),
            f"{found['kept']:.2%}" if "kept" in found else "",
            kl,
            f"{at['top1_agreement']:.1%}" if "kl" in at else "",
            f"{at['perplexity']:.4g}",
            f"{layers['error_over_delta_median']:.2g} ({layers['error_over_delta_worst']:.2g})" if layers else "",
            f"{memory['peak_bytes'][name] / memory['allowed_bytes']:.2f}" if name in memory["peak_bytes"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    source = f"{tune['label_tokens']} label tokens of {tune['rows']} rows; a checkpoint of {memory['stored_bytes'] / 1e6:.0f} MB"
    source += (
        f" in {memory['shards']} shards, allowance {memory['allowed_bytes'] / 1e6:.0f} MB (one shard and two tensors); with "
    )
    source += f"the comparison on {memory['measured_tokens']} tokens: "
    source += f"{memory['measuring_peak_bytes'] / memory['allowed_bytes']:.2f} of it"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/merge-cpu.json`)"


def quality() -> str:
    """QLoRA with int8 matmuls against exact compute."""
    record = _record("quality-cpu")
    lines = [
        "| task, metric | exact, mean (sd over seeds) | int8, mean (sd) | difference (standard error) | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for task, found in record["tasks"].items():
        for name, figure in found["figures"].items():
            cells = [f"{figure[f'{compute}_mean']:.4f} ({figure[f'{compute}_sd']:.4f})" for compute in ("exact", "int8")]
            difference = f"{figure['difference_mean']:+.4f} ({figure['difference_se']:.4f})"
            verdict = "below seed noise" if figure["within"] else "above seed noise"
            lines.append(f"| {Path(task).name}, {name.replace('_', ' ')} | {' | '.join(cells)} | {difference} | {verdict} |")
    work = record["workload"]
    source = f"{work['seeds']} seeds, {work['train']['max_steps']} steps of {work['train']['batch_size']} rows"
    source += f", up to {work['max_eval_rows']} evaluation rows; {_where(record)}; `benchmarks/results/quality-cpu.json`"
    return "\n".join(lines) + f"\n\n({source})"


def _headlines(name: str, unit: str) -> str:
    record = _record(name)
    lines = [f"| measurement | {unit} |", "| --- | ---: |"]
    lines += [f"| {FIGURES.get(key, key)} | {_short(value)} |" for key, value in record["headlines"].items() if value is not None]
    return "\n".join(lines) + f"\n\n({_where(record)}; `benchmarks/results/{name}.json`)"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def parity() -> str:
    """The same arithmetic as bitsandbytes and PEFT."""
    return _headlines("parity-cpu", "value")


def kernels() -> str:
    """The kernels next to memory fill, dense products and bitsandbytes."""
    return _headlines("kernels-cpu", "speed-up")


def memory() -> str:
    """Runs within a memory budget."""
    record = _record("memory-cpu")
    lines = [
        "| run | budget, GB | measured peak, GB | share used | what Lownibble changed to fit |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for run in record["runs"]:
        parts = [f"microbatches of {run['max_tokens']} instead of {run['whole_tokens']} tokens"] * (run["max_tokens"] is not None)
        parts += ["paged optimiser"] * run["paged"] + ["gradient checkpointing"] * run["gradient_checkpointing"]
        flags = (
            run["flags"].replace("--method ", "").replace("--torch-compile false", "").replace("--torch-compile true", "compiled")
        )
        flags = flags.replace("--batch-size ", "").replace(" --max-length ", " x ").replace("--packing", "packed")
        flags = flags.replace("--gradient-accumulation-steps ", "accumulation ")
        cells = [
            " ".join(flags.split()),
            f"{run['budget_bytes'] / 1e9:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f}",
            f"{run['share']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {', '.join(parts) or 'nothing'} |")
    refused = record["refused"]
    verdict = "fitted" if refused["the_named_budget_does"] else "did not fit"
    last = (
        f"A budget of {refused['budget']} was refused. The error named {refused['named']} as enough; a run with that {verdict}."
    )
    return "\n".join(lines) + f"\n\n{last}\n\n({_where(record)}; `benchmarks/results/memory-cpu.json`)"


def plan() -> str:
    """Planned and measured memory."""
    record = _record("plan-cpu")
    columns = ["run", "allocated, GB", "error of the plan", "process, GB", "error of the plan"]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for run in record["runs"]:
        parts = [
            f"{run['method']} {run['batch_size']} x {run['max_length']}",
            *[f"r {run['r']}"] * (run["method"] != "full" and run["r"] != 16),
            *["gradient checkpointing"] * run["gradient_checkpointing"],
            *["packed"] * run["packing"],
            *[run["optim"]] * (run["optim"] != "adamw"),
            *[f"accumulation {run['gradient_accumulation_steps']}"] * (run["gradient_accumulation_steps"] != 1),
        ]
        allocated, process = run["allocated_bytes"] / 1e9, run["process_bytes"] / 1e9
        cells = [", ".join(parts), f"{allocated:.3f}", f"{run['allocated_error']:+.2%}", f"{process:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {run['process_error']:+.1%} |")
    found = record["headlines"]
    summary = (
        f"Allocated memory: median error {found['allocated, median error']:.2%}, worst {found['allocated, worst error']:.2%}. "
        f"Process memory: {found['process, runs within the interval']} runs within the planned interval."
    )
    seconds = "; ".join(f"{name} {each:.2f}" for name, each in record["seconds"].items())
    summary += f"\n\nSeconds per plan, including Python start-up: {seconds}."
    return "\n".join(lines) + f"\n\n{summary}\n\n({_where(record)}; `benchmarks/results/plan-cpu.json`)"


def cards() -> str:
    """How many of which cards the articles' largest model takes, by plan."""
    found = {(each["method"], each["device"]): each for each in fewest_cards()}
    devices = list(dict.fromkeys(device for _, device in found))

    def cell(each: dict[str, Any]) -> str:
        if each["cards"] is None:
            return "none"
        extra = each["verdict"].removeprefix("fits").removeprefix(" with ")
        return f"{each['cards']}, {each['gib']:.1f} GiB on each{f' ({extra})' if extra else ''}"

    lines = [f"| {MODELS[-1]} | {' | '.join(devices)} |", f"| --- |{' --- |' * len(CARDS)}"]
    for method in dict.fromkeys(method for method, _ in found):
        lines.append(f"| {method} | {' | '.join(cell(found[method, device]) for device in devices)} |")
    tried = ", ".join(map(str, (1, *NUMBERS)))
    return "\n".join(lines) + (
        f"\n\n(Planned, not measured: batch {TRAIN.batch_size} x {TRAIN.max_length} on each card; several with fsdp; the "
        f"fewest of {tried} that fit by the upper bound, and with what.)"
    )


def parallel() -> str:
    """Two ranks on a CPU: what they cost, and what they hold."""
    record = _record("parallel-cpu")
    ratio, work = record["weak_scaling"]["ratio"], record["work"]
    lines = [
        f"Two ranks of one run (ddp, {work['rows_of_a_rank']} packs of {work['max_length']} tokens on each) run a step at "
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of the speed of two processes that train a run each "
        "at the same time, one thread each.", "",
        "| fsdp, two ranks | rank | tensors held, MB | planned, MB | shards and largest group, MB | peak of loading, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {method} | {each['rank']} | {each['held_bytes'] / 1e6:.1f} | {each['planned_bytes'] / 1e6:.1f} "
            f"| {each['load_bound_bytes'] / 1e6:.1f} | {each['load_peak_bytes'] / 1e6:.0f} |"
            for method, found in record["fsdp_memory"].items() for each in found["held"]
        ), "",
        f"({_where(record)}; the peak is the process's above its start, libraries that are imported meanwhile included; "
        "`benchmarks/results/parallel-cpu.json`)",
    ]  # fmt: skip
    return "\n".join(lines)


def published() -> str:
    """Plans beside published peaks."""
    record = _record("published")
    lines = [
        "| run (source) | memory figure | published, GB | error of the plan | assumed | known cause of the error |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in record["rows"]:
        cells = [
            f"{row['text']} ({row['source']})", row["figure"], f"{row['published_bytes'] / 1e9:.2f}", f"{row['error']:+.1%}",
            row["assumed"] or "nothing", row["why"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n(`benchmarks/results/published.json`)"


def paging() -> str:
    """Paged AdamW."""
    record = _record("paging-cpu")
    same = [method for method, equal in record["same_bits"].items() if equal]
    bits = f"Parameters bit-identical to unpaged AdamW after every step: {', '.join(same) or 'none'}."
    work = f"{record['workload']['page_budget']} of the optimiser states in memory"
    turns = _turns("paging-cpu", lambda w: f"{w['batch_size']} packs of {w['length']} tokens a step, {work}")
    return f"{turns}\n\n{bits}"


def faults(name: str = "faults-cpu") -> str:
    """Fault injection: how the runs ended."""
    record = _record(name)
    lines = ["| injected fault | run | outcome | count |", "| --- | --- | --- | ---: |"]
    for fault in record["faults"]:
        for outcome, count in fault["outcomes"].items():
            lines.append(f"| {' | '.join(map(_plain, (fault['fault'], fault['run'], outcome)))} | {count} |")
    return "\n".join(lines) + f"\n\n({_where(record)}; `benchmarks/results/{name}.json`)"


def _plain(text: str) -> str:
    for recorded in sorted(FAULTS, key=len, reverse=True):
        text = text.replace(recorded, FAULTS[recorded])
    return text


def soak() -> str:
    """A thousand adapters and clients that misbehave."""
    record = _record("soak-cpu")
    work, found, held = record["workload"], record["soak"], record["loaded"]
    well, adapters, memory = found["well_behaved"], found["adapters"], found["memory"]
    resident = memory["resident_bytes"]
    rows = {
        "requests of well-behaved clients: answered / lost": f"{well['answered']} / {well['lost']}",
        "repeated questions that got the same answer": f"{well['same']:.2%} of {well['asked_again']}",
        "abusive requests: sent / answered with 5xx": f"{found['misbehaviour']} / {found['server_errors']}",
        "adapter cache: hit rate, loads, evictions": f"{adapters['hit_rate']:.1%}, {adapters['loads']}, {adapters['evictions']}",
        "adapter cache: largest size": f"{adapters['largest_bytes'] / 1e6:.0f} of {work['budget_bytes'] / 1e6:.0f} MB",
        "process memory after the first quarter, median (min to max)": (
            f"{resident['median'] / 1e6:.0f} ({resident['min'] / 1e6:.0f} to {resident['max'] / 1e6:.0f}) MB"
        ),
        "process memory, last quarter / second quarter": f"{memory['growth']:.4f}",
        f"process memory with {held['adapters']} adapters / (base + sum of adapters)": (
            f"{held['ratio']:.3f} ({held['resident_bytes'] / 1e6:.0f} / ({held['base_bytes'] / 1e6:.0f} + "
            f"{held['adapter_bytes'] / 1e6:.0f}) MB)"
        ),
    }
    lines = ["| measurement | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    source = (
        f"{work['adapters']} adapters of {work['adapter_bytes'] / 1e6:.1f} MB by Zipf's law, {work['minutes']} minutes, "
        f"{work['clients']} clients, {work['misbehaving']} of them abusive"
    )
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/soak-cpu.json`)"


def cuda() -> str:
    """All that was measured on a CUDA device; empty without records."""
    parts = (_train_cuda, _decode_cuda, _kernels_cuda, _plan_cuda, _contact_cuda, _tests_cuda, _parts_cuda)
    return "\n\n".join(text for text in (part() for part in parts) if text)


def _there(name: str) -> dict[str, Any] | None:
    return _record(name) if (RESULTS / f"{name}.json").exists() else None


def _device(name: str, record: dict[str, Any]) -> str:
    found = record["environment"]
    partial = {"partial": "; ended before all was measured", "failed": "; ended with an error"}.get(record["status"], "")
    return f"{found['device']}, torch {found['versions']['torch']}; `benchmarks/results/{name}.json`{partial}"


def _of_model(work: dict[str, Any]) -> str:
    return f"{work['model']}{', random weights' * bool(work.get('random_weights'))}"


def _train_cuda() -> str:
    if (record := _there("train-cuda")) is None:
        return ""
    work = record["workload"]
    columns = [
        "training step", "tokens/s, median (min to max)", "allocated, GiB", "reserved, GiB", "first step, s", "launches",
        "device busy / step, ms",
    ]  # fmt: skip
    lines = [f"| {' | '.join([*columns, 'share of the matmul limit'])} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, found in record["contenders"].items():
        split = f", in microbatches of {found['max_tokens']} tokens" if found.get("max_tokens") else ""
        cells = [
            CONTENDERS["train-cuda"][name] + split, _spread(found["tokens_per_s"], 0), f"{found['peak_bytes'] / 2**30:.1f}",
            f"{found['reserved_bytes'] / 2**30:.1f}", f"{found['first_step_s']:.1f}", f"{found['launches_per_step']:,}",
            f"{found['device_ms']:.0f} / {1e3 * work['batch_size'] * work['length'] / found['tokens_per_s']['median']:.0f}",
            f"{found['limit_share']['median']:.2f}" if "limit_share" in found else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    source = f"{_of_model(work)}, {work['batch_size']} x {work['length']} tokens a step, r={work['r']} {work['targets']}"
    return "\n".join([*lines, *_apart("train-cuda", record), "", f"({source}; {_device('train-cuda', record)})"])


def _apart(name: str, record: dict[str, Any]) -> list[str]:
    """Ratios of contenders that ran one after another, and what was not measured."""
    lines = []
    if record["ratios"]:
        lines += ["", "| ratio of tokens/s | medians (least to largest of any two rounds) |", "| --- | ---: |"]
        lines += [f"| {_pair(name, pair)} | {_spread(ratio, 2)} |" for pair, ratio in record["ratios"].items()]
    absent = [
        f"{CONTENDERS[name].get(each, each)} ({' '.join(why.split())[:160]})"
        for each, why in (record["failed"] | record["missing"]).items()
    ]
    return [*lines, "", f"Not measured: {'; '.join(absent)}."] if absent else lines


def _decode_cuda() -> str:
    if (record := _there("decode-cuda")) is None:
        return ""
    lines = ["| decoding | tokens/s, median (min to max) |", "| --- | ---: |"]
    for name, found in record["contenders"].items():
        lines.append(f"| {CONTENDERS['decode-cuda'][name]} | {_spread(found['tokens_per_s'], 1)} |")
    work = record["workload"]
    source = f"{_of_model(work)}, {work['new_tokens']} tokens a sequence, greedy; {_device('decode-cuda', record)}"
    return "\n".join([*lines, *_apart("decode-cuda", record), "", f"({source})"])


def _kernels_cuda() -> str:
    if (record := _there("kernels-cuda")) is None:
        return ""
    lines = ["| kernels | speed-up |", "| --- | ---: |"]
    lines += [f"| {FIGURES.get(key, key)} | {_short(value)} |" for key, value in record["headlines"].items() if value is not None]
    return "\n".join([*lines, "", f"({_device('kernels-cuda', record)})"])


def _plan_cuda() -> str:
    if (record := _there("plan-cuda")) is None:
        return ""
    columns = ["planned against measured", "allocated, GB", "error of the plan", "reserved, GB", "error of the plan"]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for run in record["runs"]:
        bytes_ = [f"{run[f'{figure}_bytes'] / 1e9:.2f} | {run[f'{figure}_error']:+.1%}" for figure in ("allocated", "reserved")]
        how = "compiled" if run.get("compiled") else "not compiled"
        lines.append(f"| {run['method']} {run['batch_size']} x {run['max_length']}, {how} | {' | '.join(bytes_)} |")
    return "\n".join([*lines, "", f"({_of_model(record['workload'])}; {_device('plan-cuda', record)})"])


def _contact_cuda() -> str:
    if (record := _there("contact-cuda")) is None:
        return ""
    counts = Counter(each["status"] for each in record["checks"])
    failed = [f"`{each['name']}`" for each in record["checks"] if each["status"] == "failed"]
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    names = f" ({', '.join(failed)})" * bool(failed)
    return f"Checks of `bench contact`: {told}{names}. ({_device('contact-cuda', record)})"


def _parts_cuda() -> str:
    if (record := _there("parts-cuda")) is None:
        return ""
    told = ", ".join(f"{name} {part['seconds']:.0f} s ({part['status']})" for name, part in record["parts"].items())
    return f"The parts of `bench gpu` took: {told}. ({_of_model(record['workload'])}; {_device('parts-cuda', record)})"


def _tests_cuda() -> str:
    if (record := _there("gpu-tests-cuda")) is None:
        return ""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in record["tests"].items()) or "none ran"
    failed = f" ({', '.join(f'`{name}`' for name in record['failed'])})" * bool(record["failed"])
    return f"Tests marked `gpu`: {counts}{failed}. ({_device('gpu-tests-cuda', record)})"


def cuda_summary() -> str:
    """README: QLoRA on a CUDA device, in a sentence; empty without a record of it beside a peer."""
    record = _there("train-cuda")
    if record is None or "qlora" not in record["contenders"]:
        return ""
    work, found = record["workload"], record["contenders"]["qlora"]
    against = [
        f"{record['ratios'][f'qlora_vs_{peer}']['median']:.2f} of {CONTENDERS['train-cuda'][peer]}"
        for peer in ("unsloth_qlora", "peft_bnb_liger", "peft_bnb_qlora") if f"qlora_vs_{peer}" in record["ratios"]
    ]  # fmt: skip
    if not against:
        return ""
    rate = f"{found['tokens_per_s']['median']:,.0f} tokens/s in {found['peak_bytes'] / 2**30:.1f} GiB"
    text = (
        f"On {record['environment']['device']}, QLoRA trains {_of_model(work)} at {rate}, {work['batch_size']} x {work['length']}"
    )
    return f"{text} tokens a step{''.join(f'; {each}' for each in against)} ([all](docs/benchmarks.md#on-a-cuda-device))."


def speed_summary() -> str:
    """README: throughput next to peers, one row a benchmark."""
    rows = (
        ("QLoRA training step", "train-cpu", "qlora", "peft_bnb_qlora"),
        ("QLoRA training step, `--compute int8`", "train-cpu", "qlora_int8", "peft_bnb_qlora"),
        ("LoRA training step", "train-cpu", "lora", "peft_lora"),
        ("QLoRA on real chat rows, packed", "train-real-cpu", "qlora", "trl"),
        ("TRL trainer, 4-bit layers swapped", "dropin-cpu", "trl_lownibble", "trl_bitsandbytes"),
        ("decoding from a 4-bit base", "decode-cpu", "nf4", "bitsandbytes"),
        ("serving, one adapter per request", "serve-cpu", "ours_distinct", "peft_mixed"),
    )
    lines = ["| work | Lownibble, tokens/s | peer, tokens/s | peer | ratio within a round (min to max) |"]
    lines.append("| --- | ---: | ---: | --- | ---: |")
    for work, name, ours, peer in rows:
        record = _record(name)
        rates = [f"{record['contenders'][each]['tokens_per_s']['median']:.0f}" for each in (ours, peer)]
        ratio = _spread(record["ratios"][f"{ours}_vs_{peer}"], 2)
        lines.append(f"| {' | '.join([work, *rates, CONTENDERS[name][peer], ratio])} |")
    return "\n".join(lines) + f"\n\n(SmolLM2-135M; {_where(record)}; medians over interleaved rounds)"


def memory_summary() -> str:
    """README: peak memory next to peers, what a 4-bit base saves, and how far off the planner is."""
    rows = (
        ("QLoRA training step", "train-cpu", "qlora", "peft_bnb_qlora"),
        ("LoRA training step", "train-cpu", "lora", "peft_lora"),
        ("QLoRA on real chat rows, packed", "train-real-cpu", "qlora", "trl"),
    )
    lines = ["| work | Lownibble, peak GiB | peer, peak GiB | peer | ratio |", "| --- | ---: | ---: | --- | ---: |"]
    for work, name, ours, peer in rows:
        record = _record(name)
        peaks = [record["contenders"][each]["peak_bytes"] for each in (ours, peer)]
        cells = [work, *(f"{peak / 2**30:.2f}" for peak in peaks), CONTENDERS[name][peer], f"{peaks[0] / peaks[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    frozen = {
        each["method"]: sum(each["bytes_by_kind"][kind] for kind in ("weights", "codes", "constants")) / 2**20
        for each in _record("compare-cpu")["methods"]
    }
    found, runs = _record("plan-cpu")["headlines"], len(_record("plan-cpu")["runs"])
    median, worst = (f"{found[f'allocated, {which} error']:.2%}" for which in ("median", "worst"))
    facts = (
        f"All weights of this model take {frozen['lora']:.0f} MiB for LoRA (float32) and {frozen['qlora']:.0f} MiB for QLoRA.\n"
        f"Planner against {runs} measured runs on the CPU: median error of allocated memory {median}, worst {worst}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n\n(SmolLM2-135M; {_where(record)}; peak above the memory after imports)"


def quality_summary() -> str:
    """README: LoRA against QLoRA over tasks, and 8-bit against exact products."""
    summary = json.loads((ROOT / "studies" / "two-cores" / "summary.json").read_text())
    lines = [
        "| loss of held-out answers | LoRA | QLoRA, exact | QLoRA, int8 "
        "| LoRA - QLoRA (95% interval) | shown | exact - int8 | shown |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for group in summary["groups"]:
        means = {each["method"]: each["scores"]["loss"]["mean"] for each in group["methods"]}
        cells = [group["task"], *(f"{means[method]:.3f}" for method in ("lora", "qlora", "qlora-int8"))]
        for of in (("lora", "qlora"), ("qlora", "qlora-int8")):
            pair = next(pair for pair in group["pairs"] if (pair["a"], pair["b"]) == of)
            cells += [study_page.signed(pair["scores"]["loss"]), study_page.verdict(pair)]
        lines.append(f"| {' | '.join(cells)} |")
    record = _record("quality-cpu")
    figures = [figure for task in record["tasks"].values() for figure in task["figures"].values()]
    within, seeds = sum(figure["within"] for figure in figures), record["workload"]["seeds"]
    facts = (
        f"`--compute int8` against exact compute: {within} of {len(figures)} mean differences in loss, accuracy and label\n"
        f"probability are below the standard deviation over seeds ({seeds} seeds, {len(record['tasks'])} tasks)."
    )
    source = f"(SmolLM2-135M; {summary['counts']['finished']} runs, {len(summary['seeds'])} seeds; `studies/two-cores/`)"
    return "\n".join(lines) + f"\n\n{facts}\n\n{source}"


def planned(study: str) -> str:
    """Each planned comparison of a study by the loss, task by task."""
    summary = json.loads((ROOT / "studies" / study / "summary.json").read_text())
    lines = [
        "| task | A | B | loss A | loss B | A - B (95% interval) | shown | steps to a common loss, A / B | peak memory, A / B |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for group in summary["groups"]:
        means = {each["method"]: each["scores"]["loss"]["mean"] for each in group["methods"]}
        for pair in (pair for pair in group["pairs"] if pair["decision"] is not None):
            a, b = pair["a"], pair["b"]
            ratios = [study_page.ratio(pair[f"{name}_ratio"]) for name in ("steps", "memory")]
            cells = [group["task"], a, b, f"{means[a]:.3f}", f"{means[b]:.3f}", study_page.signed(pair["scores"]["loss"])]
            lines.append(f"| {' | '.join([*cells, study_page.verdict(pair), *ratios])} |")
    rates = []
    for group in summary["groups"]:
        of = [f"{m['method']} {m['learning_rate']:g}{'*' * m['at_edge']}" for m in group["methods"]]
        rates.append(f"{group['task']} {', '.join(of)}")
    counts, seeds = summary["counts"], max(len(pair["seeds"]) for group in summary["groups"] for pair in group["pairs"])
    told = f"Learning rates{' (* at the edge of the grid)' * ('*' in str(rates))}: {'; '.join(rates)}."
    ended = (
        f"({counts['finished']} runs, {counts['stopped']} not needed; {seeds} of {len(summary['seeds'])} seeds; "
        f"`studies/{study}/summary.json`)"
    )
    return "\n".join(lines) + f"\n\n{told}\n\n{ended}"


def codecs() -> str:
    """A run on each codec."""
    record = _record("codecs-cpu")
    train = record["workload"]["train"]
    lines = ["| base | bits a weight | loss at step 0 | loss at the end | allocated, MB | planned |", "| --- |" + " ---: |" * 5]
    for name, found in record["codecs"].items():
        lines.append(
            f"| {name} | {found['bits_per_weight']:.2f} | {found['loss_before']:.3f} | {found['loss_after']:.3f} | "
            f"{found['allocated_bytes'] / 1e6:.1f} | {found['allocated_error']:+.2%} |"
        )
    source = f"{train['max_steps']} steps of {train['batch_size']} rows, one seed; {_where(record)}"
    return "\n".join(lines) + f"\n\n({source}; `benchmarks/results/codecs-cpu.json`)"


def gptq() -> str:
    """Perplexity by way of packing."""
    record = _record("gptq-cpu")
    ways, work = record["ways"], record["workload"]
    columns = list(dict.fromkeys(name.split(" ", 1)[1] for name in ways if " " in name))
    names = {"rtn": "to nearest", "gptq": "Lownibble", "published": "GPTQ as published", "published, act-order": "with act-order"}
    lines = [f"| codec | {' | '.join(names[c] for c in columns)} |", "| --- |" + " ---: |" * len(columns)]
    for codec in dict.fromkeys(name.split(" ", 1)[0] for name in ways if " " in name):
        found = [ways.get(f"{codec} {column}") for column in columns]
        figures = [f"{way['perplexity']:.2f}" if way else "-" for way in found]
        lines.append(f"| {codec} | {' | '.join(figures)} |")
    source = (
        f"dense {ways['dense']['perplexity']:.2f}; perplexity over {work['held_out_tokens']} held-out tokens, groups of "
        f"{work['group']},\n{work['tokens']} calibration tokens; {_where(record)}"
    )
    return "\n".join(lines) + f"\n\n({source}; `benchmarks/results/gptq-cpu.json`)"


def of_study(name: str, against: Callable[[str], str] = lambda method: "lora", whose: str = "LoRA's") -> str:
    """The methods of the study in studies/NAME, each less the one that `against` names for it."""
    path = ROOT / "studies" / name / "summary.json"
    summary = json.loads(path.read_text())
    lines = [
        f"| task | method | bits | rate | loss before | after (95% interval) | less {whose} |",
        "| --- | --- |" + " ---: |" * 5,
    ]
    for group in summary["groups"]:
        less = {pair["b"]: pair["scores"]["loss"] for pair in group["pairs"] if pair["a"] == against(pair["b"])}
        for m in group["methods"]:
            if not m["scores"]:
                continue
            loss, rest = m["scores"]["loss"], less.get(m["method"])
            bits = f"{m['bits']:.2f}" if m["bits"] else "-"
            apart = "-" if rest is None else f"{-rest['mean']:+.3f} ({-rest['high']:+.3f} to {-rest['low']:+.3f})"
            lines.append(
                f"| {group['task']} | {m['method']} | {bits} | {m['learning_rate']:g} | {m['scores_before']['loss']:.3f} | "
                f"{loss['mean']:.3f} ({loss['low']:.3f} to {loss['high']:.3f}) | {apart} |"
            )
    counts = summary["counts"]
    return "\n".join(lines) + f"\n\n({counts['finished']} of {counts['cells']} runs finished; `studies/{name}/summary.json`)"


def chats() -> str:
    """What the number of turns costs."""
    record = _record("chats-cpu")
    few, many = record["workload"]["turns"]
    linear = {name: each for name, each in record["templates"].items() if each["template_ratio"]["median"] < many / few}
    rest = {name: each for name, each in record["templates"].items() if name not in linear}
    lines = [
        f"| templates | time of {many} turns / {few} turns | the template's own rendering | memory |", "| --- |" + " ---: |" * 3
    ]  # fmt: skip
    for words, of in ((f"{len(linear)} that are linear", linear), (f"{len(rest)} that go over all messages for each", rest)):
        if of:
            ranges = [
                f"{min(values):.2f} to {max(values):.2f}"
                for values in (
                    [each["time_ratio"]["median"] for each in of.values()],
                    [each["template_ratio"]["median"] for each in of.values()],
                    [each["memory_ratio"] for each in of.values()],
                )
            ]
            lines.append(f"| {words} | {' | '.join(ranges)} |")
    source = f"{record['workload']['words']:,} words, {record['workload']['rounds']} interleaved rounds; {_where(record)}"
    return "\n".join(lines) + f"\n\n({source}; `benchmarks/results/chats-cpu.json`)"


def models() -> str:
    """Every causal architecture of transformers."""
    record = _record("models")
    examined = {name: row for name, row in record["rows"].items() if "built" not in row}
    rest = [f"{name} ({row['built']})" for name, row in record["rows"].items() if "built" in row]
    columns = record["columns"]
    whole = sum(all(value == "yes" for value in row.values()) for row in examined.values())
    lines = [
        f"{len(examined)} of the {len(record['rows'])} causal architectures of transformers",
        f"{record['environment']['versions']['transformers']} were examined; all steps succeed for {whole}.", "",
        f"| model_type | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}",
        *(f"| {name} | {' | '.join(row[column] for column in columns)} |" for name, row in examined.items()), "",
        "Not examined, because a small configuration could not be built, or transformers' own model does not run with it:", "",
        f"{', '.join(rest)}.", "", "(`benchmarks/results/models.json`)",
    ]  # fmt: skip
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "chats": chats,
    "codecs": codecs,
    "gptq": gptq,
    "starts": partial(of_study, "starts"),
    "bits": partial(of_study, "bits"),
    "merge-aware": partial(of_study, "merge-aware", lambda method: method.removesuffix("-merge-aware"), "plain QLoRA's"),
    "models": models,
    "cuda": cuda,
    "cuda-summary": cuda_summary,
    "speed-summary": speed_summary,
    "memory-summary": memory_summary,
    "quality-summary": quality_summary,
    "compare": compare,
    "compare-seeds": compare_seeds,
    "study": study,
    "two-cores": partial(planned, "two-cores"),
    "gemma": partial(planned, "gemma"),
    "train": train,
    "train-real": train_real,
    "decode": decode,
    "experts": experts,
    "preference": preference,
    "new-user": new_user,
    "latency": latency,
    "serve": serve,
    "prefix": prefix,
    "soak": soak,
    "dropin": dropin,
    "merge": merge,
    "quality": quality,
    "plan": plan,
    "cards": cards,
    "parallel": parallel,
    "published": published,
    "memory": memory,
    "paging": paging,
    "faults": faults,
    "faults-ranks": partial(faults, "faults-ranks-cpu"),
    "kernels": kernels,
    "parity": parity,
}


def pages() -> list[Path]:
    """README.md and the pages under docs/ (not those in its folders, which are generated or never rendered)."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _between(name: str, text: str) -> str:
    room = "\n" if "\n" in text else ""
    return f"<!-- begin {name} -->{room}{text}{room}<!-- end {name} -->"


def rendered(texts: dict[Path, str]) -> dict[Path, str]:
    """The pages with every section rendered anew."""
    bodies = {name: _between(name, section()) for name, section in SECTIONS.items()}
    marker = re.compile(r"<!-- begin ([\w-]+) -->.*?<!-- end \1 -->", re.DOTALL)
    found = Counter(name for text in texts.values() for name in marker.findall(text))
    wrong = [f"'{name}' ({found[name]})" for name in sorted(SECTIONS.keys() | found) if name not in SECTIONS or found[name] != 1]
    if wrong:
        raise SystemExit(f"Every section must be known and on exactly one page. Wrong, with their counts: {', '.join(wrong)}.")
    return {path: marker.sub(lambda match: bodies[match[1]], text) for path, text in texts.items()}


def main(check: bool) -> int:
    """Render, or check."""
    before = {path: path.read_text() for path in pages()}
    after = rendered(before)
    stale = [path for path in before if before[path] != after[path]]
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"Not what the records say: {names}. Run: make readme", file=sys.stderr)
        return 1
    for path in () if check else stale:
        path.write_text(after[path])
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
