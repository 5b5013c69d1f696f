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
from importlib.metadata import version

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lownibble.kernels import triton_decode, triton_experts, triton_few, triton_programs

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
    "experts_product": {**dict.fromkeys(("x", "low", "factor", "out"), "bf16"), "ends": "i32", "weight": "u8", "values": "fp32",
                        "scale": "u8", "zero": "u8", **NESTED},
    "one_row": {"x": "bf16", "words": "i32", **PACKED, **NESTED, "out": "bf16"},
    "few_rows": {"x": "bf16", "words": "i32", **PACKED, **NESTED, "out": "fp32"},
    "add_parts": {"parts": "fp32", "out": "bf16"},
    "attend_part": {**dict.fromkeys(("q", "keys", "values"), "bf16"), **dict.fromkeys(("slots", "positions"), "i64"),
                    **dict.fromkeys(("sums", "largest", "out"), "fp32")},
    "attend_whole": {**dict.fromkeys(("sums", "largest", "parts"), "fp32"), "sinks": "bf16", "out": "bf16"},
    "shrink": {"x": "bf16", "index": "i64", "pointers": "i64", "ranks": "i32", "low": "fp32"},
    "expand": {"low": "fp32", "index": "i64", "pointers": "i64", "ranks": "i32", "scales": "fp32", "out": "bf16"},
    "experts_outer": {"a": "bf16", "b": "bf16", "ends": "i32", "out": "fp32"},
}
DIVISIBLE = [["tt.divisibility", 16]]

def compiled(name, fusion=False, capability=80, types={}, floats=(), odd=(), warps=4, stages=3, **constants):
    modules = triton_programs, triton_experts, triton_few, triton_decode
    kernel, pointers = next(found for module in modules if (found := getattr(module, name, None))), POINTERS[name] | types
    plain = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(floats, "fp32")
    signature = {n: "constexpr" if n in constants else "*" + pointers[n] if n in pointers else plain[n] for n in kernel.arg_names}
    attributes = {(i,): DIVISIBLE for i, n in enumerate(kernel.arg_names) if n not in (*constants, *floats, *odd)}
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32),
                            options={"enable_fp_fusion": fusion, "num_warps": warps, "num_stages": stages})
    shared = result.metadata.shared
    assert shared <= 99 * 1024, f"{name} takes {shared} bytes of shared memory; capability 8.6 has 99 KiB a program"
    return result.asm["ptx"]

def compiled_experts(capability):
    whole = {"BITS": 4, "GROUP": 64, "ZERO": False, "NESTED_BLOCK": 256, "WHOLE": True}
    dense = whole | {"BITS": 0, "GROUP": 1, "NESTED_BLOCK": 0, "WHOLE": False}
    float32 = dict.fromkeys(("x", "low", "out", "factor"), "fp32")
    for label, how, types, large in (
        ("nf4", whole, {}, True), ("mxfp4", whole | {"GROUP": 32, "NESTED_BLOCK": 4096}, {}, True),
        ("blocks over row ends", whole | {"WHOLE": False}, {}, False), ("float32", whole, float32, False),
        ("int3", whole | {"BITS": 3, "ZERO": True}, {}, False), ("int8", whole | {"BITS": 8}, {}, False),
        ("dense", dense, {"weight": "bf16"}, True),
        ("dense, wider", dense, {"weight": "fp32"}, False),
    ):
        most_rows, COLUMNS, TERMS = triton_experts.LARGEST[large]
        for transposed in (False, True) if label in ("nf4", "dense") else (False,):
            for rows in (16, most_rows) if label == "nf4" else (most_rows,):
                yield f"experts_product {label}{' transposed' * transposed} {rows}", compiled(
                    "experts_product", floats=["alpha"], odd=["S", "E"], types=types, capability=capability, ROWS=rows,
                    warps=8 if rows * COLUMNS > 8192 else 4, TRANSPOSED=transposed, EXPERTS=256, COLUMNS=COLUMNS, TERMS=TERMS,
                    RANKS=16, **how)
    for dtype, rows in (("bf16", 64), ("fp32", 32)):
        types = {"a": dtype, "b": dtype}
        yield f"experts_outer {dtype}", compiled("experts_outer", floats=["alpha"], odd=["S", "E"], types=types,
                                                 capability=capability, PS=64, QS=64, ROWS=rows)

