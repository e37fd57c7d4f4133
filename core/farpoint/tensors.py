"""Tensors as bytes: the closed table of dtypes, and a strict reader for bytes that nobody vouches for."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Final

import torch

from farpoint.errors import DecodeError, EncodeError, LimitError
from farpoint.limits import Limits

_NAMES = (
    "float64 float32 float16 bfloat16 complex128 complex64 complex32 int64 int32 int16 int8 uint8 uint16 uint32 uint64 "
    "bool float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
).split()

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
"""Every dtype that travels, by its name. Names from the wire are looked up here and nowhere else."""

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}

_LARGEST_DIM = 2**40

_Window = ctypes.c_ubyte * 2**46

_HUGE_PAGE = 2 * 2**20
_HUGE_PAGES: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)

_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as what travels: detached, contiguous, strided, without conj or neg bit.

    The result shares the tensor's memory where it already is all that.

    Raises:
        EncodeError: It is of a kind that does not travel.
    """
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        raise EncodeError(f"a {type(tensor).__name__} cannot travel as a plain tensor; convert it to a torch.Tensor first")
    if tensor.is_quantized:
        raise EncodeError("a quantized tensor cannot travel; send tensor.dequantize() instead")
    if tensor.is_nested:
        raise EncodeError("a nested tensor cannot travel; send tensor.to_padded_tensor(0) or its tensor.unbind() instead")
    if tensor.layout is not torch.strided:
        raise EncodeError(f"a tensor of layout {tensor.layout} cannot travel; send tensor.to_dense() instead")
    if tensor.device.type != "cpu":
        raise EncodeError(f"a tensor on {tensor.device} cannot travel; send tensor.cpu() instead")
    if tensor.dtype not in DTYPE_NAMES:
        raise EncodeError(f"a tensor of {tensor.dtype} cannot travel; convert it to one of {', '.join(DTYPES)}")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # The stride of a dimension of size one is anything, and does not travel.
    return plain.view(-1).view(plain.shape) if 1 in plain.shape else plain


def payload(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor that `dense` returned, without a copy. They keep the tensor alive."""
    size = tensor.numel() * tensor.itemsize
    if size == 0:
        return memoryview(b"")
    address = tensor.data_ptr()
    if address == 0:
        raise EncodeError("a tensor whose storage was resized to nothing cannot travel")
    # torch has no buffer protocol, and numpy, which would lend its own, is no dependency of ours. The window is
    # cut to size at once: an array type of just this size would cost 8 us to make, for each size anew.
    raw = _Window.from_address(address)
    raw.owner = tensor  # type: ignore[attr-defined]  # a ctypes array takes attributes, typeshed does not say so
    return memoryview(raw).cast("B")[:size]


def room_for(nbytes: int) -> torch.Tensor:
    """Return bytes that are not set, for a large tensor: in huge pages, where the system has them.

    The kernel gives a page when it is first written to, and for pages of 4 KiB that takes longer than writing them.

    Raises:
        RuntimeError: There is not as much memory.
    """
    room = torch.empty(nbytes, dtype=torch.uint8)
    if _HUGE_PAGES is not None:
        begin, end = (address // _HUGE_PAGE * _HUGE_PAGE for address in (room.data_ptr() + _HUGE_PAGE - 1, room.data_ptr() + nbytes))
        if begin < end:
            # A kernel without them refuses; small pages do as well.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _HUGE_PAGES)
    return room


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a large tensor that `dense` returned."""
    return room_for(tensor.nbytes).copy_(tensor.view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def check_shape(dtype: str, shape: object, limits: Limits) -> int:
    """Check a claimed dtype and shape, and return the size in bytes that they imply.

    Raises:
        DecodeError: The dtype is unknown, or the shape is no list of sizes.
        LimitError: It has too many dimensions, or is larger than a message may be.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DecodeError(f"no dtype {str(dtype)[:40]!r} is known")
    if not isinstance(shape, list | tuple):
        raise DecodeError("a shape must be a list of sizes")
    if len(shape) > limits.tensor_dims:
        raise LimitError("tensor_dims", limits.tensor_dims, f"a tensor of {len(shape)} dimensions")
    numel = 1
    without_zeros = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _LARGEST_DIM:
            raise DecodeError("a size of a tensor must be an integer from 0 to 2**40")
        numel *= size
        without_zeros *= size or 1
    itemsize = DTYPES[dtype].itemsize
    # An empty tensor still has strides, computed from its other sizes: they must not overflow either.
    if without_zeros * itemsize > 2**62:
        raise LimitError("message_bytes", limits.message_bytes, "the product of a tensor's sizes")
    return numel * itemsize


def from_payload(dtype: str, shape: Sequence[int], data: memoryview | bytes | bytearray, limits: Limits) -> torch.Tensor:
    """Return a tensor of its own memory made of bytes that are not trusted.

    Args:
        dtype: A name of `DTYPES`.
        shape: Its sizes.
        data: Its elements, little-endian, contiguous.
        limits: What must not be exceeded.

    Raises:
        DecodeError: The bytes are not exactly such a tensor.
        LimitError: It is larger than allowed.
    """
    size = check_shape(dtype, shape, limits)
    view = memoryview(data).cast("B") if not isinstance(data, memoryview) or data.format != "B" else data
    if size != view.nbytes:
        raise DecodeError(f"a {dtype} tensor of shape {list(shape)} has {size} bytes, and {view.nbytes} arrived")
    if size > limits.message_bytes:
        raise LimitError("message_bytes", limits.message_bytes, f"a tensor of {size} bytes")
    torch_dtype = DTYPES[dtype]
    if size == 0:
        # By way of another dtype of that size: making a complex32 tensor warns, and warnings may be errors.
        return torch.zeros(tuple(shape), dtype=_SAME_SIZE[torch_dtype.itemsize]).view(torch_dtype)
    # A private copy, and no count or offset: with them torch 2.13 reads out of bounds on hostile values.
    own = bytearray(view)
    if torch_dtype is torch.bool and bool((torch.frombuffer(own, dtype=torch.uint8) > 1).any()):
        raise DecodeError("a bool tensor holds bytes other than 0 and 1")
    return torch.frombuffer(own, dtype=torch_dtype).view(tuple(shape))
