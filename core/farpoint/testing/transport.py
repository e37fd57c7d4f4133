"""The contract of transports: subclass it, give one fixture, run pytest."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

import pytest

from farpoint.errors import TransportError
from farpoint.serializer import Frame
from farpoint.testing.contract import Contract
from farpoint.transport import Link, Listener, Transport

PATIENCE = 10.0
"""Seconds to wait for what a transport promises."""


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, and fail if it does not within `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what was promised did not happen"
        time.sleep(0.001)


class Recorder:
    """A receiver that keeps copies of what it is told.

    Args:
        react: Called with each message while it is being received.
    """

    def __init__(self, react: Callable[[list[bytes]], object] = lambda _: None) -> None:
        self.messages: list[list[bytes]] = []
        self.losses: list[Exception | None] = []
        self.late = 0
        self.link: Link | None = None
        self._react = react

    def received(self, frames: Sequence[Frame]) -> None:
        """Keep one message."""
        self.late += bool(self.losses)
        message = [bytes(frame) for frame in frames]
        self.messages.append(message)
        self._react(message)

    def lost(self, cause: Exception | None) -> None:
        """Keep the cause."""
        self.losses.append(cause)


def join(transport: Transport, url: str, near: Recorder, far: Recorder) -> tuple[Link, Link]:
    """Return both ends of a new link; nobody can arrive at `url` any more."""

    def accept(link: Link) -> Recorder:
        far.link = link
        return far

    listener = transport.listen(url, accept)
    near.link = transport.connect(listener.url, near)
    eventually(lambda: far.link)
    listener.close()
    assert far.link is not None
    return near.link, far.link


class TransportContract(Contract):
    """Every guarantee of `farpoint.transport`, one test for each.

    Give a fixture `transport` that returns the transport::

        from farpoint.plugins import plugins
        from farpoint.testing import TransportContract

        class TestPigeon(TransportContract):
            @pytest.fixture
            def transport(self):
                return plugins.transport("pigeon://")

    Override the fixture `url` to listen at other places than `Transport.local_url` names. The tests themselves
    cannot be overridden.
    """

    @pytest.fixture
    def transport(self) -> Transport:
        """Return the transport to test."""
        raise NotImplementedError("give a fixture `transport` that returns the transport to test")

    @pytest.fixture
    def url(self, transport: Transport) -> str:
        """Return a URL where nobody listens."""
        return transport.local_url(f"worker-{uuid.uuid4()}")

    def test_messages_arrive_whole(self, transport: Transport, url: str) -> None:
        """Any number of frames of any size and type arrives as it was written, in both directions."""
        near, far = Recorder(), Recorder()
        ends = join(transport, url, near, far)
        sent: list[list[Frame]] = [
            [b""],
            [b"", b"", b""],
            [b"one"],
            [b"a", b"", b"bc"],
            [bytearray(b"array"), memoryview(b"view")[1:]],
            [bytes([number % 256]) * number for number in range(300)],
            [b"x" * size for size in (125, 126, 127, 65535, 65536)],
        ]
        for end, other in zip(ends, (far, near), strict=True):
            for message in sent:
                end.write(message)
            eventually(partial(_holds, other, len(sent)))
            assert other.messages == [[bytes(frame) for frame in message] for message in sent]
        ends[0].close()

    def test_big_frames_arrive(self, transport: Transport, url: str) -> None:
        """A frame of 8 MiB arrives with its neighbours."""
        near, far = Recorder(), Recorder()
        link, _ = join(transport, url, near, far)
        big = bytes(range(256)) * 2**15
        link.write([b"before", big, b"after"])
        eventually(lambda: far.messages)
        assert far.messages == [[b"before", big, b"after"]]
        link.close()

    def test_many_messages_keep_their_order(self, transport: Transport, url: str) -> None:
        """Messages of several threads, in both directions at once: each exactly once, each thread's in order."""
        near, far = Recorder(), Recorder()
        ends = join(transport, url, near, far)

        def write(link: Link, lane: int) -> None:
            for number in range(500):
                link.write([b"%d" % lane, b"%d" % number])

        threads = [
            threading.Thread(target=write, args=(link, lane), daemon=True)
            for link in ends
            for lane in range(3)
        ]
        for thread in threads:
            thread.start()
        for recorder in (near, far):
            eventually(partial(_holds, recorder, 1500))
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for recorder in (near, far):
            assert len(recorder.messages) == 1500
            for lane in range(3):
                numbers = [int(number) for whose, number in recorder.messages if int(whose) == lane]
                assert numbers == list(range(500))
        ends[0].close()

    def test_messages_come_one_at_a_time(self, transport: Transport, url: str) -> None:
        """No message is received while another is, on this thread or another."""
        inside, overlaps = [0], [0]

        def react(_: list[bytes]) -> None:
            inside[0] += 1
            overlaps[0] += inside[0] > 1
            time.sleep(0.001)
            inside[0] -= 1

        far = Recorder(react)
        link, _ = join(transport, url, Recorder(), far)
        threads = [
            threading.Thread(target=lambda: [link.write([b"x"]) for _ in range(20)], daemon=True)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: len(far.messages) == 80)
        assert not overlaps[0]
        link.close()

    def test_receivers_may_write(self, transport: Transport, url: str) -> None:
        """Two receivers that answer each other from within `received` do so for as long as they like."""

        def answer(message: list[bytes], end: Callable[[], Recorder]) -> None:
            link = end().link
            if message != [b"0"] and link is not None:
                link.write([b"%d" % (int(message[0]) - 1)])

        near = Recorder(lambda message: answer(message, lambda: near))
        far = Recorder(lambda message: answer(message, lambda: far))
        link, _ = join(transport, url, near, far)
        link.write([b"2001"])
        eventually(lambda: [b"0"] in near.messages + far.messages)
        assert far.messages == [[b"%d" % number] for number in range(2001, 0, -2)]
        assert near.messages == [[b"%d" % number] for number in range(2000, -1, -2)]
        link.close()

    def test_frames_may_be_reused(self, transport: Transport, url: str) -> None:
        """What a writer does to its memory after `write` changes no message, also one that has to wait."""
        gate = threading.Event()

        def hold(_: list[bytes]) -> None:
            gate.wait(PATIENCE)

        far = Recorder(hold)
        link, _ = join(transport, url, Recorder(), far)
        # The first writer may have to wait for its receiver, so it is a thread of its own.
        first = threading.Thread(target=link.write, args=([b"first"],), daemon=True)
        first.start()
        eventually(lambda: far.messages)
        memory = bytearray(1000)
        for number in range(10):
            memory[:] = bytes([number]) * 1000
            link.write([memory, memoryview(memory)[:10]])
        memory[:] = b"\xff" * 1000
        gate.set()
        eventually(lambda: len(far.messages) == 11)
        assert far.messages[1:] == [[bytes([number]) * 1000, bytes([number]) * 10] for number in range(10)]
        first.join(PATIENCE)
        link.close()

    @pytest.mark.parametrize("end", [0, 1])
    def test_close_delivers_and_tells_both_once(self, transport: Transport, url: str, end: int) -> None:
        """`close` of either end delivers what was written there, tells each side once, and ends writing."""
        near, far = Recorder(), Recorder()
        ends = join(transport, url, near, far)
        for number in range(50):
            ends[end].write([b"%d" % number, bytes(10_000)])
        for _ in range(3):
            ends[end].close()
        eventually(lambda: near.losses and far.losses)
        ends[1 - end].close()
        time.sleep(0.02)
        assert near.losses == far.losses == [None] and near.late == far.late == 0
        assert [int(frames[0]) for frames in (far, near)[end].messages] == list(range(50))
        for link in ends:
            with pytest.raises(TransportError):
                link.write([b"late"])

    def test_receivers_may_close(self, transport: Transport, url: str) -> None:
        """`close` from within `received` ends the link, after that message."""
        far = Recorder(lambda _: far.link.close() if far.link else None)
        near = Recorder()
        link, _ = join(transport, url, near, far)
        link.write([b"goodbye"])
        eventually(lambda: near.losses and far.losses)
        assert far.messages == [[b"goodbye"]] and near.losses == far.losses == [None]
        assert near.late == far.late == 0

    def test_nobody_listens(self, transport: Transport, url: str) -> None:
        """A link to nobody is refused."""
        with pytest.raises(TransportError):
            transport.connect(url, Recorder())

    def test_a_place_is_taken_once(self, transport: Transport, url: str) -> None:
        """A second listener is refused until the first is closed."""
        listener = transport.listen(url, lambda _: Recorder())
        with pytest.raises(TransportError):
            transport.listen(listener.url, lambda _: Recorder())
        listener.close()
        again = transport.listen(listener.url, lambda _: Recorder())
        listener.close()
        transport.connect(again.url, Recorder()).close()
        again.close()

    @pytest.mark.parametrize("name", ["alice", "a_long.name:with#every-sign:" + "0123456789" * 3])
    def test_local_urls_are_free(self, transport: Transport, name: str) -> None:
        """Whoever asks for a place gets one that is free, also under a name that listens already."""
        places: list[tuple[Recorder, Listener]] = []
        for _ in range(3):
            place = transport.local_url(name)
            assert urlsplit(place).scheme in transport.schemes
            with pytest.raises(TransportError):
                transport.connect(place, Recorder())
            far = Recorder()
            places.append((far, transport.listen(place, partial(_known, far))))
        assert len({listener.url for _, listener in places}) == 3
        for number, (_, listener) in enumerate(places):
            link = transport.connect(listener.url, Recorder())
            link.write([b"%d" % number])
            link.close()
        eventually(lambda: all(far.losses for far, _ in places))
        for number, (far, listener) in enumerate(places):
            assert far.messages == [[b"%d" % number]]
            listener.close()

    def test_a_closed_listener_keeps_its_links(self, transport: Transport, url: str) -> None:
        """No new link arrives, and the old ones work."""
        far = Recorder()
        listener = transport.listen(url, lambda _: far)
        link = transport.connect(listener.url, Recorder())
        listener.close()
        listener.close()
        with pytest.raises(TransportError):
            transport.connect(listener.url, Recorder())
        link.write([b"still here"])
        eventually(lambda: far.messages == [[b"still here"]])
        link.close()

    def test_many_links_are_separate(self, transport: Transport, url: str) -> None:
        """Each link has its own receivers; closing one leaves the others."""
        arrived: list[Recorder] = []

        def accept(_: Link) -> Recorder:
            arrived.append(Recorder())
            return arrived[-1]

        listener = transport.listen(url, accept)
        nears = [Recorder() for _ in range(30)]
        links = [transport.connect(listener.url, near) for near in nears]
        for number, link in enumerate(links):
            link.write([b"%d" % number])
        eventually(lambda: sum(len(far.messages) for far in arrived) == 30)
        assert sorted(int(far.messages[0][0]) for far in arrived) == list(range(30))
        links[0].close()
        eventually(lambda: nears[0].losses)
        for link in links[1:]:
            link.write([b"more"])
        eventually(lambda: sum(len(far.messages) for far in arrived) == 59)
        assert not any(near.losses for near in nears[1:])
        for link in links:
            link.close()
        listener.close()


def _known(recorder: Recorder, link: Link) -> Recorder:
    return recorder


def _holds(recorder: Recorder, count: int) -> bool:
    return len(recorder.messages) >= count
