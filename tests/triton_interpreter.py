"""Without a GPU the Triton kernels are tested in Triton's interpreter, which is chosen when triton is imported: here, before
`conftest.py` imports anything that imports it. The variable is taken back at once:
child processes of tests are not to inherit it."""

import importlib.util

import pytest
import torch

from lownibble.kernels import ops


def _load_interpreted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        ops.backend("triton")
        importlib.import_module("triton.experimental.gluon")  # the first launch imports it, and it looks at the variable too
    _mend_conversions()


def _mend_conversions() -> None:
    """triton 3.7's interpreter truncates where it converts float32 to bfloat16; GPUs round to nearest, ties to even, as torch
    does (`test_triton_compile.py` sees the instructions). Its way back is wrong for subnormals. To float8 (e4m3) it rounds ties
    away, loses what is carried into the exponent, and is wrong for subnormals; GPUs round as torch does, and saturate. Its
    products of bfloat16 tiles take the bits for integers."""
    from triton import language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data).view(torch.bfloat16).float().numpy()
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return theirs(data, source, target, rounding)

    interpreter._convert_float = convert
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    their_dot = builder.create_dot

    def dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(convert(each.data, tl.bfloat16, tl.float32, None), tl.float32) for each in (a, b))
        return their_dot(self, a, b, *rest)

    builder.create_dot = dot


INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETED:
    _load_interpreted()
