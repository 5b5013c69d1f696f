"""Preference objectives. Oracle: TRL's DPOTrainer, ORPOTrainer and KTOTrainer on PEFT's model with the same adapter weights."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_folders import tiny_model  # noqa: F401

import lownibble as ln
from lownibble.config import SMOOTHED
from lownibble.data import load as load_data
from lownibble.data import sequences_of
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora.active import adapter_off
from lownibble.memory.planned import plan_of
from lownibble.registry import OBJECTIVES
from lownibble.training.distributed import Ranks
from lownibble.training.events import Stepped
from lownibble.training.fitting import Fitting
from lownibble.training.loop import Trainer
from lownibble.training.loss import chunks_of, token_logps
from lownibble.training.passes import Passes
from lownibble.training.preference_losses import DPO_LOSSES
from lownibble.training.reference import FILE
from lownibble.training.sinks import ProgressSink

ANSWERS = [("film", "very good", "bad"), ("plot", "fine", "awful"), ("actor", "good", "not"), ("a scene", "good", "a")]
PAIRS = [
    {"prompt": f"the {thing} was", "chosen": f" {good} .", "rejected": f" {bad} film a"} for thing, good, bad in ANSWERS
]  # fmt: skip
LABELLED = [
    {"prompt": f"the {thing} was", "completion": text, "label": label}
    for thing in ("film", "plot")
    for text, label in [(" very good", True), (" awful film a plot", False)]
]
ROWS = {"dpo": PAIRS, "orpo": PAIRS, "kto": LABELLED}
TRAIN = {
    "batch_size": 4, "max_steps": 10, "learning_rate": 2e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
    "max_grad_norm": None, "max_length": 64, "torch_compile": False,
}  # fmt: skip


def _write(folder, rows):
    folder.mkdir(exist_ok=True)
    for side in ("train", "test"):
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ln.DataConfig(path=str(folder))


def _trainer(model, tokenizer, data, **options):
    config = ln.TrainConfig(**{**TRAIN, **options})
    objective = OBJECTIVES[config.objective].of(config)
    encoded = [objective.encode(side, tokenizer, data, config.max_length) for side in load_data(data)]
    return Trainer(model, tokenizer, encoded[0].examples, encoded[1].examples, config)


@pytest.fixture
def begun(tiny_model, tmp_path):  # noqa: F811
    """`begun(objective, random=..., rows=..., **options)`: a trainer; `random`: the adapter does not begin at zero."""

    def make(objective, *, random=False, rows=None, quant=None, model=None, **options):
        model, tokenizer = ln.load(model or str(tiny_model), device="cpu", quant=quant)
        ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=not random), seed=3)
        data = _write(tmp_path / objective, ROWS[objective] if rows is None else rows)
        return _trainer(model, tokenizer, data, objective=objective, **options)

    return make


def _taken(trainer):
    first = trainer.set_up()
    steps = zip(range(first, trainer.total_steps), trainer.micro.steps(first), strict=False)
    found = [trainer.step(step, rows) for step, rows in steps]
    assert all(isinstance(each, Stepped) for each in found)
    return [each.loss for each in found]


def _plain(name):
    """A parameter's name, the same for ours and PEFT's."""
    for word in ("base_model.model.", ".adapters", ".default", ".weight"):
        name = name.replace(word, "")
    return name


def _move(model):
    """Take the adapter away from its start, which is the reference, in the same way for ours and PEFT's."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.arange(parameter.numel()).view_as(parameter).cos()


