"""What a peer that was let in may do over a WebSocket without hurting anybody but itself, and the parts it meets."""

from __future__ import annotations

import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from farpoint.access import Admission
from farpoint.errors import DecodeError, TransportError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint.testing.transport import PATIENCE, Recorder, eventually
from farpoint.transport import Link
from farpoint_websocket import connection, pulse, window, wire
from farpoint_websocket.pulse import Pulse
from farpoint_websocket.transport import WebsocketTransport
from farpoint_websocket.window import Window
from farpoint_websocket.wire import MAX_CHUNK, Assembly, chunks, header

LIMITS = Limits(message_bytes=2**22, header_bytes=2**16, tensors=100, stall_seconds=0.3)

Peer = ClientConnection


class Site:
    """A listener whose receivers wait at a gate, and what arrives there."""

    def __init__(self, options: str = "") -> None:
        self.gate = threading.Event()
        self.peers = ExitStack()
        self.fars: list[Recorder] = []
        url = "ws://127.0.0.1:0" + options
        self.listener = WebsocketTransport().listen(url, self._accept, Admission(limits=LIMITS))

    def _accept(self, link: Link) -> Recorder:
        far = Recorder(lambda _: self.gate.wait(PATIENCE))
        far.link = link
        self.fars.append(far)
        return far

    def dial(self, **options: Any) -> Peer:
        """Return a link that is none of ours: it does what a test tells it."""
        options = {"subprotocols": ["farpoint.1"], "compression": None, "close_timeout": 1, **options}
        peer: Peer = self.peers.enter_context(connect(self.listener.url, **options))
        assert peer.recv() == wire.credit(window.WINDOW)
        return peer

    def deafen(self, peer: Peer) -> None:
        """Let a peer read nothing any more, until the end."""
        peer.recv_messages.pause()
        self.peers.callback(peer.recv_messages.resume)

    def works(self) -> bool:
        """Return whether somebody else gets a message through."""
        link = WebsocketTransport().connect(self.listener.url, Recorder())
        link.write([b"of somebody else"])
        eventually(lambda: self.fars[-1].messages == [[b"of somebody else"]])
        link.close()
        return True

    def close(self) -> None:
        """End it, and its peers."""
        self.gate.set()
        self.listener.close()
        self.peers.close()


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site(getattr(request, "param", ""))
    yield site
    site.close()


def end(peer: Peer) -> str:
    """Return what a peer is told at the end of its link."""
    while True:
        try:
            peer.recv(timeout=PATIENCE)
        except ConnectionClosed as told:
            return str(told)


