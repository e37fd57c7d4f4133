"""Mutations of inputs by chance with a seed: what the tests use in place of atheris."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

_NUMBERS: Final = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutations(seeds: Sequence[bytes], words: Sequence[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """Yield seeds with a few faults in each."""
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            _mutate(data, seeds, words, chance)
        yield bytes(data)


def _mutate(data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.choice((0, 1, 1, 2, 4, 8, chance.randrange(64))))
    choice = chance.randrange(8)
    if choice == 0 and start < len(data):
        data[start] ^= 1 << chance.randrange(8)
    elif choice == 1 and start < len(data):
        data[start] = chance.randrange(256)
    elif choice == 2:
        del data[start:end]
    elif choice == 3:
        data[start:start] = data[start:end] * chance.randrange(1, 9)
    elif choice == 4:
        width = chance.choice((1, 2, 4, 8))
        number = chance.choice(_NUMBERS) % 2 ** (8 * width)
        data[start : start + width] = number.to_bytes(width, chance.choice(("little", "big")))
    elif choice == 5 and words:
        data[start:end] = chance.choice(words)
    elif choice == 6:
        other = chance.choice(seeds)
        place = chance.randrange(len(other) + 1)
        data[start:end] = other[place : place + chance.randrange(64)]
    else:
        del data[start:]
