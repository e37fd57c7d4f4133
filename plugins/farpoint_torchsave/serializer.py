"""Messages as `torch.save` files of one frame, which `torch.load` reads as well."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import ClassVar

import torch

from farpoint.errors import DecodeError, EncodeError
from farpoint.serializer import Frame, Serializer, Wire
from farpoint.tensors import dense
from farpoint_torchsave.reader import Reader

# The first protocol with bytes of its own: the default, 2, writes them as text with a call that decodes it.
_PROTOCOL = 3

_LEAST, _GREATEST = -(2**63), 2**64 - 1


class TorchSaveSerializer(Serializer):
    """Writes with `torch.save`, reads with `farpoint_torchsave.reader`. Stateless: threads may share one.

    `torch.load` never sees what arrives: also with `weights_only=True` a file of half a kilobyte makes it
    allocate gigabytes, hang or crash.

    The limit `text_chars` counts the bytes of a string in UTF-8.

    Args:
        limits: What `decode` refuses to exceed.
    """

    name: ClassVar[str] = "torch"

    def encode(self, tree: Wire) -> list[Frame]:
        buffer = io.BytesIO()
        try:
            torch.save(_Copier().plain(tree), buffer, pickle_protocol=_PROTOCOL)
        except RecursionError:
            raise EncodeError("this message is nested too deeply to travel, or holds itself") from None
        except RuntimeError as error:
            raise EncodeError(f"this message cannot travel: {error}") from error
        return [buffer.getbuffer()]

    def decode(self, frames: Sequence[Frame]) -> Wire:
        if len(frames) != 1:
            raise DecodeError(f"a message of this serializer has one frame, and {len(frames)} arrived")
        return Reader(frames[0], self.limits).read()


class _Copier:
    """Makes a tree of exact plain types: nothing occurs twice, each tensor fills a storage of its own.

    Python's pickler would write a list that occurs twice as a reference to the first, and a class by its
    name; torch would write all of a storage for the sake of a view. The reader refuses all three.
    """

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def plain(self, leaf: object) -> object:
        """Return the copy of a tree.

        Raises:
            EncodeError: Something in it cannot travel.
        """
        if isinstance(leaf, list | tuple):
            # Integers are most of what travels: they are checked here, without a call for each.
            return [
                item if type(item) is int and _LEAST <= item <= _GREATEST else self.plain(item)
                for item in leaf
            ]
        kind = type(leaf)
        if leaf is None or kind is bool or kind is float or kind is bytes:
            return leaf
        if isinstance(leaf, str):
            return self._text(leaf)
        if isinstance(leaf, torch.Tensor):
            return self._tensor(leaf)
        if isinstance(leaf, dict):
            return {self._key(key): self.plain(value) for key, value in leaf.items()}
        if isinstance(leaf, int):
            if not _LEAST <= leaf <= _GREATEST:
                raise EncodeError("an integer beyond 64 bits cannot travel")
            return int(leaf)
        if isinstance(leaf, float):
            return float(leaf)
        raise EncodeError(f"a {kind.__name__} cannot travel; send plain data and tensors")

    def _text(self, text: str) -> str:
        try:
            text.encode()  # the pickler would let lone surrogates pass
        except UnicodeEncodeError as error:
            raise EncodeError(f"a text cannot travel: {error}") from error
        return text if type(text) is str else str.__str__(text)

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise EncodeError(
                f"a map with a key of type {type(key).__name__} cannot travel; keys must be strings"
            )
        return self._text(key)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = dense(tensor)
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.numel() * plain.itemsize or storage.data_ptr() in self._storages:
            plain = plain.clone()
            storage = plain.untyped_storage()
        if storage.nbytes():
            self._storages.add(storage.data_ptr())
        return plain
