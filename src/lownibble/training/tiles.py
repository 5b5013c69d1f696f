"""Norms and MLPs of a long microbatch, one tile of tokens at a time, in forward and in backward.

With checkpointing a step's memory is that of one decoder layer in backward, and most of it is what the MLP and the norms keep:
for 131,072 tokens of an 8B model 20 of 34 GB of activations, by the plan (docs/adr/0034). These modules read each token alone,
so they can run over parts of the microbatch. A tiled module keeps its input alone; backward runs it again for each tile, goes
backward through that tile, and adds up the parameters' gradients. Only these sums, and matrix products over fewer rows, differ
from the untiled step: by rounding.

Under a checkpoint this costs no second run: the input is saved by an operation of its own before the module runs, and
recomputing a layer stops at the last tensor that its backward needs. So an MLP runs forward twice, as it does untiled. (Where a
norm follows the MLP, as in Gemma 2, its input is needed, and the MLP runs three times.)

Which modules read each token alone is found, not listed: the children of decoder layers, and of the model around them, that are
called with hidden states and nothing else, and whose outputs for two parts of a row are the output for the row. Attention gets
positions, too, and stays whole; so do mixtures of experts, which gather the tokens of an expert. Like compiled layers, tiled
modules are installed for a microbatch and removed after it; the layers of a long microbatch are not compiled.

Rejected: a checkpoint for each tile (within a layer's checkpoint, all tiles but one would run three times); compiled layers
around tiles (autograd within backward cannot be traced); tiling the layer's whole second half (it is transformers' code). Tile
lengths are in `planning/tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops
from lownibble.lora.activated import activated
from lownibble.models import attention
from lownibble.models.forwards import Forward, replaced_forwards
from lownibble.models.head import for_comparing, hidden_states
from lownibble.models.info import body, decoder_layers
from lownibble.models.prefixes import tree
from lownibble.planning.tiles import tile_lengths

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Maximum relative difference between a module's output for parts of a row and for the row: roundings of products in another
order, a few units of the dtype's mantissa. What reads other tokens is off by order one."""

COMPARED_TOKENS = 64
"""Tokens over which modules are compared."""


