"""Who gets through the door of a WebSocket listener, who does not, and what each of them is told."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus

import pytest
import trustme
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_raw

from farpoint.access import Admission, Credentials
from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.testing.transport import Recorder, eventually
from farpoint.transport import Listener
from farpoint_websocket import door
from farpoint_websocket.door import Door, network
from farpoint_websocket.link import WebsocketLink
from farpoint_websocket.place import parse
from farpoint_websocket.transport import WebsocketTransport

PLAIN = "ws://127.0.0.1:0"
SECRET = "correct-horse-battery-staple"  # noqa: S105  # of nobody

transport = WebsocketTransport()

Open = Callable[..., Listener]


@pytest.fixture
def listen() -> Iterator[Open]:
    """Listen, with an admission; each link answers what it gets."""
    listeners: list[Listener] = []

    def listen(url: str = PLAIN, **admission: object) -> Listener:
        def accept(link: object) -> Recorder:
            recorder = Recorder(lambda message: recorder.link and recorder.link.write(message))
            recorder.link = link  # type: ignore[assignment]
            return recorder

        listeners.append(transport.listen(url, accept, Admission(**admission)))  # type: ignore[arg-type]
        return listeners[-1]

    yield listen
    for listener in listeners:
        listener.close()


def works(url: str, credentials: Credentials) -> bool:
    """Return whether a link carries a message there and back."""
    near = Recorder()
    link = transport.connect(url, near, credentials)
    link.write([b"there"])
    eventually(lambda: near.messages)
    link.close()
    eventually(lambda: near.losses)
    return near.messages == [[b"there"]] and near.losses == [None]


def ask(url: str, *headers: str, source: str = "127.0.0.1", upgrade: bool = True) -> tuple[int, str]:
    """Send a request, and return status and text of the answer, without the date."""
    lines = ["GET / HTTP/1.1", "Host: x", *headers]
    if upgrade:
        lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: " + "A" * 22 + "=="]
        lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: farpoint.1"]
    answer = b""
    with dialled(url, source) as stranger:
        try:
            stranger.sendall("\r\n".join([*lines, "", ""]).encode())
            while b"\r\n\r\n" not in answer or b" 101 " not in answer:
                part = stranger.recv(65536)
                answer += part
                if not part:
                    break
        except ConnectionResetError:
            return 0, "hung up"
    text = answer.partition(b"\x81")[0].decode()
    return int(text.split()[1]), re.sub(r"Date: .*", "", text)


def dialled(url: str, source: str = "127.0.0.1") -> socket.socket:
    """Return a connection to a listener, from an address."""
    return socket.create_connection(("127.0.0.1", parse(url).port), timeout=10, source_address=(source, 0))


# Tokens


def test_only_a_known_token_opens_the_door(listen: Open) -> None:
    url = listen(tokens=("other-token", SECRET)).url
    assert works(url, Credentials(token=SECRET))
    with pytest.raises(TransportError, match="the token is not accepted there"):
        transport.connect(url, Recorder(), Credentials(token=SECRET[1:]))
    with pytest.raises(TransportError, match=r"a token is needed there; pass Credentials\(token=...\)"):
        transport.connect(url, Recorder())


def test_every_failure_has_one_answer(listen: Open) -> None:
    """Nothing in the answer says how near to a token a guess was."""
    url = listen(tokens=(SECRET,), limits=Limits(failed_logins=100)).url
    shown = ["Bearer wrong", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", f"Basic {SECRET}", SECRET, "Bearer", "Bearer \xff"]
    answers = {ask(url, f"Authorization: {value}") for value in shown}
    answers |= {ask(url), ask(url, f"Authorization: Bearer {SECRET}", f"Authorization: Bearer {SECRET}")}
    assert len(answers) == 1
    (status, text), *_ = answers
    assert status == 401 and "WWW-Authenticate: Bearer" in text and "Server" not in text
    assert ask(url, f"Authorization: bearer {SECRET}")[0] == 101


def test_who_guesses_has_to_wait_and_nobody_else(listen: Open) -> None:
    """After five wrong tokens an address is locked out, with the right one as well; another one gets in."""
    url = listen(tokens=(SECRET,)).url
    for _ in range(5):
        assert ask(url, "Authorization: Bearer wrong")[0] == 401
    assert ask(url, f"Authorization: Bearer {SECRET}")[0] == 429
    with pytest.raises(TransportError, match="too many wrong tokens came from this address; wait a minute"):
        transport.connect(url, Recorder(), Credentials(token=SECRET))
    assert ask(url, f"Authorization: Bearer {SECRET}", source="127.0.0.2")[0] == 101


def test_a_lock_ends_with_its_minute() -> None:
    now = 1000.0
    keeper = Door(Admission(tokens=(SECRET,), limits=Limits(failed_logins=3)), lambda: now)
    wrong, right = (headers(f"Bearer {token}") for token in ("wrong", SECRET))
    for _ in range(3):
        assert status(keeper, "10.0.0.1", wrong) == 401
        now += 10
    now += 29.9
    assert status(keeper, "10.0.0.1", right) == 429
    now += 0.2
    assert status(keeper, "10.0.0.1", right) is None


def test_addresses_of_one_customer_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IPv6 guesser has 2**64 addresses; and those that are remembered do not fill the memory."""
    monkeypatch.setattr(door, "STRANGERS", 10)
    keeper = Door(Admission(tokens=(SECRET,), limits=Limits(failed_logins=3)))
    for number in range(3):
        assert status(keeper, f"2001:db8::{number}", headers("Bearer wrong")) == 401
    assert status(keeper, "2001:db8::ffff", headers("Bearer wrong")) == 429
    assert status(keeper, "2001:db8:0:1::1", headers("Bearer wrong")) == 401
    assert network("::ffff:10.0.0.1") == network("10.0.0.1")
    for number in range(100):
        status(keeper, f"10.0.0.{number}", headers("Bearer wrong"))
    assert len(keeper._failures) == 10


