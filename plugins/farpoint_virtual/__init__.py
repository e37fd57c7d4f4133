"""The transport within one process: what virtual workers speak over."""

from __future__ import annotations

from collections.abc import Iterator

from farpoint.plugins import TransportPlugin, hookimpl
from farpoint.transport import Transport


def _make() -> Transport:
    from farpoint_virtual.transport import VirtualTransport

    return VirtualTransport()


@hookimpl
def farpoint_transports() -> Iterator[TransportPlugin]:
    """Register the transport `virtual`."""
    yield TransportPlugin(name="virtual", schemes=("virtual",), factory=_make)
