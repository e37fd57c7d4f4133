"""Links within one process: a write calls the receiver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import chain, count
from typing import ClassVar

import attrs

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.errors import NobodyListensError, NotAdmittedError, TransportError
from farpoint.serializer import Frame
from farpoint.transport import Accept, Link, Listener, Receiver, Transport

PREFIX = "virtual://"


@attrs.frozen
class _End:
    """What is queued behind the last message."""

    cause: Exception | None


class VirtualLink(Link):
    """One end of a link, and the direction that leads away from it.

    A message is delivered on the thread that writes it, without a copy, unless this direction is delivering
    already (on another thread, or further up on this one): then a copy waits in a queue for that deliverer.
    """

    __slots__ = ("_busy", "_closed", "_over", "_peer", "_queue", "_receiver", "_url")

    _peer: VirtualLink
    _receiver: Receiver

    def __init__(self, url: str) -> None:
        self._url = url
        self._queue: deque[Sequence[Frame] | _End] = deque()
        # Held by whoever delivers, and for good once the end was delivered. It is only ever tried, never
        # waited for: a finalizer or a signal handler may write between any two lines of this class, on a
        # thread that is inside it already, and would wait for itself.
        self._busy = threading.Lock()
        self._closed = False
        self._over = False

    def write(self, frames: Sequence[Frame]) -> None:
        if self._closed:
            raise TransportError(self._url, "the link is closed")
        if not self._queue and self._busy.acquire(False):
            # Whoever delivered until now may have left something behind meanwhile; it comes first.
            if not self._queue:
                try:
                    self._receiver.received(frames)
                except BaseException as error:
                    self._break(error)
                    if not isinstance(error, Exception):
                        raise
                    return
                self._busy.release()
                if self._queue:
                    self._drain()
                return
            self._busy.release()
        self._queue.append([bytes(frame) for frame in frames])
        self._drain()
        if self._over:
            raise TransportError(self._url, "the link was closed during this write")

    def close(self) -> None:
        if not self._closed:
            self._closed = self._peer._closed = True
            try:
                self._end(None)
            finally:
                self._peer._end(None)

    def _end(self, cause: Exception | None) -> None:
        self._queue.append(_End(cause))
        self._drain()

    def _drain(self) -> None:
        """Deliver what is queued, unless somebody does already."""
        # The queue is looked at again after each release: what was queued just before it had no deliverer.
        while self._queue and self._busy.acquire(False):
            while self._queue:
                message = self._queue.popleft()
                if isinstance(message, _End):
                    self._over = True
                    self._queue.clear()
                    self._receiver.lost(message.cause)
                    return
                try:
                    self._receiver.received(message)
                except BaseException as error:
                    self._break(error)
                    if not isinstance(error, Exception):
                        raise
                    return
            self._busy.release()

    def _break(self, error: BaseException) -> None:
        """End the link after a receiver has raised."""
        cause = (
            error if isinstance(error, Exception) else TransportError(self._url, f"interrupted by {error!r}")
        )
        self._closed = self._peer._closed = self._over = True
        self._queue.clear()
        try:
            self._receiver.lost(cause)
        finally:
            self._peer._end(cause)


class VirtualListener(Listener):
    """A name in the registry of a transport."""

    def __init__(self, transport: VirtualTransport, name: str, accept: Accept, admission: Admission) -> None:
        self.url = PREFIX + name
        self.accept = accept
        self.admission = admission
        self._transport = transport
        self._name = name

    def close(self) -> None:
        with self._transport._lock:
            if self._transport._listeners.get(self._name) is self:
                del self._transport._listeners[self._name]


class VirtualTransport(Transport):
    """Joins those who are in the same process, by name: `virtual://alice`."""

    schemes: ClassVar[tuple[str, ...]] = ("virtual",)

    inline: ClassVar[bool] = True
    within_process: ClassVar[bool] = True

    def __init__(self) -> None:
        self._listeners: dict[str, VirtualListener] = {}
        self._lock = threading.Lock()

    def local_url(self, name: str) -> str:
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        with self._lock:
            return PREFIX + next(free for free in names if free not in self._listeners)

    def encrypts(self, url: str) -> bool:
        return False

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        name = _name(url)
        with self._lock:
            listener = self._listeners.get(name)
            names = sorted(self._listeners)
        if listener is not None and not listener.admission.admits(credentials.token):
            raise NotAdmittedError(url, "the token is not accepted there")
        if listener is None:
            listed = ", ".join(PREFIX + known for known in names) or "nobody"
            raise NobodyListensError(url, f"nobody listens there (in this process listen: {listed})")
        near, far = VirtualLink(url), VirtualLink(url)
        near._peer, far._peer = far, near
        far._receiver = receiver
        # Busy until its receiver is known: the callback may close the link.
        near._busy.acquire()
        try:
            near._receiver = listener.accept(far)
        except BaseException as error:
            near._closed = far._closed = near._over = True
            if not isinstance(error, Exception):
                raise
            raise TransportError(url, f"the link was not accepted: {error!r}") from error
        near._busy.release()
        near._drain()
        return near

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        name = _name(url)
        with self._lock:
            if name in self._listeners:
                fix = "close that listener, or take another name"
                raise TransportError(url, "somebody listens there already", fix)
            listener = self._listeners[name] = VirtualListener(self, name, accept, admission)
        return listener


def _name(url: str) -> str:
    name = url.removeprefix(PREFIX)
    if not name or name == url:
        raise TransportError(url, "this is no place in this process", f"write {PREFIX}name")
    return name
