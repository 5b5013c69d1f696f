"""FSDP2 over the decoder layers of a model, and what a rank holds of each trained tensor.

Layers are sharded by torch's `fully_shard`: each tensor, packed ones too, along its first dimension, gathered when its layer runs
and freed after it, forward and backward; the next layer is gathered meanwhile. Embeddings, final norm and head are one more
group, gathered for a whole pass, since the loss reads the head's weight itself (`rest_gathered`). Passes call a model's body and
head, not the module that is FSDP2's root, so that torch takes each layer for the first of a pass, whose gather waits for what the
device is doing: so prefetching the next layer is set explicitly (`prefetch`).

Loading puts adapters on each layer and shards it as soon as its weights are there, so that a rank holds its shards and one layer
(`Sharding.finish_layer`, called by `models.load`).

With `fsdp_cpu_offload` shards, their gradients and the optimiser's states are in host memory, and the optimiser steps on the CPU;
a group's shards are copied to the device before they are gathered. So there are two devices: where passes run
(`models.info.pass_device`), which inputs go to, and where parameters are (`Trainer.parameter_device`), where gradients are
clipped, their norm summed over gloo, and used. Without offloading, and on CPUs, they are one.

The optimiser sees plain tensors, this rank's rows of each trained one (`Part`): AdamW computes element by element, so its results
are those on the whole tensor. Moments in 8 bits are kept by blocks of 256 values: where every rank's rows begin with a block,
blocks, codes and checkpoints are those of one process; where one would be cut, 8-bit optimisers are refused (`check_blocks`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lownibble import launch
from lownibble.calibration import Moments, walk
from lownibble.config import PlanConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, InputError, ModelError, TargetError
from lownibble.lora.adapter import StoredAddition
from lownibble.lora.inject import Addition
from lownibble.memory.planned import device_of
from lownibble.models.info import decoder_layers, info
from lownibble.optim.specs import BLOCK_8BIT, SMALLEST_8BIT
from lownibble.planning.exchange import cuts_a_block, not_on_shards
from lownibble.planning.plan import auto
from lownibble.quant.linear import exact_products
from lownibble.training.distributed import Mode, Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import OffloadPolicy

SHARDS_PACKED = torch.__version__ >= "2.12"
"""Whether torch can shard tensors that are not floats."""
_LEFT_OUT = ("layerdrop", "decoder_layerdrop")
"""In configurations (OPT, XGLM, BART): the share of layers that are left out at random of each pass of training."""
UNSHARDED = (f"packed weights by torch {torch.__version__}", "Use torch 2.12 or later")


@dataclass(frozen=True)
class Part:
    """What this rank holds of a trained tensor.

    Attributes:
        parameter: what the optimiser steps: the model's own parameter, or a view of this rank's shard of it.
        of: the model's parameter.
        shape: of the whole tensor.
        first: index of the part's first value in it.
    """

    parameter: nn.Parameter
    of: nn.Parameter
    shape: tuple[int, ...]
    first: int = 0

    @property
    def is_shard(self) -> bool:
        """Whether other ranks hold the rest."""
        return self.parameter is not self.of


def parts(model: nn.Module) -> dict[str, Part]:
    """Name -> this rank's part of each trained tensor that it holds any of."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor):
            found[name] = Part(parameter, parameter, tuple(parameter.shape))
            continue
        local = parameter.to_local()
        if local.numel():
            rows = -(-parameter.shape[0] // parameter.device_mesh.size())
            first = rows * parameter.device_mesh.get_local_rank() * (parameter.numel() // parameter.shape[0])
            found[name] = Part(nn.Parameter(local.detach()), parameter, tuple(parameter.shape), first)
    return found


def give_gradients(held: Iterable[Part]) -> None:
    """Hand gradients of shards to the tensors that the optimiser steps."""
    for part in held:
        if part.is_shard and part.of.grad is not None:
            gradient = part.of.grad
            part.parameter.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient


def drop_gradients(held: Iterable[Part]) -> None:
    """Drop all gradients."""
    for part in held:
        part.parameter.grad = part.of.grad = None


@contextmanager
def gathered(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Inside the block the first rank's model has its trained parameters whole, on the CPU; for reading, not for forward passes.

    They are gathered one by one: other ranks hold one at a time.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                held.append((module, name, parameter))
    whole: dict[int, nn.Parameter] = {}  # tied ones stay tied
    try:
        for module, name, parameter in held:
            if id(parameter) not in whole:
                values = parameter.full_tensor()
                whole[id(parameter)] = nn.Parameter(values.cpu() if ranks.is_first else values.new_empty(0))
            if ranks.is_first:
                module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


@contextmanager
def rest_gathered(model: Any, ranks: Ranks) -> Iterator[None]:
    """Inside the block what is outside of decoder layers is whole on every rank: for a pass, and for what reads those weights."""
    if not ranks.sharded:
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def prefetch(layers: Sequence[Any]) -> None:
    """While a sharded layer runs, gather the next one: in forward the following, in backward the one before."""
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    layers[0].set_modules_to_backward_prefetch([layers[0]])  # which is there: with none torch takes the last of an evaluation


def offload_policy(config: TrainConfig, device: torch.device) -> OffloadPolicy:
    """Where shards are between passes: on the device, or in host memory, pinned where a GPU copies from it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.fsdp_cpu_offload else OffloadPolicy()


def check(config: RunConfig) -> None:
    """Refuse what cannot be sharded, before anything is loaded.

    Raises:
        ConfigError: names the option and a remedy.
    """
    if found := not_on_shards(config.train, config.lora, merge_aware=config.merge_aware):
        raise _refusal(*found)
    if config.method == "qlora" and not SHARDS_PACKED:
        raise _refusal(*UNSHARDED)


def check_training(config: TrainConfig) -> None:
    """Refuse training options that cannot be done on shards.

    Raises:
        ConfigError: names the option and a remedy.
    """
    if found := not_on_shards(config):
        raise _refusal(*found)


def _refusal(what: str, remedy: str) -> ConfigError:
    return ConfigError(f"parallel='fsdp' cannot be done with {what}. {remedy}, or use --parallel ddp.")


def check_blocks(model: nn.Module, optim: str) -> None:
    """Refuse an optimiser with 8-bit moments where a rank's rows do not begin with a block of them.

    Raises:
        ConfigError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad and isinstance(parameter, DTensor)) or parameter.numel() < SMALLEST_8BIT:
            continue
        ranks, rows = parameter.device_mesh.size(), parameter.shape[0]
        if cuts_a_block(-(-rows // ranks) * (parameter.numel() // rows), ranks, optim):
            raise ConfigError(
                f"optim={optim!r} keeps moments in blocks of {BLOCK_8BIT} values, and {ranks} processes would cut a block of "
                f"'{name}' {tuple(parameter.shape)}. Use adamw or paged_adamw, another number of processes, or --parallel ddp."
            )


def mode_of(config: RunConfig, device: torch.device, world: int) -> Mode:
    """How `world` ranks share the model where that is left open: as `lownibble plan` marks it (`planning.plan.auto`).

    'ddp' too where the planner does not know the model, or the run cannot be sharded, which is warned of if it does not fit.
    """
    refusal = ""
    try:
        check(config)
    except ConfigError as error:
        refusal = str(error)
    options = {name: getattr(config, name) for name in RunConfig.model_fields.keys() & PlanConfig.model_fields.keys()}
    try:
        there = device_of(device)
        there = replace(there, memory_bytes=there.memory_bytes // launch.sharing(device.type))
        planned = auto(PlanConfig(**options), there, world)
    except InputError:
        return "ddp"
    refusal = refusal or planned.refusal
    if planned.fits or not refusal:
        return planned.parallel
    warnings.warn(f"By the plan the run does not fit a device, and it cannot be sharded: {refusal}", stacklevel=2)
    return "ddp"


class Sharding:
    """Shards a model while it is loaded (`models.load.ByLayer`), as the run's configuration says; `device` is this rank's.

    Args:
        restored: A and B come from a checkpoint, so that adapters need not be started.
        calibration: model -> token ids (rows, tokens), for a start that looks at layers' inputs; None for others.

    Attributes:
        largest_bytes: of the largest group (a layer, or the rest), whole: beside its shards, what a rank holds to load.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, config: RunConfig, *, restored: bool = False,
        calibration: Callable[[Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        from torch.distributed.fsdp import fully_shard  # before memory is measured

        self._ranks, self._fully_shard = ranks, fully_shard
        self._mesh, self._device = init_device_mesh(device.type, (ranks.world,)), device
        self._offload_policy = offload_policy(config.train, device)
        self._config, self._restored, self._calibration = config, restored, calibration
        self._addition: Addition | StoredAddition | None = None
        self.largest_bytes = 0

    def begin(self, model: Any) -> None:
        """Take up a model whose weights are not there yet.

        Raises:
            ModelError: nothing is known of its layers, or it leaves out some while it is trained. Also raises as `add_lora`.
        """
        if model.config.is_encoder_decoder or not decoder_layers(model):
            what = "it has an encoder" if model.config.is_encoder_decoder else "its decoder layers are not known"
            raise ModelError(f"{type(model).__name__} cannot be sharded: {what}. Use --parallel ddp.")
        for name in _LEFT_OUT:
            if rate := getattr(model.config.get_text_config(), name, 0):
                raise ModelError(
                    f"{type(model).__name__} cannot be sharded: by {name}={rate} each process would leave out other layers, and "
                    "they gather each layer together. Use --parallel ddp, or set it to 0 in the model's config.json."
                )
        info(model).device = self._device
        if self._config.adapter is not None:
            self._addition = StoredAddition(model, self._config.adapter, self._ranks.from_first)
        elif self._config.method != "full":
            seed = self._config.train.seed
            self._addition = Addition(model, self._config.lora, seed=seed, restored=self._restored)

    def fill(self, model: Any, layers: Sequence[str], place: Callable[[str], None]) -> None:
        """Read, adapt and shard each decoder layer, then read the rest; where an initialisation looks at layers' inputs, the rest
        first, and each layer as calibration rows come to it.

        Raises:
            TargetError: it would look at the inputs of a layer outside of the decoder layers.
        """
        addition = self._addition
        if self._calibration is None or not isinstance(addition, Addition):
            for path in layers:
                place(path)
                self._finish_layer(model, path)
            place("")
            return
        place("")
        targets = addition.left
        if outer := [each for each in targets if not any(each.startswith(f"{path}.") for path in layers)]:
            raise TargetError(
                f"'{outer[0]}' is outside of the decoder layers, whose inputs shards are calibrated by. Leave it out."
            )

        @contextmanager
        def around(path: str) -> Iterator[None]:
            place(path)
            with exact_products(model.get_submodule(path)):
                yield
            self._finish_layer(model, path)

        def visit(moments: Mapping[str, Moments]) -> None:
            addition.add(next(path for path in layers if next(iter(moments)).startswith(f"{path}.")), moments)

        walk(model, self._calibration(model), targets, visit, around)

    def _finish_layer(self, model: Any, path: str) -> None:
        """Shard the decoder layer at `path`, whose weights are there, with its adapters."""
        if self._addition:
            self._addition.add(path)
        layer = model.get_submodule(path)
        if not self._addition:
            layer.requires_grad_(True)
        self._shard(layer, reshard_after_forward=True)

    def finish(self, model: Any) -> None:
        """Put adapters on the rest of the model, and make it the root of the layers."""
        if self._addition:
            self._addition.add("")
            self._addition.finish()
        else:
            model.requires_grad_(True)
        self._shard(model, reshard_after_forward=False)
        prefetch([*decoder_layers(model).values()])

    def _shard(self, module: Any, *, reshard_after_forward: bool) -> None:
        kind = type(module)
        if not (SHARDS_PACKED or all(parameter.is_floating_point() for parameter in module.parameters())):
            raise _refusal(*UNSHARDED)  # of a checkpoint that is stored packed, whatever the method
        whole = sum(p.nbytes for p in module.parameters() if not isinstance(p, DTensor))
        self.largest_bytes = max(self.largest_bytes, whole)
        self._fully_shard(
            module, mesh=self._mesh, reshard_after_forward=reshard_after_forward, offload_policy=self._offload_policy
        )
        sharded = type(module)  # a class of its own, under which others would not know the module
        sharded.__name__, sharded.__qualname__, sharded.__module__ = kind.__name__, kind.__qualname__, kind.__module__
        module.set_gradient_divide_factor(1.0)  # the sum over ranks, not their mean
        module.set_force_sum_reduction_for_comms(True)