def headers(authorization: str) -> Headers:
    return Headers({"Upgrade": "websocket", "Authorization": authorization})


def status(keeper: Door, host: str, request: Headers) -> HTTPStatus | None:
    refusal = keeper.check(object(), host, request)
    return refusal[0] if refusal else None


def test_tokens_are_never_logged(listen: Open, caplog: pytest.LogCaptureFixture) -> None:
    """The library writes the headers of requests at level DEBUG; here they hold tokens."""
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.INFO, "farpoint.websocket"):
        assert works(listen(tokens=(SECRET,)).url, Credentials(token=SECRET))
    assert "connection open" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("token", ["two words", "line\r\nX: y", "käse", "tab\t"])
def test_a_token_that_no_header_can_hold_is_refused_here(token: str) -> None:
    with pytest.raises(TransportError, match="visible ASCII") as dialling:
        transport.connect("ws://127.0.0.1:9", Recorder(), Credentials(token=token))
    with pytest.raises(TransportError, match="visible ASCII") as listening:
        transport.listen(PLAIN, lambda _: Recorder(), Admission(tokens=("fine", token)))
    assert token not in str(dialling.value) + str(listening.value)


# Numbers


def test_links_are_counted_for_each_address_and_in_all(listen: Open) -> None:
    url = listen(limits=Limits(links=3, links_per_address=2)).url
    links = [transport.connect(url, Recorder()) for _ in range(2)]
    with pytest.raises(TransportError, match="it takes no further link now: There are 2 links from your address"):
        transport.connect(url, Recorder())
    with raw(url, "127.0.0.2"):
        assert "There are 3 links here already" in ask(url, source="127.0.0.3")[1]
    links.pop().close()
    eventually(lambda: ask(url)[0] == 101)


def raw(url: str, source: str) -> ClientConnection:
    """Return a link of the library's own, from an address."""
    return connect_raw(url, sock=dialled(url, source), subprotocols=["farpoint.1"], compression=None)  # type: ignore[list-item]


def test_those_who_say_nothing_do_not_keep_others_out(listen: Open) -> None:
    """Idle connections of one address are cut beyond a number and after a time; others get in all the while."""
    url = listen(limits=Limits(links_per_address=2, open_seconds=0.5)).url
    idle = [dialled(url, "127.0.0.2") for _ in range(12)]
    for stranger in idle[:3]:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost:")
    assert works(url, Credentials())
    for stranger in idle:
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass
        stranger.close()


def test_a_crowd_is_cut_before_it_costs_anything(listen: Open) -> None:
    """Four connections for two links; the fifth is closed at once, and not when the time to open is over."""
    listener = listen(limits=Limits(links_per_address=2, open_seconds=1000))
    idle = [dialled(listener.url, "127.0.0.2") for _ in range(12)]
    for stranger in idle[4:]:
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass
    for stranger in idle:
        stranger.close()
    eventually(lambda: ask(listener.url, source="127.0.0.2")[0] == 101)


