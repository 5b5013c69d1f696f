"""The feed-forward part of a mixture's decoder layer, for tokens of different adapters.

Router, gates, shared experts and scaling stay the model's own code: a mixture runs a copy of the model's block that shares its
weights, in which each linear layer and each experts' weight is replaced by one that adds the low-rank branch of each token's
adapter to the base's product. So the base is multiplied once for all tokens. The model itself is not changed.

Rows are sorted by expert for the experts' products; a segment's rows among them keep that order, so an adapter's branch is a
product by expert over them, a loop as the base's. Gathering every row's own matrices for one batched product was 3 to 10 times
slower on a CPU, at 8 to 64 rows of rank 16.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.kernels.decoder import Branches
from lownibble.kernels.rows import RowAdapters
from lownibble.lora.experts import low_rank_of_experts
from lownibble.lora.layer import LoraLinear
from lownibble.models import experts
from lownibble.quant import QuantLinear
from lownibble.quant.experts import Ends, QuantExperts, products
from lownibble.quant.linear import is_linear


class Tokens:
    """What the parts of a block, or the hooks of a model, know of the tokens in progress."""

    def __init__(self) -> None:
        self.count = 0
        self.branches: Branches = ()
        self.rows: RowAdapters | None = None
        """The adapters of a static step's rows, which are all tokens; then there are no `branches`."""
        self.sorted: list[tuple[Tensor, Ends]] = []
        """By segment: its rows among those sorted by expert, and where these end by expert."""

    def sort(self, top_k_index: Tensor, n_experts: int) -> None:
        """Find each segment's rows; `top_k_index`: (T, k) the experts of each token."""
        expert_of_row, order = top_k_index.reshape(-1).sort(stable=True)
        token_of_row = order // top_k_index.shape[-1]
        rows = [((token_of_row >= begin) & (token_of_row < end)).nonzero()[:, 0] for begin, end, _ in self.branches]
        self.sorted = [(of_segment, Ends.of(expert_of_row[of_segment], n_experts)) for of_segment in rows]

    def add_of_experts(self, index: int, x_SK: Tensor, y_SN: Tensor) -> Tensor:
        """Add the branches of the experts' weight `index` to its product, rows sorted by expert."""
        for (rows, its_ends), (_, _, of_linears) in zip(self.sorted, self.branches, strict=True):
            if branch := of_linears[index]:
                y_SN.index_add_(0, rows, low_rank_of_experts(x_SK[rows], its_ends, branch.A, branch.B, branch.scale))
        return y_SN

    def add(self, index: int, bias: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        """Add the branches of the linear layer `index` to its output, after scaling its rows where a branch has a gain.

        Raises:
            ModelError: there are branches, and the layer is not given one row per token.
        """
        branches = [(begin, end, branch) for begin, end, of_linears in self.branches if (branch := of_linears[index])]
        if not branches:
            return y
        x_TK, y_TN = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        self._check_rows(x_TK)
        for begin, end, branch in branches:
            rows = y_TN[begin:end]
            if branch.gain is not None:
                rows.mul_(gain := branch.gain.to(y))
                if bias is not None:
                    rows.addcmul_(bias, 1 - gain)
            low = x_TK[begin:end] @ branch.A.to(y).t()
            rows.addmm_(low, branch.B.to(y).t(), alpha=branch.scale)
        return y

    def add_rows(self, index: int, x: Tensor, y: Tensor) -> None:
        """Add to the output of the linear layer `index` the branch of each row's adapter, if any has one there.

        Raises:
            ModelError: as `add`.
        """
        assert self.rows is not None
        if index not in self.rows.touched:
            return
        x_TK, y_TN = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        self._check_rows(x_TK)
        dtype = self.rows.dtype
        if y.dtype == dtype:
            ops.add_low_rank_rows(y_TN, x_TK.to(dtype), self.rows, index)
        else:  # a layer that the model keeps in another precision
            added = torch.zeros_like(y_TN, dtype=dtype)
            ops.add_low_rank_rows(added, x_TK.to(dtype), self.rows, index)
            y_TN.add_(added)

    def _check_rows(self, x_TK: Tensor) -> None:
        if len(x_TK) != self.count:
            raise ModelError(
                f"A linear layer is given {len(x_TK)} rows for {self.count} tokens, so the rows' adapters are not known. Merge "
                "the adapter (lownibble merge)."
            )


class _Linear(nn.Module):
    """A linear layer and its branches; `index`: of the branches of the layer."""

    def __init__(self, base: nn.Module, index: int, tokens: Tokens) -> None:
        super().__init__()
        self.base, self.index, self.tokens = base, index, tokens

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return self.tokens.add(self.index, bias, x, self.base(x))


class _Experts(nn.Module):
    """Weights of experts and their branches; `index`: of the branches of the layer."""

    def __init__(self, base: QuantExperts, index: int, tokens: Tokens) -> None:
        super().__init__()
        self.base, self.index, self.tokens = base, index, tokens

    def forward(self, x_SK: Tensor, ends: Ends) -> Tensor:
        weights: Any = self.base.weight
        y_SN = products(x_SK, weights, ends)
        return self.tokens.add_of_experts(self.index, x_SK, y_SN)


class Mixture:
    """A `FeedForward` of the block of a mixture of experts, whose weights it shares.

    Args:
        block: with experts on packed weights, in evaluation mode.
    """

    def __init__(self, block: nn.Module) -> None:
        self.linears = self.linears_of(block)
        self._tokens = Tokens()
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
        shared |= {id(part.config): part.config for part in block.modules() if hasattr(part, "config")}
        for index, path in enumerate(self.linears):
            module = block.get_submodule(path)
            base = module.base if isinstance(module, LoraLinear) else module
            made = _Experts(base, index, self._tokens) if isinstance(base, QuantExperts) else _Linear(base, index, self._tokens)
            shared[id(module)] = made
        self._block = copy.deepcopy(block, shared)  # `shared` says what each part becomes
        for _, container in experts.containers(self._block):
            container.forward = _pass_of(container, self._tokens)

    def __call__(self, x_TH: Tensor, branches: Branches) -> Tensor:
        """The block's output (T, hidden); see `FeedForward`."""
        self._tokens.count, self._tokens.branches = len(x_TH), branches
        y = self._block(x_TH.unsqueeze(0))
        y_BTH: Tensor = y[0] if isinstance(y, tuple) else y  # some blocks return the router's scores, too
        return y_BTH.view(x_TH.shape)

    @staticmethod
    def linears_of(block: nn.Module) -> list[str]:
        """Paths of a block's linear layers and experts' weights, adapted or not."""
        found: list[str] = []
        for path, module in block.named_modules():
            inside = found and path.startswith(f"{found[-1]}.")  # an adapted layer's base
            if not inside and (isinstance(module, (LoraLinear, QuantLinear)) or is_linear(module)):
                found.append(path)
        return found

    @staticmethod
    def dense_weights(block: nn.Module) -> list[str]:
        """Paths of the experts' weights that are not packed."""
        return [
            path
            for path, held in experts.expert_weights(block).items()
            if not isinstance(held.base if isinstance(held, LoraLinear) else held, QuantExperts)
        ]


def _pass_of(container: Any, tokens: Tokens) -> Any:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens.sort(top_k_index, container.num_experts)
        return experts.experts_forward(container, hidden_states, top_k_index, top_k_weights)

    return forward
