"""Linear layers whose weight the model's code reads itself, instead of calling the layer: Mamba's dt_proj, which it multiplies
without bias; weights that RWKV scales and Gemma 3n clamps.

Such a weight must stay a dense tensor; and where the layer is never called besides, an adapter on it has no effect. Which ones
they are is found out by two forward passes, in evaluation and in training, over a copy of the model on fake tensors (no values,
no memory): an operation that gets a layer's weight outside of the layer's own forward pass reads it directly. So no list of
names or architectures is kept. Rejected: searching the source of the model's classes (it names fast paths that are not taken,
as Mamba 2's out_proj, which would stay dense for nothing).
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from lownibble.quant import is_linear

N_TOKENS = 8
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class _Found:
    """Kinds of linear layers (paths without their numbers) whose weight the code reads, and of these the ones it never calls."""

    read: frozenset[str]
    never_called: frozenset[str]


_known: dict[tuple[type, str], _Found] = {}
"""Class and configuration of a model, wherever its folder is -> what was found."""


def left_dense(model: Any, linears: Iterable[str]) -> set[str]:
    """Those of the linear layers, which are to be packed, that stay dense since the model's code reads their weights.

    Warns:
        UserWarning: there are some.
    """
    found = set(linears) & read_directly(model)
    if found:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in found}))
        warnings.warn(
            f"{len(found)} layers of {type(model).__name__} ({names}) stay dense: its code reads their weights itself.",
            stacklevel=3,
        )
    return found


def read_directly(model: Any) -> frozenset[str]:
    """Paths of the linear layers whose weight the model's code reads outside of the layer; the embeddings' too, if it is shared.

    A pass that needs values (`nonzero` of a routing) ends early: what was read before it counts, in all decoder layers (paths
    that differ in numbers), and what would have been read later is found by training's own check of the head.

    Args:
        model: of transformers, dense, on any device (also meta); unchanged.
    """
    kinds = _look(model, _find).read
    return frozenset(path for path, module in model.named_modules() if is_linear(module) and _kind(path) in kinds)


def without_effect(model: Any, paths: Iterable[str]) -> list[str]:
    """Those of the paths of linear layers where an adapter would have no effect: the code reads the weight and never calls the
    layer, in passes that ended.

    Args:
        model: any module; one that is not of transformers, or cannot be built again to be looked at, is taken to call its layers.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "to_json_string"):
        return []
    kinds = _look(model, lambda model: _find(_built_again(model))).never_called
    return [path for path in paths if _kind(path) in kinds]


def _look(model: Any, find: Callable[[Any], _Found]) -> _Found:
    wanted = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    key = type(model), json.dumps(wanted, sort_keys=True, default=str)
    if key not in _known:
        with torch.random.fork_rng(devices=[]):  # constructors draw random numbers
            _known[key] = find(model)
    return _known[key]


def _kind(path: str) -> str:
    return _NUMBER.sub("#", path)


def _built_again(model: Any) -> Any:
    """The model as its class makes it from its configuration, without values, adapters and hooks; None if it takes more."""
    with suppress(Exception), torch.device("meta"), _quiet():  # whatever another's constructor raises
        return type(model)(copy.deepcopy(model.config))
    return None


def _find(model: Any) -> _Found:
    if model is None:
        return _Found(frozenset(), frozenset())
    ended = 0
    with _disable_current_modes(), _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = (*model.parameters(), *model.buffers())
        made: dict[int, Any] = {id(tensor): _fake(tensor) for tensor in tensors}
        fake = copy.deepcopy(model, made)
        reads = _Reads({path: module for path, module in fake.named_modules() if is_linear(module)})
        ids = torch.zeros(1, N_TOKENS, dtype=torch.int64)
        pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        for training in (False, True):  # RWKV scales its weights in evaluation, Gemma 3n clamps some in training
            reads.inside.clear()
            with reads, suppress(Exception):  # whatever the model's own code raises without values
                fake.train(training)(input_ids=ids, use_cache=False, **pair)
                ended += 1
    read, called = ({_kind(path) for path in paths} for paths in (reads.found, reads.called))
    return _Found(frozenset(read), frozenset(read - called if ended == 2 else ()))


def _fake(tensor: Tensor) -> Tensor:
    # 16 bits: torch's grouped products know no others without values
    empty = torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Reads(TorchDispatchMode):
    """Notes the layers whose weights operations get outside of the layers' forward passes."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.called: set[str] = set()
        self.inside: list[str] = []
        self._path = {_storage(layer.weight): path for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.register_forward_pre_hook(partial(self._enter, path))
            layer.register_forward_hook(self._leave)

    def _enter(self, path: str, *of_hook: Any) -> None:
        self.inside.append(path)
        self.called.add(path)

    def _leave(self, *of_hook: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        given = (self._path.get(_storage(each)) for each in tree_iter((args, kwargs or {})) if isinstance(each, Tensor))
        self.found.update(path for path in given if path is not None and path not in self.inside)
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """What views of a tensor share."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and transformers say of a pass that is not the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