def frame(first: int, payload: bytes) -> bytes:
    """Return a frame of WebSocket with any first byte, and a mask that changes nothing."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
    return bytes([first]) + length + bytes(4) + payload


def whole(*frames: bytes) -> bytes:
    """Return a message of farpoint."""
    return header([len(content) for content in frames]) + b"".join(frames)


ATTACKS: dict[str, tuple[Callable[[Peer], object], str]] = {
    "text": (lambda peer: peer.send("gimme"), "an unknown notice 'gimme'"),
    "a message as text": (lambda peer: peer.send("\0\0\0\1"), "an unknown notice"),
    "text that is none": (lambda peer: peer.send(b"\xff\xfe", text=True), "an unknown notice"),
    "a notice in pieces": (lambda peer: peer.send(["cred", "it 99"]), "an unknown notice"),
    "endless credit": (lambda peer: peer.send("credit " + "9" * 16), "an unknown notice"),
    "negative credit": (lambda peer: peer.send("credit -1"), "an unknown notice"),
    "digits of another script": (lambda peer: peer.send("credit \u0661\u0662"), "an unknown notice"),
    "no frames": (lambda peer: peer.send(bytes(4)), "a message without frames"),
    "many frames": (lambda peer: peer.send(struct.pack("!I", 102)), "101 exceeds the limit tensors=100"),
    "a huge claim": (lambda peer: peer.send(header([2**64 - 1])), "exceeds the limit message_bytes=4259840"),
    "a huge sum": (lambda peer: peer.send(header([2**21] * 3)), "6291456 exceeds the limit message_bytes"),
    "a large chunk": (lambda peer: peer.send(bytes(MAX_CHUNK + 1)), "1009"),
    "a large chunk in pieces": (lambda peer: peer.send([header([2**21]), *[bytes(MAX_CHUNK // 2)] * 3]), "1009"),
    "a large claim of WebSocket": (lambda peer: raw(peer, b"\x82\xff" + struct.pack("!Q", 2**62) + bytes(4)), "1009"),
    "garbage": (lambda peer: raw(peer, bytes(range(3, 256))), "1002"),
    "no mask": (lambda peer: raw(peer, b"\x82\x05" + whole(b"")[:5]), "incorrect masking"),
    "compression that was not agreed": (lambda peer: raw(peer, frame(0xC2, b"x" * 200)), "reserved bits must be 0"),
    "a ping as long as a letter": (lambda peer: raw(peer, frame(0x89, b"x" * 200)), "control frame too long"),
}


def raw(peer: Peer, data: bytes) -> None:
    """Send bytes past the library."""
    peer.socket.sendall(data)


@pytest.mark.parametrize(("attack", "said"), ATTACKS.values(), ids=ATTACKS)
def test_who_breaks_the_rules_loses_the_link(site: Site, attack: Callable[[Peer], object], said: str) -> None:
    """Both sides are told why, no message is made of it, and others do not notice."""
    peer = site.dial()
    try:
        attack(peer)
    except ConnectionClosed:
        pass  # it was cut in the middle
    assert said in end(peer)
    far = site.fars[0]
    eventually(lambda: far.losses)
    assert far.messages == [] and len(far.losses) == 1
    assert isinstance(far.losses[0], TransportError) and said in str(far.losses[0])
    assert site.works()


def test_pieces_of_a_chunk_are_no_attack(site: Site) -> None:
    """Another implementation, or something between us, may cut the messages of WebSocket into fragments."""
    peer = site.dial()
    site.gate.set()
    peer.send([b"", whole(b"a", b"bc")[:7], whole(b"a", b"bc")[7:] + whole(b"d"), b""])
    eventually(lambda: len(site.fars[0].messages) == 2)
    assert site.fars[0].messages == [[b"a", b"bc"], [b"d"]]


@pytest.mark.parametrize("more", ["bye", whole(b"late")])
def test_nothing_counts_after_the_goodbye(site: Site, more: str | bytes) -> None:
    peer = site.dial()
    peer.send(whole(b"last"))
    peer.send("bye")
    try:
        peer.send(more)
    except ConnectionClosed:
        pass  # the listener was quicker
    end(peer)
    site.gate.set()
    far = site.fars[0]
    eventually(lambda: far.losses)
    assert far.messages == [[b"last"]] and len(far.losses) == 1
    assert site.works()


def test_half_a_message_is_none(site: Site) -> None:
    """A peer that declares more than it sends and goes away leaves nothing behind."""
    peer = site.dial()
    peer.send(whole(b"whole"))
    peer.send(header([1000]) + bytes(999))
    peer.socket.shutdown(socket.SHUT_RDWR)
    far = site.fars[0]
    eventually(lambda: far.messages)
    site.gate.set()
    eventually(lambda: far.losses)
    assert far.messages == [[b"whole"]] and "the connection broke" in str(far.losses[0])
    assert site.works()


def test_who_sends_beyond_its_credit_is_cut(site: Site) -> None:
    """While a message is being received, a window more is taken and not a megabyte beyond."""
    peer = site.dial()
    chunk = whole(bytes(MAX_CHUNK // 2 - 12))
    sent = 0
    try:
        while sent < 10 * window.WINDOW:
            peer.send(chunk)
            sent += len(chunk)
    except ConnectionClosed:
        pass
    assert "more was sent than there was credit for" in end(peer)
    site.gate.set()
    far = site.fars[0]
    eventually(lambda: far.losses)
    assert len(far.messages) * len(chunk) < window.WINDOW + 3 * MAX_CHUNK
    assert site.works()


@pytest.mark.parametrize("site", ["?compress=1"], indirect=True)
def test_a_bomb_does_not_go_off(site: Site) -> None:
    """Where compression is agreed, what is more than a chunk once unpacked is refused in the middle of unpacking."""
    peer = site.dial(compression="deflate")
    peer.send(whole(bytes(1000)))
    eventually(lambda: site.fars[0].messages)
    tracemalloc.start()
    try:
        peer.send(bytes(2**26))
        assert "1009" in end(peer)
        assert tracemalloc.get_traced_memory()[1] < 2**26 + 2**24  # the bomb itself is in here
    finally:
        tracemalloc.stop()
    site.gate.set()
    eventually(lambda: site.fars[0].losses)
    assert "1009" in str(site.fars[0].losses[0]) and len(site.fars[0].messages) == 1
    assert site.works()


def test_answers_that_nobody_reads_do_not_pile_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that pings and reads no pong is cut when too many wait for it."""
    monkeypatch.setattr(connection, "FLOOD", 2**16)
    peer = site.dial()
    site.deafen(peer)
    pings = frame(0x89, b"x" * 125) * 1000
    far = site.fars[0]
    try:
        while not far.losses:
            raw(peer, pings)
    except OSError:
        pass  # the connection was cut
    site.gate.set()
    eventually(lambda: far.losses)
    assert "the connection broke" in str(far.losses[0])  # and not: a write made no progress
    assert site.works()


