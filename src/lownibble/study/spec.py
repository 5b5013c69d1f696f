"""The study file: models x methods x tasks x seeds, and the options they share.

    name = "first"
    seeds = [0, 1, 2]

    [models]
    small = "demo"

    [methods]
    lora = { method = "lora" }
    qlora = { method = "qlora" }
    qlora-r4 = { method = "qlora", lora = { r = 4 } }
    gptq = "qlora+int3+gptq+qera"            # by name, as in `compare`: see config/methods.py

    [tasks]
    sentiment = { kind = "classification", data = "demo" }
    inference = { kind = "nli", data = "data/nli", train = { max_length = 128 } }

    [train]
    max_steps = 40

    [tuning]                                # learning rate search for each model, method and task before the comparison
    learning_rates = [1e-4, 3e-4, 1e-3]
    train = { max_steps = 20 }

    [decide]                                # what is compared, and when: see decide.py
    pairs = [["lora", "qlora"]]
    looks = [2]

A cell is one run. Its name is a digest of everything that determines its result: a finished cell is found again whatever the
file's name or order, and one whose settings have changed is a new cell. The digest covers the contents of rows and models, not
their paths. It leaves out options at their default, so that a new option does not invalidate finished cells.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Lt, MaxLen, MinLen
from pydantic import Field, model_validator

from lownibble.config import Data, DataConfig, NamedMethod, QuantConfig, RunConfig
from lownibble.errors import ConfigError
from lownibble.leaves import build
from lownibble.options import Options, read_toml
from lownibble.study import bases, digests
from lownibble.study.tasks import KINDS, check_kind, with_templates

SCHEMA = 1
"""Schema version in the digests: a change makes all cells new. Raise it when a default changes, which digests do not see."""

_NO_PART = {"output_dir", "report_to", "resume", "save_steps", "parallel", "fsdp_cpu_offload"}
"""Options of [train] that do not affect the result: output, logging, checkpoints, resuming, how processes share the model, where
shards are kept."""


_BY_CONTENT = {"model", "revision"}
"""Options of a run that content digests replace in its digest; `bases.BY_CONTENT`: those of [data]."""

_OURS = {"seed", "output_dir", "report_to", "resume"}
"""Options of [train] that a study sets itself."""


class Contents(NamedTuple):
    """Content digests. models: of each model; a hub id or 'demo' as it is. data: of each task's training and evaluation rows."""

    models: dict[str, str]
    data: dict[str, tuple[str, str]]


class TaskSpec(Options):
    """A task: its kind, its data, its training options and its margin."""

    kind: str = Field(description=f"one of {', '.join(KINDS)}")
    data: Data
    train: dict[str, Any] = Field({}, description="options of [train], e.g. max_length")
    margin: Annotated[float, Gt(0)] | None = Field(
        None,
        description="difference of the first metric (of perplexity: the loss) below which methods count as equivalent; default: "
        "the kind's",
    )

    @model_validator(mode="after")
    def _known(self) -> TaskSpec:
        check_kind(self.kind)
        return self


class TuningSpec(Options):
    """The learning rate search: the same grid for every method, at a seed that is not compared."""

    learning_rates: list[Annotated[float, Gt(0)]] = Field([], description="the grid; empty: as in [train]")
    seed: Annotated[int, Ge(0)] = Field(1000, description="seed of these runs")
    train: dict[str, Any] = Field({}, description="options of [train] for these runs only, e.g. fewer steps")
    max_eval_rows: Annotated[int, Ge(1)] | None = Field(None, description="use at most this many evaluation rows in these runs")


class DecideSpec(Options):
    """What is compared, and when."""

    pairs: list[Annotated[list[str], MinLen(2), MaxLen(2)]] = Field(
        [], description="the planned comparisons, which share the 5%; default: every pair of methods"
    )
    looks: list[Annotated[int, Ge(2)]] = Field(
        [], description="numbers of seeds after which decided comparisons run no further; all seeds are the last look"
    )
    power: Annotated[float, Gt(0), Lt(1)] | None = Field(
        None, description="a study that is not expected to show equivalence of equal methods with this probability is refused"
    )
    hours: Annotated[float, Gt(0)] | None = Field(
        None, description="the time given: only seeds that end within it count for 'power'"
    )
    pilot: str | None = Field(None, description="folder of a study whose records say how scores vary and how long cells take")


