"""`compare`: the same model and data with several methods, one process each, side by side.

    OUTPUT/<method>/record.json     each run's record, with adapter, events and checkpoints
    OUTPUT/bases/<name>/            bases that methods pack first (`bases.py`)
    OUTPUT/paired.json              interleaved speed of the methods
    OUTPUT/record.json              the comparison: configuration, a summary per method, the advice
    OUTPUT/report.html              all of it as a page

With several seeds each method runs with all of them, the later ones in OUTPUT/<method>/seed-N, and differences are over seeds.
If QLoRA computes in 8 bits, `qlora+exact` is added, which separates what 4-bit storage changes from what the products change.

A method that fails is a recorded result, and the others continue; one that cannot train on a quantised checkpoint is left out,
with the reason. With `resume`, finished methods are not run again; one that was made with other options is an error.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lownibble import record, stored
from lownibble.config import NEXT_TOKEN, CompareConfig, RunConfig, method_named
from lownibble.data import encode_for
from lownibble.data import load as load_data
from lownibble.errors import ConfigError, DataError, OutputError, TrainingError
from lownibble.lora import plan
from lownibble.lora.activated import for_shapes
from lownibble.measuring.stats import crossing
from lownibble.models import load_tokenizer, pick_device, resolve, skeleton
from lownibble.study import advice, bases, devices, digests, jobs, report
from lownibble.study.paired import paired_speed
from lownibble.study.processes import run_module, why_failed
from lownibble.study.records import read_record
from lownibble.study.worker import failed, failure_file
from lownibble.training.output import hold
from lownibble.training.starts import decide


def compare(config: CompareConfig | None = None, *, gpus_per_cell: int = 1) -> dict[str, Any]:
    """Run every method and compare them; returns the comparison's record, which is also written.

    Args:
        gpus_per_cell: GPUs that each method trains on, one process each; without GPUs, processes. With several, methods do not
            take turns.
    Raises:
        InputError: the configuration, the data or the model cannot be used by any method; nothing was run.
        OutputError: the output folder holds another run and `resume` is off, or a finished run with other options or of other
            rows; or another process is using it.
        DataError: the rows changed while it ran.
    """
    config = config or CompareConfig()
    folder = Path(config.train.output_dir or f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")
    held = [name for name in ("record.json", *config.methods) if (folder / name).exists()]
    if held and not config.train.resume:
        raise OutputError(f"'{folder}' holds another run ({', '.join(held)}). Choose another --output, or go on with --resume.")
    left_out = _check_inputs(config, gpus_per_cell)
    with hold(folder):
        return _compare(config, folder, left_out, gpus_per_cell)


def _compare(config: CompareConfig, folder: Path, left_out: dict[str, str], gpus_per_cell: int) -> dict[str, Any]:
    rows = {f"{name}_digest": side.digest for name, side in zip(("train", "eval"), load_data(config.data), strict=True)}
    dense = {method: _run_config(config, method, folder) for method in config.methods}
    configs = _on_bases(config, dense, folder)
    for method, run in configs.items():
        _check_finished(run, method, rows, on_base=run.model != config.model)
    runs = [
        {"config": run.to_dict(), "status": "left out", "error": left_out[method]} if method in left_out
        else _run(method, run, dense[method], rows, gpus_per_cell)
        for method, run in configs.items()
    ]  # fmt: skip
    if _is_added(config, dict(zip(configs, runs, strict=True))):
        added = _run_config(config, advice.EXACT, folder)
        _check_finished(added, advice.EXACT, rows, on_base=False)
        runs.append(_run(advice.EXACT, added, added, rows, gpus_per_cell))
        configs[advice.EXACT] = dense[advice.EXACT] = added
    summaries = [{**summarize(run), "method": method} for method, run in zip(configs, runs, strict=True)]
    pairs = _over_seeds(config, configs, dense, runs, rows, gpus_per_cell) if config.seeds > 1 else None
    add_steps_to_target(summaries, runs)
    finished = [s for s in summaries if s["status"] == "ok"]
    taking_turns = {s["method"]: configs[s["method"]] for s in finished}
    paired = _paired_speed(folder, taking_turns, [s["peak_bytes"] for s in finished], gpus_per_cell)
    for summary in finished:
        summary["paired_tokens_per_s"] = paired.get("tokens_per_s", {}).get(summary["method"])
    result = {
        **record.new("compare"),
        "status": "ok" if any(run["status"] == "ok" for run in runs) else "failed",
        "config": config.to_dict(),
        "gpus_per_cell": gpus_per_cell,
        "environment": next((run["environment"] for run in runs if "environment" in run), {}),
        "output": str(folder),
        "methods": summaries,
        "paired_speed": paired,
        "over_seeds": pairs,
        "advice": advice.advise(summaries, paired.get("ratios", {}), pairs),
    }
    record.write(folder / "record.json", result)
    report.write(folder / "report.html", result, runs)
    return result


def _is_added(config: CompareConfig, runs: dict[str, dict[str, Any]]) -> bool:
    """Whether `qlora+exact` belongs into the comparison: over seeds, of lora and a qlora that did not compute exactly."""
    if config.seeds == 1 or not {"lora", "qlora"} <= runs.keys() or advice.EXACT in runs:
        return False
    qlora = runs["qlora"]
    return qlora["status"] == "ok" and any(compute != "exact" for compute in qlora["model"]["compute"])


def _over_seeds(
    config: CompareConfig, configs: dict[str, RunConfig], dense: dict[str, RunConfig], first: list[dict[str, Any]],
    rows: dict[str, str], gpus: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the other seeds of the methods whose first finished, seed by seed; returns the differences over seeds."""
    results = {name: {config.train.seed: _scores(run)} for name, run in zip(configs, first, strict=True) if run["status"] == "ok"}
    for seed in range(config.train.seed + 1, config.train.seed + config.seeds):
        for name in results:
            again, unpacked = (_with_seed(of[name], seed) for of in (configs, dense))
            _check_finished(again, name, rows, on_base=again.model != config.model)
            run = _run(name, again, unpacked, rows, gpus)
            if run["status"] == "ok":
                results[name][seed] = _scores(run)
            else:
                print(f"{name}, seed {seed}: failed: {run['error']}", file=sys.stderr)
    return advice.over_seeds(results)


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    output = str(Path(config.train.output_dir or ".") / f"seed-{seed}")
    train = config.train.model_copy(update={"seed": seed, "output_dir": output})
    return config.model_copy(update={"train": train})


