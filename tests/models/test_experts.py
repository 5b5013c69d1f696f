"""Experts of mixtures, packed on loading. Oracle: transformers' own pass with the decoded weights."""

import pytest
import torch
from architectures import build, quiet
from mixtures import MIXTURES, decode_into, folder_of, known, logits, some_ids, theirs

import lownibble as ln
from lownibble.errors import InputError, ModelError, QuantizationError
from lownibble.lora.experts import named_experts
from lownibble.models import experts
from lownibble.models.experts import containers, expert_weights
from lownibble.models.load import quantizable
from lownibble.models.skeleton import empty_model
from lownibble.quant import eightbit, layouts
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.experts import Ends, QuantExperts
from lownibble.quant.packed import PackedExperts, from_spec, to_spec
from lownibble.registry import CODECS


def dense_of_three(model):
    """Names of float weights of three dimensions that hold a matrix for each expert."""
    counts = experts._numbers_of_experts(model)
    return [name for name, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point() and p.shape[0] in counts
            and min(p.shape[1:]) > 1]  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_packed_mixture_has_the_logits_of_its_decoded_weights(kind, quant_type, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    quant = ln.QuantConfig(quant_type=quant_type, block_size=32 if quant_type == "nf4" else "row")
    model, _ = ln.load(str(folder), quant=quant)
    reference = theirs(folder)
    assert not dense_of_three(model), "not one dense expert is left"
    assert decode_into(reference, model) == 2 * len(list(containers(model)))
    torch.testing.assert_close(logits(model, some_ids()), logits(reference, some_ids()), rtol=1e-4, atol=1e-5)
    shapes, ways = experts.shapes(reference), quantizable(reference, quant)
    planned = {path: layouts.n_bytes(shape, ways[path]) for path, shape in shapes.items()}
    assert {path: module.weight.nbytes for path, module in named_experts(model).items()} == planned


FUSED = (
    "aria_text", "nemotron_h", "deepseek_v4", "hy_v4", "inkling2_text", "minimax_m3_vl_text", "granitemoehybrid",
    "jamba", "lfm2_moe", "qwen3_next", "zaya", "jetmoe", "llama4", "llama4_text", "longcat_flash",
)  # fmt: skip
"""Beside `MIXTURES`: containers unlike Mixtral's (weights held turned, no gate, gates of their own), and models with states, with
several kinds of layers or with a configuration inside of another; the last four stay dense. Others have Mixtral's container."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FUSED)
def test_architectures_with_fused_experts_are_packed(kind, tokenizer, tmp_path):
    known(kind)
    built = build(kind, len(tokenizer))
    if kind == "aria_text" and not list(containers(built)):
        pytest.skip("this transformers has Aria's experts in modules of another form")
    assert list(containers(built)) or dense_of_three(built)
    assert [path.rpartition(".")[2] for path in expert_weights(built)] == [
        name for _, container in containers(built) for name in container._parameters if name in experts.WEIGHTS
    ], "the order of a container's weights is the order in which PEFT wraps them"
    del built
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    if kind in ("jetmoe", "llama4", "llama4_text", "longcat_flash"):
        with pytest.warns(UserWarning, match=r"stay dense: its code computes with the weights of all experts itself"):
            ln.load(str(folder), quant="nf4")
        return
    model, _ = ln.load(str(folder), quant="nf4")
    reference = theirs(folder)
    assert not dense_of_three(model)
    assert decode_into(reference, model)
    with quiet():
        torch.testing.assert_close(logits(model, some_ids()), logits(reference, some_ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant_type", sorted(CODECS))
def test_experts_are_packed_each_on_its_own_by_any_codec(quant_type):
    config, codec = ln.QuantConfig(quant_type=quant_type, double_quant=quant_type != "mxfp4"), CODECS[quant_type]
    weight = torch.randn(3, 10, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize_experts(weight, config)
    each = [codec.quantize(matrix, config) for matrix in weight]
    assert (packed.shape, len(packed), packed.nbytes) == (weight.shape, 3, sum(one.nbytes for one in each))
    assert packed.nbytes == layouts.n_bytes(weight.shape, config)
    decoded = packed.dequantize()
    for expert, one in enumerate(each):
        assert torch.equal(decoded[expert], one.dequantize())
        assert torch.equal(packed[expert].dequantize(), one.dequantize())
    again = from_spec(to_spec(packed), list(packed.tensors().values()))
    assert isinstance(again, PackedExperts)
    assert torch.equal(again.dequantize(), decoded)


def test_products_of_experts_in_8_bits_and_of_few_rows():
    """Oracle: the decoded matrices of each expert; 8 bits: a percent of the largest value."""
    weight = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
    packed, ends = quantize_experts(weight, ln.QuantConfig()), Ends(torch.tensor([1, 1, 4, 14]), 15)
    eightbit.check_weight(packed, "experts.down_proj", "int8")
    with pytest.raises(InputError, match=r"'experts.down_proj': compute='int8' is for 4-bit codecs"):
        eightbit.check_weight(quantize_experts(weight, ln.QuantConfig(quant_type="int4")), "experts.down_proj", "int8")
    x = torch.randn(15, 128, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([x[rows] @ packed[e].dequantize().t() for e, rows in ends.segments()] + [torch.zeros(1, 64)])
    layer = QuantExperts(packed)
    torch.testing.assert_close(layer(x, ends), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x.requires_grad_(), ends), expected, rtol=1e-5, atol=1e-5)
    layer.compute = "int8"
    difference = (layer(x, ends) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < difference < 0.02, "in 8 bits"


def test_an_expert_that_is_not_finite_is_named():
    weight = torch.randn(3, 4, 64)
    weight[1, 2, 3] = torch.nan
    with pytest.raises(QuantizationError, match=r"'experts.down_proj\[1\]': 1 of its 256 values"):
        quantize_experts(weight, ln.QuantConfig(), name="experts.down_proj")


def test_only_experts_that_have_rows_are_visited():
    ends = Ends.of(torch.tensor([0, 0, 3, 3, 3, 5, 6]), 5)
    assert ends.on_host == [2, 2, 2, 5, 5], "rows of experts 5 and 6, which are not here, are nobody's"
    assert list(ends.segments()) == [(0, slice(0, 2)), (3, slice(2, 5))]


def test_patterns_and_skipped_modules_reach_experts(tokenizer, tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    mixed = ln.QuantConfig(pattern={"gate_up_proj": {"quant_type": "int8"}})
    model, _ = ln.load(str(folder), quant=mixed)
    container = model.model.layers[0].mlp.experts
    assert (container.gate_up_proj.quant_type, container.down_proj.quant_type) == ("int8", "nf4")
    model, _ = ln.load(str(folder), quant=ln.QuantConfig(skip_modules=["lm_head", "experts"]))
    assert set(dense_of_three(model)) == set(experts.shapes(model))
    assert model.model.layers[0].self_attn.q_proj.quant_type == "nf4"


def test_shapes_of_what_is_not_loaded_are_those_of_the_model(tokenizer, tmp_path):
    folder = folder_of("gpt_oss", tmp_path / "model", tokenizer)
    model = theirs(folder)
    empty = empty_model(model.config.to_dict(), torch.float32)
    assert experts.shapes(empty) == experts.shapes(model)
    packed, _ = ln.load(str(folder), quant="nf4")
    found = {path: tuple(module.weight.shape) for path, module in named_experts(packed).items()}
    assert found == experts.shapes(model), "(E, out, in), whichever way the model holds them"


def test_an_implementation_that_knows_no_packed_experts_is_refused(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("qwen3_moe", tmp_path / "model", tokenizer)), quant="nf4")
    expected = logits(model, some_ids())
    model.set_experts_implementation("eager")
    with pytest.raises(
        ModelError, match=r"set to the implementation 'eager', which .* Call .*set_experts_implementation\('lownib"
    ):
        logits(model, some_ids())
    model.set_experts_implementation("lownibble")
    assert torch.equal(logits(model, some_ids()), expected)
