"""What training gives, bit for bit: `python tools/digests.py OUT.json [--source CHECKOUT]`; to compare, `--against OLD.json`.

Runs a handful of short trainings of the embedded model through the command line, each with other options, and writes a digest of
what each leaves: the adapter's (or model's) tensors, the training and the evaluation losses. Two versions of the code that should
compute the same are compared by running this on both, on the same machine: bits depend on the processor and the number of
threads, so no digests are kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--max-length", "64", "--max-rows", "96", "--max-eval-rows", "16", "--max-steps", "3", "--batch-size", "4"]
RUNS: dict[str, list[str]] = {
    "lora": ["--method", "lora"],
    "qlora": ["--method", "qlora", "--compute", "exact"],
    "qlora-int8": ["--method", "qlora", "--compute", "int8"],
    "qlora-auto": ["--method", "qlora"],
    "qlora-fp4": ["--method", "qlora", "--compute", "exact", "--quant-type", "fp4", "--block-size", "128", "--no-double-quant"],
    "qlora-packed": ["--method", "qlora", "--compute", "exact", "--packing"],
    "qlora-rest": [
        "--method", "qlora", "--compute", "exact", "--optim", "paged_adamw_8bit", "--gradient-checkpointing", "--use-rslora",
        "--lora-dropout", "0.1", "--gradient-accumulation-steps", "2", "--group-by-length", "--target-modules",
        "q_proj,down_proj",
    ],
    "qlora-bfloat16": ["--method", "qlora", "--compute", "exact", "--dtype", "bfloat16"],
    "qlora-compiled": ["--method", "qlora", "--compute", "exact", "--torch-compile", "true"],
    "full": ["--method", "full", "--learning-rate", "1e-5", "--max-steps", "2"],
}  # fmt: skip
"""Name -> flags of `lownibble train`."""


def digest(folder: Path) -> dict[str, Any]:
    """What a run left in its output folder."""
    from safetensors import safe_open

    state = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in sorted(opened.keys()):
                tensor = opened.get_tensor(key)
                state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.contiguous().view(-1).view(dtype=__import__("torch").uint8).numpy().tobytes())
    record = json.loads((folder / "record.json").read_text())
    return {
        "tensors": state.hexdigest(),
        "losses": [step["loss"] for step in record["steps"]],
        "evaluations": [each["loss"] for each in record["evaluations"]],
    }


def take(source: Path, names: list[str]) -> dict[str, Any]:
    """The digests of the code in a checkout."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            code = "import sys; from lownibble.cli.main import main; sys.exit(main())"
            command = [sys.executable, "-c", code, "train", *COMMON, *RUNS[name], "--output", folder]
            environment = {**os.environ, "PYTHONPATH": str(source / "src")}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr}")
            found[name] = digest(Path(folder))
            print(name, found[name]["tensors"][:16], found[name]["losses"], file=sys.stderr)
    return found


def main() -> int:
    """Take digests, and compare them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file for the digests")
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout whose code is run (default: this one)")
    parser.add_argument("--against", type=Path, help="digests to compare with; differences end in exit code 1")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    arguments = parser.parse_args()
    found = take(arguments.source.resolve(), arguments.runs)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())
    differ = [name for name in found if found[name] != before.get(name)]
    what = f"; differ: {', '.join(differ)}" if differ else ""
    print(f"{len(found) - len(differ)} of {len(found)} runs are bit-identical{what}")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
