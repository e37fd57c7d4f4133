"""What the worker and an executor say to each other: JSON, descriptors, and bytes.

A message is one or more packets of a socket that keeps packets apart. The first one begins with the lengths of the header and
the data and the number of descriptors; it and the packets after it, put together, are lengths, header, data. Descriptors that
are too many for one packet go before it, in packets of one byte.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Final

from farpoint.errors import DecodeError

REQUEST: Final = struct.Struct("<4sQQI")
"""To the zygote: a verb, the serial number of an executor, the bytes of memory that it may take, its threads."""
REPLY: Final = struct.Struct("<q")
"""From the zygote."""

_LENGTHS: Final = struct.Struct("<QQI")
_PACKET: Final = 64 * 1024
_BATCH: Final = 128
_MOST_DESCRIPTORS: Final = 4_096


class Pipe:
    """One end, used by one thread at a time.

    Args:
        link: A socket of the type `SOCK_SEQPACKET`, whose owner this becomes.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._packet = bytearray(_PACKET)

    def send(
        self,
        header: Any,
        descriptors: Sequence[int] = (),
        data: Sequence[bytes | memoryview] = (),
        deadline: float | None = None,
    ) -> None:
        """Send a message.

        Args:
            header: Plain data.
            descriptors: Open files, which stay open here.
            data: Bytes beside the header.
            deadline: When to give up, on the clock of `time.monotonic`.

        Raises:
            TimeoutError: The other side did not take it in time.
            OSError: It is gone.
        """
        text = json.dumps(header).encode()
        size = sum(map(len, data))
        head = _LENGTHS.pack(len(text), size, len(descriptors)) + text
        queue = list(descriptors)
        while len(queue) > _BATCH:
            self._put([b"+"], queue[:_BATCH], deadline)
            del queue[:_BATCH]
        if len(head) + size <= _PACKET:
            self._put([head, *data], queue, deadline)
            return
        for part in (head, *data):
            rest = memoryview(part)
            while rest:
                self._put([rest[:_PACKET]], queue, deadline)
                queue, rest = [], rest[_PACKET:]

    def _put(self, parts: Sequence[bytes | memoryview], descriptors: list[int], deadline: float | None) -> None:
        self._link.settimeout(_left(deadline))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._link.sendmsg(parts, rights)

    def receive(self, most: int = 2**62, deadline: float | None = None) -> tuple[Any, list[int], memoryview]:
        """Return the header, the descriptors and the data of the next message.

        Args:
            most: How many bytes it may have.
            deadline: When to give up, on the clock of `time.monotonic`.

        Raises:
            EOFError: There is no other side any more.
            TimeoutError: It did not come in time.
            OSError: The socket failed.
            ValueError: It is no message. `DecodeError` is one.
        """
        descriptors: list[int] = []
        try:
            size = self._get(descriptors, deadline)
            while size == 1:
                size = self._get(descriptors, deadline)
            if size < _LENGTHS.size:
                raise DecodeError("a message begins with a packet that is too short")
            header, data, count = _LENGTHS.unpack_from(self._packet)
            total = _LENGTHS.size + header + data
            if total > most:
                raise DecodeError(f"a message of {total} bytes came, where {most} are enough")
            message = bytearray(memoryview(self._packet)[:size])
            while len(message) < total:
                size = self._get(descriptors, deadline)
                message += memoryview(self._packet)[:size]
            if len(message) != total or len(descriptors) != count:
                raise DecodeError("a message is longer than it says, or its descriptors are not as many")
            begin = _LENGTHS.size + header
            return json.loads(message[_LENGTHS.size : begin]), descriptors, memoryview(message)[begin:]
        except BaseException:
            close_all(descriptors)
            raise

    def _get(self, descriptors: list[int], deadline: float | None) -> int:
        self._link.settimeout(_left(deadline))
        space = socket.CMSG_SPACE(4 * _BATCH)
        size, rights, flags, _ = self._link.recvmsg_into([self._packet], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors += array.array("i", content[: len(content) // 4 * 4])
        if not size:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) > _MOST_DESCRIPTORS:
            raise DecodeError("a packet is too long, or too many descriptors came")
        return size

    def shut(self) -> None:
        """End it, also under a thread that waits in `receive`."""
        try:
            self._link.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was quicker

    def close(self) -> None:
        """Give the socket up. Nobody uses it any more."""
        self._link.close()


def close_all(descriptors: Sequence[int]) -> None:
    """Close what arrived and is not needed."""
    for descriptor in descriptors:
        os.close(descriptor)


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
