"""The zip archive around a `torch.save` file: stored records, one after the other, without gaps::

    record     local header (30 bytes), name, padding, data, descriptor (checksum, sizes; none if empty)
    directory  one entry for each record (46 bytes, name, sizes and offset again if they exceed 32 bits)
    end        zip64 end (56 bytes), zip64 locator (20 bytes), end (22 bytes)

A general reader finds entries by searching, believes one of several contradicting sizes and tolerates what
lies between them. This one takes every byte into account, or refuses.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from farpoint.errors import DecodeError, LimitError
from farpoint.limits import Limits
from farpoint.serializer import Frame

PICKLE: Final = b"data.pkl"
_PREFIX: Final = b"archive/"
_STORAGE: Final = b"data/"
_NOTES: Final = {b".format_version": b"1", b"byteorder": b"little", b"version": b"3\n"}
_OPTIONAL_NOTES: Final = (b".storage_alignment", b".data/serialization_id")
_NOTE_BYTES: Final = 64

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_ENTRY: Final = struct.Struct("<4s6H3I5H2I")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_END: Final = struct.Struct("<4s4H2IH")
_TRAILER_BYTES: Final = _END64.size + _LOCATOR.size + _END.size
_SATURATED: Final = 0xFFFFFFFF
_DESCRIPTOR_FLAG: Final = 0x0008
_UTF8_FLAG: Final = 0x0800
# Local header, name, padding to 64 bytes, descriptor, directory entry.
_RECORD_OVERHEAD: Final = 512


class Archive:
    """The records of one file.

    Args:
        data: The file.
        limits: What it must not exceed.

    Raises:
        DecodeError: It is no archive as torch writes them.
        struct.error: It ends in the middle of a header.
        LimitError: It exceeds the limits.
    """

    def __init__(self, data: Frame, limits: Limits) -> None:
        view = data if isinstance(data, memoryview) else memoryview(data)
        self._data = view.cast("B") if view.contiguous else memoryview(view.tobytes())
        self._limits = limits
        self._records: dict[bytes, tuple[memoryview, int]] = {}
        self._read_directory()
        self._check_notes()

    @property
    def storages(self) -> int:
        """How many storages there are."""
        return sum(name.startswith(_STORAGE) for name in self._records)

    def record(self, name: bytes) -> memoryview:
        """Return the data of a record, after its checksum is verified.

        Raises:
            DecodeError: There is none of that name, or it is damaged.
        """
        if name not in self._records:
            raise DecodeError(f"a file lacks the record {name!r}")
        record, checksum = self._records[name]
        if zlib.crc32(record) != checksum:
            raise DecodeError(f"the checksum of the record {name!r} is wrong")
        return record

    def _read_directory(self) -> None:
        """Find the records, and check that they fill the file without gaps or overlaps."""
        data, limits = self._data, self._limits
        start_of_end = len(data) - _TRAILER_BYTES
        if start_of_end < 0:
            raise DecodeError("a file is too short to be one")
        if len(data) > limits.message_bytes + limits.header_bytes + _RECORD_OVERHEAD * (limits.tensors + 16):
            raise LimitError("message_bytes", limits.message_bytes, f"a message of {len(data)} bytes")
        count, offset = self._read_end(start_of_end)
        if count > limits.tensors + len(_NOTES) + len(_OPTIONAL_NOTES) + 1:
            raise LimitError("tensors", limits.tensors, f"a file of {count} records")
        place, budget, expected = offset, limits.message_bytes, 0
        for _ in range(count):
            name, record, checksum, expected, place = self._read_entry(place, expected, offset)
            if name in self._records:
                raise DecodeError("a file has two records of one name")
            if not (name == PICKLE or name in _NOTES or name in _OPTIONAL_NOTES or name.startswith(_STORAGE)):
                raise DecodeError(f"a file has a record {name[:80]!r}, which torch does not write")
            if name == PICKLE and len(record) > limits.header_bytes:
                raise LimitError("header_bytes", limits.header_bytes, f"a header of {len(record)} bytes")
            if name.startswith(_STORAGE):
                budget -= len(record)
                if budget < 0:
                    raise LimitError("message_bytes", limits.message_bytes, "the sum of all tensors")
            self._records[name] = (record, checksum)
        if expected != offset or place != start_of_end:
            raise DecodeError("a file has bytes that belong to no record")

    def _read_end(self, place: int) -> tuple[int, int]:
        """Return the number of records and the offset of the directory, which are written twice."""
        data = self._data
        signature, length, _, _, disk, first_disk, here, count, size, offset = _END64.unpack_from(data, place)
        if (signature, length, disk, first_disk, here) != (b"PK\6\6", _END64.size - 12, 0, 0, count):
            raise DecodeError("a file does not end like one")
        if _LOCATOR.unpack_from(data, place + _END64.size) != (b"PK\6\7", 0, place, 1):
            raise DecodeError("a file does not end like one")
        short = (
            b"PK\5\6",
            0,
            0,
            min(count, 0xFFFF),
            min(count, 0xFFFF),
            min(size, _SATURATED),
            min(offset, _SATURATED),
            0,
        )
        if _END.unpack_from(data, place + _END64.size + _LOCATOR.size) != short:
            raise DecodeError("the two ends of a file contradict each other")
        return count, offset

    def _read_entry(
        self, place: int, expected: int, directory: int
    ) -> tuple[bytes, memoryview, int, int, int]:
        """Return name, data and checksum of a record, where the next begins, and where the next entry does.

        Args:
            place: Where the entry of the directory is.
            expected: Where its record must begin: the end of the one before.
            directory: Where the records end.
        """
        data = self._data
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            checksum,
            packed,
            size,
            name_size,
            extra_size,
            comment,
            disk,
            _,
            _,
            offset,
        ) = _ENTRY.unpack_from(data, place)
        if (
            signature != b"PK\1\2"
            or method != 0
            or flags & ~_DESCRIPTOR_FLAG != _UTF8_FLAG
            or comment
            or disk
        ):
            raise DecodeError("a record is not stored plainly")
        place += _ENTRY.size
        name = bytes(data[place : place + name_size])
        place += name_size
        packed, size, offset = _widened(data[place : place + extra_size], extra_size, packed, size, offset)
        place += extra_size
        if packed != size or offset != expected:
            raise DecodeError("records overlap, leave gaps or are compressed")
        start = offset + _LOCAL.size
        local_signature, _, local_flags, local_method, *_, local_name, padding = _LOCAL.unpack_from(
            data, offset
        )
        if (local_signature, local_flags, local_method, local_name) != (b"PK\3\4", flags, method, name_size):
            raise DecodeError("a record and its entry contradict each other")
        if bytes(data[start : start + name_size]) != name or not name.startswith(_PREFIX):
            raise DecodeError("a record has another name than its entry")
        start += name_size + padding
        end = start + size
        if flags & _DESCRIPTOR_FLAG:
            layout = "<4sI2Q" if extra_size else "<4s3I"
            if struct.unpack_from(layout, data, end) != (b"PK\7\x08", checksum, size, size):
                raise DecodeError("a record and its descriptor contradict each other")
            expected = end + struct.calcsize(layout)
        else:
            expected = end
        return name[len(_PREFIX) :], data[start:end], checksum, expected, place

    def _check_notes(self) -> None:
        for name, value in _NOTES.items():
            if bytes(self.record(name)) != value:
                raise DecodeError(f"the record {name!r} says something else than {value!r}")
        for name in _OPTIONAL_NOTES:
            if name in self._records and len(self.record(name)) > _NOTE_BYTES:
                raise DecodeError(f"the record {name!r} is too long")


def _widened(extra: memoryview, extra_size: int, *narrow: int) -> list[int]:
    """Return sizes and offset of an entry: those that do not fit 32 bits stand behind it, in that order."""
    wide = [value for value in narrow if value == _SATURATED]
    if not wide and not extra_size:
        return list(narrow)
    kind, length, *values = struct.unpack(f"<2H{len(wide)}Q", extra)
    if (kind, length) != (1, 8 * len(wide)):
        raise DecodeError("an entry has an unknown field")
    found = iter(values)
    return [next(found) if value == _SATURATED else value for value in narrow]
