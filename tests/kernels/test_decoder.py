"""The decoder layers on every backend and instruction set. Oracles: the plain-torch layer, and transformers' own layers."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lownibble.config import QuantConfig
from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops
from lownibble.kernels.decoder import (
    PROJECTIONS,
    Adapter,
    Context,
    DecoderLayer,
    DecoderLayers,
    LowRank,
    Projection,
    Segment,
    Step,
)
from lownibble.quant import quantize

BACKENDS = ["reference"]
with contextlib.suppress(BackendError):
    BACKENDS += [f"cpu-{isa}" for isa in cpu.available_isas()]

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""Two layers: sums of up to 192 terms of order one in another order, norms and a softmax: hundreds of roundings of 2^-24."""


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, _, isa = request.param.partition("-")
    before = cpu.isa() if isa else ""
    if isa:
        cpu.select_isa(isa)
    with ops.use_backend(name):
        yield name
    if isa:
        cpu.select_isa(before)


def _layers(**form):
    return DecoderLayers([_layer(seed, **form) for seed in range(2)])


def _layer(
    seed, hidden=128, heads=4, key_heads=2, head_dim=32, inner=192, *, norms=False, biases=False, nested=True, block_size=64,
    outputs=False, **data,
):  # fmt: skip
    torch.manual_seed(seed)
    q, kv = heads * head_dim, key_heads * head_dim
    shapes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    projections = []
    for N, K in shapes:
        weight = quantize(torch.randn(N, K) / K**0.5, QuantConfig(double_quant=nested, block_size=block_size))
        projections.append(Projection(weight.four_bit, torch.randn(N) if biases else None))
    own = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5) if norms else (None, None)
    of_outputs = [torch.rand(hidden) + 0.5 if outputs else None for _ in range(2)]
    return DecoderLayer(
        projections, torch.rand(hidden) + 0.5, torch.rand(hidden) + 0.5, *own, heads, key_heads, head_dim, 1e-5, head_dim**-0.5,
        None, *of_outputs, rope=seed if data else 0, **data,
    )  # fmt: skip


def _adapter(layers, r, dtype=torch.float32, gains=False):
    def branch(index, N, K):
        rank = r + index  # rank 7 is left out: a projection without a branch
        a, b = (torch.randn(shape).div(8).to(dtype) for shape in ((rank, K), (N, rank)))
        return None if rank == 7 else LowRank(a, b, 0.5 + index, torch.rand(N) + 0.5 if gains and index % 2 else None)

    return Adapter([[branch(i, *linear.weight.shape) for i, linear in enumerate(layer.projections)] for layer in layers.of])


