"""Paged AdamW: states in pages, of which a budgeted part is resident; bit-identical to the unpaged optimiser.

The states of all parameters, in order, fill page after page; a large parameter is split into pieces, small ones (LoRA) share a
page. A piece holds both moments, so one read fetches all it needs. A step walks the pages and applies to the pieces' slices the
same operation that the unpaged optimiser applies to whole tensors: it is elementwise, and splits at multiples of 256 elements
keep its SIMD vectors whole, so the results are bit-identical (tested). Later pages are prefetched and earlier ones written back
in the background.

Every other step walks backwards. Cyclic access to more pages than the budget never hits an LRU cache; going back and forth, each
step begins with the pages that the last one ended with, and a budget of a tenth saves a tenth of the traffic.

`adamw_8bit` is this optimiser with all pages resident, so both share one implementation.

Rejected: paging whole tensors as bitsandbytes does (the embedding alone may exceed the budget; its LoRA states are never
paged); updating parameters during backward (gradient clipping needs all gradients first).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lownibble.errors import ConfigError, TrainingError
from lownibble.kernels import ops
from lownibble.kernels.adamw import AdamPart, AdamStep, Moments
from lownibble.optim import eight_bit, specs
from lownibble.optim.paging import PageStore
from lownibble.optim.specs import Paging

UNIT = 256
"""Parameters are split at multiples of this many elements: a block of 8-bit codes, and a multiple of any SIMD width."""

ALIGNMENT = 64
SIZES = "sizes"
"""Key in a group of shards: elements of the whole tensor of each of its parameters."""

AHEAD = 8
"""Pages prefetched ahead of the one in use."""


class Field(NamedTuple):
    """One state of a parameter: its name, dtype, and how many elements of the parameter share one value."""

    key: str
    dtype: torch.dtype
    per: int = 1

    def count(self, n: int) -> int:
        """Number of values for n elements."""
        return -(-n // self.per)

    def span(self, n: int) -> int:
        """Bytes in a page for n elements, padded to `ALIGNMENT`."""
        return -(-self.count(n) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Piece(NamedTuple):
    """Elements [start, stop) of a parameter, with states at byte `offset` of a page."""

    parameter: nn.Parameter
    group: int
    start: int
    stop: int
    offset: int


class Slices(NamedTuple):
    """For updating one piece: parameter and gradient, flat; its states from `Arithmetic.hold`; step count and group."""

    parameter: Tensor
    gradient: Tensor
    states: Any
    step: Tensor
    group: dict[str, Any]


class Arithmetic(Protocol):
    """An optimiser's states and their update."""

    def fields(self, parameter: nn.Parameter, size: int) -> list[Field]:
        """The states of a parameter; `size`: elements of the tensor that it is, or is a shard of."""

    def new_step(self, parameter: nn.Parameter) -> Tensor:
        """A new step counter, () float32 zero."""

    def hold(self, states: list[Tensor]) -> Any:
        """The states of a piece, flat, one per field, as `update` takes them; kept as long as they stay where they are."""

    def update(self, pieces: list[Slices], found_inf: Tensor | None) -> None:
        """One step on pieces of parameters; none if `found_inf`, () float32 on their device, is 1."""


class Fused:
    """torch's fused AdamW; states in the parameter's dtype, as in torch. On CUDA one launch takes dozens of tensors."""

    def fields(self, parameter: nn.Parameter, size: int) -> list[Field]:
        """Both moments."""
        return [Field("exp_avg", parameter.dtype), Field("exp_avg_sq", parameter.dtype)]

    def new_step(self, parameter: nn.Parameter) -> Tensor:
        """A step counter on the parameter's device, as the fused operation requires."""
        return torch.zeros((), dtype=torch.float32, device=parameter.device)

    def hold(self, states: list[Tensor]) -> list[Tensor]:
        """As they are."""
        return states

    def update(self, pieces: list[Slices], found_inf: Tensor | None) -> None:
        """One call for the pieces of one group and dtype, the same call that `torch.optim.AdamW(fused=True)` makes."""
        alike = defaultdict(list)
        for piece in pieces:
            alike[id(piece.group), piece.parameter.dtype].append(piece)
        for members in alike.values():
            group = members[0].group
            torch._fused_adamw_(
                [p.parameter for p in members], [p.gradient for p in members], [p.states[0] for p in members],
                [p.states[1] for p in members], [], [p.step for p in members], lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
                grad_scale=None, found_inf=found_inf,
            )  # fmt: skip


