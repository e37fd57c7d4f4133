"""Development certificates: what is in the files, and that workers are reached with them, and with no others."""

from __future__ import annotations

import datetime as dt
import json
import re
import secrets
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from typer.testing import CliRunner

import farpoint
from farpoint import GetNotPermittedError, RefusedError, TransportError
from farpoint.access import Admission, Credentials, name_in
from farpoint.certificates import DAYS, Certificates, make_certificates
from farpoint.host import Hosting
from farpoint.peer import SYNC
from farpoint.plugins import plugins
from farpoint.testing.transport import Recorder, eventually
from farpoint.worker import Worker
from farpoint_cli import app
from processes import Process, running
from strangers import environment, install

farpoint.TorchHook(torch)
run = pytest.fixture(running)

POLICY = """
from farpoint.plugins import hookimpl

@hookimpl
def farpoint_authorize(action, subject, identity):
    if action == "get":
        return f"{subject} is {identity}, not the owner" if identity != "owner" else True
"""


def data() -> Any:
    return torch.arange(3.0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"), ["localhost", "127.0.0.1"], "owner")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority that nobody trusts."""
    return make_certificates(tmp_path_factory.mktemp("others"), ["localhost", "127.0.0.1"], "owner")


def context(trusted: Certificates, shown: Certificates | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=trusted.authority)
    if shown is not None:
        made.load_cert_chain(shown.client, shown.client_key)
    return made


def served(certificates: Certificates) -> list[str]:
    return ["--tls-cert", str(certificates.server), "--tls-key", str(certificates.server_key)]


def shown(certificates: Certificates) -> list[str]:
    return ["--tls-cert", str(certificates.client), "--tls-key", str(certificates.client_key)]


class TestReached:
    @pytest.mark.parametrize("scheme", ["wss", "tls"])
    def test_with_tls(self, run: Callable[..., Process], certificates: Certificates, others: Certificates, scheme: str) -> None:
        process = run("bob", "--listen", f"{scheme}://localhost:0", *served(certificates))
        token = process.said.split('token="')[1].split('"')[0]
        assert 'ca="FILE"' in process.said
        transport = plugins.transport(f"{scheme}://")
        for trusted in (None, context(others)):
            with pytest.raises(TransportError, match="certificate"):
                transport.connect(process.url(), Recorder(), Credentials(token, trusted))
        with farpoint.connect(process.url(), token=token, ca=certificates.authority) as bob:
            assert torch.equal(data().send(bob).get(), data())

    @pytest.mark.parametrize("scheme", ["wss", "tls"])
    def test_with_mutual_tls_and_a_policy(
        self, run: Callable[..., Process], certificates: Certificates, others: Certificates, scheme: str, tmp_path: Path
    ) -> None:
        install(tmp_path, "farpoint-owner", "owner_policy", POLICY)
        mutual = ["--tls-ca", str(certificates.authority)]
        process = run("bob", "--listen", f"{scheme}://localhost:0", *served(certificates), *mutual, environment=environment(tmp_path))
        assert "token=" not in process.said and "tls=context)" in process.said
        transport = plugins.transport(f"{scheme}://")
        for refused in (context(certificates), context(certificates, others)):
            with pytest.raises(TransportError):
                # With TLS 1.3 the client learns of it only when it reads, which is what a greeting does.
                farpoint.connect(process.url(), token="", tls=refused)
        link = transport.connect(process.url(), Recorder(), Credentials(tls=context(certificates, certificates)))
        assert link.identity == "localhost"
        link.close()
        with farpoint.connect(process.url(), token="", tls=context(certificates, certificates)) as bob:
            assert torch.equal(data().send(bob).get(), data())
        worker = context(certificates)
        worker.load_cert_chain(certificates.server, certificates.server_key)
        named = pytest.raises(GetNotPermittedError, match="me is localhost, not the owner")
        with farpoint.connect(process.url(), token="", tls=worker) as bob, named:
            data().send(bob).get()

    def test_without_certificates_there_is_no_identity(self, run: Callable[..., Process], tmp_path: Path) -> None:
        install(tmp_path, "farpoint-owner", "owner_policy", POLICY)
        process = run("bob", "--listen", "tcp://127.0.0.1:0", "--insecure", environment=environment(tmp_path))
        with farpoint.connect(process.url(), token="") as bob, pytest.raises(GetNotPermittedError, match="me is , not the owner"):
            data().send(bob).get()


    def test_a_session_does_not_go_on_with_another_certificate(self, certificates: Certificates) -> None:
        door = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.authority)
        door.load_cert_chain(certificates.server, certificates.server_key)
        door.verify_mode = ssl.CERT_REQUIRED
        bob = Worker("bob", "tls://localhost:0", ["msgpack"], admission=Admission(tls=door))
        owner = context(certificates, certificates)
        worker = context(certificates)
        worker.load_cert_chain(certificates.server, certificates.server_key)
        hello = {"farpoint": 1, "client": "me", "url": "", "session": 7, "secret": "s", "incarnation": "0" * 32, "serializers": ["msgpack"]}

        def greet(tls: ssl.SSLContext, **more: int) -> dict[str, Any]:
            heard = Recorder()
            link = plugins.transport(bob.url).connect(bob.url, heard, Credentials(tls=tls))
            link.write([json.dumps({**hello, **more}).encode()])
            eventually(lambda: heard.messages)
            answer: dict[str, Any] = json.loads(heard.messages[0][0])
            return answer

        try:
            assert greet(owner)["worker"] == "bob" and [guest.identity for guest in bob.guests.values()] == ["owner"]
            assert "another certificate" in greet(worker, taken=0)["refused"]
            assert greet(owner, taken=0)["taken"] == 0
        finally:
            bob.close()


