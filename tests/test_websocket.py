"""The transport `websocket`: the contract, in the clear, over TLS and compressed, and the life of its links."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as PipeEnd
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import trustme

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.plugins import plugins
from farpoint.serializer import Frame
from farpoint.testing.transport import PATIENCE, Recorder, TransportContract, eventually, join
from farpoint.transport import Accept, Link, Listener, Receiver, Transport
from farpoint_websocket import outbox, window
from farpoint_websocket.exchange import Exchange
from farpoint_websocket.link import WebsocketLink
from farpoint_websocket.pulse import Pulse
from farpoint_websocket.transport import WebsocketTransport

PLAIN = "ws://127.0.0.1:0"
MEBI = 2**20
LONG = 12 * PATIENCE
"""Seconds to wait for another process, which may have to import torch on a machine that is busy."""


class Configured(Transport):
    """The transport with access and limits that each link of a test has."""

    schemes = ("ws", "wss")

    def __init__(self, credentials: Credentials = NO_CREDENTIALS, admission: Admission = EVERYBODY) -> None:
        self.credentials = credentials
        self.admission = admission

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        return WebsocketTransport().connect(url, receiver, self.credentials)

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        return WebsocketTransport().listen(url, accept, self.admission)

    def local_url(self, name: str) -> str:
        return PLAIN if self.admission.tls is None else PLAIN.replace("ws:", "wss:")


def limited(**limits: float) -> Configured:
    few = Limits(**limits)  # type: ignore[arg-type]
    return Configured(Credentials(limits=few), Admission(limits=few))


@pytest.fixture(scope="session")
def certified() -> Configured:
    """Both sides show a certificate that the other one trusts."""
    authority = trustme.CA()
    near = ssl.create_default_context()
    far = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    far.verify_mode = ssl.CERT_REQUIRED
    authority.issue_cert("me@example.org", common_name="me").configure_cert(near)
    authority.issue_cert("127.0.0.1").configure_cert(far)
    for context in (near, far):
        authority.configure_trust(context)
    return Configured(Credentials(tls=near), Admission(tls=far))


class TestWs(TransportContract):
    """Links in the clear."""

    @pytest.fixture
    def transport(self) -> Transport:
        return plugins.transport("ws://")

    @pytest.fixture
    def url(self, transport: Transport) -> str:
        assert isinstance(transport, WebsocketTransport)
        return transport.local_url("alice")


class TestWss(TransportContract):
    """Links over TLS, with certificates on both sides."""

    @pytest.fixture
    def transport(self, certified: Configured) -> Transport:
        return certified

    @pytest.fixture
    def url(self) -> str:
        return "wss://127.0.0.1:0"

    def test_names_come_from_certificates(self, transport: Transport, url: str) -> None:
        near, far = join(transport, url, Recorder(), Recorder())
        assert near.identity == "127.0.0.1" and far.identity == "me@example.org"
        assert near.address.startswith("127.0.0.1:") and far.address.startswith("127.0.0.1:")
        near.close()


class TestCompressed(TransportContract):
    """Links whose both sides ask for compression."""

    @pytest.fixture
    def transport(self) -> Transport:
        return WebsocketTransport()

    @pytest.fixture
    def url(self) -> str:
        return PLAIN + "/?compress=1"


def test_a_link_without_tls_has_no_identity() -> None:
    near, far = join(WebsocketTransport(), PLAIN, Recorder(), Recorder())
    assert near.identity == far.identity == ""
    near.close()


def test_short_messages_leave_at_once() -> None:
    """Neither end waits for an acknowledgement before it sends a second short message."""
    for link in join(WebsocketTransport(), PLAIN, Recorder(), Recorder()):
        assert isinstance(link, WebsocketLink)
        assert link._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        link.close()


@pytest.mark.parametrize("size", [outbox.SMALL - 13, outbox.SMALL + 1, 3 * MEBI])
def test_any_buffer_is_written(size: int) -> None:
    """Views that are strided, of other items or empty in several dimensions are written as their bytes."""
    far = Recorder()
    link, _ = join(WebsocketTransport(), PLAIN, Recorder(), far)
    words = memoryview(bytearray(range(256)) * (size // 256 + 1)).cast("I")
    frames = [words, words[::2], words[:0], memoryview(b"12").cast("B", (2, 1))]
    link.write(frames)
    eventually(lambda: far.messages)
    assert far.messages == [[frame.tobytes() for frame in frames]]
    link.close()


def test_a_message_larger_than_the_window_passes_both_ways_at_once() -> None:
    """Neither side waits for the other to read: both send more than anybody would buffer, and receive it."""
    near, far = Recorder(), Recorder()
    ends = join(WebsocketTransport(), PLAIN, near, far)
    size = 2 * window.WINDOW + 1
    writers = [threading.Thread(target=link.write, args=([bytes(size)],), daemon=True) for link in ends]
    for writer in writers:
        writer.start()
    eventually(lambda: near.messages and far.messages)
    assert len(near.messages[0][0]) == len(far.messages[0][0]) == size
    ends[0].close()


def test_both_close_at_once_and_both_get_everything() -> None:
    """What was written before either `close` is delivered, also if the other side closes at the same time."""
    gate = threading.Event()
    near, far = (Recorder(lambda _: gate.wait(PATIENCE)) for _ in range(2))
    ends = join(WebsocketTransport(), PLAIN, near, far)
    for link in ends:
        for number in range(40):
            link.write([b"%d" % number, bytes(40_000)])
        link.close()
    gate.set()
    eventually(lambda: near.losses and far.losses)
    for recorder in (near, far):
        assert [int(message[0]) for message in recorder.messages] == list(range(40))
        assert recorder.losses == [None] and not recorder.late


def test_a_receiver_that_raises_ends_the_link() -> None:
    error = ValueError("broken on purpose")

    def fail(_: list[bytes]) -> None:
        raise error

    near, far = Recorder(), Recorder(fail)
    ends = join(WebsocketTransport(), PLAIN, near, far)
    ends[0].write([b"x"])
    eventually(lambda: near.losses and far.losses)
    assert far.losses == [error]
    assert "the receiver of the peer has failed: ValueError" in str(near.losses[0])
    for link in ends:
        with pytest.raises(TransportError):
            link.write([b"y"])


def test_who_accepts_may_write_and_may_refuse(caplog: pytest.LogCaptureFixture) -> None:
    """A large message written from within `accept` arrives; an `accept` that raises is an error of `connect`."""
    near = Recorder()

    def accept(link: Link) -> Recorder:
        link.write([b"welcome", bytes(10 * MEBI)])
        return Recorder()

    listener = WebsocketTransport().listen(PLAIN, accept)
    link = WebsocketTransport().connect(listener.url, near)
    eventually(lambda: near.messages)
    link.close()
    listener.close()

    def refuse(_: Link) -> Recorder:
        raise KeyError("nobody")

    listener = WebsocketTransport().listen(PLAIN, refuse)
    with pytest.raises(TransportError, match="the link was not accepted: KeyError"):
        WebsocketTransport().connect(listener.url, near)
    assert "was not accepted" in caplog.text
    listener.close()


def test_it_works_inside_a_running_loop() -> None:
    """As in a notebook: the thread that calls has a running event loop of its own."""

    async def cell() -> list[list[bytes]]:
        near = Recorder()
        far = Recorder(lambda message: far.link and far.link.write([*message, b"answer"]))
        link, _ = join(WebsocketTransport(), PLAIN, near, far)
        link.write([b"question"])
        eventually(lambda: near.messages)
        link.close()
        return near.messages

    assert asyncio.run(cell()) == [[b"question", b"answer"]]


def test_a_slow_receiver_blocks_its_writer_and_memory_is_bounded() -> None:
    """A writer gets as far as the window and the backlog, waits, and everything arrives once the receiver goes on."""
    gate = threading.Event()
    far = Recorder(lambda _: gate.wait(PATIENCE))
    link, _ = join(WebsocketTransport(), PLAIN, Recorder(), far)
    written = 0

    def write() -> None:
        nonlocal written
        for number in range(400):
            link.write([b"%d" % number, bytes(40_000)])
            written = number + 1

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    eventually(lambda: written * 40_000 > window.WINDOW and outbox.stuck(writer.ident or 0, 0.2))
    assert written * 40_000 < window.WINDOW + window.STEP + 2 * outbox.BACKLOG
    gate.set()
    writer.join(PATIENCE)
    eventually(lambda: len(far.messages) == 400)
    assert [int(message[0]) for message in far.messages] == list(range(400))
    link.close()


def test_small_messages_cost_more_than_their_bytes() -> None:
    """A flood of tiny messages is held back long before the objects that they become fill the memory."""
    gate = threading.Event()
    far = Recorder(lambda _: gate.wait(PATIENCE))
    link, _ = join(WebsocketTransport(), PLAIN, Recorder(), far)
    written = 0

    def write() -> None:
        nonlocal written
        for _ in range(50_000):
            link.write([b""])
            written += 1

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    eventually(lambda: written > 10_000 and outbox.stuck(writer.ident or 0, 0.2))
    assert written < 45_000
    gate.set()
    writer.join(PATIENCE)
    eventually(lambda: len(far.messages) == 50_000)
    link.close()


def test_a_busy_receiver_is_no_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver may work on a message for longer than every time-out while a writer waits: it answers pings."""
    gate = threading.Event()
    busy: list[object] = []
    tested: list[object] = []
    monkeypatch.setattr(Pulse, "busy", _noting(busy, Pulse.busy))
    monkeypatch.setattr(Pulse, "tests", _noting(tested, Pulse.tests))
    near, far = Recorder(), Recorder(lambda _: gate.wait(PATIENCE))
    link, _ = join(limited(ping_seconds=0.1, pong_seconds=0.2, stall_seconds=0.3), PLAIN, near, far)
    link.write([b"work"])
    writer = threading.Thread(target=link.write, args=([bytes(3 * window.WINDOW)],), daemon=True)
    writer.start()
    # Each one comes a third of stall_seconds after the one before.
    eventually(lambda: len(busy) > 12)
    assert any(tested) and not near.losses and not far.losses and writer.is_alive()
    gate.set()
    writer.join(PATIENCE)
    eventually(lambda: len(far.messages) == 2)
    link.close()
    eventually(lambda: near.losses and far.losses)
    assert near.losses == far.losses == [None]


