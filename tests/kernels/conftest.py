"""The backends that the kernel tests run on, and which cases Triton's interpreter runs, where there is no GPU (see
`tests/triton_interpreter.py`)."""

from collections.abc import Iterator

import pytest
import torch
from oracles import running, variants
from triton_interpreter import INTERPRETED

from lownibble.kernels import ops

WORTH_INTERPRETING = {
    "test_4bit_equals_reference": lambda p: p["n"] in (0, 17, 4097) or (p["n"], p["block_size"]) == (32965, 64),
    "test_rounding_to_half_types_equals_torch": lambda p: False,  # the interpreter's rounding is not a GPU's
    "test_bytes_equal_bitsandbytes": lambda p: False,  # the reference's are, and these equal the reference's
    "test_gemv_4bit": lambda p: p["N"] < 100 and (p["K"] < 200 or p["dtype"] == torch.float32),
    "test_4bit_equals_reference_across_threads": lambda p: False,
    "test_large_outputs_equal_reference": lambda p: False,
    "test_gemv_4bit_does_not_depend_on_threads": lambda p: False,
    "test_grouped_equals_reference": lambda p: p["shape"] in ((3, 64), (5, 192), (2, 24)),
    "test_gemv_grouped": lambda p: p["shape"] in ((3, 64), (2, 24)),
    "test_matmul_grouped": lambda p: p["sizes"][0] < 10,
    "test_large_grouped_outputs_equal_reference": lambda p: False,
    "test_gemv_grouped_does_not_depend_on_threads": lambda p: False,
}
"""Test -> which of its cases the interpreter runs (it needs milliseconds a program); a GPU runs all of them."""


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if not INTERPRETED or parameters.get("kernels") != "triton":
            return True
        return WORTH_INTERPRETING.get(item.originalname, lambda p: True)(parameters)

    for item in items:
        if torch.cuda.is_available() and "triton" in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker(pytest.mark.gpu)
    dropped = [item for item in items if not wanted(item)]
    for item in dropped:
        item.left_out = "cases of the Triton kernels that the interpreter does not run; a GPU runs all"
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=variants())
def kernels(request: pytest.FixtureRequest) -> Iterator[ops.Backend]:
    """Each backend; the compiled one once for each instruction set of this machine."""
    with running(request.param) as backend:
        yield backend


@pytest.fixture(params=[variant for variant in variants() if variant in ("cpu-scalar", "triton")])
def unsafe_kernels(request: pytest.FixtureRequest) -> Iterator[ops.Backend]:
    """The backends that work on bare pointers; they check their arguments alike, whatever the device."""
    with running(request.param):
        yield ops.backend(request.param.partition("-")[0])
