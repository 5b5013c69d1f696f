"""The training pass through a mixture's experts on a CPU, as one autograd function from tokens to tokens.

    y[t] = sum over t's experts e of share W2_e gate(W1_e x[t])        each product with its biases and its adapter

Everything goes by expert: its rows are gathered, multiplied, gated, multiplied again, weighted and added to their tokens' sums
before the next expert's turn, while they are in the cache. So the rows of all experts, (S, K) for S = tokens x active experts
and the hidden size K, never exist. Passes that go product by product, as ours for CUDA (`experts.py`), make a dozen such tensors;
above 32 MiB the C library maps each anew, and page faults were a quarter of a step's time.

A row is weighted before its second product, where it is narrower. Saved for backward are x, the output of the first product
(S, 2F) and the adapters' low-rank rows; the gate is the model's code, called again in backward. With u = W2_e^T dy for the
gradient dy of a token's sum, the share's gradient is u . gate(...) and the gate's is share u, so the second product's output is
not needed. Sums over a token's experts are float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops
from lownibble.kernels.types import NO_EPILOGUE, Epilogue
from lownibble.quant.experts import Ends, Product, expert_product


class Sides(NamedTuple):
    """The two products of a container, each with the biases of all experts (E, out), if it has some, and what is between them:
    (rows, 2F) -> (rows, F)."""

    first: Product
    second: Product
    first_bias: Tensor | None
    second_bias: Tensor | None
    gate: Callable[[Tensor], Tensor]


def normalises(container: Any) -> bool:
    """Whether a container normalises what its experts give; transformers 5.17 has none that could."""
    return bool(getattr(container, "has_post_expert_norm", False))


def sides_of(container: Any, held: Sequence[Any]) -> Sides | None:
    """What the pass computes with, or None where it is not for a container: it normalises outputs, or trains something else than
    adapters. `held`: its two weights, dense parameters or modules."""
    if normalises(container):
        return None
    found = []
    for each in held:
        if isinstance(each, nn.Parameter):
            found.append(Product(each.transpose(1, 2) if container.is_transposed else each))
        elif hasattr(each, "product"):
            found.append(each.product())
        else:
            return None
    adapters = {id(matrix) for product in found for matrix in product.adapter}
    if any(parameter.requires_grad and id(parameter) not in adapters for parameter in container.parameters()):
        return None
    names = ("gate_up_proj_bias" if container.has_gate else "up_proj_bias", "down_proj_bias")
    biases = [getattr(container, name) if container.has_bias else None for name in names]
    (first, second), (first_bias, second_bias) = found, biases
    return Sides(first, second, first_bias, second_bias, container._apply_gate if container.has_gate else container.act_fn)


def expert_pass(x_TK: Tensor, shares_S: Tensor, tokens_S: Tensor, ends: Ends, sides: Sides) -> Tensor:
    """(T, K) -> (T, K), in x's dtype.

    Args:
        shares_S, tokens_S: the share and the token of each row, sorted by expert. ends: where each expert's rows end.
    """
    none = (None, None)
    y: Tensor = _Pass.apply(
        x_TK, shares_S, *(sides.first.adapter or none), *(sides.second.adapter or none), tokens_S, ends, sides
    )
    return y.to(x_TK.dtype)


class _Rows(NamedTuple):
    """One of the two products, for the rows of one expert after another.

    Attributes:
        low: (S, r) x A^T of the rows of all experts; or None, without an adapter. dA, dB: where their gradients go.
    """

    product: Product
    low: Tensor | None
    dA: Tensor | None = None  # noqa: N815
    dB: Tensor | None = None  # noqa: N815

    def forward(self, expert: int, rows: slice, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out); keeps x A^T."""
        weights, code_type, adapter, rounded, scale = self.product
        epilogue = NO_EPILOGUE
        if self.low is not None:
            A, B = rounded or adapter
            self.low[rows] = ops.low_rank(x, A[expert].t())
            epilogue = Epilogue(None, self.low[rows], B[expert].t(), scale)
        return expert_product(x, weights[expert], False, epilogue, code_type)

    def backward(self, expert: int, rows: slice, dy: Tensor, x: Tensor) -> Callable[[], Tensor]:
        """What gives the gradient of x; writes those of A and B."""
        weights, code_type, adapter, rounded, scale = self.product
        epilogue = NO_EPILOGUE
        if self.low is not None and self.dA is not None and self.dB is not None:
            A, B = rounded or adapter
            dlow, self.dA[expert], self.dB[expert] = ops.low_rank_backward(dy, x, self.low[rows], B[expert], scale)
            epilogue = Epilogue(low=dlow, factor=A[expert])
        return lambda: expert_product(dy, weights[expert], True, epilogue, code_type)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shares: Tensor, A1: Tensor | None, B1: Tensor | None, A2: Tensor | None, B2: Tensor | None,
        tokens: Tensor, ends: Ends, sides: Sides,
    ) -> Tensor:  # fmt: skip
        out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        fed = x.new_empty(len(tokens), sides.first.weights.shape[1])
        low1, low2 = (None if A is None else x.new_empty(len(tokens), A.shape[1]) for A in (A1, A2))
        first, second = _Rows(sides.first, low1), _Rows(sides.second, low2)

        def visit(expert: int, rows: slice) -> None:
            of, share = tokens[rows], shares[rows, None].to(x.dtype)
            fed[rows] = first.forward(expert, rows, x.index_select(0, of))
            if sides.first_bias is not None:
                fed[rows].add_(sides.first_bias[expert])
            y = second.forward(expert, rows, sides.gate(fed[rows]) * share)
            if sides.second_bias is not None:
                y.addcmul_(share, sides.second_bias[expert])
            out.index_add_(0, of, y.to(out.dtype))

        for expert, rows in ends.segments():
            visit(expert, rows)
        ctx.save_for_backward(x, shares, tokens, fed, low1, low2)
        ctx.ends, ctx.sides, ctx.backend = ends, sides, ops.chosen()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, shares, tokens, fed, low1, low2 = ctx.saved_tensors
        sides, dshares = ctx.sides, torch.zeros_like(shares)
        dx = torch.zeros_like(dout) if ctx.needs_input_grad[0] else None
        gradients = [_zeros(matrix) for side in sides[:2] for matrix in side.adapter or (None, None)]
        first, second = _Rows(sides.first, low1, *gradients[:2]), _Rows(sides.second, low2, *gradients[2:])

        def visit(expert: int, rows: slice) -> None:
            of, share = tokens[rows], shares[rows, None].to(x.dtype)
            dfed = through_gate(expert, rows, dout.index_select(0, of).to(x.dtype), share)
            given = first.backward(expert, rows, dfed, x.index_select(0, of))
            if dx is not None:
                dx.index_add_(0, of, given().to(dx.dtype))

        def through_gate(expert: int, rows: slice, dy: Tensor, share: Tensor) -> Tensor:
            before = fed[rows].detach().requires_grad_()
            with torch.enable_grad():
                gated = sides.gate(before)
            h = gated.detach()
            u = second.backward(expert, rows, dy, h * share)()
            dshares[rows] = (u * h).sum(-1)
            if sides.second_bias is not None:
                dshares[rows] += dy.to(shares.dtype) @ sides.second_bias[expert].to(shares.dtype)
            dfed: Tensor = torch.autograd.grad(gated, before, u.mul_(share))[0]
            return dfed.contiguous()

        with ops.keeping(ctx.backend):
            for expert, rows in ctx.ends.segments():
                visit(expert, rows)
        return None if dx is None else dx.to(x.dtype), dshares, *gradients, None, None, None


def _zeros(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.new_zeros(matrix.shape, dtype=torch.promote_types(matrix.dtype, torch.float32))
