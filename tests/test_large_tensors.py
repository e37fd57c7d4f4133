"""Memory for large tensors: what it holds, and that the system may give it in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from farpoint.bulk import Bulk
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.tensors import DTYPES, payload, room_for, snapshot

MEBI = 2**20


def flags(address: int) -> list[str]:
    """Return what the kernel notes about the memory at an address."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.MULTILINE):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if found and int(found[1], 16) <= address < int(found[2], 16):
            return mapping.partition("VmFlags:")[2].split()
    raise AssertionError("nothing is there")


@pytest.mark.parametrize("name", DTYPES)
def test_a_snapshot_is_equal_and_apart(name: str) -> None:
    numbers = torch.arange(MEBI // 4, dtype=torch.int64).view(torch.uint8) & 1
    tensor = numbers.view(DTYPES[name]).view(2, -1)
    copy = snapshot(tensor)
    before = bytes(payload(tensor))
    numbers.fill_(1)
    assert copy.shape == tensor.shape and copy.dtype is tensor.dtype
    assert bytes(payload(copy)) == before != bytes(payload(tensor))


@pytest.mark.parametrize("size", [1, 5, 2 * MEBI - 1, 4 * MEBI, 5 * MEBI + 3])
def test_room_is_as_large_as_asked(size: int) -> None:
    room = room_for(size)
    assert room.shape == (size,) and room.fill_(7).sum() == 7 * size


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages to give")
def test_what_comes_and_what_leaves_may_lie_in_huge_pages() -> None:
    size = 64 * MEBI
    bulk = Bulk(Limits())
    bulk.take_chunk([int(Kind.CHUNK), 1, 0, 0, size, torch.ones(1, dtype=torch.uint8)])
    arrived = bulk._arrivals[1].bytes
    left = snapshot(torch.ones(size, dtype=torch.uint8))
    plain = torch.ones(size, dtype=torch.uint8)
    assert ["hg" in flags(tensor.data_ptr() + size // 2) for tensor in (arrived, left, plain)] == [True, True, False]
