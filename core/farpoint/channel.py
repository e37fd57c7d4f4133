"""One end of a session: link, serializer and numbered messages in one place, safe for threads."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from farpoint.errors import (
    DecodeError,
    FarpointError,
    ForkedPointerError,
    ProtocolError,
    TransportError,
    WorkerLostError,
)
from farpoint.protocol.session import Session
from farpoint.serializer import Frame, Serializer
from farpoint.transport import Link

BATCH = 128
"""Messages after which a packet is sent without anybody waiting for it."""

LARGE = 2**20
"""Bytes from which on a tensor is written at once, and not copied before."""


def bare(error: Exception | None) -> Exception | None:
    """Return an error that may be kept: one without a traceback, whose frames would keep their pointers."""
    return copy.copy(error) if error is not None else None


class _Thread(threading.local):
    """Whether this thread is carrying out what a link has brought."""

    delivering = False


_thread = _Thread()


class Channel:
    """Carries the messages of one session over one link.

    Packets are packed and encoded in order under the lock, and written outside it: a write may deliver at once, and what it
    delivers may come back to this channel before it returns.

    Args:
        name: Who is at the other end, for errors.
        deliver: Called with the number and content of each message that arrives, in order.
        after: Called when the messages of one packet have been delivered.
        complain: Called with the reason before a peer that breaks the protocol loses the link.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[int, list[Any]], None],
        after: Callable[[], None],
        complain: Callable[[FarpointError], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.lost: Exception | None = None
        self._deliver = deliver
        self._after = after
        self._complain = complain
        self._out: deque[list[Frame]] = deque()
        self._writing = False
        self.link: Link | None = None
        _channels.add(self)

    def open(self, link: Link, session: Session, serializer: Serializer) -> None:
        """Begin to speak."""
        self.session = session
        self.serializer = serializer
        self.link = link  # last: from here on others flush

    def submit(self, message: list[Any]) -> int:
        """Take a message for the next packet and return its number. Called with the lock held.

        Raises:
            WorkerLostError: The link is gone.
            ProtocolError: It was closed because the peer broke the protocol.
            ForkedPointerError: It belongs to the process that this one was forked from.
        """
        if self.lost is not None:
            raise self.ended()
        return self.session.submit(message)

    @property
    def inherited(self) -> bool:
        """Whether the link belongs to the process that this one was forked from."""
        return isinstance(self.lost, ForkedPointerError)

    def ended(self) -> FarpointError:
        """Return the error for whoever needs a link that is gone. Each gets one of its own: a traceback keeps what it refers to."""
        if isinstance(self.lost, ForkedPointerError):
            return ForkedPointerError(self.lost.pointer)
        if isinstance(self.lost, ProtocolError | DecodeError):
            return ProtocolError(f"{self.name} broke the protocol, and the link to it was closed: {self.lost}")
        return WorkerLostError(self.name, str(self.lost))

    def flush(self) -> None:
        """Send what is waiting."""
        with self.lock:
            link = self.link
            if self.lost is not None or link is None:
                return
            packet = self.session.pack()
            if packet is None and not self._out:
                return
            busy = self._writing
            if packet is not None:
                frames = self.serializer.encode(packet)
                # Frames alias tensors that may change as soon as this call returns; whoever writes will not be done by then.
                self._out.append([bytes(frame) for frame in frames] if busy else frames)
            if busy:
                return
            self._writing = True
        while True:
            with self.lock:
                if not self._out:
                    self._writing = False
                    return
                frames = self._out.popleft()
            try:
                link.write(frames)
            except TransportError as error:
                with self.lock:
                    self._writing = False
                    self.lost = self.lost or bare(error)
                return

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a packet from the link. A peer that breaks the protocol costs itself the link, and nobody else anything."""
        delivering = _thread.delivering
        _thread.delivering = True
        try:
            packet = self.serializer.decode(frames)
            with self.lock:
                messages = self.session.receive(packet)
            for number, message in messages:
                self._deliver(number, message)
        except FarpointError as error:
            self._complain(error)
            self.fail(error)
        finally:
            _thread.delivering = delivering
        self._after()

    def may_wait(self) -> bool:
        """Return whether this thread may wait for the peer.

        It must not while it delivers, for it may be the one that would bring what it waits for, nor while it holds the lock
        that whoever brings it needs.
        """
        return not _thread.delivering and not self.lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition does

    def fail(self, cause: Exception) -> None:
        """Give the link up."""
        with self.lock:
            if self.lost is None:
                self.lost = bare(cause)
        if self.link is not None:
            self.link.close()


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def disown_channels() -> None:
    """Mark every channel as the parent's, in a child that was just forked.

    Nothing is written to the links, nor are they closed: the parent goes on speaking over them. A lock may have been held by a
    thread that does not exist here, so each channel gets a new one.
    """
    for channel in list(_channels):
        channel.lock = threading.RLock()
        channel.lost = ForkedPointerError(f"a pointer to {channel.name}")
