"""The study file: models x methods x tasks x seeds, and what all of them share.

    name = "first"
    seeds = [0, 1, 2]
    learning_rates = [1e-4, 3e-4, 1e-3]     # the best is found for each model, method and task before they are compared

    [models]
    small = "demo"

    [methods]
    lora = { method = "lora" }
    qlora = { method = "qlora" }
    qlora-r4 = { method = "qlora", lora = { r = 4 } }

    [tasks]
    sentiment = { kind = "classification", data = "demo" }
    inference = { kind = "nli", data = "data/nli", train = { max_length = 128 } }

    [train]
    max_steps = 40

A cell is one run. Its name is a digest of all that decides its result, so a finished one is found again whatever the file is
called or how its parts are ordered, and one whose settings have changed is another cell.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen
from pydantic import Field, model_validator

from lownibble.config import Data, DataConfig, Method, Options, RunConfig, build, read_toml
from lownibble.errors import ConfigError
from lownibble.study.tasks import KINDS, with_templates

SCHEMA = 1
"""Of a cell's record; a change makes all cells new."""

_NO_PART = {"output_dir", "report_to", "resume", "save_steps"}
"""Options of training that decide where things go and not what comes out."""


class MethodSpec(Options):
    """A method, with any of its settings."""

    method: Method
    lora: dict[str, Any] = Field({}, description="options of [lora]")
    quant: dict[str, Any] = Field({}, description="options of [quant]")
    train: dict[str, Any] = Field({}, description="options of [train]")
    dtype: str = Field("auto", description="as in a run's configuration")


class TaskSpec(Options):
    """A task: its kind, its data, and what its runs need besides."""

    kind: str = Field(description=f"one of {', '.join(KINDS)}")
    data: Data
    train: dict[str, Any] = Field({}, description="options of [train], e.g. max_length")

    @model_validator(mode="after")
    def _known(self) -> TaskSpec:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1, cutoff=0.3)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"There is no task kind '{self.kind}'.{hint} Kinds: {', '.join(KINDS)}.")
        return self


class StudySpec(Options):
    """A study file's contents."""

    name: Annotated[str, MinLen(1)] = Field(description="what the study is called")
    seeds: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)] = Field([0, 1, 2], description="seeds of every cell")
    learning_rates: list[Annotated[float, Gt(0)]] = Field([], description="the grid; empty: as in [train]")
    tuning_seed: Annotated[int, Ge(0)] = Field(1000, description="seed of the runs that find the learning rate")
    models: Annotated[dict[str, str], MinLen(1)] = Field(description="name -> 'demo', a folder, a .gguf file or a hub id")
    methods: Annotated[dict[str, MethodSpec], MinLen(1)] = Field(description="name -> method and settings")
    tasks: Annotated[dict[str, TaskSpec], MinLen(1)] = Field(description="name -> task")
    train: dict[str, Any] = Field({}, description="options of [train] for all cells")

    @model_validator(mode="after")
    def _makes_sense(self) -> StudySpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"The 'seeds' of a study must be distinct. Got {self.seeds}.")
        if self.tuning_seed in self.seeds and self.learning_rates:
            raise ValueError(f"The 'tuning_seed' {self.tuning_seed} must not be among the seeds that are compared.")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study. `tuning`: it is there to find a learning rate."""

    model: str
    method: str
    task: str
    kind: str
    config: RunConfig
    tuning: bool = False

    @property
    def seed(self) -> int:
        """Of its data order and initialisation."""
        return self.config.train.seed

    @property
    def digest(self) -> str:
        """Of all that decides what comes out."""
        contents = self.config.to_dict()
        contents["train"] = {key: value for key, value in contents["train"].items() if key not in _NO_PART}
        text = json.dumps({"schema": SCHEMA, "kind": self.kind, "config": contents}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_study(path: str | Path) -> StudySpec:
    """The study in a TOML file; data paths are relative to the file's folder.

    Raises:
        ConfigError: it cannot be read, an axis or an option is not known, or a combination makes no run.
    """
    contents, folder = read_toml(path), Path(path).parent
    unknown = [key for key in contents if key not in StudySpec.model_fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], StudySpec.model_fields, n=1, cutoff=0.3)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"'{path}' has what a study does not: {', '.join(unknown)}.{hint} It has {', '.join(StudySpec.model_fields)}."
        )
    spec = StudySpec(**contents)
    tasks = {name: task.with_options(data=_from(folder, task.data)) for name, task in spec.tasks.items()}
    models = {name: _beside(folder, model) for name, model in spec.models.items()}
    found: StudySpec = spec.with_options(tasks=tasks, models=models)
    for _ in cells(found):
        pass  # every cell's options are checked when it is made
    return found


def _from(folder: Path, data: DataConfig) -> DataConfig:
    changes = {name: _beside(folder, value) for name in ("path", "eval_path") if (value := getattr(data, name)) is not None}
    found: DataConfig = data.with_options(**changes)
    return found


def _beside(folder: Path, name: str) -> str:
    """A path that exists beside the study file, or the name as it is."""
    return str((folder / name).resolve()) if (folder / name).exists() else name


def cells(spec: StudySpec, learning_rates: dict[tuple[str, str, str], float] | None = None) -> Iterator[Cell]:
    """The cells that are compared.

    Args:
        learning_rates: of each (model, method, task), as found by `tuning_cells`; default: that of [train].
    """
    for model, method, task in _combinations(spec):
        for seed in spec.seeds:
            rate = (learning_rates or {}).get((model, method, task))
            yield _cell(spec, model, method, task, {"seed": seed} | ({} if rate is None else {"learning_rate": rate}))


def tuning_cells(spec: StudySpec) -> Iterator[Cell]:
    """The cells that find each model's, method's and task's learning rate: the grid, at a seed of their own."""
    for model, method, task in _combinations(spec):
        for rate in spec.learning_rates:
            yield _cell(spec, model, method, task, {"seed": spec.tuning_seed, "learning_rate": rate}, tuning=True)


def _combinations(spec: StudySpec) -> Iterator[tuple[str, str, str]]:
    return ((model, method, task) for model in spec.models for task in spec.tasks for method in spec.methods)


def _cell(spec: StudySpec, model: str, method: str, task: str, train: dict[str, Any], *, tuning: bool = False) -> Cell:
    how, what = spec.methods[method], spec.tasks[task]
    shared = {"model": spec.models[model], "data": with_templates(what.kind, what.data).model_dump(exclude_unset=True)}
    own = {"method": how.method, "dtype": how.dtype, "lora": how.lora, "quant": how.quant}
    layers = [{"train": each} for each in (spec.train, what.train, how.train, train)]
    try:
        config: RunConfig = build(RunConfig, shared, own, *layers)
    except ConfigError as error:
        raise ConfigError(f"The cell {model} x {method} x {task}: {error}") from None
    return Cell(model, method, task, what.kind, config, tuning)
