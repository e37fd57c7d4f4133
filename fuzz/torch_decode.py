"""Fuzz the reader of `torch.save` files: files as they are, and pickles in files whose checksums and sizes are right."""

from __future__ import annotations

import io
from typing import Any

import torch

from farpoint.errors import DecodeError
from farpoint_torchsave.archive import PICKLE, Archive
from farpoint_torchsave.serializer import TorchSaveSerializer
from fuzz.messages import packets
from fuzz.target import LIMITS, Target, join, split

_FILE, _PICKLE = b"F", b"P"
_serializer = TorchSaveSerializer(LIMITS)


def _run(data: bytes) -> bool:
    file = _archive(*split(data[1:])) if data[:1] == _PICKLE else data[1:]
    try:
        tree = _serializer.decode([file])
    except DecodeError:
        return False
    _serializer.encode(tree)  # what was taken can be sent
    return True


def _archive(pickle: bytes, *storages: bytes) -> bytes:
    """Return what torch's own writer makes of a pickle and its storages."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in (
        ("data.pkl", pickle),
        (".format_version", b"1"),
        ("byteorder", b"little"),
        *((f"data/{number}", storage) for number, storage in enumerate(storages)),
    ):
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def _seeds() -> list[bytes]:
    trees: list[Any] = [
        *packets(b"t" * 16),
        {"a": [1, -1, 300, 70_000, 2**63, 1.5, None, True, "text", b"bytes"]},
        [torch.ones(3, dtype=torch.bool), torch.zeros(0, 5), torch.tensor(1j), torch.ones(2, dtype=torch.float8_e5m2)],
    ]
    found = []
    for tree in trees:
        (file,) = (bytes(frame) for frame in _serializer.encode(tree))
        found.append(_FILE + file)
        archive = Archive(file, LIMITS)
        if archive.storages < 8:
            storages = [archive.record(f"data/{number}".encode()) for number in range(archive.storages)]
            found.append(_PICKLE + join([archive.record(PICKLE), *storages]))
    return found


TARGET = Target(
    "torch",
    _run,
    _seeds,
    (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n", b"cos\nsystem\n", b"(tQ", b"PK\x01\x02"),
)