# Who is no peer


def test_a_browser_is_told_what_this_is(listen: Open) -> None:
    url = listen(tokens=(SECRET,)).url
    code, text = ask(url, upgrade=False)
    assert code == 426 and "A farpoint worker listens here" in text and "ws://" in text


def test_web_pages_stay_outside(listen: Open) -> None:
    url = listen(origins=("https://lab.example.org",)).url
    assert ask(url, "Origin: https://evil.example.org")[0] == 403
    assert ask(url, "Origin: https://lab.example.org")[0] == 101
    assert ask(url, "Origin: https://lab.example.org", "Origin: https://evil.example.org")[0] == 400
    assert ask(listen().url, "Origin: https://lab.example.org")[0] == 403


@pytest.mark.parametrize("offered", ["Sec-WebSocket-Protocol: chat", "X: y"])
def test_another_subprotocol_is_refused(listen: Open, offered: str) -> None:
    url = listen().url
    request = f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{offered}\r\n"
    request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    with dialled(url) as stranger:
        stranger.sendall(request.encode())
        assert stranger.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_nonsense_ends_only_itself(listen: Open) -> None:
    url = listen().url
    for nonsense in (b"\x16\x03\x01" * 50, b"GET " + b"x" * 100_000, b"\r\n" * 9, b"POST / HTTP/1.1\r\n\r\n"):
        with dialled(url) as stranger:
            stranger.sendall(nonsense)
            stranger.shutdown(socket.SHUT_WR)
            try:
                while stranger.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    assert works(url, Credentials())


# What a dialler is told


@pytest.fixture
def foreign() -> Iterator[Callable[..., str]]:
    """Start a WebSocket server that is none of ours, and return its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []

    def start(answer: Response | None = None, **options: object) -> str:
        async def handle(connection: ServerConnection) -> None:
            await connection.wait_closed()

        def process(connection: ServerConnection, request: Request) -> Response | None:
            return answer

        async def begin() -> str:
            server = await serve(handle, "127.0.0.1", 0, process_request=process, **options)  # type: ignore[arg-type]
            servers.append(server)
            return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"

        return asyncio.run_coroutine_threadsafe(begin(), loop).result()

    yield start

    async def end() -> None:
        for server in servers:
            server.close()
            await server.wait_closed()

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def response(code: int, **fields: str) -> Response:
    return Response(code, "Whatever", Headers({**fields, "Content-Length": "4"}), b"text")


def test_no_redirect_is_followed(listen: Open, foreign: Callable[..., str]) -> None:
    """A listener does not decide whom else a process dials, nor who gets its token."""
    honest = listen().url
    with pytest.raises(TransportError, match=f"it sends us on to {honest}; dial that yourself if you trust it"):
        transport.connect(foreign(response(302, Location=honest)), Recorder(), Credentials(token=SECRET))


def test_who_is_no_farpoint_worker_is_named(foreign: Callable[..., str]) -> None:
    with pytest.raises(TransportError, match=r"speaks WebSocket, but not farpoint\.1"):
        transport.connect(foreign(), Recorder())
    with pytest.raises(TransportError, match=r"speaks WebSocket, but not farpoint\.1"):
        transport.connect(foreign(subprotocols=["chat"]), Recorder())
    with pytest.raises(TransportError, match="is no farpoint worker: it answers HTTP 404 text"):
        transport.connect(foreign(response(404)), Recorder())


def test_silence_and_noise_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransportError, match=r"no answer within 0.2 s; .*Limits\(open_seconds=...\)"):
            transport.connect(url, Recorder(), Credentials(limits=Limits(open_seconds=0.2)))
    for noise in (b"220 smtp.example.org ESMTP\r\n", b""):
        with socket.create_server(("127.0.0.1", 0)) as noisy:
            url = f"ws://127.0.0.1:{noisy.getsockname()[1]}"
            thread = threading.Thread(target=_answer, args=(noisy, noise))
            thread.start()
            with pytest.raises(TransportError, match=r"does not answer as it should: .*try wss://"):
                transport.connect(url, Recorder())
            thread.join()


def _answer(listening: socket.socket, text: bytes) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_nobody_there_is_named(host: str) -> None:
    """Also where a name has several addresses, and all of them refuse."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"ws://{host}:{reserved.getsockname()[1]}"
        with pytest.raises(TransportError, match="nobody listens there; start the worker first"):
            transport.connect(url, Recorder())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ws://127.0.0.1:0", "nobody listens at port 0"),
        ("ws://", "write ws://host:port"),
        ("ws://host:port", "this is no URL"),
        ("ws://[::1", "this is no URL"),
        ("ws://127.0.0.1:1#part", "write ws://host:port"),
        ("ws://127.0.0.1:1?token=x", r"the only option in a URL is \?compress=1"),
        ("ws://127.0.0.1:1?compress=yes", r"the only option in a URL is \?compress=1"),
        ("tcp://127.0.0.1:1", "write ws://host:port"),
    ],
)
def test_a_url_that_is_none_is_explained(url: str, said: str) -> None:
    with pytest.raises(TransportError, match=said):
        transport.connect(url, Recorder())


