"""Who comes in where, over the transports of sockets: tokens, counts, certificates, URLs and paths."""

from __future__ import annotations

import socket
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
import trustme

from farpoint.access import NO_CREDENTIALS, Admission, Credentials
from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.testing.transport import Recorder, eventually
from farpoint.transport import Link, Receiver
from farpoint_tcp.door import MINUTE, Door, party
from farpoint_tcp.framing import Answer, answer, greeting
from farpoint_tcp.transport import TcpTransport, TlsTransport, UnixTransport
from tcp_stage import (
    CA,
    MEBI,
    Pair,
    Stage,
    TrustingTls,
    client_tls,
    ends,
    exactly,
    nothing_is_left,
    server_tls,
    transport,
)

__all__ = ["nothing_is_left", "transport"]  # fixtures


# Who comes in.


def test_a_token_opens_the_door(transport: TcpTransport) -> None:
    stage = Stage(transport, tokens=("sésame", "other"))
    for token in ("sésame", "other"):
        transport.connect(stage.url, Recorder(), Credentials(token=token)).close()
    eventually(lambda: len(stage.arrived) == 2)


def test_every_wrong_token_gets_the_same_answer(transport: TcpTransport) -> None:
    stage = Stage(transport, tokens=("sesame",), limits=Limits(failed_logins=3))
    texts = set()
    # The last is right, and comes too late.
    for token in ("", "Sesame", "sesame" * 100, "sesame"):
        with pytest.raises(TransportError, match="token") as caught:
            transport.connect(stage.url, Recorder(), Credentials(token=token))
        texts.add(caught.value.cause)
        assert "esame" not in caught.value.cause
    assert len(texts) == 1 and not stage.arrived


def test_who_is_refused_may_finish_what_it_says(transport: TcpTransport) -> None:
    """A connection that is closed with bytes unread is reset, and the answer may be lost with it."""
    stage = Stage(transport, tokens=("sesame",))
    with stage.raw() as stranger:
        stranger.sendall(greeting(b"wrong"))
        assert exactly(stranger, len(answer(Answer.NOT_LET_IN))) == answer(Answer.NOT_LET_IN)
        for _ in range(1000):
            stranger.sendall(b"but")
        assert ends(stranger) == b""
    assert not stage.arrived


def test_only_the_address_that_guesses_has_to_wait() -> None:
    clock = [0.0]
    door = Door(Admission(tokens=("t",), limits=Limits(failed_logins=3)), lambda: clock[0])
    for number in range(3):
        assert door.admits("a", "t")
        clock[0] = 10.0 * number
        assert not door.admits("a", "wrong")
    assert not door.admits("a", "t")
    assert door.admits("b", "t")
    clock[0] = 20.0 + MINUTE - 1
    assert not door.admits("a", "t")
    clock[0] = 20.0 + MINUTE
    assert door.admits("a", "t")
    for number in range(10):  # slow enough
        clock[0] = 1000.0 + 31 * number
        assert not door.admits("c", "wrong")
        assert door.admits("c", "t")


def test_what_counts_as_one_address() -> None:
    assert party("127.0.0.1") == party("127.1.2.3") == party("::1") == party("::ffff:127.0.0.1")
    assert party("10.0.0.1") != party("10.0.0.2")
    assert party("10.0.0.1") == party("::ffff:10.0.0.1")
    assert party("2001:db8::1") == party("2001:db8::2") != party("2001:db8:0:1::1")
    assert party("fe80::1%eth0") == party("fe80::2%eth0")


@pytest.mark.parametrize("limits", [Limits(links=2), Limits(links_per_address=2)])
def test_links_are_counted(transport: TcpTransport, limits: Limits) -> None:
    stage = Stage(transport, limits=limits)
    links = [transport.connect(stage.url, Recorder()) for _ in range(2)]
    for _ in range(2):
        with pytest.raises(TransportError, match="no room"):
            transport.connect(stage.url, Recorder())
    links.pop().close()
    eventually(lambda: sum(stage.listener._door._inside.values()) < 2)  # type: ignore[attr-defined]
    links.append(transport.connect(stage.url, Recorder()))
    for link in links:
        link.write([b"alive"])
    eventually(lambda: sum(len(recorder.messages) for _, recorder in stage.arrived) == 2)


