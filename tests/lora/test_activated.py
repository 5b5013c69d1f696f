"""Activated LoRA. Oracles: PEFT; a search in each sequence by hand; the two models that a row's parts go through; one sequence
alone, whole, for packed, tiled and cached ones."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lownibble as ln
from lownibble.errors import AdapterError, ConfigError, DataError, ModelError, TargetError
from lownibble.lora import lora_layers, remove_adapter, set_adapter
from lownibble.lora.activated import activated, check_rows, warning_of_evaluation
from lownibble.lora.active import adapter_off
from lownibble.lora.invocation import begin_of, find_active
from lownibble.models.attention import segment_attention
from lownibble.models.caches import cache_argument, cache_in
from lownibble.models.head import hidden_states
from lownibble.models.info import compute_again
from lownibble.training.loss import check_prefixes, label_loss

INVOCATION = [7, 8]
ROWS = torch.tensor([
    [5, 6, 7, 8, 9, 10, 7, 8, 11, 12],  # twice: the last one counts
    [7, 8, 20, 21, 22, 23, 24, 25, 26, 27],  # at once
    [30, 31, 32, 33, 34, 35, 36, 37, 7, 8],  # at the end
    [40, 41, 42, 43, 44, 45, 8, 7, 46, 7],  # never
])  # fmt: skip
BEGINS = [6, 0, 8, None]


@pytest.fixture
def adapted(tiny):
    def make(tokens=INVOCATION, family="llama", **options):
        model = ln.add_lora(tiny(family), ln.LoraConfig(r=4, init_lora_weights=False, alora_invocation_tokens=tokens, **options))
        return model.eval()

    return make


def go_on(model, ids, cache=None):
    """The logits of a pass that goes on from a cache, and the cache after it."""
    output = model(ids, **{cache_argument(model): cache}, use_cache=True)
    return output.logits, cache_in(output)


def by_hand(ids, breaks, tokens):
    """Where the adapter is active, sequence by sequence."""
    found, ends = [], [*breaks, len(ids)]
    for begin, end in zip([0, *breaks], ends, strict=True):
        piece = ids[begin:end]
        at = [i for i in range(len(piece)) if piece[i : i + len(tokens)] == tokens]
        found += [bool(at) and i >= at[-1] for i in range(len(piece))]
    return found


@settings(max_examples=200)
@given(st.data())
def test_where_it_is_active(data):
    rows = data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 14))
    tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
    ids = [data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)) for _ in range(rows)]
    breaks = [sorted(data.draw(st.sets(st.integers(1, length - 1)))) if length > 1 else [] for _ in range(rows)]
    positions = torch.tensor([[i - max(b for b in [0, *row] if b <= i) for i in range(length)] for row in breaks])
    expected = [by_hand(row, cuts, tokens) for row, cuts in zip(ids, breaks, strict=True)]
    assert find_active(torch.tensor(ids), positions, tokens).tolist() == expected
    whole = [by_hand(row, [], tokens) for row in ids]
    assert find_active(torch.tensor(ids), None, tokens).tolist() == whole
    assert [begin_of(row, tokens) for row in ids] == [row.index(True) if True in row else None for row in whole]


def test_before_the_invocation_it_is_the_base_and_after_it_reads_the_bases_keys(adapted, tiny):
    model = adapted()
    with torch.no_grad():
        found, base = model(ROWS).logits, tiny()(ROWS).logits
    for row, begin in enumerate(BEGINS):
        assert torch.equal(found[row, :begin], base[row, :begin])
    assert (found - base).abs()[0, 6:].min(-1).values.max() > 1e-3
    assert torch.equal(found[3], base[3])


def test_it_is_pefts_logits_gradients_and_generation(adapted, tiny, peft, tmp_path):
    ours = adapted()
    ln.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(ours(ROWS).logits, theirs(input_ids=ROWS).logits, rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
    name = {key.replace("base_model.model.", "").replace(".default.weight", ""): p for key, p in theirs.named_parameters()}
    trained = {key.replace(".adapters.default", ""): p for key, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    for key, parameter in trained.items():
        assert float((parameter.grad - name[key].grad).norm() / name[key].grad.norm()) < 1e-4
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ROWS)}
    found, expected = ours.generate(ROWS, **options), theirs.generate(input_ids=ROWS, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found[:3], tiny().generate(ROWS, **options)[:3])


def test_no_tokens_are_plain_lora_to_peft(adapt, write, tmp_path):
    base = write()
    _, folder = adapt(base, None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": []}))
    assert activated(ln.load_adapter(ln.load(str(base))[0], folder)) is None


def test_pefts_file_is_read(adapted, tiny, peft, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM", lora_alpha=40
    )
    theirs = peft.get_peft_model(tiny(), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    ours = ln.load_adapter(tiny(), tmp_path)
    assert activated(ours).tokens == (7, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(ROWS).logits, theirs(input_ids=ROWS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_product_is_that_of_the_masked_input(quant, options, write, tmp_path):
    """y = x W^T + scale (dropout(x) m A^T) B^T for a layer of its own: forward, backward and without gradients."""
    model, _ = ln.load(str(write(intermediate_size=96)), quant=quant and ln.QuantConfig(quant_type=quant, block_size=32))
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, alora_invocation_tokens=INVOCATION, **options))
    layer = model.model.layers[1].mlp.down_proj.train()
    adapter, x = layer.adapter("default"), torch.randn(2, 5, layer.in_features, requires_grad=True)
    active = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    adapter.variant.active = active.view(-1, 1)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    seed = int(torch.randint(2**62, ())) if options else 0
    keep = torch.empty(10, layer.in_features).bernoulli_(0.7, generator=torch.Generator().manual_seed(seed)) / 0.7
    read = x * active.unsqueeze(2) * (keep.view_as(x) if options else 1)
    expected = layer.base(x) + adapter.scale * read @ adapter.lora_A.t() @ adapter.lora_B.t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    dy, trained = torch.randn_like(found), [x, adapter.lora_A, adapter.lora_B]
    for one, two in zip(torch.autograd.grad(found, trained, dy), torch.autograd.grad(expected, trained, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.eval()
        read = x * active.unsqueeze(2)
        expected = layer.base(x) + adapter.scale * read @ adapter.lora_A.t() @ adapter.lora_B.t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_are_as_each_alone(adapted):
    model = adapted()
    rows = [ROWS[0], ROWS[3, :6], ROWS[2], ROWS[1, :4]]
    with torch.no_grad():
        alone = [hidden_states(model, row.unsqueeze(0), None)[0] for row in rows]
        with segment_attention(model):
            packed = hidden_states(model, torch.cat(rows).unsqueeze(0), None, [len(row) for row in rows])[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_padded_rows_are_as_each_alone(adapted):
    model, mask = adapted(), torch.ones(2, 10, dtype=torch.int64)
    ids = ROWS[:2].clone()
    ids[0, 8:], mask[0, 8:] = 0, 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[0, :8], model(ids[:1, :8]).logits[0], rtol=1e-4, atol=1e-5)
        left, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ROWS[:1]], 1), torch.ones(1, 13, dtype=torch.int64)
        mask[:, :3] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(left, attention_mask=mask, position_ids=places).logits[0, 3:]
        torch.testing.assert_close(found, model(ROWS[:1]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cuts", "rows"), [([9], [1]), ([7], [1, 2]), ([3, 6], [1, 2]), ([8, 9], [1]), ([2, 4, 6, 8], [1, 2])])
def test_a_cache_goes_on_with_what_was_invoked(cuts, rows, adapted):
    """In parts, from a cache that the model made itself; the last part may be one token, and an invocation in two parts."""
    model, ids = adapted(), ROWS[rows].roll(1, 1) if cuts == [7] else ROWS[rows]
    with torch.no_grad():
        whole, cache, found = model(ids).logits, None, []
        for begin, end in zip([0, *cuts], [*cuts, 10], strict=True):
            logits, cache = go_on(model, ids[:, begin:end], cache)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_may_be_given_by_position(adapted):
    model, ids = adapted(), ROWS[:2]
    with torch.no_grad():
        whole, (_, cache) = model(ids).logits, go_on(model, ids[:, :8])
        torch.testing.assert_close(model(ids[:, 8:], None, None, cache).logits, whole[:, 8:], rtol=1e-4, atol=1e-5)


def test_generation_that_reads_its_prompt_in_parts(adapted):
    """The first row invokes twice, in two parts: not as in a whole."""
    model, ids = adapted(), ROWS[1:]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=4), model.generate(ids, **options))


def test_an_invocation_may_be_cut_by_two_passes(adapted):
    model, ids = adapted(), torch.tensor([[20, 21, 22, 7, 8, 23, 24]])
    with torch.no_grad():
        _, cache = go_on(model, ids[:, :4])
        found, _ = go_on(model, ids[:, 4:], cache)
        whole = model(ids).logits
    begun = model(ids[:, :4]).logits
    assert not torch.allclose(begun[:, 3], whole[:, 3], atol=1e-3), "what was read before the invocation was whole is the base's"
    assert not torch.allclose(found[:, 1], model(ids[:, [0, 1, 2, 4, 5]]).logits[:, 4], atol=1e-3)
    with torch.no_grad(), adapter_off(model):
        _, cache = go_on(model, ids[:, :4])
    with torch.no_grad():
        assert torch.equal(go_on(model, ids[:, 4:], cache)[0], found)


def test_a_chat_that_goes_on_from_its_cache_is_active_from_its_last_invocation_on(adapted, tiny):
    """The new turn's tokens before its invocation are the base's, as with PEFT."""
    model, first, second = adapted(), torch.tensor([[5, 7, 8, 9]]), torch.tensor([[20, 21, 7, 8, 22]])
    with torch.no_grad():
        _, cache = go_on(model, first)
        found, _ = go_on(model, second, copy.deepcopy(cache))
        with adapter_off(model):
            expected, _ = go_on(model, second[:, :2], cache)
        torch.testing.assert_close(found[:, :2], expected, rtol=1e-4, atol=1e-5)
        again, _ = go_on(model, second[:, 2:], cache)
    torch.testing.assert_close(found[:, 2:], again, rtol=1e-4, atol=1e-5)


def test_a_cut_cache_is_of_what_is_left(adapted, tiny):
    model, base = adapted(), tiny()
    with torch.no_grad():
        caches = [go_on(m, ROWS[:1])[1] for m in (model, base)]
        for cache in caches:
            cache.crop(-9)
        one = torch.tensor([[50]])
        found, expected = (go_on(m, one, cache)[0] for m, cache in zip((model, base), caches, strict=True))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("mamba", ["in_proj"])])  # states that do not count
def test_a_cache_of_unknown_tokens_is_refused(family, targets, adapted, tiny):
    model = adapted(family=family, target_modules=targets)
    with torch.no_grad():
        (_, unknown), (_, others) = go_on(tiny(family), ROWS[:1]), go_on(model, ROWS)
        for cache, rows in ((unknown, 1), (others, 2)):
            with pytest.raises(ModelError, match="Begin with an empty cache"):
                go_on(model, ROWS[:rows, :2], cache)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # of transformers 5.24
def test_a_cache_by_its_former_name_is_seen(adapted):
    model = adapted()
    with torch.no_grad():
        _, cache = go_on(model, ROWS[:1, :9])
        found = model(ROWS[:1, 9:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ROWS[:1]).logits[:, 9:], rtol=1e-4, atol=1e-5)


def test_padding_is_part_of_no_invocation(adapted):
    model, row = adapted(), torch.tensor([[8, 20, 21, 22]])
    padded, mask = torch.tensor([[7, 8, 20, 21, 22]]), torch.tensor([[0, 1, 1, 1, 1]])
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits
        with adapter_off(model):
            assert torch.equal(found, model(padded, attention_mask=mask).logits)
        found = model(padded, attention_mask=mask, position_ids=torch.tensor([[1, 0, 1, 2, 3]])).logits
        torch.testing.assert_close(found[:, 1:], model(row).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_and_then_one_backward(checkpointing, adapted):
    """A layer that is run once more in backward has the rows of its own pass; a pass without gradients comes between."""
    model, one, two = adapted().train(), ROWS[:2], ROWS[2:]
    trained, expected = [p for p in model.parameters() if p.requires_grad], []
    for rows in (one, two):
        expected.append(torch.autograd.grad(label_loss(model, rows, torch.ones_like(rows), rows), trained))
    if checkpointing:
        compute_again(model)
    losses = [label_loss(model, rows, torch.ones_like(rows), rows) for rows in (one, two)]
    with torch.no_grad():
        model(ROWS[3:].expand(2, -1))
    for each, a, b in zip(torch.autograd.grad(sum(losses), trained), *expected, strict=True):
        torch.testing.assert_close(each, a + b, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_not_active_asks_for_nothing(adapted, tiny):
    model, embeddings = adapted(), torch.randn(1, 3, 32)
    ln.add_lora(model, ln.LoraConfig(r=2), name="plain").eval()
    with torch.no_grad():
        expected = tiny()(inputs_embeds=embeddings).logits
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        set_adapter(model, "default")
        with adapter_off(model):
            assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


def test_models_that_call_parts_of_their_body_past_it(adapted, tiny):
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32}
    base = tiny("opt", **sizes)
    model = ln.add_lora(
        tiny("opt", **sizes), ln.LoraConfig(r=4, init_lora_weights=False, alora_invocation_tokens=INVOCATION)
    ).eval()
    with torch.no_grad():
        found, expected = model(ROWS).logits, base(ROWS).logits
        hidden_states(model, ROWS.flip(0), None)
        assert torch.equal(model(ROWS).logits, found), "nothing of a pass is left to the next one"
    for row, begin in enumerate(BEGINS):
        assert torch.equal(found[row, :begin], expected[row, :begin])
    assert not torch.equal(found[0, 6:], expected[0, 6:])
    with pytest.raises(ModelError, match="other rows than the tokens"):
        model.model.decoder.layers[0].fc1(torch.zeros(4, 10, 32))


def test_a_generated_invocation_invokes_nothing(adapted, tiny):
    model, base = adapted([9]), tiny()
    with torch.no_grad():
        caches = [go_on(m, ROWS[3:])[1] for m in (model, base)]
        found, expected = (go_on(m, torch.tensor([[9]]), c)[0] for m, c in zip((model, base), caches, strict=True))
    assert torch.equal(found, expected)


def test_two_adapters_and_the_base_take_turns(adapted, tiny):
    model, base = adapted(), tiny()
    one = model(ROWS).logits
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False, alora_invocation_tokens=[12]), name="other", seed=3).eval()
    two = model(ROWS).logits
    assert torch.equal(two[1:], base(ROWS).logits[1:]), "only the first row has 12"
    assert not torch.equal(two[0, 9], base(ROWS).logits[0, 9])
    set_adapter(model, "default")
    assert torch.equal(model(ROWS).logits, one)
    with torch.no_grad(), adapter_off(model):
        assert activated(model) is None
        assert torch.equal(model(ROWS).logits, base(ROWS).logits)
    remove_adapter(model, "default")
    assert torch.equal(model(ROWS).logits, two)
    remove_adapter(model, "other")
    assert torch.equal(model(ROWS).logits, base(ROWS).logits)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_of_its_own(adapted, copied):
    model = adapted()
    with torch.no_grad():
        expected = model(ROWS).logits
        other = copied(model)
        model(ROWS[:1, :4])
        assert torch.equal(other(ROWS).logits, expected)
        remove_adapter(other, "default")
        assert torch.equal(model(ROWS).logits, expected)
        assert not torch.equal(other(ROWS).logits, expected)


def test_a_checkpointed_step_is_the_plain_one(adapted):
    plain, model = adapted().train(), adapted().train()
    compute_again(model)
    for each in (plain, model):
        label_loss(each, ROWS, torch.ones_like(ROWS), ROWS).backward()
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            assert torch.equal(one.grad, two.grad)


def test_prompts_are_not_shared(adapted):
    """A tree of sequences has tokens of several after one another."""
    assert "activated" in check_prefixes(adapted(), [5, 6, 7, 8, 9], [5, 6, 7])


def test_rows_are_counted():
    rows = [([1, 7, 8, 2], [False, False, False, True]), ([1, 2, 3], [False, True, True])]
    assert check_rows(INVOCATION, rows) == [
        "1 of 2 training rows do not have the tokens that activate the adapter, and train nothing",
        "2 of 3 label tokens come before the adapter is active, untrained: try --trained-turns last",
    ]
    assert check_rows(INVOCATION, rows[:1]) == []
    first = ([1, 7, 8, 2], [False, True, True, True])  # the label at 7 is seen from the token before, where it is not active
    assert check_rows(INVOCATION, [first])[0].startswith("1 of 3 label tokens")
    assert warning_of_evaluation(INVOCATION, [ids for ids, _ in rows]).startswith("1 of 2 evaluation rows do not have")
    assert not warning_of_evaluation(INVOCATION, [[7, 8]])
    with pytest.raises(DataError, match=r"No training row has the tokens \[7, 8\]"):
        check_rows(INVOCATION, rows[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "the output head"),
        ({"init_lora_weights": "pissa"}, "starts at more than the base"),
        ({"init_lora_weights": "eva"}, "starts at more than the base"),
        ({"alora_invocation_tokens": [3, 96]}, "has 96, and the model's vocabulary 96"),
        ({"alora_invocation_tokens": "go on"}, "is the text 'go on'"),
    ],
)
def test_what_cannot_be_activated_is_named(options, message, tiny):
    model = tiny()
    with pytest.raises(TargetError, match=message):
        ln.add_lora(model, ln.LoraConfig(**{"alora_invocation_tokens": INVOCATION, **options}))
    assert not list(lora_layers(model, "default"))


def test_experts_cannot(tiny):
    config = ln.LoraConfig(alora_invocation_tokens=INVOCATION)
    with pytest.raises(TargetError, match="experts"):
        ln.add_lora(tiny("qwen3_moe", num_experts=4, moe_intermediate_size=16, head_dim=8), config)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}, {"target_parameters": ["gate_up_proj"]}]
)
def test_what_changes_other_tokens_is_refused(options):
    with pytest.raises(ConfigError, match=f"cannot be combined with {next(iter(options))}"):
        ln.LoraConfig(alora_invocation_tokens=INVOCATION, **options)


def test_tokens_may_be_numbers_or_a_text():
    given = [[3, 4], ["3", "4"], "3 4", "go on", ["3"], ["go", "on"]]
    assert [ln.LoraConfig(alora_invocation_tokens=each).alora_invocation_tokens for each in given] == [
        [3, 4], [3, 4], [3, 4], "go on", [3], "go on",
    ]  # fmt: skip
    for wrong in ([], "", [-1], ["a", 3]):
        with pytest.raises(ConfigError, match="alora_invocation_tokens"):
            ln.LoraConfig(alora_invocation_tokens=wrong)


def test_a_pass_without_token_ids_and_a_layer_alone_are_named(adapted):
    model = adapted()
    with pytest.raises(ModelError, match="needs the model's input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ModelError, match="other rows than the tokens"):
        model.model.layers[0].mlp(torch.zeros(1, 3, 32))


def test_it_cannot_be_merged(write, adapt, tmp_path):
    base = write()
    _, folder = adapt(base, "nf4", alora_invocation_tokens=INVOCATION)
    with pytest.raises(AdapterError, match="no merged weight is equal"):
        ln.merge(folder, tmp_path / "merged", base=str(base), onto="dequantized", measure_tokens=0)
    assert not (tmp_path / "merged").exists()
