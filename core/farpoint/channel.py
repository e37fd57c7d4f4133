"""One end of a session: numbered messages, a serializer, and the link that carries them now; safe for threads."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from farpoint.bulk import Bulk, Stream
from farpoint.errors import (
    DecodeError,
    FarpointError,
    ForkedPointerError,
    ProtocolError,
    TransportError,
    UnreachableError,
    WorkerLostError,
)
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.serializer import Frame, Serializer
from farpoint.surroundings import plain
from farpoint.transport import Link

BATCH = 128
"""Messages after which a packet is sent without anybody waiting for it."""

LARGE = 2**20
"""Bytes from which on a tensor is written at once, and not copied before."""

_BULK = int(Kind.CHUNK) >> 1

HEAVY = 64 * 1024
"""Bytes of a frame that is acknowledged at once: the peer keeps it until then."""


def bare(error: Exception | None) -> Exception | None:
    """Return an error that may be kept: one without a traceback, whose frames would keep their pointers."""
    return copy.copy(error) if error is not None else None


class _Thread(threading.local):
    """The channel whose messages this thread carries out, None for a thread that carries out none."""

    delivering: Channel | None = None


_thread = _Thread()


class Lane:
    """One link of a channel, and what is on its way out over it.

    Args:
        link: The link.
        held: Whether nothing is written before `Channel.release`.
    """

    def __init__(self, link: Link, *, held: bool = False) -> None:
        self.link = link
        self.out: deque[list[Frame]] = deque()
        self.busy = held


class Channel:
    """Carries the messages of one session, over one link after another.

    Packets are packed and encoded in order under the lock, and written outside it: a write may deliver at once, and what it
    delivers may come back to this channel before it returns.

    A write may also wait for the peer, unless the transport is inline. So a thread that carries out what another channel has
    brought never writes here itself, or one slow peer would hold up the others: a thread of this channel does.

    Args:
        name: Who is at the other end, for errors.
        deliver: Called with the number and content of each message that arrives, in order.
        after: Called when the messages of one packet have been delivered.
        complain: Called with the reason before a peer that breaks the protocol loses the link.
        patient: Whether the thread that carries out what this channel has brought may wait for the peer to take the answers.
        admit: Called with the bytes of large tensors that are coming in; raises if there is no room for them.
        refuse: Called with the number and content of a message whose large tensor was not taken, and with the reason.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[int, list[Any]], None],
        after: Callable[[], None],
        complain: Callable[[FarpointError], None] = lambda _: None,
        *,
        patient: bool = False,
        admit: Callable[[int], None] = lambda _: None,
        refuse: Callable[[int, list[Any], FarpointError], None] | None = None,
    ) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.lost: Exception | None = None
        self.lane: Lane | None = None
        self.inline = True
        self.heard = time.monotonic()
        self._turn = threading.RLock()
        self._deliver = deliver
        self._after = after
        self._complain = complain
        self._patient = patient
        self._admit = admit
        self._refuse = refuse
        self.bulk: Bulk | None = None
        self._writer: SimpleQueue[Lane | None] | None = None
        _channels.add(self)

    def open(self, lane: Lane, session: Session, serializer: Serializer, limits: Limits, *, inline: bool) -> None:
        """Begin to speak."""
        self.bulk = Bulk(limits, self._admit)
        self.session = session
        self.serializer = serializer
        self.inline = inline
        self.lane = lane  # last: from here on others flush

    def resume(self, lane: Lane, taken: int) -> None:
        """Go on over a new link, after the peer has said what it had taken. What was under way is sent again.

        The lane must be held: `release` lets it go.

        Raises:
            ProtocolError: The peer cannot have taken that.
        """
        with self.lock:
            if self.lost is not None:
                raise self.ended()
            lane.out.extend(self.serializer.encode(packet) for packet in self.session.resume(taken))
            before, self.lane = self.lane, lane
        if before is not None:
            before.link.close()

    def release(self, lane: Lane) -> None:
        """Let what waits for a held lane go."""
        self._hand_over(lane)

    def part(self, lane: Lane) -> bool:
        """Learn that a link is gone. Return whether it was the one in use."""
        with self.lock:
            if self.lane is not lane:
                return False
            self.lane = None
            return True

    def submit(self, message: list[Any]) -> int:
        """Take a message for the next packet and return its number. Called with the lock held.

        Raises:
            WorkerLostError: The session is over.
            ProtocolError: It was ended because the peer broke the protocol.
            ForkedPointerError: It belongs to the process that this one was forked from.
        """
        if self.lost is not None:
            raise self.ended()
        return self.session.submit(message)

    def stream(
        self,
        message: list[Any],
        path: list[int],
        tensor: torch.Tensor,
        about: int = 0,
        submitted: Callable[[int], None] | None = None,
    ) -> Stream:
        """Take a message with a large tensor, for `flush` to send in chunks. The arguments are those of `Stream`.

        Raises:
            FarpointError: As for `submit`.
        """
        with self.lock:
            if self.lost is not None or self.bulk is None:
                raise self.ended()
            return self.bulk.add(message, path, tensor, about, submitted)

    @property
    def inherited(self) -> bool:
        """Whether the link belongs to the process that this one was forked from."""
        return isinstance(self.lost, ForkedPointerError)

    def ended(self) -> FarpointError:
        """Return the error for whoever needs a session that is over. Each gets one of its own: a traceback keeps what it refers to."""
        if isinstance(self.lost, ForkedPointerError):
            return ForkedPointerError(self.lost.pointer)
        if isinstance(self.lost, UnreachableError):
            return copy.copy(self.lost)
        if isinstance(self.lost, WorkerLostError):
            return type(self.lost)(self.name, self.lost.cause)
        if isinstance(self.lost, ProtocolError | DecodeError):
            return ProtocolError(f"{self.name} broke the protocol, and the link to it was closed: {self.lost}")
        return WorkerLostError(self.name, str(self.lost))

    def flush(self) -> None:
        """Send what is waiting, if there is a link now."""
        # A worker in this process may carry it out before this returns. Where the user wants new tensors to be, by
        # `torch.device` or `farpoint.on`, is not about those that it makes, nor about ours.
        with torch._C.DisableTorchFunction():
            self._flush()

    def _flush(self) -> None:
        with self.lock:
            lane = self.lane
            if self.lost is not None or lane is None:
                return
            direct = not lane.busy and self._may_write()
            # What a worker passes on of a plan is far more than what anybody issues between two packets.
            while (packet := self.session.pack(2 * BATCH)) is not None:
                frames = self.serializer.encode(packet)
                # Frames alias tensors that may change as soon as this call returns; whoever writes will not be done by then.
                lane.out.append(frames if direct else [bytes(frame) for frame in frames])
            if self.bulk is not None and self.bulk.waiting:
                # Each chunk in a packet of its own, so that others pass; nobody changes what they alias.
                while self.bulk.load(self.session):
                    lane.out.append(self.serializer.encode(self.session.pack()))
            if lane.busy or not lane.out:
                return
            lane.busy = True
        if direct:
            self._drain(lane)
        else:
            self._hand_over(lane)

    def _may_write(self) -> bool:
        delivering = _thread.delivering
        return self.inline or delivering is None or delivering is self and self._patient

    def _hand_over(self, lane: Lane) -> None:
        """Let the thread of this channel drain a lane that is busy."""
        if self.inline:
            self._drain(lane)
            return
        with self.lock:
            if self._writer is None:
                lanes: SimpleQueue[Lane | None] = SimpleQueue()
                self._writer = lanes
                arguments = (weakref.ref(self, lambda _: lanes.put(None)), lanes)
                threading.Thread(target=_write, args=arguments, name=f"farpoint writer to {self.name}", daemon=True).start()
            self._writer.put(lane)

    def _drain(self, lane: Lane) -> None:
        while True:
            with self.lock:
                if not lane.out:
                    lane.busy = False
                    return
                frames = lane.out.popleft()
            try:
                lane.link.write(frames)
            except TransportError as error:
                with self.lock:
                    # It stays busy: whoever receives hears that the link is gone, and why.
                    lane.out.clear()
                    if self.inline:
                        self.lost = self.lost or bare(error)
                return

    def received(self, lane: Lane, frames: Sequence[Frame]) -> None:
        """Take a packet from a link. A peer that breaks the protocol costs itself the link, and nobody else anything."""
        if self.inline:
            with plain():
                self._receive(frames)
            return
        # What an earlier link has brought is carried out first, and what it brings later is sent again over this one.
        with self._turn:
            if self.lane is lane:
                self.heard = time.monotonic()
                self._receive(frames)

    def _receive(self, frames: Sequence[Frame]) -> None:
        before, _thread.delivering = _thread.delivering, self
        try:
            try:
                packet = self.serializer.decode(frames)
                with self.lock:
                    messages = self.session.receive(packet)
                    more = self.bulk is not None and self.bulk.settle(self.session)
                for number, message in messages:
                    # CHUNK and WHOLE, without a look into what may be anything.
                    if type(message) is list and message and type(message[0]) is int and message[0] >> 1 == _BULK:
                        self._take_bulk(number, message)
                    else:
                        self._deliver(number, message)
                if more and not self._patient:
                    self.flush()
            except FarpointError as error:
                self._complain(error)
                self.fail(error)
            # Nothing may go back over this channel for long, and the peer keeps what it has sent until it hears of it.
            if not self._patient and (self.session.owed >= BATCH or any(len(frame) > HEAVY for frame in frames)):
                self.flush()
            self._after()
        finally:
            _thread.delivering = before

    def _take_bulk(self, number: int, message: list[Any]) -> None:
        assert self.bulk is not None
        if message[0] == Kind.CHUNK:
            self.bulk.take_chunk(message)
            return
        inner, refusal = self.bulk.take_whole(message)
        if refusal is None:
            self._deliver(number, inner)
        elif self._refuse is not None:
            self._refuse(number, inner, refusal)
        else:
            raise refusal

    @contextmanager
    def delivering(self) -> Iterator[None]:
        """Mark this thread as one that carries out what the channel has brought."""
        before, _thread.delivering = _thread.delivering, self
        try:
            yield
        finally:
            _thread.delivering = before

    def may_wait(self) -> bool:
        """Return whether this thread may wait for the peer.

        It must not while it delivers, for it may be the one that would bring what it waits for, nor while it holds the lock
        that whoever brings it needs.
        """
        return _thread.delivering is None and not self.lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition does

    def fail(self, cause: Exception) -> None:
        """Give the session up."""
        with self.lock:
            if self.lost is None:
                self.lost = bare(cause)
            lane = self.lane
        if lane is not None:
            lane.link.close()

    def end(self) -> None:
        """Let go of what is under way, and of the writing thread, if there is one. Called when the session is over."""
        with self.lock:
            if self.bulk is not None:
                self.bulk.end()
            if self._writer is not None:
                self._writer.put(None)


def _write(reference: weakref.ref[Channel], lanes: SimpleQueue[Lane | None]) -> None:
    """Drain the lanes that a channel hands over, until it is over or forgotten."""
    while (lane := lanes.get()) is not None:
        channel = reference()
        if channel is None:
            return
        channel._drain(lane)
        del channel


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def disown_channels() -> None:
    """Mark every channel as the parent's, in a child that was just forked.

    Nothing is written to the links, nor are they closed: the parent goes on speaking over them. A lock may have been held by a
    thread that does not exist here, so each channel gets a new one.
    """
    for channel in list(_channels):
        channel.lock = threading.RLock()
        channel.lost = ForkedPointerError(f"a pointer to {channel.name}")
