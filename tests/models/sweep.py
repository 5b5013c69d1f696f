"""What holds for every causal architecture; `python tests/models/sweep.py [MODEL_TYPE ...]` writes models.json in
benchmarks/results, of which docs/models.md is made (`make readme`). With `--check` (`make models`, half an hour) it writes
nothing and ends with 1 if a row is another than the record's; `test_sweep.py` does that for one architecture of each kind.

Each is built tiny with random weights (`architectures.py`), saved, and put through what a user does: load (logits those of
`from_pretrained`), train two steps with LoRA and with QLoRA, read the adapter back with PEFT (logits ours), merge (logits those
of the adapted model), plan (the methods that train, and no other). A cell is "yes" or why not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from architectures import build, model_types, quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

import lownibble as ln
from lownibble import record
from lownibble.config import DataConfig, TrainConfig
from lownibble.errors import ModelError

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "models.json"
COLUMNS = ("load", "LoRA", "QLoRA", "PEFT reads the adapter", "merge", "plan")
SAME = 1e-4
"""Largest difference of logits as a share of the largest: the same sums in another order."""


def logits(model: Any) -> torch.Tensor:
    """Logits on twelve tokens."""
    ids = torch.arange(2, 14).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def _same(one: torch.Tensor, other: torch.Tensor) -> None:
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=1))
    if not difference <= SAME:
        raise ValueError("other logits")


def _why(error: BaseException) -> str:
    """Short, and the same on every machine."""
    text = str(error).splitlines()[0] if str(error) else ""
    known = {
        "changes its logits in a way": "its head changes logits in a way not known",
        "put together in a way that is not known": "its body and head are put together in a way not known",
        "does not run with these layers packed": "its code uses packed weights itself",
        "incompatible with Mamba": "PEFT refuses adapters on Mamba's projections",
        "other logits": "other logits: PEFT renames some of its tensors as a checkpoint's",
        "match no linear module": "no linear layers but the head",
        "has no linear module": "no linear layers but the head",
        "has no gradient": "its code detaches its layers, so the loss has no gradient",
        **dict.fromkeys(
            ("DataDependent", "DynamicOutputShape"), "its step depends on values, so it cannot be traced without them"
        ),
        "plans": "other methods than those that train",
    }
    return next((words for sign, words in known.items() if sign in text), f"{type(error).__name__}")


def examine(model_type: str, folder: Path, base: Path, data: Path) -> dict[str, str]:
    """Column -> "yes" or why not; or {"built": why not}."""
    import peft

    tokenizer = AutoTokenizer.from_pretrained(base)
    train = TrainConfig(max_steps=2, batch_size=2, torch_compile=False, learning_rate=1e-2)
    with quiet():
        try:
            model = build(model_type, len(tokenizer))
            model.save_pretrained(folder)
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            expected = logits(reference)
        except Exception as error:
            return {"built": type(error).__name__}
        for file in base.iterdir():
            if file.name not in ("model.safetensors", "config.json", "generation_config.json"):
                shutil.copy(file, folder)
        found: dict[str, str] = {}

        def attempt(column: str, what: Any) -> Any:
            try:
                result = what()
            except Exception as error:
                found[column] = _why(error)
                return None
            found[column] = "yes"
            return result

        def load() -> None:
            _same(expected, logits(ln.load(str(folder))[0]))

        def tune(quant: str | None) -> Any:
            made, own = ln.load(str(folder), quant=quant)
            ln.add_lora(made, ln.LoraConfig(r=2))
            ln.train(made, own, DataConfig(path=str(data)), train)
            return made

        attempt("load", load)
        tuned = attempt("LoRA", lambda: tune(None))
        attempt("QLoRA", lambda: tune("nf4"))

        def plan() -> None:
            trains = {method for method, column in (("lora", "LoRA"), ("qlora", "QLoRA")) if found[column] == "yes"}
            made = ln.plan(str(folder), gpu="rtx-4090", max_length=16, batch_size=2, r=2)
            planned = {row.verdict.method for row in made.rows} - {"full"}
            if planned != trains:
                raise ValueError(f"plans {planned}")

        if "yes" in (found["LoRA"], found["QLoRA"]):
            attempt("plan", plan)
        else:
            with contextlib.suppress(ModelError):
                plan()
            found["plan"] = "refused"
        if tuned is None:
            return {column: found.get(column, "-") for column in COLUMNS}
        ln.save_adapter(tuned, folder / "adapter")

        def read_back() -> Any:
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            adapted = peft.PeftModel.from_pretrained(plain, folder / "adapter")
            _same(logits(tuned), logits(adapted))
            return adapted

        def merge() -> None:
            ln.merge(folder / "adapter", folder / "merged", onto="original", base=str(folder), measure_tokens=0)
            _same(logits(tuned), logits(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)))

        attempt("PEFT reads the adapter", read_back)
        attempt("merge", merge)
        return {column: found.get(column, "-") for column in COLUMNS}


def read_record() -> dict[str, Any]:
    """What benchmarks/results/models.json has."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def main() -> int:
    """Examine all, or those named, and write the record, or hold it against them."""
    named, known = [name for name in sys.argv[1:] if name != "--check"], read_record()["rows"]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_folders import write_data, write_model

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, data = Path(scratch) / "base", Path(scratch) / "data"
        base.mkdir()
        data.mkdir()
        write_model(base)
        rows_path = write_data(data)
        for model_type in named or model_types():
            folder = Path(scratch) / model_type
            folder.mkdir()
            rows[model_type] = examine(model_type, folder, base, Path(rows_path))
            shutil.rmtree(folder)
            print(model_type, rows[model_type], file=sys.stderr, flush=True)
    if "--check" in sys.argv:
        others = [model_type for model_type, row in rows.items() if row != known.get(model_type)]
        print(f"{len(others)} of {len(rows)} rows differ from the record: {others}")
        return bool(others)
    made = {**record.new("models"), "status": "ok", "environment": record.environment()}
    record.write(RECORD, {**made, "columns": COLUMNS, "rows": dict(sorted({**(known if named else {}), **rows}.items()))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