def _scores(run: dict[str, Any]) -> dict[str, Any]:
    """A run's scores as in the records of a study's cells."""
    last = run["evaluations"][-1]
    rows = {"accuracy": [float(right) for right in last["correct"]]} if last["correct"] else {}
    return {"scores": {**last["scores"], "loss": last["loss"]}, "row_scores": rows}


def _paired_speed(folder: Path, configs: dict[str, RunConfig], peaks: list[int], gpus: int) -> dict[str, Any]:
    """Interleaved speed, kept in paired.json: a resumed comparison of the same methods reuses it."""
    path, methods = folder / "paired.json", sorted(configs)
    known = stored.read_json(path) or None
    if gpus > 1:
        return {"skipped": devices.ALONE}
    if known is None or known.get("methods", methods) != methods:
        print("speed: the methods take turns", file=sys.stderr)
        try:
            found = paired_speed(configs, peaks)
        except TrainingError as error:
            found = {"skipped": str(error)}
        record.write(path, {**found, "methods": methods})
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _check_inputs(config: CompareConfig, gpus: int) -> dict[str, str]:
    """Raise the errors on which every method would fail: an input error is the caller's, not a result. Returns the methods that
    cannot train on weights as these are stored, with the reason."""
    pick_device(config.device)
    source = resolve(config.model, config.revision)
    how = stored.of_folder(source.folder)
    specs = {name: method_named(name) for name in config.methods}
    for name in specs:
        devices.check(_run_config(config, name, Path()), gpus)
    devices.slots(1, 1 if config.device == "cpu" else gpus)
    found = {
        name: bases.why_not(how, spec.method, repacked=spec.merge_aware or bool(spec.quantize)) for name, spec in specs.items()
    }
    left_out = {name: why for name, why in found.items() if why}
    if len(left_out) == len(config.methods):
        raise ConfigError(f"'{config.model}' cannot be trained with {' or '.join(left_out)}: {next(iter(left_out.values()))}")
    tokenizer = load_tokenizer(source)
    for side in load_data(config.data):
        encode_for(side, tokenizer, config.data, config.train)
    for name, spec in specs.items():
        if spec.method != "full" and name not in left_out:
            plan(skeleton(source, torch.float32), for_shapes(_run_config(config, name, Path()).lora), "default")
    return left_out


