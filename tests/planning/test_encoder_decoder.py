"""T5's step on a tape. Oracle: the real step of a small model, every allocation of it as torch's profiler sees them."""

import pytest
import torch
from pairwise import pairwise
from test_step import as_trained, packed, peak_of_events
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from lownibble.arch import paths, read_shape
from lownibble.models.head import Head
from lownibble.models.info import compute_again
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.step import Batch, run_step
from lownibble.training.loss import _LabelLoss

SIZES = {
    "d_model": 256, "d_ff": 640, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 8, "d_kv": 32, "vocab_size": 1000,
    "decoder_start_token_id": 0,
}  # fmt: skip
TOLERANCE = {False: 0.01, True: 0.06}
"""By checkpointing. There the biases by distance and their gradients, which do not grow with the layers, are not all in their
place: they weigh in a model as small as this."""


def model_of(config, method):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa").train()
    return as_trained(model, method)


def measured(model, batch):
    """(bytes of weights, then the highest bytes of a step above them)."""
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    targets = batch.labels // batch.rows
    ids, wanted = (torch.zeros(batch.rows, n, dtype=torch.int64) for n in (batch.length, targets))
    places, labels = torch.arange(batch.labels), torch.zeros(batch.labels, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        read = model.encoder(input_ids=ids).last_hidden_state
        hidden = model.decoder(input_ids=wanted, encoder_hidden_states=read, use_cache=False).last_hidden_state
        del read
        gathered = hidden.flatten(0, 1).index_select(0, places)
        del hidden
        head = Head(model)
        head.plain, head.transforms = (
            None,
            [(lambda logits, scale: logits * scale, model.config.d_model**-0.5)],
        )  # tied, so scaled
        trained = head.trained
        total = _LabelLoss.apply(gathered, labels, head, len(labels), len(trained), *trained)
        del gathered
        total.backward()
    return sum(storages.values()), peak_of_events(profiler)


def planned(shape, method, batch, checkpointing):
    ranks = {} if method == "full" else {path: 16 for path, _ in paths(shape)}
    run = Runtime(4, fused=True, kernel_attention=True, decode_buffers=1)
    ways = Method(method == "full", *packed(shape, method), ranks)
    tape = run_step(shape, ways, run, batch, checkpointing=checkpointing)
    _, begin, weights = tape.marks[0]
    used = peak = 0
    for _, n in tape.events[begin : tape.marks[-1][1]]:
        used += n
        peak = max(peak, used)
    return weights, peak


@pytest.mark.parametrize(
    ("method", "activation", "dropout", "checkpointing"),
    pairwise(["full", "lora", "qlora"], ["relu", "gated-gelu"], [0.0, 0.1], [False, True]),
)
def test_equals_the_real_step(method, activation, dropout, checkpointing):
    config = AutoConfig.for_model("t5", **SIZES, feed_forward_proj=activation, dropout_rate=dropout)
    model, batch = model_of(config, method), Batch(2, 96, 128)
    if checkpointing:
        compute_again(model)
    weights, peak = measured(model, batch)
    our_weights, ours = planned(read_shape(config.to_dict()), method, batch, checkpointing)
    assert our_weights == pytest.approx(weights, abs=1000)
    assert ours == pytest.approx(peak, rel=TOLERANCE[checkpointing])
