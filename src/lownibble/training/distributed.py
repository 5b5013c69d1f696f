"""Training on several processes, one a device, as torchrun starts them. torch.distributed does the communication.

    ddp    every rank holds the whole model; gradients are summed over ranks once a step
    fsdp   decoder layers are sharded over ranks by FSDP2 (`sharding.py`)

A step's rows, its loss and its optimiser step are those of one process whatever the number of ranks: `batch_size` and
`gradient_accumulation_steps` are the run's, and each rank has its share of them (`Ranks.deal`). So a run can be resumed on
another number of ranks, and its result does not depend on the machine (ADR 38).

Gradients are summed when the step's last backward pass is done, by an all-reduce of a few buffers, and not during it as torch's
DistributedDataParallel does: a model's adapters are about a hundredth of it, passes need no other module or hook around the
model, and they stay free of communication, so that a rank that runs out of memory can still tell the others. What the host needs
to know (counts, stop requests, lack of memory) goes over gloo, which does not wait for the device.

A rank that ends takes the others with it: their next collective fails. `joined` says so in one sentence, and torchrun's
`--max-restarts` starts all of them again, which then resume.

Processes that are started again find each other by names that no process had before (`_meet`). torchrun's store stays, with the
addresses of the dead, and nothing that torchrun tells a process is the same for all of a start and another in the next: its agent
on each machine counts the failures of its own processes, and not those starts that it makes because another machine's failed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

import lownibble
from lownibble import launch
from lownibble.config import TrainConfig
from lownibble.errors import ConfigError, LownibbleError, TrainingError
from lownibble.memory.usage import is_exhausted
from lownibble.planning.exchange import BUFFER_BYTES, share

_T = TypeVar("_T")

Mode = Literal["alone", "ddp", "fsdp"]

TIMEOUT = "LOWNIBBLE_PARALLEL_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others before the run ends; 600 by default, for slow evaluations and
files."""

_CALL = "call"
"""Key of the store: the name by which the first rank calls the others."""

_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting", "Broken pipe", "Socket")
"""Parts of what torch says when a collective fails because a rank is gone or silent."""


class RankLostError(TrainingError):
    """A collective failed: another rank has ended, or cannot be reached."""

    leaves_threads = True