class EightBit:
    """AdamW with 8-bit moments; float32 for small parameters."""

    def fields(self, parameter: nn.Parameter, size: int) -> list[Field]:
        """Codes and block absmax of both moments, or float32 moments."""
        if size < eight_bit.SMALLEST:
            return [Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32)]
        return [
            Field("exp_avg", torch.uint8), Field("exp_avg_sq", torch.uint8),
            Field("exp_avg_absmax", torch.float32, eight_bit.BLOCK), Field("exp_avg_sq_absmax", torch.float32, eight_bit.BLOCK),
        ]  # fmt: skip

    def new_step(self, parameter: nn.Parameter) -> Tensor:
        """A step counter on the CPU, where it is read."""
        return torch.zeros((), dtype=torch.float32, device="cpu")

    def hold(self, states: list[Tensor]) -> Moments:
        """For the operation."""
        return Moments((states[0], states[1]), (states[2], states[3]) if len(states) == 4 else None, eight_bit.BLOCK)

    def update(self, pieces: list[Slices], found_inf: Tensor | None) -> None:
        """One operation for all pieces."""
        made: dict[tuple[int, int], AdamStep] = {}
        parts = []
        for parameter, gradient, moments, count, group in pieces:
            key = id(group), int(count)
            if key not in made:
                made[key] = AdamStep(key[1], group["lr"], group["betas"], group["eps"], group["weight_decay"])
            parts.append(AdamPart(made[key], parameter, gradient, moments))
        ops.adamw_8bit(parts, eight_bit.code_maps(str(pieces[0].parameter.device)), found_inf)