def _run_config(config: CompareConfig, name: str, folder: Path) -> RunConfig:
    """The run of a method, on the base as it is before anything is packed."""
    spec = method_named(name)
    shared = {name: getattr(config, name) for name in RunConfig.model_fields if name in CompareConfig.model_fields}
    own = {group: getattr(config, group).with_options(**getattr(spec, group)) for group in ("lora", "quant", "train")}
    own["train"] = own["train"].model_copy(update={"output_dir": str(folder / name)})
    run = RunConfig(**{**shared, **own, "method": spec.method, "merge_aware": spec.merge_aware})
    run, _ = decide(run)
    if spec.quantize:
        bases.packing(run, spec.quantize, folder)
    return run


def _on_bases(config: CompareConfig, configs: dict[str, RunConfig], folder: Path) -> dict[str, RunConfig]:
    """The runs as they train: on packed bases, where methods pack one first."""
    how = {name: options for name in configs if (options := method_named(name).quantize)}
    if not how:
        return configs
    model = digests.of_model(config.model, resolve(config.model, config.revision).folder)
    rows = load_data(config.data)[0].digest
    names = {name: bases.name(configs[name], options, model, rows) for name, options in how.items()}
    return {name: bases.on_base(run, folder / "bases" / names[name]) if name in names else run for name, run in configs.items()}


def _run(name: str, config: RunConfig, dense: RunConfig, rows: dict[str, str], gpus: int) -> dict[str, Any]:
    """The record of a method's run, after its base was packed, where the method asks for that. `dense`: before that.

    Raises:
        DataError: it read other rows than those of the digests `rows`.
    """
    changed = f"The rows of '{config.data.path}' changed while the comparison ran. Start it again with a new --output."
    if found := _finished(config):
        return found
    if how := method_named(name).quantize:
        base = Path(config.model)
        if not bases.is_packed(base):
            print(f"{name}: packing the base", file=sys.stderr)
            packed = jobs.perform(bases.job(dense, how, base))
            if packed["status"] != "ok":
                failure = failed(config, f"Its base could not be packed: {packed['error']}")
                record.write(Path(config.train.output_dir or ".") / "record.json", failure)
                return failure
            if not _is_of(rows, packed):
                shutil.rmtree(base)
                raise DataError(changed)
    found = run_in_processes(config, gpus)
    if not _is_of(rows, found):
        raise DataError(changed)
    return found


def _is_of(rows: dict[str, str], found: dict[str, Any]) -> bool:
    """Whether a record names no other rows than those with these digests."""
    return all(found.get("data", {}).get(name, digest) == digest for name, digest in rows.items())


_FREE = ("output_dir", "report_to", "resume", "save_steps", "memory_budget", "parallel", "fsdp_cpu_offload")
"""Options of [train] that a resumed comparison may change."""


def _check_finished(config: RunConfig, name: str, rows: dict[str, str], *, on_base: bool) -> None:
    """Refuse a finished run with other options or of other rows.

    Args:
        rows: digests of this comparison's. on_base: its model is a base of the comparison, whose folder may have moved.
    Raises:
        OutputError: it has; names them.
    """
    found = _finished(config)
    if found is None:
        return
    ours, theirs = _flat(config.to_dict()), _flat(found["config"])
    if on_base:
        ours["model"], theirs["model"] = Path(ours["model"]).name, Path(theirs["model"]).name
    changed = [f"{key}: {theirs[key]!r} -> {ours[key]!r}" for key in ours if key in theirs and ours[key] != theirs[key]]
    where = f"The run of '{name}' in '{Path(config.train.output_dir or '.').parent}' was made with other"
    if changed:
        raise OutputError(f"{where} options ({', '.join(changed[:5])}). Resume with the same ones, or use a new --output.")
    if any(found["data"][key] != digest for key, digest in rows.items()):
        raise OutputError(f"{where} rows: those of '{config.data.path}' have changed since. Use a new --output.")


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    single = {key: value for key, value in config.items() if key not in groups}
    of_groups = {f"{group}.{key}": value for group, of in groups.items() for key, value in of.items() if key not in _FREE}
    return single | of_groups


