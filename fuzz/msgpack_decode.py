"""Fuzz the decoder of the msgpack serializer."""

from __future__ import annotations

from typing import Any

import torch

from farpoint.errors import DecodeError
from farpoint_msgpack.serializer import MsgpackSerializer
from fuzz.messages import packets
from fuzz.target import LIMITS, Target, join, split

_serializer = MsgpackSerializer(LIMITS)


def _run(data: bytes) -> bool:
    try:
        tree = _serializer.decode(split(data))
    except DecodeError:
        return False
    _serializer.encode(tree)  # what was taken can be sent
    return True


def _seeds() -> list[bytes]:
    trees: list[Any] = [
        *packets(b"m" * 16),
        {"a": [1, -1, 2**63, -(2**63), 1.5, float("nan"), None, True, "text", b"bytes"]},
        [torch.ones(3, dtype=torch.bool), torch.zeros(0, 5), torch.tensor(1j), torch.ones(2, dtype=torch.float8_e5m2)],
        list(range(600)),
    ]
    return [join(_serializer.encode(tree)) for tree in trees]


TARGET = Target("msgpack", _run, _seeds, (b"\x81\xa2$t", b"\xa7float32", b"\xa4bool", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc7\0\0"))