@pytest.mark.parametrize("notices", [[], ["busy"], ["credit 1", "waiting"], ["credit 999999999999999"]])
def test_who_takes_nothing_does_not_block_for_ever(site: Site, notices: list[str]) -> None:
    """A writer whose peer gives no credit, or gives it and does not read, is told so after stall_seconds."""
    peer = site.dial()
    site.deafen(peer)
    for notice in notices:
        peer.send(notice)
    link = site.fars[0].link
    assert link is not None
    with pytest.raises(TransportError, match=r"a write made no progress for 0\.3 s"):
        link.write([bytes(2**26)])
    with pytest.raises(TransportError, match="a write made no progress"):
        link.write([b"small"])
    site.gate.set()
    assert site.works()


# The parts

frames = st.lists(st.binary(max_size=40), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 60)))
def test_messages_survive_any_cut(messages: list[list[bytes]], sizes: list[int]) -> None:
    """Where the stream is cut into chunks means nothing; what it costs is the same for both sides."""
    stream = b"".join(whole(*message) for message in messages)
    assembly = Assembly(Limits())
    found = []
    while stream:
        size = sizes.pop() if sizes else len(stream)
        found += assembly.feed(stream[:size])
        stream = stream[size:]
    assert [[bytes(content) for content in message.frames] for message in found] == messages
    assert assembly.arrived == sum(message.cost for message in found)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200)))
def test_any_bytes_are_messages_or_refused(stream: list[bytes]) -> None:
    assembly = Assembly(LIMITS)
    try:
        for chunk in stream:
            assembly.feed(chunk)
    except DecodeError:
        pass