def _step(slots, positions, head_dim):
    angles = torch.tensor(positions).unsqueeze(1) / 10 ** (
        torch.tensor([4.0, 2.0])[:, None, None] * torch.linspace(0, 1, head_dim // 2)
    )
    return Step(
        torch.tensor(slots, dtype=torch.long),
        torch.tensor([positions], dtype=torch.long),
        torch.cat([angles.cos()] * 2, 2),
        torch.cat([angles.sin()] * 2, 2),
    )


def _run(layers, slots, positions, segments=(), capacity=40):
    """Output of the layers and the cache after them; the cache was full of other numbers."""
    torch.manual_seed(1)
    layer = layers.of[0]
    keys, values = torch.randn(2, len(layers.of), 3, layer.key_heads, capacity, layer.head_dim).unbind()
    x = torch.randn(len(slots), layer.input_norm.numel())
    ops.decoder_layers(x, layers, [Context(keys, values)], _step(slots, positions, layer.head_dim), segments)
    return x, keys, values


CASES = {
    "one token": ([1], [17]),
    "first token": ([0], [0]),
    "three sequences": ([2, 0, 1], [3, 30, 0]),
    "a prompt": ([1] * 13, list(range(13))),
    "a prompt among others": ([0] + [1] * 6 + [2], [9, 4, 5, 6, 7, 8, 9, 39]),
    "nothing": ([], []),
}
FORMS = {
    "plain": {},
    "norms and biases": {"norms": True, "biases": True},
    "odd sizes": {"hidden": 72, "heads": 3, "key_heads": 1, "head_dim": 10, "inner": 37},
    "wide heads": {"heads": 2, "key_heads": 2, "head_dim": 80, "nested": False, "block_size": 32},
    "four norms, a window, a cap, two angles": {
        "norms": True,
        "outputs": True,
        "activation": "gelu_tanh",
        "window": 7,
        "softcap": 0.5,
        "residual_scale": 0.7,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_plain_torch(backend, form, case):
    layers, (slots, positions) = _layers(**FORMS[form]), CASES[case]
    found = _run(layers, slots, positions)
    with ops.use_backend("reference"):
        expected = _run(layers, slots, positions)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_layers_with_a_window_need_no_more_than_it(backend):
    """Slots in which the windowed layers' positions begin at another place. Oracle: all positions, at places of their own."""
    layers = DecoderLayers([_layer(0, window=7), _layer(1), _layer(2, window=7)._replace(rope=1)])
    assert layers.windows == [7, None]
    slots, positions, first = [0] + [1] * 5 + [2], [9, 30, 31, 32, 33, 34, 39], [0, 24, 33]
    torch.manual_seed(1)
    x, whole = torch.randn(7, 128), torch.randn(3, 2, 3, 2, 40, 32)
    contexts = [Context(*held.contiguous()) for held in (whole[::2].transpose(0, 1), whole[1:2].transpose(0, 1))]
    expected, step = x.clone(), _step(slots, positions, 32)
    ops.decoder_layers(expected, layers, contexts, Step(step.slots, step.places.repeat(2, 1), step.cosine, step.sine))
    few = torch.full((2, 2, 3, 2, 11, 32), float("nan"))
    for slot, begin in enumerate(first):
        few[:, :, slot, :, : min(11, 40 - begin)] = whole[::2].transpose(0, 1)[:, :, slot, :, begin : begin + 11]
    places = step.places - torch.tensor([first, [0] * 3])[:, step.slots]
    ops.decoder_layers(x, layers, [Context(*few), contexts[1]], Step(step.slots, places, step.cosine, step.sine))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 6, 16])
def test_adapters_by_segment(backend, r, dtype):
    layers = _layers()
    first, second = _adapter(layers, r, dtype), _adapter(layers, 2 * r, dtype)
    slots, positions = [0, 1, 1, 1, 2], [5, 2, 3, 4, 8]
    segments = [Segment(0, 1, first), Segment(1, 4, second)]  # the last token has none
    mixed = _run(layers, slots, positions, segments)[0]
    torch.manual_seed(1)
    for rows, adapter in ((slice(0, 1), first), (slice(1, 4), second), (slice(4, 5), None)):
        with ops.use_backend("reference"):
            alone = _run(layers, slots, positions, [Segment(0, 5, adapter)] if adapter else [])[0]
        size = alone.abs().max().item()  # hundreds with large ranks: what float32 rounds grows with it
        torch.testing.assert_close(mixed[rows], alone[rows], rtol=2e-4, atol=max(2e-4, 2e-6 * size))
    assert not torch.allclose(mixed[:4], _run(layers, slots, positions)[0][:4], atol=0.1)


@pytest.mark.parametrize("biases", [False, True])
def test_adapters_that_scale_the_bases_output(backend, biases):
    """DoRA's, beside others: in a compiled step, too."""
    layers = _layers(biases=biases)
    segments = [Segment(0, 2, _adapter(layers, 4, gains=True)), Segment(2, 4, _adapter(layers, 4))]
    slots, positions = [0, 1, 1, 1, 2], [5, 2, 3, 4, 8]
    with pytest.MonkeyPatch.context() as patch:
        if backend == "cpu":
            patch.setattr("lownibble.kernels.decoder.decoder_layers", lambda *_: pytest.fail("plain torch"))
        found = _run(layers, slots, positions, segments)
    with ops.use_backend("reference"):
        expected = _run(layers, slots, positions, segments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * b.abs().max().item())


def test_a_branch_that_lies_by_columns_is_not_copied():
    if "cpu" not in ops.active_backend():
        pytest.skip("needs the compiled kernels")
    layers = _layers()
    by_rows = _adapter(layers, 4)
    by_columns = Adapter([[low and LowRank(low.A, low.B.t().contiguous().t(), low.scale) for low in of] for of in by_rows.of])
    found = [_run(layers, [0], [3], [Segment(0, 1, adapter)])[0] for adapter in (by_rows, by_columns)]
    assert torch.equal(*found)
    assert [len(adapter.prepared["cpu"][1]) for adapter in (by_rows, by_columns)] == [12, 0]  # one of seven has no branch


def test_threads_do_not_change_the_result(backend):
    layers, before = _layers(), torch.get_num_threads()
    segments = [Segment(0, 3, _adapter(layers, 4))]
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_run(layers, [0, 1, 2], [4, 0, 20], segments)[0])
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    else:
        torch.testing.assert_close(found[0], found[2], **CLOSE)


TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**TINY, attention_bias=True),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
}


@pytest.mark.parametrize("family", MODELS)
def test_equals_transformers_layer(backend, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[family]).eval()
    theirs = model.model.layers[0]
    projections = []
    for name in PROJECTIONS:
        linear = getattr(theirs.self_attn if name in PROJECTIONS[:4] else theirs.mlp, name)
        weight = quantize(linear.weight)
        linear.weight.data = weight.dequantize()
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
        projections.append(Projection(weight.four_bit, None if linear.bias is None else linear.bias.detach()))
    norms = [getattr(theirs.self_attn, name, None) for name in ("q_norm", "k_norm")]
    layer = DecoderLayer(
        projections, theirs.input_layernorm.weight.detach(), theirs.post_attention_layernorm.weight.detach(),
        *(None if norm is None else norm.weight.detach() for norm in norms), 4, 2, 16, 1e-6, theirs.self_attn.scaling,
    )  # fmt: skip
    x, positions = torch.randn(1, 9, 64), torch.arange(9)
    with torch.no_grad():
        cosine, sine = model.model.rotary_emb(x, positions.unsqueeze(0))
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        expected = theirs(x, attention_mask=mask, position_embeddings=(cosine, sine), position_ids=positions.unsqueeze(0))
    keys, values = torch.zeros(2, 1, 1, 2, 9, 16).unbind()
    found = x[0].clone()
    ops.decoder_layers(
        found,
        DecoderLayers([layer]),
        [Context(keys, values)],
        Step(torch.zeros(9, dtype=torch.long), positions[None], cosine, sine),
    )
    torch.testing.assert_close(found, expected[0] if expected.dim() == 3 else expected, **CLOSE)


@pytest.mark.parametrize(
    ("slots", "positions", "says"), [([3], [0], "3 slots"), ([0], [40], "40 places"), ([-1], [0], "negative")]
)
def test_a_place_outside_the_cache_is_refused(slots, positions, says):
    if "cpu" not in ops.active_backend():
        pytest.skip("needs the compiled kernels")
    with pytest.raises(InputError, match=says):
        _run(_layers(), slots, positions)


def test_a_context_for_each_window_is_needed():
    if "cpu" not in ops.active_backend():
        pytest.skip("needs the compiled kernels")
    with pytest.raises(InputError, match="2 windows, the cache 1"):
        _run(DecoderLayers([_layer(0, window=7), _layer(1)]), [0], [0])


def test_a_branch_of_the_wrong_size_is_refused():
    if "cpu" not in ops.active_backend():
        pytest.skip("needs the compiled kernels")
    layers = _layers()
    wrong = Adapter([[LowRank(torch.zeros(4, 100), torch.zeros(128, 4), 1.0), *[None] * 6], [None] * 7])
    with pytest.raises(InputError, match=r"q_proj.*4 x 128"):
        _run(layers, [0], [0], [Segment(0, 1, wrong)])


def test_layers_of_different_sizes_are_refused():
    if "cpu" not in ops.active_backend():
        pytest.skip("needs the compiled kernels")
    with pytest.raises(InputError, match="same sizes"):
        _run(DecoderLayers([_layer(0), _layer(1, inner=64)]), [0], [0])


@pytest.mark.parametrize("shape", [(1, 576, 130), (3, 70, 33), (8, 64, 5), (0, 64, 5), (2, 64, 0)])
def test_product_with_a_bfloat16_weight(backend, shape):
    T, K, N = shape
    torch.manual_seed(0)
    x, weight = torch.randn(T, K), torch.randn(N, K, dtype=torch.bfloat16)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(ops.gemv_bf16(x, weight), expected, **CLOSE)
