"""The protocol of packed weights, for every codec. Oracles: the layout that the planner goes by; the formulas of the codecs; a
dense layer with the decoded weight; the weight itself after a round trip through its file format."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from defaults import default_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import lownibble as ln
from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, ModelError, QuantizationError
from lownibble.kernels import reference
from lownibble.kernels.reference import unpack
from lownibble.optim.eight_bit import code_maps
from lownibble.quant import QuantLinear, layouts
from lownibble.quant import codebook as codebooks
from lownibble.quant.bits import pack, unpack_words
from lownibble.quant.codebook import codebook, e8m0, levels, normal_float
from lownibble.quant.packed import from_spec, restore, to_spec
from lownibble.registry import CODECS

TYPES = {
    "nf4": (32, 64), "fp4": (64, 128), "int8": (32, 64, "row"), "int4": (32, 64, 128, "row"), "int3": (32, "row"),
    "int2": (64,), "fp8": (128, "row"), "int8_act": (64,), "int4_act": (32,), "int3_act": (64,), "int2_act": (128,),
    "nf3": (32, 64, "row"), "nf2": (64, "row"), "mxfp4": (32,),
}  # fmt: skip
WAYS = [
    QuantConfig(quant_type=quant_type, block_size=size, double_quant=double_quant)
    for quant_type, sizes in TYPES.items() for size, double_quant in itertools.product(sizes, (True, False))
]  # fmt: skip
WAYS_BY_ID = {f"{way.quant_type}-{way.block_size}-{'double' if way.double_quant else 'plain'}": way for way in WAYS}
every_way = pytest.mark.parametrize("way", WAYS_BY_ID.values(), ids=WAYS_BY_ID)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.facts() == b.facts() and a.tensors().keys() == b.tensors().keys() and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )  # fmt: skip


@every_way
@pytest.mark.parametrize("shape", [(3, 128), (5, 384), (0, 128)], ids=str)
def test_tensors_are_those_of_the_layout(way, shape):
    packed = ln.quantize(random(*shape), way)
    held = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in packed.tensors().items()}
    assert held == {name: tuple(spec) for name, spec in layouts.layout(shape, way).items()}
    assert packed.nbytes == layouts.n_bytes(shape, way)
    assert all(tensor.ndim >= 1 for tensor in packed.tensors().values())
    assert packed.dequantize().shape == shape


@every_way
def test_facts_and_tensors_are_the_weight(way):
    packed = ln.quantize(random(6, 256).bfloat16(), way)
    assert same(restore(packed.facts(), packed.tensors()), packed)
    assert same(from_spec(to_spec(packed), list(packed.tensors().values())), packed)
    assert packed.dtype == torch.bfloat16
    assert packed.with_dtype(torch.float16).dequantize().dtype == torch.float16
    assert same(packed.to("cpu"), packed)


@every_way
def test_files_hold_the_weight(way):
    codec, packed = CODECS[way.quant_type], ln.quantize(random(6, 256), way)
    stored = codec.write("a.b", packed)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == {
        k: (getattr(torch, spec.dtype), spec.shape) for k, spec in codec.written("a.b", (6, 256), way).items()
    }
    assert same(codec.read("a.b", stored, torch.float32, "the test"), packed)
    marker = next(key for key in stored if codec.marker in key)
    options = codec.stored_options("a.b", stored[marker], "the test")
    assert all(getattr(options, key) == getattr(way, key) for key in ("quant_type", "block_size", "double_quant"))
    for key in stored:
        with pytest.raises(ModelError, match=r"a\.b"):
            codec.read("a.b", {k: t for k, t in stored.items() if k != key}, torch.float32, "the test")
    with pytest.raises(ModelError, match=r"a\.b"):
        codec.read("a.b", stored | {marker: torch.zeros_like(stored[marker])}, torch.float32, "the test")


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_compute_with_the_decoded_weight(way, dtype):
    """Forward and input gradient are those of a dense layer with the decoded values; both products are torch's or ours on the
    same values, so they differ by rounding only."""
    packed = QuantLinear.from_linear(nn.Linear(256, 24).to(dtype), way)
    dense = nn.Linear(256, 24).to(dtype)
    dense.weight.data, dense.bias.data = packed.weight.dequantize(dtype), packed.bias.data.clone()
    for rows in (1, 9):
        ours, theirs = (random(rows, 256, seed=rows).to(dtype).requires_grad_() for _ in range(2))
        y, expected = packed(ours), dense(theirs)
        dy = torch.randn_like(expected)
        y.backward(dy)
        expected.backward(dy)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


@every_way
def test_casts_copies_and_state_keep_the_packed_tensors(way):
    layer = QuantLinear.from_linear(nn.Linear(128, 8), way)
    before = {name: tensor.clone() for name, tensor in layer.weight.tensors().items()}
    other = copy.deepcopy(layer).to(torch.bfloat16)
    fresh = QuantLinear.from_linear(nn.Linear(128, 8), way)
    fresh.load_state_dict(layer.state_dict())
    for each in (other, fresh):
        assert {k: t.dtype for k, t in each.weight.tensors().items()} == {k: t.dtype for k, t in before.items()}
        assert all(torch.equal(t, before[k]) for k, t in each.weight.tensors().items())
    assert other.bias.dtype == torch.bfloat16


def forget_tables():
    for each in (*vars(codebooks).values(), code_maps):
        getattr(each, "cache_clear", lambda: None)()


@pytest.fixture
def no_tables():
    """The tables are made anew after the test."""
    yield
    forget_tables()


@pytest.mark.parametrize(
    "defaults", [partial(default_dtype, torch.bfloat16), partial(default_dtype, torch.float64), partial(torch.device, "meta")],
    ids=["bfloat16", "float64", "meta"],
)  # fmt: skip
def test_tables_made_under_other_defaults_are_the_same(no_tables, defaults):
    def results():
        packed = [ln.quantize(weight, way) for way in WAYS]
        return packed, [each.dequantize(torch.float32) for each in packed], code_maps("cpu")

    weight = random(3, 128)
    expected = results()
    forget_tables()
    with defaults():
        found = results()
    assert all(map(same, found[0], expected[0]))
    assert all(map(torch.equal, found[1], expected[1]))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found[2]), tree_leaves(expected[2]), strict=True) if a is not b)


def test_int8_is_its_formula():
    weight = random(7, 192)
    packed = ln.quantize(weight, QuantConfig(quant_type="int8", block_size="row", double_quant=False))
    scale = weight.abs().amax(1) / 127
    assert torch.equal(packed.tensors()["scale"], scale)
    assert torch.equal(packed.tensors()["codes"], (weight / scale[:, None]).round().to(torch.int8))
    assert torch.equal(packed.dequantize(), packed.tensors()["codes"].float() * scale[:, None])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_integers_are_their_formula(bits):
    weight = random(5, 128)
    packed = ln.quantize(weight, QuantConfig(quant_type=f"int{bits}", double_quant=False))
    groups, top = weight.view(-1, 64), 2**bits - 1
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = (high - low) / top
    zero = (-low / scale).round()
    codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, top)
    assert torch.equal(packed.dequantize(), ((codes - zero[:, None]) * scale[:, None]).view(5, 128))
    string = "".join(f"{int(code):0{bits}b}" for code in codes.flatten())  # the first code in the highest bits
    assert bytes(packed.tensors()["codes"].flatten().tolist()) == int(string, 2).to_bytes(len(string) // 8, "big")


def test_fp8_is_its_formula():
    weight = random(7, 192)
    packed = ln.quantize(weight, QuantConfig(quant_type="fp8", block_size="row", double_quant=False))
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    assert torch.equal(packed.tensors()["codes"], codes.view(torch.uint8))
    assert torch.equal(packed.dequantize(), codes.float() * scale)


def normal_float_by_scipy(bits):
    """QLoRA's create_normal_map with 2^bits values in place of 16."""
    n = 2**bits
    offset = round(0.5 * ((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1)))), 7)
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, n // 2 + 1)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, n // 2)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return torch.tensor(values / values.max())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_are_their_formula(bits):
    """To float32's last bits: the formula is evaluated between float32 roundings, as in the authors' code."""
    values = normal_float(bits)
    torch.testing.assert_close(values.double(), normal_float_by_scipy(bits), rtol=1e-6, atol=0)
    assert (len(values), float(values[0]), float(values[-1])) == (2**bits, -1.0, 1.0)
    assert (values.diff() > 0).all()
    assert values[2 ** (bits - 1) - 1] == 0
    assert bits < 4 or torch.equal(values, codebook("nf4").values)


