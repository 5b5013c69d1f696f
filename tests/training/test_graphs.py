"""CUDA graphs of passes. Oracle: the same training without graphs. On a CPU a stand-in captures a pass by running it at each
replay, which is everything but CUDA's own part; tests marked `gpu` capture."""

from unittest.mock import patch

import pytest
import torch
from mixtures import folder_of
from torch import nn

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import IGNORE, Example, collate
from lownibble.errors import ConfigError
from lownibble.models.attention import causal_attention
from lownibble.models.head import hidden_states
from lownibble.models.info import info
from lownibble.training.events import Skipped
from lownibble.training.graphs import FINEST, Graphs, _Inputs, _next, decided, draws_random, fitted, obstacle
from lownibble.training.making import prepare

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


def trainer_of(model, data, capture=None, lora=None, **options):
    config = {"max_steps": 12, "batch_size": 2, "max_length": 32, "learning_rate": 1e-2, "torch_compile": False, **options}
    trainer, _ = prepare(RunConfig(
        model=str(model), method="qlora", data=DataConfig(path=str(data), **DATA), quant=QuantConfig(compute="exact"),
        lora=LoraConfig(r=4, **(lora or {})), train=TrainConfig(**config),
    ))  # fmt: skip
    trainer.set_up()
    if capture is not None:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        passes = trainer.passes
        passes._check_masks(
            trainer.micro.batch([trainer.micro.rows[0], min(trainer.micro.rows, key=lambda row: len(row.input_ids))])
        )
        passes.graphs = Graphs(passes._run, trained, trainer.device, passes._most_tokens, capture=capture)
    return trainer


def losses_of(trainer, count=12):
    steps = trainer.micro.steps()
    return [trainer.step(number, next(steps)).loss for number in range(count)]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_replayed_steps_are_those_without_graphs(accumulated, widen, tiny_data):
    model, options = widen(num_hidden_layers=2), {"gradient_accumulation_steps": accumulated}
    capture = RunAgain()
    trainer = trainer_of(model, tiny_data, capture, **options)
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


def test_what_cannot_be_captured_goes_on_without_and_is_told(widen, tiny_data):
    model = widen(num_hidden_layers=2)
    trainer = trainer_of(model, tiny_data, RunAgain(fails=True))
    assert losses_of(trainer) == pytest.approx(losses_of(trainer_of(model, tiny_data)), rel=1e-4)
    reason = "capturing failed: operation not permitted when stream is capturing"
    assert trainer.passes.graphs.obstacle == reason
    assert trainer.warnings == [f"passes are no longer replayed as CUDA graphs: {reason}"], "once"
    assert len(trainer.passes.graphs) == 0


def out_of_memory_in(trainer, errors, call):
    def failing(*_):
        if errors:
            raise errors.pop()

    hook = trainer.model.get_input_embeddings().register_forward_hook(failing)
    found = call()
    hook.remove()
    return found


def test_graphs_are_given_up_before_anything_gets_smaller(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, RunAgain())
    steps = trainer.micro.steps()
    rows = [next(steps) for _ in range(7)]
    for number in range(5):
        trainer.step(number, rows[number])
    assert len(trainer.passes.graphs) > 0
    error = RuntimeError("can't allocate memory")
    assert out_of_memory_in(trainer, [error], lambda: trainer.step(5, rows[5])).step == 6
    assert trainer.micro.max_tokens is None
    assert trainer.warnings == ["passes are no longer replayed as CUDA graphs: memory ran out in step 6"]
    assert len(trainer.passes.graphs) == 0
    trainer.step(6, rows[6])
    assert len(trainer.warnings) == 1


def test_memory_that_runs_out_before_there_are_graphs_takes_none_away(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, RunAgain())
    steps, errors = trainer.micro.steps(), [RuntimeError("can't allocate memory")]
    out_of_memory_in(trainer, errors, lambda: trainer.step(0, next(steps)))
    assert trainer.micro.max_tokens is not None
    for number in range(1, 12):
        trainer.step(number, next(steps))
    assert trainer.passes.graphs.obstacle == ""
    assert len(trainer.passes.graphs) > 0


def test_an_evaluation_and_a_skipped_step_leave_graphs_as_they_are(widen, tiny_data):
    model = widen(num_hidden_layers=2)

    def losses(capture):
        trainer, found = trainer_of(model, tiny_data, capture), []
        batches = [trainer.micro.rows[:2]] * 8
        for number, batch in enumerate(batches):
            if number == 4:
                weight = next(p for p in trainer.model.parameters() if p.requires_grad)
                kept = weight.detach().clone()
                weight.data.fill_(float("nan"))
                assert isinstance(trainer.step(number, [batch]), Skipped)
                weight.data.copy_(kept)
            elif number == 6:
                found.append(trainer.evaluate(step=number).loss)
            else:
                found.append(trainer.step(number, [batch]).loss)
        return found

    capture = RunAgain()
    assert losses(capture) == pytest.approx(losses(None), rel=1e-4)
    assert capture.replayed >= 4


def test_inputs_are_made_once_a_shape(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, RunAgain())
    with patch("lownibble.training.graphs._Inputs", wraps=_Inputs) as made:
        losses_of(trainer)
    assert made.call_count == len(trainer.passes.graphs._inputs)


