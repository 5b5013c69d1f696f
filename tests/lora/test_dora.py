"""DoRA's layer. Oracle: the formula in plain torch, with W + s B A formed. PEFT's losses, files, logits: test_lora_peft.py."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.pytorch_utils import Conv1D

import lownibble as ln
from lownibble.errors import AdapterError
from lownibble.lora.dora import DORA
from lownibble.lora.init import kaiming
from lownibble.lora.layer import LoraLinear, LowRank
from lownibble.lora.product import dropped
from lownibble.quant import QuantLinear, matrix
from lownibble.registry import CODECS, INITS
from lownibble.training.loss import label_loss

T, K, N, R = 5, 64, 48, 3
BASES = ["linear", "conv1d", "nf4", "fp4", "int8", "int4", "int3", "int2", "fp8"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def layer_on(kind, bias=True, dtype=torch.float32, **options):
    """A layer with a random adapter whose B is not zero, and the base's weight (out, in)."""
    generator = torch.Generator().manual_seed(0)
    base = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=bias)
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    base = base.to(dtype) if kind in ("linear", "conv1d") else QuantLinear.from_linear(base.to(dtype), kind)
    layer = LoraLinear(base.requires_grad_(False))
    adapter = layer.add("a", R, alpha=2 * R, dropout=options.get("dropout", 0.0), use_rslora=False, variant=DORA)
    for matrix_of in (adapter.lora_A, adapter.lora_B):
        matrix_of.data = torch.randn(matrix_of.shape, generator=generator) / 8
    DORA.start(layer.base, adapter)
    adapter.magnitude.data *= 1 + torch.randn(N, generator=generator) / 8
    weight = base.weight.dequantize(torch.float32) if isinstance(base, QuantLinear) else matrix(base).float()
    return layer, adapter, weight


def expected(x, weight, bias, adapter, dropped_x=None):
    """The formula, with PEFT's treatment of dropout."""
    delta = adapter.scale * adapter.lora_B @ adapter.lora_A
    gain = adapter.magnitude / (weight + delta).norm(dim=1).detach()
    inner = x if dropped_x is None else dropped_x
    return linear(x, weight, bias) + (gain - 1) * linear(inner, weight) + gain * linear(inner, delta)


@pytest.mark.parametrize("kind", BASES)
def test_forward_and_gradients(kind):
    layer, adapter, weight = layer_on(kind)
    layer.base.bias.requires_grad_(True)
    x = torch.randn(2, T, K, requires_grad=True)
    trained = [x, layer.base.bias, *adapter.parameters()]
    y, other = layer(x), expected(x, weight, layer.base.bias, adapter)
    torch.testing.assert_close(y, other, **CLOSE)
    dy = torch.randn_like(y)
    for one, two in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(other, trained, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_dropout_drops_the_inputs_of_the_bases_product_where_it_is_scaled(kind):
    layer, adapter, weight = layer_on(kind, dropout=0.4)
    x = torch.randn(T, K, requires_grad=True)
    trained = [x, *adapter.parameters()]
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    inner = dropped(x, 0.4, torch.randint(2**62, ()))
    assert 0 < (inner == 0).float().mean() < 1
    other = expected(x, weight, layer.base.bias, adapter, inner)
    torch.testing.assert_close(y, other, **CLOSE)
    dy = torch.randn_like(y)
    for one, two in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(other, trained, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_neither_the_sum_nor_its_norm_is_formed(kind):
    """No operation of a step makes a tensor as large as the weight."""
    layer, _, _ = layer_on(kind)
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            owned = layer.base.weight.untyped_storage().data_ptr()
            large.extend(
                (func, t.shape)
                for t in tree_iter(out)
                if isinstance(t, torch.Tensor) and t.numel() >= K * N and t.untyped_storage().data_ptr() != owned
            )
            return out

    with Watch():
        layer(torch.randn(T, K, requires_grad=True)).square().sum().backward()
    assert not large


def test_backward_keeps_the_input_the_small_product_and_the_output():
    layer, adapter, _ = layer_on("nf4")
    x, kept = torch.randn(T, K, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in (*layer.base.parameters(), *adapter.parameters())}
    assert sorted(n for key, n in kept.items() if key not in own) == sorted([x.numel(), T * R, T * N, N])


def test_it_starts_as_the_base_to_the_last_bit():
    layer, adapter, _ = layer_on("nf4")
    adapter.lora_B.data.zero_()
    DORA.start(layer.base, adapter)
    x = torch.randn(T, K)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-6)
    assert torch.equal(adapter.magnitude.data, adapter.row_squares.sqrt())


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_small_changes_of_a_magnitude_count_in_16_bits(kind):
    layer, adapter, _ = layer_on(kind, bias=False, dtype=torch.bfloat16)
    x = torch.randn(4096, K, dtype=torch.bfloat16)
    before = layer(x).detach().double()
    adapter.magnitude.data *= 1.001
    after = layer(x).detach().double()
    assert float((after * before).sum() / before.square().sum()) == pytest.approx(1.001, abs=2e-4)


def test_a_row_of_zeros_stays_zero_and_has_no_gradient():
    layer, adapter, _ = layer_on("linear", bias=False)
    layer.base.weight.data[7] = adapter.lora_B.data[7] = 0
    DORA.start(layer.base, adapter)
    y = layer(torch.randn(T, K, requires_grad=True))
    y.square().sum().backward()
    assert not y[:, 7].any()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_norms_move_with_the_layer_keep_their_type_and_are_in_no_file():
    layer, adapter, _ = layer_on("linear")
    before = adapter.row_squares.clone()
    assert not [key for key in layer.state_dict() if "row_squares" in key]
    assert torch.equal(copy.deepcopy(layer).adapter("a").row_squares, before)
    assert layer.bfloat16().adapter("a").row_squares.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_on_a_gpu_it_computes_the_same(kind):
    layer, adapter, _ = layer_on(kind)
    x = torch.randn(T, K)
    expected_y = layer(x).detach()
    assert layer.cuda().adapter("a").row_squares.is_cuda
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected_y, rtol=1e-3, atol=1e-3)
    layer(x.cuda()).sum().backward()
    assert adapter.magnitude.grad is not None


