"""Packing in training. Oracles: the same rows in padded batches; torch's cross-entropy on each row's logits; the run not cut."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from pairwise import pairwise
from torch.nn import functional as F

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import Example, collate, encode, epoch_batches, flatten
from lownibble.data import load as load_data
from lownibble.errors import ModelError
from lownibble.models.attention import segment_attention
from lownibble.models.info import compute_again
from lownibble.training import Evaluated, Sink, Stepped, run
from lownibble.training.loop import Trainer
from lownibble.training.loss import label_loss
from lownibble.training.making import prepare

TEMPLATES = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}
LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)  # B random too: gradients reach A


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory):
    """Rows of 2 to 25 words, as labelled sentences, as plain text and as conversations."""
    folder = tmp_path_factory.mktemp("uneven")
    words = "the film was very good fine awful bad not a plot scene actor is".split()  # noqa: SIM905
    texts = [" ".join(words[(i * 5 + k) % len(words)] for k in range(2 + i * 7 % 24)) for i in range(40)]
    answers = [("negative", "positive")[i % 2] for i in range(40)]
    forms = {
        "labels": [{"text": t, "label": a} for t, a in zip(texts, answers, strict=True)],
        "text": [{"text": t} for t in texts],
        "messages": [
            {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": a}]}
            for t, a in zip(texts, answers, strict=True)
        ],
    }  # fmt: skip
    for name, rows in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(folder, form="labels", **options):
    return DataConfig(path=str(folder / f"{form}.jsonl"), **(TEMPLATES if form == "labels" else {}), **options)


def config_of(tiny_model, data, method="lora", **options):
    train = {"max_steps": 6, "batch_size": 2, "learning_rate": 5e-3, "max_length": 32, "packing": True} | options
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    return RunConfig(
        model=str(tiny_model), method=method, data=data, lora=lora, quant=QuantConfig(block_size=32), train=TrainConfig(**train)
    )


def models(tiny_model, method):
    """Two equal models, ready to train."""
    for _ in range(2):
        model, _ = ln.load(str(tiny_model), quant=QuantConfig(block_size=32) if method == "qlora" else None)
        yield ln.add_lora(model, LORA) if method != "full" else model.requires_grad_(True)


def encoded(tiny_model, data):
    _, tokenizer = ln.load(str(tiny_model))
    return encode(load_data(data)[0], tokenizer, data, 32).examples


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize(("rows", "method", "checkpointing"), pairwise(
    [("labels", True), ("labels", False), ("text", True), ("messages", True)], ["full", "lora", "qlora"], [False, True],
), ids=str)  # fmt: skip
def test_a_packed_batch_has_the_loss_and_gradients_of_its_rows(tiny_model, uneven_data, rows, method, checkpointing):
    form, mask_prompt = rows
    examples = encoded(tiny_model, data_of(uneven_data, form, mask_prompt=mask_prompt))[:9]
    plain, packed = models(tiny_model, method)
    if checkpointing:
        compute_again(packed)
        packed.train()
    batch = flatten(examples)
    padded = collate(examples, 0)
    assert batch.n_label_tokens == padded.n_label_tokens
    expected = label_loss(plain, padded.input_ids, padded.attention_mask, padded.labels)
    expected.backward()
    with segment_attention(packed):
        loss = label_loss(packed, batch.input_ids, batch.attention_mask, batch.labels, None, batch.segments)
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(packed), gradients(plain))
    total = torch.zeros(())
    for example in examples:  # and the oracle's oracle: every row alone, through the whole model
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="none")[torch.tensor(example.is_label[1:])].sum()
    assert loss.item() == pytest.approx(total.item() / batch.n_label_tokens, rel=1e-5)


def test_a_first_token_that_is_a_label_is_nobodys_target(tiny_model):
    """Examples whose first token is flagged: the row before must not learn it."""
    _, tokenizer = ln.load(str(tiny_model))
    examples = [Example(ids, [True] * 3, "r") for ids in ([3, 4, 5], [9, 8, 7])]
    batch = flatten(examples)
    assert batch.n_label_tokens == 4
    plain, packed = models(tiny_model, "full")
    padded = collate(examples, tokenizer.pad_token_id)
    with segment_attention(packed):
        loss = label_loss(packed, batch.input_ids, batch.attention_mask, batch.labels, None, batch.segments)
    expected = label_loss(plain, padded.input_ids, padded.attention_mask, padded.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def trainer(tiny_model, data, **options):
    model, tokenizer = ln.load(str(tiny_model))
    ln.add_lora(model, LORA)
    config = TrainConfig(**({"batch_size": 1, "max_length": 32, "packing": True} | options))
    examples = encode(load_data(data)[0], tokenizer, data, config.max_length).examples
    return Trainer(model, tokenizer, examples, examples[:4], config)


def test_accumulated_packs_are_one_mean_over_tokens(tiny_model, uneven_data):
    """A step over four packed batches with different numbers of labels against one padded batch of all their rows."""
    options = {"gradient_accumulation_steps": 4, "max_grad_norm": None, "max_steps": 1}
    packed = trainer(tiny_model, data_of(uneven_data, "text"), **options)
    step_rows = next(packed.micro.steps())
    batches = packed.micro.batches(step_rows)
    assert len({batch.n_label_tokens for batch in batches}) > 1
    seen = {}
    for name, p in packed.model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, p.grad.clone()))
    stepped = packed.step(0, step_rows)

    plain = trainer(tiny_model, data_of(uneven_data, "text"), packing=False, **options)
    rows = [row for batch in batches for row in batch.input_ids[0].split(batch.segments)]
    examples = [next(e for e in plain.micro.rows if e.input_ids == row.tolist()) for row in rows]
    padded = collate(examples, 0)
    loss = label_loss(plain.model, padded.input_ids, padded.attention_mask, padded.labels)
    loss.backward()
    assert stepped.loss == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(seen, gradients(plain.model))
    assert stepped.tokens == stepped.padded_tokens == padded.n_tokens
    assert stepped.label_tokens == padded.n_label_tokens
    assert stepped.samples == len(examples)


@pytest.mark.parametrize("epochs", [1, 2, 2.5])
def test_the_steps_of_whole_epochs_see_each_row_once_an_epoch(tiny_model, uneven_data, epochs):
    packed = trainer(tiny_model, data_of(uneven_data), num_train_epochs=epochs)
    steps = [packed.micro.batch(rows) for _, [rows] in zip(range(packed.total_steps), packed.micro.steps(), strict=False)]
    rows = [tuple(row.tolist()) for batch in steps for row in batch.input_ids[0].split(batch.segments)]
    once = Counter(tuple(e.input_ids) for e in packed.micro.rows)
    counts, whole = Counter(rows), int(epochs)
    assert all(counts[row] >= n * whole for row, n in once.items())
    beyond = len(rows) - whole * once.total()
    assert beyond == 0 if epochs == whole else 0.25 < beyond / once.total() < 0.75


def test_accumulated_epochs_are_whole_steps(tiny_model):
    """Two packs a step: each epoch has as many steps as pairs of packs, and one more for a pack that is left; epochs may
    differ."""
    generator = random.Random(0)
    rows = [Example([1] * n, [False] + [True] * (n - 1), "r") for n in (generator.randint(2, 32) for _ in range(3000))]
    config = TrainConfig(batch_size=1, max_length=32, packing=True, num_train_epochs=2.5, gradient_accumulation_steps=2)
    packs = [len(epoch_batches(rows, 1, 0, epoch, pack_to=32)) for epoch in range(3)]
    pairs = [-(-n // 2) for n in packs]
    assert len(set(pairs)) > 1, "the test needs epochs that differ"
    model, tokenizer = ln.load(str(tiny_model))
    steps = Trainer(model.requires_grad_(True), tokenizer, rows, rows[:1], config).total_steps
    assert steps == pairs[0] + pairs[1] + math.ceil(pairs[2] * 0.5)


@pytest.mark.parametrize(("method", "accumulation"), [("lora", 2), ("qlora", 1)])
def test_a_packed_run_cut_and_resumed_gives_the_same_bits(tiny_model, uneven_data, tmp_path, method, accumulation):
    class _Stop(Sink):
        def __call__(self, event):
            if isinstance(event, Stepped) and event.step == 17:
                raise KeyboardInterrupt

    # 20 steps are more than one epoch of packs, so that the resumed run starts in a later one
    options = {"max_steps": 20, "save_steps": 4, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": True}
    data = data_of(uneven_data)
    whole = run(config_of(tiny_model, data, method, output_dir=str(tmp_path / "whole"), **options))
    cut = config_of(tiny_model, data, method, output_dir=str(tmp_path / "cut"), **options)
    with pytest.raises(KeyboardInterrupt):
        run(cut, sinks=[_Stop()])
    resumed = run(cut.with_options(train=cut.train.with_options(resume=True)))
    assert resumed.losses == whole.losses
    trained = [dict(r.model.named_parameters()) for r in (whole, resumed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_packed_run_learns_pads_nothing_and_evaluates_as_ever(tiny_model, tiny_data):
    class _Keep(Sink):
        def __init__(self):
            self.first = None

        def __call__(self, event):
            if isinstance(event, Evaluated) and self.first is None:
                self.first = event

    data = DataConfig(path=str(tiny_data), **TEMPLATES)
    packed, padded = _Keep(), _Keep()
    result = run(config_of(tiny_model, data, max_steps=30, learning_rate=5e-2), sinks=[packed])
    run(config_of(tiny_model, data, max_steps=1, packing=False), sinks=[padded])
    assert (packed.first.loss, packed.first.scores) == (padded.first.loss, padded.first.scores), "evaluation keeps its batches"
    assert result.eval_loss < 0.9 * packed.first.loss
    assert result.record["speed"]["padding_share"] == 0
    assert result.model.config._attn_implementation == "sdpa"
    assert RunConfig(**result.record["config"]).train.packing


def test_the_first_batch_is_the_largest_of_its_epoch(tiny_model, uneven_data):
    packed = trainer(tiny_model, data_of(uneven_data), num_train_epochs=1)
    steps = zip(range(packed.total_steps), packed.micro.steps(), strict=False)
    tokens = [packed.micro.batch(rows[0]).n_tokens for _, rows in steps]
    assert tokens[0] == max(tokens)


def test_steps_for_those_who_measure_are_packed_too(tiny_model, uneven_data):
    ready, _ = prepare(config_of(tiny_model, data_of(uneven_data)))
    stepped = ready.step(0, next(ready.micro.steps()))
    assert stepped.samples > 2
    assert stepped.tokens == stepped.padded_tokens <= 64


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "gpt_neo",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
            "its attention cannot be swapped",
        ),
        ("jamba", {"num_experts": 4, "use_mamba_kernels": False}, "its rows are not the same packed as alone"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused_before_the_first_step(tiny_model, uneven_data, tiny, family, options, reason):
    _, tokenizer = ln.load(str(tiny_model))
    model = tiny(family, **options).requires_grad_(True)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError, match=f"cannot be trained with packing: {reason}"):
        ln.train(model, tokenizer, data_of(uneven_data), TrainConfig(max_steps=1, max_length=32, packing=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_check_looks_at_the_longest_row(tiny_model, uneven_data, tiny):
    """A model whose window is in its mask only: refused where rows are longer than the window, trained where none is."""
    _, tokenizer = ln.load(str(tiny_model))
    data = data_of(uneven_data, "text")
    for max_length in (32, 8):
        model = tiny("gemma2", sliding_window=8, attn_logit_softcapping=None).requires_grad_(True)
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        config = TrainConfig(max_steps=1, max_length=max_length, packing=True)
        if max_length > 8:
            with pytest.raises(ModelError, match="not the same packed as alone"):
                ln.train(model, tokenizer, data, config)
        else:
            ln.train(model, tokenizer, data, config)


def test_a_window_shorter_than_the_rows_is_kept(tiny_model, uneven_data, tiny):
    """Mistral with a window of 4 on rows of up to 32 tokens: packed and padded steps have the same loss."""
    _, tokenizer = ln.load(str(tiny_model))
    data = data_of(uneven_data, "text")
    examples = encode(load_data(data)[0], tokenizer, data, 32).examples
    model = tiny("mistral", sliding_window=4).requires_grad_(True)
    config = TrainConfig(max_steps=1, batch_size=len(examples), max_length=32, packing=True, eval_steps=1, learning_rate=1e-9)
    events = list(Trainer(model, tokenizer, examples, examples, config).events())
    stepped = next(e for e in events if isinstance(e, Stepped))
    evaluated = next(e for e in events if isinstance(e, Evaluated))
    assert stepped.samples == len(examples)
    assert stepped.loss == pytest.approx(evaluated.loss, rel=1e-5)
