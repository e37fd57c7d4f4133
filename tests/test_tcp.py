"""The transports over sockets: the contract, both sides at once, and signs of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import pytest

import farpoint_tcp
from farpoint.errors import TransportError
from farpoint.limits import Limits
from farpoint.plugins import PluginManager
from farpoint.serializer import Frame
from farpoint.testing.transport import PATIENCE, Recorder, TransportContract, eventually
from farpoint.transport import Link, Transport
from farpoint_tcp import link as link_module
from farpoint_tcp.link import AHEAD, PING, PONG, StreamLink
from farpoint_tcp.transport import TcpTransport, TlsTransport, UnixTransport
from tcp_stage import MEBI, Held, Pair, Stage, TrustingTls, exactly, nothing_is_left, transport

__all__ = ["nothing_is_left", "transport"]  # fixtures


class SocketContract(TransportContract):
    """The contract, and what all three schemes promise beside it."""

    @pytest.fixture
    def url(self, transport: TcpTransport) -> str:
        return transport.local_url("alice")


class TestTcp(SocketContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return TcpTransport()


class TestTls(SocketContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return TrustingTls()


class TestUnix(SocketContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return UnixTransport()


# Both sides write, and nobody waits for ever.


@pytest.fixture
def nobody_else_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave reading to those who are stuck: the watch does not look after links."""
    monkeypatch.setattr(StreamLink, "look", lambda self, now: 1.0)