def _gradients(trainer):
    """Loss and gradients of all rows; `set_up` has been called."""
    batch = trainer.micro.batch(trainer.micro.rows)
    trainer.objective.prepare([batch], trainer.passes, trainer.ranks)
    loss = trainer.passes.backward(batch, trainer.objective.weight(batch))
    return float(loss), {_plain(name): p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.fixture
def theirs(tiny_model, tmp_path):  # noqa: F811
    """`theirs(objective, model, **options)`: TRL's trainer, whose adapter is the model's."""

    def make(objective, model, **options):
        peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        orpo = pytest.importorskip("trl.experimental.orpo") if objective == "orpo" else None
        ln.save_adapter(model, tmp_path / "start")
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
        holder = orpo or trl
        config = getattr(holder, f"{objective.upper()}Config")(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=10,
            learning_rate=2e-3, lr_scheduler_type="constant", max_grad_norm=0.0, max_length=64, bf16=False, use_cpu=True,
            logging_steps=1, report_to="none", gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        rows = Dataset.from_list(ROWS[objective])
        return getattr(holder, f"{objective.upper()}Trainer")(
            model=adapted, args=config, train_dataset=rows, eval_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )  # fmt: skip

    return make


def _their_gradients(trainer):
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss), {_plain(name): p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def _assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    found, expected = (torch.cat([each[1][name].flatten() for name in theirs[1]]) for each in (ours, theirs))
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


with_trl = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Its imports take ten seconds, and warn."""


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
class TestTrl:
    pytestmark = with_trl

    def test_ten_steps_have_trls_losses_and_the_evaluation_its_scores(self, objective, begun, theirs):
        trainer = begun(objective, random=True)
        peer = theirs(objective, trainer.model)
        losses, evaluated = _taken(trainer), trainer.evaluate(10)
        peer.train()
        assert losses == pytest.approx([each["loss"] for each in peer.state.log_history if "loss" in each], abs=1e-5)
        told = peer.evaluate()
        assert evaluated.loss == pytest.approx(told["eval_loss"], abs=1e-5)
        names = {
            name for name in told if name.startswith(("eval_rewards/", "eval_logps/", "eval_kl", "eval_nll", "eval_log_odds"))
        }
        assert {f"eval_{name}" for name in evaluated.scores} == names
        for name, value in evaluated.scores.items():
            assert value == pytest.approx(told[f"eval_{name}"], abs=2e-5), name
        if objective != "orpo":
            assert trainer.reference["adapter"] == "as it begins"  # as TRL's 'ref' adapter


class TestTrlsLosses:
    """To 1e-5 on the reference backend. Ours and TRL's are both about 1e-5 from float64's; with the compiled kernels, whose sums
    are ordered otherwise, they are up to 2.5e-5 apart."""

    pytestmark = with_trl

    @pytest.fixture(autouse=True)
    def _plain_kernels(self):
        with ln.use_backend("reference"):
            yield

    def test_of_dpo(self, begun, theirs):
        peer = None
        for name in DPO_LOSSES:
            smoothing = 0.1 if name in SMOOTHED else 0.0
            trainer = begun("dpo", random=True, loss_type=name, label_smoothing=smoothing, beta=0.3)
            if peer is None:
                peer = theirs("dpo", trainer.model, beta=0.3)
                _move(peer.model)
            peer.loss_types, peer.label_smoothing = [name], smoothing
            trainer.set_up()
            _move(trainer.model)
            _assert_same(_gradients(trainer), _their_gradients(peer))

    @pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
    def test_of_kto(self, name, begun, theirs):
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
        trainer = begun("kto", random=True, loss_type=name, **weights)
        peer = theirs("kto", trainer.model, loss_type=name, **weights)
        trainer.set_up()
        _move(trainer.model)
        _move(peer.model)
        _assert_same(_gradients(trainer), _their_gradients(peer))

    def test_of_orpo(self, begun, theirs):
        trainer = begun("orpo", random=True, beta=0.4)
        _assert_same((trainer.set_up(), _gradients(trainer))[1], _their_gradients(theirs("orpo", trainer.model, beta=0.4)))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_token_logps_and_gradients_are_those_of_whole_logits(trained, tiny_model):  # noqa: F811
    model, _ = ln.load(str(tiny_model), device="cpu")
    model.requires_grad_(trained)
    ids = torch.randint(2, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    places, labels = torch.tensor([0, 2, 10, 11, 25]), torch.tensor([3, 5, 7, 4, 6])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1])
    table = model.get_input_embeddings().weight.requires_grad_(True)
    found = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            with chunks_of(2 * 4 * len(table)):
                logps = token_logps(model, ids, None, places, labels)
        else:
            logps = model(input_ids=ids).logits.flatten(0, 1)[places].log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        (weights * logps).sum().backward()
        found.append((logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (ours, ours_grads), (plain, grads) = found
    torch.testing.assert_close(ours, plain)
    assert ours_grads.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(ours_grads[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(token_logps(model, ids, None, places, labels), plain)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_step_is_the_same_however_its_rows_are_dealt(objective, begun):
    whole = begun(objective, random=True)
    parts = begun(objective, random=True, batch_size=2, gradient_accumulation_steps=2)
    small = begun(objective, random=True)
    found = []
    for trainer in (whole, parts, small):
        trainer.set_up()
        _move(trainer.model)
        if trainer is small:
            trainer.micro.max_tokens = trainer.micro.longest_row
        found.append(trainer.step(0, next(trainer.micro.steps())))
    assert len(small.micro.dealt(next(small.micro.steps()))) > 2
    for trainer, step in zip((parts, small), found[1:], strict=True):
        if trainer is small or objective != "kto":  # KTO's mismatched answers are exchanged within a batch
            assert step.loss == pytest.approx(found[0].loss, rel=1e-5)
            assert step.grad_norm == pytest.approx(found[0].grad_norm, rel=1e-4)


@pytest.fixture
def apart(monkeypatch):
    """`apart(make)`: what `make` makes, where no token is computed once for two sequences."""

    def make(made):
        with monkeypatch.context() as patch:
            patch.setattr(Passes, "share_prefixes", lambda self: False)
            return made()

    return make


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize(("method", "wide"), [("lora", False), ("lora", True), ("qlora", True)])
def test_what_sequences_begin_with_alike_is_computed_once(objective, method, wide, begun, apart, widen):
    """Oracle: each sequence padded. Wide: on our attention kernel, where there is one."""
    quant = ln.QuantConfig(block_size=32, compute="exact") if method == "qlora" else None

    def made():
        model = str(widen()) if wide else None
        trainer = begun(objective, random=True, model=model, quant=quant, gradient_checkpointing=wide and method == "lora")
        trainer.set_up()
        _move(trainer.model)
        return trainer

    shared, padded = made(), apart(made)
    assert (shared.micro.shares, padded.micro.shares) == (True, False)
    sequences = [ids for rows in (next(shared.micro.steps()),) for row in rows[0] for ids, _ in sequences_of(row)]
    beginnings = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    tokens = shared.micro.computed(shared.micro.batch(shared.micro.rows))
    assert tokens == len(beginnings) < sum(map(len, sequences))
    assert shared.shared == {"steps": 10, "tokens": 10 * sum(map(len, sequences)), "computed_tokens": 10 * tokens}
    assert padded.shared is None
    (loss, found), (expected_loss, expected) = _gradients(shared), _gradients(padded)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)
    scores = [trainer.evaluate(0).scores for trainer in (shared, padded)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-6)


def test_an_answer_and_the_mismatched_one_share_their_prompt(begun):
    trainer, seen = begun("kto"), []
    trainer.set_up()
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()[0]))
    trainer.evaluate(0)
    rows = trainer.evaluator.examples
    sequences = [row.input_ids for row in (*rows, *(row.beside.mismatched for row in rows))]
    beginnings = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    assert [sorted(ids) for ids in seen] == [sorted(beginning[-1] for beginning in beginnings)]


@pytest.mark.slow
def test_compiled_layers_compute_once_too(begun, apart, widen):
    def losses(compiled):
        return _taken(begun("dpo", model=str(widen()), batch_size=2, max_steps=4, torch_compile=compiled))

    assert losses(True) == pytest.approx(apart(lambda: losses(False)), rel=1e-4)


def test_no_microbatch_is_larger_than_the_dry_runs(begun):
    """Oracle: the microbatches themselves, in tokens computed, tokens that attention sees, and labels."""
    for objective in ("dpo", "orpo", "kto"):
        trainer = begun(objective, batch_size=2, gradient_accumulation_steps=2)
        trainer.set_up()
        micro = trainer.micro
        for tokens in sorted({micro.longest_row, micro.longest_row + 3, 17, micro.whole}):
            largest = micro.largest(tokens)
            assert micro.size(tokens) == micro.computed(largest) <= tokens
            assert max(largest.prefixes.lengths) <= max(len(ids) for row in micro.rows for ids, _ in sequences_of(row))
            micro.max_tokens = tokens
            for _, rows in zip(range(10), micro.steps(), strict=False):
                assert sorted(row.origin for batch in micro.dealt(rows) for row in batch) == sorted(
                    row.origin for batch in rows for row in batch
                )
                for dealt, batch in zip(micro.dealt(rows), micro.batches(rows), strict=True):
                    assert micro.computed(batch) <= micro.tokens(dealt) <= micro.computed(largest)
                    planned = micro.shape(dealt)
                    assert planned[:3] == (1, micro.tokens(dealt), batch.n_label_tokens)
                    assert planned.spread * planned.length == pytest.approx(len(batch.prefixes.spread))
                    assert len(batch.prefixes.spread) <= len(largest.prefixes.spread)
                    assert batch.n_label_tokens <= largest.n_label_tokens
        micro.max_tokens = None
        steps = [rows for _, rows in zip(range(10), micro.steps(), strict=False)]
        assert plan_of(trainer)[0].length == max(micro.tokens(batch) for rows in steps for batch in rows)


SYSTEM = [{"prompt": "the film was not " * 5 + pair["prompt"], **{k: pair[k] for k in ("chosen", "rejected")}} for pair in PAIRS]


def _fitted(monkeypatch, begun, tokens, **options):
    """A trainer of rows with one long beginning; the memory budget gives microbatches of `tokens(micro)` tokens."""
    monkeypatch.setattr(Fitting, "choose", lambda self, *_: replace(self.fit, max_tokens=tokens(self.micro)))
    trainer = begun("orpo", rows=SYSTEM, **options)
    trainer.set_up()
    return trainer


def test_what_is_computed_once_is_counted_in_microbatches_as_they_are_fitted(begun, monkeypatch):
    trainer = _fitted(monkeypatch, begun, lambda micro: micro.longest_row, max_steps=30)
    each = [trainer.micro.computed(trainer.micro.batch([row])) for row in trainer.micro.rows]
    assert sum(each) > 2 * trainer.micro.computed(trainer.micro.batch(trainer.micro.rows))
    assert (trainer.shared["steps"], trainer.shared["computed_tokens"]) == (20, 20 * sum(each))


def test_microbatches_get_a_tenth_smaller_in_the_tokens_of_their_limit(begun, monkeypatch):
    trainer = _fitted(monkeypatch, begun, lambda _: None)
    rows = next(trainer.micro.steps())
    monkeypatch.setattr(trainer.fitting, "_process_budget", 1)  # the peak is above it
    trainer.fitting.keep_within(rows)
    assert trainer.fit.max_tokens == trainer.micro.max_tokens == int(0.9 * sum(map(trainer.micro.length, trainer.micro.rows)))
    assert len(trainer.micro.dealt(rows)) == 2


def test_all_ranks_share_prefixes_or_none(begun, monkeypatch):
    class Two(Ranks):
        def of_all(self, value):
            return [value, "another rank's reason"]

    trainer = begun("orpo")
    monkeypatch.setattr(trainer.micro, "ranks", Two())
    assert not trainer.passes.share_prefixes()
    assert not trainer.micro.shares
    assert trainer.passes.prefix_reason == "another rank's reason"


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_is_the_same_before_the_first_step_and_with_each(objective, begun):
    before, each = begun(objective), begun(objective, precompute_ref_log_probs=False)
    assert _taken(before) == pytest.approx(_taken(each), rel=1e-6)
    assert (before.reference["adapter"], before.reference["rows"]) == ("off", 8)
    assert each.reference["computed"] == "with each step"
    assert before.evaluate(10).scores == pytest.approx(each.evaluate(10).scores, rel=1e-4)
    assert before.evaluate(0).loss < {"dpo": 0.6931, "kto": 0.5}[objective]


def test_only_rows_that_the_run_sees_are_run(begun):
    trainer = begun("dpo", batch_size=2, max_steps=1)
    trainer.set_up()
    assert trainer.reference["rows"] == 2 + len(PAIRS)
    assert sum(row.beside.reference is not None for row in trainer.micro.rows) == 2


def test_an_adapter_that_does_not_begin_at_the_base_needs_its_reference_before(begun):
    with pytest.raises(ConfigError, match="'precompute_ref_log_probs' of TrainConfig cannot be false here"):
        begun("dpo", random=True, precompute_ref_log_probs=False).set_up()


def test_an_adapter_is_off_inside_the_block_only(tiny_run):
    model, _, _ = tiny_run
    ids = torch.tensor([[3, 4, 5]])
    base = model(input_ids=ids).logits
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False, bias="all"))
    on = model(input_ids=ids).logits
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with adapter_off(model):
        torch.testing.assert_close(model(input_ids=ids).logits, base)
    with adapter_off(model, off=False):
        assert torch.equal(model(input_ids=ids).logits, on)
    assert torch.equal(model(input_ids=ids).logits, on)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "method"), [("dpo", "lora"), ("dpo", "int8"), ("dpo", "full"), ("orpo", "qlora"), ("kto", "qlora")]
)
def test_a_resumed_run_has_the_same_bits(objective, method, widen, tmp_path):
    data, model = _write(tmp_path / "rows", ROWS[objective]), str(widen())
    results = []
    for name, lengths in (("whole", [4]), ("resumed", [2, 4])):
        for steps in lengths:
            config = ln.RunConfig(
                model=model, device="cpu", data=data, method="qlora" if method == "int8" else method,
                quant=ln.QuantConfig(compute="int8" if method == "int8" else "exact"), lora=ln.LoraConfig(r=4),
                train=ln.TrainConfig(**{
                    **TRAIN, "objective": objective, "max_steps": steps, "batch_size": 2, "output_dir": str(tmp_path / name),
                    "resume": steps == 4,
                }),
            )  # fmt: skip
            results.append(ln.run(config))
    whole, _, resumed = results
    weights = [dict(each.model.named_parameters()) for each in (whole, resumed)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items() if value.requires_grad)
    assert whole.losses == resumed.losses
    if objective != "orpo":
        assert whole.losses[0] == pytest.approx({"dpo": 0.693147, "kto": 0.5}[objective], abs=1e-4)
        assert (tmp_path / "whole" / FILE).is_file()
        known = resumed.record["reference"]
        assert (known["computed"], known["adapter"]) == ("before", "as it begins" if method == "full" else "off")
        assert known["rows"] + known["kept_rows"] == 2 * len(ROWS[objective])
        assert known["kept_rows"] >= len(ROWS[objective]) + 2
    counted = whole.record["shared_prefixes"]
    assert resumed.record["shared_prefixes"] == counted
    assert counted["tokens"] == sum(step["tokens"] for step in whole.record["steps"]) > counted["computed_tokens"] > 0
    assert whole.record["speed"]["padding_share"] == 0
    first, last = (whole.record["evaluations"][n]["scores"]["rewards/margins"] for n in (0, -1))
    assert last > first


def test_a_trained_model_is_no_reference_for_a_resumed_run_and_its_merge_is_measured(widen, tmp_path, capsys):
    data, options = _write(tmp_path / "rows", PAIRS), {**TRAIN, "objective": "dpo", "batch_size": 2}
    model, tokenizer = ln.load(str(widen()), quant=None)
    ln.add_lora(model, ln.LoraConfig(r=4))
    config = ln.TrainConfig(**{**options, "max_steps": 2, "output_dir": str(tmp_path / "run")})
    ln.train(model, tokenizer, data, config, sinks=[ProgressSink("lora")])
    assert re.search(r"lora: what sequences begin with alike is computed once: \d\d% of their tokens", capsys.readouterr().err)
    with pytest.raises(TrainingError, match="Load the model again"):
        ln.train(model, tokenizer, data, config.with_options(max_steps=4, resume=True))
    merged = ln.merge(str(tmp_path / "run" / "adapter"), str(tmp_path / "merged"))
    assert merged["measured"]["data"].endswith("(of the run that made the adapter)")
