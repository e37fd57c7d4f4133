"""The transports: how a link is dialled, and where one can be waited for."""

from __future__ import annotations

import secrets
import shutil
import ssl
import tempfile
import weakref
from pathlib import Path
from typing import ClassVar

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.errors import TransportError
from farpoint.transport import Accept, Link, Listener, Receiver, Transport
from farpoint_tcp.framing import TOKEN_BYTES
from farpoint_tcp.greeting import Deadline, handshake, introduce, wrap
from farpoint_tcp.link import StreamLink
from farpoint_tcp.listener import StreamListener
from farpoint_tcp.place import HostPlace, PathPlace, Place
from farpoint_tcp.stream import Stream, TlsStream, prepare, remote_name
from farpoint_tcp.watch import watch


class TcpTransport(Transport):
    """Links over TCP in the clear, for a network that is trusted: `tcp://host:port`."""

    schemes: ClassVar[tuple[str, ...]] = ("tcp",)

    def encrypts(self, url: str) -> bool:
        return False

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        place = self._place(url)
        tls = self._client_tls(url, credentials.tls)
        token = credentials.token.encode(errors="replace")
        if len(token) > TOKEN_BYTES:
            raise TransportError(url, f"a token has at most {TOKEN_BYTES} bytes, this one has {len(token)}")
        seconds = credentials.limits.open_seconds
        deadline = Deadline(seconds)
        sock = place.dial(deadline)
        address = ""
        try:
            address, _ = place.caller(sock)
            prepare(sock)
            if tls is not None:
                sock = wrap(sock, url, tls, place.host)
                handshake(sock, deadline)
            introduce(sock, url, token, deadline)
            stream = TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else Stream(sock)
            link = StreamLink(stream, url, address, remote_name(sock), credentials.limits, watch)
            link.start(receiver)
        except (OSError, RuntimeError) as error:
            sock.close()
            cause = error.cause if isinstance(error, TransportError) else _explain(error, seconds)
            where = f"{address}: " if place.host and address not in url else ""
            raise TransportError(url, where + cause) from error
        except BaseException:
            sock.close()
            raise
        return link

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        place = self._place(url)
        return StreamListener(place, accept, admission, self._server_tls(url, admission.tls))

    def local_url(self, name: str) -> str:
        return f"{self.schemes[0]}://127.0.0.1:0"

    def _place(self, url: str) -> Place:
        return HostPlace(url, self.schemes[0])

    def _client_tls(self, url: str, tls: ssl.SSLContext | None) -> ssl.SSLContext | None:
        return self._server_tls(url, tls)

    def _server_tls(self, url: str, tls: ssl.SSLContext | None) -> ssl.SSLContext | None:
        if tls is not None:
            raise TransportError(url, "links of this scheme are in the clear, and there is a TLS context; write tls://host:port")
        return None


class TlsTransport(TcpTransport):
    """Links over TCP under TLS: `tls://host:port`."""

    schemes: ClassVar[tuple[str, ...]] = ("tls",)

    def encrypts(self, url: str) -> bool:
        return True

    def _client_tls(self, url: str, tls: ssl.SSLContext | None) -> ssl.SSLContext:
        return tls or ssl.create_default_context()

    def _server_tls(self, url: str, tls: ssl.SSLContext | None) -> ssl.SSLContext:
        if tls is None:
            raise TransportError(url, "a listener for TLS shows a certificate; give Admission(tls=context), or write tcp://host:port")
        return tls


class UnixTransport(TcpTransport):
    """Links between processes of one user on one machine: `unix:///path`."""

    schemes: ClassVar[tuple[str, ...]] = ("unix",)

    def __init__(self) -> None:
        self._folder = ""

    def local_url(self, name: str) -> str:
        if not self._folder:
            self._folder = tempfile.mkdtemp(prefix="farpoint-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return f"unix://{Path(self._folder, secrets.token_hex(8))}"

    def _place(self, url: str) -> Place:
        return PathPlace(url, self.schemes[0])


def _explain(error: Exception, seconds: float) -> str:
    """Return what stood in the way of a link, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message}; dial the name that is in it, and trust who signed it "
            "with Credentials(tls=ssl.create_default_context(cafile=...))"
        )
    if isinstance(error, (ssl.SSLEOFError, ConnectionResetError)):
        return "it hung up in the middle of the TLS handshake: it has no room for another link, or speaks no TLS (then write tcp://)"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "certificate" in reason:
            return f"it does not accept our certificate ({reason}); give one that it trusts with Credentials(tls=context)"
        return f"TLS failed ({reason}); if it speaks no TLS, write tcp:// in place of tls://"
    if isinstance(error, TimeoutError):
        return (
            f"it is reached, and did not greet within {seconds:g} s; check that a farpoint listener is there "
            "(one for websockets is reached with ws:// or wss://)"
        )
    return f"the connection broke while it began: {getattr(error, 'strerror', None) or error}"
