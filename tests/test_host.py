"""A worker as a process of its own: what it prints, whom it lets in, how it ends, and what it refuses."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import farpoint
from farpoint import InsecureListenerError, TransportError, WorkerLostError
from farpoint.access import Credentials, is_local
from farpoint.host import Hosting, check_device, host, is_wildcard
from farpoint.plugins import plugins
from farpoint.testing.transport import Recorder
from farpoint.tokens import new_token, read_tokens
from farpoint_cli import app
from processes import COMMAND, SECONDS, Process, paste, running

farpoint.TorchHook(torch)
run = pytest.fixture(running)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs a worker that must not start, and returns its exit code and what it says.

    In this process: to start another one takes seconds.
    """
    logger = logging.getLogger("farpoint")
    before = logger.handlers, logger.level, logger.propagate
    monkeypatch.setattr("farpoint.host._wait", lambda *_, **__: None)  # one that starts after all ends at once

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["worker", *words])
        assert not done.stdout and done.stderr.startswith("farpoint worker: ") and done.stderr.count("\n") == 1, done.output
        return done.exit_code, done.stderr

    yield run
    logger.handlers, logger.level, logger.propagate = before


def data() -> Any:
    return torch.arange(3.0)


@pytest.mark.parametrize(("scheme", "number"), [("ws", signal.SIGINT), ("tcp", signal.SIGTERM)])
def test_it_prints_what_to_paste_and_ends_in_good_order(run: Callable[..., Process], scheme: str, number: int) -> None:
    process = run("bob", "--listen", f"{scheme}://127.0.0.1:0")
    token = process.said.split('token="')[1].split('"')[0]
    assert len(token) >= 22 and process.said.count(token) == 1
    bob = paste(process)
    assert bob.id == "bob" and torch.equal((data().send(bob) * 2).get(), data() * 2)
    assert re.search(r"bob: a session with me at \S*127\.0\.0\.1:\d+ begins", process.logged("begins"))
    assert process.end(number) == 0
    # A goodbye, not a link that broke: nobody tries to come back.
    assert bob.peer.closing.wait(SECONDS) and not bob.peer.absence
    with pytest.raises(WorkerLostError):
        data().send(bob).get()
    bob.close()
    assert "bob: the session with me is over" in process.logged("is over") and "bob ends" in process.logged("ends")
    assert not [line for line in process.log if token in line]


