"""Fuzz the reader of what comes over websockets: the same bytes in chunks of two sizes make the same messages."""

from __future__ import annotations

from farpoint.errors import DecodeError
from farpoint_websocket.wire import MAX_CHUNK, Assembly, chunks, header, read_credit
from fuzz.target import LIMITS, Target

_STEP = 50


def _run(data: bytes) -> bool:
    size, stream = data[:1], data[1:]
    amount = read_credit(stream[:64].decode("latin-1"))
    assert amount is None or 0 <= amount < 10**15
    found, error = _read(stream, _STEP * size[0] + 1 if size else 1)
    whole, same_error = _read(stream, MAX_CHUNK)
    # What is refused ends the link, with what was complete in the same chunk.
    assert error == same_error
    assert found == whole or error is not None, "what bytes mean depends on where they were cut"
    return error is None


def _read(stream: bytes, size: int) -> tuple[list[list[bytes]], type[Exception] | None]:
    """Return the messages of a stream, and what it was refused with."""
    assembly = Assembly(LIMITS)
    messages: list[list[bytes]] = []
    for place in range(0, len(stream), size):
        try:
            made = assembly.feed(stream[place : place + size])
        except DecodeError as refusal:
            return messages, type(refusal)
        messages += [[bytes(frame) for frame in message.frames] for message in made]
        assert len(assembly._body) + len(assembly._rest) <= len(stream)
    return messages, None


def _seeds() -> list[bytes]:
    def message(*frames: bytes) -> bytes:
        return b"".join(chunks([header([len(frame) for frame in frames]), *frames]))

    small, large = message(b"header", b"tensor", b""), message(b"h" * 100, b"t" * 2_000)
    streams = [large, small * 3 + large + small]
    return [*(b"\0" + each for each in (small, message(b""))), *(bytes([size]) + stream for stream in streams for size in (1, 200))]


TARGET = Target("websocket", _run, _seeds, (b"\0\0\0\1" + bytes(8), b"credit 8192", b"\0\0\0\2"))
