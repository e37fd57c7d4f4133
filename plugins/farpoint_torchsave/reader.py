"""A strict reader of `torch.save` files: what our writer writes, and nothing else.

Such a file is a zip archive of stored records, one after the other without gaps::

    archive/data.pkl                   the tree; a tensor is a call of `_rebuild_tensor_v2` or `_v3`
    archive/.format_version  "1"       archive/.storage_alignment  "64"       archive/byteorder  "little"
    archive/data/0, archive/data/1 ... the storages, raw
    archive/version  "3"               archive/.data/serialization_id

Nothing is called, imported or looked up by name. The opcodes of the pickle are the twenty-odd that the
pickler uses for plain data, and its names are keys of a closed table. Sizes come from the records that are
there, never from what the pickle claims. Everything else raises `DecodeError`; the only memory that is
allocated on the word of the file holds what has arrived.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs
import torch

from farpoint.errors import DecodeError, FarpointError, LimitError
from farpoint.limits import Limits
from farpoint.serializer import Frame, Wire
from farpoint.tensors import DTYPES, check_shape, from_payload
from farpoint_torchsave.archive import PICKLE, Archive

_LEAST: Final = -(2**63)
_GREATEST: Final = 2**64 - 1

_u16 = struct.Struct("<H").unpack_from
_u32 = struct.Struct("<I").unpack_from
_i32 = struct.Struct("<i").unpack_from
_f64 = struct.Struct(">d").unpack_from


@attrs.frozen
class _Name:
    """A name that a pickle may mention. It stands for itself: nothing is looked up."""

    role: str
    dtype: str | None = None


@attrs.frozen
class _Storage:
    """A storage: the key of its record, its dtype unless the tensor tells, its size in elements."""

    key: str
    dtype: str | None
    numel: int


_REBUILD: Final = _Name("tensor")
_REBUILD_WITH_DTYPE: Final = _Name("tensor with dtype")
_HOOKS_CLASS: Final = _Name("hooks class")
_NO_HOOKS: Final = _Name("no hooks")

_STORAGE_CLASSES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

_NAMES: Final[dict[bytes, _Name]] = {
    b"torch._utils\n_rebuild_tensor_v2\n": _REBUILD,
    b"torch._utils\n_rebuild_tensor_v3\n": _REBUILD_WITH_DTYPE,
    b"collections\nOrderedDict\n": _HOOKS_CLASS,
    b"torch.storage\nUntypedStorage\n": _Name("storage"),
    **{f"torch\n{name}\n".encode(): _Name("storage", dtype) for name, dtype in _STORAGE_CLASSES.items()},
    # The dtypes without a storage class of their own are named beside an untyped storage.
    **{
        f"torch\n{name}\n".encode(): _Name("dtype", name)
        for name in DTYPES.keys() - _STORAGE_CLASSES.values()
    },
}

_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, list, dict, torch.Tensor})


class Reader:
    """Reads one file.

    Args:
        data: The file.
        limits: What it must not exceed.
    """

    def __init__(self, data: Frame, limits: Limits) -> None:
        self._data = data
        self._limits = limits
        self._tensors = 0

    def read(self) -> Wire:
        """Return the tree.

        Raises:
            DecodeError: The file is not what `torch.save` writes of such a tree.
            LimitError: It exceeds the limits.
        """
        try:
            self._archive = Archive(self._data, self._limits)
            tree: Wire = self._read_pickle(bytes(self._archive.record(PICKLE)))
        except FarpointError:
            raise
        except (ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
            raise DecodeError(f"a file is not what a peer of ours writes: {error!r:.200}") from error
        if self._tensors != self._archive.storages:
            raise DecodeError(
                f"a tree has {self._tensors} tensors, and {self._archive.storages} storages arrived"
            )
        _check_depth(tree, self._limits)
        return tree

    def _read_pickle(self, code: bytes) -> Any:
        """Run a pickle of plain data and tensors.

        It has no opcode that copies or drops what is on the stack, and only texts, bytes and names may be
        fetched from the memo: what it builds is a tree, without cycles, not larger than the code.
        """
        limits = self._limits
        if code[:2] != b"\x80\x03":
            raise DecodeError("a pickle is of another protocol than 3")
        place = 2
        size = len(code)
        stack: list[Any] = []
        below: list[list[Any]] = []
        memo: list[Any] = []
        while place < size:
            op = code[place]
            place += 1
            if op == 0x71:  # BINPUT
                if code[place] != len(memo):
                    raise _renumbered()
                place += 1
                memo.append(stack[-1])
            elif op == 0x4B:  # BININT1
                stack.append(code[place])
                place += 1
            elif op == 0x8A:  # LONG1
                end = place + 1 + code[place]
                value = int.from_bytes(code[place + 1 : end], "little", signed=True)
                if not _LEAST <= value <= _GREATEST:
                    raise DecodeError("a pickle holds an integer beyond 64 bits")
                place = end
                stack.append(value)
            elif op == 0x72:  # LONG_BINPUT
                if _u32(code, place)[0] != len(memo):
                    raise _renumbered()
                place += 4
                memo.append(stack[-1])
            elif op == 0x5D or op == 0x7D or op == 0x28:  # EMPTY_LIST, EMPTY_DICT, MARK
                if op == 0x28:
                    below.append(stack)
                    stack = []
                else:
                    stack.append([] if op == 0x5D else {})
            elif op == 0x61 or op == 0x65:  # APPEND, APPENDS
                if op == 0x61:
                    items = [stack.pop()]
                else:
                    items, stack = stack, below.pop()
                self._extend(stack[-1], items)
            elif op == 0x4A:  # BININT
                stack.append(_i32(code, place)[0])
                place += 4
            elif op == 0x4D:  # BININT2
                stack.append(_u16(code, place)[0])
                place += 2
            elif op == 0x47:  # BINFLOAT
                stack.append(_f64(code, place)[0])
                place += 8
            elif op == 0x58:  # BINUNICODE
                width = _u32(code, place)[0]
                place += 4
                if width > limits.text_chars:
                    raise LimitError("text_chars", limits.text_chars, f"a text of {width} bytes")
                stack.append(code[place : place + width].decode())
                place += width
            elif op == 0x43 or op == 0x42:  # SHORT_BINBYTES, BINBYTES
                width, place = (code[place], place + 1) if op == 0x43 else (_u32(code, place)[0], place + 4)
                stack.append(code[place : place + width])
                place += width
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x88 or op == 0x89:  # NEWTRUE, NEWFALSE
                stack.append(op == 0x88)
            elif op == 0x68 or op == 0x6A:  # BINGET, LONG_BINGET
                number, place = (code[place], place + 1) if op == 0x68 else (_u32(code, place)[0], place + 4)
                value = memo[number]
                if type(value) not in (str, bytes, _Name):
                    raise DecodeError(f"a pickle refers twice to a {type(value).__name__}")
                stack.append(value)
            elif op == 0x73 or op == 0x75:  # SETITEM, SETITEMS
                if op == 0x73:
                    items = [stack.pop(-2), stack.pop()]
                else:
                    items, stack = stack, below.pop()
                self._update(stack[-1], items)
            elif op == 0x63:  # GLOBAL
                end = code.index(b"\n", code.index(b"\n", place) + 1) + 1
                name = _NAMES.get(code[place:end])
                if name is None:
                    raise DecodeError(
                        f"a pickle names {code[place:end][:80]!r}, and nothing but tensors is allowed"
                    )
                stack.append(name)
                place = end
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif 0x85 <= op <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                count = op - 0x84
                if len(stack) < count:
                    raise DecodeError("a pickle takes more from the stack than is there")
                stack[-count:] = [tuple(stack[-count:])]
            elif op == 0x74:  # TUPLE
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            elif op == 0x51:  # BINPERSID
                stack.append(_storage(stack.pop()))
            elif op == 0x52:  # REDUCE
                arguments = stack.pop()
                stack.append(self._reduce(stack.pop(), arguments))
            elif op == 0x2E:  # STOP
                if place != size or len(stack) != 1 or below or type(stack[0]) not in _PLAIN:
                    raise DecodeError("a pickle ends in the middle")
                return stack[0]
            else:
                raise DecodeError(f"the opcode {op:#04x} is not for plain data")
        raise DecodeError("a pickle does not end")

    def _extend(self, target: object, items: list[Any]) -> None:
        if type(target) is not list:
            raise DecodeError("a pickle appends to something that is no list")
        _check_plain(items)
        target.extend(items)
        if len(target) > self._limits.array_items:
            raise LimitError(
                "array_items", self._limits.array_items, f"a list of {len(target)} items or more"
            )

    def _update(self, target: object, items: list[Any]) -> None:
        if type(target) is not dict:
            raise DecodeError("a pickle adds keys to something that is no map")
        _check_plain(items)
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values) or any(type(key) is not str for key in keys):
            raise DecodeError("a key of a map must be a string, and have a value")
        before = len(target)
        target.update(zip(keys, values, strict=True))
        if len(target) != before + len(keys):
            raise DecodeError("a key occurs twice in one map")
        if len(target) > self._limits.map_items:
            raise LimitError("map_items", self._limits.map_items, f"a map of {len(target)} items or more")

    def _reduce(self, function: object, arguments: object) -> object:
        if type(arguments) is not tuple:
            raise DecodeError("a pickle calls something without arguments")
        if function is _HOOKS_CLASS and arguments == ():
            return _NO_HOOKS
        if function is _REBUILD and len(arguments) == 6:
            return self._tensor(*arguments, None)
        if function is _REBUILD_WITH_DTYPE and len(arguments) == 7 and arguments[6] is not None:
            return self._tensor(*arguments)
        raise DecodeError("a pickle calls something that is no tensor")

    def _tensor(
        self,
        storage: object,
        offset: object,
        shape: object,
        strides: object,
        grad: object,
        hooks: object,
        dtype: object,
    ) -> torch.Tensor:
        if type(storage) is not _Storage or type(offset) is not int or offset != 0:
            raise DecodeError("a tensor does not begin where a storage of its own does")
        if grad is not False or hooks is not _NO_HOOKS:
            raise DecodeError("a tensor has a gradient or hooks")
        if type(shape) is not tuple or type(strides) is not tuple:
            raise DecodeError("a shape and strides must be tuples")
        name = storage.dtype
        if name is None and type(dtype) is _Name and dtype.role == "dtype":
            name = dtype.dtype
        elif name is None or dtype is not None:
            raise DecodeError("the dtype of a tensor is told twice, or not at all")
        assert name is not None
        size = check_shape(name, shape, self._limits)
        _check_contiguous(shape, strides)
        # The number of elements of an untyped storage is that of its bytes.
        if storage.numel * (DTYPES[name].itemsize if storage.dtype else 1) != size:
            raise DecodeError("the shape of a tensor and its storage contradict each other")
        if storage.key != str(self._tensors):
            raise DecodeError("storages are used in another order than they are written in, or twice")
        self._tensors += 1
        record = self._archive.record(b"data/" + storage.key.encode())
        return from_payload(name, shape, record, self._limits)


def _renumbered() -> DecodeError:
    return DecodeError("a pickle numbers its memo in another way than the pickler")


def _check_plain(items: list[Any]) -> None:
    if not _PLAIN.issuperset(map(type, items)):
        raise DecodeError("a pickle holds a part of a tensor by itself")


def _storage(identity: object) -> _Storage:
    """Return the storage of a persistent id: ("storage", class, key, "cpu", number of elements)."""
    if type(identity) is not tuple or len(identity) != 5:
        raise DecodeError("a storage is named by five values")
    tag, kind, key, location, numel = identity
    if tag != "storage" or type(kind) is not _Name or kind.role != "storage" or location != "cpu":
        raise DecodeError("a storage must be of a known class, and on the cpu")
    if type(key) is not str or type(numel) is not int:
        raise DecodeError("a storage must have a text for a key, and a number of elements")
    return _Storage(key, kind.dtype, numel)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[object, ...]) -> None:
    if len(shape) != len(strides) or any(type(stride) is not int for stride in strides):
        raise DecodeError("a tensor needs one stride, a number, for each dimension")
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        # The stride of a dimension of one element, and all of an empty tensor, mean nothing.
        if size > 1 and stride != expected and 0 not in shape:
            raise DecodeError("a tensor must be contiguous")
        expected *= size


def _check_depth(tree: object, limits: Limits) -> None:
    """Raise if lists and maps are nested too deeply. It goes down level by level: no recursion."""
    level = [tree]
    for _ in range(limits.depth + 1):
        level = [
            item
            for part in level
            for item in (part if type(part) is list else part.values() if type(part) is dict else ())
        ]
        if not level:
            return
    raise LimitError("depth", limits.depth, f"a message of {limits.depth + 1} levels or more")
