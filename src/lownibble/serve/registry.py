"""The adapters of a folder: validated before anything is evicted for them, held within a budget, never changed during a request.

A folder may have any name that is one plain component of a path and can be printed (`_is_name`); those with a leading dot are
other programs' business. What cannot be served is known by name and reason (`not_taken`): `examine` checks configurations and
shapes of all. A held adapter was read from one version of its files: a request keeps the version it began with, and the next one
gets what the folder holds by then.
Least recently used adapters are evicted to make room for new ones, unless they are pinned or in use.

An adapter's values lie in one contiguous buffer, in the order in which a step reads them, by default in float16: a batch of
different adapters is bound by memory bandwidth. The rounding error is at most 2^-11 relative for magnitudes of 6e-5 or more, and
3e-8 absolute below; products and sums are in float32. An adapter with a value beyond float16's range is held in float32. DoRA's
row gains, which multiply the base's output, are float32 always.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import re
import threading
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from lownibble.config import LoraConfig
from lownibble.decoding import Decoder
from lownibble.errors import AdapterError, InputError
from lownibble.kernels.decoder import Adapter, LowRank
from lownibble.lora.activated import UNBOUND
from lownibble.lora.adapter_file import AdapterFile
from lownibble.lora.apart import fitted
from lownibble.lora.dora import DORA, row_gains, row_squares
from lownibble.lora.portable import CONFIG_FILE, WEIGHTS_FILE
from lownibble.lora.provenance import base_facts, other_codec, other_weights
from lownibble.lora.targets import scale_of
from lownibble.lora.variants import variant_of

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_LONGEST_NAME = 255
"""Bytes; file systems have no longer ones."""

_ATTEMPTS = 3
_REPEATED_GROUP, _REPEATS, _MOST_REPEATS = re.compile(r"\)\s*[*+{?]"), re.compile(r"[*+{]"), 4


class UnknownAdapterError(InputError):
    """No adapter has this name."""


class NoRoomError(InputError):
    """Adapters in use fill the budget; a request has to end first."""


class PinnedError(NoRoomError):
    """Pinned adapters leave no room, whichever request ends."""


@dataclass(eq=False)
class Loaded:
    """One version of an adapter, in memory.

    Attributes:
        digest: SHA-256 of its weights file and parsed configuration.
        stamp: (inode, mtime in ns, bytes) of its files before they were read; if the files' differ, there is a newer version.
        users: number of requests in flight that use it.
    """

    name: str
    adapter: Adapter
    nbytes: int
    digest: str
    stamp: tuple[tuple[int, int, int], ...]
    note: str | None = None
    """A warning for the user: it was trained on the same weights in another codec."""
    users: int = 0
    current: bool = True
    """Whether new requests may use it."""
    _scaled: dict[float, Adapter] = field(default_factory=dict)

    def scaled(self, by: float) -> Adapter:
        """The adapter with every scale multiplied by `by`; shares the tensors."""
        if by == 1:
            return self.adapter
        if self.adapter.has_gains:
            raise AdapterError(f"Adapter '{self.name}' is DoRA, whose contribution has no scale. Leave lora_scale out.")
        if by not in self._scaled:
            if len(self._scaled) >= 8:
                self._scaled.clear()
            self._scaled[by] = Adapter(
                [[low and LowRank(low.A, low.B, low.scale * by) for low in layer] for layer in self.adapter.of],
                unscaled=self.adapter, invocation=self.adapter.invocation,
            )  # fmt: skip
        return self._scaled[by]


class Registry:
    """The adapters in the sub-folders of `folder`, for the model of `decoder`; thread-safe.

    Args:
        decoder: what will compute with them.
        folder: None: no adapters.
        budget: maximum bytes of the held adapters.
        max_rank, max_bytes: larger adapters are rejected.
        dtype: of the held adapters: float16 or float32.
        any_base: also accept adapters whose metadata says that they were trained on other weights.
        reserved: names of the base, which no adapter may have.
    Attributes:
        not_taken: name -> why, of the folders that cannot be served, as far as they were looked at.
    """

    def __init__(
        self,
        decoder: Decoder,
        folder: Path | None,
        budget: int,
        *,
        max_rank: int = 256,
        max_bytes: int | None = None,
        dtype: torch.dtype = torch.float16,
        any_base: bool = False,
        reserved: Collection[str] = (),
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise AdapterError(f"'{folder}' is no folder. Name one whose sub-folders are adapters.")
        self.folder, self.budget, self.dtype, self.any_base = folder, budget, dtype, any_base
        self.max_rank, self.max_bytes = max_rank, max_bytes
        self.decoder, self._model, self._facts = decoder, decoder.model, base_facts(decoder.model)
        self._paths = decoder.paths
        self._row_squares: dict[str, Tensor] = {}  # path of a layer -> of its base, for DoRA
        self._reserved = frozenset(reserved)
        self.not_taken: dict[str, str] = {}
        self._held: dict[str, Loaded] = {}  # current versions, least recently used first
        self._old: list[Loaded] = []  # outdated versions that requests still use
        self._withdrawn: set[str] = set()
        self.pinned: set[str] = set()  # names, whatever the version
        self._lock, self._reading = threading.RLock(), threading.Lock()  # lock order: `_reading` first
        self.loads = self.hits = self.evictions = 0

    def names(self) -> list[str]:
        """The names of all available adapters, sorted."""
        try:
            return [] if self.folder is None else sorted(path.name for path in self.folder.iterdir() if path.name in self)
        except OSError:  # it is gone
            return []

    def __contains__(self, name: str) -> bool:
        if self.folder is None or not _is_name(name) or name in self._reserved or name in self._withdrawn:
            return False
        try:
            return (self.folder / name / CONFIG_FILE).is_file()
        except OSError:  # it may not be looked into
            return False

    def examine(self, *, preload: bool = False) -> list[str]:
        """Check all adapters, so that `not_taken` is complete, and with `preload` hold them while the budget lasts; returns the
        names of those held."""
        if self.folder is None:
            return []
        try:
            paths = sorted(self.folder.iterdir())
        except OSError as error:
            self.not_taken[self.folder.name] = f"it cannot be read: {error.strerror}"
            return list(self.held)
        for path in paths:
            if path.name.startswith("."):
                continue
            name = path.name
            try:
                if not path.is_dir():
                    continue
                is_there = (path / CONFIG_FILE).is_file()
            except OSError as error:
                self.not_taken[name] = f"it cannot be read: {error.strerror}"
                continue
            if not is_there:
                self.not_taken[name] = f"it has no {CONFIG_FILE}"
            elif not _is_name(name):
                self.not_taken[name.encode("unicode_escape", "surrogatepass").decode()] = "its name cannot be printed"
            elif name in self._reserved:
                self.not_taken[name] = "the base is called so"
            elif name in self:
                self._examine(name, preload)
        if (self.folder / CONFIG_FILE).is_file():
            self.not_taken[self.folder.name] = "it is an adapter itself: name the folder that it is in"
        return list(self.held)

    def _examine(self, name: str, preload: bool) -> None:
        try:
            _, expected = self._guarded(name, partial(self._checked, name))
            if preload and self.nbytes + self._size(expected) <= self.budget:
                self.load(name)
        except InputError as error:
            self.not_taken[name] = str(error)
        else:
            self.not_taken.pop(name, None)

    @property
    def nbytes(self) -> int:
        """Bytes held, including outdated versions in use."""
        with self._lock:
            return sum(one.nbytes for one in (*self._held.values(), *self._old))

    @property
    def held(self) -> dict[str, Loaded]:
        """Name -> held version that is current, least recently used first."""
        with self._lock:
            return dict(self._held)

    def acquire(self, name: str) -> Loaded:
        """The current version, loaded if necessary; `release` it when done.

        Raises:
            UnknownAdapterError: no adapter has this name, or it was withdrawn.
            AdapterError: it is damaged, too large, or not for this model.
            NoRoomError: adapters in use (`PinnedError`: pinned ones) fill the budget.
        """
        if (held := self._hit(name)) is not None:
            return held
        with self._reading:
            if (held := self._hit(name)) is not None:  # another request has loaded it meanwhile
                return held
            try:
                fresh = self._read_whole(name)  # slow: not under `_lock`, which the engine takes when a request ends
            except InputError as error:
                with self._lock:
                    if (held := self._held.pop(name, None)) is not None:
                        self._retire(held)  # the files changed: new requests do not get the old version
                    self.not_taken[name] = str(error)
                raise
            with self._lock:
                if name not in self:
                    raise UnknownAdapterError(f"The adapter '{name}' was withdrawn. GET /v1/models lists what there is.")
                self._make_room(fresh)
                if (held := self._held.pop(name, None)) is not None:
                    self._retire(held)
                self._held[name] = fresh
                self.not_taken.pop(name, None)
                self.loads += 1
                if fresh.note:
                    _log.warning(fresh.note)
                fresh.users += 1
                return fresh

    def _hit(self, name: str) -> Loaded | None:
        """The held version with one more user, if its files are unchanged; else None."""
        with self._lock:
            if name not in self:
                raise UnknownAdapterError(f"There is no adapter '{name}'. GET /v1/models lists what there is.")
            held = self._held.get(name)
            if held is None or held.stamp != self._stamp(name):
                return None
            self._held[name] = self._held.pop(name)  # most recently used
            self.hits += 1
            held.users += 1
            return held

    def release(self, loaded: Loaded) -> None:
        """Release a version returned by `acquire`."""
        with self._lock:
            loaded.users -= 1
            if not loaded.users and not loaded.current:
                self._old.remove(loaded)

    def load(self, name: str, *, pin: bool = False) -> Loaded:
        """Load an adapter now, available again if it was withdrawn, and pin or (`pin` False) unpin it. Raises as `acquire`."""
        with self._lock:
            was_withdrawn = name in self._withdrawn
            self._withdrawn.discard(name)
        try:
            loaded = self.acquire(name)
        except InputError:
            with self._lock:
                self._withdrawn |= {name} if was_withdrawn else set()
            raise
        with self._lock:
            (self.pinned.add if pin else self.pinned.discard)(name)
            self.release(loaded)
        return loaded

    def unload(self, name: str) -> None:
        """Withdraw an adapter: new requests do not find it, and its memory is freed when the last request using it ends.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._lock:
            if name not in self and name not in self._held:  # the folder of a held adapter may be gone
                raise UnknownAdapterError(f"There is no adapter '{name}' to unload. GET /v1/models lists what there is.")
            self._withdrawn.add(name)
            self.pinned.discard(name)
            if (held := self._held.pop(name, None)) is not None:
                self._retire(held)

    def _retire(self, loaded: Loaded) -> None:
        loaded.current = False
        if loaded.users:
            self._old.append(loaded)

    def _check_size(self, name: str, nbytes: int) -> None:
        for limit, what, option in (
            (self.max_bytes, "the largest that is taken has", "--max-adapter"),
            (self.budget, "the budget of all is", "--adapter-budget"),
        ):
            if limit is not None and nbytes > limit:
                raise AdapterError(
                    f"Adapter '{name}' takes {nbytes / 1e6:.1f} MB, and {what} {limit / 1e6:.1f} MB. "
                    f"Start the server with a larger {option}."
                )

    def _make_room(self, fresh: Loaded) -> None:
        self._check_size(fresh.name, fresh.nbytes)
        others = {name: one for name, one in self._held.items() if name != fresh.name}
        pinned = sum(one.nbytes for name, one in others.items() if name in self.pinned)
        if pinned + fresh.nbytes > self.budget:
            raise PinnedError(f"Adapters that are pinned leave no room for '{fresh.name}'. Unload one of them.")
        before = self._held.get(fresh.name)  # replaced by the new version, freed if not in use
        over = self.nbytes - (before.nbytes if before and not before.users else 0) + fresh.nbytes - self.budget
        leaving = []
        for name, one in others.items():
            if over <= 0:
                break
            if not one.users and name not in self.pinned:
                leaving.append(name)
                over -= one.nbytes
        if over > 0:
            raise NoRoomError("Every adapter held is in use or pinned, and there is no room for another. Try again soon.")
        for name in leaving:
            self._retire(self._held.pop(name))
            self.evictions += 1

    def _stamp(self, name: str) -> tuple[tuple[int, int, int], ...]:
        assert self.folder is not None
        try:
            found = [(self.folder / name / file).stat() for file in (CONFIG_FILE, WEIGHTS_FILE)]
        except OSError:
            raise AdapterError(
                f"Adapter '{name}' lacks {WEIGHTS_FILE}. Only safetensors adapters are served; convert others with PEFT."
            ) from None
        return tuple((one.st_ino, one.st_mtime_ns, one.st_size) for one in found)

    def _guarded(self, name: str, read: Callable[[], _T]) -> _T:
        """What `read` returns; adapter files are untrusted, so whatever goes wrong is an error of this adapter. Clients see the
        message, which leaves out the folder's path."""
        try:
            return read()
        except InputError as error:
            raise type(error)(str(error).replace(f"{self.folder}/", "")) from None
        except Exception as error:
            raise AdapterError(f"Adapter '{name}' cannot be used ({type(error).__name__}: {error}). Save it again.") from None

    def _read_whole(self, name: str) -> Loaded:
        """Read one version of the files, with `_ATTEMPTS` attempts if they change meanwhile."""
        for _ in range(_ATTEMPTS):
            stamp = self._stamp(name)
            try:
                fresh = self._guarded(name, partial(self._read, name, stamp))
            except InputError:
                if stamp == self._stamp(name):
                    raise
                continue
            if stamp == self._stamp(name):
                return fresh
        raise AdapterError(f"Adapter '{name}' changes while it is read. Write it elsewhere and rename its folder.")

    def _checked(self, name: str) -> tuple[AdapterFile, dict[str, torch.Size]]:
        """What an adapter's configuration and its file's header say, after checking that it can be served: the file, and the
        shapes of what is read of it."""
        assert self.folder is not None
        file = AdapterFile(self.folder / name)
        if not (variant := variant_of(file.config)).plain and variant not in (DORA, UNBOUND):
            raise AdapterError(
                f"Adapter '{name}' is of a variant that is neither LoRA nor DoRA, so requests cannot share the base. Merge it "
                "(lownibble merge) and serve the result."
            )
        _check_patterns(name, file.config)
        file = fitted(file, self._model)
        facts = file.trained_on
        if facts is not None and not self.any_base and (different := other_weights(facts, self._facts)):
            raise AdapterError(f"Adapter '{name}' is for another base: {different}. Serve it there, or start with --any-base.")
        largest = max((file.config.r, *file.config.rank_pattern.values()))
        if largest > self.max_rank:
            raise AdapterError(f"Adapter '{name}' has rank {largest}, above {self.max_rank}. Start with a larger --max-rank.")
        expected = file.expected(self._model)
        file.check_fit(expected, set())
        layers = file.layers(self._model)

        def keys_of(paths: Set[str]) -> set[str]:
            return {key for path in paths & layers.keys() for key in layers[path][1].values()}

        here = keys_of({path for of_layer in self._paths for path in of_layer})
        if beyond := sorted(expected.keys() - here - keys_of(self.decoder.unread)):
            raise AdapterError(
                f"Adapter '{name}' changes '{beyond[0]}', which is not shared by requests with other adapters. Merge it "
                "(lownibble merge) and serve the result."
            )
        expected = {key: shape for key, shape in expected.items() if key in here}
        self._check_size(name, self._size(expected))
        return file, expected

    def _size(self, expected: Mapping[str, torch.Size]) -> int:
        return sum(shape.numel() for shape in expected.values()) * self.dtype.itemsize

    def _read(self, name: str, stamp: tuple[tuple[int, int, int], ...]) -> Loaded:
        """Read and validate an adapter, before anything is evicted for it."""
        file, expected = self._checked(name)
        try:
            content = file.path.read_bytes()
            read = {key: file.read(key) for key in expected} if file.made else parse_safetensors(content)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"Adapter '{name}' cannot be read: {error}. Copy it again.") from None
        tensors = {key: tensor for key, tensor in read.items() if key in expected}
        for key, tensor in tensors.items():
            if tensor.shape != expected[key]:
                raise AdapterError(f"'{key}' of adapter '{name}' has another shape than its header says. Copy it again.")
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"'{key}' of adapter '{name}' holds NaN or infinite values. Train it again with a lower rate.")
        digest = hashlib.sha256(content)
        digest.update(json.dumps(file.config.to_dict(), sort_keys=True).encode())
        adapter, nbytes = self._adapter(name, file, tensors)
        differs = file.trained_on and other_codec(file.trained_on, self._facts)
        note = f"Adapter '{name}': {differs}; its outputs will differ from those in training." if differs else None
        return Loaded(name, adapter, nbytes, digest.hexdigest(), stamp, note)

    def _adapter(self, name: str, file: AdapterFile, tensors: Mapping[str, Tensor]) -> tuple[Adapter, int]:
        """Copy the adapter into a buffer of its own; returns it and the buffer's bytes."""
        layers = file.layers(self._model)
        held = _memory(sum(tensor.numel() for tensor in tensors.values() if tensor.dim() > 1), _held_in(tensors, self.dtype))
        taken = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal taken
            place = held[taken : (taken := taken + tensor.numel())].view(tensor.shape)
            return place.copy_(tensor)

        def branch(path: str) -> LowRank | None:
            if path not in layers:
                return None
            (variant, keys), scale = layers[path], scale_of(path, file.config)
            read = {own: variant.from_file(own, tensors[key]) for own, key in keys.items()}
            gain = None
            if variant is DORA:
                base: Any = self._model.get_submodule(path)
                if path not in self._row_squares:
                    self._row_squares[path] = row_squares(base)
                there = {own: tensor.to(self._row_squares[path].device) for own, tensor in read.items()}
                gain = row_gains(base, there, scale, self._row_squares[path]).cpu()
                read["lora_B"] = read["lora_B"] * gain.unsqueeze(1)
                gains.append(gain)
            # B column-major, as the kernels read it
            return LowRank(keep(read["lora_A"]), keep(read["lora_B"].transpose(-2, -1)).transpose(-2, -1), scale, gain)

        gains: list[Tensor] = []
        invocation = file.config.alora_invocation_tokens or ()
        assert not isinstance(invocation, str), "checked with its targets"
        adapter = Adapter([[branch(path) for path in of_layer] for of_layer in self._paths], invocation=tuple(invocation))
        return adapter, held.nbytes + sum(gain.nbytes for gain in gains)