def _finished(config: RunConfig) -> dict[str, Any] | None:
    """The record of a finished run that is resumed."""
    path = Path(config.train.output_dir or ".") / "record.json"
    if config.train.resume and path.exists():
        found = read_record(path)
        if found is not None and found["status"] == "ok":
            return found
    return None


def run_in_processes(config: RunConfig, ranks: int = 1) -> dict[str, Any]:
    """Run `config` in separate processes, one a rank, and return its record."""
    path = Path(config.train.output_dir or ".") / "record.json"
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-") as aside:
        spec = Path(aside) / f"spec-{config.method}.json"
        spec.write_text(json.dumps(config.to_dict()))
        codes = run_module("lownibble.study.worker", str(spec), ranks=ranks)
        left = {rank: json.loads(file.read_text()) for rank in range(ranks) if (file := failure_file(spec, rank)).exists()}
    if not path.exists():
        error = why_failed(codes, {rank: failure["error"] for rank, failure in left.items()}, ranks)
        record.write(path, {**left.get(0, failed(config, error)), "error": error})
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run that a comparison shows."""
    summary: dict[str, Any] = {"method": run["config"]["method"], "status": run["status"]}
    if run["status"] != "ok":
        return {**summary, "error": run["error"]}
    memory, speed, evaluations = devices.memory_of(run), run["speed"], run["evaluations"]
    held = ("weights_bytes", "codes_bytes", "constants_bytes", "adapters_bytes", "gradients_bytes", "optimizer_bytes")
    peak = max(memory["train_peak_bytes"], memory["load_peak_bytes"])
    on_device = {key: 0 if memory.get("host_bytes") else memory[key] for key in held}  # offloaded shards are none of the peak
    saved = memory["saved_activation_bytes"]  # None on shards, where it is not counted: 'other' has it
    first, last = evaluations[0], evaluations[-1]
    return {
        **summary,
        **({"parallel": {key: run["parallel"][key] for key in ("mode", "ranks")}} if "parallel" in run else {}),
        "base_computed_in": computed_in(run["model"]),
        "peak_bytes": peak,
        "load_peak_bytes": memory["load_peak_bytes"],
        "train_peak_bytes": memory["train_peak_bytes"],
        "planned": memory.get("planned"),
        "bytes_by_kind": {
            **{key.removesuffix("_bytes"): n for key, n in on_device.items()},
            **({} if saved is None else {"activations": saved}),
            "other": max(0, peak - sum(on_device.values()) - (saved or 0)),
        },
        "tokens_per_s": speed["tokens_per_s"],
        "tokens_per_s_quartiles": speed["tokens_per_s_quartiles"],
        "samples_per_s": speed["samples_per_s"],
        "step_s": speed["step_s"],
        "seconds": run["seconds"],
        "trainable_parameters": run["model"]["trainable_parameters"],
        "adapter_bytes": run["adapter_bytes"],
        "eval_loss_before": first["loss"],
        "eval_loss": last["loss"],
        **({"perplexity": math.exp(min(last["loss"], 50))} if run["config"]["train"]["objective"] == NEXT_TOKEN else {}),
        "scores_before": first["scores"],
        "scores": last["scores"],
        "score_gain": advice.paired_difference(first["correct"], last["correct"]),
        "correct": last["correct"],
    }


def computed_in(model: dict[str, Any]) -> str:
    """Frozen-base matmul precision, e.g. float32 or int8; '/' separates several."""
    return "/".join(model["dtype"] if compute == "exact" else compute for compute in model["compute"] or ["exact"])


def add_steps_to_target(summaries: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """Add to each finished summary the target loss that all reached, and the steps and seconds to it.

    The target is the highest of the methods' lowest evaluation losses; the loss is interpolated linearly between evaluations.
    """
    finished = [(s, r) for s, r in zip(summaries, runs, strict=True) if s["status"] == "ok"]
    if not finished:
        return
    target = max(min(e["loss"] for e in run["evaluations"]) for _, run in finished)
    for summary, run in finished:
        steps = crossing([(e["step"], e["loss"]) for e in run["evaluations"]], target)
        assert steps is not None  # each method's lowest loss is the target or below
        summary["target_loss"] = target
        summary["steps_to_target"] = steps
        summary["seconds_to_target"] = steps * summary["step_s"]
