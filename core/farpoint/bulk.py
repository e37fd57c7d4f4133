"""Large tensors in chunks, between the other messages of a session.

Each chunk is a message of its own, numbered and acknowledged like any other, so a transfer goes on after a link was lost, and
others pass it. Behind the last one comes the message that the tensor belongs to, with a checksum over all of it: only then,
and only if that is right, does anybody see the tensor.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from farpoint.errors import DecodeError, FarpointError, LimitError, MalformedMessageError
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import CHUNK, WHOLE, brief
from farpoint.tensors import DTYPE_NAMES, DTYPES, check_shape, payload, room_for

if TYPE_CHECKING:
    from farpoint.channel import Channel

CHUNK_BYTES = 2**20
"""Bytes of one chunk."""

WINDOW_BYTES = 8 * 2**20
"""Bytes of chunks that are under way at a time."""


class Stream:
    """A tensor on its way out. Its memory must not change before `done` is set.

    Args:
        number: What both sides call it.
        message: The message that it belongs to.
        path: Where in the message it belongs.
        tensor: The tensor, dense.
        about: The number of the command that it answers, 0 if it answers none.
        submitted: Called with the number of the message when that is on its way, too.

    Attributes:
        total: Its bytes.
        sent: Bytes that are on their way, or have arrived.
        done: Set when the message has arrived, or never will.
    """

    def __init__(
        self,
        number: int,
        message: list[Any],
        path: list[int],
        tensor: torch.Tensor,
        about: int = 0,
        submitted: Callable[[int], None] | None = None,
    ) -> None:
        self.total = tensor.nbytes
        self.sent = 0
        self.done = threading.Event()
        self.last = 0
        self._number = number
        self._message = message
        self._path = path
        self._bytes: torch.Tensor | None = tensor.view(-1).view(torch.uint8)
        self._spec = [DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
        self._about = about
        self._submitted = submitted
        self._checksum = 0

    def load(self, session: Session) -> int:
        """Submit the next chunk, and the message behind the last one. Return how many bytes that was."""
        assert self._bytes is not None
        chunk = self._bytes[self.sent : self.sent + CHUNK_BYTES]
        self._checksum = zlib.crc32(payload(chunk), self._checksum)
        self.last = session.submit([int(Kind.CHUNK), self._number, self._about, self.sent, self.total, chunk])
        self.sent += chunk.numel()
        if self.sent == self.total:
            self._bytes = None
            message = [int(Kind.WHOLE), self._number, *self._spec, self._checksum, self._path, self._message]
            self.last = session.submit(message)
            if self._submitted is not None:
                self._submitted(self.last)
        return chunk.numel()

    def give_up(self, session: Session) -> None:
        """Say that no more will come."""
        if self.sent:
            session.submit([int(Kind.CHUNK), self._number, self._about, self.sent, self.total, torch.empty(0, dtype=torch.uint8)])
        self.done.set()

    @property
    def loaded(self) -> bool:
        """Whether all of it is on its way."""
        return self._bytes is None


class Relayed:
    """A tensor that goes out as it comes in, from somewhere else.

    Args:
        channel: Where it goes.
        message: The message that it belongs to.
        position: Where in the message it belongs.
        dtype: Its dtype.
        shape: Its shape.

    Attributes:
        total: Its bytes.
        sent: Bytes that are on their way, or have arrived.
    """

    def __init__(self, channel: Channel, message: list[Any], position: int, dtype: torch.dtype, shape: list[int]) -> None:
        self.total = math.prod(shape) * dtype.itemsize
        self.sent = 0
        self._channel = channel
        self._message = message
        self._position = position
        self._dtype = dtype
        self._shape = shape
        self._checksum = 0
        with channel.lock:
            if channel.lost is not None or channel.bulk is None:
                raise channel.ended()
            self._number = channel.bulk.new_number()

    def push(self, chunk: torch.Tensor) -> None:
        """Let the next bytes go."""
        self._checksum = zlib.crc32(payload(chunk), self._checksum)
        with self._channel.lock:
            self._channel.submit([int(Kind.CHUNK), self._number, 0, self.sent, self.total, chunk])
        self.sent += chunk.numel()

    def finish(self) -> None:
        """Let the message go, behind the last bytes."""
        if not self.total:  # nothing came before it
            self._message[self._position] = torch.zeros(self._shape, dtype=self._dtype)
        whole = [int(Kind.WHOLE), self._number, DTYPE_NAMES[self._dtype], self._shape, self._checksum, [self._position]]
        with self._channel.lock:
            self._channel.submit([*whole, self._message] if self.total else self._message)
        self._channel.flush()

    def give_up(self) -> None:
        """Say that no more will come."""
        with self._channel.lock:
            if self.sent and self._channel.lost is None:
                nothing = torch.empty(0, dtype=torch.uint8)
                self._channel.submit([int(Kind.CHUNK), self._number, 0, self.sent, self.total, nothing])


class _Arrival:
    """A tensor that is coming in."""

    def __init__(self, total: int, about: int) -> None:
        self.total = total
        self.about = about
        self.received = 0
        self.checksum = 0
        self.refusal: FarpointError | None = None
        self.bytes = torch.empty(0, dtype=torch.uint8)


class Bulk:
    """The large tensors of one channel, in both directions. Whoever calls holds the channel's lock, or is its only reader.

    Args:
        limits: What must not be exceeded.
        admit: Called with the bytes of all that is coming in, before memory is taken for it; raises if that is too much.

    Attributes:
        at_once: How many tensors are under way at a time; the peer ends the session if it is more than it takes.
    """

    def __init__(self, limits: Limits, admit: Callable[[int], None] = lambda _: None) -> None:
        self.at_once = limits.transfers
        self._limits = limits
        self._admit = admit
        self._numbers = count(1)
        self._waiting: deque[Stream] = deque()
        self._loaded: list[Stream] = []
        self._under_way: deque[tuple[int, int]] = deque()
        self._window = WINDOW_BYTES
        self._arrivals: dict[int, _Arrival] = {}

    def add(
        self,
        message: list[Any],
        path: list[int],
        tensor: torch.Tensor,
        about: int = 0,
        submitted: Callable[[int], None] | None = None,
    ) -> Stream:
        """Let a tensor go, and the message behind it. The arguments are those of `Stream`."""
        stream = Stream(self.new_number(), message, path, tensor, about, submitted)
        self._waiting.append(stream)
        return stream

    def new_number(self) -> int:
        """Return what the next tensor that goes out is called."""
        return next(self._numbers)

    @property
    def waiting(self) -> bool:
        """Whether there is more to send."""
        return bool(self._waiting)

    def cancel(self, stream: Stream, session: Session) -> None:
        """Take a tensor back that is not wholly on its way: an empty chunk says so."""
        if stream in self._waiting:
            self._waiting.remove(stream)
            stream.give_up(session)

    def load(self, session: Session) -> bool:
        """Submit the next chunk that may go now, each of the first tensors in its turn. Return whether there was one."""
        while self._under_way and self._under_way[0][0] <= session.acknowledged:
            self._window += self._under_way.popleft()[1]
        if not self._waiting or self._window <= 0:
            return False
        stream = self._waiting.popleft()
        nbytes = stream.load(session)
        self._window -= nbytes
        self._under_way.append((stream.last, nbytes))
        if stream.loaded:
            self._loaded.append(stream)
        else:
            self._waiting.insert(self.at_once - 1, stream)
        return True

    def settle(self, session: Session) -> bool:
        """Take note of what was acknowledged. Return whether more waits to be sent."""
        if self._loaded:
            for stream in [stream for stream in self._loaded if stream.last <= session.acknowledged]:
                self._loaded.remove(stream)
                stream.done.set()
        return bool(self._waiting)

    def end(self) -> None:
        """Give everything up: the session is over."""
        for stream in (*self._waiting, *self._loaded):
            stream.done.set()
        self._waiting.clear()
        self._loaded.clear()
        self._arrivals.clear()

    def take_chunk(self, message: list[Any]) -> None:
        """Take a chunk. What there is no room for is dropped as it comes.

        Raises:
            MalformedMessageError: It is not the next one.
        """
        CHUNK.check(message, self._limits)
        _, number, about, offset, total, chunk = message
        arrival = self._arrivals.get(number)
        if not chunk.numel():
            self._arrivals.pop(number, None)  # it was taken back
            return
        if arrival is None:
            arrival = self._begin(number, total, about)
        if offset != arrival.received or total != arrival.total or offset + chunk.numel() > total:
            raise MalformedMessageError("CHUNK", "offset", f"{arrival.received} of {arrival.total} bytes", f"{offset} of {total}")
        arrival.received += chunk.numel()
        if arrival.refusal is None:
            data = payload(chunk)
            arrival.checksum = zlib.crc32(data, arrival.checksum)
            payload(arrival.bytes)[offset : arrival.received] = data

    def _begin(self, number: int, total: int, about: int) -> _Arrival:
        if len(self._arrivals) >= self._limits.transfers:
            raise LimitError("transfers", self._limits.transfers, "another tensor in chunks")
        arrival = self._arrivals[number] = _Arrival(total, about)
        try:
            if total > self._limits.message_bytes:
                raise LimitError("message_bytes", self._limits.message_bytes, f"a tensor of {total} bytes")
            self._admit(sum(other.total for other in self._arrivals.values() if other.refusal is None))
            arrival.bytes = room_for(total)
        except FarpointError as error:
            arrival.refusal = error.with_traceback(None)
        except RuntimeError:
            arrival.refusal = LimitError("message_bytes", self._limits.message_bytes, f"{total} bytes, for which there is no memory")
        return arrival

    def take_whole(self, message: list[Any]) -> tuple[list[Any], FarpointError | None]:
        """Return a message with the tensor that has arrived for it, or with the reason why that was not taken.

        Raises:
            MalformedMessageError: The tensor is not there, or not what the message says.
            DecodeError: It was changed on the way.
        """
        WHOLE.check(message, self._limits)
        _, number, dtype, shape, checksum, path, inner = message
        arrival = self._arrivals.pop(number, None)
        if arrival is None or arrival.received != arrival.total:
            raise MalformedMessageError("WHOLE", "stream", "one that has arrived", str(number))
        *before, last = path
        place: Any = inner
        for index in before:
            place = place[index] if type(place) is list and index < len(place) else None
        if type(place) is not list or last >= len(place):
            raise MalformedMessageError("WHOLE", "path", "a place in the message", brief(path))
        if arrival.refusal is not None:
            return inner, arrival.refusal
        if check_shape(dtype, shape, self._limits) != arrival.total:
            raise MalformedMessageError("WHOLE", "shape", f"that of {arrival.total} bytes", brief(shape))
        if checksum != arrival.checksum:
            raise DecodeError(f"a tensor of {arrival.total} bytes was changed on the way: its checksum is wrong")
        if dtype == "bool" and bool((arrival.bytes > 1).any()):
            raise DecodeError("a bool tensor holds bytes other than 0 and 1")
        place[last] = arrival.bytes.view(DTYPES[dtype]).view(shape)
        return inner, None

    def progress(self, about: int) -> tuple[int, int]:
        """Return how many bytes of the answer to a command have come, and how many there will be; 0 if nothing has."""
        for arrival in list(self._arrivals.values()):
            if arrival.about == about:
                return arrival.received, arrival.total
        return 0, 0
