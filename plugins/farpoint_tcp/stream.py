"""A connected socket, in the clear or under TLS, as a link uses it: from several threads, in both directions."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import threading
from collections.abc import Sequence
from typing import Any

from farpoint.access import name_in
from farpoint.serializer import Frame

NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
IOV_MAX = 1024

MOMENT = 0.01
"""Seconds that a call waits for room to send, before its caller looks whether there is something else to do."""

USER_TIMEOUT = 20_000
"""Milliseconds for which the kernel waits for the peer's kernel to take what was written."""


class Stream:
    """A socket in the clear. One thread at a time reads, one writes; the two may differ.

    The socket itself blocks: a thread that waits for the next message does so in the call that reads it. Calls
    that must not wait say so one by one.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ending = threading.Lock()
        self._open = True
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, int(MOMENT * 1e6)))

    def receive(self, space: memoryview) -> int:
        """Wait for bytes, and return how many there are now; 0 if no more come."""
        return self._sock.recv_into(space)

    def receive_now(self, space: memoryview) -> int | None:
        """Return how many bytes there are now, 0 if no more come, None if there are none yet."""
        try:
            return self._sock.recv_into(space, 0, NOW)
        except BlockingIOError:
            return None

    def send(self, buffers: Sequence[Frame], *, waiting: bool) -> int:
        """Return how many of these bytes were taken. If none can be taken, wait for a moment or, if told so, not at all."""
        flags = socket.MSG_NOSIGNAL if waiting else NOW
        try:
            if len(buffers) == 1:
                return self._sock.send(buffers[0], flags)
            return self._sock.sendmsg(buffers[:IOV_MAX], (), flags)
        except BlockingIOError:
            return 0

    def wait(self) -> None:
        """Wait for a moment until bytes have come or could be sent."""
        self._poll(select.POLLIN | select.POLLOUT, MOMENT)

    def end_writing(self) -> None:
        """Say that nothing more is written. What was is still delivered."""
        socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def undelivered(self) -> int:
        """Return how many written bytes the peer's kernel has not confirmed yet, 0 if it never will."""
        if self._sock.family == socket.AF_UNIX or self._poll(0, 0.0):  # which are in its queue at once, or nowhere
            return 0
        left: int = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))[0]
        return left

    def shut(self) -> None:
        """End both directions. Whoever waits for one is woken; what has come or was taken before is not lost."""
        # Never after `close`: the number of the descriptor may be somebody else's by then.
        with self._ending:
            if self._open:
                try:
                    # Not the method of an SSLSocket: that one forgets the encryption, and writes on in the clear.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
                except OSError:  # the peer was first
                    pass

    def close(self) -> None:
        """Give the socket back. Nobody reads or writes at this time, or later."""
        with self._ending:
            self._open = False
            self._sock.close()

    def forget(self) -> None:
        """Close the descriptor of a forked child, and leave the connection to the parent."""
        self._ending = threading.Lock()
        if self._open:
            self._open = False
            os.close(self._sock.detach())

    def _poll(self, events: int, seconds: float | None) -> bool:
        """Wait for events. Return whether there are any; that both directions have ended is always one."""
        waiter = select.poll()
        waiter.register(self._sock, events)
        return bool(waiter.poll(None if seconds is None else seconds * 1000))


class TlsStream(Stream):
    """A socket under TLS.

    OpenSSL allows one call at a time on a connection, whatever its direction, and CPython before 3.13 holds no lock
    around it: all calls are made under one here. None of them waits, so that a reader never keeps a writer out.
    """

    _sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self._lock = threading.Lock()

    def receive(self, space: memoryview) -> int:
        while True:
            count, events = self._receive(space)
            if count is not None:
                return count
            self._poll(events, None)

    def receive_now(self, space: memoryview) -> int | None:
        return self._receive(space)[0]

    def send(self, buffers: Sequence[Frame], *, waiting: bool) -> int:
        # Retried after a refusal, OpenSSL wants to see the same bytes again: the first buffer changes only when it was taken.
        with self._lock:
            try:
                return self._sock.send(buffers[0])
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLWantReadError:
                events = select.POLLIN
        if waiting:
            self._poll(events, MOMENT)
        return 0

    def _receive(self, space: memoryview) -> tuple[int | None, int]:
        with self._lock:
            try:
                return self._sock.recv_into(space), 0
            except ssl.SSLWantReadError:
                return None, select.POLLIN
            except ssl.SSLWantWriteError:
                return None, select.POLLOUT


def prepare(sock: socket.socket) -> None:
    """Set what every connection needs: no delay of small messages, and an end to a dead one."""
    if sock.family == socket.AF_UNIX:
        return
    options: list[tuple[int, int, Any]] = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT),
    ]
    for level, name, value in options:
        sock.setsockopt(level, name, value)


def remote_name(sock: socket.socket) -> str:
    """Return the name in the certificate that the peer has shown and we have verified, empty if there is none."""
    return name_in(sock.getpeercert()) if isinstance(sock, ssl.SSLSocket) else ""
