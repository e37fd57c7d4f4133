"""The msgpack serializer: compact headers, and tensors beside them, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpoint.plugins import SerializerPlugin, hookimpl

if TYPE_CHECKING:
    from farpoint.limits import Limits
    from farpoint.serializer import Serializer


def _make(limits: Limits) -> Serializer:
    from farpoint_msgpack.serializer import MsgpackSerializer

    return MsgpackSerializer(limits)


@hookimpl
def farpoint_serializers() -> Iterator[SerializerPlugin]:
    """Register the serializer `msgpack`."""
    yield SerializerPlugin(name="msgpack", factory=_make)
