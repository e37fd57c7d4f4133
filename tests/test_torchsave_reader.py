"""What the strict reader of `torch.save` files refuses: files built by hand, and mutations of good ones."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from farpoint.errors import DecodeError, LimitError
from farpoint.limits import Limits
from farpoint_torchsave.serializer import TorchSaveSerializer

MUTATIONS = 4_000
LIMITS = Limits(message_bytes=2**20, header_bytes=2**16)

NOTES = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
LAST_NOTES = {"version": b"3\n", ".data/serialization_id": b"0" * 40}


@attrs.define
class Record:
    """A record of an archive built by hand. Each field may lie."""

    name: str
    data: bytes
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    entry_name: str | None = None
    method: int = 0
    flags: int = 0x0808
    extra: bytes = b""
    wide: bool = False
    padding: bytes = b"FB\x02\0ZZ"
    descriptor: bytes | None = None


def archive(
    records: list[Record],
    *,
    gap: bytes = b"",
    surplus: bytes = b"",
    count: int | None = None,
    comment: bytes = b"",
) -> bytes:
    """Return an archive as torch lays it out."""
    body, directory = b"", b""
    for record in records:
        name = record.name.encode()
        entry_name = name if record.entry_name is None else record.entry_name.encode()
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        size = len(record.data) if record.size is None else record.size
        packed = size if record.packed is None else record.packed
        offset = len(body) if record.offset is None else record.offset
        extra = record.extra
        short_size, short_packed, short_offset = size, packed, offset
        if record.wide:
            extra = struct.pack("<2H3Q", 1, 24, packed, size, offset)
            short_size = short_packed = short_offset = 2**32 - 1
        body += struct.pack(
            "<4s5H3I2H",
            b"PK\3\4",
            0,
            record.flags,
            record.method,
            0,
            0,
            0,
            0,
            0,
            len(name),
            len(record.padding),
        )
        body += name + record.padding + record.data
        if record.descriptor is not None:
            body += record.descriptor
        elif record.flags & 8:
            body += struct.pack("<4sI2Q" if record.wide else "<4s3I", b"PK\7\x08", crc, packed, size)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0, 0, record.flags, record.method, 0, 0, crc, short_packed, short_size,
            len(entry_name), len(extra), 0, 0, 0, 0, short_offset,
        )  # fmt: skip
        directory += entry_name + extra
    body += gap
    directory += surplus
    count = len(records) if count is None else count
    short_count = min(count, 2**16 - 1)
    end64 = len(body) + len(directory)
    return b"".join(
        (
            body,
            directory,
            struct.pack(
                "<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, len(directory), len(body)
            ),
            struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1),
            struct.pack(
                "<4s4H2IH", b"PK\5\6", 0, 0, short_count, short_count, len(directory), len(body), len(comment)
            ),
            comment,
        )
    )


def records(code: bytes, *storages: bytes) -> list[Record]:
    """Return the records of a file with this pickle and these storages."""
    data = {f"data/{number}": storage for number, storage in enumerate(storages)}
    all_records = {"data.pkl": code, **NOTES, **data, **LAST_NOTES}
    return [Record(f"archive/{name}", content) for name, content in all_records.items()]


def file(code: bytes, *storages: bytes) -> bytes:
    """Return a file with this pickle and these storages."""
    return archive(records(code, *storages))


def decode(data: bytes, limits: Limits = LIMITS) -> Any:
    """Read a file."""
    return TorchSaveSerializer(limits).decode([data])


def name(text: str) -> bytes:
    """Return the opcode that names something."""
    module, _, attribute = text.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """Return the opcode of a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def value(item: Any) -> bytes:
    """Return the opcodes of a number, a text or a tuple of them."""
    if isinstance(item, Code):
        return item.code
    if isinstance(item, tuple):
        return b"(" + b"".join(map(value, item)) + b"t"
    return pickle.dumps(item, 3)[2:-1].replace(b"q\0", b"")


