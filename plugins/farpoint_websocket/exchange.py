"""The life of one link on the event loop: it reads, writes, and watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial

from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import CloseCode
from websockets.protocol import State

from farpoint.errors import DecodeError, LimitError, TransportError
from farpoint.limits import Limits
from farpoint_websocket.connection import ClientEnd, ServerEnd
from farpoint_websocket.inbox import Inbox
from farpoint_websocket.outbox import Outbox
from farpoint_websocket.pulse import Pulse
from farpoint_websocket.window import Window
from farpoint_websocket.wire import BUSY, BYE, WAITING, Assembly, credit, read_credit

TURN = 8
"""Chunks that a link may send before it is the turn of others."""


class Exchange:
    """Moves messages between a connection and the two boxes of a link, until one of the sides ends it.

    Everything in here runs on the loop. Each side says `bye` behind the last message that it has written, so that
    both get everything that was written before they close.

    Args:
        url: Where the link leads, for errors.
        connection: What carries it.
        outbox: What is to be sent.
        inbox: Where arrivals go.
        limits: What is enforced.

    Attributes:
        opened: Set when the peer has accepted the link, or it has ended.
        accepted: Whether the peer has accepted it.
        ended: Whether it has ended.
        cause: What has broken it.
        hungry: Whether the peer may send more as soon as another message is received.
    """

    def __init__(
        self, url: str, connection: ClientEnd | ServerEnd, outbox: Outbox, inbox: Inbox, limits: Limits
    ) -> None:
        self.opened = asyncio.Event()
        self.accepted = self.ended = False
        self.cause: Exception | None = None
        self.hungry = False
        self._url = url
        self._connection = connection
        self._outbox = outbox
        self._inbox = inbox
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._assembly = Assembly(limits)
        self._window = Window(limits)
        self._pulse = Pulse(limits, time.monotonic())
        self._helpers: set[asyncio.Task[None]] = set()
        self._completed = 0
        self._credit = 0
        self._buffered = 0
        self._ready = self._question = self._answer = False
        self._heard_bye = self._pumping = self._leaving = False
        self._said_bye = 0.0

    async def run(self) -> None:
        """Live until the connection is gone."""
        self._connection.use(self)
        try:
            self._help(self._watch)
            await self._connection.wait_closed()
        finally:
            self._connection.transport.abort()
            for helper in self._helpers:
                helper.cancel()
            self.gone()

    def ready(self) -> None:
        """Let the peer send: it is known who receives."""
        self._ready = True
        self.pump()

    def fail(self, cause: Exception, code: int | None = None, reason: str = "") -> None:
        """Give the link up, and tell the peer why if there is a code for it."""
        if self.cause is not None or self.ended:
            return
        self.cause = cause
        self._outbox.drop(_broke(cause))
        if code is None:
            self._connection.transport.abort()
        else:
            self._leave(code, reason)

    def arrived(self, data: bytes | bytearray | str) -> None:
        """Take a chunk of the stream, or a notice."""
        if self.cause is not None:
            # Given up. What still comes is dropped, so that the peer gets to read why.
            return
        try:
            if isinstance(data, str):
                self._notice(data)
            else:
                self._chunk(data)
        except LimitError as error:
            self.fail(TransportError(self._url, str(error)), CloseCode.MESSAGE_TOO_BIG, str(error))
        except DecodeError as error:
            cause = TransportError(self._url, f"the peer does not speak as farpoint does: {error}")
            self.fail(cause, CloseCode.PROTOCOL_ERROR, str(error))

    def pump(self) -> None:
        """Send what there is to send, as far as it goes now."""
        if self._pumping:
            # TLS says in the middle of a push that there is room.
            return
        self._pumping = True
        try:
            done = self._send()
        finally:
            self._pumping = False
        if done and self._outbox.closed and self._outbox.empty:
            if not self._said_bye:
                self._said_bye = time.monotonic()
                self._connection.push(BYE)
            if self._heard_bye:
                self._leave(CloseCode.NORMAL_CLOSURE, "")

    def gone(self) -> None:
        """Tell both boxes of the end, once."""
        if self.ended:
            return
        self.ended = True
        if self.cause is None and not self._said_bye and not self._heard_bye:
            self.cause = self._diagnose()
        self._outbox.drop("the link is closed" if self.cause is None else _broke(self.cause))
        self._inbox.end(self.cause)
        # A link may be kept long after its end, and there may be half a message in here.
        self._assembly = Assembly(self._limits)
        self.opened.set()

    def _diagnose(self) -> TransportError | None:
        """Return what has ended the connection, None if it was the peer in good order."""
        if self._connection.state is not State.CLOSED:
            return TransportError(self._url, "the interpreter shuts down")
        error = self._connection.protocol.close_exc
        if isinstance(error, ConnectionClosedOK):
            return None
        cause = TransportError(self._url, describe(error, self._connection.failure))
        cause.__cause__ = self._connection.failure or error
        return cause

    def _chunk(self, chunk: bytes | bytearray) -> None:
        if self._heard_bye:
            raise DecodeError("a chunk after the goodbye")
        for message in self._assembly.feed(chunk):
            self._completed += message.cost
            self._inbox.put(message)
        arrived = self._assembly.arrived
        if self._window.exceeded(arrived):
            raise DecodeError("more was sent than there was credit for")
        if self._window.low(arrived):
            self.pump()

    def _notice(self, notice: str) -> None:
        amount = read_credit(notice)
        if amount is not None:
            self._credit += amount
            self._pulse.moved(time.monotonic())
            self.accepted = True
            self.opened.set()
        elif notice == WAITING:
            self._answer = self._inbox.alive(self._limits.stall_seconds)
        elif notice == BUSY:
            self._pulse.busy(time.monotonic())
        elif notice == BYE and not self._heard_bye:
            self._heard_bye = True
            self._outbox.close("the peer has closed the link")
        else:
            raise DecodeError(f"an unknown notice {notice[:20]!r}")
        self.pump()

    def _send(self) -> bool:
        """Send, and return whether nothing was left that may be sent."""
        for _ in range(TURN):
            if not self._connection.ready or self.cause is not None:
                return False
            notice = self._due()
            if notice:
                self._connection.push(notice)
                continue
            taken = self._outbox.take() if self._credit > 0 else None
            if taken is None:
                return True
            self._credit -= taken[1]
            self._connection.push(taken[0])
            del taken
            self._outbox.taken()
            self._pulse.moved(time.monotonic())
        # Other links want to send as well.
        self._loop.call_soon(self.pump)
        return False

    def _due(self) -> str:
        """Return the next notice to send, empty if there is none."""
        if self._ready and self._window.low(self._assembly.arrived):
            # Set before it is looked at what was received: who receives something later sees it, and wakes us.
            self.hungry = True
            amount = self._window.grant(self._assembly.arrived, self._completed, self._inbox.received)
            if amount:
                self.hungry = False
                return credit(amount)
        if self._answer:
            self._answer = False
            return BUSY
        if self._question:
            self._question = False
            return WAITING
        return ""

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._pulse.interval)
            now = time.monotonic()
            self._pulse.heard(self._connection.heard)
            buffered = self._connection.transport.get_write_buffer_size()
            if buffered < self._buffered and not self._connection.ready:
                self._pulse.moved(now)
            self._buffered = buffered
            waits = not self._outbox.empty
            reason = self._pulse.look(now, waits or not self._connection.ready)
            if reason:
                self.fail(TransportError(self._url, f"the link was given up: {reason}"))
                return
            if waits and self._credit <= 0 and self._pulse.asks(now):
                self._question = True
            if waits:
                # Also for a writer that was interrupted before it could wake us.
                self.pump()
            if self._pulse.tests(now):
                try:
                    async with asyncio.timeout(self._pulse.interval):
                        await self._connection.ping()
                except TimeoutError:
                    pass  # it waits in the buffer, behind what does not leave either
            if self._said_bye and now - max(self._said_bye, self._connection.heard) > self._limits.close_seconds:
                self._leave(CloseCode.NORMAL_CLOSURE, "")

    def _leave(self, code: int, reason: str) -> None:
        """Begin to end the connection."""
        if not self._leaving:
            self._leaving = True
            self._help(partial(self._hang_up, code, reason))

    async def _hang_up(self, code: int, reason: str) -> None:
        """End the connection, in good order where the peer plays along."""
        try:
            async with asyncio.timeout(self._limits.close_seconds):
                await self._connection.close(code, reason.encode()[:120].decode(errors="ignore"))
        except TimeoutError:
            pass
        self._connection.transport.abort()

    def _help(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Run a coroutine beside `run`, and give the link up if it fails. It is made here: the link may be gone before it begins."""

        async def guard() -> None:
            try:
                await work()
            except ConnectionClosed:
                pass  # `gone` learns it as well
            except Exception as error:
                self.fail(error)

        helper = self._loop.create_task(guard())
        self._helpers.add(helper)
        helper.add_done_callback(self._helpers.discard)


def _broke(cause: Exception) -> str:
    return f"the link is gone: {cause.cause if isinstance(cause, TransportError) else repr(cause)}"


def describe(closed: ConnectionClosed, failure: Exception | None = None) -> str:
    """Return what has ended a connection, for people."""
    if closed.rcvd is not None and (closed.rcvd_then_sent or closed.sent is None):
        return f"the peer has ended the link: {closed.rcvd.reason or 'it does not say why'} (code {closed.rcvd.code})"
    if closed.sent is not None:
        return f"the peer broke the protocol of WebSocket: {closed.sent.reason} (code {closed.sent.code})"
    return f"the connection broke: {failure or 'the peer is gone without a goodbye'}"
