"""Bases that a comparison or a study packs before its runs (method parts 'gptq' and '3.5bits').

    OUTPUT/bases/<name>/    a checkpoint as `lownibble quantize` writes it, over the runs' training rows

Its name is a digest of what determines it, so that runs that differ in their adapters or seeds share it, and one that was made of
other rows or with other options is not taken for it. Each is packed by a process of its own; a finished one is found again, an
interrupted one resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lownibble import stored
from lownibble.config import QuantConfig, QuantizeConfig, RunConfig
from lownibble.errors import ConfigError
from lownibble.study import digests

OPTIONS = ("rounding", "bits", "format", "calibration_tokens", "max_length", "seed")
"""Options of `lownibble quantize` that a method may set."""

BY_CONTENT = {"path", "eval_path", "split", "eval_split", "eval_fraction", "max_rows", "max_eval_rows"}
"""Options of [data] that a digest of the rows stands for."""


def packing(config: RunConfig, options: Mapping[str, Any], output: str | Path) -> QuantizeConfig:
    """How a run's base is packed; in this package's own format by default, which holds every codec as the options say.

    Raises:
        ConfigError: an option is not one of `OPTIONS` or invalid, or the method holds no packed base.
    """
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ConfigError(f"The 'quantize' of a method has unknown options: {', '.join(unknown)}. It has {', '.join(OPTIONS)}.")
    if config.method != "qlora" or config.merge_aware:
        what = "merge-aware training, whose base is int8 until the merge" if config.merge_aware else f"method '{config.method}'"
        raise ConfigError(f"The 'quantize' of a method cannot be used with {what}. Leave it out.")
    defaults: dict[str, Any] = {"format": "lownibble"}
    if _reads_rows(options):
        data = config.data
        defaults |= {
            "calibration": data.path, "calibration_tokens": data.calibration_tokens, "max_length": config.train.max_length,
        }  # fmt: skip
    return QuantizeConfig(
        model=config.model, revision=config.revision, device=config.device, quant=config.quant, output=str(output),
        **{**defaults, **options},
    )  # fmt: skip


def _reads_rows(options: Mapping[str, Any]) -> bool:
    return options.get("rounding") != "rtn" or options.get("bits") is not None


def name(config: RunConfig, options: Mapping[str, Any], model: str, rows: str) -> str:
    """The name of a run's packed base.

    Args:
        model: digest of the model, or its name. rows: digest of the training rows; '': not known.
    """
    how = packing(config, options, "")
    others = {"model", "revision", "output", "calibration", "device"}
    said = how.model_dump(mode="json", exclude_defaults=True, exclude=others)
    said.get("quant", {}).pop("compute", None)  # of training
    what: dict[str, Any] = {"model": model, "options": said}
    if _reads_rows(options):
        left_out = {"calibration_tokens"} | (BY_CONTENT if rows else set())
        data = config.data.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
        cut = None if config.data.overlength == "cut" else config.train.max_length
        what |= {"rows": rows, "data": data, "objective": config.train.objective, "longest": cut}
    return digests.of_values(what)


def why_not(how: Mapping[str, Any], method: str, *, repacked: bool) -> str:
    """Why a method cannot be run on weights that are stored like this (`stored.of_folder`), or ''. `repacked`: it needs dense
    ones, which it packs, now or when it has been trained."""
    if repacked and how:
        name = stored.title(how) or stored.method(how)
        return f"The weights are stored quantised, as {name}, and the method packs dense ones. Take qlora, or the dense model."
    return stored.why_not(how, method)


def job(config: RunConfig, options: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The job that packs the base of a run into a folder."""
    return {"job": "base", "config": config.to_dict(), "quantize": dict(options), "output": str(output)}


def is_packed(folder: Path) -> bool:
    """Whether a base is finished: its record is written last."""
    return (folder / "merge.json").is_file()


def on_base(config: RunConfig, folder: Path) -> RunConfig:
    """The run on its packed base: what is stored decides the codecs."""
    found: RunConfig = config.with_options(
        model=str(folder.resolve()), revision=None, quant=QuantConfig(compute=config.quant.compute)
    )
    return found


def pack(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job of `job`; returns the record of packing, with the digest of the rows that it read.

    Raises:
        LownibbleError: as `run_quantize`.
    """
    import torch

    from lownibble.calibration import row_length
    from lownibble.data import load
    from lownibble.exporting.quantize import run_quantize
    from lownibble.models import load_tokenizer, resolve, skeleton
    from lownibble.training.making import calibration_rows

    config = RunConfig(**spec["config"])
    how = packing(config, spec["quantize"], spec["output"])
    if not _reads_rows(spec["quantize"]):
        return run_quantize(how)
    source = resolve(config.model, config.revision)
    length = row_length(skeleton(source, torch.float32), how.max_length)
    tokenizer, rows = load_tokenizer(source), load(config.data)[0]
    found = run_quantize(how, rows=calibration_rows(config, rows, tokenizer, how.calibration_tokens, length, how.seed))
    return {**found, "data": {"train_digest": rows.digest}}
