"""Connecting to workers by URL."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from farpoint.access import Credentials
from farpoint.errors import InvalidNameError, WorkerRestartedError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.peer import Peer
from farpoint.remote import RemoteWorker, handles, me, preferred_serializers


def connect(
    url: str,
    *,
    token: str | None = None,
    ca: str | Path | None = None,
    tls: ssl.SSLContext | None = None,
    serializer: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> RemoteWorker:
    """Connect to a worker, and return its handle. Who is connected to it already gets the handle that exists.

    The handle is a context manager, too: `with farpoint.connect(url) as bob:` closes it at the end.

    Args:
        url: Where the worker listens: `farpoint worker` prints it.
        token: What opens its door; `FARPOINT_TOKEN` if not given.
        ca: File with the certificates that its own must be signed by; those that the system trusts if not given.
        tls: How to verify it, and the certificate to show, in place of `ca`.
        serializer: How tensors are written; `FARPOINT_SERIALIZER` or msgpack if not given.
        limits: Time-outs, and what is put up with: see `farpoint.limits.Limits`.

    Raises:
        NobodyListensError: Nobody listens there.
        TransportError: It cannot be reached, or does not let us in.
        ProtocolError: Who answers is no farpoint worker, or does not want us.
        InvalidNameError: Another worker of that name is connected.
    """
    for handle in handles():
        if handle.url == url and handle.peer.channel.lost is None and handle.peer.channel.lane is not None:
            return handle
    if ca is not None and tls is None:
        tls = ssl.create_default_context(cafile=ca)
    shown = os.environ.get("FARPOINT_TOKEN", "") if token is None else token
    made = Peer(me(), "", url, preferred_serializers(serializer), Credentials(shown, tls, limits))
    made.dial()
    return _handle(made)


def _handle(made: Peer) -> RemoteWorker:
    """Return the handle of a session that has just begun, or of the one that we have with that worker already."""
    known = me().peers[made.name]
    if known is not made:
        made.close()
        if known.incarnation != made.incarnation:
            if known.url != made.url:
                raise InvalidNameError("worker", made.name, f"the worker of that name at {known.url} is connected; close() it first")
            # We know before the old session does.
            known.end(WorkerRestartedError(made.name, "it has begun a new life, without our objects"))
            return connect_again(made)
    existing = next((handle for handle in handles() if handle.peer is known), None)
    return existing or RemoteWorker(known.name, known.url)


def connect_again(peer: Peer) -> RemoteWorker:
    """Begin a session like another one."""
    made = Peer(me(), "", peer.url, peer.offered, peer.credentials)
    made.dial()
    return _handle(made)


class _Connecting:
    """What `aconnect` returns: to be awaited, or entered by `async with`."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._connect = partial(connect, url, **options)
        self._handle: RemoteWorker | None = None

    def __await__(self) -> Generator[Any, None, RemoteWorker]:
        return asyncio.to_thread(self._connect).__await__()

    async def __aenter__(self) -> RemoteWorker:
        self._handle = await self
        return self._handle

    async def __aexit__(self, *exc_info: object) -> None:
        if self._handle is not None:
            await asyncio.to_thread(self._handle.close)


def aconnect(url: str, **options: Any) -> _Connecting:
    """Connect to a worker without blocking the event loop: `bob = await farpoint.aconnect(url)`.

    Also `async with farpoint.aconnect(url) as bob:`, which closes it at the end. Arguments and errors are those of `connect`.
    """
    return _Connecting(url, options)