def test_a_token_has_a_size() -> None:
    with pytest.raises(TransportError, match="at most 4096 bytes"):
        TcpTransport().connect("tcp://127.0.0.1:1", Recorder(), Credentials(token="x" * 4097))


def test_what_accept_does_comes_after_the_welcome(transport: TcpTransport) -> None:
    far = Recorder()

    def accept(link: Link) -> Receiver:
        link.write([b"first"])
        link.write([bytes(MEBI)])
        link.close()
        return far

    listener = transport.listen(transport.local_url("x"), accept)
    near = Recorder()
    transport.connect(listener.url, near)
    eventually(lambda: near.losses and far.losses)
    assert near.messages == [[b"first"], [bytes(MEBI)]]
    assert near.losses == far.losses == [None]
    listener.close()


def test_who_is_not_accepted_is_told(transport: TcpTransport, caplog: pytest.LogCaptureFixture) -> None:
    links: list[Link] = []

    def accept(link: Link) -> Receiver:
        links.append(link)
        raise ValueError("not today")

    listener = transport.listen(transport.local_url("x"), accept)
    with pytest.raises(TransportError, match="failed to accept"):
        transport.connect(listener.url, Recorder())
    listener.close()
    assert "not today" in caplog.text
    with pytest.raises(TransportError, match="not accepted"):
        links[0].write([b"x"])
    links[0].close()
    eventually(lambda: not listener._door._inside)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("tcp://localhost:1", r"localhost:1: cannot be reached \(.*127.0.0.1:1: Connection refused"),
        ("tcp://no.such.host.invalid:80", "no address is known for no.such.host.invalid"),
        ("tcp://127.0.0.1", "write tcp://host:port"),
        ("tcp://127.0.0.1:99999", "write tcp://host:port"),
        ("tcp://[::1:80", "write tcp://host:port"),
        ("tcp://127.0.0.1:80/path", "write tcp://host:port"),
        ("tcp://user:secret@127.0.0.1:80", "write tcp://host:port"),
        ("tls://127.0.0.1:80", "write tcp://host:port"),
    ],
)
def test_urls_that_lead_nowhere(url: str, text: str) -> None:
    with pytest.raises(TransportError, match=text):
        TcpTransport().connect(url, Recorder())


def test_a_place_of_somebody_else_cannot_be_listened_at() -> None:
    with pytest.raises(TransportError, match=r"cannot listen there: Cannot assign requested address"):
        TcpTransport().listen("tcp://192.0.2.1:0", lambda _: Recorder())


# TLS.


def test_names_in_certificates_are_told() -> None:
    client = client_tls()
    CA.issue_cert("alice.example").configure_cert(client)
    stage = Stage(TlsTransport(), "tls://127.0.0.1:0", tls=server_tls(ssl.CERT_REQUIRED))
    link = TlsTransport().connect(stage.url, Recorder(), Credentials(tls=client))
    eventually(lambda: stage.arrived)
    assert link.identity == "127.0.0.1" and stage.arrived[0][0].identity == "alice.example"
    assert link.address == stage.url.removeprefix("tls://")


def test_without_a_certificate_there_is_no_name(transport: TcpTransport) -> None:
    pair = Pair(transport)
    assert pair.far_link.identity == ""
    assert pair.near_link.address and pair.far_link.address


def _wrong_host(context: ssl.SSLContext) -> ssl.SSLContext:
    trustme.CA().configure_trust(context)
    return context


def test_a_certificate_that_is_not_trusted_is_refused() -> None:
    stage = Stage(TrustingTls())
    for credentials in (NO_CREDENTIALS, Credentials(tls=_wrong_host(ssl.create_default_context()))):
        with pytest.raises(TransportError, match=r"its certificate is not accepted: .*Credentials"):
            TlsTransport().connect(stage.url, Recorder(), credentials)
    assert not stage.arrived


def test_a_certificate_for_another_host_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("elsewhere.example").configure_cert(context)
    stage = Stage(TlsTransport(), "tls://127.0.0.1:0", tls=context)
    with pytest.raises(TransportError, match=r"its certificate is not accepted: .*127.0.0.1"):
        TrustingTls().connect(stage.url, Recorder())


