"""What is to be written: filled by any thread, emptied by the one that runs the event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from farpoint.errors import TransportError
from farpoint.serializer import Frame
from farpoint_websocket.wire import CHUNK, FRAME_COST, chunks, flatten, header

SMALL = 64 * 1024
"""Bytes up to which a message is copied, so that its writer need not wait until it is sent."""

BACKLOG = 1024 * 1024
"""Cost of such copies beyond which writers wait."""

_waiting: dict[int, tuple[Outbox, float]] = {}
"""The threads that are inside `Outbox.put` and wait: for what, and since when."""


@attrs.define(eq=False)
class _Parcel:
    """A message: one chunk of a small one, or the pieces of a large one and the event its writer waits for."""

    pieces: Sequence[Frame]
    left: int
    cost: int
    sent: threading.Event | None = None
    error: TransportError | None = None


class Outbox:
    """The messages of one link that are not sent yet, in order.

    `put`, `close` and `drop` may be called from any thread; `take` and `taken` by the one that sends. The lock is reentrant, so
    that a signal handler or a finalizer that writes does not wait for the thread it has interrupted.

    Args:
        url: Where the link leads, for errors.
        wake: Called when there is something to send or the end has come, and the sender found nothing before.
        broken: Called with the cause when a message was given up half-way.
    """

    def __init__(self, url: str, wake: Callable[[], None], broken: Callable[[Exception], None]) -> None:
        self.moved = time.monotonic()
        self._url = url
        self._wake = wake
        self._broken = broken
        self._change = threading.Condition()
        self._parcels: deque[_Parcel] = deque()
        self._backlog = 0
        self._asleep = True
        self._refusal = ""
        self._large: _Parcel | None = None
        self._chunks: Iterator[Frame] = iter(())
        self._on_the_way = 0

    def put(self, frames: Sequence[Frame]) -> None:
        """Take a message. Wait until there is room for a small one, until it was sent for a large one.

        Raises:
            TransportError: The link is gone.
        """
        flat = [flatten(frame) for frame in frames]
        sizes = [len(frame) for frame in flat]
        head = header(sizes)
        left = len(head) + sum(sizes)
        cost = left + FRAME_COST * len(sizes)
        if left <= SMALL:
            parcel = _Parcel((b"".join((head, *flat)),), left, cost)
        else:
            parcel = _Parcel((head, *flat), left, cost, threading.Event())
        with self._change:
            if parcel.sent is None and self._backlog >= BACKLOG and not self._refusal:
                self._wait(lambda: self._change.wait_for(lambda: self._backlog < BACKLOG or self._refusal))
            if self._refusal:
                raise TransportError(self._url, self._refusal)
            self._parcels.append(parcel)
            if parcel.sent is None:
                self._backlog += cost
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._wake()
        if parcel.sent is not None:
            try:
                self._wait(parcel.sent.wait)
            except BaseException:
                self._give_up(parcel)
                raise
            if parcel.error is not None:
                raise parcel.error

    def take(self) -> tuple[Frame, int] | None:
        """Return the next chunk and its cost, None if there is nothing to send."""
        with self._change:
            if self._large is None:
                if not self._parcels:
                    self._asleep = True
                    return None
                if self._parcels[0].sent is None:
                    return self._gather()
                self._large = self._parcels.popleft()
                self._chunks = chunks(self._large.pieces)
                cost = self._large.cost - self._large.left
            else:
                cost = 0
            chunk = next(self._chunks)
            self._on_the_way = len(chunk)
            return chunk, cost + len(chunk)

    def taken(self) -> None:
        """Note that the chunk was sent, and that its memory is not needed any more."""
        self.moved = time.monotonic()
        with self._change:
            if self._large is None:
                return
            self._large.left -= self._on_the_way
            if not self._large.left:
                _release(self._large)
                self._large, self._chunks = None, iter(())

    def close(self, why: str) -> None:
        """Take no further message; those that were taken are still sent."""
        with self._change:
            self._refusal = self._refusal or why
            self._change.notify_all()
            self._asleep = False
        self._wake()

    def drop(self, why: str) -> None:
        """Take no further message, and give those up that were not sent."""
        with self._change:
            self._refusal = self._refusal or why
            dropped = [self._large] if self._large is not None else []
            dropped += self._parcels
            self._large, self._chunks = None, iter(())
            self._parcels.clear()
            self._backlog = 0
            for parcel in dropped:
                parcel.error = TransportError(self._url, f"{why}, before this message was sent")
                _release(parcel)
            self._change.notify_all()

    @property
    def closed(self) -> bool:
        """Whether no further message is taken."""
        return bool(self._refusal)

    @property
    def empty(self) -> bool:
        """Whether everything that was taken has been sent."""
        return not self._parcels and self._large is None

    def _gather(self) -> tuple[Frame, int]:
        """Put small messages into one chunk."""
        parts: list[Frame] = []
        cost = 0
        while self._parcels and self._parcels[0].sent is None:
            parcel = self._parcels[0]
            if parts and cost + parcel.cost > CHUNK:
                break
            parts += parcel.pieces
            cost += parcel.cost
            self._parcels.popleft()
        crowded = self._backlog >= BACKLOG
        self._backlog -= cost
        if crowded:
            self._change.notify_all()
        return parts[0] if len(parts) == 1 else b"".join(parts), cost

    def _give_up(self, parcel: _Parcel) -> None:
        """Forget a message whose writer was interrupted. If part of it was sent, the link is of no use any more."""
        with self._change:
            if parcel in self._parcels:
                self._parcels.remove(parcel)
                return
            begun = self._large is parcel
        if begun:
            self._broken(TransportError(self._url, "a write was interrupted in the middle of a message"))

    def _wait(self, wait: Callable[[], object]) -> None:
        """Wait for something, and let `stuck` know."""
        thread = threading.get_ident()
        _waiting[thread] = self, time.monotonic()
        try:
            wait()
        finally:
            _waiting.pop(thread, None)


def _release(parcel: _Parcel) -> None:
    """Let the writer of a message go on, who may reuse its memory."""
    parcel.pieces = ()
    if parcel.sent is not None:
        parcel.sent.set()


def stuck(thread: int, seconds: float) -> bool:
    """Return whether a thread is inside a write that has made no progress for so long."""
    if thread not in _waiting:
        return False
    outbox, since = _waiting[thread]
    return time.monotonic() - max(since, outbox.moved) > seconds