class TestPrincipals:
    @pytest.mark.parametrize("scheme", ["tls", "wss"])
    def test_sessions_are_counted_for_the_name_in_a_certificate(self, certificates: Certificates, scheme: str) -> None:
        files = {"certificate": (certificates.server, certificates.server_key), "clients": certificates.authority}
        bob = Hosting(name="bob", listen=f"{scheme}://localhost:0", tokens=("a" * 22, "b" * 22), **files).worker()  # type: ignore[arg-type]
        owner, worker = context(certificates, certificates), context(certificates)
        worker.load_cert_chain(certificates.server, certificates.server_key)
        clients = [
            Worker(f"client-{number}", "", ["msgpack"], credentials=Credentials("ab"[number % 2] * 22, worker if number == 17 else owner))
            for number in range(18)
        ]
        try:
            peers = [client.peer("bob", bob.url) for client in clients[:16]]
            with pytest.raises(RefusedError, match="whoever shows the certificate of 'owner' has 16 sessions, and the limit is sessions_per_principal=16"):
                clients[16].peer("bob", bob.url)
            peers.append(clients[17].peer("bob", bob.url))
            assert all(peer.request([SYNC, [], []]) for peer in peers)
        finally:
            for end in (*clients, bob):
                end.close()


class TestWorkersWithAndWithoutTls:
    @pytest.fixture
    def hosted(self, certificates: Certificates) -> Iterator[Callable[..., Worker]]:
        made: list[Worker] = []

        def host(listen: str, **options: Any) -> Worker:
            secure = listen.startswith(("tls", "wss"))
            if secure:
                options["certificate"] = (certificates.server, certificates.server_key)
            hosting = Hosting(name=f"w{secrets.token_hex(4)}", listen=listen, tokens=("t" * 22,), trusted=certificates.authority, **options)
            hosting.check()
            made.append(hosting.worker())
            return made[-1]

        yield host
        for worker in made:
            worker.close()

    @pytest.mark.parametrize(("secure", "clear"), [("tls", "tcp"), ("wss", "ws"), ("tls", "ws"), ("wss", "unix")])
    def test_they_move_both_ways(
        self, hosted: Callable[..., Worker], certificates: Certificates, tmp_path: Path, secure: str, clear: str
    ) -> None:
        place = f"unix://{tmp_path}/bob" if clear == "unix" else f"{clear}://127.0.0.1:0"
        alice, bob = hosted(f"{secure}://localhost:0"), hosted(place)
        with (
            farpoint.connect(alice.url, token="t" * 22, ca=certificates.authority) as far,
            farpoint.connect(bob.url, token="t" * 22) as near,
        ):
            p = data().send(far).move(near)
            assert (len(far), len(near)) == (0, 1)
            pp = p.move(far).send(near)
            assert (len(far), len(near)) == (1, 1)
            assert torch.equal(pp.move(near).get(), data())
            assert (len(far), len(near)) == (0, 0)

    @pytest.mark.parametrize("url", ["tcp://192.0.2.1:9", "ws://192.0.2.1:9"])
    def test_nothing_is_shown_in_the_clear_where_others_listen(
        self, hosted: Callable[..., Worker], certificates: Certificates, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        alice, carol = hosted("tls://localhost:0"), hosted("tls://localhost:0", insecure=True)
        dialled = []

        def connect(_: Any, url: str, receiver: Any, credentials: Credentials) -> Any:
            dialled.append((url, credentials.tls))
            raise TransportError(url, "nobody dials in a test")

        monkeypatch.setattr(type(plugins.transport(url)), "connect", connect)
        with pytest.raises(TransportError, match="in the clear where others can listen in"):
            alice.introduce("bob", url)
        assert not dialled and not alice.peers
        with pytest.raises(TransportError, match="nobody dials"):
            carol.introduce("bob", url)
        assert dialled == [(url, None)]


class TestCommands:
    @pytest.mark.parametrize("scheme", ["wss", "tls"])
    def test_they_show_a_certificate(
        self, run: Callable[..., Process], certificates: Certificates, others: Certificates, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FARPOINT_TOKEN", raising=False)
        mutual = [*served(certificates), "--tls-ca", str(certificates.authority)]
        urls = [run(name, "--listen", f"{scheme}://localhost:0", *mutual).url() for name in ("bob", "alice")]
        trusted = ["--ca", str(certificates.authority)]
        commands = [["ping", urls[0], "--count", "2"], ["doctor", *urls], ["tutorial", "--workers", *urls]]
        said = ["bob at ", "all is well", "tensor([ 2,  4,  6,  8, 10])"]
        for words, expected in zip(commands, said, strict=True):
            done = CliRunner().invoke(app, [*words, *trusted, *shown(certificates)])
            assert done.exit_code == 0 and expected in done.output, done.output
            for wrong in ([], shown(others)):
                done = CliRunner().invoke(app, [*words, *trusted, *wrong])
                assert done.exit_code == 1 and urls[0] in done.output and "Traceback" not in done.output, done.output
            done = CliRunner().invoke(app, [*words, "--ca", str(others.authority), *shown(certificates)])
            assert done.exit_code == 1 and "certificate is not" in done.output, done.output

    @pytest.mark.parametrize("words", [["ping", "tls://localhost:1"], ["doctor", "tls://localhost:1"], ["tutorial", "--workers", "tls://a:1", "tls://b:1"]])
    def test_files_that_are_wrong(self, certificates: Certificates, others: Certificates, words: list[str]) -> None:
        for options, complaint in (
            (shown(certificates)[:2], "--tls-cert and --tls-key belong together"),
            (shown(certificates)[2:], "--tls-cert and --tls-key belong together"),
            ([*shown(certificates)[:2], *shown(others)[2:]], "do not belong together"),
            (["--ca", str(certificates.client_key)], "client.key: there is no certificate in it"),
        ):
            done = CliRunner().invoke(app, [*words, *options])
            assert done.exit_code == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.output


class TestFiles:
    def test_what_is_in_them(self, tmp_path: Path) -> None:
        made = make_certificates(tmp_path / "new" / "folder", ["example.org", "192.0.2.7", "2001:db8::1"], "me")
        for key in (made.authority_key, made.server_key, made.client_key):
            assert key.stat().st_mode & 0o777 == 0o600
        authority, server, client = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (made.authority, made.server, made.client))
        for certificate in (authority, server, client):
            certificate.verify_directly_issued_by(authority)
            left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
            assert dt.timedelta(DAYS - 1) < left <= dt.timedelta(DAYS)
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["example.org"]
        assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "2001:db8::1"]
        assert [c.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for c in (authority, server, client)] == [True, False, False]
        loaded = ssl.create_default_context()
        loaded.load_cert_chain(made.client, made.client_key)

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "client.key").write_text("mine")
        result = CliRunner().invoke(app, ["certs", str(tmp_path)])
        assert result.exit_code == 1 and result.output.startswith("farpoint certs: ") and "client.key exists" in result.output
        assert [path.name for path in tmp_path.iterdir()] == ["client.key"]

    def test_the_command_says_how_to_use_them(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["certs", str(tmp_path), "--name", "::1", "--client", "carol"])
        assert result.exit_code == 0 and "wss://[::1]:8765" in result.output
        for path in re.findall(rf"{re.escape(str(tmp_path))}/[\w.]+", result.output):
            assert Path(path).exists()
        assert name_in(ssl._ssl._test_decode_cert(str(tmp_path / "client.pem"))) == "carol"  # type: ignore[attr-defined]

    def test_a_name_that_cannot_be_in_one(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["certs", str(tmp_path), "--name", "bücher.example"])
        assert result.exit_code == 2 and result.output.startswith("farpoint certs: ")

    def test_without_cryptography(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cryptography", None)
        result = CliRunner().invoke(app, ["certs", str(tmp_path)])
        assert result.exit_code == 1 and "pip install 'farpoint[certs]'" in result.output
