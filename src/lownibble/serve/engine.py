"""Continuous batching over one `Decoder`: requests with different adapters share each forward pass of the base.

One thread owns the model. A decoding step takes one token of every running sequence and chunks of the prompts in prefill, sorted
by adapter so that each adapter is one segment: the base matmuls run once for all tokens, the low-rank branches per segment. A
sequence keeps its slot of the key-value cache from admission to its end; slots are assigned and freed between steps.

Fairness: requests wait in one queue per adapter, served round-robin; prompts are prefilled in order of admission. Half of a
step's prompt tokens go first to prompts that they complete, the shortest first: a short one does not wait for long ones, and the
oldest goes on in every step. Another thread loads adapters, so that loading does not stall running sequences.

Prefix cache: a finished slot keeps its keys and values with their tokens, under (digest of the adapter, scale). A request with
the same adapter and scale whose prompt starts with the same tokens reuses them. The digest is of the adapter's contents, so the
prefix is never reused for another adapter or for a newer version under the same name. What comes before the invocation of an
activated adapter is the base's, and reused by all of them (`in_common`). If a running sequence has more of the
prompt, its keys and values are copied; a prompt waits for the one that is just reading what both begin with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lownibble.data import end_tokens
from lownibble.decoding import Decoder, Drawer, Forking, most_bytes
from lownibble.decoding.caches import SlotCache
from lownibble.errors import ConfigError, InputError, LownibbleError
from lownibble.kernels import proven
from lownibble.kernels.decoder import Segment
from lownibble.memory.usage import is_exhausted
from lownibble.serve.registry import Loaded, NoRoomError, PinnedError, Registry
from lownibble.serve.request import NOTHING, End, Failed, Kept, Request, Running, in_common

PROMPT_TOKENS = 128
"""Maximum prompt tokens per step, over all sequences; bounds how long prefill delays running sequences. A decoder may take more
in the same time (`Decoder.prompt_tokens`)."""


_log = logging.getLogger(__name__)


class DeviceLostError(LownibbleError, RuntimeError):
    """The process's CUDA context has ended, so the server cannot answer any more."""


class QueueFullError(InputError):
    """The queue is full, or the engine is shutting down."""