def _is_name(name: str) -> bool:
    """Whether a name is one component of a path that can be printed, and does not begin with a dot."""
    if not name.isprintable() or name.startswith(".") or Path(name).name != name:
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME


def _check_patterns(name: str, config: LoraConfig) -> None:
    """Reject regular expressions that could backtrack for ever: adapter configs are untrusted, and `re` blocks all threads."""
    targets = [config.target_modules] if isinstance(config.target_modules, str) else []
    for pattern in (*targets, *config.rank_pattern, *config.alpha_pattern):
        if len(pattern) > 500 or len(_REPEATS.findall(pattern)) > _MOST_REPEATS or _REPEATED_GROUP.search(pattern):
            raise AdapterError(
                f"Adapter '{name}' has a pattern that is too costly to match: '{pattern[:100]}'. List the modules' names instead."
            )


def _memory(n: int, dtype: torch.dtype) -> Tensor:
    """A tensor of n elements in its own mmap: freeing it returns the pages to the system, while malloc would keep them."""
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, access=mmap.ACCESS_COPY), dtype=dtype)


def _held_in(tensors: Mapping[str, Tensor], wanted: torch.dtype) -> torch.dtype:
    largest = torch.finfo(wanted).max
    fits = all(tensor.abs().max() <= largest for tensor in tensors.values() if tensor.numel())
    return wanted if fits else torch.float32
