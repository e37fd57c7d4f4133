"""Messages as one msgpack header, and the bytes of their tensors in frames of their own.

The frames of `["x", tensor, 3, tensor]`::

    frame 0   msgpack of  ["x", {"$t": ["float32", [2, 3]]}, 3, {"$t": ["int64", []]}]
    frame 1   the 24 bytes of the first tensor, little-endian and contiguous
    frame 2   the 8 bytes of the second

The n-th placeholder of the header stands for frame n: there is no index that could be out of range,
repeated or left out. What a header says of a tensor is believed only as far as the frame that arrived bears
it out.

Most messages are lists of small commands without any tensor. They are packed by one call into C and
unpacked by one call into C, with no Python code per item.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import msgpack
import torch

from farpoint.errors import DecodeError, EncodeError, FarpointError, LimitError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.serializer import Frame, Serializer, Wire
from farpoint.tensors import DTYPE_NAMES, dense, from_payload, payload

_KEY: Final = "$t"
_PACKED_KEY: Final = b"\xa2$t"

_CONTAINERS: Final = frozenset([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
_NO_CONTAINERS: Final = bytes(byte for byte in range(256) if byte not in _CONTAINERS)
_BRIEF: Final = 512

_EXCEEDED: Final = re.compile(r"(\d+) exceeds max_(str|array|map|bin)_len")
_EXCEEDED_LIMIT: Final = {
    "str": "text_chars",
    "array": "array_items",
    "map": "map_items",
    "bin": "header_bytes",
}


class MsgpackSerializer(Serializer):
    """Header in msgpack, tensors out of band. It keeps no state: threads may share one.

    The limit `text_chars` counts the bytes of a string in UTF-8.

    Args:
        limits: What `decode` refuses to exceed.
    """

    name: ClassVar[str] = "msgpack"

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(limits)
        self._unpack: Callable[..., Any] = functools.partial(
            msgpack.unpackb,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=limits.text_chars,
            max_bin_len=limits.header_bytes,
            max_map_len=limits.map_items,
            max_ext_len=0,
        )

    def encode(self, tree: Wire) -> list[Frame]:
        frames: list[Frame] = [b""]

        def place(leaf: object) -> dict[str, list[object]]:
            if not isinstance(leaf, torch.Tensor):
                raise EncodeError(f"a {type(leaf).__name__} cannot travel; send plain data and tensors")
            plain = dense(leaf)
            frames.append(payload(plain))
            return {_KEY: [DTYPE_NAMES[plain.dtype], list(plain.shape)]}

        try:
            # A packer of its own for each message: making one costs 0.1 us, and sharing one between threads
            # costs the message.
            header: bytes = msgpack.Packer(default=place).pack(tree)
        except FarpointError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise EncodeError(f"this message cannot travel: {error}") from error
        if header.count(_PACKED_KEY) != len(frames) - 1:
            _refuse_reserved_key(tree)
        frames[0] = header
        return frames

    def decode(self, frames: Sequence[Frame]) -> Wire:
        limits = self.limits
        if not frames:
            raise DecodeError("a message has at least one frame, and none arrived")
        if len(frames) - 1 > limits.tensors:
            raise LimitError("tensors", limits.tensors, f"a message of {len(frames) - 1} tensors")
        header = frames[0]
        size = header.nbytes if isinstance(header, memoryview) else len(header)
        if size > limits.header_bytes:
            raise LimitError("header_bytes", limits.header_bytes, f"a header of {size} bytes")
        if type(header) is not bytes:
            header = bytes(header)
        restorer = _Restorer(frames, limits)
        try:
            if size > _BRIEF:
                _check_complete(header)
            tree: Wire = self._unpack(
                header, max_array_len=min(limits.array_items, size), object_pairs_hook=restorer.map
            )
        except FarpointError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise _translate(error, limits) from error
        if restorer.used != len(frames):
            raise DecodeError(f"a header names {restorer.used - 1} tensors, and {len(frames) - 1} arrived")
        # A message with no more bytes that could open a container than levels allowed is not too deep.
        if len(header.translate(None, _NO_CONTAINERS)) > limits.depth:
            _check_depth(tree, limits, with_tensors=len(frames) > 1)
        return tree


class _Restorer:
    """Turns the maps of one header into maps and tensors, as the unpacker meets them."""

    __slots__ = ("_budget", "_frames", "_limits", "used")

    def __init__(self, frames: Sequence[Frame], limits: Limits) -> None:
        self._frames = frames
        self._limits = limits
        self._budget = limits.message_bytes
        self.used = 1

    def map(self, pairs: list[tuple[object, object]]) -> dict[object, object] | torch.Tensor:
        """Return the map of these pairs, or the tensor for which it stands."""
        if len(pairs) == 1 and pairs[0][0] == _KEY:
            return self._tensor(pairs[0][1])
        tree = dict(pairs)
        if len(tree) != len(pairs):
            raise DecodeError("a key occurs twice in one map")
        for key in tree:
            if type(key) is not str:
                raise DecodeError(f"a key of a map must be a string, not {type(key).__name__}")
        if _KEY in tree:
            raise DecodeError(f"the key {_KEY!r} is reserved for tensors")
        return tree

    def _tensor(self, claim: object) -> torch.Tensor:
        if type(claim) is not list or len(claim) != 2:
            raise DecodeError("a tensor is described by its dtype and its shape")
        if self.used >= len(self._frames):
            raise DecodeError("a header names more tensors than arrived")
        frame = self._frames[self.used]
        self.used += 1
        self._budget -= frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if self._budget < 0:
            total = self._limits.message_bytes - self._budget
            raise LimitError("message_bytes", self._limits.message_bytes, f"tensors of {total} bytes or more")
        return from_payload(claim[0], claim[1], frame, self._limits)


def _refuse_extension(code: int, data: bytes) -> object:
    raise DecodeError(f"a message holds an extension of type {code}, and none is allowed")


def _refuse_reserved_key(tree: object) -> None:
    """Raise if a map of the caller has the key by which tensors are marked.

    A text or a number may look like that key once it is packed: this looks at the tree itself.
    """
    if isinstance(tree, dict):
        if _KEY in tree:
            raise EncodeError(f"the key {_KEY!r} is reserved for tensors; use another")
        for value in tree.values():
            _refuse_reserved_key(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _refuse_reserved_key(value)


def _check_complete(header: bytes) -> None:
    """Raise unless all items that the header announces are there.

    The unpacker allocates a list of the announced length before it looks for the items: 3 bytes buy 64 KiB,
    again and again when nested. Skipping builds nothing, takes a seventh of the time of unpacking, and
    notices. Headers up to `_BRIEF` do without: they could not buy a megabyte.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(header))
    unpacker.feed(header)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise DecodeError("a header ends in the middle") from None


def _check_depth(tree: object, limits: Limits, *, with_tensors: bool) -> None:
    """Raise if lists and maps are nested too deeply.

    The unpacker's own bound is 1024 levels. This goes down level by level, in C: the collector names what a
    list or a map refers to, and skips numbers and strings, which refer to nothing. About 10 ns an item.
    """
    level = [tree]
    for _ in range(limits.depth + 1):
        if with_tensors:  # a tensor refers to its class, and that to everything
            level = [item for item in level if type(item) is not torch.Tensor]
        level = gc.get_referents(*level)
        if not level:
            return
    raise LimitError("depth", limits.depth, f"a message of {limits.depth + 1} levels or more")


def _translate(error: Exception, limits: Limits) -> DecodeError:
    """Return what an error of the unpacker means."""
    exceeded = _EXCEEDED.match(str(error))
    if exceeded:
        limit = _EXCEEDED_LIMIT[exceeded[2]]
        return LimitError(limit, getattr(limits, limit), f"a {exceeded[2]} of {exceeded[1]}")
    if isinstance(error, msgpack.StackError):
        return LimitError("depth", limits.depth, "a message of more than 1024 levels")
    return DecodeError(f"a header is not what a peer of ours writes: {error}")
