"""Text and lists of the report: recommendation, configuration, model, data, environment, records.

Facts of the runs are compared: one that is the same for all methods is shown once, one that differs is shown for each and marked,
because figures measured under different conditions are not comparable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lownibble.config import CompareConfig
from lownibble.leaves import GROUPS, leaves
from lownibble.study.report.memory import size

_TOPICS = ("Quality", "Memory", "Speed")


@dataclass(frozen=True)
class Fact:
    """A name and its text for each method, or one text that holds for all (method '')."""

    name: str
    texts: list[tuple[str, str]]

    @property
    def differs(self) -> bool:
        """Whether the methods differ in it."""
        return len(self.texts) > 1


@dataclass(frozen=True)
class Option:
    """One option of the configuration: as given, and its default where it has one."""

    name: str
    value: str
    default: str | None
    description: str


def fact(name: str, runs: list[tuple[str, dict[str, Any]]], get: Callable[[dict[str, Any]], Any]) -> Fact | None:
    """What `get` returns for each run; runs where it is None are left out, and without any the fact is None."""
    found = [(method, str(value)) for method, run in runs if (value := get(run)) is not None]
    if len({text for _, text in found}) == 1:
        found = [("", found[0][1])]
    return Fact(name, found) if found else None


def _keep(facts: list[Fact | None]) -> list[Fact]:
    return [f for f in facts if f is not None]


def headline(comparison: dict[str, Any]) -> str:
    """The recommendation in a few words."""
    method = comparison.get("advice", {}).get("method")
    if method:
        return f"Use {method}"
    finished = any(s["status"] == "ok" for s in comparison["methods"])
    return "No recommendation" if finished else "No method finished"


def reasons(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """(topic or '', sentence) of each reason."""
    found = []
    for reason in comparison.get("advice", {}).get("reasons", []):
        topic, colon, rest = reason.partition(": ")
        found.append((topic, rest) if colon and topic in _TOPICS else ("", reason))
    return found


def options(config: dict[str, Any]) -> tuple[list[Option], list[Option]]:
    """The options that differ from their defaults, and the rest."""
    defaults = _flat(CompareConfig().to_dict())
    descriptions = {path: field.description or "" for path, field in leaves(CompareConfig)}
    changed: list[Option] = []
    kept: list[Option] = []
    for path, value in _flat(config).items():
        known = path in defaults
        option = Option(".".join(path), _text(value), _text(defaults[path]) if known else None, descriptions.get(path, ""))
        (kept if known and defaults[path] == value else changed).append(option)
    return changed, kept


def _flat(config: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in config.items():
        if key in GROUPS and isinstance(value, dict):
            found.update({(key, inner): v for inner, v in value.items()})
        else:
            found[(key,)] = value
    return found


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def environment(comparison: dict[str, Any], runs: list[tuple[str, dict[str, Any]]]) -> list[Fact]:
    """The hardware and software that the runs used."""
    known = [(m, run["environment"]) for m, run in runs if run.get("environment")]
    known = known or [("", comparison.get("environment", {}))]

    def kernels(env: dict[str, Any]) -> str | None:
        isa = env.get("kernel_isa")
        return f"{env['kernels']} ({isa})" if "kernels" in env and isa else env.get("kernels")

    def status(env: dict[str, Any]) -> str | None:
        return "; ".join(f"{name}: {text}" for name, text in env.get("kernel_status", {}).items()) or None

    packages = dict.fromkeys(name for _, env in known for name in env.get("versions", {}))
    return _keep(
        [
            fact("device", known, lambda e: e.get("device")),
            fact("device type", known, lambda e: e.get("device_type")),
            fact("CPU capability", known, lambda e: e.get("cpu_capability")),
            fact("threads", known, lambda e: e.get("threads")),
            fact("main memory", known, lambda e: size(e["ram_bytes"]) if "ram_bytes" in e else None),
            fact("kernels", known, kernels),
            fact("kernels available", known, status),
            fact("platform", known, lambda e: e.get("platform")),
            fact("Python", known, lambda e: e.get("python")),
            *(fact(name, known, lambda e, name=name: e.get("versions", {}).get(name)) for name in packages),  # type: ignore[misc]
        ]
    )


def data(runs: list[tuple[str, dict[str, Any]]]) -> list[Fact]:
    """The training and evaluation data of the runs."""
    known = [(m, run["data"]) for m, run in runs if run.get("data")]

    def count(key: str) -> Callable[[dict[str, Any]], str | None]:
        return lambda d: f"{d[key]:,}" if key in d else None

    return _keep(
        [
            fact("data", known, lambda d: d.get("name")),
            fact("form of the rows", known, lambda d: d.get("form")),
            fact("training rows", known, count("train_rows")),
            fact("evaluation rows", known, count("eval_rows")),
            fact("training rows cut at max_length", known, count("cut_rows")),
            fact("training rows, SHA-256", known, lambda d: d.get("train_digest")),
            fact("evaluation rows, SHA-256", known, lambda d: d.get("eval_digest")),
        ]
    )


def model(runs: list[tuple[str, dict[str, Any]]]) -> list[Fact]:
    """The trained model."""
    known = [(m, run["model"]) for m, run in runs if run.get("model")]

    def count(key: str) -> Callable[[dict[str, Any]], str | None]:
        return lambda m: f"{m[key]:,} ({100 * m[key] / m['parameters']:.2f} %)" if key in m and m.get("parameters") else None

    return _keep(
        [
            fact("class", known, lambda m: m.get("class")),
            fact("dtype of unquantised weights", known, lambda m: m.get("dtype")),
            fact("parameters, adapters included", known, lambda m: f"{m['parameters']:,}" if "parameters" in m else None),
            fact("trained parameters", known, count("trainable_parameters")),
            fact("parameters held in 4 bits", known, count("quantized_parameters")),
        ]
    )


def records(folder: Path, methods: list[str]) -> list[tuple[str, str]]:
    """(relative URL, description) of the files beside the page; `methods`: those that ran."""
    found = [("record.json", "the comparison: configuration, figures, advice")]
    for method in methods:
        found.append((f"{quote(method, safe='')}/record.json", f"{method}: every step and evaluation, memory, environment"))
        for name, what in (("events.jsonl", "events as they happened"), ("adapter/", "the trained adapter")):
            if (folder / method / name).exists():
                found.append((f"{quote(method, safe='')}/{name}", f"{method}: {what}"))
        seeds = [int(file.parent.name[5:]) for file in (folder / method).glob("seed-*/record.json")]
        found += [(f"{quote(method, safe='')}/seed-{seed}/record.json", f"{method}, seed {seed}") for seed in sorted(seeds)]
    return found
