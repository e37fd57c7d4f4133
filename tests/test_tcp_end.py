"""How links over sockets end, and what is left of them: here, in killed processes and in forked ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint.testing.transport import PATIENCE, Recorder, eventually
from farpoint.transport import Link, Receiver
from farpoint_tcp import link as link_module
from farpoint_tcp.framing import MAGIC, Signal, encode
from farpoint_tcp.framing import signal as signal_bytes
from farpoint_tcp.link import StreamLink
from farpoint_tcp.memory import LAZY
from farpoint_tcp.transport import TcpTransport
from farpoint_tcp.watch import watch
from tcp_stage import KINDS, MEBI, Held, Pair, Stage, exactly, nothing_is_left, transport

__all__ = ["nothing_is_left", "transport"]  # fixtures


def _fails(link: Link) -> bool:
    try:
        link.write([b"too late"])
    except TransportError:
        return True
    return False


def _messages(recorder: Recorder, count: int) -> bool:
    return len(recorder.messages) == count


def test_a_receiver_that_raises_ends_the_link(transport: TcpTransport) -> None:
    error = ValueError("broken on purpose")

    def fail(_: list[bytes]) -> None:
        raise error

    pair = Pair(transport, far=Recorder(fail))
    pair.near_link.write([b"x"])
    eventually(lambda: pair.near.losses and pair.far.losses)
    assert pair.far.losses == [error]
    assert "the receiver of this link has failed" in str(pair.near.losses[0])
    with pytest.raises(TransportError, match="broken on purpose"):
        pair.far_link.write([b"y"])


def test_a_peer_that_is_quicker_to_close_is_no_loss(
    transport: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer hangs up between our goodbye and our own end of the connection."""
    pair = Pair(transport)

    def until_the_peer_is_gone() -> int:
        eventually(lambda: pair.near.losses)
        return 0

    monkeypatch.setattr(pair.near_link._stream, "undelivered", until_the_peer_is_gone)
    pair.near_link.close()
    eventually(lambda: pair.far.losses)
    assert pair.near.losses == pair.far.losses == [None]


def test_what_came_before_a_write_failed_is_still_delivered(
    transport: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamLink, "look", lambda self, now: 1.0)  # nobody reads before we do
    near = Held()
    pair = Pair(transport, near)
    pair.far_link.write([b"busy"])
    eventually(lambda: near.messages)
    pair.far_link.write([b"last", bytes(100_000)])
    pair.far_link.close()
    eventually(lambda: pair.far.losses)
    eventually(partial(_fails, pair.near_link))
    near.gate.set()
    eventually(lambda: near.losses)
    assert near.messages == [[b"busy"], [b"last", bytes(100_000)]] and near.losses == [None]


