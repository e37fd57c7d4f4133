"""The transport for `ws://` and `wss://`."""

from __future__ import annotations

from typing import ClassVar

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.transport import Accept, Link, Listener, Receiver, Transport
from farpoint_websocket.dialer import dial
from farpoint_websocket.listener import WebsocketListener
from farpoint_websocket.place import parse
from farpoint_websocket.runner import runner


class WebsocketTransport(Transport):
    """Joins processes, on one machine or several: `ws://host:port`, and `wss://host:port` over TLS.

    Port 0 of a listener means any that is free; `Listener.url` says which. `?compress=1` behind the URL of both
    sides compresses what travels.
    """

    schemes: ClassVar[tuple[str, ...]] = ("ws", "wss")

    def encrypts(self, url: str) -> bool:
        return parse(url).secure

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        link = dial(runner(), parse(url), credentials)
        link.start(lambda: receiver)
        return link

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        return WebsocketListener(runner(), parse(url), accept, admission)

    def local_url(self, name: str) -> str:
        """Return a URL on this machine where nobody listens. Which port it becomes, `Listener.url` says."""
        return "ws://127.0.0.1:0"