def test_norms_are_those_of_a_base_that_the_initialisation_changed(write, monkeypatch):
    def coarser(adapter, start):
        kaiming(adapter, start)
        return CODECS["int4"].quantize(start.weight(), ln.QuantConfig(quant_type="int4"))

    monkeypatch.setitem(INITS._entries, "coarser", coarser)
    model, _ = ln.load(str(write("llama", hidden_size=64, intermediate_size=128)), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(r=2, use_dora=True, init_lora_weights="coarser"))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.base.quant_type == "int4"
    norms = layer.base.weight.dequantize(torch.float32).norm(dim=1)
    torch.testing.assert_close(layer.adapter("default").magnitude.data, norms)


def test_conv1d_adapters_equal_pefts(peft, tiny, clone, batch, tmp_path):
    base = tiny("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64)
    theirs = peft.get_peft_model(
        clone(base), peft.LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    )
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
    theirs.save_pretrained(tmp_path)
    ours = ln.load_adapter(clone(base), tmp_path).eval()
    ids, mask, _ = batch()
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, attention_mask=mask).logits for m in (ours, theirs.eval()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_heads_losses_and_gradients_are_the_models_own(tiny, batch):
    """Training computes the loss in chunks of logits, in place where it can."""
    model = ln.add_lora(tiny(), ln.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data *= 1.1
    ids, mask, labels = batch()
    found, own = label_loss(model, ids, mask, labels), model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert found.item() == pytest.approx(own.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found, trained), torch.autograd.grad(own, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_that_changes_outputs_in_place_trains_all_the_same(write, tmp_path):
    """Falcon adds to its MLP's output."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "w{i} w{i + 1}", "completion": " w{2 * i} w{3 * i}"}}\n' for i in range(12)))
    model, tokenizer = ln.load(str(write("falcon")))
    ln.add_lora(model, ln.LoraConfig(r=3, use_dora=True))
    data, train = ln.DataConfig(path=str(rows), eval_fraction=0.2), ln.TrainConfig(max_steps=3, batch_size=2, max_length=16)
    result = ln.train(model, tokenizer, data, train.with_options(learning_rate=1e-2, warmup_ratio=0.0))
    assert len(result.losses) == 3
    adapters = [m for m in model.modules() if isinstance(m, LowRank)]
    assert all(adapter.output_changes for adapter in adapters)
    assert all(not torch.equal(adapter.magnitude.data, adapter.row_squares.sqrt()) for adapter in adapters)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_the_product_kept_apart_gives_the_same_gradients(kind):
    layer, adapter, _ = layer_on(kind)
    x, dy = torch.randn(T, K, requires_grad=True), torch.randn(T, N)
    found = []
    for changes in (False, True):
        adapter.output_changes = changes
        y = layer(x)
        y = y.add_(1) if changes else y
        found.append(torch.autograd.grad(y, [x, *adapter.parameters()], dy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant", ["nf4", None])
def test_what_takes_low_rank_sums_only_refuses_it(write, adapt, tmp_path, quant):
    folder = write("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    _, adapter = adapt(folder, quant, use_dora=True)
    with pytest.raises(
        AdapterError, match=r"low-rank sums only, and .* has '?base_model.*lora_magnitude_vector.* Merge it instead"
    ):
        ln.export(adapter, tmp_path / "adapter.gguf", "gguf")


@pytest.mark.parametrize("head", [False, True])
def test_a_merge_is_measured_against_the_live_adapter(write, adapt, tmp_path, head):
    from lownibble.config import MergeConfig
    from lownibble.exporting.merge import run_merge

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "w{i} w{i + 1}", "completion": " w{2 * i} w{3 * i}"}}\n' for i in range(24)))
    targets = ["q_proj", "up_proj", *["lm_head"] * head]
    _, adapter = adapt(
        write("llama", hidden_size=64, intermediate_size=128), "nf4", use_dora=True, target_modules=targets, size=4
    )
    config = MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged"), data={"path": str(rows)}, measure_tokens=200)
    found = run_merge(config)["measured"]["models"]
    assert found["dequantized"]["kept"] > 0.999
    assert found["original"]["kept"] < found["dequantized"]["kept"]
