"""One pass of calibration rows through a model, one decoder layer at a time.

All rows go through the model in a single forward call of its body, while the decoder layers work on a few rows at a time: each
runs once with hooks that sum up the second moments of its linear layers' inputs, then the caller's `visit` may change the layer
(pack it, start its adapters), then it runs again, and the next layer gets what the changed layer puts out, as it will in use. So
embeddings, masks and positions are the model's own business, whatever its architecture, and only one layer's moments and the
hidden states of all rows are held: as embedded, into a layer, and out of it; and in x in floats per distinct input.

Layers that read the same tensor (q, k, v; gate, up) share one matrix.

The decoder layers are those of transformers' `_no_split_modules`; linear layers outside of them (a head that is adapted), and
models whose layers are not known, are measured in one more pass over the whole model.

The alternative, as in GPTQ's code, is to catch the first layer's arguments and to call layer after layer by hand: it has to know
which arguments differ from layer to layer (sliding windows, rotary embeddings), which models change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.calibration.moments import Moments
from lownibble.calibration.rows import positions
from lownibble.errors import ModelError
from lownibble.models.forwards import replaced_forwards
from lownibble.models.head import Head, for_comparing, hidden_states
from lownibble.models.info import decoder_layers, pass_device

Visit = Callable[[Mapping[str, Moments]], None]
Around = Callable[[str], AbstractContextManager[Any]]

TOKENS_AT_ONCE = 2048
"""Tokens that a decoder layer works on at a time."""


def walk(model: Any, rows_BT: Tensor, paths: list[str], visit: Visit, around: Around = nullcontext) -> None:
    """Call `visit` with the moments of the linear layers of `paths` (path -> moments), decoder layer by decoder layer.

    Args:
        model: in memory, dense or packed; linear layers that `visit` replaces are found again by their paths.
        rows_BT: token ids as `join_rows` makes them.
        paths: of the linear layers to measure, each given to `visit` once.
        around: called with a decoder layer's path; the layer works inside of what it returns, so it can be read then.
    Raises:
        ModelError: an encoder-decoder model, rows longer than the model's positions, or the model's values are not finite.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} has an encoder: calibration is for models with a decoder alone. Use an initialisation that "
            "needs no calibration rows (init_lora_weights=True, 'loftq', 'pissa')."
        )
    held = positions(model)
    if held is not None and rows_BT.shape[1] > held:
        raise ModelError(
            f"The calibration rows have {rows_BT.shape[1]} tokens, and {type(model).__name__} has {held} positions. Join them "
            f"with join_rows(..., length={held})."
        )
    config = model.config.get_text_config()
    heads = {getattr(config, name, 0) for name in ("num_attention_heads", "n_head", "n_heads")}
    if len(rows_BT) in heads - {1}:  # so that rows are known by their number
        rows_BT = rows_BT[:-1]
    rows_BT = rows_BT.to(pass_device(model))
    known = decoder_layers(model)
    outer = [path for path in known if not any(path.startswith(f"{other}.") for other in known)]
    layers = {path: known[path] for path in outer} if any(each.startswith(f"{path}.") for path in outer for each in paths) else {}
    rest = [each for each in paths if not any(each.startswith(f"{path}.") for path in layers)]
    with for_comparing(model), ExitStack() as stack:
        for path, layer in layers.items():
            own = [each for each in paths if each.startswith(f"{path}.")]
            work = _Layer(model, layer, own, visit, len(rows_BT), partial(around, path))
            stack.enter_context(replaced_forwards([(layer, work)]))
        if layers:
            hidden_states(model, rows_BT, None)
    if rest:
        with for_comparing(model), _measured(model, rest) as found:
            head, few = Head(model), max(1, TOKENS_AT_ONCE // rows_BT.shape[1])
            for rows in rows_BT.split(few):
                head(hidden_states(model, rows, None).flatten(0, 1))
        visit(_moments(found))


class _Layer:
    """A decoder layer's forward for all rows: measured on a few at a time, changed by `visit`, and run again."""

    def __init__(
        self, model: nn.Module, layer: nn.Module, paths: list[str], visit: Visit, n_rows: int,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        self._model, self._paths, self._visit, self._n_rows, self._around = model, paths, visit, n_rows, around
        self._forward = layer.forward
        self._visited = not paths

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._around():
            if not self._visited:  # layers that are used several times are measured on the first
                self._visited = True
                self._measure(args, kwargs)
            return _joined(self._outputs(args, kwargs), self._n_rows)

    def _measure(self, args: Any, kwargs: Any) -> None:
        with _measured(self._model, self._paths) as found:
            deque(self._outputs(args, kwargs), maxlen=0)  # a loop's variable would hold one while the next is computed
        self._visit(_moments(found))

    def _outputs(self, args: Any, kwargs: Any) -> Iterator[Any]:
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())
        few = (
            max(1, TOKENS_AT_ONCE // states.shape[1]) if self._is_cut_by_rows(states, (*args, *kwargs.values())) else self._n_rows
        )
        for first in range(0, self._n_rows, few):
            rows = slice(first, first + few)
            yield self._forward(*_some(args, rows, self._n_rows), **_some(kwargs, rows, self._n_rows))

    def _is_cut_by_rows(self, states: Tensor, values: tuple[Any, ...]) -> bool:
        """Whether the arguments can be cut: not where states have another dimension first (Gemma 3n), or there are rows x
        heads of something (BLOOM)."""
        several = (v for v in values if isinstance(v, Tensor) and v.dim() > 1 and len(v) > self._n_rows)
        return len(states) == self._n_rows and not any(len(v) % self._n_rows == 0 for v in several)


def _some(value: Any, rows: slice, n_rows: int) -> Any:
    """Arguments for some rows: tensors whose first dimension is all rows are cut."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == n_rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_some(each, rows, n_rows) for each in value)
    if isinstance(value, dict):
        return {key: _some(each, rows, n_rows) for key, each in value.items()}
    return value


def _joined(parts: Iterator[Any], n_rows: int) -> Any:
    """Outputs of some rows each, as one; each is copied into its place, so that there are no two of all rows."""
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = _room_for(part, n_rows)
        done += _put(part, whole, done)
        del part  # before the next is computed
    return whole


def _room_for(part: Any, n_rows: int) -> Any:
    if isinstance(part, Tensor):
        return part if len(part) == n_rows else part.new_empty((n_rows, *part.shape[1:]))
    return tuple(_room_for(each, n_rows) for each in part) if isinstance(part, tuple) else part


def _put(part: Any, whole: Any, first: int) -> int:
    """Copy tensors of some rows into those of all; returns the number of rows."""
    if isinstance(part, Tensor):
        if part is not whole:
            whole[first : first + len(part)] = part
        return len(part)
    return max((_put(*each, first) for each in zip(part, whole, strict=True)), default=0) if isinstance(part, tuple) else 0


class _Sum:
    """Sum of x x^T over the tokens of one input."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x_TK = x.reshape(-1, x.shape[-1]).float()
        if self.matrix is None:
            self.matrix = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1])
        self.matrix.addmm_(x_TK.t(), x_TK)
        self.tokens += len(x_TK)


@contextmanager
def _measured(model: nn.Module, paths: list[str]) -> Iterator[dict[str, _Sum]]:
    """Sum up the inputs of the layers at `paths` inside the block: path -> its sum, shared by layers with the same input."""
    found: dict[str, _Sum] = {}
    last: list[tuple[Tensor, _Sum]] = []  # the newest input

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def of_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            if last and last[0][0] is x and found.get(path, last[0][1]) is last[0][1]:
                found[path] = last[0][1]
                return
            if path not in found:
                found[path] = _Sum()
            found[path].add(x)
            last[:] = [(x, found[path])]

        return of_input

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
        yield found
        last.clear()


def _moments(found: dict[str, _Sum]) -> dict[str, Moments]:
    for path, each in found.items():
        if each.matrix is not None and not bool(torch.isfinite(each.matrix.diagonal()).all()):
            raise ModelError(f"The inputs of '{path}' over the calibration rows are not finite. Check the model's weights.")
    made: dict[int, Moments] = {}
    for each in found.values():
        if id(each) not in made and each.matrix is not None:
            made[id(each)] = Moments(each.matrix.div_(max(1, each.tokens)), each.tokens)
    return {path: made[id(each)] for path, each in found.items() if each.matrix is not None}