class StudySpec(Options):
    """A study file's contents."""

    name: Annotated[str, MinLen(1)] = Field(description="what the study is called")
    seeds: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)] = Field([0, 1, 2], description="seeds of every cell")
    tuning: TuningSpec = TuningSpec()
    models: Annotated[dict[str, str], MinLen(1)] = Field(description="name -> 'demo', a folder, a .gguf file or a hub id")
    methods: Annotated[dict[str, NamedMethod], MinLen(1)] = Field(description="name -> method and settings")
    tasks: Annotated[dict[str, TaskSpec], MinLen(1)] = Field(description="name -> task")
    train: dict[str, Any] = Field({}, description="options of [train] for all cells")
    quant: dict[str, Any] = Field({}, description="options of [quant] for all cells")
    decide: DecideSpec = DecideSpec()

    @model_validator(mode="after")
    def _makes_sense(self) -> StudySpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"The 'seeds' of a study must be distinct. Got {self.seeds}.")
        if self.tuning.seed in self.seeds and self.tuning.learning_rates:
            raise ValueError(f"The 'seed' {self.tuning.seed} of [tuning] must not be among the seeds that are compared.")
        tuned = "learning_rate" if self.tuning.learning_rates else None
        parts = {"[train]": self.train, "the train of [tuning]": self.tuning.train}
        parts |= {f"the train of task '{name}'": task.train for name, task in self.tasks.items()}
        parts |= {f"the train of method '{name}'": method.train for name, method in self.methods.items()}
        for where, options in parts.items():
            for name in sorted(_OURS & options.keys()):
                remedy = "Give 'seeds'" if name == "seed" else "Leave it out"
                raise ValueError(f"The '{name}' in {where} is set by the study itself. {remedy}.")
            if tuned in options:
                raise ValueError(f"The 'learning_rate' in {where} would not count: [tuning] finds one. Leave one of them out.")
        given = self.tuning.model_fields_set
        if "learning_rates" not in given and (idle := sorted(given)):
            raise ValueError(f"The {', '.join(map(repr, idle))} of [tuning] would not count without 'learning_rates'. Give some.")
        if self.quant and all(method.method != "qlora" for method in self.methods.values()):
            raise ValueError("The [quant] of a study is for qlora, and no method is that. Leave it out.")
        if len(set(self.tuning.learning_rates)) != len(self.tuning.learning_rates):
            raise ValueError(f"The 'learning_rates' of [tuning] must be distinct. Got {self.tuning.learning_rates}.")
        looks = self.decide.looks
        if looks != sorted(set(looks)) or (looks and looks[-1] >= len(self.seeds)):
            raise ValueError(f"The 'looks' of [decide] must increase and be below the {len(self.seeds)} seeds. Got {looks}.")
        for pair in self.decide.pairs:
            if pair[0] == pair[1] or not set(pair) <= self.methods.keys():
                raise ValueError(f"The 'pairs' of [decide] must be of two of the methods {', '.join(self.methods)}. Got {pair}.")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study. `tuning`: part of the learning rate search. `contents`: digests of model and rows, if known.
    `quantize`: options by which its base is packed first."""

    model: str
    method: str
    task: str
    kind: str
    config: RunConfig
    tuning: bool = False
    contents: tuple[str, str, str] = ("", "", "")
    quantize: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of its data order and initialisation."""
        return self.config.train.seed

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of everything that determines the result."""
        left_out = _BY_CONTENT if self.contents[0] else set()
        options = self.config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
        for group, names in (("train", _NO_PART), ("data", bases.BY_CONTENT if self.contents[1] else set())):
            options[group] = {key: value for key, value in options.get(group, {}).items() if key not in names}
        what = {"schema": SCHEMA, "kind": self.kind, "tuning": self.tuning, "contents": self.contents, "options": options}
        return digests.of_values(what | ({"quantize": self.quantize} if self.quantize else {}))

    @property
    def base(self) -> str | None:
        """Name of the packed base that it runs on: a digest of what determines that. None: it packs its base itself."""
        if not self.quantize:
            return None
        return bases.name(self.config, self.quantize, self.contents[0] or self.config.model, self.contents[1])


def read_study(path: str | Path) -> StudySpec:
    """Read the study in a TOML file; data and model paths are relative to the file's folder.

    Raises:
        ConfigError: it cannot be read, a key or an option is unknown, or a combination is not a valid run.
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
    pilot = None if spec.decide.pilot is None else _beside(folder, spec.decide.pilot)
    found: StudySpec = spec.with_options(tasks=tasks, models=models)
    if pilot is not None:
        found = found.with_options(decide=spec.decide.with_options(pilot=pilot))
    for _ in (*cells(found), *tuning_cells(found)):
        pass  # building a cell validates its options
    return found


