"""Kernels for decoding on CUDA are held against plain torch on the user's own card before they are trusted.

The first call of a kernel in each form (sizes, dtypes, device) is computed both ways. Where the kernel fails, or gives something
else, plain torch computes in its place from then on: that is logged once with the reason, told by the server and in decoders'
notes, and calls are counted. Within a CUDA graph nothing can be compared: steps run without a graph first, in the same forms.

An error that ends the process's CUDA context, such as an illegal access, leaves nothing to go on with. Its message says how to
start again: the environment variable `LOWNIBBLE_PLAIN_KERNELS` names kernels that are not to run, separated by commas.

What can go without a kernel: `one_row` and `few_rows` (4-bit products), `attend_slots`, `low_rank_rows`.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lownibble.errors import BackendError, ConfigError
from lownibble.kernels.capture import ALONE

VARIABLE = "LOWNIBBLE_PLAIN_KERNELS"
KERNELS = ("one_row", "few_rows", "attend_slots", "low_rank_rows")

_TOLERANCE = {torch.float32: 5e-3}
"""dtype -> largest difference relative to the largest value, with room for products in TF32; 0.02 in 16 bits, whose roundings
differ by a few thousandths."""

_log = logging.getLogger(__name__)


def _named() -> dict[str, str]:
    """The kernels that the environment variable names.

    Raises:
        ConfigError: there is no kernel of that name.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if unknown := {*names} - {*KERNELS}:
        raise ConfigError(f"{VARIABLE} names '{unknown.pop()}'. Name some of {', '.join(KERNELS)}.")
    return dict.fromkeys(names, f"{VARIABLE} names it")


refused: dict[str, str] = _named()
"""Kernel -> why plain torch computes in its place."""
calls: Counter[str] = Counter()
"""Kernel -> calls that plain torch has computed in its place; a captured one counts once."""
_forms: set[tuple[str, Hashable]] = set()
"""What has been compared."""


def words() -> str:
    """What is refused, for the user, or ''."""
    return "; ".join(f"plain torch in place of the kernel '{kernel}' ({why})" for kernel, why in refused.items())


def trusted(kernel: str, form: Hashable, device: torch.device) -> bool:
    """Whether the kernel is to run without being compared; elsewhere than on CUDA all are (tests do that)."""
    return kernel not in refused and (device.type != "cuda" or (kernel, form) in _forms)


def prove(
    kernel: str, form: Hashable, fast: Callable[[], Tensor], plain: Callable[[], Tensor],
    exact: Callable[[], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`fast()` if it is as `plain()`, or if that cannot be found out here; else `plain()`.

    Args:
        exact: gives what to compare with, of the last rows of the result; default: `plain`.
    Raises:
        BackendError: the kernel has ended the CUDA context.
    """
    if kernel in refused:
        return _instead(kernel, plain)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return fast()
    expected = (exact or plain)().float()
    if isinstance(expected, FakeTensor):  # of a trace
        return plain()
    if not expected.numel():
        return fast()
    try:
        found = fast()
        difference = float((found[-len(expected) :].float() - expected).abs().max())
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
        if is_lost(expected.device):
            raise BackendError(
                f"The kernel '{kernel}' failed ({why}) and has ended this process's CUDA context. Start again with "
                f"{VARIABLE}={','.join([*refused, kernel])}, and report it, please."
            ) from error
        return _refuse(kernel, f"it failed: {why}", plain)
    largest = float(expected.abs().max())
    if not math.isfinite(largest):
        return found  # this says nothing: compare the next call
    if not difference <= _TOLERANCE.get(found.dtype, 0.02) * largest:
        return _refuse(kernel, f"its results differ from torch's by {difference:.0e}, where the largest is {largest:.0e}", plain)
    if largest:  # zeros say nothing, either
        _forms.add((kernel, form))
    return found


def _refuse(kernel: str, why: str, plain: Callable[[], Tensor]) -> Tensor:
    refused[kernel] = why
    _log.warning(
        "The kernel '%s' cannot be used on this device: %s. Plain torch computes in its place, more slowly.", kernel, why
    )
    return _instead(kernel, plain)


def _instead(kernel: str, plain: Callable[[], Tensor]) -> Tensor:
    calls[kernel] += 1
    return plain()


def is_lost(device: torch.device) -> bool:
    """Whether the process's CUDA context has ended, so that nothing can be computed on the device any more."""
    if device.type != "cuda":
        return False
    try:
        with ALONE:
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