def compiled_decoding(capability):
    how, few = triton_few.ONE_ROW, triton_few.FEW_ROWS
    newest = capability == 90
    for label, zero, group in (("nf4", False, 64), ("int4", True, 128))[: 1 + newest]:
        codec = {"GROUP": group, "ZERO": zero, "NESTED_BLOCK": 256, "capability": capability, "fusion": True}
        yield f"one_row {label}", compiled("one_row", ROWS=how.rows, CHUNKS=how.chunks, STAGES=how.stages, warps=how.warps,
                                           **codec)
        for rows in (16, 64)[: 1 + newest]:
            yield f"few_rows {label} {rows}", compiled("few_rows", odd=["T"], TS=rows, ROWS=few.rows, WORDS=few.words,
                                                       STAGES=few.stages, warps=few.warps, **codec)
    yield "add_parts", compiled("add_parts", PARTS=4, SIZE=triton_few.ADDED, capability=capability)
    for label, D, group, window, capped in (("128", 128, 4, 0, False), ("256, a window, a cap", 256, 1, 512, True))[: 1 + newest]:
        yield f"attend_part {label}", compiled(
            "attend_part", floats=["scaling", "softcap"], odd=["C"], KEY_HEADS=8, GROUP=group, D=D, DV=D, DS=D, DVS=D, HEADS=16,
            KEYS_AT_ONCE=triton_decode.keys_at_once(D, D, 2), PARTS=32, WINDOW=window, CAPPED=capped, warps=triton_decode.WARPS,
            stages=triton_decode.STAGES, fusion=True, capability=capability)
    yield "attend_whole", compiled("attend_whole", H=32, DV=128, DVS=128, PARTS=32, SINKS=True, capability=capability)
    sizes = {"R": 16, "capability": capability, "fusion": True, "odd": ["linear", "linears"]}
    yield "shrink", compiled("shrink", RANKS=triton_decode.SHRINK_RANKS, TERMS=triton_decode.SHRINK_TERMS, ALIGNED=True, **sizes)
    yield "expand", compiled("expand", OUTPUTS=triton_decode.EXPAND_OUTPUTS, **sizes)

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
for capability in (80, 90):
    cases |= {f"{name} {capability}": ptx for name, ptx in compiled_experts(capability)}
    cases |= {f"{name} {capability}": ptx for name, ptx in compiled_decoding(capability)}
words = ("mma.sync", "wgmma.mma_async", "fma.rn.f32", ".ftz", "div.full", "div.rn.f32", "cvt.rn.bf16", "st.global.v4", ".local.",
         "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.e4m3x2.f16x2", "st.global.v2", "st.global", "cp.async.c",
         "ld.global.v4.b32", "ld.global.b8", "ld.global.u8", ", 0x10, ", "mul.f32")
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


DECODING = ("one_row", "few_rows", "attend", "shrink", "expand")


def test_no_kernel_rounds_otherwise_than_the_reference(ptx):
    for name, counts in ptx.items():
        assert counts["div.full"] == 0, name
        if name.startswith(("cross_entropy", *DECODING)):  # a row's logarithm, and sums that are of tensor cores or contracted
            continue
        assert counts[".ftz"] == 0, name
        in_float32 = "experts" in name and ("float32" in name or "fp32" in name)  # multiply-adds are the product itself
        if not name.startswith("gemv") and not name.endswith("fused") and not in_float32:
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
    """At capability 8.9, too, since triton 3.9, which knows that it can; before, through float16."""
    at_once = ("90", "89") if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else ("90",)
    for name, counts in ptx.items():
        if "fp8e4nv" in name:
            here, other = ("f32", "f16x2") if name.endswith(at_once) else ("f16x2", "f32")
            assert counts[f"cvt.rn.satfinite.e4m3x2.{here}"] > 0, name
            assert counts[f"cvt.rn.satfinite.e4m3x2.{other}"] == 0, name


def test_products_of_experts_are_the_tensor_cores_but_for_float32(ptx):
    names = [name for name in ptx if name.startswith("experts")]
    assert len(names) == 2 * (4 + 2 + 6 + 2)
    for name in names:
        counts, is_float32 = ptx[name], "float32" in name or "fp32" in name
        assert (counts["mma.sync"] + counts["wgmma.mma_async"] > 0) != is_float32, name
        assert (counts["fma.rn.f32"] > 0) == is_float32, name
        if name.endswith("128 90"):
            assert counts["mma.sync"] == 0, f"{name}: capability 9 has units of its own"


def test_values_are_looked_up_in_shared_memory_not_copied_one_by_one(ptx):
    """A tile of 128 x 64 codes of 4 bits over 128 threads is 64 values each; codes and x come in asynchronous copies."""
    for capability in (80, 90):
        assert 0 < ptx[f"experts_product nf4 16 {capability}"]["cp.async.c"] < 64


@pytest.mark.parametrize("capability", [80, 90])
def test_steps_of_a_token_read_in_whole_vectors(ptx, capability):
    """Codes are copied to shared memory by 16 bytes, and one row is a multiplication for each: a program's 4 x 64 runs of 32 over
    64 threads are 128. All add to a sum at once; since triton 3.8, which sums in pairs, every other one does. Keys, values and
    both low-rank matrices come in 16 bytes, too."""
    newest = capability == 90
    for label in ("nf4", "int4")[: 1 + newest]:
        one = ptx[f"one_row {label} {capability}"]
        assert one[", 0x10, "] >= 4
        assert 128 <= one["fma.rn.f32"] + one["mul.f32"] <= 136, "and those of the constants"
        assert one["fma.rn.f32"] >= 64
        for rows in (16, 64)[: 1 + newest]:
            few = ptx[f"few_rows {label} {rows} {capability}"]
            assert few["wgmma.mma_async" if capability == 90 else "mma.sync"] > 0
            assert few[", 0x10, "] > 0
    for label in ("128", "256, a window, a cap")[: 1 + newest]:
        part = ptx[f"attend_part {label} {capability}"]
        assert part["mma.sync"] > 0
        assert part[", 0x10, "] + part["ld.global.v4.b32"] > 0
    assert ptx[f"shrink {capability}"]["ld.global.v4.b32"] == 2 + 1, "2048 values of A over 128 threads, and x"
    assert ptx[f"expand {capability}"]["ld.global.v4.b32"] >= 2 + 1, "2048 values of B, and low"
