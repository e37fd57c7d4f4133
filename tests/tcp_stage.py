"""What the tests of the transports over sockets share: certificates, both ends of a link, strangers."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import trustme

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.limits import Limits
from farpoint.testing.transport import PATIENCE, Recorder, eventually
from farpoint.transport import Accept, Link, Listener, Receiver, Transport
from farpoint_tcp.framing import ANSWER_MAGIC, Answer, answer, greeting
from farpoint_tcp.link import StreamLink
from farpoint_tcp.transport import TcpTransport, TlsTransport, UnixTransport
from farpoint_tcp.watch import watch

MEBI = 2**20
CA = trustme.CA()
CERTIFICATE = CA.issue_cert("127.0.0.1", "localhost")


def server_tls(verify: ssl.VerifyMode = ssl.CERT_NONE) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CERTIFICATE.configure_cert(context)
    CA.configure_trust(context)
    context.verify_mode = verify
    return context


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


class TrustingTls(TlsTransport):
    """TLS with the certificates of this test for those who bring none."""

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        return super().connect(url, receiver, attrs.evolve(credentials, tls=credentials.tls or client_tls()))

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        return super().listen(url, accept, attrs.evolve(admission, tls=admission.tls or server_tls()))


KINDS: dict[str, type[TcpTransport]] = {"tcp": TcpTransport, "tls": TrustingTls, "unix": UnixTransport}


@pytest.fixture(params=KINDS)
def transport(request: pytest.FixtureRequest) -> TcpTransport:
    return KINDS[request.param]()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test may leave a link or a listener behind."""
    yield
    for link in [*watch._links, *watch._listeners]:
        link.close()  # type: ignore[attr-defined]
    eventually(lambda: not watch._links and not watch._listeners)


class Held(Recorder):
    """A receiver that is stuck in its first message until it is let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        super().__init__(lambda _: self.gate.wait(PATIENCE))


class Pair:
    """Both ends of a link."""

    def __init__(
        self,
        transport: Transport,
        near: Recorder | None = None,
        far: Recorder | None = None,
        near_limits: Limits = Limits(),  # noqa: B008  # frozen
        far_limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self.near = near or Recorder()
        self.far = far or Recorder()
        with_far = Admission(limits=far_limits)
        assert isinstance(transport, TcpTransport)
        listener = transport.listen(transport.local_url("x"), self._accept, with_far)
        link = transport.connect(listener.url, self.near, Credentials(limits=near_limits))
        eventually(lambda: self.far.link)
        listener.close()
        assert isinstance(link, StreamLink) and isinstance(self.far.link, StreamLink)
        self.near.link = link
        self.near_link, self.far_link = link, self.far.link

    def _accept(self, link: Link) -> Receiver:
        self.far.link = link
        return self.far


class Stage:
    """A listener, and everything that has arrived there."""

    def __init__(self, transport: TcpTransport, url: str = "", **fields: Any) -> None:
        self.transport = transport
        self.arrived: list[tuple[Link, Recorder]] = []
        self.listener = transport.listen(url or transport.local_url("x"), self._accept, Admission(**fields))
        self.url = self.listener.url

    def _accept(self, link: Link) -> Receiver:
        self.arrived.append((link, Recorder()))
        return self.arrived[-1][1]

    def raw(self) -> socket.socket:
        """Return a connection that has said nothing yet."""
        if isinstance(self.transport, UnixTransport):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.url.removeprefix("unix://"))
        else:
            sock = socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])))
        if isinstance(self.transport, TlsTransport):
            sock = client_tls().wrap_socket(sock, server_hostname="127.0.0.1")
        sock.settimeout(PATIENCE)
        return sock

    def welcomed(self) -> socket.socket:
        """Return a connection that has greeted and may speak."""
        sock = self.raw()
        sock.sendall(greeting(b""))
        assert exactly(sock, len(ANSWER_MAGIC) + 2) == answer(Answer.WELCOME)
        eventually(lambda: self.arrived)
        return sock


def exactly(sock: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (more := sock.recv(count - len(got))):
        got += more
    return got


def ends(sock: socket.socket) -> bytes:
    """Return what still comes until the other side hangs up."""
    got = b""
    try:
        while more := sock.recv(65536):
            got += more
    except (ConnectionError, ssl.SSLError):
        pass
    return got


