"""A TCP proxy that means harm: it delays, slices, stalls, swallows and cuts what passes, and refuses, all by a seed.

Each connection has a fate of its own, drawn when it comes. The harm ends after `cuts` connections, so that whoever keeps trying
gets through.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit, urlunsplit

RESET = struct.pack("ii", 1, 0)
LATE, LONG = 0.01, 0.2
"""Seconds of a delay, and of a stall."""


class Fate:
    """What happens to one connection.

    Args:
        chance: Where it is drawn from.
        calm: Whether nothing does.
    """

    def __init__(self, chance: random.Random, *, calm: bool) -> None:
        draw = chance.random
        self.calm = calm
        self.chance = random.Random(chance.getrandbits(64))
        self.refused = not calm and draw() < 0.1
        self.reset = draw() < 0.5
        # Often in the greeting, or in the middle of a small packet; sometimes after megabytes.
        self.bytes = int(10 ** (1 + 6 * draw())) if not calm else 2**62
        self.swallows = draw() < 0.15
        self.slices = draw() < 0.3
        self.delays = draw() < 0.3
        self.stalls = draw() < 0.2


class Proxy:
    """Passes on what comes to `url`, more or less.

    Args:
        url: Where to.
        seed: What decides.
        cuts: How many connections get harmed.
        change: Called with each piece that passes, and with whether it comes from who has dialled; returns what is passed on.
        port: Where it listens, any port if 0.

    Attributes:
        url: Where to dial.
        harmed: How many connections were cut, refused or swallowed.
    """

    def __init__(
        self,
        url: str,
        seed: int = 0,
        cuts: int = 0,
        change: Callable[[bytes, bool], bytes] = lambda piece, _: piece,
        port: int = 0,
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._target = parts.hostname, parts.port
        self._chance = random.Random(seed)
        self._cuts = cuts
        self._change = change
        self._over = threading.Event()
        self._streams: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.harmed = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        host, port = self._listener.getsockname()
        self.url = urlunsplit(parts._replace(netloc=f"{host}:{port}"))
        self._go(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut everything, and listen no more."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        """Cut every connection now."""
        for stream in list(self._streams):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def _go(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            fate = Fate(self._chance, calm=self.harmed >= self._cuts)
            far = socket.socket()
            try:
                if fate.refused:
                    raise ConnectionRefusedError
                far.connect(self._target)
            except OSError:
                self.harmed += fate.refused
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                near.close()
                far.close()
                continue
            self._streams |= {near, far}
            ends = threading.Semaphore(0)
            for source, sink, dialled in ((near, far, True), (far, near, False)):
                self._go(self._pump, source, sink, dialled, fate, ends)
            self._go(self._finish, near, far, fate, ends)

    def _finish(self, near: socket.socket, far: socket.socket, fate: Fate, ends: threading.Semaphore) -> None:
        ends.acquire()
        resets = fate.reset and not fate.calm
        for stream in (near, far):
            if resets:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RD if resets else socket.SHUT_RDWR)
        if not ends.acquire(timeout=LONG):
            # It is stuck in a write.
            for stream in (near, far):
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
            ends.acquire()
        self._streams -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, dialled: bool, fate: Fate, ends: threading.Semaphore) -> None:  # it is one of two directions
        chance = random.Random(fate.chance.getrandbits(64))
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while piece := source.recv(chance.choice((1, 100, 4096, 2**16, 2**18)) if fate.slices else 2**18):
                if not fate.calm:
                    if fate.delays and chance.random() < 0.1:
                        self._over.wait(LATE * chance.random())
                    if fate.stalls and chance.random() < 0.02:
                        self._over.wait(LONG)
                    if len(piece) >= fate.bytes:
                        sink.sendall(piece[: fate.bytes])
                        self.harmed += 1
                        if fate.swallows:
                            self._over.wait(1.0)
                        return
                    fate.bytes -= len(piece)
                piece = self._change(piece, dialled)
                if fate.slices and len(piece) < 200:
                    for byte in piece:
                        sink.sendall(bytes([byte]))
                else:
                    sink.sendall(piece)
        except OSError:
            pass  # the other direction was cut
        finally:
            ends.release()
