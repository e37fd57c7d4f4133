"""The transports over sockets: `tcp://host:port`, `tls://host:port` and `unix:///path`."""

from __future__ import annotations

from collections.abc import Iterator

from farpoint.plugins import TransportPlugin, hookimpl
from farpoint.transport import Transport


def _tcp() -> Transport:
    from farpoint_tcp.transport import TcpTransport

    return TcpTransport()


def _tls() -> Transport:
    from farpoint_tcp.transport import TlsTransport

    return TlsTransport()


def _unix() -> Transport:
    from farpoint_tcp.transport import UnixTransport

    return UnixTransport()


@hookimpl
def farpoint_transports() -> Iterator[TransportPlugin]:
    """Register the transports `tcp`, `tls` and `unix`."""
    yield TransportPlugin(name="tcp", schemes=("tcp",), factory=_tcp)
    yield TransportPlugin(name="tls", schemes=("tls",), factory=_tls)
    yield TransportPlugin(name="unix", schemes=("unix",), factory=_unix)
