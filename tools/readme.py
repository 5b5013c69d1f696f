"""Put the recorded figures into README.md: `python tools/readme.py [--check]`.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is rendered from the records under benchmarks/results/, never typed.
With --check nothing is written, and the exit code is 1 if the README is not what the records say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lownibble.study.report import study_page
from lownibble.study.table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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


def _turns(name: str, what: Callable[[dict[str, Any]], str], peak: bool = True) -> str:
    """Contenders that took turns: their rates, and the ratios within a round."""
    record = _record(name)
    share = any("limit_share" in figures for figures in record["contenders"].values())
    columns = ["contender", "tokens/s, median (min to max)", *["peak GiB"] * peak, *["of the matmul limit"] * share]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for contender, figures in record["contenders"].items():
        cells = [contender, _spread(figures["tokens_per_s"], 0 if peak else 1)]
        if peak:
            cells.append(f"{figures['peak_bytes'] / 2**30:.2f}")
        if share:
            cells.append(f"{figures['limit_share']['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ratio of tokens/s within a round | median (min to max) |", "| --- | ---: |"]
    lines += [f"| {pair.replace('_vs_', ' / ')} | {_spread(ratio, 2)} |" for pair, ratio in record["ratios"].items()]
    work = record["workload"]
    source = f"{what(work)}, {work['rounds']} rounds in turn; {_where(record)}; `benchmarks/results/{name}.json`"
    return "\n".join(lines) + f"\n\n({source})"


def _spread(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def study() -> str:
    """The articles' study: LoRA against QLoRA, task by task."""
    summary = json.loads((ROOT / "studies" / "articles" / "summary.json").read_text())
    lines = [
        "| task | score | LoRA - QLoRA (95% interval) | | steps, LoRA / QLoRA | tokens/s, LoRA / QLoRA | memory, LoRA / QLoRA |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for group in summary["groups"]:
        pair = next((p for p in group["pairs"] if (p["a"], p["b"]) == ("lora", "qlora")), None)
        if pair is None:
            continue
        test = pair["equivalence"]
        found = pair["scores"][test["metric"]]
        said = study_page.verdict(found, test, "lora", "qlora", test["metric"])
        ratios = [study_page.ratio(pair[f"{name}_ratio"]) for name in ("steps", "speed", "memory")]
        lines.append(f"| {' | '.join([group['task'], test['metric'], study_page.signed(found), said, *ratios])} |")
    counts = summary["counts"]
    return "\n".join(lines) + f"\n\n({counts['finished']} of {counts['cells']} runs finished; `studies/articles/summary.json`)"


def train() -> str:
    """The training step next to peers, at fixed work."""
    return _turns("train-cpu", lambda w: f"{w['batch_size']} x {w['length']} tokens a step, r={w['r']} {w['targets']}")


def train_real() -> str:
    """Training on real rows of uneven length next to TRL."""
    return _turns(
        "train-real-cpu",
        lambda w: f"{w['batch_size']} rows or packs of up to {w['length']} tokens a step, r={w['r']} {w['targets']}",
    )


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
    lines = ["| contender | tokens/s, median (min to max) | ours_distinct / it | same tokens |", "| --- | ---: | ---: | ---: |"]
    for name, found in record["contenders"].items():
        same = f"{found['same']:.1%}" if "same" in found else ""
        lines.append(f"| {name} | {_spread(found['tokens_per_s'], 0)} | {against.get(name, '')} | {same} |")
    source = f"{work['requests']} requests at once, {work['prompt_tokens']} + {work['new_tokens']} tokens, rank {work['r']}"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/serve-cpu.json`)"


def latency() -> str:
    """First token and those after it."""
    record = _record("latency-cpu")
    lines = ["| contender | first token, ms | a token, ms |", "| --- | ---: | ---: |"]
    for name, found in record["contenders"].items():
        times = [_spread({k: 1000 * v for k, v in found[what].items()}, 1) for what in ("first_token_s", "token_s")]
        lines.append(f"| {' | '.join([name, *times])} |")
    lines += ["", "| ratio of times within a round | first token | a token |", "| --- | ---: | ---: |"]
    for pair, found in record["ratios"].items():
        times = [_spread(found[what], 2) for what in ("first_token_s", "token_s")]
        lines.append(f"| {' | '.join([pair.replace('_vs_', ' / '), *times])} |")
    work = record["workload"]
    source = f"{work['new_tokens']} tokens, one sequence, greedy, {work['rounds']} rounds in turn"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/latency-cpu.json`)"


