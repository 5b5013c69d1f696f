"""Layers that read the same input, q, k and v or gate and up, have their low-rank products joined, in compiled layers on CUDA.

Alone, each of them reads x for x A^T and again for the gradient of A, and its share of dx is written, read by the base's product
that is added to it, and summed with the others'. Joined, x is read once for all A together and once for their gradients, and what
the low-rank branches give to dx is one product, which the compiler adds in the same kernel that sums the bases' shares.

`JoinLowRank` rewrites the graph of a layer's forward and backward before torch splits it: `lora_matmul` nodes of one x become
one `low_ranks` and a `lora_product` each, and their backwards one `low_ranks_backward` and a `lora_product_backward` each. No
layer knows of it, so nothing has to be found out about the model. With dropout each layer has an input of its own, so nothing is
joined. Where only some rows have the branches (`activated.py`), x A^T and its gradient are zero in the others.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from lownibble.kernels import ops, plain
from lownibble.kernels.types import NO_EPILOGUE
from lownibble.lora.product import frozen_weight, input_gradient, lora_matmul, lora_matmul_backward, with_low
from lownibble.quant import eightbit


def _together(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All factors A (r, K), one below the other, in the dtype of the activations."""
    return torch.cat([factor.to(dtype) for factor in factors])


@torch.library.custom_op("lownibble::low_ranks", mutates_args=())
def low_ranks(x: Tensor, factors: list[Tensor]) -> Tensor:
    """x (..., K), factors (r, K) each -> (T, sum of r): x A^T of each beside the other."""
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    return ops.low_rank(x_TK, _together(factors, x.dtype).t())