class Tiled:
    """The modules of a model that run in tiles; calling it gives a context manager for the forward and backward pass of one long
    microbatch.

    Args:
        ids_T: token ids to compare with, at least two; of no consequence if not `compare`.
        compare: False on tensors without values: modules are then taken by how they are called.

    Attributes:
        untiled: name of a child of decoder layers or of the model -> why it does not run in tiles.
    """

    def __init__(self, model: Any, ids_T: Tensor, *, compare: bool = True) -> None:
        self.untiled: dict[str, str] = {}
        self.modules: dict[str, list[nn.Module]] = {}
        self._compare, self._activated = compare, activated(model)
        layers = list(decoder_layers(model).values())
        hooks = [
            child.register_forward_hook(partial(self._look_at, name), with_kwargs=True)
            for owner in (body(model), *layers) for name, child in owner.named_children()
        ]  # fmt: skip
        ids_1T = ids_T[:COMPARED_TOKENS].unsqueeze(0)
        try:
            with for_comparing(model):
                segments = [ids_1T.shape[1]] if attention.takes_segments(model) else None
                alone = tree(ids_1T.tolist()).to(ids_1T.device) if attention.takes_prefixes(model) else None
                hidden_states(model, ids_1T, None, segments, prefixes=alone)
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.untiled:
            self.modules.pop(name, None)

    def _look_at(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        why = self._obstacle(module, args, kwargs, output)
        if why:
            self.untiled[name] = why
        elif module not in self.modules.setdefault(name, []):
            self.modules[name].append(module)

    def _obstacle(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim == 3):
            return "it takes or gives more than hidden states"
        if next(module.parameters(), None) is None:
            return "it has no parameters, and keeps little"
        if x.shape != output.shape or x.dtype != output.dtype:
            return "its output is of another size or dtype than its input"
        if any(p.ndim > 2 for p in module.parameters()) or any(isinstance(m, nn.ModuleList) for m in module.modules()):
            return "it is made of several parts, such as a mixture of experts"
        if not self._compare:
            return ""
        halves = x.split(-(-x.shape[1] // 2), 1)
        places = (slice(0, halves[0].shape[1]), slice(halves[0].shape[1], None))
        parts = torch.cat([self._run(module.forward, *each) for each in zip(halves, places, strict=False)], 1)
        difference = float((parts - output).float().norm() / output.float().norm().clamp(min=1e-30))
        return "" if difference <= TOLERANCE[x.dtype] else "its output for a token depends on other tokens"

    def _run(self, forward: Forward, tile: Tensor, part: slice) -> Tensor:
        """`forward` of some tokens of the pass."""
        with nullcontext() if self._activated is None else self._activated.seeing(part):
            out: Tensor = forward(tile)
        return out

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the modules run in tiles."""
        modules = [module for found in self.modules.values() for module in found]
        with replaced_forwards((module, partial(_in_tiles, module, partial(self._run, module.forward))) for module in modules):
            yield


def _in_tiles(module: nn.Module, run: Callable[[Tensor, slice], Tensor], x: Tensor) -> Tensor:
    """The module's output for x (B, T, H), by `run` over tiles of the B * T tokens."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    kept: Tensor = _Keep.apply(x, *parameters)
    out: Tensor = _Tiles.apply(kept, kept.grad_fn, x.requires_grad, run, *parameters)
    return out


def _tiles(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(place among all tokens, (1, tokens, H)) of each tile of x (B, T, H)."""
    x_1TH, start = x.reshape(1, -1, x.shape[-1]), 0
    for length in tile_lengths(x_1TH.shape[1]):
        part = slice(start, start + length)
        yield part, x_1TH[:, part]
        start += length


class _Keep(torch.autograd.Function):
    """x itself, saved for the node after this one; `parameters` are here so that there is a node if only they are trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.n_parameters = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (dx, *[None] * ctx.n_parameters)


class _Tiles(torch.autograd.Function):
    """`run` over tiles of x; `keep` is the node that saves x (None: no gradient is needed), `wants_x`: x needs one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Any, wants_x: bool, run: Callable[[Tensor, slice], Tensor], *parameters: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.keep, ctx.wants_x, ctx.run, ctx.parameters = keep, wants_x, run, parameters
        ctx.backend, ctx.random = ops.chosen(), _random_state(x.device)
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        out: Tensor | None = None
        for part, tile in _tiles(x):
            of_tile = run(tile, part)
            if out is None:
                out = of_tile.new_empty(x.shape)  # under autocast not of x's dtype
            out.view(-1, x.shape[-1])[part] = of_tile[0]
            del of_tile
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.keep.saved_tensors
        wants_x = ctx.wants_x
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        dout_1TH = dout.reshape(1, -1, dout.shape[-1])
        kind, dtype, autocast = ctx.autocast
        with ops.keeping(ctx.backend), torch.autocast(kind, dtype, enabled=autocast), _random_as(ctx.random, x.device):
            for part, tile in _tiles(x):
                with torch.enable_grad():
                    tile = tile.detach().requires_grad_(wants_x)
                    out = ctx.run(tile, part)
                wanted = [*[tile] * wants_x, *ctx.parameters]
                found = list(torch.autograd.grad(out, wanted, dout_1TH[:, part], allow_unused=True))
                if dx is not None:
                    dx.view(-1, dx.shape[-1])[part] = found.pop(0)[0]
                totals = [_sum(total, gradient) for total, gradient in zip(totals, found, strict=True)]
                del tile, out, wanted, found
        ctx.keep = None
        return (dx, None, None, None, *totals)


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if total is None else total if gradient is None else total.add_(gradient)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_as(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside the block the generators begin with this state; after it they are as before."""
    of_cpu, of_device = state
    with torch.random.fork_rng([device] if of_device is not None else []):
        torch.set_rng_state(of_cpu)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
        yield
