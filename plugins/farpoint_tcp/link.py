"""One end of a link over a stream: who reads, who writes, and how it ends.

One daemon thread a link reads, and calls the receiver itself: no message is handed from thread to thread. While the
receiver works that thread does not read, and two peers that write to each other from within `received` would wait for
each other for ever once the buffers between them are full. So reading is a duty (`_reading`) that the thread puts down
while the receiver works, and that others take up without waiting: whoever is stuck in a `write` of this link, and the
`Watch`, which looks after every link now and then. What they read is queued, and the reader thread delivers it.

The queue is bounded: nothing new is begun while `AHEAD` bytes are queued. A link holds that much at most, beside a message
that is being delivered and one that is arriving. Beyond it nobody reads, the peer's writes stand still, and its time-out
for a stalled write decides.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from farpoint.errors import DecodeError, TransportError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint.transport import Link, Receiver
from farpoint_tcp.framing import Assembler, Signal, drop, encode, signal
from farpoint_tcp.stream import MOMENT, Stream

if TYPE_CHECKING:
    from farpoint_tcp.watch import Watch

AHEAD = 8 * 1024 * 1024
"""Bytes that are read while the receiver works on earlier ones."""

STEP = 1024 * 1024
"""Bytes that a stuck writer reads before it tries to write again."""

PARTING = 0.1
"""Seconds to wait for a chance to tell the peer what it has done wrong."""

SPARE = 1.0
"""Seconds for which memory is kept for the next large message."""

PING, PONG = signal(Signal.PING), signal(Signal.PONG)


class StreamLink(Link):
    """A link over a connected stream.

    Args:
        stream: The connection, after the greeting.
        url: Where it leads, for errors.
        address: Where the peer is.
        identity: The name in the certificate of the peer.
        limits: Sizes and time-outs.
        watch: Who looks after it.
    """

    def __init__(
        self, stream: Stream, url: str, address: str, identity: str, limits: Limits, watch: Watch
    ) -> None:
        self.address = address
        self.identity = identity
        self._stream = stream
        self._url = url
        self._limits = limits
        self._watch = watch
        self._inbound = Assembler(limits)
        self._reading = threading.Lock()
        # Reentrant, because a signal handler may write between any two lines; `_busy` tells it when it must not.
        self._writing = threading.RLock()
        self._busy = False
        self._signals: deque[bytes] = deque()  # to be sent between messages
        self._rest = b""  # of signals that were sent in part
        self._once = threading.Lock()
        self._leaving = False  # `close` was called
        self._parted = False  # and the goodbye is out
        self._closed = False  # nothing is written any more
        self._ended = False  # nothing comes any more
        self._left = False  # nothing is delivered any more: it was closed or given up on this side
        self._cause: Exception | None = None
        self._delivering = False
        self._delivered = 0
        self._heard = self._moved = time.monotonic()
        self._asked = self._excused = 0.0

    @property
    def heard(self) -> float:
        return self._heard

    def write(self, frames: Sequence[Frame]) -> None:
        buffers = encode(frames)
        with self._writing:
            if self._closed:
                raise self._gone()
            if self._busy:
                raise TransportError(self._url, "a signal handler or a finalizer writes while its own thread does")
            self._busy = True
            try:
                self._send(buffers, self._limits.stall_seconds)
            finally:
                self._busy = False
        if self._signals:
            self._send_signals()

    def close(self) -> None:
        if not self._once.acquire(False):
            return
        self._leaving = self._closed = True
        patience = self._limits.close_seconds
        if self._writing.acquire(timeout=patience):
            try:
                if not self._busy and not self._ended:
                    self._busy = True  # for good: nothing comes behind a goodbye
                    self._send([signal(Signal.GOODBYE)], patience)
                    self._parted = True
                    self._settle(patience)
            except (TransportError, OSError):
                pass  # it has ended already, or was given up
            finally:
                self._writing.release()
        else:
            self.give_up(TransportError(self._url, f"closed while a write was stuck for {patience:g} s"))
        self._left = True
        self._stream.shut()

    def start(self, receiver: Receiver) -> None:
        """Read, and deliver, on a thread of its own."""
        threading.Thread(target=self.run, args=(receiver,), name=f"farpoint {self._url}", daemon=True).start()

    def run(self, receiver: Receiver) -> None:
        """Read, deliver, and tell how it ended: the thread that calls this does so until then."""
        try:
            self._watch.add(self)
            self._send_signals()
            self._deliver(receiver)
        finally:
            self._closed = True
            self._stream.shut()
            try:
                receiver.lost(self._verdict())
            finally:
                self._finish()

    def say_first(self, said: bytes) -> None:
        """Send this before anything else that is sent."""
        self._signals.append(said)

    def refuse(self, said: bytes) -> None:
        """Be no link after all: send this in place of what was to be said first, unless that is out already."""
        with self._writing:
            if self._signals:
                self._signals.clear()
                self._signals.append(said)
                self._send_signals()
            self._cause = TransportError(self._url, "it was not accepted")
            self._closed = self._left = True
        self._stream.close()

    def say(self, said: bytes) -> None:
        """Send a signal when no message is on the way, at once or as soon as possible. Waits for nothing."""
        if said not in self._signals:
            self._signals.append(said)
        self._send_signals()

    def look(self, now: float) -> float:
        """Do what is due without waiting, and return after how many seconds to look again."""
        ping, pong = self._limits.ping_seconds, self._limits.pong_seconds
        soon = min(1.0, ping / 4, pong / 4)
        if self._delivering:
            heard = self._heard
            self._read_ahead(AHEAD)
            if heard != self._heard:
                soon = MOMENT
            if not self._room():
                # Whatever the peer says, a ping too, is behind what there is no room for: the silence is ours.
                self._heard = now
                if now - self._excused >= ping / 2:
                    self._excused = now
                    self.say(PONG)
        if self._signals or self._rest:
            self._send_signals()
        quiet = now - max(self._heard, self._moved)
        if quiet > SPARE:
            self._inbound.trim()
        if quiet < ping or self._closed:
            self._asked = 0.0
        elif self._busy:
            pass  # a write is on the way, and has a time-out of its own
        elif not self._asked:
            self._asked = now
            self.say(PING)
        elif now - self._asked >= pong:
            self.give_up(
                TransportError(self._url, f"nothing came from there for {quiet:.3g} s, nor an answer to a ping")
            )
        return soon

    def give_up(self, cause: Exception, tell: str = "") -> None:
        """End the link at once because of something that happened here, and tell the peer if there is something to tell."""
        self._left = True
        self._break(cause, tell)

    def forked(self) -> None:
        """Be a link of the parent's, in a child that was just forked: closed, without a word to the peer."""
        self._reading, self._writing, self._once = threading.Lock(), threading.RLock(), threading.Lock()
        self._busy = False
        self._once.acquire()
        self._closed = self._ended = self._left = True
        self._cause = TransportError(self._url, "the link belongs to the process that this one was forked from")
        self._stream.forget()

    # Writing.

    def _send(self, buffers: list[Frame], patience: float) -> None:
        """Send bytes, with the signals before them. Called by who holds `_writing`.

        Raises:
            TransportError: The link is gone, or no byte was taken for as long as there was patience.
        """
        try:
            if self._signals or self._rest:
                self._gather_signals()
                buffers.insert(0, self._rest)
                self._rest = b""
            stuck = 0.0
            while True:
                # A receiver may wait for this write, or for a lock that its caller holds: then it is on us to read.
                reading = self._delivering and self._room()
                sent = self._stream.send(buffers, waiting=not reading)
                if sent:
                    if stuck:
                        self._moved, stuck = time.monotonic(), 0.0
                    if not drop(buffers, sent):
                        return
                    continue
                if self._ended:
                    raise self._gone()
                now = time.monotonic()
                stuck = stuck or now
                if now - stuck >= patience:
                    stalled = TransportError(self._url, f"the peer took nothing for {patience:g} s of a write")
                    self.give_up(stalled)
                    raise stalled
                if reading:
                    self._stream.wait()
                    self._read_ahead(STEP)
        except TransportError:
            raise
        except OSError as error:
            # What the peer wrote before is still read, perhaps a goodbye that explains it.
            self._break(self._broken(error))
            raise self._gone() from error
        except BaseException:
            self.give_up(TransportError(self._url, "a write was interrupted in the middle of a message"))
            raise

    def _settle(self, patience: float) -> None:
        """Wait until the peer's kernel has everything.

        A connection that is closed before, also by the end of this process, is reset as soon as the peer says
        anything, and takes what it still carries along.
        """
        self._stream.end_writing()
        before, since, pause = 0, time.monotonic(), 0.0001
        while not self._ended and (left := self._stream.undelivered()):
            if left != before:
                before, since = left, time.monotonic()
            elif time.monotonic() - since > patience:
                self.give_up(TransportError(self._url, f"closed, and the peer took nothing of {left} bytes for {patience:g} s"))
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.005)

    def _send_signals(self, patience: float = 0.0) -> None:
        while (self._signals or self._rest) and self._writing.acquire(timeout=patience):
            try:
                if self._busy or self._closed:
                    return  # whoever writes sends them when the message is out
                self._busy = True
                try:
                    self._gather_signals()
                    self._rest = self._rest[self._stream.send([self._rest], waiting=False) :]
                finally:
                    self._busy = False
                if self._rest:
                    return
            except OSError:
                return  # who reads will notice
            finally:
                self._writing.release()

    def _gather_signals(self) -> None:
        while self._signals:
            self._rest += self._signals.popleft()

    # Reading.

    def _deliver(self, receiver: Receiver) -> None:
        ready = self._inbound.ready
        while not self._left:
            ended = self._ended  # before the look at the queue, which others fill before they say so
            if not ready:
                if ended:
                    return
                with self._reading:
                    if not ready and not self._ended:
                        self._read(self._stream.receive)
                continue
            self._delivering = True
            try:
                while ready and not self._left:
                    frames, cost = ready.popleft()
                    self._delivered += cost
                    receiver.received(frames)
                    del frames  # or the memory of the last message stays until the next
            except BaseException as error:
                raised = error if isinstance(error, Exception) else TransportError(self._url, f"interrupted by {error!r}")
                self.give_up(raised, "the receiver of this link has failed")
                if not isinstance(error, Exception):
                    raise
            finally:
                self._delivering = False

    def _read_ahead(self, most: int) -> None:
        """Read about so much of what has come, if there is room, in place of a thread that is busy delivering."""
        if not self._reading.acquire(False):
            return
        try:
            while most > 0 and not self._ended and self._room():
                count = self._read(self._stream.receive_now)
                if count is None:
                    return
                most -= count
        finally:
            self._reading.release()

    def _read(self, receive: Callable[[memoryview], int | None]) -> int | None:
        """Read once. Return how much, None if there was nothing yet. Called by who has the duty."""
        inbound = self._inbound
        count: int | None = 0
        try:
            count = receive(inbound.space())
            if count is None:
                return None
            self._heard = time.monotonic()
            if count:
                inbound.advance(count)
                if inbound.pinged:
                    inbound.pinged = False
                    self.say(PONG)
            if not count or inbound.goodbye is not None:
                self._closed = self._ended = True
        except OSError as error:
            # TLS knows no half of a connection: the peer may complain of the end behind our goodbye.
            if not (self._parted and isinstance(error, ssl.SSLError)):
                self._break(self._broken(error))
            self._ended = True
        except Exception as error:
            # What is wrong with the peer's bytes is told, what is wrong with this code is not.
            self._break(error, str(error) if isinstance(error, DecodeError) else "")
            self._ended = True
        return count

    def _room(self) -> bool:
        inbound = self._inbound
        return inbound.midway or inbound.charged - self._delivered < AHEAD

    # The end.

    def _break(self, cause: Exception, tell: str = "") -> None:
        """End the link after what has come until now."""
        if tell:
            # Somebody may be sending a signal at this moment; a message that is on the way would take longer.
            self._signals.append(signal(Signal.GOODBYE, tell))
            self._send_signals(PARTING)
        self._cause = self._cause or cause
        self._closed = True
        self._stream.shut()

    def _verdict(self) -> Exception | None:
        goodbye = self._inbound.goodbye
        if self._left or self._leaving or goodbye is None:
            if self._cause is not None or self._left or self._leaving:
                return self._cause
            return TransportError(
                self._url, "the connection ended without a goodbye: the process over there has ended, or was cut off"
            )
        return TransportError(self._url, f"the peer has ended the link: {goodbye}") if goodbye else None

    def _gone(self) -> TransportError:
        cause = self._verdict()
        if isinstance(cause, TransportError):
            return TransportError(self._url, cause.cause)
        return TransportError(self._url, str(cause) if cause else "the link is closed")

    def _broken(self, error: OSError) -> TransportError:
        return TransportError(self._url, f"the connection broke: {error.strerror or error}")

    def _finish(self) -> None:
        self._reading.acquire()  # for good: nobody reads any more
        with self._writing:
            self._stream.close()
        self._watch.remove(self)