class AllExhaustedError(MemoryError):
    """Memory ran out on one rank or more, and all know it: each raises this."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank, world: its number, and how many there are.
        mode: how they share the model.
    """

    rank: int = 0
    world: int = 1
    mode: Mode = "alone"

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.mode != "alone"

    @property
    def sharded(self) -> bool:
        """Whether passes gather weights, so that all ranks must run as many."""
        return self.mode == "fsdp"

    @property
    def words(self) -> str:
        """How many ranks share what: 'alone', or such as '4 ddp'."""
        return f"{self.world} {self.mode}" if self.several else self.mode

    def deal(self, config: TrainConfig) -> tuple[int, int]:
        """Rows (packs) of a batch and batches of a step on each rank: batches are split, or else dealt whole.

        Raises:
            ConfigError: neither can be divided by the number of ranks.
        """
        own = share(config, self.world)
        return own.batch_size, own.gradient_accumulation_steps

    def total(self, *counts: int) -> list[int]:
        """Sum of each count over ranks."""
        return self._reduced(counts, dist.ReduceOp.SUM) if self.several else list(counts)

    def most(self, count: int) -> int:
        """The largest of a count over ranks."""
        return self._reduced([count], dist.ReduceOp.MAX)[0] if self.several else count

    def _reduced(self, counts: Iterable[int], how: dist.ReduceOp.RedOpType) -> list[int]:
        values = torch.tensor(list(counts), dtype=torch.int64)
        dist.all_reduce(values, how)
        return [int(value) for value in values.tolist()]

    def add_up(self, tensors: Iterable[Tensor], buffer: Tensor | None = None) -> None:
        """Sum each tensor over ranks, in place; `buffer`: from `buffer_for` of the same tensors."""
        if not self.several:
            return
        for group in _groups(tensors):
            if len(group) == 1 or buffer is None:
                for tensor in group:
                    dist.all_reduce(tensor)
                continue
            flat = buffer[: sum(tensor.nbytes for tensor in group)].view(group[0].dtype)
            parts = flat.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                part.view_as(tensor).copy_(tensor)
            dist.all_reduce(flat)
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor the first rank's values, in place."""
        if self.several:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What `make` returns on the first rank, or its error, on all ranks."""
        if not self.several:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except LownibbleError as error:
                made[1] = error
        dist.broadcast_object_list(made, 0)
        if made[1] is not None:
            raise made[1]
        found: _T = made[0]
        return found

    def of_all(self, value: _T) -> list[_T]:
        """The values of all ranks, by rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, attempt: Callable[[], _T]) -> _T:
        """Return `attempt()`, without communication in it; if memory runs out on one rank, all raise `AllExhaustedError`."""
        if not self.several or self.sharded:
            return attempt()
        result: Any = None
        why: BaseException | None = None
        try:
            result = attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            why = error.with_traceback(None)  # frees what the failed pass held
        if self.most(int(why is not None)):
            raise AllExhaustedError("out of memory on another rank" if why is None else str(why)) from why
        found: _T = result
        return found

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Compare what must be the same on all ranks.

        Raises:
            ConfigError: a rank differs from the first (names it, and the differences).
        """
        first, *others = self.of_all(dict(facts))
        for rank, found in enumerate(others, start=1):
            keys = sorted(key for key in first.keys() | found.keys() if first.get(key) != found.get(key))
            if keys:
                said = "; ".join(f"{key} is {found.get(key)!r} instead of {first.get(key)!r}" for key in keys[:5])
                raise ConfigError(
                    f"Rank {rank} differs from rank 0: {said}. Start all processes with the same code, options and data."
                )

    def wait(self) -> None:
        """Wait for the other ranks."""
        if self.several:
            self.most(0)

    # the first rank alone reads and writes checkpoints; these carry the others' parts of them

    def send(self, what: Any, values: Tensor | None = None, to: int = 0) -> None:
        """Send an object to a rank, and a tensor's values with it."""
        dist.send_object_list([(what, None if values is None else (values.dtype, tuple(values.shape)))], to)
        if values is not None:
            dist.send(values.detach().cpu().contiguous().view(-1).view(torch.uint8), to)

    def receive(self, source: int = 0) -> tuple[Any, Tensor | None]:
        """Receive what `send` sent."""
        found: list[Any] = [None]
        dist.recv_object_list(found, source)
        what, form = found[0]
        if form is None:
            return what, None
        dtype, shape = form
        values = torch.empty(shape, dtype=dtype)
        dist.recv(values.view(-1).view(torch.uint8), source)
        return what, values


ALONE = Ranks()
"""One process without others."""