@attrs.frozen
class Code:
    """Opcodes to be used in place of a value."""

    code: bytes


HOOKS = Code(name("collections.OrderedDict") + b")R")


def storage(
    kind: str = "torch.FloatStorage",
    key: Any = "0",
    location: Any = "cpu",
    numel: Any = 6,
    tag: Any = "storage",
) -> Code:
    """Return the opcodes of a storage."""
    return Code(value((tag, Code(name(kind)), key, location, numel)) + b"Q")


def tensor(
    of: Any = None,
    offset: Any = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    grad: Any = False,
    hooks: Any = HOOKS,
    *more: Any,
) -> bytes:
    """Return the opcodes of a tensor."""
    version = 3 if more else 2
    return (
        name(f"torch._utils._rebuild_tensor_v{version}")
        + value((of or storage(), offset, shape, strides, grad, hooks, *more))
        + b"R"
    )


def code(body: bytes) -> bytes:
    """Return a pickle of these opcodes."""
    return b"\x80\x03" + body + b"."


FLOATS = torch.arange(6.0)
DATA = FLOATS.numpy().tobytes()


def written(tree: Any) -> bytes:
    """Return what our writer makes of a tree."""
    return bytes(TorchSaveSerializer().encode(tree)[0])


# The builders are right: what they build of good parts is read, here and by torch.


def test_the_builders_build_what_torch_reads() -> None:
    data = file(code(tensor()), DATA)
    assert torch.equal(decode(data), FLOATS.view(2, 3))
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=False), FLOATS.view(2, 3))
    shorts = tensor(
        storage("torch.storage.UntypedStorage", numel=12),
        0,
        (6,),
        (1,),
        False,
        HOOKS,
        Code(name("torch.uint16")),
    )
    assert decode(file(code(shorts), b"\1\0" * 6)).tolist() == [1] * 6


def test_torch_reads_what_we_write() -> None:
    tree = [1, "text", {"a": [torch.arange(6).view(2, 3), None, 2**40]}, torch.ones(3)[1:]]
    loaded: Any = torch.load(io.BytesIO(written(tree)), weights_only=False)
    assert loaded[:2] == [1, "text"] and torch.equal(loaded[2]["a"][0], torch.arange(6).view(2, 3))
    assert torch.equal(loaded[3], torch.ones(2))


def test_offsets_beyond_32_bits_are_read() -> None:
    """The form that torch uses in files of more than 4 GiB."""
    all_records = records(code(tensor()), DATA)
    for record in all_records[4:]:
        record.wide = True
    assert torch.equal(decode(archive(all_records)), FLOATS.view(2, 3))


def test_reading_copies_a_tensor_once() -> None:
    data = TorchSaveSerializer().encode(torch.ones(2**20))
    tracemalloc.start()
    try:
        TorchSaveSerializer().decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2**22 + 2**16
    finally:
        tracemalloc.stop()


# Pickles.