def test_shapes_are_few_and_padding_changes_nothing():
    rows = [Example(list(range(3, 3 + n)), [False] * 2 + [True] * (n - 2), "here") for n in (5, 29)]
    batch = collate(rows, pad_token_id=0)
    grown = fitted(batch, 64)
    assert grown.input_ids.shape == (2, 32)
    assert grown.input_ids[:, :29].equal(batch.input_ids)
    assert grown.attention_mask.sum() == batch.attention_mask.sum()
    (places, labels), (own, given) = batch.label_places, grown.label_places
    assert (len(places), len(own), len(given)) == (30, 32, 32)
    assert grown.input_ids.flatten()[own[:30] + 1].equal(labels)
    assert (given[:30].equal(labels), given[30:].tolist(), own[30:].tolist()) == (True, [IGNORE] * 2, [0] * 2)
    kept = fitted(batch, 63)
    assert kept.input_ids is batch.input_ids, "no more tokens than memory was fitted to"
    assert batch.places is None, "the caller's batch is as it was"


@pytest.mark.parametrize("parts", [4, 8])
def test_sizes_grow_by_a_part_at_most_and_are_few(parts):
    sizes = {count: _next(count, parts) for count in range(4097)}
    assert all(count <= size <= max(count * (1 + 1 / parts), count + FINEST) for count, size in sizes.items())
    assert len(set(sizes.values())) <= parts * 9
    assert all(_next(size, parts) == size for size in sizes.values())


def test_what_stands_against_graphs_is_named(tiny_model):
    def found(device="cuda", **facts):
        plain = {"packed": False, "plain_loss": True, "draws": False}
        return obstacle(model, torch.device(device), **{**plain, **facts})

    model, _ = ln.load(str(tiny_model), quant=QuantConfig())
    assert "in full" in found()
    ln.add_lora(model, LoraConfig(r=2))
    assert found() == ""
    assert "packed rows" in found(packed=True)
    assert "loss of its own" in found(plain_loss=False)
    assert "random numbers" in found(draws=True)
    assert "'cpu'" in found("cpu")
    assert decided("auto", "", False, "") == decided(True, "a short run", True, "") == ""
    assert decided("auto", "a short run", False, "") == "layers are not compiled: a short run"
    assert "memory budget" in decided("auto", "", True, "")
    assert decided(False, "", False, "") == "cuda_graphs is off"


@pytest.mark.parametrize(
    ("lora", "changes", "draws"),
    [({}, {}, False), ({"lora_dropout": 0.1}, {}, True), ({}, {"attention_dropout": 0.1}, True)],
)
def test_random_numbers_are_found_by_a_pass(lora, changes, draws, tiny_model):
    model, _ = ln.load(str(tiny_model))
    ln.add_lora(model, LoraConfig(r=2, **lora))
    for layer in model.model.layers:
        for name, value in changes.items():
            setattr(layer.self_attn, name, value)
    ids, state = torch.arange(12).view(2, 6), torch.get_rng_state()
    assert draws_random(model, ids, torch.ones_like(ids)) == draws
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_routers_is_found(tiny):
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1)
    ids = torch.arange(12).view(2, 6)
    assert draws_random(model, ids, torch.ones_like(ids))
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert not draws_random(model, ids, torch.ones_like(ids))


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
def test_the_experts_pass_is_captured(tokenizer, tiny_data, tmp_path):
    """With products of all experts at once; eager, since layers with experts are not compiled."""
    model = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    trainer = trainer_of(model, tiny_data, cuda_graphs=True)
    found = losses_of(trainer)
    assert trainer.passes.graphs.obstacle == ""
    assert len(trainer.passes.graphs) > 0
    assert found == pytest.approx(losses_of(trainer_of(model, tiny_data, cuda_graphs=False)), rel=0.02)


@pytest.mark.gpu
def test_gradients_of_passes_without_captured_and_replayed(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, cuda_graphs=True, torch_compile=True)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    batch, found = trainer.micro.batch(trainer.micro.rows[:2]), []
    for number in range(5):
        with torch.cuda.stream(trainer.stream):
            trainer.passes.backward(batch, 3, replay=True)
        if number == 3:
            trainer.evaluate(0)
        torch.cuda.synchronize()
        found.append([p.grad.clone() for p in trained])
        trainer.model.zero_grad(set_to_none=True)
    assert (len(trainer.passes.graphs), trainer.passes.graphs.obstacle) == (1, "")
    for gradients in found[1:]:
        for a, b in zip(found[0], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * float(a.abs().max()))


@pytest.mark.gpu
def test_a_pass_that_waits_is_not_captured_and_goes_on(widen, tiny_data):
    trainer = trainer_of(widen(num_hidden_layers=2), tiny_data, cuda_graphs=True)
    waits = trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: (output.sum().item(), None)[1]
    )
    found = losses_of(trainer)
    waits.remove()
    assert "capturing" in trainer.passes.graphs.obstacle
    assert found[-1] < found[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert float(nn.functional.dropout(torch.ones(64, device="cuda")).sum()) > 0
