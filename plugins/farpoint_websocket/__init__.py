"""The transport over WebSockets: workers on other machines, also behind web proxies, in the clear or over TLS."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator

from farpoint.plugins import TransportPlugin, hookimpl
from farpoint.transport import Transport


def _make() -> Transport:
    from farpoint_websocket.transport import WebsocketTransport

    return WebsocketTransport()


@hookimpl
def farpoint_transports() -> Iterator[TransportPlugin]:
    """Register the transport `websocket`."""
    yield TransportPlugin(name="websocket", schemes=("ws", "wss"), factory=_make)


@atexit.register
def _leave() -> None:
    """End all links at the exit of the process.

    It is registered here and not where links are made, because the last to be registered is the first to be called:
    the core, which registers later, still has something to send.
    """
    if "farpoint_websocket.runner" in sys.modules:
        sys.modules["farpoint_websocket.runner"].leave()