OPCODES_NEVER_WRITTEN = {
    "REDUCE of os.system": name("os.system") + text("true") + b"\x85R",
    "REDUCE of posix.system": name("posix.system") + text("true") + b"\x85R",
    "GLOBAL of builtins": name("builtins.eval"),
    "GLOBAL of an allowed module": name("torch._utils._rebuild_sparse_tensor"),
    "GLOBAL of a storage that is not written": name("torch.QUInt8Storage"),
    "GLOBAL of a dtype outside the table": name("torch.quint8"),
    "GLOBAL by a dotted name": b"ctorch\n_utils._rebuild_tensor_v2\n",
    "GLOBAL without end": b"ctorch",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(" + name("torch.FloatStorage") + b"o",
    "NEWOBJ": name("torch.FloatStorage") + b")\x81",
    "NEWOBJ_EX": name("torch.FloatStorage") + b")}\x92",
    "BUILD": b"]}b",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\0",
    "EXT4": b"\x84\x01\0\0\0",
    "PERSID": b"P0\n",
    "DUP": b"]2",
    "POP": b"]]0",
    "POP_MARK": b"](1",
    "GET": b"]q\x000g0\n",
    "INT": b"I1\n",
    "LONG": b"L1L\n",
    "LONG4": b"\x8b\x01\0\0\0\x01",
    "STRING": b"S'a'\n",
    "BINSTRING": b"T\1\0\0\0a",
    "FRAME": b"\x95\x01\0\0\0\0\0\0\0N",
    "MEMOIZE": b"N\x94",
    "SHORT_BINUNICODE": b"\x8c\1a",
    "EMPTY_SET": b"\x8f",
    "BYTEARRAY8": b"\x96\1\0\0\0\0\0\0\0a",
    "NEXT_BUFFER": b"\x97",
}


@pytest.mark.parametrize("opcodes", OPCODES_NEVER_WRITTEN.values(), ids=OPCODES_NEVER_WRITTEN.keys())
def test_other_opcodes_and_names_are_refused(opcodes: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(file(code(opcodes)))
    with pytest.raises(DecodeError):
        decode(file(code(b"](" + opcodes + b"e")))


def reduce_of(function: str, *arguments: Any) -> bytes:
    return name(function) + value(arguments) + b"R"


CALLS = {
    "ByteTensor(n)": reduce_of("torch.ByteTensor", 2**20),
    "FloatStorage(n)": reduce_of("torch.FloatStorage", 2**30),
    "UntypedStorage(n)": reduce_of("torch.storage.UntypedStorage", 2**30),
    "OrderedDict(x)": reduce_of("collections.OrderedDict", ()),
    "OrderedDict() alone": HOOKS.code,
    "a dtype": reduce_of("torch.uint16"),
    "a list": b"])R",
    "a text": text("os.system") + b")R",
    "a tensor": tensor() + b")R",
    "sparse": reduce_of("torch._utils._rebuild_sparse_tensor", 0, ()),
    "parameter": name("torch._utils._rebuild_parameter") + value((Code(tensor()), True, HOOKS)) + b"R",
    "from_type": reduce_of("torch._tensor._rebuild_from_type_v2", 0),
    "no tuple of arguments": name("torch._utils._rebuild_tensor_v2") + b"]R",
    "too few arguments": reduce_of("torch._utils._rebuild_tensor_v2", storage(), 0, (6,), (1,), False),
    "too many arguments": reduce_of(
        "torch._utils._rebuild_tensor_v2", storage(), 0, (6,), (1,), False, HOOKS, None
    ),
    "v3 with six": reduce_of("torch._utils._rebuild_tensor_v3", storage(), 0, (6,), (1,), False, HOOKS),
    "v3 without dtype": tensor(storage(), 0, (6,), (1,), False, HOOKS, None),
    "v3 with a storage for dtype": tensor(
        storage(), 0, (6,), (1,), False, HOOKS, Code(name("torch.LongStorage"))
    ),
    "v3 with a storage class for dtype": tensor(
        storage("torch.storage.UntypedStorage", numel=24),
        0,
        (6,),
        (1,),
        False,
        HOOKS,
        Code(name("torch.FloatStorage")),
    ),
    "v3 with two dtypes": tensor(storage(), 0, (6,), (1,), False, HOOKS, Code(name("torch.uint32"))),
    "v2 without dtype": tensor(storage("torch.storage.UntypedStorage", numel=24)),
}


@pytest.mark.parametrize("opcodes", CALLS.values(), ids=CALLS.keys())
def test_other_calls_are_refused(opcodes: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(file(code(opcodes), DATA))


TENSORS = {
    "huge shape": tensor(shape=(2**40,), strides=(1,)),
    "huge shape and storage": tensor(storage(numel=2**40), shape=(2**40,), strides=(1,)),
    "overflowing product": tensor(shape=(2**40, 2**40), strides=(2**40, 1)),
    "product that overflows to 24": tensor(shape=(2**32 + 1, 2**32, 6), strides=(1, 1, 1)),
    "overflowing product of an empty tensor": tensor(
        storage(numel=0), shape=(0, 2**40, 2**40), strides=(1, 1, 1)
    ),
    "size beyond 2**40": tensor(storage(numel=0), shape=(0, 2**41), strides=(1, 1)),
    "size beyond 63 bits": tensor(storage(numel=0), shape=(0, 2**64 - 1), strides=(1, 1)),
    "negative size": tensor(shape=(-2, -3)),
    "one negative size": tensor(shape=(-6,), strides=(1,)),
    "smaller than its storage": tensor(shape=(5,), strides=(1,)),
    "larger than its storage": tensor(shape=(7,), strides=(1,)),
    "negative storage": tensor(storage(numel=-6)),
    "storage of another size than its record": tensor(storage(numel=7), shape=(7,), strides=(1,)),
    "bool as size": tensor(shape=(True, 6), strides=(6, 1)),
    "float as size": tensor(shape=(6.0,), strides=(1,)),
    "text as shape": tensor(shape="23"),
    "list as shape": tensor(shape=Code(b"](K\2K\3e")),
    "number as shape": tensor(shape=6),
    "bool as number of elements": tensor(storage(numel=True), shape=(), strides=()),
    "text as number of elements": tensor(storage(numel="6")),
    "too many dimensions": tensor(shape=(6,) + (1,) * 40, strides=(1,) * 41),
    "offset": tensor(offset=1, shape=(5,), strides=(1,)),
    "negative offset": tensor(offset=-1),
    "huge offset": tensor(offset=2**62),
    "bool as offset": tensor(offset=False),
    "transposed strides": tensor(strides=(1, 2)),
    "strides beyond the storage": tensor(strides=(2**40, 1)),
    "negative strides": tensor(strides=(-3, -1)),
    "strides of zero": tensor(strides=(0, 0)),
    "too few strides": tensor(strides=(1,)),
    "no strides": tensor(strides=None),
    "text as stride": tensor(strides=("3", 1)),
    "requires grad": tensor(grad=True),
    "zero for False": tensor(grad=0),
    "hooks of another kind": tensor(hooks=Code(b"}")),
    "no hooks": tensor(hooks=None),
    "hooks class": tensor(hooks=Code(name("collections.OrderedDict"))),
    "another device": tensor(storage(location="cuda:0")),
    "meta device": tensor(storage(location="meta")),
    "bytes as device": tensor(storage(location=b"cpu")),
    "another tag": tensor(storage(tag="module")),
    "number as key": tensor(storage(key=0)),
    "path as key": tensor(storage(key="../0")),
    "signed key": tensor(storage(key="+0")),
    "key with a zero in front": tensor(storage(key="00")),
    "foreign digit as key": tensor(storage(key="\u0660")),
    "key of nothing": tensor(storage(key="1")),
    "huge key": tensor(storage(key="9" * 5_000)),
    "no storage": tensor(Code(b"N")),
    "storage class in place of a storage": tensor(Code(name("torch.FloatStorage"))),
    "dtype in place of a storage class": tensor(
        storage("torch.uint16", numel=12), shape=(2, 6), strides=(6, 1)
    ),
    "a larger dtype": tensor(storage("torch.DoubleStorage")),
    "a smaller dtype": tensor(storage("torch.HalfStorage")),
    "storage of another size than tensor and record": tensor(storage(numel=7)),
    "storage of four values": tensor(
        Code(value(("storage", Code(name("torch.FloatStorage")), "0", "cpu")) + b"Q")
    ),
    "storage of a list": tensor(Code(b"]Q")),
    "storage by itself": storage().code,
    "storage in a list": b"]" + storage().code + b"a",
    "class in a map": b"}" + text("a") + name("torch.FloatStorage") + b"s",
    "tuple in a list": b"]" + value((1, 2)) + b"a",
    "tuple as tree": value((1, 2)),
}


@pytest.mark.parametrize("opcodes", TENSORS.values(), ids=TENSORS.keys())
def test_other_tensors_are_refused(opcodes: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(file(code(opcodes), DATA))
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_a_number_of_elements_is_no_bool() -> None:
    with pytest.raises(DecodeError):
        decode(file(code(tensor(storage(numel=True), shape=(), strides=())), DATA[:4]))


@pytest.mark.parametrize("shape", [(0, 2**40, 2**40), (2**40, 0, 2**30), (0, 2**41), (0, -1), (2**64, 0)])
def test_empty_tensors_have_sizes_that_fit(shape: tuple[int, ...]) -> None:
    """Torch computes strides from them all the same."""
    with pytest.raises(DecodeError):
        decode(file(code(tensor(storage(numel=0), shape=shape, strides=(1,) * len(shape))), b""))


@pytest.mark.parametrize("dtype", ["FloatStorage", "IntStorage"])
def test_a_storage_belongs_to_one_tensor(dtype: str) -> None:
    two = b"](" + tensor() + tensor(storage(f"torch.{dtype}")) + b"e"
    with pytest.raises(DecodeError, match="order"):
        decode(file(code(two), DATA))
    with pytest.raises(DecodeError):
        decode(file(code(two), DATA, DATA))


def test_every_storage_is_used() -> None:
    with pytest.raises(DecodeError, match="2 storages"):
        decode(file(code(tensor()), DATA, DATA))


def test_bools_are_bools() -> None:
    bools = code(tensor(storage("torch.BoolStorage", numel=2), 0, (2,), (1,)))
    assert decode(file(bools, b"\0\1")).tolist() == [False, True]
    with pytest.raises(DecodeError):
        decode(file(bools, b"\0\2"))


STACKS = {
    "nothing": b"",
    "two values": b"NN",
    "open mark": b"(N",
    "APPEND to nothing": b"a",
    "APPEND to a number": b"K\1K\1a",
    "APPEND across a mark": b"](K\1a",
    "APPENDS without mark": b"]e",
    "APPENDS to a map": b"}(K\1e",
    "SETITEM on a list": b"]" + text("a") + b"K\1s",
    "SETITEM across a mark": b"}" + text("a") + b"(K\1s",
    "SETITEMS with a key alone": b"}(" + text("a") + b"u",
    "number as key": b"}K\1K\1s",
    "list as key": b"}]K\1s",
    "key twice": b"}(" + text("a") + b"K\1" + text("a") + b"K\2u",
    "key twice in two batches": b"}" + text("a") + b"K\1s" + text("a") + b"K\2s",
    "TUPLE without mark": b"t",
    "TUPLE2 of one": b"N\x86",
    "REDUCE of nothing": b"R",
    "BINPERSID of nothing": b"Q",
    "recursive list": b"]q\0h\0a",
    "recursive map": b"}q\0" + text("a") + b"h\0s",
    "list twice": b"](]q\0h\0e",
    "tensor twice": b"](" + tensor() + b"q\0h\0e",
    "memo of nothing": b"q\0",
    "memo out of order": b"]q\1",
    "memo overwritten": text("a") + b"q\0q\0",
    "memo with a huge index": b"]r\xff\xff\xff\x7f",
    "memo not yet written": b"h\0",
    "memo with a large index": b"j\0\0\0\x7f",
    "text longer than the pickle": b"X\xff\0\0\0a",
    "text longer than allowed": b"X\xff\xff\xff\x7fa",
    "bytes longer than the pickle": b"B\xff\xff\xff\x7fa",
    "invalid UTF-8": b"X\1\0\0\0\xff",
    "lone surrogate": b"X\3\0\0\0\xed\xa0\x80",
    "integer of 9 bytes": b"\x8a\x09" + b"\0" * 8 + b"\1",
    "integer of 255 bytes": b"\x8a\xff" + b"\1" * 255,
    "integer below 64 bits": b"\x8a\x09" + b"\xff" * 7 + b"\x7f\xff",
    "bytes behind the end": b"N.N",
}


@pytest.mark.parametrize("opcodes", STACKS.values(), ids=STACKS.keys())
def test_other_use_of_the_stack_is_refused(opcodes: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(file(code(opcodes), *[DATA] * opcodes.count(b"_rebuild_tensor")))


@pytest.mark.parametrize(
    "whole", [b"", b"\x80", b"\x80\x03", b"\x80\x03N", b"N.", b"\x80\x02N.", b"\x80\x04N.", b"\x80\xffN."]
)
def test_other_beginnings_and_ends_are_refused(whole: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(file(whole))


BOMBS = {
    "doubling through the memo": lambda: (
        b"]q\0" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60))
    ),
    "nesting": lambda: b"]" * 30_000 + b"a" * 29_999,
    "nesting with marks": lambda: b"](" * 10_000 + b"e" * 10_000,
    "nesting of maps": lambda: (b"}" + text("a")) * 4_000 + b"N" + b"s" * 4_000,
    "nesting of tuples": lambda: b"](" + b")" + b"\x85" * 30_000 + b"e",
    "marks": lambda: b"(" * 60_000,
    "lists on the stack": lambda: b"]" * 60_000,
    "one long list": lambda: b"](" + b"N" * 20_000 + b"e",
    "one long list in parts": lambda: b"]" + b"Na" * 20_000,
    "one long map": lambda: b"}(" + b"".join(text(f"{n}") + b"N" for n in range(200)) + b"u",
    "a name without end": lambda: b"c" + b"a" * 60_000,
    "a long text": lambda: text("a" * 60_000),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused(bomb: Callable[[], bytes]) -> None:
    data = file(code(bomb()))
    tight = attrs.evolve(LIMITS, text_chars=10_000, array_items=10_000)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(data, tight)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_wide_lists_inside_lists_are_read() -> None:
    """The bound on the stack leaves what the pickler writes alone."""
    tree = [[list(range(3_000)), {str(n): n for n in range(60)}] for _ in range(3)] + [
        [] for _ in range(3_000)
    ]
    assert decode(written(tree)) == tree


# Archives.


def test_declared_sizes_buy_nothing() -> None:
    """A record that claims to be larger than the file is refused before anything is allocated."""
    for claim in (25, 2**20 + 1, 2**31, 2**32 - 2):
        all_records = records(code(tensor()), DATA)
        all_records[4].size = claim
        with pytest.raises(DecodeError):
            decode(archive(all_records))


def tampered(index: int, **changes: Any) -> Callable[[], bytes]:
    """Return a builder of a file in which one record lies."""

    def build() -> bytes:
        all_records = records(code(tensor()), DATA)
        all_records[index] = attrs.evolve(all_records[index], **changes)
        return archive(all_records)

    return build


def rearranged(change: Callable[[list[Record]], Any], **ends: Any) -> Callable[[], bytes]:
    """Return a builder of a file whose list of records was changed."""

    def build() -> bytes:
        all_records = records(code(tensor()), DATA)
        change(all_records)
        return archive(all_records, **ends)

    return build


def one_byte_more(signature: bytes, place: int) -> bytes:
    """Return a file in which one byte of the first header of a kind is changed to 8."""
    data = bytearray(file(code(tensor()), DATA))
    data[data.index(signature) + place] = 8
    return bytes(data)


def compressed(data: bytes) -> bytes:
    """Return data as zip compresses it."""
    squeezer = zlib.compressobj(wbits=-15)
    return squeezer.compress(data) + squeezer.flush()


ARCHIVES = {
    "wrong CRC of a storage": tampered(4, crc=1),
    "wrong CRC of the pickle": tampered(0, crc=1),
    "wrong CRC of a note": tampered(3, crc=1),
    "compressed": tampered(4, data=compressed(DATA), method=8),
    "zip bomb": tampered(
        4, data=compressed(bytes(2**20)), method=8, size=2**20, packed=len(compressed(bytes(2**20)))
    ),
    "two sizes": tampered(4, packed=23),
    "smaller size": tampered(4, size=20),
    "encrypted": tampered(4, flags=0x0809),
    "patched": tampered(4, flags=0x0828),
    "stored, and said to be compressed": tampered(4, method=8),
    "compressed in the entry only": lambda: one_byte_more(b"PK\1\2", 10),
    "compressed in the record only": lambda: one_byte_more(b"PK\3\4", 8),
    "two sizes without descriptor": tampered(4, packed=23, flags=0x0800),
    "gap between records": tampered(
        4, descriptor=struct.pack("<4s3I", b"PK\7\x08", zlib.crc32(DATA), 24, 24) + b"gap"
    ),
    "names in another code": tampered(4, flags=0x0008),
    "no descriptor": tampered(4, descriptor=b""),
    "another descriptor": tampered(4, descriptor=struct.pack("<4s3I", b"PK\7\x08", 0, 24, 24)),
    "offset into another record": tampered(4, offset=0),
    "offset behind the file": tampered(4, offset=2**31),
    "another name in the entry": tampered(4, entry_name="archive/data/1"),
    "another name in the record": tampered(4, name="archive/data/1", entry_name="archive/data/0"),
    "absolute name": tampered(4, name="/etc/passwd"),
    "dotted name": tampered(4, name="archive/../data/0"),
    "name without folder": tampered(4, name="data/0"),
    "name in a folder as long": tampered(4, name="Archive/data/0"),
    "name in another folder": tampered(4, name="other/data/0"),
    "empty name": tampered(4, name=""),
    "missing pickle": rearranged(lambda r: r.pop(0)),
    "missing storage": rearranged(lambda r: r.pop(4)),
    "missing byte order": rearranged(lambda r: r.pop(3)),
    "big endian": tampered(3, data=b"big"),
    "another version": tampered(5, data=b"2\n"),
    "another format": tampered(1, data=b"2"),
    "endless alignment": tampered(2, data=b"6" * 10_000),
    "record twice": rearranged(lambda r: r.append(r[4])),
    "storage twice": rearranged(lambda r: r.insert(4, r[4])),
    "pickle twice": rearranged(lambda r: r.append(r[0])),
    "surplus record": rearranged(lambda r: r.append(Record("archive/constants.pkl", b""))),
    "surplus storage": rearranged(lambda r: r.append(Record("archive/data/7", b""))),
    "code record": rearranged(lambda r: r.append(Record("archive/code/x.py", b"1"))),
    "overlapping records": rearranged(lambda r: r.append(Record("archive/data/1", b"", offset=10))),
    "no records": rearranged(lambda r: r.clear()),
    "gap before the directory": rearranged(lambda r: None, gap=b"gap"),
    "surplus in the directory": rearranged(lambda r: None, surplus=b"surplus"),
    "fewer records than entries": rearranged(lambda r: None, count=6),
    "more records than entries": rearranged(lambda r: None, count=8),
    "a million records": rearranged(lambda r: None, count=10**6),
    "comment": rearranged(lambda r: None, comment=b"comment"),
    "unknown field": tampered(4, extra=b"\x99\x99\x04\0abcd"),
    "wide field of another kind": tampered(
        4,
        size=2**32 - 1,
        extra=struct.pack("<2H2Q", 2, 16, 24, 24),
        descriptor=struct.pack("<4sI2Q", b"PK\7\x08", zlib.crc32(DATA), 24, 24),
    ),
    "wide field in vain": tampered(4, extra=struct.pack("<2HQ", 1, 8, 24)),
    "wide field too short": tampered(4, extra=b"\1\0\0\0", size=2**32 - 1),
    "something in front": lambda: b"MZ" + file(code(tensor()), DATA),
    "something behind": lambda: file(code(tensor()), DATA) + b"\0",
    "another file behind": lambda: file(code(tensor()), DATA) * 2,
}


@pytest.mark.parametrize("build", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_other_archives_are_refused(build: Callable[[], bytes]) -> None:
    data = build()
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_archives_of_other_writers_are_refused() -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as other:
            for record in records(code(tensor()), DATA):
                other.writestr(record.name, record.data)
        with pytest.raises(DecodeError):
            decode(buffer.getvalue())


def test_legacy_files_are_refused() -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(DecodeError):
        decode(buffer.getvalue())


@pytest.mark.parametrize(
    "thing",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(4)[1:],
        torch.ones(2, 3).t(),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, device="meta"),
        torch.nn.Linear(1, 1),
        OrderedDict(a=1),
        {1: 2},
        (1, 2),
        torch.Size([1]),
        torch.float32,
        torch.ones(2).untyped_storage(),
        2**64,
        {1},
        1j,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_files_of_other_things_are_refused(thing: object) -> None:
    """Also what torch would read: our writer never writes it."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, pickle_protocol=3)
    with pytest.raises(DecodeError):
        decode(buffer.getvalue())


@pytest.mark.parametrize("claim", ["message_bytes", "header_bytes", "tensors"])
def test_limits_hold_before_the_pickle_is_read(claim: str) -> None:
    limits = {
        "message_bytes": Limits(message_bytes=23),
        "header_bytes": Limits(header_bytes=5),
        "tensors": Limits(tensors=0),
    }
    data = file(b"not even a pickle", DATA, *[b""] * 20)
    with pytest.raises(LimitError) as caught:
        decode(data, limits[claim])
    assert caught.value.limit == claim


# Mutations.


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return data with one to four random changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(6)
        place = rng.randrange(len(changed))
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del changed[place : place + rng.randint(1, 8)]
        elif kind == 4:
            changed[place : place + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\0\0\0\0")
            )
        else:
            other = rng.randrange(len(changed))
            changed[place : place + 8] = changed[other : other + 8]
        if not changed:
            return b""
    return bytes(changed)


TREE = [
    1,
    -5,
    2**40,
    "text",
    b"bytes",
    {"a": [None, True, 1.5], "b": "text"},
    torch.arange(6.0).view(2, 3),
    [torch.tensor(True)],
]


@pytest.mark.parametrize("part", ["file", "pickle", "storage"])
def test_mutations_are_read_or_refused(part: str) -> None:
    """Damage anywhere raises `DecodeError` or makes another message. The checksums are made to fit."""
    good = written(TREE)
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        pickled, first, second = (opened.read(f"archive/{name}") for name in ("data.pkl", "data/0", "data/1"))
    decode(file(pickled, first, second))
    rng = random.Random(part)
    refused = 0
    for _ in range(MUTATIONS):
        if part == "file":
            data = mutate(rng, good)
        elif part == "pickle":
            data = file(mutate(rng, pickled), first, second)
        else:
            data = file(pickled, mutate(rng, first), mutate(rng, second))
        try:
            decode(data)
        except DecodeError:
            refused += 1
    assert refused > MUTATIONS // 4


def test_nothing_is_executed(tmp_path: Path) -> None:
    """A call with a visible effect, in every way that a pickle knows, has none."""
    path = tmp_path / "canary"
    module = os.mkdir.__module__
    argument = text(str(path)) + b"\x85"
    for opcodes in (
        name(f"{module}.mkdir") + argument + b"R",
        text(module) + text("mkdir") + b"\x93" + argument + b"R",
        b"(" + text(str(path)) + f"i{module}\nmkdir\n".encode(),
        b"(" + name(f"{module}.mkdir") + text(str(path)) + b"o",
    ):
        pickle.loads(b"\x80\x04" + opcodes + b".")
        path.rmdir()  # it is alive
        for place in (
            opcodes,
            b"](" + opcodes + b"e",
            tensor(hooks=Code(opcodes)),
            tensor(Code(opcodes)),
            opcodes + tensor(),
        ):
            with pytest.raises(DecodeError):
                decode(file(code(place), DATA))
    assert not path.exists()