class Engine:
    """Runs requests; `submit` and `cancel` are thread-safe.

    Args:
        decoder, tokenizer: of a model from `load`.
        max_batch: maximum concurrent sequences; fewer if `cache_budget` (bytes of keys and values, and of what drawing tokens on
            the device takes) holds fewer.
        max_context: maximum tokens of a sequence, prompt and output; capped at the model's `max_position_embeddings`.
        max_queue: maximum waiting requests; further ones are rejected.
        prefix_cache: reuse keys and values of prompts that begin alike.
    Raises:
        ConfigError: `cache_budget` does not hold one sequence, or the device does not hold `cache_budget`.
        ModelError: the model cannot attend to as many tokens.

    Attributes:
        lost: why nothing can be answered any more, or None.
    """

    lost: DeviceLostError | None = None

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        registry: Registry,
        *,
        max_batch: int,
        max_context: int,
        max_queue: int,
        cache_budget: int,
        prefix_cache: bool = True,
    ) -> None:
        self.decoder, self.registry, self.tokenizer, model = decoder, registry, tokenizer, decoder.model
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_context = min(max_context, most or max_context)
        vocabulary = model.config.get_text_config().vocab_size if decoder.draws else 0
        needed = [n * decoder.slot_bytes(max_context) + most_bytes(n, vocabulary) for n in range(1, max_batch + 1)]
        slots = sum(one <= cache_budget for one in needed)
        if not slots:
            drawing = f" ({most_bytes(1, vocabulary) / 1e6:.0f} MB of it to draw tokens)" if vocabulary else ""
            raise ConfigError(
                f"A sequence of {max_context} tokens takes {needed[0] / 1e6:.0f} MB of keys and values{drawing}, and "
                f"--cache-budget is {cache_budget / 1e6:.0f} MB. Allow more, or shorter sequences (--max-context)."
            )
        self.cache, self.drawing_bytes = decoder.cache(slots, max_context), most_bytes(slots, vocabulary)
        self.max_batch = max_batch
        self.max_queue, self.prefix_cache = max_queue, prefix_cache
        self._drawer: Drawer | None = None
        self.eos = end_tokens(model, tokenizer)
        self._idle: OrderedDict[int, Kept] = OrderedDict((slot, NOTHING) for slot in range(self.cache.slots))
        self._lines: OrderedDict[str | None, deque[Request]] = OrderedDict()
        self._loading: list[tuple[Request, Future[Loaded]]] = []
        self._running: list[Running] = []
        self._changed = threading.Condition()
        self._closing = self._full = False  # full: adapters in use fill the budget, until a request ends
        self._loader = ThreadPoolExecutor(1, "adapters")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready: Future[None] = Future()
        self._thread.start()
        try:
            self._ready.result()
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            raise ConfigError(
                f"The device has no room for {slots} sequences of {max_context} tokens beside the model. Lower --cache-budget "
                f"({cache_budget / 1e6:.0f} MB), --max-batch or --max-context."
            ) from error

    @property
    def waiting(self) -> int:
        """Number of requests that are not in a slot yet."""
        with self._changed:
            return sum(map(len, self._lines.values())) + len(self._loading)

    @property
    def running(self) -> int:
        """Number of requests in a slot."""
        return len(self._running)

    @property
    def has_graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs, as far as they can be."""
        steps = self.cache.steps if isinstance(self.cache, SlotCache) else None
        return steps is not None and not steps.obstacle

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none.

        Raises:
            QueueFullError: too many are waiting, or the engine is closing.
            DeviceLostError: nothing can be answered any more.
        """
        with self._changed:
            if self.lost:
                raise DeviceLostError(str(self.lost))
            if self._closing:
                raise QueueFullError("The server is shutting down. Ask another one, or try again later.")
            if self.waiting + len(requests) > self.max_queue + len(self._idle):  # idle slots count as places
                raise QueueFullError(f"{self.waiting} requests are waiting already. Try again in a while.")
            for request in requests:
                self._lines.setdefault(request.adapter, deque()).append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Cancel a request; its slot is freed after the current step."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish pending ones within `timeout` seconds (None: no limit), cancel the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                for line in self._lines.values():
                    for request in line:
                        request.cancelled = True
                for request in [one.request for one in self._running] + [request for request, _ in self._loading]:
                    request.cancelled = True
                self._changed.notify()
            self._thread.join()
        self._loader.shutdown()

    def _run(self) -> None:
        try:
            self.decoder.warm_up(self.cache)  # in the thread that will work: libraries keep handles and memory for each
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while self.lost is None:
            try:
                with self._changed:
                    self._drop_cancelled()
                    self._admit()
                    if not self._running:
                        if self._closing and not self._lines and not self._loading:
                            return
                        self._changed.wait(1.0)
                        continue
                self._step()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Fail the running requests; the server keeps running, unless its device does not."""
        _log.error("A step of the server failed: %s", error, exc_info=error)
        lost = proven.is_lost(self.decoder.model.device)
        with self._changed:
            if lost:
                self.lost = DeviceLostError(f"The GPU cannot be used any more; start the server again. {error}")
                waiting = [request for line in self._lines.values() for request in line]
                for request in waiting + [request for request, _ in self._loading]:
                    request.tell(Failed(self.lost))
                self._lines.clear()
                self._loading.clear()
        for one in list(self._running):
            self._leave(one, Failed(self.lost or error), keep=False)

    def _drop_cancelled(self) -> None:
        for name, line in list(self._lines.items()):
            for request in [request for request in line if request.cancelled]:
                line.remove(request)
                request.tell(End("cancelled", len(request.prompt), 0, 0, None, time.monotonic() - request.submitted))
            if not line:
                del self._lines[name]
        for one in [one for one in self._running if one.request.cancelled]:
            self._leave(one, self._end(one, "cancelled"))

    def _admit(self) -> None:
        """Give free slots to the queues round-robin; requests with an adapter wait in `_loading` until it is acquired."""
        for request, future in [entry for entry in self._loading if entry[1].done()]:
            self._loading.remove((request, future))
            try:
                self._begin(request, future.result())
            except PinnedError as error:
                for refused in (request, *self._lines.pop(request.adapter, ())):
                    refused.tell(Failed(error))
            except NoRoomError:
                self._lines.setdefault(request.adapter, deque()).appendleft(request)
                self._full = bool(self._running)  # if nothing is running, the adapters in use have been released
            except Exception as error:
                request.tell(Failed(error))
        while len(self._idle) > len(self._loading):
            held = self.registry.held if self._full else {}
            name = next((name for name in self._lines if name is None or not self._full or name in held), "")
            if name == "":
                return
            line = self._lines[name]
            request = line.popleft()
            if line:
                self._lines.move_to_end(name)
            else:
                del self._lines[name]
            if name is None:
                self._begin(request, None)
            else:
                future = self._loader.submit(self.registry.acquire, name)
                self._loading.append((request, future))
                future.add_done_callback(lambda _: self._wake())
                if self._running:  # one per step while sequences are running
                    break

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _begin(self, request: Request, loaded: Loaded | None) -> None:
        if request.cancelled:
            if loaded:
                self.registry.release(loaded)
            request.tell(End("cancelled", len(request.prompt), 0, 0, None, time.monotonic() - request.submitted))
            return
        try:
            one = Running(request, loaded, self.tokenizer.backend_tokenizer)
            self._place(one)
        except Exception as error:  # the slot stays idle
            if loaded:
                self.registry.release(loaded)
            request.tell(Failed(error))

    def _place(self, one: Running) -> None:
        """Give a sequence the slot with the longest common prefix; without any, the one idle longest."""
        # to be scored a prompt must be read
        wanted = one.kept if one.request.score is None and self.prefix_cache else NOTHING
        common = {slot: in_common(kept, wanted) for slot, kept in self._idle.items()}
        shared = {slot: self.cache.reach(slot, n) for slot, n in common.items()}
        slot = max(shared, key=lambda one: shared[one])
        running = [(other, in_common(other.kept, wanted)) for other in self._running]
        ahead, n = self._ahead(running)
        if n > shared[slot]:  # not over what another prompt may begin with, if there is a slot without
            slot = next((free for free, kept in self._idle.items() if not kept.tokens), next(iter(self._idle)))
        else:
            ahead = None
        reused = self.cache.resume(slot, shared[slot] if ahead is None else 0)
        if isinstance(self.cache, Forking) and not reused and ahead is None:
            self.cache.mark(slot, max([*common.values(), *(n for _, n in running)]))  # others may begin so, too
        one.slot, one.done, one.reused = slot, reused, reused
        one.ahead, one.shared = ahead, n
        del self._idle[slot]
        self._running.append(one)

    def _ahead(self, running: list[tuple[Running, int]]) -> tuple[Running | None, int]:
        """Of sequences that begin with some of a prompt that which has most of it to copy, and how much."""
        if not isinstance(self.cache, Forking):
            return None, 0
        found = [(one, n if n > one.done else self.cache.reach(one.slot, n)) for one, n in running]
        return max(found, key=lambda pair: (pair[1], pair[0].done), default=(None, 0))

    def _take_over(self, one: Running, n: int) -> None:
        """Copy what the sequence ahead has of the prompt, its first n tokens, if that is more than is there."""
        assert one.ahead is not None
        assert isinstance(self.cache, Forking)
        if n > one.done and self.cache.reach(one.ahead.slot, n) == n:
            self.cache.fork(one.ahead.slot, one.slot, n)
            one.done = one.reused = n
        one.ahead = None

    def _end(self, one: Running, reason: str) -> End:
        submitted = one.request.submitted
        first = None if one.first is None else one.first - submitted
        return End(reason, len(one.request.prompt), one.made, one.reused, first, time.monotonic() - submitted)

    def _leave(self, one: Running, last: End | Failed, *, keep: bool = True) -> None:
        self._running.remove(one)
        self._full = False
        self._idle[one.slot] = one.kept._replace(tokens=one.tokens[: one.done]) if keep and self.prefix_cache else NOTHING
        if one.loaded:
            self.registry.release(one.loaded)
        one.request.tell(last)
        for other in self._running:
            if other.ahead is one:
                self._take_over(other, min(other.shared, one.done) if keep else 0)

    def _parts(self) -> list[tuple[Running, int]]:
        """The sequences of a step, and of how many tokens each."""
        parts = {one: 1 for one in self._running if one.made}
        prompts = [one for one in self._running if not one.made]
        for one in prompts:
            if one.ahead is not None and one.ahead.done >= one.shared:
                self._take_over(one, one.shared)
        left = most = max(PROMPT_TOKENS, self.decoder.prompt_tokens)
        for one in sorted(prompts, key=lambda one: one.unread):
            if one.unread > left - most // 2:
                break
            parts[one] = one.unread
            left -= one.unread
        waiting = set[Running]()
        for one in prompts:  # in order of admission
            ahead = one.ahead
            if ahead is not None and (ahead in parts or ahead in waiting or ahead.done > one.done):
                waiting.add(one)
            elif left and one not in parts:
                parts[one] = min(one.unread, left)
                left -= parts[one]
        return list(parts.items())

    @torch.inference_mode()
    def _step(self) -> None:
        """Advance every running sequence by one token, or by a chunk of its prompt."""
        parts = self._parts()
        parts.sort(key=lambda part: (id(part[0].adapter), part[0].active_from <= part[0].done))  # few segments of an adapter
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        takers: list[tuple[Running, int]] = []  # whose logits are wanted, and after how many of its tokens
        segments: list[Segment] = []
        for one, n in parts:
            begin = len(tokens)
            tokens += one.tokens[one.done : one.done + n]
            slots += [one.slot] * n
            positions += range(one.done, one.done + n)
            active = begin + max(0, one.active_from - one.done)
            if one.adapter is not None and active < begin + n:
                if segments and segments[-1].adapter is one.adapter and segments[-1].end == active:
                    segments[-1] = Segment(segments[-1].begin, begin + n, one.adapter)
                else:
                    segments.append(Segment(active, begin + n, one.adapter))
            first = one.done + 1 if one.request.score is not None and one.made == 0 else len(one.tokens)
            for read in range(first, one.done + n + 1):
                wanted.append(begin + read - one.done - 1)
                takers.append((one, read))
        logits = self.decoder.step(
            torch.tensor(tokens), torch.tensor(slots), torch.tensor(positions), self.cache, segments=segments,
            wanted=torch.tensor(wanted, dtype=torch.int64),
        )  # fmt: skip
        drawn = self._drawn(logits, takers) if self.decoder.draws else {}
        others = [row for row in range(len(takers)) if row not in drawn]
        rows = dict(zip(others, (logits[others] if drawn else logits).float().cpu(), strict=True))
        for one, n in parts:
            one.done += n
        for row, (one, read) in enumerate(takers):
            if one not in self._running:  # its prompt could not be scored
                continue
            try:
                reason = one.go_on_with(drawn[row], self.eos) if row in drawn else one.go_on(read, rows[row], self.eos)
            except Exception as error:
                self._leave(one, Failed(error), keep=False)
                continue
            if reason:
                self._leave(one, self._end(one, reason))

    def _drawn(self, logits_WV: Tensor, takers: list[tuple[Running, int]]) -> dict[int, int]:
        """Row -> token, for the rows whose request needs no logits on the host: drawn on their device, in one copy."""
        rows = [row for row, (one, _) in enumerate(takers) if one.drawn_by]
        if not rows:
            return {}
        if self._drawer is None:
            self._drawer = Drawer(self.cache.slots, logits_WV.shape[1], logits_WV.device)
        for one in (takers[row][0] for row in rows):
            if not one.made:
                assert one.drawn_by is not None
                self._drawer.begin(one.slot, one.drawn_by, one.request.prompt, one.request.sampling.seed)
        its = logits_WV if len(rows) == len(logits_WV) else logits_WV[rows]
        tokens = self._drawer(its, [takers[row][0].slot for row in rows])
        return dict(zip(rows, tokens.tolist(), strict=True))