def _from(folder: Path, data: DataConfig) -> DataConfig:
    changes = {name: _beside(folder, value) for name in ("path", "eval_path") if (value := getattr(data, name)) is not None}
    found: DataConfig = data.with_options(**changes)
    return found


def _beside(folder: Path, name: str) -> str:
    """The absolute path of `name` if it exists beside the study file, else `name` unchanged."""
    return str((folder / name).resolve()) if name != "demo" and (folder / name).exists() else name


def cells(
    spec: StudySpec, learning_rates: dict[tuple[str, str, str], float] | None = None, contents: Contents | None = None
) -> Iterator[Cell]:
    """The cells that are compared, seed by seed.

    Args:
        learning_rates: of each (model, method, task), as found with `tuning_cells`; default: that of [train].
        contents: digests of the study's models and rows, for the cells' digests.
    """
    for seed in spec.seeds:
        for model, method, task in _combinations(spec):
            rate = (learning_rates or {}).get((model, method, task))
            own = {"seed": seed} | ({} if rate is None else {"learning_rate": rate})
            yield _cell(spec, model, method, task, [own], contents)


def tuning_cells(spec: StudySpec, contents: Contents | None = None) -> Iterator[Cell]:
    """The cells of the learning rate search: the grid for each model, method and task, at the seed of [tuning]."""
    for model, method, task in _combinations(spec):
        for rate in spec.tuning.learning_rates:
            own = {"seed": spec.tuning.seed, "learning_rate": rate}
            yield _cell(spec, model, method, task, [spec.tuning.train, own], contents, tuning=True)


def _combinations(spec: StudySpec) -> Iterator[tuple[str, str, str]]:
    return ((model, method, task) for model in spec.models for task in spec.tasks for method in spec.methods)


def _cell(
    spec: StudySpec, model: str, method: str, task: str, own_train: list[dict[str, Any]], contents: Contents | None, *,
    tuning: bool = False,
) -> Cell:  # fmt: skip
    how, what = spec.methods[method], spec.tasks[task]
    data, fewer = (
        with_templates(what.kind, what.data).model_dump(exclude_unset=True),
        spec.tuning.max_eval_rows if tuning else None,
    )
    if fewer is not None:
        data["max_eval_rows"] = min(fewer, what.data.max_eval_rows or fewer)
    shared = {"model": spec.models[model], "data": data}
    own = {name: getattr(how, name) for name in ("method", "dtype", "lora", "quant", "merge_aware")}
    layers = [{"train": each} for each in (spec.train, what.train, how.train, *own_train)]
    try:
        own["quant"] = QuantConfig(**spec.quant).with_options(**how.quant).model_dump(exclude_unset=True)
        config: RunConfig = build(RunConfig, shared, own, *layers)
        if how.quantize:
            bases.packing(config, how.quantize, "base")
    except ConfigError as error:
        raise ConfigError(f"The cell {model} x {method} x {task}: {error}") from None
    of = (contents.models[model], *contents.data[task]) if contents is not None else ("", "", "")
    if of[2] and fewer is not None:
        of = (*of[:2], f"{of[2]}, {fewer} rows")
    return Cell(model, method, task, what.kind, config, tuning, of, how.quantize)
