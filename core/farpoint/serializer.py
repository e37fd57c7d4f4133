"""What a serializer is: the one place where messages become bytes, and bytes messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch

from farpoint.limits import DEFAULT_LIMITS, Limits

Wire: TypeAlias = "None | bool | int | float | str | bytes | torch.Tensor | list[Wire] | tuple[Wire, ...] | dict[str, Wire]"
"""What may travel: plain data with tensors as leaves. A tuple arrives as a list."""

Frame: TypeAlias = "bytes | bytearray | memoryview"


class Serializer(ABC):
    """Turns a tree of plain data and tensors into frames, and back.

    A serializer guarantees:

    * **Round trip.** `decode(encode(tree))` equals the tree for every `Wire` value: integers from -2**63 to
      2**64 - 1, every float including NaN and the infinities, strings, bytes, lists (a tuple comes back as a list)
      and maps with string keys; tensors of every dtype in `farpoint.tensors.DTYPES` with their shape and values.
      Strides, conj and neg bits and `requires_grad` are not part of a tensor's value here: a decoded
      tensor is contiguous, plain and requires no grad.
    * **Only a view's own bytes travel**, never the rest of its storage. `encode` may return frames that alias the
      memory of a contiguous tensor: the caller writes them before it lets anybody change the tensor.
    * **Decoded tensors are writable and own their memory**: they never alias the frames.
    * **Hostile bytes raise `DecodeError`** (`LimitError` below it) and nothing else; they never execute anything, and never
      allocate more than a small multiple of the bytes that arrived.

    Args:
        limits: What `decode` refuses to exceed.
    """

    name: ClassVar[str]

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits

    @abstractmethod
    def encode(self, tree: Wire) -> list[Frame]:
        """Return the frames of a tree: the header first, then whatever travels out of band.

        Raises:
            EncodeError: The tree holds something that cannot travel (a sparse, quantized, nested or meta tensor,
                an integer beyond 64 bits, an object of another type).
        """

    @abstractmethod
    def decode(self, frames: Sequence[Frame]) -> Wire:
        """Return the tree of these frames.

        Raises:
            DecodeError: The frames are not what `encode` writes.
            LimitError: They exceed `limits`.
        """