def buffer_for(tensors: Iterable[Tensor]) -> Tensor | None:
    """Memory in which `Ranks.add_up` joins small tensors, uint8; None if it joins none."""
    joined = [group for group in _groups(tensors) if len(group) > 1]
    most = max((sum(tensor.nbytes for tensor in group) for group in joined), default=0)
    return torch.empty(most, dtype=torch.uint8, device=joined[0][0].device) if joined else None


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, in groups of one dtype and at most `BUFFER_BYTES`."""
    group: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if group and (held + tensor.nbytes > BUFFER_BYTES or tensor.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(tensor)
        held += tensor.nbytes
    if group:
        yield group


def local_device(device: str) -> str:
    """This process's own device: with CUDA the one of its number on this machine.

    Raises:
        ConfigError: a device is named that all processes would share, or there are fewer devices than processes.
    """
    if not launch.is_several() or device == "cpu" or not torch.cuda.is_available():
        return device
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ConfigError(f"Each process has a GPU of its own, and all would share '{device}'. Leave --device out.")
    if local >= there:
        raise ConfigError(
            f"Process {local} of this machine has no GPU: there are {there}. Start torchrun with --nproc-per-node {there}."
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextmanager
def joined(
    config: TrainConfig, device: torch.device, choose: Callable[[int], Mode], same: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[Ranks]:  # fmt: skip
    """Join the other processes of the run for the block; without others, `ALONE`.

    Args:
        choose: number of ranks -> how they share the model, where the configuration leaves it open; asked on the first rank.
        same: returns what must be the same on all ranks.
    Raises:
        ConfigError: ranks were asked for and there are none, they cannot communicate, or they differ.
        RankLostError: another rank ended, or cannot be reached.
    """
    if not launch.is_several() and not dist.is_initialized():
        if config.parallel != "auto":
            raise ConfigError(
                f"parallel='{config.parallel}' is for several processes. Start them with: torchrun --nproc-per-node N -m "
                f"lownibble train ... --parallel {config.parallel}"
            )
        yield ALONE
        return
    ours = not dist.is_initialized()
    if ours:
        _join(device)
    try:
        with _lost_becomes_error():
            plain = Ranks(dist.get_rank(), dist.get_world_size(), "ddp")
            plain.check_equal(same())  # before ranks that differ go different ways
            mode = plain.from_first(lambda: choose(plain.world)) if config.parallel == "auto" else config.parallel
            yield Ranks(plain.rank, plain.world, mode)
    finally:
        if ours:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _join(device: torch.device) -> None:
    backend = "gloo"
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise ConfigError("This torch has no NCCL, over which GPUs communicate. Install a CUDA build, or use --device cpu.")
        backend = "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=_patience())
    try:
        rank, world = launch.rank(), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = PrefixStore(launch.PREFIX, TCPStore(host, port, world, is_master=rank == 0 and not of_agent, timeout=patience))
        dist.init_process_group(
            backend, store=PrefixStore(_meet(store, rank, world, patience), store), rank=rank, world_size=world,
            timeout=patience, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The processes of the run do not find each other ({_first_line(error)}). Start them with torchrun, and on several "
            "machines with the same --rdzv-endpoint."
        ) from error


def _meet(store: Store, rank: int, world: int, patience: timedelta) -> str:
    """A name of this start of the processes, the same on all of them; no process of another start gets it.

    Each has a name of its own. The first calls by it, the others answer with theirs, and it answers each when it has heard all.
    What an earlier start left in the store is a call without end, or an answer to another name.

    Raises:
        RuntimeError: a process does not come.
    """
    own, latest = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    if rank == 0:
        store.set(_CALL, own)
        names = [store.get(f"{own}/{other}").decode() for other in range(1, world)]
        store.delete_key(launch.ERROR)  # an earlier start's
        for name in names:
            store.set(name, own)
        return own
    while not store.check([own]):
        if time.monotonic() > latest:
            raise RuntimeError(f"rank 0 did not answer in {patience.total_seconds():.0f} seconds")
        store.set(f"{store.get(_CALL).decode()}/{rank}", own)
        time.sleep(0.05)
    return str(store.get(own).decode())


@contextmanager
def _lost_becomes_error() -> Iterator[None]:
    try:
        yield
    except LownibbleError:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(part in str(error) for part in _LOST):
            raise RankLostError(
                f"Another process of the run ended or cannot be reached ({_first_line(error)}); its own message says why. "
                "--resume continues from the last checkpoint."
            ) from error
        raise


def _patience() -> int:
    """Seconds that a rank waits for the others.

    Raises:
        ConfigError: `TIMEOUT` is set to something else than a number of seconds.
    """
    text = os.environ.get(TIMEOUT, "600")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"The environment variable {TIMEOUT} must be a number of seconds. Got {text!r}.")
    return int(text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def code_facts() -> dict[str, str]:
    """What must be the same on all ranks before their options: this package's code, and the versions it runs on."""
    folder = Path(lownibble.__file__).parent
    files = sorted(path for path in folder.rglob("*.py"))
    return {
        "lownibble's code": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
