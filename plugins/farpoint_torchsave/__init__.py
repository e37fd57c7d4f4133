"""The serializer `torch`: files as `torch.save` writes them, read by a strict reader of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpoint.plugins import SerializerPlugin, hookimpl

if TYPE_CHECKING:
    from farpoint.limits import Limits
    from farpoint.serializer import Serializer


def _make(limits: Limits) -> Serializer:
    from farpoint_torchsave.serializer import TorchSaveSerializer

    return TorchSaveSerializer(limits)


@hookimpl
def farpoint_serializers() -> Iterator[SerializerPlugin]:
    """Register the serializer `torch`."""
    yield SerializerPlugin(name="torch", factory=_make)
