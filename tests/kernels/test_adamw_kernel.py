"""The 8-bit AdamW operation: many tensors in one launch of the Triton kernel, and what comes out of its compiler.

Oracle: the plain arithmetic, bit for bit, with a square root that is rounded correctly. torch's on a CPU may be
one unit in the last place off (docs/log.md); that reaches parameters only, which are then as near as it leaves them.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from oracles import running, variants

from lownibble.errors import InputError
from lownibble.kernels import ops
from lownibble.kernels.adamw import AdamPart, AdamStep, Moments
from lownibble.optim.eight_bit import BLOCK, code_maps

needs_triton = pytest.mark.skipif(ops.backend_status()["triton"] != "ok", reason="no Triton kernels here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of the Triton kernel; on a CPU it runs in Triton's interpreter."""
SIZES = (4096, 5000, 4097, 1, 300, 2048, 0, 4099, 8191)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _parts(dtype, seed=0):
    """Tensors of odd sizes, two of each step and rate; large ones have codes, one with a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index, n in enumerate(SIZES):
        step = AdamStep(1 + index // 2, 1e-3 * (1 + index // 2), (0.9, 0.999), 1e-8, 0.1 * (index % 2))
        parameter = torch.randn(n, generator=generator).to(dtype)
        gradient = (torch.randn(n, generator=generator) ** 3).to(dtype)
        if n < 4096:
            moments, absmax = (torch.randn(n, generator=generator), torch.rand(n, generator=generator)), None
        else:
            codes = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for _ in range(2)]
            sizes = [torch.rand(-(-n // BLOCK), generator=generator) * size for size in (1, 1e-3)]
            sizes[0][0] = sizes[1][0] = 0
            gradient[:BLOCK] = 0
            moments, absmax = (codes[0], codes[1]), (sizes[0], sizes[1])
        parts.append(AdamPart(step, parameter, gradient, Moments(moments, absmax, BLOCK)))
    return parts


def _tensors(part):
    return [part.parameter, part.gradient, *part.moments.values, *(part.moments.absmax or ())]


def _to(device, part):
    """A copy."""
    parameter, gradient, *moments = (tensor.to(device, copy=True) for tensor in _tensors(part))
    absmax = tuple(moments[2:]) or None
    return AdamPart(part.step, parameter, gradient, Moments(tuple(moments[:2]), absmax, part.moments.block_size))


def _after(variant, parts, found_inf=None):
    """All tensors after a step on a copy."""
    device = DEVICE if variant == "triton" else "cpu"
    parts = [_to(device, part) for part in parts]
    with running(variant):
        kernels = ops.backend(variant.partition("-")[0])
        kernels.adamw_8bit(parts, code_maps(device), None if found_inf is None else found_inf.to(device))
    return [tensor.cpu() for part in parts for tensor in _tensors(part)]


def _equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.fixture
def exact_root(monkeypatch):
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).float())  # 53 bits are enough to round once


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_equals_the_plain_arithmetic(dtype, exact_root):
    parts = _parts(dtype)
    ours, theirs = _after("triton", parts), _after("reference", parts)
    assert all(value.isfinite().all() for value in theirs)
    assert _equal(ours, theirs)
    assert not _equal(ours, [tensor for part in parts for tensor in _tensors(part)])


@needs_triton
def test_only_parameters_depend_on_the_root():
    """Tolerance: the root and four operations after it, each one unit off, and one rounding of the parameter."""
    parts = _parts(torch.float32)
    ours, theirs = iter(_after("triton", parts)), iter(_after("reference", parts))
    for part in parts:
        mine, its = next(ours), next(theirs)
        allowed = 2.0**-23 * (5 * (its - part.parameter).abs() + 2 * its.abs())
        assert bool(((mine - its).abs() <= allowed).all())
        assert all(torch.equal(next(ours), next(theirs)) for _ in range(len(_tensors(part)) - 1))


@pytest.mark.parametrize("variant", [variant for variant in variants() if variant.startswith("cpu")])
def test_the_compiled_decoder_changes_no_bits(variant):
    parts = _parts(torch.float32)
    assert _equal(_after(variant, parts), _after("reference", parts))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_found_inf_leaves_every_bit(backend):
    parts = _parts(torch.bfloat16)
    assert _equal(_after(backend, parts, torch.ones(())), [tensor for part in parts for tensor in _tensors(part)])
    assert _equal(_after(backend, parts, torch.zeros(())), _after(backend, parts))


@needs_triton
def test_what_is_not_finite_stays_in_its_place():
    """A NaN and an infinite gradient: the other tensors are as without, and codes are bytes whatever they come from."""
    clean, dirty = _parts(torch.float32), _parts(torch.float32)
    dirty[1].gradient[7], dirty[4].gradient[3] = torch.nan, torch.inf
    ours, theirs = _after("triton", dirty), _after("triton", clean)
    owner = [index for index, part in enumerate(clean) for _ in _tensors(part)]
    assert all(torch.equal(a, b) for a, b, of in zip(ours, theirs, owner, strict=True) if of not in (1, 4))


@needs_triton
@pytest.mark.parametrize(
    ("change", "role"),
    [
        ({"gradient": torch.zeros(5)}, "gradient"), ({"gradient": torch.zeros(4096).bfloat16()}, "gradient"),
        ({"parameter": torch.zeros(4096).double(), "gradient": torch.zeros(4096).double()}, "parameter"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_tensors_are_refused(change, role):
    part = _to(DEVICE, _parts(torch.float32)[0]._replace(**change))
    with ops.use_backend("triton"), pytest.raises(InputError, match=role):
        ops.adamw_8bit([part], code_maps(DEVICE))


@needs_triton
def test_moments_of_other_blocks_are_refused():
    parts = [_to(DEVICE, part) for part in _parts(torch.float32)[3:5]]
    parts[1] = parts[1]._replace(moments=Moments(parts[1].moments.values, None, 64))
    with ops.use_backend("triton"), pytest.raises(InputError, match="one size"):
        ops.adamw_8bit(parts, code_maps(DEVICE))


def test_moments_that_do_not_fit_are_refused():
    values, codes = (torch.zeros(300),) * 2, (torch.zeros(300, dtype=torch.uint8),) * 2
    for wrong in (
        (values, (torch.zeros(2),) * 2),
        (codes, None),
        (codes, (torch.zeros(1),) * 2),
        ((values[0], torch.zeros(299)), None),
    ):
        with pytest.raises(InputError, match=r"moments|absmax"):
            Moments(*wrong, BLOCK)


COMPILE = """
import json
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lownibble.kernels import triton_adamw as ours

