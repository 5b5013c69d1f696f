"""Compiled decoder layers on fake tensors: torch's own graphs, with what the compiler fuses left out of the memory.

torch.compile traces a layer, splits it into forward and backward, and chooses what is saved between them, all as in a real run;
only the last stage is another: instead of kernels the graphs are interpreted, one operation at a time. An elementwise result that
only elementwise operations and reductions read is never written by the real kernels, so its bytes do not count here. What the
compiler writes in place of an input is counted as new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state


class Recorder(Protocol):
    """Records allocations; those made while `fused` is set are of no bytes."""

    fused: bool


_ELEMENTWISE = {torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default, torch.ops.aten.cat.default}
"""Elementwise operations that torch does not tag so in all versions."""

_REDUCTIONS = ("mean", "sum", "amax", "amin", "var_mean", "prod")


def backend(recorder: Recorder, join: bool) -> Callable[..., Any]:
    """A backend for torch.compile whose graphs run on fake tensors, with fused results announced to `recorder`.

    Args:
        join: join low-rank products, as in compiled layers on CUDA.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.pattern_matcher import stable_topological_sort

    from lownibble.lora.joined import JoinLowRank

    def compile_graph(graph: fx.GraphModule, example_inputs: Any) -> Callable[[list[Any]], Any]:
        def call(arguments: list[Any]) -> Any:
            return _Interpreter(graph, recorder).boxed_run(arguments)  # a new one: it keeps the values of its last run

        call._boxed_call = True  # type: ignore[attr-defined]  # arguments are freed after their last use
        return call

    def partition(joint: fx.GraphModule, *arguments: Any, **options: Any) -> Any:
        if join:
            JoinLowRank()(joint.graph)
            stable_topological_sort(joint.graph)
            joint.recompile()
        return min_cut_rematerialization_partition(joint, *arguments, **options)

    made: Callable[..., Any] = aot_autograd(
        fw_compiler=compile_graph, bw_compiler=compile_graph, partition_fn=partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    return made


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(graph)
        self._recorder = recorder
        self._fused = {node for node in graph.graph.nodes if _is_elementwise(node) and _is_fused(node)}

    def run_node(self, n: fx.Node) -> Any:
        self._recorder.fused = n in self._fused
        try:
            return super().run_node(n)
        finally:
            self._recorder.fused = False

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As `fx.Interpreter`; operations that a checkpoint in the layer runs again with the same random numbers draw any."""
        if target is run_and_save_rng_state:
            operation, *rest = args
            return torch.empty(16, dtype=torch.uint8), operation(*rest, **kwargs)
        if target is run_with_rng_state:
            _, operation, *rest = args
            return operation(*rest, **kwargs)
        return super().call_function(target, args, kwargs)


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in _ELEMENTWISE)


def _is_reduction(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in _REDUCTIONS


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _is_fused(node: fx.Node) -> bool:
    """Whether all that reads the node's result, also through views, is elementwise or a reduction."""
    return all(_is_elementwise(user) or _is_reduction(user) or (_is_view(user) and _is_fused(user)) for user in node.users)
