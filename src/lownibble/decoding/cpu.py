"""CpuDecoder: decoding of a causal model on a packed base on the CPU, with all decoder layers in one operation.

transformers' layers are read once (`form.py`); embedding, final norm and head stay transformers' modules. Of a model that takes
images, too, it is the language model's layers, for text; what an adapter changes beside them is left out. A model whose modules
qualify may still compute something else with them (rotate other pairs), so before its first use the logits of a few tokens are
compared with the model's own; a difference beyond rounding is an error. So no list of supported models is needed; packing is
checked the same way (`models/attention.py`).

Layers with a window keep what may still be read, and little more (`spans.py`).

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

from lownibble.decoding.caches import Layer, SlotCache
from lownibble.decoding.decoder import Decoder, RefusedError
from lownibble.decoding.form import branch_paths, language_model, paths_beside_text, read_adapter, read_layers, rope_types
from lownibble.decoding.spans import parts_of, places_of
from lownibble.kernels import ops
from lownibble.kernels.decoder import Context, DecoderLayers, Segment, Step
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


class CpuCache(SlotCache):
    """Keys and values in float32, of the layers of each window together."""

    def __init__(self, layers: DecoderLayers, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, layers.windows)
        heads, head_dim, self.contexts = layers.of[0].key_heads, layers.of[0].head_dim, []
        for window, span in self.spans.items():
            shape = (2, sum(layer.window == window for layer in layers.of), slots, heads, span.places, head_dim)
            self.contexts.append(Context(*torch.zeros(shape, dtype=torch.float32).unbind()))
        for index, (layer, (window, row)) in enumerate(zip(layers.of, layers.kept, strict=True)):
            keys, values = self.contexts[window]
            self.layers[index] = Layer(keys[row], values[row], self.spans[layer.window])


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
        self.paths, self.unread, self._body = branch_paths(model), paths_beside_text(model), language_model(model)
        self.note = f"the CPU's decoder with {'compiled' if self.layers.in_4bit else 'plain'} layers"
        self.note += "" if self._body is model.base_model else ", of the language model alone: for text"
        self._angles = (torch.empty(1, 0, self.layers.of[0].head_dim, dtype=torch.float32),) * 2
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
        return CpuCache(self.layers, slots, capacity)

    def slot_bytes(self, capacity: int) -> int:
        """As `Decoder.slot_bytes`."""
        places = sum(places_of(layer.window, capacity) for layer in self.layers.of)
        return 2 * 4 * self.layers.of[0].key_heads * self.layers.of[0].head_dim * places

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: CpuCache, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Decoder.step`; logits are float32."""
        cosine, sine = self._rotary(positions)
        if segments is None:
            segments = [Segment(0, len(tokens), self.adapter)] if self.adapter else []
        x_TH = self.model.get_input_embeddings()(tokens) * getattr(self._body, "embedding_multiplier", 1.0)
        cache.enter(parts_of(slots, positions))
        ops.decoder_layers(x_TH, self.layers, cache.contexts, Step(slots, cache.places(slots, positions), cosine, sine), segments)
        x_WH = self._body.norm(x_TH if wanted is None else x_TH[wanted])
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
            found = [self._body.rotary_emb(torch.empty(1, dtype=torch.float32), places, *kind) for kind in kinds]
            if any(cosine.shape[-1] != self.layers.of[0].head_dim for cosine, _ in found):
                raise RefusedError(self.model, "only a part of each head is rotated")
            self._angles = (torch.cat([cosine for cosine, _ in found]), torch.cat([sine for _, sine in found]))
        return self._angles[0][:, positions], self._angles[1][:, positions]

    @torch.inference_mode()
    def _check(self) -> None:
        tokens = torch.arange(_CHECKED_TOKENS) * 37 % self.model.config.get_text_config().vocab_size
        places = torch.arange(len(tokens))
        found = self.step(tokens, torch.zeros_like(places), places, CpuCache(self.layers, 1, len(tokens)))
        expected = self.model(tokens.unsqueeze(0), use_cache=False).logits[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise RefusedError(
                self.model, f"its layers compute something else than their parts say (logits differ by {difference:.0e})"
            )