def test_a_secret_in_a_url_is_not_repeated() -> None:
    with pytest.raises(TransportError, match=r"use Credentials\(token=...\)") as caught:
        transport.connect(f"ws://me:{SECRET}@127.0.0.1:1", Recorder())
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ws://192.0.2.1:0", "this machine does not have that address"),
        ("ws://no-such-host.invalid:0", "no address of this machine is called no-such-host.invalid"),
        ("wss://127.0.0.1:0", r"pass Admission\(tls=context\)"),
    ],
)
def test_a_place_that_cannot_be_listened_at_is_explained(url: str, said: str) -> None:
    with pytest.raises(TransportError, match=said):
        transport.listen(url, lambda _: Recorder())


def test_a_name_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(TransportError, match=r"no machine is known by the name nobody\.example: Name or service not known"):
        transport.connect("ws://nobody.example:1", Recorder())


def test_ipv6_has_brackets(listen: Open) -> None:
    try:
        listener = listen("ws://[::1]:0")
    except TransportError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert listener.url.startswith("ws://[::1]:")
    assert works(listener.url, Credentials())


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_a_certificate_must_be_known_and_fit(listen: Open, authority: trustme.CA, tls: ssl.SSLContext) -> None:
    url = listen("wss://127.0.0.1:0", tls=tls).url
    assert works(url, Credentials(tls=trusting(authority)))
    with pytest.raises(TransportError, match=r"its certificate is not trusted: .*cafile="):
        transport.connect(url, Recorder())
    with pytest.raises(TransportError, match=r"its certificate is not trusted: .*localhost"):
        transport.connect(url.replace("127.0.0.1", "localhost"), Recorder(), Credentials(tls=trusting(authority)))


def test_a_client_without_a_certificate_is_told(listen: Open, authority: trustme.CA, tls: ssl.SSLContext) -> None:
    tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(tls)
    url = listen("wss://127.0.0.1:0", tls=tls).url
    with pytest.raises(TransportError, match=r"wants a certificate of yours: load it"):
        transport.connect(url, Recorder(), Credentials(tls=trusting(authority)))


def test_plain_and_encrypted_do_not_mix(listen: Open, authority: trustme.CA, tls: ssl.SSLContext) -> None:
    secure, plain = listen("wss://127.0.0.1:0", tls=tls).url, listen().url
    with pytest.raises(TransportError, match=r"does not speak TLS: try ws://"):
        transport.connect(plain.replace("ws:", "wss:"), Recorder())
    with pytest.raises(TransportError, match="try wss://"):
        transport.connect(secure.replace("wss:", "ws:"), Recorder())
    with pytest.raises(TransportError, match="dial wss://"):
        transport.connect(plain, Recorder(), Credentials(tls=trusting(authority)))
    with pytest.raises(TransportError, match="listen at wss://"):
        listen(tls=tls)


def test_compression_needs_both(listen: Open) -> None:
    """The listener says in its url that it can; without the option on both sides nothing is compressed."""
    plain, packed = listen().url, listen(PLAIN + "?compress=1").url
    assert packed.endswith("?compress=1")
    for url, offered, agreed in [(packed, "deflate", True), (plain, "deflate", False), (packed, None, False)]:
        with connect_raw(url, subprotocols=["farpoint.1"], compression=offered) as link:  # type: ignore[list-item]
            assert link.response is not None
            assert ("permessage-deflate" in link.response.headers.get("Sec-WebSocket-Extensions", "")) is agreed
    for url, count in [(packed, 1), (packed.partition("?")[0], 0)]:
        ours = transport.connect(url, Recorder())
        assert isinstance(ours, WebsocketLink)
        assert len(ours.exchange._connection.protocol.extensions) == count
        ours.close()
    assert works(packed, Credentials())
