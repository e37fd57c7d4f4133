"""What a pointer knows of its tensor without asking: shape, strides, dtype."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import Any
from weakref import WeakValueDictionary

import attrs
import torch

from farpoint.errors import ProtocolError
from farpoint.tensors import DTYPE_NAMES, DTYPES


@attrs.frozen(eq=False)
class TensorSpec:
    """Metadata of a tensor. Specs are interned: equal ones are one object, so that they compare by identity.

    Attributes:
        shape: Sizes, in elements.
        stride: Strides, in elements.
        offset: Storage offset, in elements.
        dtype: Element type.
        conj: Whether the conj bit is set.
        neg: Whether the neg bit is set.
        compact: Whether shape and dtype say it all: contiguous from the start of its storage, no bit set.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool = False
    neg: bool = False
    compact: bool = attrs.field(init=False)

    @compact.default
    def _is_compact(self) -> bool:
        dense = tuple(accumulate(reversed((*self.shape[1:], 1)), mul))[::-1] if self.shape else ()
        return self.stride == dense and not (self.offset or self.conj or self.neg)

    def to_wire(self) -> list[Any]:
        """Return the spec as plain data."""
        return [list(self.shape), list(self.stride), self.offset, DTYPE_NAMES[self.dtype], self.conj, self.neg]


_interned: WeakValueDictionary[tuple[Any, ...], TensorSpec] = WeakValueDictionary()


def intern_spec(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    conj: bool = False,
    neg: bool = False,
) -> TensorSpec:
    """Return the one spec of these values."""
    key = (shape, stride, offset, dtype, conj, neg)
    found = _interned.get(key)
    if found is None:
        found = _interned.setdefault(key, TensorSpec(*key))
    return found


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return the spec of a strided tensor."""
    return intern_spec(
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def describe_tensor(tensor: torch.Tensor) -> list[Any]:
    """Return the spec of a tensor as plain data. It is not interned: what a worker computes for others would add up."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    name = DTYPE_NAMES[tensor.dtype]
    return [shape, stride, int(tensor.storage_offset()), name, tensor.is_conj(), tensor.is_neg()]


def spec_from_wire(wire: Any, *, interned: bool = True) -> TensorSpec:
    """Return the spec that a peer claims.

    Args:
        wire: The spec as plain data.
        interned: Whether it is the one spec of these values. Interned specs stay for good: not for what a client makes up.

    Raises:
        ProtocolError: It is not one.
    """
    try:
        shape, stride, offset, dtype, conj, neg = wire
        sizes = [*shape, *stride, offset]
        if any(type(n) is not int or not 0 <= n <= 2**40 for n in sizes) or len(shape) != len(stride):
            raise ValueError(wire)
        make = intern_spec if interned else TensorSpec
        return make(tuple(shape), tuple(stride), offset, DTYPES[dtype], bool(conj), bool(neg))
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"not the metadata of a tensor: {str(wire)[:100]}") from error