def test_a_close_may_take_long_as_long_as_it_makes_progress(
    transport: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Held()
    pair = Pair(transport, far=far, near_limits=Limits(close_seconds=1000.0))
    pair.near_link.write([b"busy"])
    eventually(lambda: far.messages)
    left, clock = [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0], [0.0]

    def less_and_less() -> int:
        clock[0] += 600.0
        return left.pop(0)

    monkeypatch.setattr(link_module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    monkeypatch.setattr(pair.near_link._stream, "undelivered", less_and_less)
    pair.near_link.close()
    monkeypatch.undo()
    far.gate.set()
    eventually(lambda: pair.near.losses and far.losses)
    assert pair.near.losses == far.losses == [None] and not left


def test_a_close_waits_for_a_stuck_write_in_vain(transport: TcpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(transport, near_limits=Limits(close_seconds=0.1))
    stuck = threading.Event()
    errors: list[TransportError] = []

    def take_nothing(buffers: Sequence[Frame], *, waiting: bool) -> int:
        stuck.set()
        time.sleep(0.001)
        if pair.near_link._left:
            raise BrokenPipeError
        return 0

    def write() -> None:
        with pytest.raises(TransportError) as caught:
            pair.near_link.write([b"x"])
        errors.append(caught.value)

    monkeypatch.setattr(pair.near_link._stream, "send", take_nothing)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert stuck.wait(PATIENCE)
    pair.near_link.close()
    thread.join(PATIENCE)
    eventually(lambda: pair.near.losses and pair.far.losses)
    assert "closed while a write was stuck" in str(pair.near.losses[0])
    assert "closed while a write was stuck" in str(errors[0])
    assert not pair.far.messages


def test_a_close_says_what_was_not_taken() -> None:
    stage = Stage(TcpTransport(), limits=Limits(close_seconds=0.1))
    peer = stage.welcomed()
    link, recorder = stage.arrived[0]
    send = link._stream.send  # type: ignore[attr-defined]
    # As much as the kernels between the two hold without anybody reading.
    while send([bytes(MEBI)], waiting=False):
        pass
    link.close()
    eventually(lambda: recorder.losses)
    assert "for 0.1 s" in str(recorder.losses[0])
    peer.close()


def test_a_close_waits_for_a_slow_peer(transport: TcpTransport) -> None:
    """As long as it takes something now and then; and what it says meanwhile does no harm."""
    stage = Stage(transport, limits=Limits(close_seconds=1.0))
    peer = stage.welcomed()
    link, recorder = stage.arrived[0]

    def write() -> None:
        link.write([bytes(8 * MEBI)])
        link.close()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    got = 0
    while more := peer.recv(MEBI):
        got += len(more)
        if got < 4 * MEBI:  # while it still has something to say, it listens
            peer.sendall(encode([b"talk"])[0])
    assert got == 12 + 8 * MEBI + len(signal_bytes(Signal.GOODBYE))
    eventually(lambda: recorder.losses)
    assert recorder.losses == [None]
    writer.join(PATIENCE)
    peer.close()


def test_a_write_that_is_interrupted_ends_the_link(transport: TcpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(transport)
    send = pair.near_link._stream.send

    def interrupt(buffers: Sequence[Frame], *, waiting: bool) -> int:
        send([memoryview(buffers[0])[:20]], waiting=waiting)
        raise KeyboardInterrupt

    monkeypatch.setattr(pair.near_link._stream, "send", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pair.near_link.write([bytes(1000)])
    eventually(lambda: pair.near.losses and pair.far.losses)
    assert "interrupted in the middle" in str(pair.near.losses[0])
    assert pair.far.losses[0] is not None and not pair.far.messages
    with pytest.raises(TransportError, match="interrupted in the middle"):
        pair.near_link.write([b"x"])


def test_a_write_within_a_write_is_refused(transport: TcpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler or a finalizer would do it, on the same thread."""
    pair = Pair(transport)
    send = pair.near_link._stream.send
    refused: list[TransportError] = []

    def handler(buffers: Sequence[Frame], *, waiting: bool) -> int:
        monkeypatch.undo()
        with pytest.raises(TransportError, match="signal handler") as caught:
            pair.near_link.write([b"inner"])
        refused.append(caught.value)
        return send(buffers, waiting=waiting)

    monkeypatch.setattr(pair.near_link._stream, "send", handler)
    pair.near_link.write([b"outer"])
    pair.near_link.write([b"next"])
    eventually(lambda: len(pair.far.messages) == 2)
    assert refused and pair.far.messages == [[b"outer"], [b"next"]]


def test_a_view_that_is_kept_is_not_overwritten(transport: TcpTransport) -> None:
    kept: list[memoryview] = []

    class Keeper(Recorder):
        def received(self, frames: Sequence[Frame]) -> None:
            super().received(frames)
            kept.append(memoryview(frames[0])[10:20])

    pair = Pair(transport, far=Keeper())
    for number in range(4):
        pair.near_link.write([bytes([number]) * (2 * LAZY)])
    eventually(lambda: len(kept) == 4)
    assert [bytes(view) for view in kept] == [bytes([number]) * 10 for number in range(4)]


def test_memory_is_used_again_and_then_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(TcpTransport(), far_limits=Limits(ping_seconds=0.05))
    memory = pair.far_link._inbound._memory
    spares = set()
    for number in range(1, 5):
        pair.near_link.write([bytes(2 * LAZY)])
        eventually(partial(_messages, pair.far, number))
        eventually(lambda: memory._spare is not None)
        spares.add(id(memory._spare))
    assert len(spares) == 1
    monkeypatch.setattr(link_module, "SPARE", 0.0)
    eventually(lambda: memory._spare is None)


def test_nothing_leaks(transport: TcpTransport) -> None:
    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    stage = Stage(transport)
    Pair(transport).near_link.close()
    eventually(lambda: not watch._links)
    before = count()
    for _ in range(10):
        pair = Pair(transport)
        pair.near_link.write([bytes(MEBI)])
        (pair.near_link, pair.far_link)[_ % 2].close()
        with stage.raw() as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with stage.raw() as stranger:
            stranger.sendall(MAGIC + b"\x07\x00\x00")
            assert exactly(stranger, 1)
        with stage.welcomed() as peer:
            peer.sendall(b"\xff" * 100)
    eventually(lambda: not watch._links)
    eventually(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))


def test_descriptors_do_not_pass_to_programs(transport: TcpTransport) -> None:
    pair = Pair(transport)
    for link in (pair.near_link, pair.far_link):
        assert not os.get_inheritable(link._stream._sock.fileno())


# Other processes.

HEAD = """
import os, signal, ssl, sys, warnings
from farpoint.access import Credentials
from farpoint.errors import TransportError
from farpoint.testing.transport import Recorder, eventually
from farpoint_tcp.transport import TcpTransport, TlsTransport, UnixTransport
"""


@contextmanager
def elsewhere(program: str, *arguments: str) -> Iterator[IO[str]]:
    """Run a program in a process of its own; what it prints can be read."""
    command = [sys.executable, "-c", HEAD + textwrap.dedent(program), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


def test_a_process_that_is_killed_in_the_middle_of_a_message() -> None:
    stage = Stage(TcpTransport())
    program = """
        link = TcpTransport().connect(sys.argv[1], Recorder())
        link.write([b"whole"])
        send, left = link._stream.send, [5 * 2**20]
        def stop(buffers, *, waiting):
            if left[0] <= 0:
                print(os.getpid(), flush=True)
                signal.pause()
            left[0] -= (sent := send(buffers, waiting=waiting))
            return sent
        link._stream.send = stop
        link.write([bytes(256 * 2**20)])
        """
    with elsewhere(program, stage.url) as output:
        os.kill(int(output.readline()), signal.SIGKILL)
        _, recorder = stage.arrived[0]
        eventually(lambda: recorder.losses)
    assert recorder.messages == [[b"whole"]] and not recorder.late
    assert isinstance(recorder.losses[0], TransportError) and len(recorder.losses) == 1


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_a_process_that_closes_and_ends_has_delivered(kind: str) -> None:
    """The peer is slow, and talks without being listened to."""

    class Chatty(Recorder):
        def received(self, frames: Sequence[Frame]) -> None:
            super().received(frames)
            eventually(lambda: self.link)
            try:
                assert self.link is not None
                self.link.write([bytes(10_000)])
            except TransportError:
                pass  # it has closed

    far = Chatty()

    def accept(link: Link) -> Receiver:
        far.link = link
        return far

    transport = KINDS[kind]()
    listener = transport.listen(transport.local_url("x"), accept)
    program = """
        transport = {"tcp": TcpTransport, "tls": TlsTransport}[sys.argv[1]]()
        context = ssl._create_unverified_context() if sys.argv[1] == "tls" else None
        link = transport.connect(sys.argv[2], Recorder(), Credentials(tls=context))
        for number in range(50):
            link.write([b"%d" % number, bytes(100_000)])
        link.close()
        print("closed", flush=True)
        """
    with elsewhere(program, kind, listener.url) as output:
        assert output.read() == "closed\n"
    listener.close()
    eventually(lambda: far.losses)
    assert far.losses == [None] and [int(frames[0]) for frames in far.messages] == list(range(50))


def test_a_forked_child_leaves_links_to_its_parent() -> None:
    program = """
        warnings.simplefilter("ignore")
        def pair(transport):
            far = Recorder()
            def accept(link):
                far.link = link
                return far
            listener = transport.listen(transport.local_url("x"), accept)
            near = transport.connect(listener.url, Recorder())
            eventually(lambda: far.link)
            return listener, near, far
        for transport in (TcpTransport(), UnixTransport()):
            listener, near, far = pair(transport)
            child = os.fork()
            if not child:
                for link in (near, far.link):
                    try:
                        link.write([b"from the child"])
                        os._exit(1)
                    except TransportError as error:
                        assert "forked" in str(error)
                    link.close()
                listener.close()
                _, near, far = pair(transport)
                near.write([b"its own"])
                eventually(lambda: far.messages)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            near.write([b"from the parent"])
            eventually(lambda: far.messages)
            assert far.messages == [[b"from the parent"]] and not far.losses
            transport.connect(listener.url, Recorder()).close()
            listener.close()
        print("done")
        """
    with elsewhere(program) as output:
        assert output.read() == "done\n"
