"""Tensors between two processes: storages as memory files or by value, and geometry that nobody vouches for."""

from __future__ import annotations

import fcntl
import os
import resource
import weakref
from collections.abc import Sequence
from typing import Any, Final, cast

import attrs
import torch

from farpoint import resizing
from farpoint.errors import DecodeError, EncodeError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.tensors import DTYPE_NAMES, DTYPES, check_shape, dense, from_payload, payload

SMALL: Final = 32 * 1024
"""Bytes of a storage up to which it travels by value: a memory file costs as much as copying these."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_OTHERS: Final = fcntl.F_SEAL_WRITE | 0x10  # F_SEAL_FUTURE_WRITE: no other executor could map it
_WITHIN: Final = attrs.evolve(DEFAULT_LIMITS, tensor_dims=64)
_LARGEST: Final = 2**62

_files: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()


def file_of(storage: torch.UntypedStorage) -> int | None:
    """Return the descriptor of the memory file that a storage of this process is mapped from."""
    return _files.get(storage)


def room() -> bool:
    """Return whether one more storage may keep a memory file: links need descriptors, too, and mappings are limited."""
    return len(_files) < min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16_384)


def content(storage: torch.UntypedStorage) -> memoryview:
    """Return the bytes of a storage, without a copy. They keep it alive."""
    return payload(torch.empty(0, dtype=torch.uint8).set_(storage))


def private(own: bytearray) -> torch.UntypedStorage:
    """Return a storage that is this memory."""
    return torch.frombuffer(own, dtype=torch.uint8).untyped_storage() if own else new_storage(0)


def new_storage(nbytes: int) -> torch.UntypedStorage:
    """Return a storage of its own memory."""
    return torch.UntypedStorage(nbytes)  # type: ignore[no-untyped-call]


def write_file(data: memoryview) -> int:
    """Return the descriptor of a new memory file that holds these bytes. Nobody can change its size any more."""
    descriptor = os.memfd_create("farpoint", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_file(descriptor: int) -> torch.UntypedStorage:
    """Return the storage that a memory file is, for as long as it is used; the descriptor is not needed for that.

    Raises:
        DecodeError: It is another kind of file, or somebody could shrink it: reading would then end this process.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise DecodeError("a descriptor is no memory file") from error
    if seals & (_SEALS | _OTHERS) != _SEALS:
        raise DecodeError("a memory file is not sealed as it must be")
    size = os.fstat(descriptor).st_size
    mapped = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", shared=True, nbytes=size)
    return cast("torch.UntypedStorage", mapped)


def keep_file(storage: torch.UntypedStorage, descriptor: int) -> None:
    """Keep the descriptor of a storage as long as the storage."""
    _files[storage] = descriptor
    weakref.finalize(storage, os.close, descriptor).atexit = False


def share(tensor: torch.Tensor) -> torch.Tensor:
    """Return a new object, which has no views yet, in a memory file if it is not small and there is room."""
    storage = tensor.untyped_storage()
    if storage.nbytes() <= SMALL or not room():
        return tensor
    descriptor = write_file(content(storage))
    try:
        shared = map_file(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    keep_file(shared, descriptor)
    return build(describe(tensor, 0), [shared])


def grow(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    """Return a larger storage with the same content, and zeros after it, in a memory file as `share` does."""
    if nbytes <= SMALL or not room():
        return resizing.grow(storage, nbytes)
    descriptor = os.memfd_create("farpoint", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # or writing what is not there would end this process
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        grown = map_file(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    keep_file(grown, descriptor)
    return resizing.fill(grown, storage)


def describe(tensor: torch.Tensor, storage: int) -> list[Any]:
    """Return a tensor as plain data: the number of its storage, and how it lies there.

    Raises:
        EncodeError: It is of a kind that cannot be described so.
    """
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
        dense(tensor)  # knows what is wrong with it
        raise EncodeError("a tensor of this kind cannot travel")
    geometry = [list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
    return [storage, DTYPE_NAMES[tensor.dtype], *geometry, tensor.is_conj(), tensor.is_neg()]


def build(wire: Any, storages: Sequence[torch.UntypedStorage]) -> torch.Tensor:
    """Return the tensor that `describe` made this of.

    Args:
        wire: What arrived: anything.
        storages: What its number is an index of.

    Raises:
        DecodeError: It is no tensor, or one that does not lie within its storage.
    """
    if type(wire) is not list or len(wire) != 7:
        raise DecodeError("a tensor must be described by seven values")
    index, dtype, shape, strides, offset, conj, neg = wire
    if type(index) is not int or not 0 <= index < len(storages):
        raise DecodeError("a tensor is in a storage that is not there")
    check_shape(dtype, shape, _WITHIN)
    if type(strides) is not list or len(strides) != len(shape) or type(conj) is not bool or type(neg) is not bool:
        raise DecodeError("a tensor must have a stride for each size, and two flags")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (offset, *strides)):
        raise DecodeError("a stride or an offset must be an integer that is not negative")
    if conj and not DTYPES[dtype].is_complex:
        raise DecodeError("a real tensor is said to be conjugated")
    storage = storages[index]
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * DTYPES[dtype].itemsize > storage.nbytes():
        raise DecodeError("a tensor ends beyond its storage")
    # Making a complex32 tensor warns, but for this way.
    empty = from_payload(dtype, (0,), b"", _WITHIN) if dtype == "complex32" else torch.empty(0, dtype=DTYPES[dtype])
    tensor = empty.set_(storage, offset, shape, strides)
    tensor = tensor.conj() if conj else tensor
    return torch._neg_view(tensor) if neg else tensor
