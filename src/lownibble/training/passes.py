"""Forward and backward passes in training: attention kernel, compiled layers, gradient checkpointing and mixed precision.

Attention and compiled layers are swapped in for a pass and restored after it, so evaluation, generation and the caller see the
original model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch

from lownibble.config import PREFERENCE, Checkpointing
from lownibble.data import Batch, Example, sequences_of
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora import LowRank
from lownibble.lora.layer import RoundedAdapters
from lownibble.memory import usage
from lownibble.memory.dryrun import COMPILED_TOKENS
from lownibble.models.attention import (
    causal_attention,
    causal_obstacle,
    kernel_obstacle,
    prefix_attention,
    refusal,
    segment_attention,
)
from lownibble.models.forwards import Forward
from lownibble.models.info import checkpointing_call, info
from lownibble.models.linears import installed, own_forwards
from lownibble.planning.tiles import is_long, tile_lengths
from lownibble.training import compiling
from lownibble.training.graphs import Graphs, decided, draws_random
from lownibble.training.graphs import obstacle as obstacle_to_graphs
from lownibble.training.loss import check_packing, check_prefixes, check_rows, check_unmasked
from lownibble.training.microbatches import MicroBatches
from lownibble.training.offload import COPIES, Offloaded, obstacle
from lownibble.training.sharding import rest_gathered
from lownibble.training.tiles import Tiled

Kind = tuple[bool, bool]
"""Kind of a batch for the compiler: whether it has padding, and more than one row. Each kind is compiled separately."""


def kind(batch: Batch) -> Kind:
    """The kind of a batch."""
    return batch.is_padded, len(batch.input_ids) > 1


class Passes:
    """Forward and backward passes of `model` over the batches of `micro`; `loss` is the loss function (see `objectives.py`).

    Attributes:
        attention_reason: why attention does not run on Lownibble's kernel; empty if it does.
        mask_reason: why transformers makes masks for each pass on a GPU; empty if it does not.
        prefix_reason: of preferences, why tokens that sequences begin with alike are not computed once; empty if they are.
        compiled, compile_reason, compile_seconds, compile_peak_bytes: whether the layers are compiled, why, how long it took and
            the peak memory up to the end of compilation.
        saved_activation_bytes: bytes that autograd saved in the last `measured` forward pass.
        tiled: how modules of long microbatches run in tiles of tokens; None until there is one.
        graphs, graph_reason: CUDA graphs of the passes, or None, and why there are none.
    """

    def __init__(
        self, model: Any, micro: MicroBatches, device: torch.device, loss: Callable[[Any, Batch, Any], torch.Tensor]
    ) -> None:
        self._of_batch = loss
        self.model, self.micro, self.device = model, micro, device
        self.attention_reason = self.mask_reason = ""
        self.prefix_reason: str | None = None
        self.compiled, self.compile_reason, self.compile_seconds, self.compile_peak_bytes = False, "", 0.0, 0
        self.saved_activation_bytes = 0
        self._attention = segment_attention if micro.pack_to else nullcontext
        self._layers: compiling.Compiled | None = None
        self._linears: list[tuple[torch.nn.Module, Forward]] | None = None
        self._kinds: set[Kind] = set()
        self._checkpointing: Checkpointing = False
        self._offloaded: Offloaded | None = None
        self.tiled: Tiled | None = None
        self._rounded: RoundedAdapters | None = None
        self._draws, self._told_of_graphs = True, False
        self._captured_with: Checkpointing = False
        self.graphs: Graphs | None = None
        self.graph_reason = ""

    def check(self) -> None:
        """Choose the attention kernel; with packing, compare packed rows with each row alone.

        Raises:
            ModelError: this model cannot be packed.
        """
        if self.model.config.is_encoder_decoder:
            if self.micro.pack_to:
                raise refusal(type(self.model).__name__, "it has an encoder, whose attention looks both ways")
            self.attention_reason = "an encoder's attention looks both ways, and a decoder's to the encoder"
            return
        if self.micro.pack_to:
            by_length = sorted((row.input_ids for row in self.micro.rows), key=len)
            check_packing(self.model, [by_length[-1], by_length[0]])
            self.attention_reason = kernel_obstacle(self.model)
            return
        if self.micro.config.objective in PREFERENCE and self.share_prefixes():
            return
        rows = self.micro.rows
        batch = self.micro.batch([rows[0], min(rows, key=lambda row: len(row.input_ids))]).to(self.device)
        self.attention_reason = check_rows(self.model, batch.input_ids, batch.attention_mask)
        if not self.attention_reason:
            self._attention = segment_attention
        elif self.device.type != "cpu":
            self._check_masks(batch)

    def share_prefixes(self) -> bool:
        """Compute tokens that sequences begin with alike once, if the model can on all ranks; returns whether it can."""
        rows = [pick(self.micro.rows, key=lambda row: len(row.input_ids)) for pick in (max, min)]
        longest, shortest = (max((ids for ids, _ in sequences_of(row)), key=len) for row in rows)
        reasons = self.micro.ranks.of_all(check_prefixes(self.model, longest, shortest))
        self.prefix_reason = next(filter(None, reasons), "")
        if not self.prefix_reason:
            self._attention, self.attention_reason = prefix_attention, kernel_obstacle(self.model)
            self.micro.share_prefixes()
        return self.micro.shares

    def _check_masks(self, batch: Batch) -> None:
        """Find out whether right-padded rows can do without masks, best with attention that never makes any."""
        given, known = (batch.input_ids, batch.attention_mask), info(self.model)
        self._draws = draws_random(self.model, *given)
        self.mask_reason = causal_obstacle(self.model, self.micro.longest_row)
        if not self.mask_reason and not check_unmasked(self.model, *given, causal_attention):
            self.mask_reason = "its attention needs transformers' masks"
        if not self.mask_reason:
            self._attention, known.needs_mask = causal_attention, False
        else:
            known.needs_mask = not check_unmasked(self.model, *given)

    def check_outputs(self) -> None:
        """Find out, by a pass over the shortest row, whether the model changes outputs of layers in place that their adapters
        read in backward; then those keep what they need apart."""
        adapters = [m for m in self.model.modules() if isinstance(m, LowRank) and m.variant.keeps_output]
        if not adapters:
            return
        batch = self.micro.batch([min(self.micro.rows, key=lambda row: len(row.input_ids))])
        try:
            self.backward(batch, max(1, batch.n_label_tokens))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            for adapter in adapters:
                adapter.output_changes = True
        finally:
            self.model.zero_grad(set_to_none=True)

    def choose_compilation(self, option: bool | Literal["auto"], tokens: int) -> None:
        """Decide whether to compile for a run over `tokens` tokens; `compile` then does it.

        Raises:
            ConfigError: compilation was requested but is not possible here (says what is missing).
        """
        self.compiled, self.compile_reason = compiling.choose(option, self.model, self.device, tokens)

    def refuse_graphs(self, option: bool | Literal["auto"], plain_loss: bool) -> None:
        """Refuse CUDA graphs that are requested and not possible; before the rest is decided.

        Args:
            plain_loss: the loss is the next-token one.
        Raises:
            ConfigError: they are not possible here.
        """
        if option is True and (found := self._against_graphs(plain_loss)):
            raise ConfigError(f"cuda_graphs=True cannot be done: {found}. Use cuda_graphs=False (--cuda-graphs false).")

    def choose_graphs(self, option: bool | Literal["auto"], plain_loss: bool, budgeted: bool) -> None:
        """Decide whether passes are replayed as CUDA graphs, after the rest is decided; see `decided`."""
        found = self._against_graphs(plain_loss)
        self.graph_reason = decided(option, "" if self.compiled else self.compile_reason, budgeted, found)
        if not self.graph_reason:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.graphs, self._captured_with = Graphs(self._run, trained, self.device, self._most_tokens), self._checkpointing

    def _against_graphs(self, plain_loss: bool) -> str:
        if self.micro.ranks.sharded:
            return "weights are gathered from other ranks in each pass"
        packed = self.micro.pack_to is not None
        found = obstacle_to_graphs(self.model, self.device, packed=packed, plain_loss=plain_loss, draws=self._draws)
        if not found and self.mask_reason:
            return f"masks are made anew in each pass: {self.mask_reason}"
        if not found and self._checkpointing == "offload":
            return "checkpoints are offloaded to the host"
        if not found and self._checkpointing and is_long(self.micro.whole):
            return "long microbatches run in tiles of tokens"
        return found

    def _most_tokens(self) -> int:
        """Tokens that a padded microbatch may have: those that memory was fitted to."""
        return self.micro.max_tokens or self.micro.whole

    def drop_graphs(self, reason: str) -> bool:
        """Go on without CUDA graphs, and free their memory; returns whether there were any."""
        return self.graphs is not None and self.graphs.drop(reason)

    def lost_graphs(self) -> str:
        """Why CUDA graphs were disabled during the run, when asked for the first time afterwards; else ''."""
        lost = "" if self.graphs is None or self._told_of_graphs else self.graphs.obstacle
        self._told_of_graphs = self._told_of_graphs or bool(lost)
        return lost

    @property
    def is_any_compiled(self) -> bool:
        """Whether the layers were compiled for some kind of batch."""
        return bool(self._kinds)

    def do_not_compile(self, reason: str) -> None:
        """Cancel compilation, for `reason`."""
        self.compiled, self.compile_reason, self._layers = False, reason, None

    def compile(self, batches: Iterable[Batch]) -> None:
        """Compile the layers for the kinds of these batches, by a pass over one batch of each new kind; batches that run in tiles
        are left out.

        Raises:
            TrainingError: a layer cannot be compiled.
        """
        short = (batch for batch in batches if not self._runs_in_tiles(batch))
        new = {found: batch for batch in short if (found := self._kind(batch)) not in self._kinds}
        if self.micro.ranks.sharded:  # all ranks take part in each pass
            kinds = sorted(set().union(*self.micro.ranks.of_all(set(new))))
            new = {each: new.get(each) or self._batch_of(each, COMPILED_TOKENS) for each in kinds}
        if not new:
            return
        began = time.perf_counter()
        gradients = [(p, p.grad) for p in self.model.parameters()]
        self._layers = self._layers or compiling.Compiled(self.model)
        try:
            with compiling.torchs_own_warnings_off():
                for batch in new.values():
                    self.backward(batch, max(1, batch.n_label_tokens))
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        self._kinds |= new.keys()
        self.compile_seconds += time.perf_counter() - began
        self.compile_peak_bytes = max(self.compile_peak_bytes, usage.peak_bytes(self.device))
        usage.reset_peak(self.device)  # compilation memory does not count as a step's

    def compile_for(self, batch: Batch, tokens: int) -> None:
        """Compile the layers for this batch's kind, by a pass over a batch of about `tokens` tokens."""
        self.compile([self._batch_of(self._kind(batch), tokens)])

    def _kind(self, batch: Batch) -> Kind:
        """The kind of a batch; a tree of sequences is one row without padding."""
        return (False, False) if self.micro.shares else kind(batch)

    def _batch_of(self, wanted: Kind, tokens: int) -> Batch:
        """A batch of a kind, of about `tokens` tokens."""
        padded, several = wanted
        longest = max(self.micro.rows, key=lambda row: len(row.input_ids))
        length = min(tokens // (1 + several), len(longest.input_ids))
        lengths = [length, max(1, length - padded)][: 1 + several]
        rows = [Example(longest.input_ids[:n], [False] + [True] * (n - 1), "compilation") for n in lengths]
        return self.micro.batch(rows)

    def set_checkpointing(self, how: Checkpointing) -> None:
        """Turn gradient checkpointing on or off, or on with offloaded checkpoints.

        Raises:
            ConfigError: the model does not support it, or checkpoints cannot be offloaded here.
        """
        if how == self._checkpointing:
            return
        call = checkpointing_call(self.model, "enable" if how is True else "disable")
        if not self.can_checkpoint or call is None:
            raise ConfigError(f"{type(self.model).__name__} has no gradient checkpointing. Leave gradient_checkpointing out.")
        self._offloaded = Offloaded(self.model, self.device) if how == "offload" else None
        keep = {"use_reentrant": False, "preserve_rng_state": self._draws}  # a pass whose state is read cannot be captured
        call(keep) if how is True else call()
        self._checkpointing = how

    @property
    def can_checkpoint(self) -> bool:
        """Whether the model supports gradient checkpointing."""
        return bool(getattr(self.model, "supports_gradient_checkpointing", False))

    @property
    def can_offload(self) -> bool:
        """Whether checkpoints can be offloaded here."""
        if not self.can_checkpoint or self.micro.ranks.sharded or obstacle(self.model, self.device):
            return False
        try:
            COPIES[self.device.type](self.device)
        except ConfigError:  # no pinned memory
            return False
        return True

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Attention, and dense linear layers, by Lownibble's kernels where they can."""
        if self._linears is None:
            self._linears = own_forwards(self.model)
        with self._attention(self.model), installed(self._linears):
            yield

    @contextmanager
    def _in_place(self, batch: Batch) -> Iterator[None]:
        """Compiled layers, or tiles for a long batch, and offloaded checkpoints."""
        with ExitStack() as stack:
            if self._runs_in_tiles(batch):
                self.tiled = self.tiled or Tiled(self.model, batch.input_ids[0].to(self.device))
                stack.enter_context(self.tiled())
            elif self._layers:
                stack.enter_context(self._layers())
            if self._offloaded:
                stack.enter_context(self._offloaded())
            yield

    def _runs_in_tiles(self, batch: Batch) -> bool:
        """Whether a batch is run in tiles: with checkpointing, any that is longer than a tile, in a run of long batches."""
        return (
            bool(self._checkpointing)
            and not self.model.config.is_encoder_decoder
            and is_long(self.micro.whole)
            and len(tile_lengths(self.micro.computed(batch))) > 1
        )

    def _rounding(self) -> AbstractContextManager[Any]:
        """Adapters rounded once for a pass, where launches of kernels are what costs and they are at hand."""
        if self.micro.ranks.sharded:
            return nullcontext()
        if self._rounded is None and self.device.type == "cuda" and self.model.dtype in (torch.bfloat16, torch.float16):
            self._rounded = RoundedAdapters(self.model, self.model.dtype)
        return nullcontext() if self._rounded is None else self._rounded()

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast if the weights are float32 master weights for 16-bit matmuls."""
        dtype = info(self.model).autocast
        return torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext()

    def loss(self, batch: Batch, n_total: int) -> torch.Tensor:
        """Sum of the batch's losses divided by `n_total`, without compiled layers; in tiles where `backward` was."""
        tiles = self.tiled() if self.tiled and self._runs_in_tiles(batch) else nullcontext()
        with rest_gathered(self.model, self.micro.ranks), self._kernels(), tiles:
            return self._loss(batch, n_total)

    def _loss(self, batch: Batch, n_total: int | torch.Tensor) -> torch.Tensor:
        with self._precision():
            return self._of_batch(self.model, batch.to(self.device), n_total)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block the model runs as in training passes, without gradients, dropout and compiled layers."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._kernels(), self._precision():
                yield
        finally:
            self.model.train(was_training)

    def backward(self, batch: Batch, n_total: int, *, measured: bool = False, replay: bool = False) -> torch.Tensor:
        """Accumulate the gradients of a microbatch; returns its loss, (), on the device.

        Args:
            measured: count the activations that autograd saves.
            replay: with CUDA graphs where there are any.
        Raises:
            TrainingError: a layer cannot be compiled, or the loss has no gradient.
        """
        if replay and self.graphs is not None and self._checkpointing == self._captured_with:
            return self.graphs(batch, n_total, measured)
        return self._run(batch, n_total, measured)

    def _run(self, batch: Batch, n_total: int | torch.Tensor, measured: bool = False) -> torch.Tensor:
        watch = usage.SavedActivations()
        self.model.train()
        with rest_gathered(self.model, self.micro.ranks), self._kernels(), self._in_place(batch), self._rounding():
            with watch.watch(self.model) if measured else nullcontext():
                loss = self._loss(batch, n_total)
            if measured:
                self.saved_activation_bytes = watch.bytes
            if not loss.requires_grad:
                raise TrainingError(
                    f"The loss of {type(self.model).__name__} has no gradient: its code detaches its layers, and it cannot be "
                    "trained here."
                )
            torch.autograd.backward(loss)
        return loss.detach()