@low_ranks.register_fake
def _(x, factors):  # type: ignore[no-untyped-def]
    return x.new_empty(x.numel() // x.shape[-1], sum(factor.shape[0] for factor in factors))


@torch.library.custom_op("lownibble::low_ranks_backward", mutates_args=())
def low_ranks_backward(x: Tensor, dlows: list[Tensor], factors: list[Tensor], wants_dx: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `low_ranks`: dx like x, or nothing, and of the factors one below the other, float32."""
    x_TK, dlow_TR = x.reshape(-1, x.shape[-1]).contiguous(), torch.cat(dlows, 1)
    dx = (dlow_TR @ _together(factors, x.dtype)).view(x.shape) if wants_dx else x.new_empty(0)
    return dx, plain.outer_float32(dlow_TR, x_TK)


@low_ranks_backward.register_fake
def _(x, dlows, factors, wants_dx):  # type: ignore[no-untyped-def]
    ranks = sum(factor.shape[0] for factor in factors)
    return x.new_empty(x.shape if wants_dx else 0), x.new_empty(ranks, x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("lownibble::lora_product", mutates_args=())
def lora_product(
    x: Tensor, low: Tensor, weight: list[Tensor], spec: str, bias: Tensor | None, lora_B: Tensor, scale: float,
    rows: list[Tensor],
) -> Tensor:  # fmt: skip
    """As `lora_matmul` with x A^T (T, r) given: x (..., K) -> (..., N)."""
    x_TK = x.reshape(-1, x.shape[-1])
    low = low if low.is_cuda else low.contiguous()  # the vendor's products there take columns of a wider matrix
    y = with_low(x_TK.contiguous(), frozen_weight(weight, spec), bias, low, lora_B, scale, eightbit.of_tensors(rows, x_TK))
    return y.view(*x.shape[:-1], -1)


@lora_product.register_fake
def _(x, low, weight, spec, bias, lora_B, scale, rows):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]))


@torch.library.custom_op("lownibble::lora_product_backward", mutates_args=())
def lora_product_backward(
    dy: Tensor, low: Tensor, weight: list[Tensor], spec: str, lora_B: Tensor, columns: int, scale: float,
    code_type: torch.dtype | None, wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy (..., N) -> the base's part of dx (..., columns), or nothing; the gradient of x A^T (T, r); dB in float32."""
    dy_TN = dy.reshape(-1, dy.shape[-1]).contiguous()
    dlow, dB = ops.low_rank(dy_TN, lora_B, scale), plain.outer_float32(low, dy_TN).mul_(scale).t().contiguous()
    if not wants_dx:
        return dy.new_empty(0), dlow, dB
    dx = input_gradient(dy_TN, frozen_weight(weight, spec), NO_EPILOGUE, code_type)
    return dx.view(*dy.shape[:-1], columns), dlow, dB


@lora_product_backward.register_fake
def _(dy, low, weight, spec, lora_B, columns, scale, code_type, wants_dx):  # type: ignore[no-untyped-def]
    dx = dy.new_empty((*dy.shape[:-1], columns) if wants_dx else 0)
    return dx, dy.new_empty(low.shape), dy.new_empty(lora_B.shape, dtype=torch.float32)


class JoinLowRank(CustomGraphPass):
    """Rewrites the graph of forward and backward; for `torch._inductor.config.joint_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        """Join what can be joined, in place; torch sorts the nodes afterwards."""
        forwards, backwards = defaultdict(list), defaultdict(list)
        for node in graph.nodes:
            if node.target is _FORWARD and _arguments(node)["dropout"] == 0:
                forwards[_itself(node.args[0])].append(node)
            elif node.target is _BACKWARD:
                backwards[_itself(_arguments(node)["low"])].append(node)
        for x, nodes in forwards.items():
            after = [backwards[low] for node in nodes if (low := _taken(node, 1)) is not None]
            wanting = {_arguments(node)["wants_dx"] for each in after for node in each}
            if len(nodes) > 1 and [len(each) for each in after] == [1] * len(nodes) and len(wanting) == 1 and _are_inputs(nodes):
                _join(graph, x, nodes, [each[0] for each in after])

    def uuid(self) -> str:
        """What torch's cache of compiled graphs tells this pass by; its source is in the cache's key (`compiling.py`)."""
        return "lownibble-join-low-rank"


_FORWARD, _BACKWARD = lora_matmul._opoverload, lora_matmul_backward._opoverload


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A custom operator's arguments by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _itself(node: fx.Node) -> fx.Node:
    """What a node is another name for, as tensors saved for backward are."""
    while node.target is torch.ops.aten.alias.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A and B as a forward node multiplies by them."""
    given = _arguments(node)
    return tuple(given["rounded"]) or (given["lora_A"], given["lora_B"])  # type: ignore[return-value]


def _are_inputs(nodes: Sequence[fx.Node]) -> bool:
    """Whether all A are inputs of the graph, and so there before the first product."""
    return all(_factors(node)[0].op == "placeholder" for node in nodes)


def _taken(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes an operator's output `index`."""
    return next((user for user in node.users if user.args[1] == index), None)


def _join(graph: fx.Graph, x: fx.Node, forwards: Sequence[fx.Node], backwards: Sequence[fx.Node]) -> None:
    factors = [_factors(node)[0] for node in forwards]
    ranks = [factor.meta["val"].shape[0] for factor in factors]
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    with graph.inserting_before(forwards[0]):
        low = _call(graph, low_ranks._opoverload, (x, factors), forwards[0])
        lows = [_rows_or_columns(graph, low, 1, start, rank, forwards[0]) for start, rank in zip(starts, ranks, strict=True)]
        lows = [_in_active_rows(graph, node, own) for node, own in zip(forwards, lows, strict=True)]
    for node, own in zip(forwards, lows, strict=True):
        given = _arguments(node)
        arguments = (
            x, own, given["weight"], given["spec"], given["bias"], _factors(node)[1], given["scale"], given["rows"],
        )  # fmt: skip
        with graph.inserting_before(node):
            y = _call(graph, lora_product._opoverload, arguments, node)
        _replace(graph, node, {0: y, 1: own})
    dxs, dlows, wants_dx = [], [], True
    for node, own in zip(backwards, lows, strict=True):
        given = _arguments(node)
        wants_dx = given["wants_dx"]
        gradient = (
            given["dy"], own, given["weight"], given["spec"], given["lora_B"], x.meta["val"].shape[-1], given["scale"],
            given["code_type"], wants_dx,
        )  # fmt: skip
        with graph.inserting_before(node):
            done = _call(graph, lora_product_backward._opoverload, gradient, node)
            dx, dlow, dB = (_item(graph, done, index, node) for index in range(3))
            dlow = _in_active_rows(graph, node, dlow)
        dxs.append(dx)
        dlows.append(dlow)
        _replace(graph, node, {2: dB}, keep=True)
    last = max(backwards, key=list(graph.nodes).index)
    with graph.inserting_before(last):
        done = _call(graph, low_ranks_backward._opoverload, (x, dlows, factors, wants_dx), last)
        dx_low, dA = _item(graph, done, 0, last), _item(graph, done, 1, last)
        dAs = [_rows_or_columns(graph, dA, 0, start, rank, last) for start, rank in zip(starts, ranks, strict=True)]
        if wants_dx:
            at = backwards.index(last)
            dxs[at] = _call(graph, torch.ops.aten.add.Tensor, (dxs[at], dx_low), last)
    for node, dx, own in zip(backwards, dxs, dAs, strict=True):
        _replace(graph, node, {0: dx, 1: own})


def _in_active_rows(graph: fx.Graph, node: fx.Node, low: fx.Node) -> fx.Node:
    """`low`, zero in the rows that do not have the branch of a forward or backward node."""
    active = _arguments(node)["active"]
    return low if active is None else _call(graph, torch.ops.aten.mul.Tensor, (low, active), node)


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A new node with its fake result; what else torch notes of nodes is that of `like`."""
    node = graph.call_function(target, arguments)
    node.meta = {name: value for name, value in like.meta.items() if name != "eager_input_vals"}  # those are of its arguments
    values = fx.map_arg(arguments, lambda each: each.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _item(graph: fx.Graph, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
    taken = graph.call_function(operator.getitem, (node, index))
    taken.meta = dict(like.meta) | {"val": node.meta["val"][index]}
    return taken


def _rows_or_columns(graph: fx.Graph, node: fx.Node, dim: int, start: int, count: int, like: fx.Node) -> fx.Node:
    return _call(graph, torch.ops.aten.slice.Tensor, (node, dim, start, start + count), like)


def _replace(graph: fx.Graph, node: fx.Node, results: dict[int, fx.Node], keep: bool = False) -> None:
    """Use `results` for a node's outputs, and remove what nothing uses any more."""
    for index, result in results.items():
        if (taken := _taken(node, index)) is not None:
            taken.replace_all_uses_with(result)
            graph.erase_node(taken)
    if not keep:
        for taken in list(node.users):
            graph.erase_node(taken)
        graph.erase_node(node)
