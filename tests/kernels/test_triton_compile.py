"""What the interpreter cannot show: that every Triton kernel compiles for a GPU, and which instructions come out. Needs no GPU.

Oracle: the PTX and the machine code's resources. Bits equal the reference's only without contraction (`fma`), without the
approximate division (`div.full`) and with subnormals kept (no `.ftz`). Runs in a process of its own, where triton compiles.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lownibble.kernels import triton_programs as ours

NESTED = {"nested_values": "fp32", "nested_absmax": "fp32", "offset": "fp32"}
PACKED = {"codes": "u8", "values": "fp32", "scale": "u8", "zero": "u8"}
POINTERS = {
    "dequantize_4bit": {"codes": "u8", "absmax": "u8", "values": "fp32", **NESTED, "out": "bf16"},
    "quantize_4bit": {"x": "bf16", "bounds": "fp32", "order": "u8", "codes": "u8", "absmax": "fp32"},
    "quantize_8bit": {"x": "fp32", "lookup": "u8", "codes": "u8", "absmax": "fp32"},
    "dequantize_8bit": {"codes": "u8", "absmax": "fp32", "values": "fp32", "out": "fp32"},
    "gemv_4bit": {"x": "bf16", "codes": "u8", "absmax": "u8", "values": "fp32", **NESTED, "out": "bf16"},
    "dequantize_grouped": {**PACKED, **NESTED, "order": "i32", "out": "bf16"},
    "gemv_grouped": {"x": "bf16", **PACKED, **NESTED, "out": "bf16"},
    "row_scales": {"absmax": "u8", **NESTED, "out": "fp32"},
    "quantize_rows": {"x": "fp32", "column_scale": "fp32", "scale": "fp32"},
    "matmul_8bit": {"codes": "u8", "absmax": "u8", "values": "fp32", **NESTED,
                     "x_scale": "fp32", "row_scale": "fp32", "out": "fp32"},
}
DIVISIBLE = [["tt.divisibility", 16]]

def compiled(name, fusion=False, capability=80, types={}, odd=(), warps=4, **constants):
    kernel, pointers = getattr(ours, name), POINTERS[name] | types
    signature = {n: "constexpr" if n in constants else "*" + pointers[n] if n in pointers else "i32" for n in kernel.arg_names}
    attributes = {(i,): DIVISIBLE for i, n in enumerate(kernel.arg_names) if n not in constants and n not in odd}
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32),
                            options={"enable_fp_fusion": fusion, "num_warps": warps})
    return result.asm["ptx"]

def compiled_8bit(capability, code):
    rows = {"types": {"codes": code}, "capability": capability, "PARTS": 64, "TOP": 127.0 if code == "i8" else 448.0}
    product = {"types": {"x_codes": code}, "capability": capability, "NESTED_BLOCK": 256}
    large, small = {"TS": 128, "BLOCK": 64, "warps": 8}, {"TS": 64, "BLOCK": 32, "warps": 4}
    yield "quantize_rows", compiled("quantize_rows", SCALED=False, **rows)
    yield "quantize_rows of a gradient, ragged", compiled("quantize_rows", SCALED=True, odd=("C", "parts", "n_parts"), **rows)
    for transposed in (False, True):
        word = "transposed" if transposed else "forward"
        yield f"matmul_8bit {word}", compiled("matmul_8bit", TRANSPOSED=transposed, **large, **product)
        yield f"matmul_8bit {word}, ragged", compiled("matmul_8bit", TRANSPOSED=transposed, odd=("T", "N"), **small, **product)

BLOCKS = {"BLOCKS": 64, "BLOCK": 64}
GEMV = {"TS": 4, "NS": 4, "KS": 512, "BLOCK": 64, "NESTED_BLOCK": 256}
GROUPED = {"GROUP": 64, "NESTED_BLOCK": 256, "SIZE": 1024, "K": 4096}
cases = {
    **{f"dequantize_grouped {bits}": compiled("dequantize_grouped", BITS=bits, ZERO=bits < 8, ORDERED=bits == 4, **GROUPED)
       for bits in (2, 3, 4, 8)},
    **{f"gemv_grouped {bits}": compiled("gemv_grouped", BITS=bits, ZERO=bits < 8, TS=4, NS=4, KS=512, GROUP=64, NESTED_BLOCK=256)
       for bits in (3, 8)},
    "dequantize_4bit": compiled("dequantize_4bit", **BLOCKS, NESTED_BLOCK=256),
    "dequantize_4bit fused": compiled("dequantize_4bit", True, **BLOCKS, NESTED_BLOCK=256),
    "dequantize_4bit, one block": compiled("dequantize_4bit", BLOCKS=1, BLOCK=4096, NESTED_BLOCK=0),
    "quantize_4bit": compiled("quantize_4bit", **BLOCKS),
    "quantize_8bit": compiled("quantize_8bit", BLOCKS=16, BLOCK=256),
    "dequantize_8bit": compiled("dequantize_8bit", BLOCKS=16, BLOCK=256),
    "gemv_4bit, whole blocks": compiled("gemv_4bit", **GEMV, WHOLE=True),
    "gemv_4bit": compiled("gemv_4bit", **GEMV, WHOLE=False),
    "row_scales": compiled("row_scales", ROWS=16, BLOCKS=64, BLOCK=64, NESTED_BLOCK=256, TOP=127.0),
}
for capability, code in ((80, "i8"), (90, "i8"), (89, "fp8e4nv"), (90, "fp8e4nv")):
    cases |= {f"{name} {code} {capability}": ptx for name, ptx in compiled_8bit(capability, code)}
words = ("fma.rn.f32", ".ftz", "div.full", "div.rn.f32", "cvt.rn.bf16", "st.global.v4", ".local.",
         "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8",
         "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
         "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.e4m3x2.f16x2", "cvt.rni", "shfl.sync.idx")
print(json.dumps({name: {word: ptx.count(word) for word in words} for name, ptx in cases.items()}))
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """Kernel -> how often each word stands in its PTX, compiled for compute capability 8.0 or the one in its name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_rounds_otherwise_than_the_reference(ptx):
    for name, counts in ptx.items():
        assert counts[".ftz"] == counts["div.full"] == 0, name
        if not name.startswith(("gemv", "matmul_8bit")) and not name.endswith("fused"):
            assert counts["fma.rn.f32"] == 0, name
    assert ptx["dequantize_4bit fused"]["fma.rn.f32"] > 0, "contraction would happen if launches did not forbid it"
    assert ptx["quantize_4bit"]["div.rn.f32"] > 0
    assert ptx["quantize_8bit"]["div.rn.f32"] > 0


