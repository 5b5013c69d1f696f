"""Checks of `bench contact`: the kernels of CUDA devices and the optimisers, each against the plain reference.

Sizes are small, and odd where the kernels take that. Bytes that tests hold to be the reference's (decoded weights, codes, moments
in 8 bits) must be equal here too; sums are taken in another order, and have a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lownibble.config import QuantConfig
from lownibble.errors import LownibbleError
from lownibble.kernels import ops, plain, proven, reference
from lownibble.kernels import rows as plain_rows
from lownibble.kernels.decoder import LowRank
from lownibble.kernels.rows import RANK_STEP, Attending, RowAdapters
from lownibble.kernels.types import IGNORED, LARGEST_CODE, NO_EPILOGUE, Epilogue, Stack
from lownibble.optim import close_states, make_optimizer, open_states, state_bytes
from lownibble.quant import eightbit, layouts
from lownibble.quant.codebook import codebook, dynamic8, dynamic8_lookup
from lownibble.quant.codecs import quantize, quantize_experts
from lownibble.quant.packed import PackedExperts

SUMS, SUMS_16 = 1e-4, 0.02
"""Largest difference of sums in another order, of the largest value: in float32, and with roundings to 16 bits."""


class WrongError(LownibbleError, RuntimeError):
    """What was computed is not what the reference computes."""


class SkippedError(LownibbleError):
    """A check cannot run here; the message is the reason."""


@dataclass
class Contact:
    """Where a check runs, and what it has found.

    Attributes:
        device: CUDA, or a CPU as a stand-in. folder: for files, shared by all checks.
        difference: the largest one so far, as a share of the largest value compared. notes: facts for the record.
    """

    device: torch.device
    folder: Path
    difference: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        """Whether this is no stand-in."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type: Triton's interpreter does not round to bfloat16 as GPUs do."""
        return torch.bfloat16 if self.on_cuda else torch.float16

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values, the same on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def near(self, what: str, found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
        """Compare with the reference; `tolerance` is a share of its largest value.

        Raises:
            WrongError: they differ by more, or in shape.
        """
        if found.shape != expected.shape:
            raise WrongError(f"{what}: its shape is {tuple(found.shape)}, and the reference's {tuple(expected.shape)}.")
        ours, theirs = found.detach().cpu().double(), expected.detach().cpu().double()
        difference = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-30)
        self.difference = max(self.difference, difference)
        if not difference <= tolerance:  # NaN, too
            raise WrongError(f"{what}: differs by {difference:.1e} of the largest value, where {tolerance:.0e} is allowed.")

    def true(self, what: str, holds: bool) -> None:
        """Require what does not come down to a difference.

        Raises:
            WrongError: it does not hold.
        """
        if not holds:
            raise WrongError(f"{what}: it is not so.")


def codec(quant_type: str, at: Contact) -> None:
    """A packed weight: decoding, products of many rows forward (with bias and low-rank branch) and backward, and of few rows."""
    size = 32 if quant_type == "mxfp4" else 64
    for double_quant in (True, False) if quant_type in ("nf4", "int4") else (True,):
        _packed(QuantConfig(quant_type=quant_type, block_size=size, double_quant=double_quant), at)


def _packed(config: QuantConfig, at: Contact) -> None:
    N, K = 80, 256
    with ops.use_backend("reference"):
        here = quantize(at.random(N, K).cpu(), config, statistics=torch.rand(K) if config.quant_type.endswith("_act") else None)
        dense = here.dequantize(torch.float32).to(at.device)
    packed = here.to(at.device)
    at.near("decoded in float32", packed.dequantize(torch.float32), dense)
    at.near(f"decoded in {at.half}", packed.dequantize(at.half), dense.to(at.half), 0.0 if at.on_cuda else 2.0**-10)
    x, dy, low = (at.random(70, n, seed=n, dtype=at.half) for n in (K, N, 8))
    bias, factor = at.random(N, seed=1), at.random(8, N, seed=2)
    y = packed.matmul(x, epilogue=Epilogue(bias, low, factor, 0.5))
    at.near("a product", y, x.float() @ dense.t() + bias + 0.5 * low.float() @ factor, SUMS_16)
    at.near("a product backward", packed.matmul(dy, transposed=True), dy.float() @ dense, SUMS_16)
    at.near("a product of a row in float32", packed.matvec(x[:1].float()), x[:1].float() @ dense.t(), SUMS)
    for rows in (1, 3, 17):
        at.near(f"a product of {rows} rows", packed.matvec(x[:rows].contiguous()), x[:rows].float() @ dense.t(), SUMS_16)