def merge() -> str:
    """What merges keep, and their memory."""
    record = _record("merge-cpu")
    tune, memory = record["tune"], record["memory"]
    columns = ["merged onto", "of the tune kept", "KL, nats a token", "same token", "perplexity", "error / delta, median (worst)"]
    lines = [f"| {' | '.join(columns)} | peak / allowance |", f"| --- |{' ---: |' * len(columns)}"]
    for name, found in tune["models"].items():
        at, layers = found["label_tokens"], tune["layers"].get(name)
        kl = f"{at['kl']:.2g} ± {at['kl_standard_error']:.1g}" if "kl" in at else ""
        cells = [
            {"live": "(live adapter)", "base": "(base alone)"}.get(name, name),
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
        f" in {memory['shards']} shards, allowance {memory['allowed_bytes'] / 1e6:.0f} MB (shard and two tensors); comparing on "
    )
    source += f"{memory['measured_tokens']} tokens first: {memory['measuring_peak_bytes'] / memory['allowed_bytes']:.2f} of it"
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/merge-cpu.json`)"


def quality() -> str:
    """8-bit products against exact compute."""
    record = _record("quality-cpu")
    lines = [
        "| task, figure | exact (sd over seeds) | int8 (sd) | difference (standard error) | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for task, found in record["tasks"].items():
        for name, figure in found["figures"].items():
            cells = [f"{figure[f'{compute}_mean']:.4f} ({figure[f'{compute}_sd']:.4f})" for compute in ("exact", "int8")]
            difference = f"{figure['difference_mean']:+.4f} ({figure['difference_se']:.4f})"
            verdict = "smaller than between seeds" if figure["within"] else "larger than between seeds"
            lines.append(f"| {Path(task).name}, {name.replace('_', ' ')} | {' | '.join(cells)} | {difference} | {verdict} |")
    work = record["workload"]
    source = f"{work['seeds']} seeds, {work['train']['max_steps']} steps of {work['train']['batch_size']} rows"
    source += f", up to {work['max_eval_rows']} evaluation rows; {_where(record)}; `benchmarks/results/quality-cpu.json`"
    return "\n".join(lines) + f"\n\n({source})"


def _headlines(name: str) -> str:
    record = _record(name)
    lines = ["| figure | |", "| --- | ---: |"]
    lines += [f"| {key} | {value:.3g} |" for key, value in record["headlines"].items() if value is not None]
    return "\n".join(lines) + f"\n\n({_where(record)}; `benchmarks/results/{name}.json`)"


def parity() -> str:
    """The same arithmetic as bitsandbytes and PEFT."""
    return _headlines("parity-cpu")


def kernels() -> str:
    """The kernels next to memory fill, dense products and bitsandbytes."""
    return _headlines("kernels-cpu")


def memory() -> str:
    """Runs within a memory budget."""
    record = _record("memory-cpu")
    lines = ["| run | budget GB | measured peak GB | share | what was given up |", "| --- | ---: | ---: | ---: | --- |"]
    for run in record["runs"]:
        parts = [f"passes of {run['max_tokens']} tokens, not {run['whole_tokens']}"] * (run["max_tokens"] is not None)
        parts += ["states paged"] * run["paged"] + ["checkpointing"] * run["gradient_checkpointing"]
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
    verdict = "a run within that did" if refused["the_named_budget_does"] else "a run within that did not"
    last = f"A budget of {refused['budget']} was refused, with {refused['named']} as what would do; {verdict}."
    return "\n".join(lines) + f"\n\n{last}\n\n({_where(record)}; `benchmarks/results/memory-cpu.json`)"


def plan() -> str:
    """Planned and measured memory."""
    record = _record("plan-cpu")
    columns = ["run", "allocated GB", "planned", "process GB", "planned"]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for run in record["runs"]:
        parts = [
            f"{run['method']} {run['batch_size']} x {run['max_length']}",
            *[f"r {run['r']}"] * (run["method"] != "full" and run["r"] != 16),
            *["checkpointing"] * run["gradient_checkpointing"],
            *["packed"] * run["packing"],
            *[run["optim"]] * (run["optim"] != "adamw"),
            *[f"accumulation {run['gradient_accumulation_steps']}"] * (run["gradient_accumulation_steps"] != 1),
        ]
        allocated, process = run["allocated_bytes"] / 1e9, run["process_bytes"] / 1e9
        cells = [", ".join(parts), f"{allocated:.3f}", f"{run['allocated_error']:+.2%}", f"{process:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {run['process_error']:+.1%} |")
    found = record["headlines"]
    summary = (
        f"Allocated: median error {found['allocated, median error']:.2%}, worst {found['allocated, worst error']:.2%}. Process: "
        f"{found['process, runs within the interval']} within the interval."
    )
    seconds = "; ".join(f"{name} {each:.2f}" for name, each in record["seconds"].items())
    summary += f"\n\nSeconds of a plan, Python's start included: {seconds}."
    return "\n".join(lines) + f"\n\n{summary}\n\n({_where(record)}; `benchmarks/results/plan-cpu.json`)"


def published() -> str:
    """Plans beside published peaks."""
    record = _record("published")
    lines = [
        "| run | figure | published GB | planned | assumed | what is known of the error |",
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
    """AdamW's states paged."""
    record = _record("paging-cpu")
    same = [method for method, equal in record["same_bits"].items() if equal]
    bits = f"Same bits after each step: {', '.join(same) or 'none'}."
    work = f"page budget {record['workload']['page_budget']} of the states"
    turns = _turns("paging-cpu", lambda w: f"{w['batch_size']} packs of {w['length']} tokens a step, {work}")
    return f"{turns}\n\n{bits}"


def faults() -> str:
    """What became of runs to which faults were done."""
    record = _record("faults-cpu")
    lines = ["| fault | run | how it ended | count |", "| --- | --- | --- | ---: |"]
    for fault in record["faults"]:
        for outcome, count in fault["outcomes"].items():
            lines.append(f"| {fault['fault']} | {fault['run']} | {outcome} | {count} |")
    return "\n".join(lines) + f"\n\n({_where(record)}; `benchmarks/results/faults-cpu.json`)"


def soak() -> str:
    """A thousand adapters and clients that misbehave."""
    record = _record("soak-cpu")
    work, found, held = record["workload"], record["soak"], record["loaded"]
    well, adapters, memory = found["well_behaved"], found["adapters"], found["memory"]
    resident = memory["resident_bytes"]
    rows = {
        "requests of clients that mean well: answered / lost": f"{well['answered']} / {well['lost']}",
        "the same question, the same answer": f"{well['same']:.2%} of {well['asked_again']}",
        "misbehaviour: times / answers with 5xx": f"{found['misbehaviour']} / {found['server_errors']}",
        "adapters: hit rate, reads, evictions": f"{adapters['hit_rate']:.1%}, {adapters['loads']}, {adapters['evictions']}",
        "adapters held, most": f"{adapters['largest_bytes'] / 1e6:.0f} of {work['budget_bytes'] / 1e6:.0f} MB",
        "memory after the first quarter, median (min to max)": (
            f"{resident['median'] / 1e6:.0f} ({resident['min'] / 1e6:.0f} to {resident['max'] / 1e6:.0f}) MB"
        ),
        "its growth, last quarter / second": f"{memory['growth']:.4f}",
        f"memory with {held['adapters']} adapters / (before + their sum)": (
            f"{held['ratio']:.3f} ({held['resident_bytes'] / 1e6:.0f} / ({held['base_bytes'] / 1e6:.0f} + "
            f"{held['adapter_bytes'] / 1e6:.0f}) MB)"
        ),
    }
    lines = ["| figure | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    source = (
        f"{work['adapters']} adapters of {work['adapter_bytes'] / 1e6:.1f} MB by Zipf's law, {work['minutes']} minutes, "
        f"{work['clients']} clients, {work['misbehaving']} of them misbehaving"
    )
    return "\n".join(lines) + f"\n\n({source}; {_where(record)}; `benchmarks/results/soak-cpu.json`)"


SECTIONS: dict[str, Callable[[], str]] = {
    "compare": compare,
    "study": study,
    "train": train,
    "train-real": train_real,
    "decode": decode,
    "latency": latency,
    "serve": serve,
    "soak": soak,
    "dropin": dropin,
    "merge": merge,
    "quality": quality,
    "plan": plan,
    "published": published,
    "memory": memory,
    "paging": paging,
    "faults": faults,
    "kernels": kernels,
    "parity": parity,
}


def rendered(text: str) -> str:
    """The README with every section rendered anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        body = f"{begin}\n{section()}\n{end}"
        text, count = pattern.subn(lambda _, body=body: body, text)
        if count != 1:
            raise SystemExit(f"README.md must have one section '{name}'. Found {count}.")
    return text


def main(check: bool) -> int:
    """Render, or check."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = rendered(before)
    if check and before != after:
        print("README.md is not what the records say. Run: make readme", file=sys.stderr)
        return 1
    if not check:
        path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
