"""What travels over a WebSocket: a stream of messages in binary ones, and notices in text ones.

The binary messages of one direction, put together, are a stream of farpoint messages. They are chunks of at most
`MAX_CHUNK` bytes, and where one ends means nothing: a large message takes many of them, many small ones share one.
A farpoint message is a header and its frames, with numbers in network order::

    0         4              12                      4+8n
    +---------+--------------+-----+-----------------+---------+-----+---------+
    | n   u32 | size 1   u64 | ... | size n      u64 | frame 1 | ... | frame n |
    +---------+--------------+-----+-----------------+---------+-----+---------+

A notice is one text message, and may come between any two chunks:

=============  ==========================================================================================
`credit 8192`  8192 more may be sent. The first one also says that the link was accepted
`waiting`      I want to send, and have no credit left: is your receiver alive?
`busy`         it is; it works on a message, or waits for somebody who does
`bye`          this was all that I write. Who hears it writes what it has, and says it as well
=============  ==========================================================================================

Credit is counted in bytes of the stream, and `FRAME_COST` more for each frame: what is small on the way is not small
in memory. Who has any credit may send a chunk, and owes the rest.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence

import attrs

from farpoint.errors import DecodeError, LimitError
from farpoint.limits import Limits
from farpoint.serializer import Frame

SUBPROTOCOL = "farpoint.1"

MAX_CHUNK = 1024 * 1024
"""Bytes of the largest chunk that is accepted."""

CHUNK = 256 * 1024
"""Bytes of the chunks that are sent."""

FRAME_COST = 256

WAITING, BUSY, BYE = "waiting", "busy", "bye"

_CREDIT = re.compile(r"credit ([0-9]{1,15})", re.ASCII)
_COUNT = struct.Struct("!I")


def credit(amount: int) -> str:
    """Return the notice that grants an amount."""
    return f"credit {amount}"


def read_credit(notice: str) -> int | None:
    """Return what a notice grants, None if it is another one."""
    match = _CREDIT.fullmatch(notice)
    return int(match[1]) if match else None


def header(sizes: Sequence[int]) -> bytes:
    """Return the header of a message whose frames have these sizes."""
    return struct.pack(f"!I{len(sizes)}Q", len(sizes), *sizes)


def flatten(frame: Frame) -> Frame:
    """Return a frame as something whose length is its size in bytes, without a copy where it is contiguous."""
    if not isinstance(frame, memoryview):
        return frame
    return frame.cast("B") if frame.c_contiguous and frame.nbytes else frame.tobytes()


def chunks(pieces: Iterable[Frame]) -> Iterator[Frame]:
    """Cut flat pieces into chunks. Large ones are only sliced, small ones are gathered."""
    gathered: list[memoryview] = []
    size = 0
    for piece in pieces:
        view = memoryview(piece)
        while view:
            if not gathered and len(view) >= CHUNK:
                yield view[:CHUNK]
                view = view[CHUNK:]
                continue
            part = view[: CHUNK - size]
            view = view[len(part) :]
            gathered.append(part)
            size += len(part)
            if size == CHUNK:
                yield b"".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


@attrs.frozen
class Message:
    """A message that has arrived.

    Attributes:
        frames: What it consists of; they share memory.
        cost: What it has cost of the credit.
    """

    frames: list[Frame]
    cost: int


class Assembly:
    """Makes messages of chunks. A message takes the memory of what has arrived of it, never what it claims to be.

    Args:
        limits: What is refused.

    Attributes:
        arrived: The cost of everything so far.
    """

    def __init__(self, limits: Limits) -> None:
        self.arrived = 0
        self._frames = limits.tensors + 1
        self._bytes = limits.message_bytes + limits.header_bytes
        self._rest = b""
        self._sizes: tuple[int, ...] | None = None
        self._total = 0
        self._body = bytearray()

    def feed(self, chunk: bytes | bytearray) -> list[Message]:
        """Take a chunk and return the messages that it completes.

        Raises:
            DecodeError: It is not what `chunks` makes.
            LimitError: It belongs to a message that exceeds the limits.
        """
        self.arrived += len(chunk)
        view = memoryview(self._rest + chunk if self._rest else chunk)
        self._rest = b""
        messages: list[Message] = []
        while view:
            if self._sizes is None:
                sizes = self._read_header(view)
                if sizes is None:
                    self._rest = bytes(view)
                    break
                view = view[4 + 8 * len(sizes) :]
                total = sum(sizes)
                if total > self._bytes:
                    raise LimitError("message_bytes", self._bytes, total)
                self.arrived += FRAME_COST * len(sizes)
                if total <= len(view):
                    messages.append(_cut(view, sizes))
                    view = view[total:]
                    continue
                self._sizes, self._total, self._body = sizes, total, bytearray()
            part = view[: self._total - len(self._body)]
            self._body += part
            view = view[len(part) :]
            if len(self._body) == self._total:
                messages.append(_cut(memoryview(self._body), self._sizes))
                self._sizes, self._body = None, bytearray()
        return messages

    def _read_header(self, view: memoryview) -> tuple[int, ...] | None:
        """Return the sizes that a header announces, None if it is not complete."""
        if len(view) < 4:
            return None
        (count,) = _COUNT.unpack_from(view)
        if not count:
            raise DecodeError("a message without frames")
        if count > self._frames:
            raise LimitError("tensors", self._frames - 1, count - 1)
        if len(view) < 4 + 8 * count:
            return None
        return struct.unpack_from(f"!{count}Q", view, 4)


def _cut(view: memoryview, sizes: tuple[int, ...]) -> Message:
    frames: list[Frame] = []
    place = 0
    for size in sizes:
        frames.append(view[place : place + size])
        place += size
    return Message(frames, 4 + 8 * len(sizes) + place + FRAME_COST * len(sizes))