def quantise(at: Contact) -> None:
    """Codes and constants of weights in 4 bits and of blocks in 8 bits, and back."""
    x = at.random(33, 192)
    for quant_type in ("nf4", "fp4"):
        table = codebook(quant_type)
        for dtype in (torch.float32, at.half):
            given = x.to(dtype).view(-1), table.bounds, table.order, 64
            _bytes(at, f"{quant_type} of {dtype}", "quantize_4bit", given)
    given_8bit = x.view(-1).cpu(), dynamic8_lookup(), 256
    _bytes(at, "blocks in 8 bits", "quantize_8bit", given_8bit)
    codes, absmax = reference.quantize_8bit(*given_8bit)
    _bytes(at, "blocks from 8 bits", "dequantize_8bit", (codes, absmax, dynamic8(), 256))


def _moved(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _bytes(at: Contact, what: str, operation: str, given: tuple[Any, ...]) -> None:
    """The results of an operation are those of the reference on the host, byte for byte."""
    there, here = (tree_map(partial(_moved, device), given) for device in (at.device, torch.device("cpu")))
    ours, theirs = getattr(ops, operation)(*there), getattr(reference, operation)(*here)
    for number, (one, other) in enumerate(zip(tree_leaves(ours), tree_leaves(theirs), strict=True)):
        at.near(f"{what}, result {number}", one, other)


def rows_8bit(at: Contact) -> None:
    """Rows quantised to 8 bits, as they are and scaled by column."""
    x, scale = at.random(13, 192), at.random(192, seed=1).abs()
    for code_type in LARGEST_CODE if at.on_cuda else (torch.int8,):  # the interpreter's float8 is not a GPU's
        for by in (None, scale):
            ours = ops.quantize_rows(x, by, code_type)
            theirs = reference.quantize_rows(x.cpu(), None if by is None else by.cpu(), code_type, None)
            at.near(f"codes in {code_type}", ours.codes.float(), theirs.codes.float())
            at.near(f"scales in {code_type}", ours.scale, theirs.scale)


def product_8bit(compute: str, at: Contact) -> None:
    """The vendor library's products in 8 bits, forward and backward, with a low-rank branch."""
    code_type = eightbit.CODE_TYPES[compute]
    if not at.on_cuda and code_type.is_floating_point:
        raise SkippedError("the interpreter's float8 is not a GPU's")
    if at.on_cuda:
        try:
            eightbit.choose(compute, at.device)
        except LownibbleError as error:
            raise SkippedError(str(error)) from error
    T, N, K = 100, 80, 192
    with ops.use_backend("reference"):
        here = quantize(at.random(N, K).cpu(), QuantConfig())
    weight = here.to(at.device).four_bit
    assert weight is not None
    scale = ops.row_scales(weight, code_type)
    assert here.four_bit is not None
    expected = reference.row_scales(here.four_bit, code_type)  # on the CPU: CUDA divides by a number as by its rounded reciprocal
    at.near("scales of the weight", scale, expected.to(at.device))
    for transposed in (False, True):
        columns, terms = (K, N) if transposed else (N, K)
        x, low, factor = at.random(T, terms), at.random(T, 8, seed=1), at.random(8, columns, seed=2)
        by, bias = (scale, None) if transposed else (None, at.random(N, seed=3))
        epilogue = Epilogue(bias, low, factor, 0.5)
        y = ops.matmul_8bit(ops.quantize_rows(x, by, code_type), weight, scale, transposed, epilogue)
        rows = reference.quantize_rows(x, by, code_type, None)
        expected = reference.matmul_8bit(rows, weight, scale, transposed, epilogue)
        at.near("backward" if transposed else "forward", y, expected, 2.0**-7 if code_type.is_floating_point else SUMS)


def low_rank_gradients(at: Contact) -> None:
    """Gradients of a low-rank branch from 16-bit operands: in float32, and not rounded to 16 bits before."""
    T, N, K, r = 300, 144, 1104, 16
    dy, x, low, lora_B = (at.random(*shape, seed=n, dtype=at.half) for n, shape in enumerate(((T, N), (T, K), (T, r), (N, r))))
    dlow, dA, dB = ops.low_rank_backward(dy, x, low, lora_B, 0.5)
    at.true("gradients of the factors are in float32", (dA.dtype, dB.dtype) == (torch.float32, torch.float32))
    tolerance = SUMS if at.on_cuda else SUMS_16  # a CPU's own 16-bit products are rounded
    at.near("of the rows", dlow, 0.5 * (dy.double() @ lora_B.double()), SUMS_16)
    at.near("of A", dA, dlow.double().t() @ x.double(), tolerance)
    at.near("of B", dB, 0.5 * (dy.double().t() @ low.double()), tolerance)


def low_rank_rows(at: Contact) -> None:
    """Branches of several adapters in one batch: rows without one, unlike ranks, an adapter without a branch here."""
    K, N = 1100, 150
    for dtype in (torch.float32, at.half):
        one, two = (
            LowRank(at.random(r, K, seed=r, dtype=dtype) / 30, at.random(N, r, seed=r + 1, dtype=dtype), 0.5 * r)
            for r in (16, 32)
        )
        held = [[one, None], [two, None], [None, one]]
        pointers = [[[b.A.data_ptr(), b.B.data_ptr()] if b else [0, 0] for b in of] for of in held]
        ranks = torch.tensor([[len(b.A) // RANK_STEP if b else 0 for b in of] for of in held], dtype=torch.int32)
        scales = torch.tensor([[b.scale if b else 0.0 for b in of] for of in held])
        addresses, ranks, scales = (each.to(at.device) for each in (torch.tensor(pointers), ranks, scales))
        x, y = at.random(5, K, seed=5, dtype=dtype), at.random(5, N, seed=6, dtype=dtype)
        for places in ([1, 0, -1, 2, 1], [0] * 5, [-1] * 5):
            step = RowAdapters(
                torch.tensor(places, device=at.device), addresses, ranks, scales, 32, dtype, frozenset((0, 1)), held
            )
            ours, theirs = y.clone(), y.float()
            ops.add_low_rank_rows(ours, x, step, 0)
            branches = [[b and LowRank(b.A.float(), b.B.float(), b.scale) for b in of] for of in held]
            plain_rows.add_low_rank_rows(theirs, x.float(), step._replace(branches=branches), 0)
            at.near(f"rows of {places} in {dtype}", ours, theirs, SUMS if dtype == torch.float32 else SUMS_16)


ATTENDING = {"plain": Attending(), "a window": Attending(window=70), "a cap": Attending(softcap=0.7)}


def attention_slots(at: Contact) -> None:
    """Attention of one token of each row over its slot: of one token, of a block, over several parts; windows, caps, sinks."""
    slots, positions = (torch.tensor(each, device=at.device) for each in ([3, 0, 2], [0, 63, 291]))
    sinks = {"sinks": Attending(sinks=at.random(4, seed=9))}
    for dtype in (torch.float32, at.half):
        q, keys, values = at.random(3, 4, 64, dtype=dtype), *(at.random(4, 2, 300, 64, seed=n, dtype=dtype) for n in (1, 2))
        for name, how in {**ATTENDING, **sinks}.items():
            ours = ops.attend_slots(q, keys, values, slots, positions, how)
            theirs = plain_rows.attend_slots(q.float(), keys.float(), values.float(), slots, positions, how)
            at.near(f"{name} in {dtype}", ours, theirs, SUMS if dtype == torch.float32 else SUMS_16)


def experts(quant_type: str, at: Contact) -> None:
    """Products of all experts at once, forward and backward, with their low-rank branches; sums over the rows of each."""
    E, N, K, S = 4, 40, 128, 22
    dense = at.random(E, N, K).cpu()
    stack: Stack | None = dense.to(at.device, at.half)
    if quant_type != "dense":
        with ops.use_backend("reference"):
            packed = quantize_experts(dense, QuantConfig(quant_type=quant_type, block_size=32)).to(at.device)
        stack = packed.stack if isinstance(packed, PackedExperts) else None
    assert stack is not None
    ends = torch.tensor([0, 5, 5, S], dtype=torch.int32, device=at.device)
    for transposed in (False, True):
        columns, terms = (K, N) if transposed else (N, K)
        x, low = at.random(S, terms, dtype=at.half), at.random(S, 8, seed=1, dtype=at.half)
        for epilogue in (NO_EPILOGUE, Epilogue(None, low, at.random(E, 8, columns, seed=2), 0.5)):
            given = x, stack, ends, transposed, epilogue
            ours = ops.matmul_experts(*given)
            with ops.use_backend("reference"):
                at.near("backward" if transposed else "forward", ours, ops.matmul_experts(*given), SUMS_16)
    given_sums = at.random(S, 7, dtype=at.half), at.random(S, 70, seed=1, dtype=at.half), ends, 0.5
    ours = ops.outer_experts(*given_sums, torch.float32)
    with ops.use_backend("reference"):
        at.near("sums over rows", ours, ops.outer_experts(*given_sums, torch.float32), SUMS_16)


def cross_entropy(at: Contact) -> None:
    """The loss of each row and the gradient of its logits, over more than one tile of a vocabulary."""
    labels = torch.tensor([5, 0, IGNORED, 9000, 8191], device=at.device)
    for dtype, tolerance in ((torch.float32, SUMS), (at.half, SUMS_16)):
        logits = at.random(5, 9001, dtype=dtype)
        expected = logits.float()
        for scale in (0.25, torch.tensor(0.25, device=at.device)):
            ours = logits.clone()
            loss = ops.cross_entropy(ours, labels, scale, True)
            theirs = expected.clone()
            at.near(f"loss in {dtype}", loss, plain.cross_entropy(theirs, labels, 0.25, True), tolerance)
            at.near(f"gradient in {dtype}", ours, theirs, tolerance)


def proving(at: Contact) -> None:
    """A kernel is compared with plain torch in each new form, and replaced where it gives something else."""
    y = at.random(3, 4)
    before = set(proven.refused)
    at.near("a kernel that is right", proven.prove("one_row", "contact", lambda: y.clone(), lambda: y), y)
    try:
        at.near("one that is wrong", proven.prove("few_rows", "contact", lambda: -y, lambda: y), y)
        at.true("it is refused from then on", {*proven.refused} - before == {"few_rows"})
    finally:
        proven.refused.pop("few_rows", None)
        proven.calls.pop("few_rows", None)


RATE, DECAY, STEPS = 1e-2, 0.1, 4


def _trained(at: Contact, kind: str, rows: int, pages: int | None = None) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Parameters after a few steps, the first one of so many rows, and the optimiser, whose states may be on pages."""
    parameters = [nn.Parameter(at.random(*shape, seed=n)) for n, shape in enumerate([(rows, 1025), (33, 4), (300,)])]
    optimizer = make_optimizer(kind, parameters, RATE, DECAY, page_budget=pages, folder=at.folder)
    open_states(optimizer)
    for step in range(STEPS):
        for number, parameter in enumerate(parameters):
            parameter.grad = at.random(*parameter.shape, seed=10 * step + number)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


def adamw(at: Contact) -> None:
    """The fused AdamW against torch's plain one."""
    found, _ = _trained(at, "adamw", 64)
    for number, ours in enumerate(found):
        own = nn.Parameter(at.random(*ours.shape, seed=number))
        optimizer = torch.optim.AdamW([own], RATE, weight_decay=DECAY if own.ndim > 1 else 0.0, foreach=False, fused=False)
        for step in range(STEPS):
            own.grad = at.random(*own.shape, seed=10 * step + number)
            optimizer.step()
        at.near(f"parameter {number}", ours, own, 1e-5)


def adamw_8bit(at: Contact) -> None:
    """The kernel of moments in 8 bits against the reference's."""
    found, _ = _trained(at, "adamw_8bit", 8)
    with ops.use_backend("reference"):
        expected, _ = _trained(at, "adamw_8bit", 8)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        at.near(f"parameter {number}", ours, theirs, 1e-6)  # torch's square root may be one unit off


def paged(kind: str, budget: int, at: Contact) -> None:
    """A paged optimiser with room for some of its pages against the one without pages: the same bits."""
    expected, _ = _trained(at, kind, 1024)
    found, optimizer = _trained(at, f"paged_{kind}", 1024, budget)
    held = state_bytes(optimizer)
    try:
        at.true(f"states of {held.total} bytes are partly resident ({held.resident})", 0 < held.resident < held.total)
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            at.near(f"parameter {number}", ours, theirs)
    finally:
        close_states(optimizer)


KERNELS: dict[str, Callable[[Contact], None]] = {
    **{f"codec-{name}": partial(codec, name) for name in ("nf4", "fp4", *layouts.GROUPED)},
    "quantise": quantise,
    "rows-8bit": rows_8bit,
    **{f"product-{compute}": partial(product_8bit, compute) for compute in eightbit.CODE_TYPES},
    "low-rank-gradients": low_rank_gradients,
    "low-rank-rows": low_rank_rows,
    "attention-slots": attention_slots,
    **{f"experts-{name}": partial(experts, name) for name in ("nf4", "int8", "int4", "mxfp4", "dense")},
    "cross-entropy": cross_entropy,
    "proving": proving,
    "adamw-8bit": adamw_8bit,
}
"""Name -> check; on a CPU they run in Triton's interpreter."""

OPTIMISERS: dict[str, Callable[[Contact], None]] = {
    "adamw": adamw,
    "paged-adamw": partial(paged, "adamw", 2 << 20),
    "paged-adamw-8bit": partial(paged, "adamw_8bit", 1 << 20),
}
"""Name -> check; on a CPU they run on the compiled kernels."""
