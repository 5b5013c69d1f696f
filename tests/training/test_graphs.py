"""CUDA graphs of passes. Oracle: the same training without graphs. On a CPU a stand-in captures a pass by running it at each
replay, which is everything but CUDA's own part; tests marked `gpu` capture."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import IGNORE, Example, collate
from lownibble.errors import ConfigError
from lownibble.models.attention import causal_attention
from lownibble.models.head import hidden_states
from lownibble.models.info import info
from lownibble.training.graphs import Graphs, _origin, decided, fitted, obstacle
from lownibble.training.run import prepare

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


class RunAgain:
    """A capture that runs the pass at each replay, and counts."""

    def __init__(self, fails=False):
        self.captured, self.replayed, self.fails = 0, 0, fails

    def __call__(self, run):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        with patch.object(torch, "_foreach_add_"):  # a capture computes nothing
            loss = torch.zeros_like(run())
        self.captured += 1

        def replay():
            self.replayed += 1
            loss.copy_(run())

        return replay, loss


def trainer_of(model, data, capture=None, grow=True, lora=None, **options):
    config = {"max_steps": 12, "batch_size": 2, "max_length": 32, "learning_rate": 1e-2, "torch_compile": False, **options}
    trainer, _ = prepare(RunConfig(
        model=str(model), method="qlora", data=DataConfig(path=str(data), **DATA), quant=QuantConfig(compute="exact"),
        lora=LoraConfig(r=4, **(lora or {})), train=TrainConfig(**config),
    ))  # fmt: skip
    trainer.set_up()
    if capture is not None:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.passes.graphs = Graphs(
            trainer.passes._run, trained, trainer.device, trainer.micro.longest_row, grow=grow, capture=capture
        )
    return trainer


def losses_of(trainer, count=12):
    steps = trainer.micro.steps()
    return [trainer.step(number, next(steps)).loss for number in range(count)]


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_replayed_steps_are_those_without_graphs(grow, accumulated, widen, tiny_data):
    model, options = widen(num_hidden_layers=2), {"gradient_accumulation_steps": accumulated}
    capture = RunAgain()
    trainer = trainer_of(model, tiny_data, capture, grow=grow, **options)
    found, expected = losses_of(trainer), losses_of(trainer_of(model, tiny_data, **options))
    assert found == pytest.approx(expected, rel=1e-4)
    assert capture.captured == len(trainer.passes.graphs) > 0
    assert capture.replayed >= 4


def test_gradients_of_both_kinds_of_passes_add_up(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, RunAgain())
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    batch = trainer.micro.batch(trainer.micro.rows[:2])
    for first in ("replayed", "not"):
        for _ in range(2):  # captured by the second
            trainer.passes.backward(batch, 3, replay=True)
        trainer.model.zero_grad(set_to_none=True)
        for replay in (first == "replayed", first == "not", True):
            trainer.passes.backward(batch, 3, replay=replay)
        found = [p.grad.clone() for p in trained]
        trainer.model.zero_grad(set_to_none=True)
        for _ in range(3):
            trainer.passes.backward(batch, 3)
        for p, gradient in zip(trained, found, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)
        trainer.model.zero_grad(set_to_none=True)


def test_the_count_of_labels_is_an_input(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, capture := RunAgain())
    batch = trainer.micro.batch(trainer.micro.rows[:2])
    found = [float(trainer.passes.backward(batch, n, replay=True)) for n in (2, 2, 2, 8)]
    assert capture.replayed == 3
    assert found[1:3] == found[:1] * 2
    assert found[3] == pytest.approx(found[0] / 4)


def test_what_cannot_be_captured_goes_on_without(widen, tiny_data):
    model = widen(num_hidden_layers=2)
    trainer = trainer_of(model, tiny_data, RunAgain(fails=True))
    assert losses_of(trainer) == pytest.approx(losses_of(trainer_of(model, tiny_data)), rel=1e-4)
    assert trainer.passes.graphs.obstacle == "capturing failed: operation not permitted when stream is capturing"
    assert len(trainer.passes.graphs) == 0


def test_graphs_are_given_up_before_anything_gets_smaller(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, RunAgain())
    steps = trainer.micro.steps()
    rows = [next(steps) for _ in range(6)]
    for number in range(5):
        trainer.step(number, rows[number])
    assert len(trainer.passes.graphs) > 0
    failing = [RuntimeError("can't allocate memory")]
    hook = trainer.model.get_input_embeddings().register_forward_hook(lambda *_: _raise(failing))
    taken = trainer.step(5, rows[5])
    hook.remove()
    assert taken.step == 6
    assert trainer.micro.max_tokens is None
    assert trainer.warnings == ["memory ran out in step 6, which began again: passes are no longer replayed as CUDA graphs"]
    assert (len(trainer.passes.graphs), trainer.passes.graphs.obstacle) == (0, "memory ran out")


def _raise(errors):
    if errors:
        raise errors.pop()


def test_shapes_are_few_and_padding_changes_nothing():
    rows = [Example(list(range(3, 3 + n)), [False] * 2 + [True] * (n - 2), "here") for n in (5, 9)]
    batch = collate(rows, pad_token_id=0)
    grown = fitted(batch, 32, grow=True)
    assert grown.input_ids.shape == (2, 10)
    assert grown.input_ids[:, :9].equal(batch.input_ids)
    assert grown.attention_mask.sum() == batch.attention_mask.sum()
    places, labels = batch.label_places
    assert len(places) == 10
    own, given = grown.label_places
    assert len(own) == len(given) == 10  # two quarters of 20
    assert grown.input_ids.flatten()[own + 1].equal(labels)
    assert given.equal(labels)
    kept = fitted(batch, 32, grow=False)
    assert kept.input_ids is batch.input_ids
    assert [len(part) for part in kept.label_places] == [10, 10]
    few = collate([Example([3, 4, 5, 6], [False, False, False, True], "here")], pad_token_id=0)
    places, labels = fitted(few, 4, grow=True).label_places
    assert (places.tolist(), labels.tolist()) == ([2], [6])
    places, labels = fitted(collate(rows[:1] * 4, pad_token_id=0), 9, grow=True).label_places
    assert (len(places), labels[12:].tolist(), places[12:].tolist()) == (15, [IGNORE] * 3, [0] * 3)
    assert fitted(batch, 9, grow=True).input_ids.shape == (2, 9), "never longer than the longest row"


def test_what_stands_against_graphs_is_named(tiny_model):
    cuda = torch.device("cuda")
    model, _ = ln.load(str(tiny_model), quant=QuantConfig())
    assert "in full" in obstacle(model, cuda, packed=False, plain_loss=True)
    ln.add_lora(model, LoraConfig(r=2))
    assert obstacle(model, cuda, packed=False, plain_loss=True) == ""
    assert "packed rows" in obstacle(model, cuda, packed=True, plain_loss=True)
    assert "loss of its own" in obstacle(model, cuda, packed=False, plain_loss=False)
    assert "'cpu'" in obstacle(model, torch.device("cpu"), packed=False, plain_loss=True)
    model.config.attention_dropout = 0.1
    assert "dropout" in obstacle(model, cuda, packed=False, plain_loss=True)
    model.config.attention_dropout = 0.0
    ln.add_lora(model, LoraConfig(r=2, lora_dropout=0.1), name="other")
    assert "dropout" in obstacle(model, cuda, packed=False, plain_loss=True)
    assert decided("auto", True, "") == decided(True, False, "") == ""
    assert "not compiled" in decided("auto", False, "")
    assert decided(False, True, "") == "cuda_graphs is off"


@pytest.mark.parametrize("capturing", [False, True])
def test_a_pass_that_is_captured_has_no_masks_either(capturing, tiny_model):
    """transformers makes masks where it is traced or captured; layers compiled for passes without would be compiled again."""
    model, _ = ln.load(str(tiny_model))
    masks, ids = [], torch.arange(12).view(2, 6)
    model.model.layers[0].register_forward_pre_hook(lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True)
    info(model).needs_mask = False
    with patch("transformers.masking_utils.is_tracing", lambda *_: capturing), causal_attention(model):
        hidden_states(model, ids, torch.ones_like(ids))
    assert masks == [None]


def test_the_first_error_of_a_capture_is_told():
    def capture():
        try:
            raise RuntimeError("the cause\nmore")
        finally:
            raise RuntimeError("not completed")

    with pytest.raises(RuntimeError, match="not completed") as caught:
        capture()
    assert _origin(caught.value) == "the cause"


def test_graphs_that_are_asked_for_and_not_possible_are_an_error(tiny_model, tiny_data):
    with pytest.raises(ConfigError, match=r"cuda_graphs=True cannot be done: there are none on 'cpu'. Use cuda_graphs=False"):
        trainer_of(tiny_model, tiny_data, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"torch_compile": True}, {"gradient_accumulation_steps": 2}]
)
def test_captured_steps_are_those_without_graphs(options, widen, tiny_data):
    model = widen(num_hidden_layers=2)
    trainer = trainer_of(model, tiny_data, cuda_graphs=True, **options)
    found = losses_of(trainer)
    assert trainer.passes.graphs.obstacle == ""
    assert len(trainer.passes.graphs) > 0
    assert found == pytest.approx(losses_of(trainer_of(model, tiny_data, cuda_graphs=False, **options)), rel=0.02)


@pytest.mark.gpu
def test_a_pass_that_waits_is_not_captured_and_goes_on(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, cuda_graphs=True)
    waits = trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: (output.sum().item(), None)[1]
    )
    found = losses_of(trainer)
    waits.remove()
    assert "capturing failed" in trainer.passes.graphs.obstacle
    assert found[-1] < found[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert float(nn.functional.dropout(torch.ones(64, device="cuda")).sum()) > 0
