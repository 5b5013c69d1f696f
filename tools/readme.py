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


def train() -> str:
    """The training step next to peers."""
    record = _record("train-cpu")
    lines = ["| contender | tokens/s, median (min to max) | peak GiB |", "| --- | ---: | ---: |"]
    for name, figures in record["contenders"].items():
        rate = figures["tokens_per_s"]
        spread = f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"
        lines.append(f"| {name} | {spread} | {figures['peak_bytes'] / 2**30:.2f} |")
    lines += ["", "| ratio of tokens/s within a round | median (min to max) |", "| --- | ---: |"]
    for name, ratio in record["ratios"].items():
        lines.append(f"| {name.replace('_vs_', ' / ')} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |")
    work = record["workload"]
    what = (
        f"{work['batch_size']} x {work['length']} tokens a step, r={work['r']} {work['targets']}, {work['rounds']} rounds in turn"
    )
    return "\n".join(lines) + f"\n\n({what}; {_where(record)}; `benchmarks/results/train-cpu.json`)"


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


SECTIONS: dict[str, Callable[[], str]] = {"compare": compare, "train": train, "kernels": kernels, "parity": parity}


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