class PagedAdamW(torch.optim.Optimizer):
    """AdamW over a `PageStore`. `state` holds only each parameter's step count; the moments are in the pages (see `parts`).

    Args:
        groups: parameter groups with `lr`, `betas`, `eps` and `weight_decay`.
        paging: None keeps all pages resident.
        page_bytes: size of a page, at least 4096; default: `specs.page_bytes`.

    Attributes:
        found_inf: None, or () float32 on the parameters' device: 1 makes `step` change neither parameters nor moments, 0 nothing
            else, as with torch's fused optimisers. A GPU reads it when it gets there. The step counts go on either way;
            `take_back_step` mends them.

    Raises:
        ConfigError: a parameter is not contiguous, parameters are on several devices, or the budget is below one page. (The file
            is created by `open`.)
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], arithmetic: Arithmetic, paging: Paging | None, page_bytes: int | None = None
    ) -> None:
        super().__init__(groups, {})
        self._arithmetic = arithmetic
        owned = [(p, number) for number, group in enumerate(self.param_groups) for p in group["params"]]
        devices = {p.device for p, _ in owned}
        if len(devices) > 1 or not all(p.is_contiguous() for p, _ in owned):
            raise ConfigError(
                "A paged or 8-bit optimiser wants contiguous parameters on one device. Use optim='adamw' for this model."
            )
        self._device = devices.pop()
        sizes = [size for g in self.param_groups for size in g.get(SIZES) or (p.numel() for p in g["params"])]
        self._fields = {p: arithmetic.fields(p, size) for (p, _), size in zip(owned, sizes, strict=True)}
        self.total_bytes = sum(field.count(p.numel()) * field.dtype.itemsize for p in self._fields for field in self._fields[p])
        self.budget_bytes, self._folder = None, None
        if paging is not None:
            self.budget_bytes, self._folder = specs.page_budget(self.total_bytes, paging.budget_bytes), paging.folder
        padded = sum(field.span(p.numel()) for p in self._fields for field in self._fields[p])
        self._page_bytes = page_bytes or specs.page_bytes(padded, self.budget_bytes, self._device.type)
        if self.budget_bytes is not None:
            specs.check_budget(self.budget_bytes, self._page_bytes)
        self._pages = self._lay_out(owned)
        self._store: PageStore | None = None
        self._held: dict[int, tuple[int, list[Any]]] = {}  # address of a buffer -> its page, and the pieces' states
        self._stepped: list[Tensor] = []
        self._backwards = False

    def _lay_out(self, owned: list[tuple[nn.Parameter, int]]) -> list[list[Piece]]:
        pages: list[list[Piece]] = [[]] if owned else []
        used = 0
        for parameter, group in owned:
            fields, start, n = self._fields[parameter], 0, parameter.numel()
            unit = sum(field.count(UNIT) * field.dtype.itemsize for field in fields)
            while start < n:
                room = self._page_bytes - used
                count = n - start
                if sum(field.span(count) for field in fields) > room:
                    count = max(0, room - ALIGNMENT * len(fields)) // unit * UNIT
                if count:
                    pages[-1].append(Piece(parameter, group, start, start + count, used))
                    used += sum(field.span(count) for field in fields)
                    start += count
                else:
                    assert used, "a page holds at least one unit"
                    pages.append([])
                    used = 0
        return pages

    def open(self) -> PageStore:
        """The page store, created on the first call.

        Raises:
            OutputError: its file cannot be created.
        """
        if self._store is None:
            self._store = PageStore(
                len(self._pages), self._page_bytes, self.budget_bytes, folder=self._folder, device=self._device
            )  # fmt: skip
        return self._store

    def close(self) -> None:
        """Release the states and their file."""
        if self._store is not None:
            self._store.close()
            self._store = None
            self._held.clear()

    @property
    def planned_bytes(self) -> int:
        """Resident bytes of the states once all pages are in use."""
        n_pages = len(self._pages)
        if self.budget_bytes is not None:
            n_pages = min(n_pages, self.budget_bytes // self._page_bytes)
        return n_pages * self._page_bytes

    @property
    def resident_bytes(self) -> int:
        """Resident bytes of the states now."""
        return self._store.resident_bytes if self._store else 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        Raises:
            TrainingError: reading or writing pages failed; some parameters have taken the step and others have not.
        """
        store = self.open()
        flat, self._stepped = {}, []
        for parameter in self._fields:
            if parameter.grad is not None:
                if not self.state[parameter]:
                    self.begin(parameter)
                step = self.state[parameter]["step"]
                flat[parameter] = parameter.view(-1), parameter.grad.reshape(-1), step
                self._stepped.append(step)
        if not flat:
            return
        torch._foreach_add_(self._stepped, 1)
        walk = [number for number, pieces in enumerate(self._pages) if any(piece.parameter in flat for piece in pieces)]
        if self._backwards:
            walk.reverse()
        self._backwards = not self._backwards
        ahead = min(AHEAD, store.n_slots - 1)
        store.prefetch(walk[:ahead])
        for place, number in enumerate(walk):
            with store.use(number) as page:
                store.prefetch(walk[place + ahead : place + ahead + 1] if ahead else ())
                slices = []
                for piece, states in zip(self._pages[number], self._states(number, page), strict=True):
                    if piece.parameter in flat:
                        values, gradient, step = flat[piece.parameter]
                        if piece.stop - piece.start < len(values):
                            part = slice(piece.start, piece.stop)
                            values, gradient = values[part], gradient[part]
                        slices.append(Slices(values, gradient, states, step, self.param_groups[piece.group]))
                self._arithmetic.update(slices, self.found_inf)

    def take_back_step(self) -> None:
        """Take the last step off the step counts, if `found_inf` was 1 in it. Call it at most once, before the next step."""
        if self._stepped:
            torch._foreach_sub_(self._stepped, 1)
            self._stepped = []

    def _states(self, number: int, page: Tensor) -> list[Any]:
        """The states of a page's pieces, kept until another page is read into its buffer."""
        of, held = self._held.get(page.data_ptr(), (None, []))
        if of != number:
            views = ([values for _, values in self._views(page, piece)] for piece in self._pages[number])
            held = [self._arithmetic.hold(states) for states in views]
            self._held[page.data_ptr()] = number, held
        return held

    def _views(self, page: Tensor, piece: Piece) -> Iterator[tuple[Field, Tensor]]:
        """Flat views of a piece's states in its page."""
        offset, n = piece.offset, piece.stop - piece.start
        for field in self._fields[piece.parameter]:
            yield field, page[offset : offset + field.count(n) * field.dtype.itemsize].view(field.dtype)
            offset += field.span(n)

    def shapes(self, parameter: nn.Parameter) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each of a parameter's states in the pages."""
        return {
            field.key: (field.dtype, tuple(parameter.shape) if field.per == 1 else (field.count(parameter.numel()),))
            for field in self._fields[parameter]
        }

    def parts(self, *, change: bool) -> Iterator[tuple[nn.Parameter, str, int, Tensor]]:
        """Iterate page by page over the states of parameters that took a step: (parameter, state name, offset, flat values).

        The values are valid until the next item; `change` lets the caller write into them.
        """
        store = self.open()
        for number, pieces in enumerate(self._pages):
            pieces = [piece for piece in pieces if self.state.get(piece.parameter)]
            if not pieces:
                continue
            with store.use(number, change=change) as page:
                store.prefetch(range(number + 1, min(number + store.n_slots, number + 2, len(self._pages))))
                for piece in pieces:
                    for field, values in self._views(page, piece):
                        yield piece.parameter, field.key, piece.start // field.per, values

    def begin(self, parameter: nn.Parameter) -> None:
        """Start a parameter's step count at 0, which marks its states as present."""
        self.state[parameter] = {"step": self._arithmetic.new_step(parameter)}

    def state_dict(self) -> dict[str, Any]:
        """Not supported: all states would have to be in memory at once."""
        raise TrainingError("A paged optimiser has no state_dict. Save it with a checkpoint of the run, page by page.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not supported, like `state_dict`."""
        self.state_dict()
