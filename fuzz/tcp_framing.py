"""Fuzz the reader of what comes over tcp, tls and unix links: the same bytes in pieces of two sizes make the same messages."""

from __future__ import annotations

from farpoint.errors import DecodeError
from farpoint_tcp.framing import Assembler, Signal, encode, signal
from fuzz.target import LIMITS, Target

_STEP = 50


def _run(data: bytes) -> bool:
    piece, stream = data[:1], data[1:]
    found = _read(stream, _STEP * piece[0] + 1 if piece else 1)
    assert found == _read(stream, len(stream) or 1), "what bytes mean depends on where they were cut"
    return found[2] is None


def _read(stream: bytes, size: int) -> tuple[list[list[bytes]], str | None, type[Exception] | None]:
    """Return the messages and the goodbye of a stream, and what it was refused with."""
    assembler = Assembler(LIMITS)
    view, error = memoryview(stream), None
    try:
        while view and assembler.goodbye is None:
            space = assembler.space()
            assert space, "there is no room for what comes"
            piece = view[: min(size, len(space))]
            space[: len(piece)] = piece
            view = view[len(piece) :]
            assembler.advance(len(piece))
    except DecodeError as refusal:
        error = type(refusal)
    messages = [[bytes(frame) for frame in frames] for frames, _ in assembler.ready]
    assert sum(len(frame) for frames in messages for frame in frames) <= len(stream)
    assert assembler.charged == sum(cost for _, cost in assembler.ready)
    return messages, assembler.goodbye, error


def _seeds() -> list[bytes]:
    small = b"".join(encode([b"header", b"tensor", b""]))
    large = b"".join(encode([b"h" * 100, b"t" * 20_000, b"u"]))
    streams = [large, small * 3 + signal(Signal.PING) + large, signal(Signal.PONG) + small * 2, small + signal(Signal.GOODBYE, "too much")]
    return [*(b"\0" + each for each in (small, streams[-1])), *(bytes([piece]) + stream for stream in streams for piece in (1, 200))]


TARGET = Target("tcp", _run, _seeds, (bytes(7), b"\0\0\0\0\3\7\0goodbye", b"\1\0\0\0" + bytes(8)))
