"""One end of a link, as its users see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from websockets.frames import CloseCode

from farpoint.access import name_in
from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint.transport import Link, Receiver
from farpoint_websocket.connection import ClientEnd, ServerEnd, logger
from farpoint_websocket.exchange import Exchange
from farpoint_websocket.inbox import Inbox
from farpoint_websocket.outbox import Outbox
from farpoint_websocket.runner import Runner


class WebsocketLink(Link):
    """A link over one WebSocket. Made on the event loop, used on any thread.

    A small message is copied, and sent in the background; at most 1 MiB of such copies waits. A large one is sent
    from the memory of its writer, who waits for it.

    Args:
        runner: Whose loop it lives on.
        url: Where it leads, for errors.
        connection: What carries it.
        limits: What is enforced.
    """

    def __init__(self, runner: Runner, url: str, connection: ClientEnd | ServerEnd, limits: Limits) -> None:
        self.address = spell(connection.remote_address)
        self.identity = name_in(connection.transport.get_extra_info("peercert"))
        self.limits = limits
        self._runner = runner
        self._connection = connection
        self._url = url
        self._socket = connection.transport.get_extra_info("socket")
        self._inbox = Inbox(f"farpoint-websocket {self.address}", self._received, self._broken)
        self._outbox = Outbox(url, lambda: runner.soon(self.exchange.pump), lambda cause: self._fail(cause, "a write was interrupted"))
        self.exchange = Exchange(url, connection, self._outbox, self._inbox, limits)

    def __repr__(self) -> str:
        return f"<WebsocketLink {self._url} {self.address}>"

    @property
    def heard(self) -> float:
        return self._connection.heard

    def write(self, frames: Sequence[Frame]) -> None:
        self._runner.check(self._url)
        self._outbox.put(frames)

    def close(self) -> None:
        # In a forked child the other end of this would be closed under the hands of the parent.
        if not self._runner.foreign():
            self._outbox.close("the link is closed")

    async def live(self) -> None:
        """Carry messages until the connection is gone. Runs on the loop."""
        self._runner.guests.add(self)
        try:
            await self.exchange.run()
        finally:
            self._runner.guests.discard(self)

    def start(self, introduce: Callable[[], Receiver]) -> None:
        """Begin to deliver to whom a function returns. When it has, the peer learns that it was let in."""

        def greet() -> Receiver | None:
            try:
                receiver = introduce()
            except Exception as error:
                logger.exception("a link from %s was not accepted", self.address)
                self._fail(error, f"the link was not accepted: {error!r}")
                return None
            self._runner.soon(self.exchange.ready)
            return receiver

        self._inbox.start(greet)

    def descriptor(self) -> int:
        """Return the file descriptor of its socket, -1 if that is closed."""
        number: int = self._socket.fileno()
        return number

    def join(self, seconds: float) -> None:
        """Wait until the receiver knows of the end, but no longer than so many seconds."""
        self._inbox.join(seconds)

    def _received(self) -> None:
        """Note that a message has been received."""
        if self.exchange.hungry:
            self._runner.soon(self.exchange.pump)

    def _broken(self, error: BaseException) -> Exception:
        """End the link after its receiver has raised, and return what that receiver is told."""
        text = f"the receiver of the peer has failed: {type(error).__name__}"
        cause = error if isinstance(error, Exception) else TransportError(self._url, f"interrupted by {error!r}")
        self._fail(cause, text)
        return cause

    def _fail(self, cause: Exception, reason: str) -> None:
        self._runner.soon(self.exchange.fail, cause, CloseCode.INTERNAL_ERROR, reason)


def spell(address: Any) -> str:
    """Return the address of a socket as it stands in a URL."""
    if not isinstance(address, tuple):
        return str(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
