"""CpuDecoder: decoding of a causal model on a packed base on the CPU, with all decoder layers in one operation.

transformers' layers are read once (`form.py`); embedding, final norm and head stay transformers' modules. A model whose modules
qualify may still compute something else with them (a scaled residual), so before its first use the logits of a few tokens are
compared with the model's own; a difference beyond rounding is an error. So no list of supported models is needed; packing is
checked the same way (`models/attention.py`).

Layers with a window keep all keys and values, so that a slot goes on after any prefix, and can be copied.

Everything is float32. 8-bit matmul precision (`compute`) is for training: decode steps are exact.

A head whose weight is exact in bfloat16 (as in most checkpoints) is read from a bfloat16 copy, since reading the head is a large
part of a small model's time per token. The copy takes 2 bytes per weight for the lifetime of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lownibble.decoding.decoder import Decoder, RefusedError
from lownibble.decoding.form import branch_paths, read_adapter, read_layers, rope_types
from lownibble.kernels import ops
from lownibble.kernels.decoder import Segment, Step
from lownibble.models.head import logit_transforms

_CHECKED_TOKENS, _TOLERANCE = 12, 1e-3
"""Tokens compared, and the maximum logit difference relative to the largest logit; rounding stays far below it."""

_HEAD_ROWS = 16
"""Maximum rows for the bfloat16 head; with more, the product is no longer bound by memory bandwidth."""


@dataclass
class _Known:
    """Cached findings about a model; the head's copy is made again if the head is replaced or changed."""

    head: tuple[int, int]
    """Data pointer and version counter of the head's weight."""
    half: Tensor | None
    """The head's weight in bfloat16, (vocabulary, hidden), or None if that is not exact."""


_models: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_refused: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Why models failed the check, which so runs once per model."""


class CpuCache:
    """KV cache of `slots` sequences of up to `capacity` tokens: (layers, slots, KV heads, capacity, head_dim) float32 each."""

    def __init__(self, decoder: CpuDecoder, slots: int, capacity: int) -> None:
        layer = decoder.layers.of[0]
        shape = (2, len(decoder.layers.of), slots, layer.key_heads, capacity, layer.head_dim)
        self.slots, self.capacity = slots, capacity
        self.keys, self.values = torch.zeros(shape).unbind()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def resume(self, slot: int, n: int) -> int:
        """Later keys and values are written over."""
        return n

    def fork(self, source: int, target: int, n: int) -> None:
        """As `Forking.fork`."""
        for held in (self.keys, self.values):
            held[:, target, :, :n] = held[:, source, :, :n]


class CpuDecoder(Decoder):
    """A model's decoder layers, ready for decode steps. Shares the model's weights; recreate it if they move or change."""

    def __init__(self, model: Any) -> None:
        """Read the model.

        Raises:
            RefusedError: the architecture does not qualify, or the model is in training mode or not float32 on the CPU.
        """
        weight = model.get_input_embeddings().weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise RefusedError(model, f"it is {weight.dtype} on '{weight.device}', not float32 on a CPU")
        if model.training:
            raise RefusedError(model, "it is in training mode (model.eval() ends that)")
        self.model, self.layers, self.adapter = model, read_layers(model), read_adapter(model)
        self.paths = branch_paths(model)
        self.note = f"the CPU's decoder with {'compiled' if self.layers.in_4bit else 'plain'} layers"
        self._angles = (torch.empty(1, 0, self.layers.of[0].head_dim),) * 2
        self._transforms = logit_transforms(model)
        if why := _refused.get(model):
            raise RefusedError(model, why)
        head = model.get_output_embeddings().weight
        state, known = (head.data_ptr(), head._version), _models.get(model)
        self._half = known.half if known and known.head == state else self._exact_half(model.get_output_embeddings())
        if known is None:
            try:
                self._check()
            except RefusedError as error:
                _refused[model] = error.why
                raise
        _models[model] = _Known(state, self._half)

    def cache(self, slots: int, capacity: int) -> CpuCache:
        """As `Decoder.cache`."""
        return CpuCache(self, slots, capacity)

    def slot_bytes(self, capacity: int) -> int:
        """As `Decoder.slot_bytes`."""
        layer = self.layers.of[0]
        return 2 * 4 * len(self.layers.of) * layer.key_heads * layer.head_dim * capacity

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: CpuCache, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Decoder.step`; logits are float32."""
        cosine, sine = self._rotary(positions)
        if segments is None:
            segments = [Segment(0, len(tokens), self.adapter)] if self.adapter else []
        x_TH = self.model.get_input_embeddings()(tokens)
        ops.decoder_layers(x_TH, self.layers, cache.keys, cache.values, Step(slots, positions, cosine, sine), segments)
        x_WH = self.model.base_model.norm(x_TH if wanted is None else x_TH[wanted])
        half = self._half if len(x_WH) <= _HEAD_ROWS else None
        logits: Tensor = self.model.get_output_embeddings()(x_WH) if half is None else ops.gemv_bf16(x_WH, half)
        for transform, value in self._transforms:
            logits = transform(logits, value)
        return logits

    @staticmethod
    def _exact_half(head: nn.Module) -> Tensor | None:
        """The head's weight in bfloat16 if exact (as for bfloat16 checkpoints run in float32), else None."""
        weight = head.weight
        if type(head) is not nn.Linear or head.bias is not None or weight.dtype != torch.float32:
            return None
        half = torch.empty(weight.shape, dtype=torch.bfloat16)
        for part, of_half in zip(weight.detach().split(1024), half.split(1024), strict=True):  # avoids a full float32 copy
            of_half.copy_(part)
            if not torch.equal(of_half.float(), part):
                return None
        return half

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (angles, T, head_dim) at positions (T,), from tables that grow on demand."""
        needed, known = int(positions.max()) + 1 if len(positions) else 0, self._angles[0].shape[1]
        if needed > known:
            places = torch.arange(max(needed, 2 * known, 256)).unsqueeze(0)
            kinds = [() if kind is None else (kind,) for kind in rope_types(self.model)]
            found = [self.model.base_model.rotary_emb(torch.empty(1), places, *kind) for kind in kinds]
            if any(cosine.shape[-1] != self.layers.of[0].head_dim for cosine, _ in found):
                raise RefusedError(self.model, "only a part of each head is rotated")
            self._angles = (torch.cat([cosine for cosine, _ in found]), torch.cat([sine for _, sine in found]))
        return self._angles[0][:, positions], self._angles[1][:, positions]

    @torch.inference_mode()
    def _check(self) -> None:
        tokens = torch.arange(_CHECKED_TOKENS) * 37 % self.model.config.get_text_config().vocab_size
        places = torch.arange(len(tokens))
        found = self.step(tokens, torch.zeros_like(places), places, CpuCache(self, 1, len(tokens)))
        expected = self.model(tokens.unsqueeze(0), use_cache=False).logits[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise RefusedError(
                self.model, f"its layers compute something else than their parts say (logits differ by {difference:.0e})"
            )
