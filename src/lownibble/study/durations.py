"""How long cells take: as the finished ones that are like them, and before there are some by their operations.

Cells of one model, task and method, of the learning rate search or not, take about the same time. For a kind that has not run,
the planner's operations are counted: for the tokens of the run's own batches, with their padding, for its evaluations and for its
answers. They are divided by the share of this device's FLOP/s that training reaches, and corrected by the time of finished cells
over their estimates. So a first figure is good to a factor of two, and a later one to some percent.

Not known are what products in 8 bits and compiled layers gain. There is no estimate for encoder-decoders and other objectives,
nor of a model whose family the planner does not know: such a cell takes as long as the mean of those most like it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

from lownibble.arch import is_known, read_shape
from lownibble.config import NEXT_TOKEN
from lownibble.data import Example, collate, encode
from lownibble.errors import DataError, InputError
from lownibble.memory.planned import device_of
from lownibble.models import load_tokenizer, pick_device, resolve
from lownibble.planning import calibration, hardware
from lownibble.planning.models import find_config
from lownibble.planning.speed import EFFICIENCY, flops_per_token, forward_flops_per_token
from lownibble.rehearsal.products import flops_per_s
from lownibble.study.contents import load_rows
from lownibble.study.spec import Cell
from lownibble.study.tasks import KINDS
from lownibble.training.microbatches import MicroBatches

SHARE = {"cpu": 0.75, "cuda": EFFICIENCY[1]}
"""Share of the device's FLOP/s that training reaches. cpu: by benchmarks/results/train-cpu.json, less for short rows."""

ANSWERING_SHARE = 0.1
"""Of the same, when 16 answers are generated together; by hand, on a CPU: 170 tokens/s of the embedded model."""

LENGTH = 0.5
"""Length of an answer, as a share of the longest."""

START_S = 8.0
"""A process, its imports and a small model in memory; by hand, of the embedded model on two slow threads."""

STEP_S_OF_LAYER = {"cpu": 0.0, "cuda": 0.003}
"""Least time of a training step for each layer: launches. A guess; an eager step of 32 layers is below 0.01 on an H100."""


class Kind(NamedTuple):
    """Cells that take about the same time."""

    model: str
    task: str
    method: str
    tuning: bool


def kind_of(cell: Cell) -> Kind:
    """The kind of a cell."""
    return Kind(cell.model, cell.task, cell.method, cell.tuning)


class Durations:
    """Seconds of a study's cells.

    Attributes:
        known: of each kind, the seconds of cells that have ended.
    """

    def __init__(self, cells: list[Cell], here: bool = True) -> None:
        """Args:
        cells: of the study, one of each kind at least. here: whether they run on a machine as this one; others have no estimate.
        """
        self.known: dict[Kind, list[float]] = {}
        self._cells = {kind_of(cell): cell for cell in cells}
        self._here = here
        self._estimates: dict[Kind, float | None] = {}
        self._rows: dict[tuple[str, int, str, str], list[Example]] = {}

    def learn(self, kind: Kind, seconds: float) -> None:
        """Count a cell that has ended."""
        self.known.setdefault(kind, []).append(seconds)

    def seconds(self, kind: Kind) -> float | None:
        """What a cell of this kind will take; None: nothing is known.

        Raises:
            DataError: its rows cannot be encoded, so all cells of its kind would fail.
        """
        if own := self.known.get(kind):
            return statistics.fmean(own)
        estimate = self._estimate(kind)
        if estimate is not None:
            return estimate * self._correction
        like: list[Callable[[Kind], bool]] = [
            lambda other: other[1:] == kind[1:],
            lambda other: (other.task, other.tuning) == (kind.task, kind.tuning),
            lambda other: other.tuning == kind.tuning,
            lambda _: True,
        ]
        for is_like in like:
            if found := [each for other, seconds in list(self.known.items()) if is_like(other) for each in seconds]:
                return statistics.fmean(found)
        return None

    def is_estimated(self, kind: Kind) -> bool:
        """Whether the seconds of this kind are by its operations alone."""
        return not self.known and self._estimate(kind) is not None

    @property
    def _correction(self) -> float:
        """Time of the finished cells over their estimates."""
        pairs = [
            (statistics.fmean(own), found)
            for kind, own in list(self.known.items())
            if (found := self._estimate(kind)) is not None
        ]
        return sum(own for own, _ in pairs) / sum(found for _, found in pairs) if pairs else 1.0

    def _estimate(self, kind: Kind) -> float | None:
        if kind not in self._estimates:
            cell = self._cells.get(kind)
            try:
                self._estimates[kind] = self._of_cell(cell) if cell is not None and self._here else None
            except DataError:
                raise
            except InputError:
                self._estimates[kind] = None
        return self._estimates[kind]

    def _of_cell(self, cell: Cell) -> float | None:
        contents, train = find_config(cell.config.model), cell.config.train
        if not is_known(contents) or train.objective != NEXT_TOKEN:
            return None
        shape = read_shape(contents, cell.config.model)
        if shape.decoder_layers:
            return None
        rows, scored = self._encoded(cell)
        micro = MicroBatches(rows, train, partial(collate, pad_token_id=0))
        steps = train.max_steps or micro.steps_of_epochs(train.num_train_epochs)
        batches = [batch for step in islice(micro.steps(), steps) for batch in step]
        tokens, mean = sum(map(micro.tokens, batches)), statistics.fmean(len(row.input_ids) for batch in batches for row in batch)
        length = max(1, round(mean))
        evaluations = 1 + -(-steps // (train.eval_steps or steps))
        forwards: float = evaluations * sum(len(row.input_ids) for row in scored)
        kind, device_flops = self._device
        if device_flops is None:
            return None
        if not cell.tuning:
            forwards += len(scored) * LENGTH * KINDS[cell.kind].max_new_tokens * SHARE[kind] / ANSWERING_SHARE
        work = tokens * flops_per_token(shape, cell.config.method, 0, train.with_options(max_length=length))
        work += forwards * forward_flops_per_token(shape, 0, length)
        return START_S + max(STEP_S_OF_LAYER[kind] * shape.layers * steps, work / (device_flops * SHARE[kind]))

    @cached_property
    def _device(self) -> tuple[str, float | None]:
        """Its type and its FLOP/s. A CPU's are measured if they are not known; a GPU's are not, which is left to the cells."""
        device = pick_device()
        planned = device_of(device)
        named = hardware.known_as(planned.name)
        known = calibration.calibrated(hardware.device(named) if named in hardware.names() else planned)
        return device.type, known.flops or (flops_per_s(device) if device.type == "cpu" else None)

    def _encoded(self, cell: Cell) -> tuple[list[Example], list[Example]]:
        """Its training and its evaluation rows; those of the search are often the same."""
        config, sides = cell.config, load_rows(cell.task, cell.kind, cell.config.data)
        found = []
        for side in sides:
            key = (config.model, config.train.max_length, config.data.model_dump_json(exclude={"max_eval_rows"}), side.digest)
            if key not in self._rows:
                tokenizer = load_tokenizer(resolve(config.model, config.revision))
                self._rows[key] = encode(side, tokenizer, config.data, config.train.max_length).examples
            found.append(self._rows[key])
        return found[0], found[1]
