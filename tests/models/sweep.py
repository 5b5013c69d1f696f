"""What holds for every causal architecture; `python tests/models/sweep.py [MODEL_TYPE ...]` writes docs/models.md.

Each is built tiny with random weights (`architectures.py`), saved, and put through what a user does: load (logits those of
`from_pretrained`), train two steps with LoRA and with QLoRA, read the adapter back with PEFT (logits ours), merge (logits those
of the adapted model). A cell is "yes" or why not.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import build, model_types, quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

import lownibble as ln
from lownibble.config import DataConfig, TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = ("load", "LoRA", "QLoRA", "PEFT reads the adapter", "merge")
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
        "other logits": "other logits: PEFT turns targets named like experts into fused parameters",
        "match no linear module": "no linear layers but the head",
        "has no linear module": "no linear layers but the head",
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


def page(rows: dict[str, dict[str, str]]) -> str:
    """docs/models.md."""
    examined = {name: row for name, row in rows.items() if "built" not in row}
    whole = sum(all(value == "yes" for value in row.values()) for row in examined.values())
    lines = [
        "# Models", "",
        f"Every causal architecture of transformers {transformers.__version__}, tiny and with random weights, put through what a",
        "user does: load (logits equal `from_pretrained`'s), two training steps with LoRA and with QLoRA, PEFT reads the",
        "adapter back (logits equal ours), merge onto the dense weights (logits equal the adapted model's). A cell is `yes` or",
        "why not.",
        "Written by `python tests/models/sweep.py`; `tests/models/test_sweep.py` holds every row.", "",
        f"{len(examined)} of {len(rows)} architectures were examined; all steps succeed for {whole}.", "",
        f"| model_type | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}",
        *(f"| {name} | {' | '.join(row[column] for column in COLUMNS)} |" for name, row in examined.items()), "",
        "Not examined, because a configuration cannot be shrunk by the names of its sizes, or transformers' own model fails on",
        "the shrunk one:", "",
        ", ".join(f"{name} ({row['built']})" for name, row in rows.items() if "built" in row) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def read_page() -> dict[str, dict[str, str]]:
    """The rows that docs/models.md has."""
    rows: dict[str, dict[str, str]] = {}
    text = PAGE.read_text()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 1 + len(COLUMNS) and cells[0] not in ("model_type", "---"):
            rows[cells[0]] = dict(zip(COLUMNS, cells[1:], strict=True))
    for part in text.splitlines()[-1].rstrip(".").split(", "):
        name, _, why = part.partition(" (")
        rows[name] = {"built": why.rstrip(")")}
    return rows


def main() -> int:
    """Examine all and write the page."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_folders import write_data, write_model

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, data = Path(scratch) / "base", Path(scratch) / "data"
        base.mkdir()
        data.mkdir()
        write_model(base)
        rows_path = write_data(data)
        for model_type in sys.argv[1:] or model_types():
            folder = Path(scratch) / model_type
            folder.mkdir()
            rows[model_type] = examine(model_type, folder, base, Path(rows_path))
            shutil.rmtree(folder)
            print(model_type, rows[model_type], file=sys.stderr, flush=True)
    known = read_page() if sys.argv[1:] else {}
    PAGE.write_text(page(dict(sorted({**known, **rows}.items()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