def test_a_claim_takes_no_memory() -> None:
    """A message of 4 GiB that has not come is as large as what has."""
    tracemalloc.start()
    try:
        assembly = Assembly(Limits())
        for chunk in (header([2**31, 2**30]), bytes(10_000)):
            assert assembly.feed(chunk) == []
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_large_frames_are_not_copied_to_be_sent() -> None:
    """But for what fills a chunk up, chunks are views of the frames."""
    large = bytes(10 * wire.CHUNK)
    pieces: list[Frame] = [b"head", large, b"", b"tail"]
    cut = list(chunks(pieces))
    assert b"".join(cut) == b"".join(pieces) and all(0 < len(chunk) <= wire.CHUNK for chunk in cut)
    assert sum(isinstance(chunk, memoryview) and chunk.obj is large for chunk in cut) == 9


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3 * window.WINDOW), st.booleans()), max_size=40))
def test_credit_bounds_memory_and_never_runs_dry(steps: list[tuple[int, bool]]) -> None:
    """An honest sender is never cut; at most a message and a window wait; and who has received all lets more come."""
    account = Window(LIMITS)
    credit = account.grant(0, 0, 0)
    arrived = completed = received = 0
    waiting: list[int] = []
    for size, receives in steps:
        left = size
        while left:
            while credit <= 0:
                # Nothing may be sent: then something must be there to be received, or credit would be due.
                assert waiting
                received += waiting.pop(0)
                credit += account.grant(arrived, completed, received)
            part = min(left, wire.CHUNK)
            left -= part
            credit -= part
            arrived += part
            assert not account.exceeded(arrived)
            credit += account.grant(arrived, completed, received)
            assert sum(waiting) == completed - received
            assert sum(waiting) <= max(size, *waiting, 0) + window.WINDOW + wire.CHUNK
        completed += size
        waiting.append(size)
        if receives:
            received += sum(waiting)
            waiting.clear()
            credit += account.grant(arrived, completed, received)
            assert credit > window.WINDOW - window.STEP


class Clock:
    """Looks at a pulse at each of its intervals."""

    def __init__(self, **limits: float) -> None:
        self.now = 100.0
        self.pulse = Pulse(Limits(**limits), self.now)  # type: ignore[arg-type]

    def run(self, seconds: float, waits: bool = False, each: Callable[[], object] = lambda: None) -> str:
        """Let time pass, and return what has killed the link, if anything has."""
        stop = self.now + seconds
        while self.now < stop:
            self.now += self.pulse.interval
            each()
            if said := self.pulse.look(self.now, waits):
                return said
        return ""


def test_silence_is_tested_and_then_fatal() -> None:
    clock = Clock(ping_seconds=10, pong_seconds=10)
    tests: list[float] = []

    def test() -> None:
        if clock.pulse.tests(clock.now):
            tests.append(clock.now)

    said = clock.run(60, each=test)
    assert "no sign of life for 20 s" in said and clock.now == pytest.approx(120, abs=1)
    assert tests[0] == pytest.approx(110, abs=1)
    living = Clock()

    def live() -> None:
        if living.now % 19 < 1:
            living.pulse.heard(living.now)

    assert living.run(1000, each=live) == ""


def test_progress_counts_and_duration_does_not() -> None:
    """A write may take for ever if something moves every few seconds; if nothing does, it is 15 s."""
    clock = Clock()

    def life() -> None:
        clock.pulse.heard(clock.now)
        if clock.now % 14 < 1:
            clock.pulse.moved(clock.now)

    assert clock.run(10_000, waits=True, each=life) == ""
    stalled = Clock()
    said = stalled.run(100, waits=True, each=lambda: stalled.pulse.heard(stalled.now))
    assert said == "a write made no progress for 15 s" and stalled.now == pytest.approx(115, abs=2)
    idle = Clock()
    assert idle.run(1000, each=lambda: idle.pulse.heard(idle.now)) == ""


def test_busy_is_believed_for_ten_minutes() -> None:
    clock = Clock()

    def life() -> None:
        clock.pulse.heard(clock.now)
        if clock.pulse.asks(clock.now):
            clock.pulse.busy(clock.now)

    said = clock.run(10_000, waits=True, each=life)
    assert said == "the receiver of the peer took nothing for 600 s"
    assert clock.now - 100 == pytest.approx(15 * pulse.PATIENCE, abs=2)


def test_who_has_overslept_blames_nobody() -> None:
    """After an hour without the processor the peer gets its full time, and no second hour."""
    clock = Clock()
    clock.run(5)
    clock.now += 3600
    assert clock.run(14) == ""
    assert "no sign of life" in clock.run(10)
