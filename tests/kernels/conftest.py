"""Without a GPU the Triton kernels are tested in Triton's interpreter, which is chosen when triton is imported: here, before a
test imports something that imports it. The variable is taken back at once; child processes of tests are not to inherit it."""

import importlib.util

import pytest
import torch

from lownibble.kernels import ops


def _load_interpreted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        ops.backend("triton")
        importlib.import_module("triton.experimental.gluon")  # the first launch imports it, and it looks at the variable too
    _mend_bfloat16()


def _mend_bfloat16() -> None:
    """triton 3.7's interpreter truncates where it converts float32 to bfloat16; GPUs round to nearest, ties to even, as torch
    does (`test_triton_compile.py` sees the instruction). Its way back is wrong for subnormals."""
    from triton import language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data).view(torch.bfloat16).float().numpy()
        return theirs(data, source, target, rounding)

    interpreter._convert_float = convert


INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETED:
    _load_interpreted()

WORTH_INTERPRETING = {
    "test_4bit_equals_reference": lambda p: p["n"] in (0, 17, 4097) or (p["n"], p["block_size"]) == (32965, 64),
    "test_rounding_to_half_types_equals_torch": lambda p: False,  # the interpreter's rounding is not a GPU's
    "test_bytes_equal_bitsandbytes": lambda p: False,  # the reference's are, and these equal the reference's
    "test_gemv_4bit": lambda p: p["N"] < 100 and (p["K"] < 200 or p["dtype"] == torch.float32),
    "test_4bit_equals_reference_across_threads": lambda p: False,
    "test_large_outputs_equal_reference": lambda p: False,
    "test_gemv_4bit_does_not_depend_on_threads": lambda p: False,
}
"""Test -> which of its cases the interpreter runs (it needs milliseconds a program); a GPU runs all of them."""


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if not INTERPRETED or parameters.get("kernels") != "triton":
            return True
        return WORTH_INTERPRETING.get(item.originalname, lambda p: True)(parameters)

    dropped = [item for item in items if not wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if wanted(item)]
