"""What a network can do at best: two processes, one TCP connection over loopback, and nothing else.

    python -m benchmarks.reference PORT      # the other process: it connects, and serves

It is told what to do in lines of text: `echo COUNT SIZE`, `take BYTES`, `give BYTES`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

MEBI = 2**20
_ROOT = Path(__file__).parents[1]


class Reference:
    """The other process, and a connection to it. It is a context manager that ends both."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            door.settimeout(60.0)
            port = str(door.getsockname()[1])
            self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.reference", port], cwd=_ROOT)
            self._sock, _ = door.accept()
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = memoryview(bytearray(MEBI))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sock.close()
        self._process.wait()

    def echo(self, count: int, size: int = 64) -> None:
        """Send some bytes there and back, again and again."""
        self._sock.sendall(f"echo {count} {size}\n".encode())
        said, space = bytes(size), self._memory[:size]
        for _ in range(count):
            self._sock.sendall(said)
            _fill(self._sock, space)

    def send(self, data: memoryview) -> None:
        """Send bytes, and wait until they are there: in new memory."""
        self._sock.sendall(f"take {data.nbytes}\n".encode())
        self._sock.sendall(data)
        _fill(self._sock, self._memory[:1])

    def get(self, nbytes: int) -> None:
        """Receive bytes, into new memory."""
        self._sock.sendall(f"give {nbytes}\n".encode())
        _fill(self._sock, memoryview(bytearray(nbytes)))


def _fill(sock: socket.socket, space: memoryview) -> None:
    while space:
        count = sock.recv_into(space)
        if not count:
            raise ConnectionError("the other process has ended")
        space = space[count:]


def _serve(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        memory = bytes(MEBI)
        while line := _line(sock):
            what, *numbers = line.split()
            match what, [int(number) for number in numbers]:
                case "echo", [count, size]:
                    space = memoryview(bytearray(size))
                    for _ in range(count):
                        _fill(sock, space)
                        sock.sendall(space)
                case "take", [nbytes]:
                    _fill(sock, memoryview(bytearray(nbytes)))
                    sock.sendall(b".")
                case "give", [nbytes]:
                    for start in range(0, nbytes, MEBI):
                        sock.sendall(memoryview(memory)[: min(MEBI, nbytes - start)])


def _line(sock: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        letter = sock.recv(1)
        if not letter:
            return ""
        line += letter
    return line.decode()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
