"""The bytes of a link: what stands between the messages of a stream.

A link begins with one greeting in each direction. All integers are little-endian::

    who dials       ┌─────────────────────────┬────────────┬───────────────┬──────────────┐
                    │ "farpoint" CR LF CR LF  │ version u8 │ length n  u16 │ token, UTF-8 │   n <= 4096
                    └─────────────────────────┴────────────┴───────────────┴──────────────┘
    who listens     ┌─────────────────────────┬────────────┬───────────┐
                    │ "FARPOINT" CR LF CR LF  │ version u8 │ answer u8 │   see `Answer`
                    └─────────────────────────┴────────────┴───────────┘

The empty lines make an HTTP server answer at once that this is no request, so that the error can name it. The two differ,
so that nobody who sends back what he hears is taken for a listener.

After that each direction carries messages and, between two messages, signals::

    message         ┌─────────────┬─────────────────────┬──────────────────────────────────────────┐
                    │ count c u32 │ size of each: c u64 │ the bytes of each, one behind the other  │   c >= 1
                    └─────────────┴─────────────────────┴──────────────────────────────────────────┘
    signal          ┌─────────────┬──────────┬──────────────┬─────────────┐
                    │ 0       u32 │ kind u8  │ length n u16 │ text, UTF-8 │   see `Signal`; n <= 2000
                    └─────────────┴──────────┴──────────────┴─────────────┘

Count and sizes are checked against the limits of the receiver before anything is allocated for them.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Sequence

from farpoint.errors import DecodeError, LimitError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint_tcp.memory import Memory

MAGIC = b"farpoint\r\n\r\n"
ANSWER_MAGIC = b"FARPOINT\r\n\r\n"
VERSION = 1
TOKEN_BYTES = 4096
TEXT_BYTES = 2000

STAGE = 64 * 1024
"""Bytes of the buffer that small messages are picked from."""

DIRECT = 16 * 1024
"""Size from which on a message is received into memory of its own, and not by way of the stage."""

_COUNT = struct.Struct("<I")
_SINGLE = struct.Struct("<IQ")

FRAME_COST = 256
"""Bytes that a frame costs beside its content: what Python keeps for a view of it."""


class Answer(enum.IntEnum):
    """What a listener answers to a greeting. There is one answer for every reason not to let somebody in."""

    WELCOME = 0
    NOT_LET_IN = 1
    NO_ROOM = 2
    OTHER_VERSION = 3
    FAILED = 4


class Signal(enum.IntEnum):
    """What is said between messages.

    * PING is answered with a PONG. A PONG may come unasked, from somebody who has no room to read.
    * GOODBYE ends this direction; a text says what the peer has done wrong.
    """

    PING = 1
    PONG = 2
    GOODBYE = 3


def greeting(token: bytes) -> bytes:
    """Return what the side that dials says first."""
    return MAGIC + struct.pack("<BH", VERSION, len(token)) + token


def answer(what: Answer) -> bytes:
    """Return what the side that listens says first."""
    return ANSWER_MAGIC + bytes((VERSION, what))


def signal(kind: Signal, text: str = "") -> bytes:
    """Return the bytes of a signal."""
    said = text.encode(errors="replace")[:TEXT_BYTES]
    return struct.pack("<IBH", 0, kind, len(said)) + said


def encode(frames: Sequence[Frame]) -> list[Frame]:
    """Return the bytes of a message as few buffers, the large ones of them the frames themselves.

    Raises:
        ValueError: It has no frames.
    """
    if len(frames) == 1 and type(frames[0]) is bytes and len(frames[0]) < DIRECT:  # what most messages are
        return [_SINGLE.pack(1, len(frames[0])) + frames[0]]
    if not frames:
        raise ValueError("a message has at least one frame")
    sizes = [frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames]
    head = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    if len(head) + sum(sizes) <= DIRECT:
        return [b"".join((head, *frames))]
    buffers: list[Frame] = []
    small: list[Frame] = [head]
    for frame, size in zip(frames, sizes, strict=True):
        if size < DIRECT:
            if size:
                small.append(frame)
            continue
        if small:
            buffers.append(b"".join(small))
            small = []
        buffers.append(memoryview(frame).cast("B"))
    if small:
        buffers.append(b"".join(small))
    return buffers


def drop(buffers: list[Frame], sent: int) -> bool:
    """Take bytes from the front. Return whether any are left."""
    whole = 0
    while whole < len(buffers) and sent >= len(buffers[whole]):
        sent -= len(buffers[whole])
        whole += 1
    del buffers[:whole]
    if sent:
        buffers[0] = memoryview(buffers[0])[sent:]
    return bool(buffers)


class Assembler:
    """Makes messages of bytes: takes bytes where they fell, and keeps what became whole.

    Whoever reads asks for `space`, puts bytes there and says how many with `advance`. Small messages are picked from a
    stage and copied out of it; a larger one gets memory of its own and is received in place.

    Attributes:
        ready: Messages that are whole and not yet delivered, each with the bytes that it costs.
        charged: What all messages until now have cost.
        pinged: Whether a ping came since this was set to False.
        goodbye: The text of the goodbye, None as long as there was none. Nothing is read behind it.
    """

    def __init__(self, limits: Limits) -> None:
        self.ready: deque[tuple[list[Frame], int]] = deque()
        self.charged = 0
        self.pinged = False
        self.goodbye: str | None = None
        self._limits = limits
        self._most = limits.message_bytes + limits.header_bytes
        self._memory = Memory()
        self._stage = memoryview(bytearray(STAGE))
        self._start = 0
        self._end = 0
        self._need = 4
        self._body: memoryview | None = None
        self._filled = 0
        self._sizes: tuple[int, ...] = ()

    @property
    def midway(self) -> bool:
        """Whether a message of its own memory has begun and is not whole."""
        return self._body is not None

    def space(self) -> memoryview:
        """Return where the next bytes go. It is never empty."""
        if self._body is not None:
            return self._body[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._stage) - self._end < DIRECT:
            have = self._end - self._start
            self._stage[:have] = bytes(self._stage[self._start : self._end])
            self._start, self._end = 0, have
        return self._stage[self._end :]

    def advance(self, count: int) -> None:
        """Take note that so many bytes have come.

        Raises:
            LimitError: They announce more than the limits allow.
            DecodeError: They are not what a peer of ours writes.
        """
        if self._body is None:
            self._end += count
            while self._end - self._start >= self._need and self.goodbye is None and self._pick():
                pass
            return
        self._filled += count
        if self._filled == len(self._body):
            body, self._body = self._body, None
            self._keep(_split(body, self._sizes), len(body))

    def trim(self) -> None:
        """Keep no memory for messages to come."""
        self._memory.trim()

    def _pick(self) -> bool:
        """Take one thing from the stage. Return False if it is not whole, and note how many bytes would make it so."""
        stage, start = self._stage, self._start
        have = self._end - start
        if have >= 12:
            count, size = _SINGLE.unpack_from(stage, start)
            if count == 1 and size <= have - 12 and size <= self._most:  # what most messages are
                self._start = start + 12 + size
                self._need = 4
                self._keep([bytes(stage[start + 12 : self._start])], size)
                return True
        (count,) = _COUNT.unpack_from(stage, start)
        if not count:
            return self._pick_signal()
        allowed = self._limits.tensors + 1
        if count > allowed:
            raise LimitError("tensors", self._limits.tensors, f"a message of {count} frames")
        table = 4 + 8 * count
        if have < table:
            self._wait_for(table)
            return False
        sizes = struct.unpack_from(f"<{count}Q", stage, start + 4)
        total = sum(sizes)
        if total > self._most:
            raise LimitError("message_bytes", self._limits.message_bytes, f"a message of {total} bytes")
        begin = start + table
        if have >= table + total:
            self._start = begin + total
            self._need = 4
            self._keep(_split(memoryview(bytes(stage[begin : self._start])), sizes), total)
            return True
        if table + total <= DIRECT:
            self._wait_for(table + total)
            return False
        body = self._memory.take(total)
        self._filled = have - table
        body[: self._filled] = stage[begin : self._end]
        self._body, self._sizes = body, sizes
        self._start = self._end = 0
        self._need = 4
        return False

    def _pick_signal(self) -> bool:
        have = self._end - self._start
        if have < 7:
            self._need = 7
            return False
        _, kind, length = struct.unpack_from("<IBH", self._stage, self._start)
        if length > (TEXT_BYTES if kind == Signal.GOODBYE else 0):
            raise DecodeError(f"a signal of kind {kind} with a text of {length} bytes")
        if have < 7 + length:
            self._need = 7 + length
            return False
        text = bytes(self._stage[self._start + 7 : self._start + 7 + length]).decode(errors="replace")
        self._start += 7 + length
        self._need = 4
        if kind == Signal.PING:
            self.pinged = True
        elif kind == Signal.GOODBYE:
            self.goodbye = "".join(letter if letter.isprintable() else " " for letter in text)
        elif kind != Signal.PONG:
            raise DecodeError(f"signal {kind} is unknown")
        return True

    def _wait_for(self, need: int) -> None:
        """Note that so many bytes must be in the stage before it is worth another look, and make it long enough."""
        self._need = need
        if need > len(self._stage) - DIRECT:
            longer = memoryview(bytearray(need + DIRECT))
            have = self._end - self._start
            longer[:have] = self._stage[self._start : self._end]
            self._stage, self._start, self._end = longer, 0, have

    def _keep(self, frames: list[Frame], size: int) -> None:
        cost = size + FRAME_COST * len(frames)
        self.charged += cost
        self.ready.append((frames, cost))


def _split(body: memoryview, sizes: Sequence[int]) -> list[Frame]:
    frames: list[Frame] = []
    end = 0
    for size in sizes:
        frames.append(body[end : end + size])
        end += size
    return frames
