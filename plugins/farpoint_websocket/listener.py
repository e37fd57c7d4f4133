"""A place where links arrive."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading

import attrs
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.typing import Origin, Subprotocol

from farpoint.access import Admission
from farpoint.errors import TransportError
from farpoint.transport import Accept, Listener
from farpoint_websocket.connection import WRITE_LIMIT, ServerEnd, logger
from farpoint_websocket.door import Door, Doorstep, token_in
from farpoint_websocket.link import WebsocketLink, spell
from farpoint_websocket.place import Place
from farpoint_websocket.runner import Runner
from farpoint_websocket.wire import MAX_CHUNK, SUBPROTOCOL


class WebsocketListener(Listener):
    """A server socket on the event loop.

    Args:
        runner: Whose loop it lives on.
        place: Where it listens.
        accept: Called on the thread of each new link.
        admission: Whom to let in.

    Raises:
        TransportError: It cannot be listened there.
    """

    def __init__(self, runner: Runner, place: Place, accept: Accept, admission: Admission) -> None:
        self.limits = admission.limits
        self._runner = runner
        self._accept = accept
        self._admission = admission
        self._compress = place.compress
        self._closing = threading.Lock()
        self._socket = _bind(place, admission)
        self.url = attrs.evolve(place, port=self._socket.getsockname()[1]).spelled
        self._server = runner.call(self.url, self._serve())
        runner.guests.add(self)

    def __repr__(self) -> str:
        return f"<WebsocketListener {self.url}>"

    def close(self) -> None:
        # The lock is never released: whoever has it closes.
        if not self._runner.foreign() and self._closing.acquire(False):
            self._runner.guests.discard(self)
            self._runner.call(self.url, self._stop())

    def descriptor(self) -> int:
        """Return the file descriptor of its socket, -1 if that is closed."""
        return self._socket.fileno()

    def join(self, seconds: float) -> None:
        """Return: what `close` does is done when it returns."""

    async def _serve(self) -> Server:
        limits = self.limits
        return await serve(
            self._meet,
            sock=self._socket,
            ssl=self._admission.tls,
            # Programs that are no browsers have no origin.
            origins=[None, *(Origin(origin) for origin in self._admission.origins)],
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression="deflate" if self._compress else None,
            process_request=Door(self._admission).answer,
            server_header=None,
            open_timeout=limits.open_seconds,
            # The library pings at intervals and gives up when a send blocks a pong; `farpoint_websocket.pulse` does not.
            ping_interval=None,
            close_timeout=limits.close_seconds,
            max_size=MAX_CHUNK,
            write_limit=WRITE_LIMIT,
            logger=logger,
            create_connection=ServerEnd,
        )

    async def _meet(self, connection: ServerConnection) -> None:
        """Turn a connection that was let in into a link, and keep it alive."""
        assert isinstance(connection, ServerEnd)
        url = f"{self.url} from {spell(connection.remote_address)}"
        link = WebsocketLink(self._runner, url, connection, self.limits)
        assert connection.request is not None  # it was let in
        link.token = token_in(connection.request.headers)
        link.start(lambda: self._accept(link))
        await link.live()

    async def _stop(self) -> None:
        self._server.close(close_connections=False)
        while self._server.is_serving():  # noqa: ASYNC110  # the library closes it in the next turn of the loop
            await asyncio.sleep(0)


def _bind(place: Place, admission: Admission) -> Doorstep:
    """Return a socket that listens at a place.

    Raises:
        TransportError: It cannot be listened there.
    """
    if place.secure and admission.tls is None:
        raise TransportError(
            place.url, "wss needs a certificate to show: pass Admission(tls=context), or listen at ws://"
        )
    if not place.secure and admission.tls is not None:
        raise TransportError(place.url, "there is a certificate, and ws does not show it; listen at wss://")
    if unspeakable := [token for token in admission.tokens if not speakable(token)]:
        raise TransportError(
            place.url,
            f"{len(unspeakable)} of the tokens cannot be shown in an HTTP header: use visible ASCII characters",
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        doorstep = Doorstep(family, admission.limits)
    except OSError as error:
        raise TransportError(place.url, f"no address of this machine is called {place.host}: {error}") from error
    try:
        # Links of a listener that is closed may linger in the kernel, and would keep the port.
        doorstep.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        doorstep.bind(address)
        doorstep.listen()
    except OSError as error:
        doorstep.close()
        known = {
            errno.EADDRINUSE: "somebody listens there already; close that listener or take another port (0: any)",
            errno.EADDRNOTAVAIL: "this machine does not have that address; 127.0.0.1 is always there",
            errno.EACCES: "this port is reserved for the administrator; take one above 1023",
        }
        raise TransportError(place.url, known.get(error.errno or 0, str(error))) from error
    return doorstep


def speakable(token: str) -> bool:
    """Return whether a token can stand in a header."""
    return token.isascii() and token.isprintable() and " " not in token