BOOKS = dict.fromkeys(("found_inf", "values1", "bounds1", "values2", "bounds2"), "*fp32")
kernel, found = ours.adamw, {}
for dtype in (tl.float32, tl.bfloat16):
    for encoded in (False, True):
        constants = {"WIDTH": 9 if encoded else 7, "DTYPE": dtype, "ENCODED": encoded, "SKIPS": True, "BLOCKS": 8, "BLOCK": 256}
        types = {"table": "*i64", **BOOKS}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in types}
        made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 80, 32),
                              options={"enable_fp_fusion": False, "num_warps": ours.WARPS})
        words = ("fma.rn.f32", ".ftz", "div.full", "sqrt.approx", "div.rn.f32", "sqrt.rn.f32", "cvt.rn.bf16", ".local.")
        found[f"{dtype} {encoded}"] = {word: made.asm["ptx"].count(word) for word in words}
print(json.dumps(found))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_the_compiled_kernel_rounds_as_the_reference(tmp_path):
    """2048 elements over 256 threads: eight square roots; one division by the corrected root and one by the divisor each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, counts in json.loads(done.stdout).items():
        assert all(counts[word] == 0 for word in ("fma.rn.f32", ".ftz", "div.full", "sqrt.approx", ".local.")), (name, counts)
        assert counts["sqrt.rn.f32"] == 8, name
        assert counts["div.rn.f32"] >= 16, name
        assert (counts["cvt.rn.bf16"] > 0) == name.startswith("bf16"), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_the_gpu_does_not_wait_for_it():
    parts = [_to("cuda", part) for part in _parts(torch.float32)]
    books, found_inf = code_maps("cuda"), torch.zeros((), device="cuda")
    ops.adamw_8bit(parts, books, found_inf)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.adamw_8bit(parts, books, found_inf)
    finally:
        torch.cuda.set_sync_debug_mode(before)
