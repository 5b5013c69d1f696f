"""Decoder: incremental decoding of a causal model on a 4-bit base, with all decoder layers in one operation.

transformers' layers are read once (`form.py`); embedding, final norm and head stay transformers' modules. A model whose modules
qualify may still compute something else with them (a scaled residual, capped scores, sandwich norms), so before its first use
the logits of a few tokens are compared with the model's own; a difference beyond rounding is an error. So no list of supported
models is needed; packing is checked the same way (`models/attention.py`).

A decode step takes any number of tokens: a prompt, one token of one sequence, or one token of each of many, with an adapter per
range of tokens. Everything is float32 on the CPU. 8-bit matmul precision (`compute`) is for training: decode steps are exact.

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

from lownibble.decoding.form import read_adapter, read_layers, refusal
from lownibble.kernels import ops
from lownibble.kernels.decoder import Adapter, Segment, Step
from lownibble.models import attention

PROMPT_TOKENS = 256
"""Prompt tokens per prefill step; bounds the workspace."""

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


class Cache:
    """KV cache of `slots` sequences of up to `capacity` tokens: (layers, slots, KV heads, capacity, head_dim) float32 each."""

    def __init__(self, decoder: Decoder, slots: int, capacity: int) -> None:
        """Allocate the cache.

        Raises:
            ModelError: `capacity` exceeds the model's attention window.
        """
        window = attention.window(decoder.model)
        if window is not None and capacity > window:
            raise refusal(decoder.model, f"its attention sees a window of {window} tokens, and {capacity} were asked for")
        layer = decoder.layers.of[0]
        shape = (2, len(decoder.layers.of), slots, layer.key_heads, capacity, layer.head_dim)
        self.slots, self.capacity = slots, capacity
        self.keys, self.values = torch.zeros(shape).unbind()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.keys.nbytes + self.values.nbytes


class Decoder:
    """A model's decoder layers, ready for decode steps. Shares the model's weights; recreate it if they move or change."""

    def __init__(self, model: Any) -> None:
        """Read the model.

        Raises:
            ModelError: the architecture does not qualify, or the model is in training mode or not float32 on the CPU.
        """
        weight = model.get_input_embeddings().weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise refusal(model, f"it is {weight.dtype} on '{weight.device}', not float32 on a CPU")
        if model.training:
            raise refusal(model, "it is in training mode (model.eval() ends that)")
        self.model, self.layers, self.adapter = model, read_layers(model), read_adapter(model)
        self._angles = (torch.empty(0, self.layers.of[0].head_dim),) * 2
        head = model.get_output_embeddings().weight
        state, known = (head.data_ptr(), head._version), _models.get(model)
        self._half = known.half if known and known.head == state else self._exact_half(model.get_output_embeddings())
        if known is None:
            self._check()
        _models[model] = _Known(state, self._half)

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Cache, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run one decode step, which writes the tokens' keys and values to the cache.

        Args:
            tokens, slots, positions: (T,) int64: token ids, and the cache slot and position of each.
            segments: token ranges and their adapters; default: the model's active adapter for all tokens.
            wanted: (W,) int64, indices of the tokens whose logits are needed; default: all.
        Returns:
            (W, vocabulary) float32 logits of the next token.
        """
        cosine, sine = self._rotary(positions)
        if segments is None:
            segments = [Segment(0, len(tokens), self.adapter)] if self.adapter else []
        x_TH = self.model.get_input_embeddings()(tokens)
        ops.decoder_layers(x_TH, self.layers, cache.keys, cache.values, Step(slots, positions, cosine, sine), segments)
        x_WH = self.model.base_model.norm(x_TH if wanted is None else x_TH[wanted])
        if self._half is not None and len(x_WH) <= _HEAD_ROWS:
            return ops.gemv_bf16(x_WH, self._half)
        logits: Tensor = self.model.get_output_embeddings()(x_WH)
        return logits

    def prompt(
        self, tokens: Tensor, slot: int, cache: Cache, *, position: int = 0, adapter: Adapter | None = None
    ) -> Tensor:  # fmt: skip
        """Prefill `slot` with a prompt (T,), T > 0, from `position` on; returns (1, vocabulary) logits after its last token."""
        for begin in range(0, len(tokens), PROMPT_TOKENS):
            part = tokens[begin : begin + PROMPT_TOKENS]
            positions = torch.arange(position + begin, position + begin + len(part))
            segments = None if adapter is None else [Segment(0, len(part), adapter)]
            last = torch.tensor([len(part) - 1])
            logits = self.step(part, torch.full_like(positions, slot), positions, cache, segments=segments, wanted=last)
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
        """Rotary cosines and sines (T, head_dim) at positions (T,), from tables that grow on demand."""
        needed = int(positions.max()) + 1 if len(positions) else 0
        if needed > len(self._angles[0]):
            places = torch.arange(max(needed, 2 * len(self._angles[0]), 256)).unsqueeze(0)
            cosine, sine = self.model.base_model.rotary_emb(torch.empty(1), places)
            if cosine.shape[-1] != self.layers.of[0].head_dim:
                raise refusal(self.model, "only a part of each head is rotated")
            self._angles = (cosine[0].contiguous(), sine[0].contiguous())
        return self._angles[0][positions], self._angles[1][positions]

    @torch.inference_mode()
    def _check(self) -> None:
        tokens = torch.arange(_CHECKED_TOKENS) * 37 % self.model.config.get_text_config().vocab_size
        places = torch.arange(len(tokens))
        found = self.step(tokens, torch.zeros_like(places), places, Cache(self, 1, len(tokens)))
        expected = self.model(tokens.unsqueeze(0), use_cache=False).logits[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise refusal(
                self.model, f"its layers compute something else than their parts say (logits differ by {difference:.0e})"
            )