@pytest.mark.parametrize("quant_type", ["nf3", "nf2"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_normal_floats_are_the_nearest(quant_type, double_quant):
    """By brute force over the codebook, with the scales as they are decoded; a largest weight keeps its value up to its scale's
    rounding."""
    weight = random(5, 256)
    packed = ln.quantize(weight, QuantConfig(quant_type=quant_type, double_quant=double_quant))
    table, scale, groups = levels(quant_type), packed.decoded_scale().unsqueeze(1), weight.view(-1, 64)
    every = (table.view(1, 1, -1) * scale.unsqueeze(2) - groups.unsqueeze(2)).abs()
    error = (packed.dequantize().view(-1, 64) - groups).abs()
    torch.testing.assert_close(error, every.amin(2), rtol=0, atol=1e-6)
    if not double_quant:
        assert torch.equal(packed.dequantize().view(-1, 64).abs().amax(1), groups.abs().amax(1))


def to_mxfp4(values):
    """OCP Microscaling Formats 1.0, section 6.3, one number at a time: exponent of the block, codes."""
    largest = max(abs(value) for value in values)
    exponent = min(max(math.floor(math.log2(largest)) - 2, -127), 127) if largest else -127
    magnitudes, codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], []
    for value in values:
        scaled = min(abs(value) / 2.0**exponent, 6.0)
        error = [(abs(scaled - each), code % 2, code) for code, each in enumerate(magnitudes)]  # ties: the even code
        codes.append(min(error)[2] + 8 * (math.copysign(1, value) < 0))
    return exponent, codes


EIGHTHS = st.integers(-64, 64).map(lambda n: n / 8)  # ties and saturation


@settings(max_examples=60)
@given(values=st.lists(st.one_of(EIGHTHS, st.floats(-1e4, 1e4, width=32)), min_size=32, max_size=32), power=st.integers(-60, 60))
def test_mxfp4_is_the_conversion_of_the_specification(values, power):
    weight = torch.tensor(values).ldexp(torch.tensor(power))
    packed = ln.quantize(weight.view(1, 32), "mxfp4")
    exponent, codes = to_mxfp4(weight.tolist())
    assert packed.tensors()["scale"].tolist() == [exponent + 127]
    assert unpack(packed.tensors()["codes"].view(-1), 4).tolist() == codes


def test_mxfp4_is_decoded_as_elsewhere():
    """transformers' decoding of gpt-oss, whose bytes have the first code in the low nibble and whose result is transposed."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    packed = ln.quantize(random(7, 192), "mxfp4")
    assert sorted(packed.tensors()) == ["codes", "scale"]
    codes, scale = packed.tensors()["codes"].view(1, 7, 6, 16), packed.tensors()["scale"].view(1, 7, 6)
    theirs = _convert_moe_packed_tensors(codes >> 4 | codes << 4, scale, dtype=torch.float32)
    assert torch.equal(packed.dequantize(), theirs[0].t())
    assert e8m0()[:255].tolist() == [2.0 ** (i - 127) for i in range(255)]
    assert e8m0()[255].isnan()
    assert layouts.n_bytes((7, 192), QuantConfig(quant_type="mxfp4")) * 8 / (7 * 192) == 4.25


@pytest.mark.parametrize("block_size", [128, "row"])
def test_what_the_format_of_mxfp4_fixes_stays_its_own(block_size):
    pattern = {"down_proj": {"quant_type": "mxfp4"}}
    outside = QuantConfig(quant_type="int8", block_size=block_size, double_quant=False, pattern=pattern)
    inside = outside.for_layer("mlp.down_proj")
    assert (inside.quant_type, inside.block_size, inside.double_quant) == ("mxfp4", 32, False)
    assert outside.for_layer("mlp.up_proj").block_size == block_size
    base = QuantConfig(quant_type="mxfp4", pattern={"down_proj": {"quant_type": "nf4"}, "o_proj": {"quant_type": "int8"}})
    for path in ("mlp.down_proj", "self_attn.o_proj"):
        other = base.for_layer(path)
        assert (other.block_size, other.double_quant) == (64, True)  # the defaults
    assert base.for_layer("mlp.up_proj").block_size == 32


def test_options_with_another_codec_follow_its_format():
    wide = QuantConfig(quant_type="int8", block_size=128, double_quant=False)
    found = wide.with_options(quant_type="mxfp4")
    assert found == QuantConfig(quant_type="mxfp4")
    assert found.block_size == 32
    back = found.with_options(block_size=32).with_options(quant_type="nf4", skip_modules=[])
    assert (back.block_size, back.double_quant, back.skip_modules) == (64, True, [])
    assert wide.with_options(compute="exact").block_size == 128
    with pytest.raises(ConfigError, match="'block_size' of mxfp4 is 32"):
        wide.with_options(quant_type="mxfp4", block_size=128)


def test_mxfp4_has_no_other_blocks():
    """The defaults, which are meant for other codecs, stand for the format's own; anything else is refused."""
    for options in ({}, {"block_size": 32}, {"double_quant": False}, {"block_size": 64, "double_quant": True}):
        config = QuantConfig(quant_type="mxfp4", **options)
        assert (config.block_size, config.double_quant) == (32, False)
    for size in (128, "row"):
        with pytest.raises(ConfigError, match=f"'block_size' of mxfp4 is 32. Got {size!r}. Leave it out"):
            QuantConfig(quant_type="mxfp4", block_size=size)
    assert QuantConfig(pattern={"down_proj": {"quant_type": "mxfp4"}}).for_layer("a.down_proj").block_size == 32


@pytest.mark.parametrize("quant_type", ["int8", "int4", "int3", "int2"])
def test_act_order_groups_columns_by_their_inputs(quant_type):
    """The same codes as without act-order of the weight with its columns sorted, put back where they were."""
    weight, moments = random(6, 256), random(256, seed=1).square()
    order = moments.argsort(descending=True)
    plain = ln.quantize(weight[:, order], quant_type)
    packed = CODECS[f"{quant_type}_act"].quantize(weight, QuantConfig(quant_type=f"{quant_type}_act"), moments)
    assert torch.equal(packed.dequantize()[:, order], plain.dequantize())
    assert torch.equal(packed.tensors()["order"].long(), order)
    assert torch.equal(ln.quantize(weight, f"{quant_type}_act").dequantize(), ln.quantize(weight, quant_type).dequantize())


@settings(max_examples=60)
@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=70), seed=st.integers(0, 9))
def test_words_of_other_tools_are_unpacked(bits, codes, seed):
    """32-bit words with the first code in the lowest bits, codes going on in the next word: as arithmetic on one large number."""
    rows = [[code % 2**bits for code in codes], [code * (seed + 1) % 2**bits for code in codes]]
    n_words = -(-len(codes) * bits // 32)
    words = [
        [(sum(code << (bits * i) for i, code in enumerate(row)) >> (32 * w)) & (2**32 - 1) for w in range(n_words)]
        for row in rows
    ]
    signed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert unpack_words(signed, bits, len(codes)).tolist() == rows
    assert unpack(pack(torch.tensor(rows[0]), bits), bits)[: len(codes)].tolist() == rows[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_act_order_takes_weights_of_any_dimensions(shape, backend):
    weight, config = random(*shape), QuantConfig(quant_type="int4_act")
    strengths = torch.rand(64, generator=torch.Generator().manual_seed(1))
    with ln.use_backend(backend):
        packed = ln.quantize(weight, config, statistics=strengths)
        alike = ln.quantize(weight.view(-1, 64), config, statistics=strengths)
        assert torch.equal(packed.dequantize(), alike.dequantize().view(shape))


@pytest.mark.parametrize("quant_type", ["int8", "int4"])
@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=64, max_size=64), double_quant=st.booleans()
)
def test_integers_are_off_by_half_a_step(quant_type, values, double_quant):
    """Half a step of the scale as it is decoded (int4: and half a step of the zero point); where the scale was rounded down, the
    largest values of a group are cut: by what the scale lost, times the codes."""
    weight = torch.tensor(values).view(1, 64).repeat(4, 1) * torch.tensor([1.0, 0.5, 0.0, 0.25])[:, None]
    packed = ln.quantize(weight, QuantConfig(quant_type=quant_type, double_quant=double_quant))
    top = 127 if quant_type == "int8" else 15
    span = weight.abs().amax(1) if quant_type == "int8" else weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    exact, scale = span / top, packed.decoded_scale()
    bound = scale.abs() / 2 + (exact - scale).abs() * top + (0 if quant_type == "int8" else scale.abs() / 2)
    error = (packed.dequantize() - weight).abs().amax(1)
    assert bool((error <= bound * 1.001 + 1e-12).all())


