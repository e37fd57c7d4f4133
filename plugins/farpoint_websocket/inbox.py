"""What has arrived: one thread for each link hands it to the receiver."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import attrs

from farpoint.transport import Receiver
from farpoint_websocket.outbox import stuck
from farpoint_websocket.wire import Message


@attrs.frozen
class _End:
    """What is queued behind the last message."""

    cause: Exception | None


class Inbox:
    """The messages of one link that have not been received yet.

    Receivers run operations, and write; the thread of the event loop does neither, so that it can answer pings and
    take in what lets a writer go on.

    Args:
        name: What the thread is called.
        done: Called after each message that was received.
        broken: Called with what a receiver has raised; returns the cause that it is told.

    Attributes:
        received: The cost of the messages that the receiver is done with.
    """

    def __init__(self, name: str, done: Callable[[], None], broken: Callable[[BaseException], Exception]) -> None:
        self.received = 0
        self._done = done
        self._broken = broken
        self._queue: SimpleQueue[Message | _End] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._introduce: Callable[[], Receiver | None]

    def start(self, introduce: Callable[[], Receiver | None]) -> None:
        """Begin to deliver to whom a function returns, if to anybody; it is called on the thread."""
        self._introduce = introduce
        self._thread.start()

    def put(self, message: Message) -> None:
        """Queue a message."""
        self._queue.put(message)

    def end(self, cause: Exception | None) -> None:
        """Queue the end. Only the first one counts."""
        self._queue.put(_End(cause))

    def alive(self, seconds: float) -> bool:
        """Return whether the receiver is at work, or was less than so many seconds ago."""
        return not stuck(self._thread.ident or 0, seconds)

    def join(self, seconds: float) -> None:
        """Wait until everything is delivered, but no longer than so many seconds."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        receiver = self._introduce()
        if receiver is None:
            return
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                receiver.lost(item.cause)
                return
            try:
                receiver.received(item.frames)
            except BaseException as error:
                receiver.lost(self._broken(error))
                if not isinstance(error, Exception):
                    raise
                return
            self.received += item.cost
            # Without this the last message would stay in memory until the next one comes.
            del item
            self._done()