BULK = {"one large message": [bytes(range(256)) * (32 * MEBI // 256)], "many small ones": [b"abc" * 1000] * 2000}


@pytest.mark.usefixtures("nobody_else_reads")
@pytest.mark.parametrize("bulk", BULK)
def test_receivers_may_write_more_than_the_buffers_hold(transport: TcpTransport, bulk: str) -> None:
    def answer(message: list[bytes], end: Callable[[], Recorder]) -> None:
        link = end().link
        if message == [b"go"] and link is not None:
            for piece in BULK[bulk]:
                link.write([piece])

    near = Recorder(lambda message: answer(message, lambda: near))
    far = Recorder(lambda message: answer(message, lambda: far))
    pair = Pair(transport, near, far)
    for link in (pair.near_link, pair.far_link):
        link.write([b"go"])
    for recorder in (near, far):
        eventually(partial(_holds, recorder, 1 + len(BULK[bulk])))
        # The other's "go" may come before or after what its receiver writes.
        assert [message for message in recorder.messages if message != [b"go"]] == [[piece] for piece in BULK[bulk]]


@pytest.mark.usefixtures("nobody_else_reads")
def test_receivers_may_wait_for_a_thread_that_writes(transport: TcpTransport) -> None:
    """On both sides a thread holds a lock and writes, and the receiver waits for that lock."""
    big = bytes(32 * MEBI)
    locks = [threading.Lock(), threading.Lock()]
    waiting = [threading.Event(), threading.Event()]

    def take_the_lock(side: int, message: list[bytes]) -> None:
        if message == [b"go"]:
            waiting[side].set()
            with locks[side]:
                pass

    recorders = [Recorder(partial(take_the_lock, side)) for side in (0, 1)]
    pair = Pair(transport, recorders[0], recorders[1])
    links = [pair.near_link, pair.far_link]

    def write(side: int) -> None:
        with locks[side]:
            links[1 - side].write([b"go"])
            assert waiting[side].wait(PATIENCE)
            links[side].write([big])

    threads = [threading.Thread(target=write, args=(side,), daemon=True) for side in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for recorder in recorders:
        eventually(partial(_holds, recorder, 2))
        assert sorted(recorder.messages, key=lambda message: len(message[0])) == [[b"go"], [big]]


def test_a_write_waits_for_a_slow_reader_and_memory_is_bounded(transport: TcpTransport) -> None:
    far = Held()
    pair = Pair(transport, far=far)
    written = [0]
    message = bytes(MEBI)

    def write() -> None:
        for number in range(100):
            pair.near_link.write([b"%d" % number, message])
            written[0] += 1

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    eventually(lambda: not pair.far_link._room())
    held = pair.far_link._inbound.charged - pair.far_link._delivered
    assert AHEAD <= held < AHEAD + 2 * MEBI
    assert written[0] < 100 and thread.is_alive()
    far.gate.set()
    thread.join(PATIENCE)
    eventually(lambda: len(far.messages) == 100)
    assert [int(frames[0]) for frames in far.messages] == list(range(100))
    assert not far.losses and not pair.near.losses


def test_a_write_that_makes_no_progress_ends_the_link(transport: TcpTransport) -> None:
    far = Held()
    pair = Pair(transport, far=far, near_limits=Limits(stall_seconds=0.2))
    with pytest.raises(TransportError, match=r"took nothing for 0.2 s"):
        _write_often(pair.near_link, 200)
    with pytest.raises(TransportError, match=r"took nothing for 0.2 s"):
        pair.near_link.write([b"more"])
    eventually(lambda: pair.near.losses)
    assert "took nothing" in str(pair.near.losses[0])
    far.gate.set()
    eventually(lambda: far.losses)
    assert "without a goodbye" in str(far.losses[0])
    assert all(message == [bytes(MEBI)] for message in far.messages)


def test_a_write_may_take_long_as_long_as_it_makes_progress(
    transport: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(transport)
    send, clock, calls = pair.near_link._stream.send, [1000.0], [0]

    def one_byte_in_ten_seconds(buffers: Sequence[Frame], *, waiting: bool) -> int:
        calls[0] += 1
        if calls[0] % 2:
            clock[0] += 10.0  # less than the 15 of a stall
            return 0
        return send([memoryview(buffers[0])[:1]], waiting=waiting)

    monkeypatch.setattr(link_module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    monkeypatch.setattr(pair.near_link._stream, "send", one_byte_in_ten_seconds)
    pair.near_link.write([b"patience"])
    monkeypatch.undo()
    eventually(lambda: pair.far.messages)
    assert pair.far.messages == [[b"patience"]] and clock[0] > 1100.0


# Signs of life.


def _holds(recorder: Recorder, count: int) -> bool:
    return len(recorder.messages) == count


def _heard_since(link: StreamLink, then: float) -> bool:
    return link.heard > then


def _write_often(link: Link, count: int) -> None:
    for _ in range(count):
        link.write([bytes(MEBI)])



def test_a_silent_peer_is_given_up() -> None:
    stage = Stage(TcpTransport(), limits=Limits(ping_seconds=0.05, pong_seconds=0.05))
    with stage.welcomed() as peer:
        assert exactly(peer, len(PING)) == PING
        eventually(lambda: stage.arrived[0][1].losses)
        assert "nor an answer to a ping" in str(stage.arrived[0][1].losses[0])
        with pytest.raises(TransportError, match="nor an answer to a ping"):
            stage.arrived[0][0].write([b"x"])


def test_a_peer_that_answers_stays(transport: TcpTransport) -> None:
    stage = Stage(transport, limits=Limits(ping_seconds=0.01, pong_seconds=PATIENCE))
    with stage.welcomed() as peer:
        for _ in range(5):
            assert exactly(peer, len(PING)) == PING
            peer.sendall(PONG)
        peer.sendall(PING + PING)
        assert PONG in exactly(peer, len(PONG)) + exactly(peer, len(PONG))
        assert not stage.arrived[0][1].losses


def test_pings_are_answered_while_the_receiver_works(transport: TcpTransport) -> None:
    far = Held()
    # Only one side asks: what it hears is an answer.
    asking, silent = Limits(ping_seconds=0.05, pong_seconds=PATIENCE), Limits(ping_seconds=1000.0)
    pair = Pair(transport, far=far, near_limits=asking, far_limits=silent)
    pair.near_link.write([b"work"])
    eventually(lambda: far.messages)
    for _ in range(2):  # the first answer may be to a ping that came before the work
        eventually(partial(_heard_since, pair.near_link, pair.near_link.heard))
    far.gate.set()
    assert not pair.near.losses and not far.losses


def test_a_receiver_without_room_says_that_it_lives_and_does_not_take_its_own_silence_for_death(
    transport: TcpTransport,
) -> None:
    far = Held()
    pair = Pair(transport, far=far, near_limits=Limits(stall_seconds=60))
    thread = threading.Thread(
        target=lambda: _write_often(pair.near_link, 60), daemon=True
    )
    thread.start()
    eventually(lambda: not pair.far_link._room())
    for later in (1000, 2000, 3000):
        heard = pair.near_link.heard
        pair.far_link.look(time.monotonic() + later)
        eventually(partial(_heard_since, pair.near_link, heard))
    far.gate.set()
    thread.join(PATIENCE)
    eventually(lambda: len(far.messages) == 60)
    assert not pair.near.losses and not far.losses


def test_the_plugin_registers_three_schemes() -> None:
    plugins = PluginManager(discover=False)
    plugins.register(farpoint_tcp)
    for scheme, kind in (("tcp", TcpTransport), ("tls", TlsTransport), ("unix", UnixTransport)):
        assert type(plugins.transport(f"{scheme}://x")) is kind