def test_a_client_without_a_certificate_is_refused_where_one_is_required() -> None:
    stage = Stage(TlsTransport(), "tls://127.0.0.1:0", tls=server_tls(ssl.CERT_REQUIRED))
    with pytest.raises(TransportError, match=r"does not accept our certificate .*required"):
        TrustingTls().connect(stage.url, Recorder())
    assert not stage.arrived


def test_tls_and_the_clear_do_not_mix() -> None:
    covered, clear = Stage(TrustingTls()), Stage(TcpTransport())
    with pytest.raises(TransportError, match="tls://"):
        TcpTransport().connect(covered.url.replace("tls", "tcp"), Recorder())
    with pytest.raises(TransportError, match="tcp://"):
        TrustingTls().connect(clear.url.replace("tcp", "tls"), Recorder())
    assert not covered.arrived and not clear.arrived


def test_a_context_and_a_scheme_must_agree() -> None:
    for clear in (TcpTransport(), UnixTransport()):
        url = clear.local_url("x")
        with pytest.raises(TransportError, match="write tls://"):
            clear.listen(url, lambda _: Recorder(), Admission(tls=server_tls()))
        with pytest.raises(TransportError, match="write tls://"):
            clear.connect(url, Recorder(), Credentials(tls=client_tls()))
    with pytest.raises(TransportError, match=r"Admission\(tls=context\)"):
        TlsTransport().listen("tls://127.0.0.1:0", lambda _: Recorder())
    stage = Stage(TrustingTls())
    with pytest.raises(TransportError, match="context does not fit"):
        TlsTransport().connect(stage.url, Recorder(), Credentials(tls=server_tls()))


# Paths.


def test_a_socket_is_for_its_owner_and_goes_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = UnixTransport().listen(f"unix://{path}", lambda _: Recorder())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_ISSOCK(path.stat().st_mode)
    listener.close()
    assert not path.exists()


def test_a_left_over_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    url = f"unix://{path}"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with pytest.raises(TransportError, match="Connection refused"):
        UnixTransport().connect(url, Recorder())
    stage = Stage(UnixTransport(), url)
    with pytest.raises(TransportError, match="somebody listens there already"):
        UnixTransport().listen(url, lambda _: Recorder())
    stage.welcomed().close()
    path.unlink()
    path.write_text("mine")
    stage.listener.close()
    assert path.read_text() == "mine"
    with pytest.raises(TransportError, match="no socket"):
        UnixTransport().listen(url, lambda _: Recorder())
    assert path.read_text() == "mine"


def test_a_busy_listener_is_no_left_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as caller:
        busy.bind(str(path))
        busy.listen(0)
        caller.connect(str(path))
        with pytest.raises(TransportError, match="somebody listens there already"):
            UnixTransport().listen(f"unix://{path}", lambda _: Recorder())
    assert path.exists()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("unix://relative", "three slashes"),
        ("unix:///tmp/", "three slashes"),
        ("unix:///" + "x" * 107, "at most 107 bytes"),
        ("unix:///no/such/folder/s", "No such file"),
    ],
)
def test_paths_that_lead_nowhere(url: str, text: str) -> None:
    with pytest.raises(TransportError, match=text):
        UnixTransport().listen(url, lambda _: Recorder())
    with pytest.raises(TransportError, match=text):
        UnixTransport().connect(url, Recorder())


def test_local_urls_are_free(transport: TcpTransport) -> None:
    stages = [Stage(transport, transport.local_url(name)) for name in ("a", "a", "b")]
    assert len({stage.url for stage in stages}) == 3
    for stage in stages:
        stage.welcomed().close()




def test_a_connection_to_itself_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP lets a socket that dials its own port meet itself, and the kernel picks ports at random."""

    class Narcissus(socket.socket):
        def connect(self, address: Any) -> None:
            self.bind(address)
            super().connect(address)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(socket, "socket", Narcissus)
    with pytest.raises(TransportError, match="Connection refused"):
        TcpTransport().connect(f"tcp://127.0.0.1:{port}", Recorder())
