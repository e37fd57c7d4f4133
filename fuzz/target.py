"""What a harness is, and how one input stands for several frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from farpoint.limits import Limits

LIMITS: Final = Limits(message_bytes=2**20, header_bytes=2**16)
"""Small ones, so that exceeding them is cheap, and what ignores them shows."""

_MOST_FRAMES = 8


@attrs.frozen
class Target:
    """One decoder.

    Attributes:
        name: What it is called on the command line, and its folder of inputs.
        run: Feeds it an input, and returns whether that was taken. It raises nothing that the decoder documents: whatever it
            raises is a finding.
        seeds: Returns inputs that are what a peer of ours sends: each is taken.
        words: What mutations put in, beside numbers.
    """

    name: str
    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()


def join(frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """Return frames as one input: how many there are beside the first, their sizes, they, and then the first.

    It comes last, for it is what is worth mutating, and its size may change.
    """
    first, *others = (bytes(frame) for frame in frames)
    assert len(others) < _MOST_FRAMES
    sizes = b"".join(len(frame).to_bytes(2, "little") for frame in others)
    return b"".join((bytes([len(others)]), sizes, *others, first))


def split(data: bytes) -> list[bytes]:
    """Return the frames of an input. Every input has some."""
    count = data[0] % _MOST_FRAMES if data else 0
    place = 1 + 2 * count
    frames = []
    for number in range(count):
        size = int.from_bytes(data[1 + 2 * number : 3 + 2 * number], "little")
        frames.append(data[place : place + size])
        place += size
    return [data[place:], *frames]
