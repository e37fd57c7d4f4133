"""The ends of a WebSocket, as the library makes them, with what it does not do: see life, and refuse floods."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_once
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidHandshake
from websockets.frames import Frame as WireFrame
from websockets.frames import Opcode
from websockets.protocol import State

from farpoint.serializer import Frame
from farpoint_websocket.wire import CHUNK, MAX_CHUNK

_DATA = {Opcode.CONT, Opcode.TEXT, Opcode.BINARY}

WRITE_LIMIT = CHUNK
"""Bytes in the write buffer beyond which a sender waits."""

UNSENT = 256 * 1024
"""Bytes that the kernel may keep unsent: a ping must not wait behind megabytes on a slow line."""

FLOOD = 4 * MAX_CHUNK
"""Bytes in the write buffer that only somebody can cause who sends pings and does not read the answers."""

logger = logging.getLogger("farpoint.websocket")
# At level DEBUG the library writes the headers of each request, and with them the tokens; at INFO each connection, of which the
# worker itself says more.
logger.setLevel(logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a record says more than that a stranger has hung up, which websockets 15 and 16 call an error."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, InvalidHandshake | EOFError | OSError)


logger.addFilter(_is_news)


class User(Protocol):
    """What uses a connection; it is called on the event loop."""

    def arrived(self, data: bytes | bytearray | str) -> None:
        """Take a chunk of the stream, or a notice."""

    def pump(self) -> None:
        """Go on to send."""

    def gone(self) -> None:
        """Learn that the connection is gone."""


class _Direct(Connection):
    """A connection without the library's queue of arrivals and its waits for room.

    Data goes to its user within the call that has read it, and a push is done when it returns: that saves two turns
    of the event loop for each message, and a copy. The opening and closing handshakes, pings and pongs are the
    library's.

    Attributes:
        heard: When bytes last came.
        failure: What has broken the connection below the protocol.
    """

    heard = 0.0
    failure: Exception | None = None
    _user: User | None = None
    _text = False
    _full = False

    def use(self, user: User) -> None:
        """Hand everything to a user from now on, beginning with what came before."""
        self._user = user
        for data in self._early:
            user.arrived(data)
        self._early.clear()

    @property
    def ready(self) -> bool:
        """Whether there is room for a push. If not, `User.pump` is called when there is, or `User.gone`."""
        return not self._full and self.protocol.state is State.OPEN and not self.transport.is_closing()

    def push(self, data: Frame | str) -> None:
        """Send a message. Its memory is not needed any more afterwards."""
        if isinstance(data, str):
            self.protocol.send_text(data.encode())
        else:
            self.protocol.send_binary(data)
        for piece in self.protocol.data_to_send():
            self.transport.write(piece)

    def process_event(self, event: Any) -> None:
        if not isinstance(event, WireFrame) or event.opcode not in _DATA:
            super().process_event(event)
            return
        data: bytes | bytearray | str
        if event.opcode is Opcode.TEXT or self._text:
            # A notice in fragments is put together by nobody: it is not one that we know.
            self._text = not event.fin
            data = bytes(event.data).decode(errors="replace") if event.fin else ""
        else:
            data = event.data  # type: ignore[assignment]  # only outgoing frames hold views
        if self._user is None:
            self._early.append(data)
        else:
            self._user.arrived(data)

    def connection_made(self, transport: Any) -> None:
        self._early: list[bytes | bytearray | str] = []
        super().connection_made(transport)
        self.heard = time.monotonic()
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is not None:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, UNSENT)

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        super().data_received(data)
        if self.transport.get_write_buffer_size() > FLOOD:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._full = False
        if self._user is not None:
            self._user.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failure = exc
        super().connection_lost(exc)
        if self._user is not None:
            self._user.gone()


class ClientEnd(_Direct, ClientConnection):
    """The end that has dialled."""


class ServerEnd(_Direct, ServerConnection):
    """The end that was dialled.

    Attributes:
        left: Called when the connection is gone.
    """

    left: Callable[[], object] = staticmethod(lambda: None)

    async def handshake(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().handshake(*args, **kwargs)
        except asyncio.CancelledError:
            # The loop ends, and the library leaves the connection to nobody.
            self.transport.abort()
            raise

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.left()


class Dial(connect_once):
    """One attempt to connect, to exactly the place that was named."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Follow no redirect: a listener does not decide whom else this process talks to."""
        return exc
