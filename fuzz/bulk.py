"""Fuzz the assembly of large tensors from chunks."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from farpoint.bulk import Bulk
from farpoint.errors import DecodeError, ProtocolError, QuotaError
from farpoint.protocol.messages import Kind
from farpoint.tensors import payload
from farpoint_msgpack.serializer import MsgpackSerializer
from fuzz.target import LIMITS, Target

_ROOM = 2**19
_serializer = MsgpackSerializer(LIMITS)


def _run(data: bytes) -> bool:
    """Take a list of messages. Chunks are written as bytes there, for nobody has a frame for each."""
    bulk = Bulk(LIMITS, _admit)
    said: dict[int, bytes] = {}
    try:
        for message in _messages(data):
            if message[0] == Kind.CHUNK:
                bulk.take_chunk(message)
                number, chunk = message[1], bytes(payload(message[5]))
                said[number] = said.get(number, b"") + chunk if chunk else b""
            elif message[0] == Kind.WHOLE:
                inner, refusal = bulk.take_whole(message)
                if refusal is not None:
                    return False
                assert bytes(payload(_at(inner, message[5]))) == said.pop(message[1])
            _check(bulk)
    except (DecodeError, ProtocolError):
        return False
    return True


def _admit(nbytes: int) -> None:
    if nbytes > _ROOM:
        raise QuotaError("bob", "bytes", _ROOM, f"{nbytes} bytes")


def _check(bulk: Bulk) -> None:
    arrivals = bulk._arrivals.values()
    assert len(arrivals) <= LIMITS.transfers
    assert sum(arrival.bytes.nbytes for arrival in arrivals) <= _ROOM
    assert all(arrival.received <= arrival.total for arrival in arrivals)


def _messages(data: bytes) -> list[list[Any]]:
    tree = _serializer.decode([data])
    if type(tree) is not list:
        raise DecodeError("no list")
    found: list[list[Any]] = [item for item in tree if type(item) is list and item and type(item[0]) is int]
    for message in found:
        if message[0] == Kind.CHUNK and len(message) == 6 and type(message[5]) is bytes:
            message[5] = torch.frombuffer(bytearray(message[5]), dtype=torch.uint8) if message[5] else torch.empty(0, dtype=torch.uint8)
    return found


def _at(inner: Any, path: list[int]) -> Any:
    for index in path:
        inner = inner[index]
    return inner


def _seeds() -> list[bytes]:
    data, flags = bytes(range(24)), b"\1\0\1"
    parts = [[int(Kind.CHUNK), 1, 0, start, 24, data[start : start + 8]] for start in (0, 8, 16)]
    whole = [int(Kind.WHOLE), 1, "float32", [2, 3], zlib.crc32(data), [2], [int(Kind.PUT), 6, None, False, [], ""]]
    other = [int(Kind.CHUNK), 2, 3, 0, 3, flags]
    answer = [int(Kind.WHOLE), 2, "bool", [3], zlib.crc32(flags), [2, 1], [int(Kind.ANSWER), 3, ["tensor", None, False, [], ""]]]
    said: list[Any] = [[*parts, whole], [parts[0], other, *parts[1:], answer, whole], [parts[0], [*parts[1][:5], b""]], [*parts, whole, *parts, whole]]
    return [bytes(_serializer.encode(each)[0]) for each in said]


TARGET = Target("bulk", _run, _seeds, (b"\x96\x20", b"\x97\x21", b"\xa4bool", b"\xa9complex32", b"\x90", b"\xcf\0\0\0\1\0\0\0\0"))
