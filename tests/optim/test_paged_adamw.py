"""The paged optimisers. Oracles: torch's fused AdamW for the bits of the 32-bit one, the unpaged one for the 8-bit one's, and
bitsandbytes and its formula in float64 for the 8-bit one itself."""

import pytest
import torch
from defaults import default_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton_interpreter import INTERPRETED

from lownibble.errors import ConfigError, OutputError, TrainingError
from lownibble.kernels import ops
from lownibble.kernels.adamw import AdamStep, encode, nearest
from lownibble.optim import make_optimizer, open_states, set_learning_rate, specs, state_bytes, states
from lownibble.optim.eight_bit import BLOCK, code_maps
from lownibble.optim.paged_adamw import EightBit, Fused, PagedAdamW
from lownibble.optim.specs import Paging
from lownibble.quant.codebook import dynamic8, dynamic8_unsigned

PAGE = 4096
SHAPES = [(33, 47), (1,), (7,), (128, 65), (300,), (2, 3, 5), (64, 64), (0, 4), (1, 1), (517, 13), (4099,)]


def _parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _groups(parameters, weight_decay=0.1):
    shared = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, **shared},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, **shared},
    ]


def _train(optimizer, parameters, steps=6, after=lambda: None, first=0):
    """Steps with their own gradients, rate and set of parameters that have a gradient."""
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 2)
            parameter.grad = None if (step + index) % 3 == 0 else gradient.to(parameter.dtype)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
        after()


def _states(optimizer, parameters):
    """(number of the parameter, state) -> all its values; states without values are left out."""
    number, found = {p: n for n, p in enumerate(parameters)}, {}
    for parameter, key, first, values in states.parts(optimizer):
        held = found.setdefault((number[parameter], key), torch.empty(0, dtype=values.dtype))
        assert len(held) == first, "parts come in order"
        found[number[parameter], key] = torch.cat([held, values])
    return {key: values for key, values in found.items() if len(values)}


def _same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [1, 2, 5, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_paged_adamw_is_torchs_bit_for_bit(dtype, pages, threads, tmp_path):
    ours, theirs = _parameters(dtype), _parameters(dtype)
    paged = PagedAdamW(_groups(ours), Fused(), Paging(pages * PAGE, tmp_path), page_bytes=PAGE)
    plain = torch.optim.AdamW(_groups(theirs), fused=True)

    def check():
        assert paged.resident_bytes <= pages * PAGE

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _train(paged, ours, after=check)
    _train(plain, theirs)
    torch.set_num_threads(before)
    assert _same(ours, theirs)
    found, wanted = _states(paged, ours), _states(plain, theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    paged.close()


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6), pages=st.integers(1, 6), eight=st.booleans())
@settings(max_examples=40)
def test_any_sizes_and_budgets(sizes, pages, eight):
    shapes = [(size,) for size in sizes]
    ours, theirs = _parameters(shapes=shapes), _parameters(shapes=shapes)
    kind = EightBit() if eight else Fused()
    paged = PagedAdamW(_groups(ours)[1:], kind, Paging(pages * PAGE), page_bytes=PAGE)
    plain = PagedAdamW(_groups(theirs)[1:], kind, None) if eight else torch.optim.AdamW(_groups(theirs)[1:], fused=True)
    _train(paged, ours, 3)
    _train(plain, theirs, 3)
    assert _same(ours, theirs)
    paged.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [1, 3])
