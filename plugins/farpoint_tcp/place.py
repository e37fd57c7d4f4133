"""Where a URL leads: how to dial there, and how to listen there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from farpoint.errors import NobodyListensError, TransportError
from farpoint_tcp.door import party
from farpoint_tcp.greeting import Deadline

BACKLOG = 128


class Place(ABC):
    """Where somebody listens, or may.

    Attributes:
        url: As it was written.
        scheme: Its first part.
        host: Who must be named in a certificate.
    """

    url: str
    scheme: str
    host: str

    @abstractmethod
    def dial(self, deadline: Deadline) -> socket.socket:
        """Return a connection.

        Raises:
            TransportError: There is none to be had.
        """

    @abstractmethod
    def bind(self) -> socket.socket:
        """Return a socket that listens here.

        Raises:
            TransportError: The place is taken, or is none.
        """

    @abstractmethod
    def listening(self, sock: socket.socket) -> str:
        """Return the URL of this place, once the socket that `bind` has returned listens at it."""

    @abstractmethod
    def caller(self, sock: socket.socket) -> tuple[str, str]:
        """Return where a connection comes from or leads to: for a reader, and as what is counted as one address."""

    @abstractmethod
    def release(self) -> None:
        """Tidy up after `bind`, before its socket is closed."""


class HostPlace(Place):
    """A host and a port."""

    def __init__(self, url: str, scheme: str) -> None:
        self.url = url
        self.scheme = scheme
        try:
            parts = urlsplit(url)
            self.host, port = parts.hostname or "127.0.0.1", parts.port
        except ValueError as error:
            raise TransportError(url, f"{error}; write {scheme}://host:port") from error
        beside = parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password
        if parts.scheme != scheme or port is None or beside:
            raise TransportError(url, f"this is no host and port; write {scheme}://host:port")
        self.port = port

    def dial(self, deadline: Deadline) -> socket.socket:
        found = self._resolve()
        tried: list[str] = []
        refused = 0
        for number, (family, address) in enumerate(found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(deadline.left() / (len(found) - number))
                sock.connect(address)
                if sock.getsockname() == sock.getpeername():
                    # Where nobody listens, a port that the kernel picks for us may be just the one that we dial.
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
                return sock
            except OSError as error:
                sock.close()
                refused += isinstance(error, ConnectionRefusedError)
                tried.append(f"{_spell(address)}: {_reason(error)}")
        kind = NobodyListensError if refused == len(found) else TransportError
        raise kind(
            self.url, f"cannot be reached ({'; '.join(tried)}); check host and port, and that a worker listens there"
        )

    def bind(self) -> socket.socket:
        failed: OSError | None = None
        for family, address in self._resolve():
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
                return sock
            except OSError as error:
                sock.close()
                failed = failed or error
        assert failed is not None
        advice = "close what listens there, or take another port (0 for any that is free)"
        if failed.errno != errno.EADDRINUSE:
            advice = "write an address of this machine, and a port that you may use"
        raise TransportError(self.url, f"cannot listen there: {_reason(failed)}; {advice}") from failed

    def listening(self, sock: socket.socket) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{sock.getsockname()[1]}"

    def caller(self, sock: socket.socket) -> tuple[str, str]:
        address = sock.getpeername()
        return _spell(address), party(address[0])

    def release(self) -> None:
        pass  # the kernel does

    def _resolve(self) -> list[tuple[int, tuple[Any, ...]]]:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise TransportError(self.url, f"no address is known for {self.host}: {_reason(error)}") from error
        return [(int(family), address) for family, _, _, _, address in found]


class PathPlace(Place):
    """A path in the file system, where a socket is or will be."""

    host = ""

    def __init__(self, url: str, scheme: str) -> None:
        self.url = url
        self.scheme = scheme
        self.path = url.removeprefix(f"{scheme}://")
        if self.path == url or not self.path.startswith("/") or self.path.endswith("/"):
            raise TransportError(url, f"this is no path; write {scheme}:///absolute/path, with three slashes")
        if len(os.fsencode(self.path)) > 107:
            raise TransportError(url, "a path to a socket has at most 107 bytes; take a shorter one")
        self._own: tuple[int, int] | None = None

    def dial(self, deadline: Deadline) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The kernel's own limit: with Python's a full backlog is an error at once.
            whole, part = divmod(deadline.left(), 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(part * 1e6)))
            sock.connect(self.path)
            return sock
        except OSError as error:
            sock.close()
            advice = "check the path, and that a worker listens there"
            kind = NobodyListensError if isinstance(error, ConnectionRefusedError | FileNotFoundError) else TransportError
            raise kind(self.url, f"cannot be reached ({_reason(error)}); {advice}") from error

    def bind(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _alone(Path(self.path).parent):
                self._clear()
                sock.bind(self.path)
                Path(self.path).chmod(0o600)  # before anybody can connect
                sock.listen(BACKLOG)
                self._own = self._identity()
            return sock
        except OSError as error:
            sock.close()
            if isinstance(error, TransportError):
                raise
            raise TransportError(self.url, f"cannot listen there: {_reason(error)}; take another path") from error

    def listening(self, sock: socket.socket) -> str:
        return self.url

    def caller(self, sock: socket.socket) -> tuple[str, str]:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        process, user, _ = struct.unpack("3i", credentials)
        return f"{self.path} (process {process} of user {user})", "unix"

    def release(self) -> None:
        if self._own is not None and self._own == self._identity():
            Path(self.path).unlink()

    def _clear(self) -> None:
        """Remove the file of a listener that is gone."""
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise TransportError(self.url, "there is a file already that is no socket; take another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                Path(self.path).unlink()
                return
            except BlockingIOError:
                pass  # it has more callers than it can take
        raise TransportError(self.url, "somebody listens there already; close that listener or take another path")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that two who start at once do not take each other's file for a left-over."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield  # also if somebody holds it for good: that must not keep everybody out
    finally:
        os.close(descriptor)


def _spell(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
