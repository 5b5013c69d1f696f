"""What the interpreter cannot show: that every Triton kernel compiles for a GPU, and which instructions come out. Needs no GPU.

Oracle: the PTX and the machine code's resources. Bits equal the reference's only without contraction (`fma`), without the
approximate division (`div.full`) and with subnormals kept (no `.ftz`), but for the cross-entropy. Runs in a process of its
own, where triton compiles.
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
    "quantize_rows": {"x": "bf16", "column_scale": "fp32", "scale": "fp32"},
    "decode_8bit": {"codes": "u8", "absmax": "u8", "values": "fp32", **NESTED, "row_scale": "fp32"},
    "cross_entropy": {"logits": "bf16", "labels": "i64", "loss": "fp32"},
    "scale_sums": {"sums": "i32", "row_scale": "fp32", "column_scale": "fp32", "bias": "fp32", "out": "bf16"},
}
DIVISIBLE = [["tt.divisibility", 16]]

def compiled(name, fusion=False, capability=80, types={}, floats=(), odd=(), warps=4, **constants):
    kernel, pointers = getattr(ours, name), POINTERS[name] | types
    plain = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(floats, "fp32")
    signature = {n: "constexpr" if n in constants else "*" + pointers[n] if n in pointers else plain[n] for n in kernel.arg_names}
    attributes = {(i,): DIVISIBLE for i, n in enumerate(kernel.arg_names) if n not in (*constants, *floats, *odd)}
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32),
                            options={"enable_fp_fusion": fusion, "num_warps": warps})
    return result.asm["ptx"]

def compiled_8bit(capability, code):
    rows = {"types": {"codes": code}, "capability": capability, "SIZE": 2048, "TOP": 127.0 if code == "i8" else 448.0}
    weight = {"types": {"out": code}, "capability": capability, "NESTED_BLOCK": 256}
    yield "quantize_rows", compiled("quantize_rows", SCALED=False, **rows)
    yield "quantize_rows of a gradient, ragged", compiled("quantize_rows", SCALED=True, odd=("C",), **rows)
    for transposed, (ROWS, COLUMNS) in {False: (16, 256), True: (64, 64)}.items():
        word = "transposed" if transposed else "rows"
        sizes = {"TRANSPOSED": transposed, "ROWS": ROWS, "COLUMNS": COLUMNS}
        yield f"decode_8bit {word}", compiled("decode_8bit", BLOCK=64, **sizes, **weight)
        yield f"decode_8bit {word}, small blocks", compiled("decode_8bit", BLOCK=32, **sizes, **weight)

BLOCKS = {"BLOCKS": 64, "BLOCK": 64}
GEMV = {"TS": 4, "NS": 4, "KS": 512, "BLOCK": 64, "NESTED_BLOCK": 256}
SCALE, LOSS = {"scale": "fp32"}, {"SIZE": 8192, "warps": 8}
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
    "cross_entropy": compiled("cross_entropy", floats=["scale"], ON_DEVICE=False, GRADIENT=True, **LOSS),
    "cross_entropy, scale on the device": compiled("cross_entropy", types=SCALE, ON_DEVICE=True, GRADIENT=True, **LOSS),
    "cross_entropy, the loss alone": compiled("cross_entropy", floats=["scale"], ON_DEVICE=False, GRADIENT=False, **LOSS),
    "scale_sums": compiled("scale_sums", SCALED=True, BIAS=True, SIZE=2048),
}
for capability, code in ((80, "i8"), (90, "i8"), (89, "fp8e4nv"), (90, "fp8e4nv")):
    cases |= {f"{name} {code} {capability}": ptx for name, ptx in compiled_8bit(capability, code)}
words = ("fma.rn.f32", ".ftz", "div.full", "div.rn.f32", "cvt.rn.bf16", "st.global.v4", ".local.",
         "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.e4m3x2.f16x2", "st.global.v2", "st.global")
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
        assert counts["div.full"] == 0, name
        if name.startswith("cross_entropy"):  # only in the logarithm of a row's sum
            continue
        assert counts[".ftz"] == 0, name
        if not name.startswith("gemv") and not name.endswith("fused"):
            assert counts["fma.rn.f32"] == 0, name
    assert ptx["dequantize_4bit fused"]["fma.rn.f32"] > 0, "contraction would happen if launches did not forbid it"
    assert ptx["quantize_4bit"]["div.rn.f32"] > 0
    assert ptx["quantize_8bit"]["div.rn.f32"] > 0


def test_bfloat16_is_rounded_to_nearest(ptx):
    grouped = ("dequantize_grouped 2", "dequantize_grouped 3", "dequantize_grouped 8", "gemv_grouped 3")
    for name in (
        "dequantize_4bit", "dequantize_4bit, one block", "gemv_4bit", "gemv_4bit, whole blocks", "cross_entropy", *grouped
    ):  # fmt: skip
        assert ptx[name]["cvt.rn.bf16"] > 0, name


def test_the_product_has_one_multiply_add_an_element(ptx):
    """A tile of 4 x 4 x 512 over 128 threads is 64 multiply-adds; the decoding of constants has none."""
    for name in ("gemv_4bit", "gemv_4bit, whole blocks", "gemv_grouped 3", "gemv_grouped 8"):
        assert ptx[name]["fma.rn.f32"] == 64, name


def test_decoded_weights_are_stored_in_whole_vectors(ptx):
    """4096 bfloat16 values over 128 threads are four stores of 16 bytes; nothing is spilled to local memory."""
    assert ptx["dequantize_4bit"]["st.global.v4"] == ptx["dequantize_4bit, one block"]["st.global.v4"] == 4
    assert all(counts[".local."] == 0 for counts in ptx.values())


def test_the_cross_entropy_writes_logits_once_and_in_whole_vectors(ptx):
    """8192 bfloat16 values over 256 threads are four stores of 16 bytes; without a gradient nothing but the loss is stored."""
    assert ptx["cross_entropy"]["st.global.v4"] == ptx["cross_entropy, scale on the device"]["st.global.v4"] == 4
    assert ptx["cross_entropy, the loss alone"]["st.global"] == 1


TARGETS = ["i8 80", "i8 90", "fp8e4nv 89", "fp8e4nv 90"]


@pytest.mark.parametrize("target", TARGETS)
def test_weights_in_8_bits_are_stored_in_vectors(ptx, target):
    """4096 codes over 128 threads are 32 bytes each: two stores of 16 bytes at the best, four of 8 after a transposition."""
    for word in ("rows", "transposed"):
        for blocks in ("", ", small blocks"):
            counts = ptx[f"decode_8bit {word}{blocks} {target}"]
            assert 16 * counts["st.global.v4"] + 8 * counts["st.global.v2"] == 32, (word, blocks, counts)


def test_float8_is_rounded_from_float32_at_once_from_capability_9_on(ptx):
    for name, counts in ptx.items():
        if "fp8e4nv" in name:
            here, other = ("f32", "f16x2") if name.endswith("90") else ("f16x2", "f32")
            assert counts[f"cvt.rn.satfinite.e4m3x2.{here}"] > 0, name
            assert counts[f"cvt.rn.satfinite.e4m3x2.{other}"] == 0, name