def test_paged_8_bit_is_unpaged_8_bit_bit_for_bit(dtype, pages, tmp_path):
    ours, theirs = _parameters(dtype), _parameters(dtype)
    paged = PagedAdamW(_groups(ours), EightBit(), Paging(pages * PAGE, tmp_path), page_bytes=PAGE)
    plain = PagedAdamW(_groups(theirs), EightBit(), None)
    _train(paged, ours)
    _train(plain, theirs)
    assert _same(ours, theirs)
    found, wanted = _states(paged, ours), _states(plain, theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    paged.close()


def test_large_tensors_through_real_pages(tmp_path):
    """Pages of the size that runs have, tensors of many pages, and the default layout of `make_optimizer`."""
    shapes = [(1025, 1031), (513,), (700, 900)]
    ours, theirs = _parameters(shapes=shapes), _parameters(shapes=shapes)
    paged = make_optimizer("paged_adamw", ours, 1e-3, 0.1, page_budget=3 << 20, folder=tmp_path)
    plain = make_optimizer("adamw", theirs, 1e-3, 0.1)
    _train(paged, ours, 3)
    _train(plain, theirs, 3)
    assert _same(ours, theirs)
    total, resident = state_bytes(paged)
    assert total == state_bytes(plain).total == state_bytes(plain).resident
    assert resident == (3 << 20) + 4 * len(shapes)
    paged.close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_back_begins_with_the_pages_that_are_there():
    parameters = _parameters(shapes=[(8, PAGE // 8)])  # float32: eight pages and a bit for alignment
    optimizer = PagedAdamW(_groups(parameters), Fused(), Paging(4 * PAGE), page_bytes=PAGE)
    store = optimizer.open()
    for step in range(1, 5):
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        if step == 1:
            first = store.reads
    n = store.n_pages
    assert first == n
    assert store.reads == n + 3 * (n - 4), "four pages were found again in each step"
    optimizer.close()


@pytest.mark.parametrize("kind", ["paged_adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_parameters_without_gradients_are_left_alone(kind):
    parameters = _parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(kind, parameters, 1e-3, 0.1)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [True] + [False] * (len(parameters) - 1)
    assert set(optimizer.state) == {parameters[0]}


def test_the_default_budget_is_a_tenth_and_at_least_16_mib():
    small = make_optimizer("paged_adamw", _parameters(), 1e-3, 0.0)
    assert small.budget_bytes == 16 << 20
    large = nn.Parameter(torch.empty(30 << 20, 2, device="meta"))
    assert make_optimizer("paged_adamw", [large], 1e-3, 0.0).budget_bytes == (30 << 20) * 2 * 8 // 10


MIB = 1 << 20


@pytest.mark.parametrize(
    ("total", "budget", "page"),
    [
        (300 * MIB - 5, None, 300 * MIB), (10, None, MIB), (0, None, MIB),  # all resident: one page
        (40 * MIB, 64 * MIB, 40 * MIB), (2000 * MIB, 200 * MIB, 32 * MIB), (2000 * MIB, 64 * MIB, 16 * MIB),
        (2000 * MIB, 63 * MIB, 8 * MIB), (2000 * MIB, 3 * MIB, MIB), (4 * MIB - 9, 4 * MIB - 9, MIB),
    ],
)  # fmt: skip
def test_pages_on_cuda(total, budget, page):
    """A page for all that fits; else powers of two to 32 MiB, of which the budget holds four."""
    assert specs.page_bytes(total, budget, "cuda") == page
    assert specs.page_bytes(total, budget, "cpu") == MIB
    resident = specs.resident_bytes(total, budget, "cuda")
    assert resident % page == 0
    assert resident <= total + MIB if budget is None else resident <= budget


@pytest.mark.parametrize("kind", ["paged_adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("budget", [2 * MIB, 5 * MIB, 64 * MIB])
def test_bits_do_not_depend_on_the_page_size(kind, budget, monkeypatch):
    """CUDA's pages on the CPU, where the step is the same code; and what a plan counts is what is resident."""
    shapes = [(1025, 1031), (513,), (700, 900)]
    ours, theirs = _parameters(shapes=shapes), _parameters(shapes=shapes)
    options = {"page_budget": budget} if kind.startswith("paged") else {}
    plain = make_optimizer(kind, theirs, 1e-3, 0.1, **options)
    size = specs.page_bytes
    monkeypatch.setattr(specs, "page_bytes", lambda total, budget, _: size(total, budget, "cuda"))
    optimizer = make_optimizer(kind, ours, 1e-3, 0.1, **options)
    _train(optimizer, ours, 3)
    _train(plain, theirs, 3)
    assert _same(ours, theirs)
    assert _same(_states(optimizer, ours).values(), _states(plain, theirs).values())
    planned = specs.resident_bytes(optimizer.total_bytes, optimizer.budget_bytes, "cuda")
    assert optimizer.planned_bytes == optimizer.resident_bytes == planned
    optimizer.close(), plain.close()


def test_unusable_options_and_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"for paged optimisers.*'paged_adamw'"):
        make_optimizer("adamw", _parameters(), 1e-3, 0.0, page_budget=1 << 20)
    with pytest.raises(ConfigError, match=r"(?s)at least one page, 1 MiB.*--optim-page-budget"):
        make_optimizer("paged_adamw", _parameters(), 1e-3, 0.0, page_budget=1000)
    with pytest.raises(ConfigError, match="contiguous"):
        make_optimizer("paged_adamw", [nn.Parameter(torch.ones(3, 4).t())], 1e-3, 0.0)
    optimizer = PagedAdamW(_groups(_parameters()), Fused(), Paging(PAGE, tmp_path / "absent"), page_bytes=PAGE)
    with pytest.raises(OutputError, match="absent"):
        optimizer.open()
    with pytest.raises(TrainingError, match="checkpoint"):
        optimizer.state_dict()


# 8 bits


def test_the_maps_are_bitsandbytes(bitsandbytes):
    for ours, signed in ((dynamic8(), True), (dynamic8_unsigned(), False)):
        assert torch.equal(ours, bitsandbytes.functional.create_dynamic_map(signed=signed))


def _nearest(x, values, absmax):
    """The nearest code by comparing with all, in float64; the lower of two as near."""
    scaled = x.double() / absmax.double().repeat_interleave(BLOCK)[: len(x)].clamp(min=1e-38)
    return (scaled[:, None] - values.double()).abs().argmin(dim=1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 4096, 5000])
def test_codes_are_the_nearest(signed, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) ** 3
    x[n // 2] = 0
    if n > 600:
        x[256:512] = 0  # a block of zeros
    x = x if signed else x * x
    codes, absmax = torch.empty(n, dtype=torch.uint8), torch.empty(-(-n // BLOCK))
    book = code_maps("cpu")[not signed]
    encode(x, book, codes, absmax, BLOCK)
    values = book.values
    differing = (codes.long() != _nearest(x, values, absmax)).nonzero().flatten()
    # a value that rounding puts on the other side of the middle between two codes is one off
    assert len(differing) <= n // 1000
    decoded = ops.dequantize_8bit(codes, absmax, values, BLOCK)
    assert torch.equal(decoded, values[codes.long()] * absmax.repeat_interleave(BLOCK)[:n])
    if n > 600:
        assert not decoded[256:512].any()


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_a_search(signed):
    """At and next to every bound, value and power of two, and at random."""
    values = dynamic8() if signed else dynamic8_unsigned()
    bounds = (values[1:] + values[:-1]) / 2
    powers = 2.0 ** torch.arange(-40, 1)
    x = torch.cat([bounds, values, powers, torch.rand(100_000, generator=torch.Generator().manual_seed(0)) ** 4])
    x = torch.cat([x, -x, torch.nextafter(x, torch.tensor(2.0)), torch.nextafter(x, torch.tensor(-2.0))]).clamp(-1, 1)
    x = x if signed else x.clamp(min=0)
    assert torch.equal(nearest(x, code_maps("cpu")[not signed]), torch.bucketize(x, bounds, out_int32=True))


def _search(x, code, block_size=BLOCK):
    """bitsandbytes' encoding for devices without a kernel of its own, which searches as its CUDA kernel does."""
    elsewhere = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(elsewhere, x, code, block_size)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes_search(bitsandbytes, signed):
    x = torch.randn(5003, generator=torch.Generator().manual_seed(0)) ** 5
    x = x if signed else x * x
    codes, absmax = torch.empty(5003, dtype=torch.uint8), torch.empty(-(-5003 // BLOCK))
    encode(x, code_maps("cpu")[not signed], codes, absmax, BLOCK)
    wanted, wanted_absmax = _search(x, bitsandbytes.functional.create_dynamic_map(signed=signed))
    assert torch.equal(codes, wanted)
    assert torch.equal(absmax, wanted_absmax)


def test_8_bit_training_is_bitsandbytes(bitsandbytes, monkeypatch):
    """The whole optimiser over several steps, with the search in the place of its CPU build's table."""
    from bitsandbytes.backends.cpu import ops

    def by_search(x, code, absmax, codes, block_size):
        found, constants = _search(x.reshape(-1), code, block_size)
        codes.copy_(found.view_as(codes))
        absmax.copy_(constants)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", by_search)
    shapes = [(64, 100), (5003,), (300,), (31, 7)]
    ours, theirs = _parameters(shapes=shapes), _parameters(shapes=shapes)
    optimizers = [PagedAdamW(_groups(ours), EightBit(), Paging(2 * PAGE), page_bytes=PAGE)]
    optimizers += [bitsandbytes.optim.AdamW(_groups(theirs), optim_bits=8)]
    for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
        _train(optimizer, parameters, 8)
    for mine, peer in zip(ours, theirs, strict=True):
        # operations that round once here and are fused there; where that moves a code by one, a parameter moves with it
        near = torch.isclose(mine, peer, rtol=1e-5, atol=1e-6)
        assert near.float().mean() > 0.999
        torch.testing.assert_close(mine, peer, rtol=1e-2, atol=1e-3)
    optimizers[0].close()


def test_one_step_is_bitsandbytes_formula():
    """Against the formula in float64 on the same decoded moments."""
    generator = torch.Generator().manual_seed(0)
    parameter, gradient, average = (torch.randn(1000, generator=generator) for _ in range(3))
    square = torch.rand(1000, generator=generator)
    step = AdamStep(7, 1e-3, (0.9, 0.999), 1e-8, 0.1)
    m = average.double() * 0.9 + 0.1 * gradient.double()
    v = square.double() * 0.999 + 0.001 * gradient.double() ** 2
    wanted = parameter.double() * (1 - 1e-4) - 1e-3 / (1 - 0.9**7) * m / (v.sqrt() / (1 - 0.999**7) ** 0.5 + 1e-8)
    step.update(parameter, gradient, average, square)
    torch.testing.assert_close(average.double(), m, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(square.double(), v, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(parameter.double(), wanted, rtol=1e-6, atol=1e-7)


needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the tensors are on the CPU")


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_trains_as_the_plain_arithmetic(dtype, monkeypatch):
    """Paged, so that tensors are split; groups with and without weight decay; steps without some gradients. The plain root is
    rounded correctly, as the kernel's."""
    shapes = [(33, 47), (1,), (128, 65), (300,), (64, 64), (0, 4), (4099,)]
    ours, theirs = _parameters(dtype, shapes), _parameters(dtype, shapes)
    kernel = PagedAdamW(_groups(ours), EightBit(), Paging(3 * PAGE), page_bytes=PAGE)
    plain = PagedAdamW(_groups(theirs), EightBit(), None)
    with ops.use_backend("triton"):
        _train(kernel, ours, 3)
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).float())
    with ops.use_backend("reference"):
        _train(plain, theirs, 3)
    assert _same(ours, theirs)
    found, wanted = _states(kernel, ours), _states(plain, theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    kernel.close()


@needs_interpreter
def test_a_step_on_cuda_is_one_launch_for_the_tensors_of_a_kind(monkeypatch):
    """CUDA's pages and kernel on the CPU; LoRA+ has groups of two rates. Launches are counted, not made."""
    launched = []

    class Counted:
        def __getitem__(self, programs):
            return lambda *arguments, **constants: launched.append((programs, arguments[1], constants["ENCODED"]))

    parameters = _parameters(shapes=[(64, 65), (513, 16), (300,), (7, 5), (1025, 4)])
    size = specs.page_bytes
    monkeypatch.setattr(specs, "page_bytes", lambda total, budget, _: size(total, budget, "cuda"))
    monkeypatch.setattr("lownibble.kernels.triton_adamw.adamw", Counted())
    optimizer = make_optimizer("adamw_8bit", parameters, 1e-3, 0.1, fast=parameters[:1], ratio=4.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with ops.use_backend("triton"):
        optimizer.step()
    assert sorted(launched) == [((2,), 2, False), ((3 + 5 + 3,), 3, True)]  # (programs of 2048 elements, tensors, 8 bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_made_ahead_are_torchs_own(dtype):
    ours, theirs = _parameters(dtype), _parameters(dtype)
    ahead, plain = torch.optim.AdamW(_groups(ours), fused=True), torch.optim.AdamW(_groups(theirs), fused=True)
    open_states(ahead)
    planned = state_bytes(ahead).total
    _train(ahead, ours)
    _train(plain, theirs)
    assert _same(ours, theirs)
    assert state_bytes(ahead).total == planned, "no state came in a step"
    for mine, its in zip(ours, theirs, strict=True):
        assert {k: (v.dtype, v.shape) for k, v in ahead.state[mine].items()} == {
            k: (v.dtype, v.shape) for k, v in plain.state[its].items()
        }


class _Own(torch.optim.AdamW):
    """A subclass, which may have states of its own."""


@pytest.mark.parametrize("kind", [lambda groups: torch.optim.AdamW(groups, amsgrad=True), _Own])
def test_other_optimisers_states_are_not_made_ahead(kind):
    ours, theirs = _parameters(), _parameters()
    ahead, plain = kind(_groups(ours)), kind(_groups(theirs))
    open_states(ahead)
    assert not ahead.state
    _train(ahead, ours)
    _train(plain, theirs)
    assert _same(ours, theirs)


def test_steps_are_counted_in_float32_whatever_the_default():
    """In bfloat16 the count would end at 256."""
    parameters = _parameters(shapes=[(64, 64)])
    with default_dtype(torch.bfloat16):
        open_states(optimizer := make_optimizer("adamw", parameters, 1e-3, 0.0))
        steps = [optimizer.state[parameters[0]]["step"], *(kind.new_step(parameters[0]) for kind in (Fused(), EightBit()))]
    assert {step.dtype for step in steps} == {torch.float32}