def test_a_large_weight_is_decoded_in_parts(monkeypatch):
    weight = random(9, 256)
    for quant_type in layouts.GROUPED:
        packed = ln.quantize(weight, quant_type)
        with ln.use_backend("reference"):
            whole = packed.dequantize()
            monkeypatch.setattr(reference, "PART_ELEMENTS", 600)
            assert torch.equal(packed.dequantize(), whole)
            monkeypatch.undo()


BAD = [
    ("nf4", "row", (4, 128), ConfigError, r"'block_size' of nf4 must be a number.*Got 'row'"),
    ("int3", "row", (4, 100), QuantizationError, r"in groups of a row takes .* multiple of 8 long\. Got 100\. Use another"),
    ("int4", 128, (4, 192), QuantizationError, r"multiple of 128 long\. Got 192\. Use block_size 32 or 64 or row, or another"),
    ("mxfp4", 32, (4, 72), QuantizationError, r"multiple of 32 long\. Got 72\. Use another"),
    ("nf3", "row", (4, 100), QuantizationError, r"multiple of 8 long\. Got 100\. Use another"),
    ("int8", 64, (4, 100), QuantizationError, r"multiple of 64 long\. Got 100\. Use block_size row, or another"),
    ("int8", 64, (), QuantizationError, r"takes rows of weights\. Got a single number"),
]


