"""How a link begins: encryption, a token, an answer; all of it within one time limit."""

from __future__ import annotations

import socket
import ssl
import struct
import time

from farpoint.errors import DecodeError, NotAdmittedError, TransportError
from farpoint_tcp.framing import ANSWER_MAGIC, MAGIC, TOKEN_BYTES, VERSION, Answer, greeting

_REFUSALS = {
    Answer.NOT_LET_IN: "it does not let us in: the token is missing or wrong, or too many wrong ones came from this "
    "address within a minute; ask whoever runs it, and give Credentials(token=...)",
    Answer.NO_ROOM: "it has no room for another link; close one, or let it listen with a larger "
    "Limits(links=..., links_per_address=...)",
    Answer.OTHER_VERSION: "it speaks another version of this protocol; install the same farpoint on both sides",
    Answer.FAILED: "the listener failed to accept the link; its own output says why",
}


class Deadline:
    """A time limit for several steps together.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return how many seconds are left.

        Raises:
            TimeoutError: None.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        return left


def wrap(sock: socket.socket, url: str, context: ssl.SSLContext, host: str | None) -> ssl.SSLSocket:
    """Return a socket for TLS: of a client that verifies this host, or of a server if there is none to verify.

    Raises:
        TransportError: The context is not made for that.
    """
    try:
        return context.wrap_socket(
            sock, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )
    except (ssl.SSLError, ValueError) as error:
        raise TransportError(url, f"the TLS context does not fit: {error}") from error


def handshake(sock: ssl.SSLSocket, deadline: Deadline) -> None:
    """Begin TLS.

    Raises:
        OSError: The two do not agree, or are too slow.
    """
    sock.settimeout(deadline.left())
    sock.do_handshake()


def hang_up(sock: socket.socket, seconds: float, said: bytes = b"") -> None:
    """Close a connection so that the last word is heard: `close` alone, with bytes unread, would take it back."""
    try:
        deadline = Deadline(seconds)
        if said:
            sock.settimeout(seconds)
            sock.sendall(said)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while True:
            sock.settimeout(deadline.left())
            if not socket.socket.recv(sock, 4096):
                break
    except OSError:
        pass  # it is gone, or too slow
    finally:
        sock.close()


def introduce(sock: socket.socket, url: str, token: bytes, deadline: Deadline) -> None:
    """Greet a listener, and return when it welcomes us.

    Raises:
        TransportError: It does not, or is none.
        OSError: The connection broke.
    """
    try:
        sock.settimeout(deadline.left())
        sock.sendall(greeting(token))
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        pass  # it may have answered before it closed
    answer = _read(sock, len(ANSWER_MAGIC) + 2, deadline)
    if not answer.startswith(ANSWER_MAGIC) or len(answer) < len(ANSWER_MAGIC) + 2:
        raise TransportError(url, _guess(answer))
    version, said = answer[len(ANSWER_MAGIC) :]
    if version != VERSION or said not in set(Answer):
        said = Answer.OTHER_VERSION
    if said != Answer.WELCOME:
        kind = NotAdmittedError if said == Answer.NOT_LET_IN else TransportError
        raise kind(url, _REFUSALS[Answer(said)])


def meet(sock: socket.socket, deadline: Deadline) -> str:
    """Return the token in the greeting of somebody who dials.

    Raises:
        Refusal: It speaks another version.
        DecodeError: This is no greeting.
        OSError: The connection broke, or took too long.
    """
    head = _read(sock, len(MAGIC) + 3, deadline, MAGIC)
    if len(head) < len(MAGIC) + 3 or not head.startswith(MAGIC):
        raise DecodeError(f"this is no greeting: {head[:16]!r}")
    version, length = struct.unpack_from("<BH", head, len(MAGIC))
    if version != VERSION:
        raise Refusal(Answer.OTHER_VERSION, f"it speaks version {version}")
    if length > TOKEN_BYTES:
        raise DecodeError(f"a token of {length} bytes")
    token = _read(sock, length, deadline)
    if len(token) < length:
        raise DecodeError("the greeting ends in its token")
    return token.decode(errors="replace")


class Refusal(DecodeError):
    """Somebody is not let in, and told so.

    Attributes:
        answer: What it is told.
    """

    def __init__(self, said: Answer, reason: str) -> None:
        self.answer = said
        super().__init__(reason)


def _read(sock: socket.socket, count: int, deadline: Deadline, expected: bytes = b"") -> bytes:
    """Return so many bytes; fewer if no more come, or once they are not the expected ones."""
    got = b""
    while len(got) < count and expected.startswith(got[: len(expected)]):
        sock.settimeout(deadline.left())
        try:
            more = sock.recv(count - len(got))
        except ConnectionResetError:
            break
        if not more:
            break
        got += more
    return got


def _guess(answer: bytes) -> str:
    """Return what answers like this, and what to type in place of the URL."""
    if not answer:
        return (
            "somebody accepts there, and hangs up without a word: a listener that was just closed, one for tls://, "
            "or none of farpoint's"
        )
    if answer.startswith((b"HTTP/", b"<")):
        return "an HTTP server answers there; a worker that listens for websockets is reached with ws:// or wss://"
    if answer.startswith(b"\x15\x03"):
        return "somebody answers there with TLS; write tls:// in place of tcp://"
    return f"somebody answers there who is no farpoint listener: {answer!r}; check the port"