def test_an_idle_link_lives_on_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[object] = []
    monkeypatch.setattr(Pulse, "tests", _noting(tested, Pulse.tests))
    near, far = Recorder(), Recorder()
    link, _ = join(limited(ping_seconds=0.05, pong_seconds=0.3), PLAIN, near, far)
    eventually(lambda: tested.count(True) > 20)
    link.write([b"still here"])
    eventually(lambda: far.messages)
    assert not near.losses and not far.losses
    link.close()


def test_two_that_only_write_are_told() -> None:
    """Both receivers write to each other, and neither reads any more: the stall time-out ends it, with an error."""
    errors: list[TransportError] = []

    def flood(_: list[bytes], end: Callable[[], Recorder]) -> None:
        link = end().link
        try:
            while link is not None:
                link.write([bytes(MEBI)])
        except TransportError as error:
            errors.append(error)

    near = Recorder(lambda message: flood(message, lambda: near))
    far = Recorder(lambda message: flood(message, lambda: far))
    link, _ = join(limited(stall_seconds=0.3), PLAIN, near, far)
    link.write([b"begin"])
    eventually(lambda: near.losses and far.losses)
    assert len(errors) >= 2
    assert any("a write made no progress for 0.3 s" in str(error) for error in errors)


def test_a_signal_in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large write that is interrupted before it has begun is forgotten; the link goes on."""
    gate = threading.Event()
    far = Recorder(lambda _: gate.wait(PATIENCE))
    near = Recorder()
    link, _ = join(WebsocketTransport(), PLAIN, near, far)
    assert isinstance(link, WebsocketLink)
    first = threading.Thread(target=link.write, args=([bytes(window.WINDOW + 5 * MEBI)],), daemon=True)
    link.write([b"hold"])
    first.start()
    eventually(lambda: outbox.stuck(first.ident or 0, 0.1))

    def interrupt(_: outbox.Outbox, wait: Callable[[], object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outbox.Outbox, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            link.write([b"never", bytes(outbox.SMALL)])
    gate.set()
    first.join(PATIENCE)
    link.write([b"last"])
    eventually(lambda: len(far.messages) == 3)
    assert far.messages[2] == [b"last"] and not near.losses
    link.close()


def test_an_interrupted_message_is_not_delivered_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large write that is interrupted after a part was sent ends the link: what follows would be read as its rest."""
    gate = threading.Event()
    near, far = Recorder(), Recorder(lambda _: gate.wait(PATIENCE))
    link, _ = join(WebsocketTransport(), PLAIN, near, far)
    link.write([b"hold"])
    assert isinstance(link, WebsocketLink)
    exchange = link.exchange

    def interrupt(_: outbox.Outbox, wait: Callable[[], object]) -> None:
        eventually(lambda: exchange._credit <= 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outbox.Outbox, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            link.write([bytes(2 * window.WINDOW)])
    gate.set()
    eventually(lambda: near.losses and far.losses)
    assert "interrupted" in str(near.losses[0]) and far.messages == [[b"hold"]]


def _noting(notes: list[object], method: Callable[..., object]) -> Callable[..., object]:
    """Return a method that also notes what it returns."""

    def noting(*args: object) -> object:
        result = method(*args)
        notes.append(result)
        return result

    return noting


# Other processes

Start = Callable[..., tuple[BaseProcess, "PipeEnd[Any, Any]"]]


@pytest.fixture(scope="session")
def nursery() -> ForkServerContext:
    """Processes that need not import torch each: one does, and the others are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["farpoint.testing.transport", "farpoint_websocket.transport"])
    return context


@pytest.fixture
def start(nursery: ForkServerContext) -> Iterator[Start]:
    """Call a function in another process; it gets one end of a pipe and returns when it likes."""
    started: list[BaseProcess] = []

    def start(function: Callable[..., None], *args: object) -> tuple[BaseProcess, PipeEnd[Any, Any]]:
        near, far = nursery.Pipe()
        process = nursery.Process(target=function, args=(far, *args), daemon=True)
        process.start()
        started.append(process)
        return process, near

    yield start
    for process in started:
        process.kill()
        process.join()


def hear(pipe: PipeEnd[Any, Any]) -> Any:
    """Return what a process has to say."""
    assert pipe.poll(LONG), "the other process says nothing"
    return pipe.recv()


def listening(pipe: PipeEnd[Any, Any]) -> None:
    """Listen, say where, and say what arrives."""
    listener = WebsocketTransport().listen(PLAIN, lambda _: Recorder(pipe.send))
    pipe.send(listener.url)
    threading.Event().wait()


def writing(pipe: PipeEnd[Any, Any], url: str) -> None:
    link = WebsocketTransport().connect(url, Recorder())
    link.write([b"whole"])
    link.write([bytes(4 * window.WINDOW)])


def test_a_process_that_is_killed_in_the_middle_of_a_message(start: Start) -> None:
    """What was whole is delivered, the half message is not, and the loss has a cause."""
    gate = threading.Event()
    far = Recorder(lambda _: gate.wait(PATIENCE))

    def accept(link: Link) -> Recorder:
        far.link = link
        return far

    listener = WebsocketTransport().listen(PLAIN, accept)
    process, _ = start(writing, listener.url)
    eventually(lambda: far.messages)
    assert isinstance(far.link, WebsocketLink)
    assembly = far.link.exchange._assembly
    eventually(lambda: assembly.arrived > window.WINDOW)
    process.kill()
    gate.set()
    eventually(lambda: far.losses)
    assert far.messages == [[b"whole"]] and isinstance(far.losses[0], TransportError)
    assert "the connection broke" in str(far.losses[0])
    listener.close()


def test_a_process_that_stands_still_is_noticed(start: Start) -> None:
    """No end of the connection, no answer to pings: the peer is given up after ping_seconds and pong_seconds."""
    process, pipe = start(listening)
    near = Recorder()
    link = limited(ping_seconds=0.3, pong_seconds=0.3).connect(hear(pipe), near)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: near.losses)
    assert "no sign of life for 0.6 s" in str(near.losses[0])
    with pytest.raises(TransportError, match="no sign of life"):
        link.write([b"x"])


def forking(pipe: PipeEnd[Any, Any]) -> None:
    """Listen and dial, fork, use both in the child, then in the parent, and say what came of it."""
    near, far = Recorder(), Recorder()
    link, _ = join(WebsocketTransport(), PLAIN, near, far)
    assert isinstance(link, WebsocketLink)
    listener = WebsocketTransport().listen(PLAIN, lambda _: far)
    lock, locked, unlock = link._outbox._change, threading.Event(), threading.Event()

    def write() -> None:
        """Be in the middle of a write when the process is forked: this thread is not there in the child."""
        with lock:
            locked.set()
            unlock.wait()

    threading.Thread(target=write).start()
    locked.wait()
    child = os.fork()
    unlock.set()
    if not child:
        try:
            link.write([b"of nobody"])
        except TransportError as error:
            pipe.send(str(error))
        link.close()
        listener.close()
        own, _ = join(WebsocketTransport(), PLAIN, Recorder(), far)
        own.write([b"of the child"])
        eventually(lambda: far.messages)
        pipe.send(far.messages)
        os._exit(0)
    os.waitpid(child, 0)
    link.write([b"of the parent"])
    WebsocketTransport().connect(listener.url, Recorder()).write([b"too"])
    eventually(lambda: len(far.messages) == 2)
    pipe.send((sorted(far.messages), near.losses, far.losses))


def test_a_forked_child_leaves_the_links_of_its_parent_alone(start: Start) -> None:
    _, pipe = start(forking)
    assert "before the process was forked" in hear(pipe)
    assert hear(pipe) == [[b"of the child"]]
    assert hear(pipe) == ([[b"of the parent"], [b"too"]], [], [])


def parenting(pipe: PipeEnd[Any, Any]) -> None:
    """Listen, and when a message arrives have a child that lives on."""
    far = Recorder()
    listener = WebsocketTransport().listen(PLAIN, lambda _: far)
    pipe.send(listener.url)
    eventually(lambda: far.messages)
    child = os.fork()
    if child:
        pipe.send(child)
    threading.Event().wait()


def test_a_forked_child_does_not_keep_connections_open(start: Start) -> None:
    """When the parent is killed, its peer learns it at once, although a child has inherited the sockets."""
    near = Recorder()
    process, pipe = start(parenting)
    url = hear(pipe)
    WebsocketTransport().connect(url, near).write([b"now"])
    child = hear(pipe)
    process.kill()
    try:
        eventually(lambda: near.losses)
        with pytest.raises(TransportError, match="nobody listens"):
            WebsocketTransport().connect(url, near)
    finally:
        os.kill(child, signal.SIGKILL)


class Weigher(Recorder):
    """A receiver that keeps sizes."""

    def received(self, frames: Sequence[Frame]) -> None:
        self.messages.append([b"%d" % len(frame) for frame in frames])


def memory(field: str) -> float:
    """Return a number of mebibytes from what the kernel says about this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) / 1024