@pytest.mark.parametrize(("quant_type", "block_size", "shape", "error", "words"), BAD)
def test_a_codec_that_does_not_suit_is_named(quant_type, block_size, shape, error, words):
    config = QuantConfig(quant_type=quant_type, block_size=block_size)
    with pytest.raises(error, match=words):
        ln.quantize(random(*shape), config, name="a.layer")
    with pytest.raises(error, match=r"'a\.layer' cannot be packed: .*" + words):
        layouts.choose({"a.layer": shape}, config, ["lm_head"])


def test_pattern_chooses_the_codec_of_each_layer():
    linears = {f"layers.{i}.{name}": (64, 64) for i in range(2) for name in ("q_proj", "down_proj")} | {"lm_head": (96, 64)}
    config = QuantConfig(pattern={"down_proj": {"quant_type": "int8"}, r"layers\.1\..*": {"double_quant": False}})
    chosen = layouts.choose(linears, config)
    assert {path: (how.quant_type, how.double_quant) for path, how in chosen.items()} == {
        "layers.0.q_proj": ("nf4", True), "layers.0.down_proj": ("int8", True),
        "layers.1.q_proj": ("nf4", False), "layers.1.down_proj": ("int8", True),  # the first pattern that fits
    }  # fmt: skip
    assert layouts.choose(linears, QuantConfig.of_layers(chosen, ["lm_head"])) == chosen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": {"gate_proj": {}}}, r"pattern 'gate_proj' .* matches no layer .*down_proj, lm_head, q_proj"),
        ({"pattern": {"lm_head": {}}}, r"pattern 'lm_head' .* matches no layer .*; skipped: lm_head"),
        ({"skip_modules": ["v_proj"]}, r"skip_modules 'v_proj' matches no linear module"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(options, words):
    linears = {"layers.0.q_proj": (64, 64), "layers.0.down_proj": (64, 64), "lm_head": (96, 64)}
    with pytest.raises(ConfigError, match=words):
        layouts.choose(linears, QuantConfig(**options), ["lm_head"])
