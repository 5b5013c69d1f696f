"""A whole training step on a `Tape`: forward, loss, backward, update, as in `training/loop.py` and `training/loss.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lownibble.arch import ModelShape
from lownibble.config import Checkpointing
from lownibble.planning.decoder import Decoder
from lownibble.planning.encoder_decoder import EncoderDecoder
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.tape import FLOAT32, INT64, Tape, Value


class Batch(NamedTuple):
    """The batch of a microbatch: rows, tokens per row (padding included), label tokens of all rows; and where what sequences
    begin with alike is computed once, the tokens that attention sees for each one that is computed."""

    rows: int
    length: int
    labels: int
    spread: float = 0.0


def run_step(
    shape: ModelShape, method: Method, run: Runtime, batch: Batch, *, checkpointing: Checkpointing = False, passes: int = 1
) -> Tape:  # fmt: skip
    """Run `passes` equal microbatches; optimiser states are left out.

    Returns:
        the tape, with the marks 'model', then per microbatch 'forward', 'loss' and 'backward', then 'update'.
    """
    tape = Tape(run.round_to, compiled=run.compiled, shards=run.shards or 1, offloaded=run.offloaded)
    model = (EncoderDecoder if shape.decoder_layers else Decoder)(tape, shape, method, run)
    tape.mark("model")
    for _ in range(passes):
        inputs = [tape.new(batch.rows * batch.length, INT64), tape.new(batch.labels, INT64)]
        result = _loss(tape, model, batch, checkpointing)
        tape.mark("loss")
        tape.backward(result)
        del result, inputs
        if isinstance(model, Decoder) and model.groups:
            model.groups.finish()
        tape.mark("backward")
    tape.mark("update")
    del model
    return tape


def _loss(tape: Tape, model: Decoder | EncoderDecoder, batch: Batch, checkpointing: Checkpointing) -> Value:
    if isinstance(model, EncoderDecoder):
        hidden = model.forward(batch.rows, batch.length, -(-batch.labels // batch.rows), bool(checkpointing))
    else:
        hidden = model.forward(batch.rows, batch.length, checkpointing, batch.spread)
    tape.mark("forward")
    gathered = _gather(tape, hidden, batch.labels, model.shape.hidden)
    del hidden
    return _label_loss(tape, model, gathered)


def _gather(tape: Tape, hidden: Value, labels: int, width: int) -> Value:
    """Gather the hidden states at label positions."""
    places = tape.new(labels, INT64)
    out, whole, size = tape.new(labels * width, hidden.itemsize), hidden.n, hidden.itemsize

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        zeros = tape.new(whole, size)
        return [tape.like(zeros)]

    tape.record([out], [hidden], [places], backward)
    return out


def _label_loss(tape: Tape, model: Decoder | EncoderDecoder, hidden: Value) -> Value:
    V, H, size, head = model.shape.vocab, model.shape.hidden, hidden.itemsize, model.head
    L = hidden.n // H
    wants_hidden = hidden.wants_grad
    trained = [head] * head.trained + model.head_adapter
    dhidden = tape.like(hidden) if wants_hidden else None
    gradients = [tape.like(parameter) for parameter in trained]
    most = max(16, model.run.chunk_bytes // (FLOAT32 * V))
    copied = size != FLOAT32 and not model.run.cuda  # CUDA's kernel replaces 16-bit logits by their gradient where they are
    if model.shape.plain_head and not model.head_adapter:
        rows = -(-L // max(1, -(-L // most)))
        logits = None
        if model.run.cuda:
            logits = tape.new(rows * V, size)
        else:
            model.buffers.need(rows * V, 1)
        scores = tape.new(rows * V, FLOAT32) if copied else None
        del logits, scores
    else:
        rows = min(most, L)
        logits = tape.new(rows * V, size)
        scaled, capped = model.shape.scaled_logits, model.shape.scaled_logits and not model.shape.decoder_layers
        tanh = tape.like(logits) if capped else None
        if scaled:
            logits = tape.like(logits)
        scores = tape.new(rows * V, FLOAT32) if copied else None
        del scores
        before = tape.like(logits) if scaled else None
        if capped:
            before, tanh = tape.like(logits), None
        dchunk = tape.new(rows * H, size) if wants_hidden else None
        parts = [tape.like(parameter) for parameter in trained]
        del logits, tanh, before, dchunk, parts
    out = tape.new(1, FLOAT32)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return saved if wants_hidden else [None, *saved]

    tape.record([out], [hidden, *trained], [*[dhidden] * wants_hidden, *gradients], backward)  # type: ignore[list-item]
    return out