def test_bfloat16_is_rounded_to_nearest(ptx):
    grouped = ("dequantize_grouped 2", "dequantize_grouped 3", "dequantize_grouped 8", "gemv_grouped 3")
    for name in ("dequantize_4bit", "dequantize_4bit, one block", "gemv_4bit", "gemv_4bit, whole blocks", *grouped):
        assert ptx[name]["cvt.rn.bf16"] > 0, name


def test_the_product_has_one_multiply_add_an_element(ptx):
    """A tile of 4 x 4 x 512 over 128 threads is 64 multiply-adds; the decoding of constants has none."""
    for name in ("gemv_4bit", "gemv_4bit, whole blocks", "gemv_grouped 3", "gemv_grouped 8"):
        assert ptx[name]["fma.rn.f32"] == 64, name


def test_decoded_weights_are_stored_in_whole_vectors(ptx):
    """4096 bfloat16 values over 128 threads are four stores of 16 bytes; nothing is spilled to local memory."""
    assert ptx["dequantize_4bit"]["st.global.v4"] == ptx["dequantize_4bit, one block"]["st.global.v4"] == 4
    assert all(counts[".local."] == 0 for counts in ptx.values())


UNITS = {
    "i8 80": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "i8 90": "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8",
    "fp8e4nv 89": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "fp8e4nv 90": "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
}


@pytest.mark.parametrize("target", UNITS)
def test_8bit_products_run_on_the_8bit_units(ptx, target):
    """64 terms are two instructions of 32; by the older one a warp makes 16 x 8 of its 16 x 64 at a time, so 8 times as many. The
    other multiply-adds are those of whole parts, one an element of the tile; weights are looked up by exchange within a warp."""
    for word in ("forward", "transposed"):
        for ragged, rows, warps in (("", 128, 8), (", ragged", 64, 4)):
            counts = ptx[f"matmul_8bit {word}{ragged} {target}"]
            assert counts[UNITS[target]] == (2 if target.endswith("90") else 2 * 8)
            assert counts["fma.rn.f32"] == rows * 64 // (warps * 32)
            assert counts["shfl.sync.idx"] >= 64 * 64 // (warps * 32)


def test_float8_is_rounded_from_float32_at_once_from_capability_9_on(ptx):
    for name, counts in ptx.items():
        if "fp8e4nv" in name:
            here, other = ("f32", "f16x2") if name.endswith("90") else ("f16x2", "f32")
            assert counts[f"cvt.rn.satfinite.e4m3x2.{here}"] > 0, name
            assert counts[f"cvt.rn.satfinite.e4m3x2.{other}"] == 0, name