def test_a_log_of_objects(run: Callable[..., Process]) -> None:
    process = run("bob", "--listen", "tcp://127.0.0.1:0", "--log-format", "json")
    with paste(process):
        process.logged("begins")
    process.logged("is over")
    assert process.end() == 0
    lines = [json.loads(line) for line in process.log]
    assert [line["message"] for line in lines if "begins" in line["message"]] and {line["level"] for line in lines} == {"info"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
    assert all(set(line) == {"time", "level", "logger", "message"} for line in lines)


def test_a_quiet_one_with_a_file_of_tokens(run: Callable[..., Process], tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    process = run("bob", "--listen", "tcp://127.0.0.1:0", "--token-file", str(path), "--quiet", "--limit", "objects=1")
    [token] = path.read_text().split()
    assert path.stat().st_mode & 0o777 == 0o600 and token not in process.said
    with paste(process) as bob:
        p, q = data().send(bob), data().send(bob)
        with pytest.raises(farpoint.QuotaError, match="objects=1"):
            bob.synchronize()
        del p, q
    assert process.end() == 0 and process.log == []


def test_a_token_is_needed_and_never_logged(run: Callable[..., Process]) -> None:
    process = run("bob", "--listen", "tcp://127.0.0.1:0")
    secret = new_token()
    for credentials in (Credentials(), Credentials(secret)):
        with pytest.raises(TransportError, match="does not let us in"):
            plugins.transport("tcp://").connect(process.url(), Recorder(), credentials)
    process.logged("is not let in")
    assert process.end() == 0
    assert not [line for line in process.log if secret in line]


def test_an_insecure_one_lets_everybody_in_and_advertises(run: Callable[..., Process]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = run("bob", "--listen", f"tcp://0.0.0.0:{port}", "--advertise", f"tcp://127.0.0.1:{port}", "--insecure")
    assert "Everybody" in process.said and process.url() == f"tcp://127.0.0.1:{port}"
    with paste(process) as bob:
        assert torch.equal(data().send(bob).get(), data())
    assert process.end() == 0


def test_a_mistake_is_a_line_and_no_traceback() -> None:
    done = subprocess.run([*COMMAND, "bob", "--store", "shelf"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("farpoint worker: store 'shelf': ") and done.stderr.count("\n") == 1, done.stderr


def test_a_port_that_is_taken(refused: Callable[..., tuple[int, str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for scheme in ("tcp", "ws"):
            code, said = refused("bob", "--listen", f"{scheme}://127.0.0.1:{port}")
            assert code == 1 and f"127.0.0.1:{port}: " in said and "take another port" in said


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["bob", "--listen", "tcp://127.0.0.1"], 1, "write tcp://host:port"),
        (["bob", "--listen", "carrier://x"], 2, r"transport 'carrier://': no installed plugin provides it\. Available: .*tcp://"),
        (["bob", "--listen", "virtual://bob"], 2, "stay within one process"),
        (["bob", "--listen", "ws://192.0.2.1:8765"], 2, "others can reach it.*--tls-cert.*--insecure"),
        (["bob", "--listen", "ws://0.0.0.0:8765"], 1, "every address.*--advertise ws://"),
        (["bob and alice"], 2, "cannot be a worker's name"),
        (["bob", "--store", "shelf"], 2, "store 'shelf': no installed plugin"),
        (["bob", "--serializer", "morse"], 2, "serializer 'morse': no installed plugin"),
        (["bob", "--device", "tpu9"], 2, "'tpu9' is no device of torch; it finds cpu.* here"),
        (["bob", "--device", "xpu"], 2, "torch finds no device 'xpu' here, it finds cpu.*; write cpu"),
        (["bob", "--device", "cpu:1"], 2, "torch finds no device 'cpu:1' here"),
        (["bob", "--device", "meta"], 2, "do not support the device 'meta' yet: operations run on the CPU only"),
        (["bob", "--limit", "objets=5"], 2, "no limit 'objets'; the names are header_bytes, .*objects"),
        (["bob", "--limit", "objects=many"], 2, "objects=VALUE with a whole number above 0; the default is 100000"),
        (["bob", "--limit", "lease_seconds=-1"], 2, "a number of seconds above 0"),
        (["bob", "--tls-cert", "cert.pem"], 2, "belong together"),
        (["bob", "--tls-ca", "ca.pem"], 2, "--tls-cert and --tls-key too"),
        (["bob", "--tls-cert", "nowhere.pem", "--tls-key", "nowhere.key", "--listen", "wss://127.0.0.1:0"], 2, "nowhere.pem: it cannot be read"),
        (["bob", "--tls-cert", __file__, "--tls-key", __file__, "--listen", "wss://127.0.0.1:0"], 2, "test_host.py: this certificate and its key"),
        (["bob", "--token-file", "/nowhere/tokens"], 1, "/nowhere/tokens"),
    ],
)
def test_what_it_refuses(refused: Callable[..., tuple[int, str]], words: list[str], code: int, complaint: str) -> None:
    found, said = refused(*words)
    assert re.search(complaint, said) and found == code, said


def hosting(**options: Any) -> Hosting:
    return Hosting(**{"name": "bob", "listen": "tcp://127.0.0.1:0", "tokens": (new_token(),), **options})


class TestWhoMayListenWhere:
    @pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "ws://localhost:1", "tcp://[::1]:1", "tcp://127.9.9.9:1", "unix:///tmp/x"])
    def test_what_only_this_machine_reaches(self, url: str) -> None:
        assert is_local(url) and not is_wildcard(url)
        hosting(listen=url).check()

    @pytest.mark.parametrize("url", ["ws://192.0.2.1:1", "tcp://example.org:1", "tcp://127.0.0.1.example.org:1", "tcp://[2001:db8::1]:1"])
    def test_what_others_reach_needs_tls(self, url: str) -> None:
        with pytest.raises(InsecureListenerError, match="read and changed on the way"):
            hosting(listen=url).check()
        hosting(listen=url, insecure=True).check()
        hosting(listen=url, certificate=(Path("cert"), Path("key"))).check()

    def test_a_token_or_a_certificate_is_needed(self) -> None:
        with pytest.raises(InsecureListenerError, match="everybody could come in"):
            hosting(tokens=()).check()
        hosting(tokens=(), insecure=True).check()
        hosting(tokens=(), certificate=(Path("cert"), Path("key")), clients=Path("ca")).check()

    def test_tokens_are_not_shown(self) -> None:
        made = hosting()
        assert made.tokens[0] not in repr(made)

    def test_the_device(self) -> None:
        check_device("cpu")
        check_device("cpu:0")
        with pytest.raises(ValueError, match="no device"):
            check_device("cpu:1:2")

    def test_a_device_that_is_here_and_not_supported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        for name in ("cuda", "cuda:0", "cuda:1"):
            with pytest.raises(ValueError, match=f"do not support the device '{name}' yet: operations run on the CPU only; write cpu"):
                check_device(name)
        with pytest.raises(ValueError, match="no device 'cuda:2' here, it finds cpu, cuda:0, cuda:1; write cpu"):
            check_device("cuda:2")

    def test_it_is_checked_before_anything_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        listening: list[str] = []
        transport = type(plugins.transport("tcp://"))
        monkeypatch.setattr(transport, "listen", lambda _, url, *__: listening.append(url))
        monkeypatch.setattr("farpoint.host._wait", lambda *_, **__: None)  # one that starts after all ends at once
        with pytest.raises(ValueError, match="no device 'xpu' here"):
            host(hosting(device="xpu"), lambda _: None)
        assert not listening


class TestTokens:
    def test_a_file_is_made_once(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens"
        made = read_tokens(path)
        assert len(made) == 1 and len(made[0]) >= 22 and path.stat().st_mode & 0o777 == 0o600
        assert read_tokens(path) == made

    def test_one_on_each_line(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens"
        path.touch(0o600)
        tokens = [new_token(), new_token()]
        path.write_text("\n".join(["", f"  {tokens[0]} ", "", tokens[1]]))
        assert read_tokens(path) == tuple(tokens)

    @pytest.mark.parametrize(
        ("text", "mode", "complaint"),
        [
            ("x" * 22, 0o640, "others can read"),
            ("x" * 22, 0o604, "others can read"),
            ("x" * 21, 0o600, "fewer than 22 characters"),
            (f"{'x' * 22}\nshort", 0o600, "fewer than 22 characters"),
            ("\n", 0o600, "no token in it"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, text: str, mode: int, complaint: str) -> None:
        path = tmp_path / "tokens"
        path.write_text(text)
        path.chmod(mode)
        with pytest.raises(InsecureListenerError, match=complaint) as caught:
            read_tokens(path)
        assert "x" * 21 not in str(caught.value) and "short" not in str(caught.value)