def weighing(pipe: PipeEnd[Any, Any], url: str) -> None:
    """Listen or dial, carry three messages of 64 MiB, and say how much memory that took."""
    near = Weigher()
    if url:
        link = WebsocketTransport().connect(url, near)
        frame = bytes(64 * MEBI)
    else:
        pipe.send(WebsocketTransport().listen(PLAIN, lambda _: near).url)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    if url:
        for _ in range(3):
            link.write([frame])
        link.close()
    else:
        eventually(lambda: len(near.messages) == 3)
    eventually(lambda: near.losses)
    pipe.send(memory("VmHWM") - before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_a_message_is_in_memory_once_on_each_side(start: Start) -> None:
    """Messages of 64 MiB cost their sender chunks, and their receiver one message, whatever comes next."""
    _, listener = start(weighing, "")
    _, dialler = start(weighing, hear(listener))
    sending, receiving = hear(dialler), hear(listener)
    assert sending < 16, sending
    assert 60 < receiving < 64 + window.WINDOW / MEBI + 8, receiving


LEAVE = """
import atexit, socket, sys, threading, time
from farpoint.plugins import plugins
from farpoint.testing.transport import Recorder, eventually
transport = plugins.transport("ws://")
# As the core does: after the plugin was found, and before there is a link.
atexit.register(lambda: home.write([b"the very last"]))
listener = transport.listen("ws://127.0.0.1:0", lambda _: Recorder(lambda _: time.sleep(1000)))
link = transport.connect(listener.url, Recorder())
link.write([b"x"])
stranger = socket.create_connection(("127.0.0.1", int(listener.url.rpartition(":")[2])))
eventually(lambda: len(listener._socket._present) == 2)
def write():
    try:
        while True:
            link.write([bytes(2**22)])
    except ConnectionError:
        pass
threading.Thread(target=write, daemon=True).start()
stranger.close()
home = transport.connect(sys.argv[1], Recorder())
home.write([b"last"])
print("end", flush=True)
"""


def test_an_exit_neither_hangs_nor_complains_nor_loses() -> None:
    """A script ends with links, a listener and half a connection open, and a receiver that sleeps: not a sound.

    What was written arrives, also what is written by an exit handler, and the peer sees a goodbye.
    """
    far = Recorder()
    listener = WebsocketTransport().listen(PLAIN, lambda _: far)
    command = [sys.executable, "-W", "error", "-c", LEAVE, listener.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    eventually(lambda: far.losses)
    assert far.messages == [[b"last"], [b"the very last"]] and far.losses == [None]
    listener.close()


def test_a_connection_that_is_gone_at_once_leaves_no_coroutine() -> None:
    connection = Mock()
    connection.wait_closed = AsyncMock()

    async def live() -> None:
        await Exchange("ws://nowhere", connection, Mock(), Mock(), Limits()).run()

    asyncio.run(live())
    gc.collect()  # what was never awaited would say so, and that is an error
    assert connection.transport.abort.called
