"""What hostile bytes get from the transports over sockets: at a listener, on a link, and from a server that lies."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farpoint.access import Credentials
from farpoint.errors import DecodeError, LimitError, TransportError
from farpoint.limits import Limits
from farpoint.serializer import Frame
from farpoint.testing.transport import PATIENCE, Recorder, eventually
from farpoint_tcp.framing import (
    ANSWER_MAGIC,
    FRAME_COST,
    MAGIC,
    TEXT_BYTES,
    Answer,
    Assembler,
    Signal,
    answer,
    encode,
    greeting,
)
from farpoint_tcp.framing import signal as signal_bytes
from farpoint_tcp.link import PING, StreamLink
from farpoint_tcp.transport import TcpTransport
from tcp_stage import KINDS, MEBI, Pair, Stage, TrustingTls, ends, nothing_is_left, transport

__all__ = ["nothing_is_left", "transport"]  # fixtures


# What hostile bytes get: before the greeting.

STRANGERS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "garbage": bytes(range(256)) * 16,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "another magic": b"farpoint\r\n\r\r" + bytes(100),
    "a long token": MAGIC + b"\x01\xff\xff" + bytes(65535),
    "no version": MAGIC,
    "half a token": MAGIC + b"\x01\x10\x00" + b"abc",
    "nothing": b"",
}


def tell(sock: socket.socket, said: bytes) -> None:
    try:
        sock.sendall(said)
    except OSError:
        pass  # the other side has heard enough


def end_writing(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side was first


@pytest.mark.parametrize("said", STRANGERS)
def test_strangers_are_turned_away(transport: TcpTransport, said: str) -> None:
    stage = Stage(transport, limits=Limits(links_per_address=2))
    for _ in range(4):
        with stage.raw() as stranger:
            tell(stranger, STRANGERS[said])
            if not isinstance(stranger, ssl.SSLSocket):
                end_writing(stranger)
                assert ends(stranger) == b""
        eventually(lambda: not stage.listener._door._inside)  # type: ignore[attr-defined]
    assert not stage.arrived
    stage.welcomed().close()


def test_another_version_is_told(transport: TcpTransport) -> None:
    stage = Stage(transport)
    with stage.raw() as sock:
        sock.sendall(MAGIC + b"\x07\x00\x00")
        assert ends(sock) == answer(Answer.OTHER_VERSION)
    assert not stage.arrived


@pytest.mark.parametrize("kind", ["tcp", "unix"])  # a handshake of TLS alone may take longer on a busy machine
def test_nobody_keeps_a_listener_waiting(kind: str) -> None:
    stage = Stage(KINDS[kind](), limits=Limits(open_seconds=0.3))
    idle = [stage.raw() for _ in range(20)]
    for number, sock in enumerate(idle[10:]):
        sock.sendall(greeting(bytes(20))[: number + 1])
    for sock in idle:
        assert ends(sock) == b""
        sock.close()
    assert not stage.arrived


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_byte_now_and_then_does_not_keep_the_door_open(kind: str) -> None:
    stage = Stage(KINDS[kind](), limits=Limits(open_seconds=0.3))
    sent = 0
    with stage.raw() as sock:
        said = greeting(bytes(4096))
        try:
            for sent in range(len(said)):
                sock.sendall(said[sent : sent + 1])
                if select.select([sock], [], [], 0.02)[0]:
                    break
        except (ConnectionError, ssl.SSLError):
            pass
    assert sent < len(said) - 1 and not stage.arrived


def test_tls_that_does_not_begin_is_given_up() -> None:
    stage = Stage(TrustingTls(), limits=Limits(open_seconds=0.3))
    port = int(stage.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        assert ends(sock) == b""
    assert not stage.arrived


# ... and behind it.

HOSTILE: dict[str, tuple[bytes, type[Exception], str]] = {
    "too many frames": (struct.pack("<I", 2**32 - 1), LimitError, "tensors=4"),
    "one frame too many": (struct.pack("<I", 6), LimitError, "tensors=4"),
    "a huge frame": (struct.pack("<IQ", 1, 2**64 - 1), LimitError, "message_bytes=10000"),
    "a byte too many": (struct.pack("<IQ", 1, 10_101), LimitError, "message_bytes=10000"),
    "sizes that overflow": (struct.pack("<IQQ", 2, 2**63, 2**63), LimitError, "message_bytes=10000"),
    "a whole message too large": (struct.pack("<IQ", 1, 20_000) + bytes(20_000), LimitError, "message_bytes"),
    "a signal of no kind": (struct.pack("<IBH", 0, 9, 0), DecodeError, "signal 9"),
    "a ping with a text": (struct.pack("<IBH", 0, 1, 5) + b"hello", DecodeError, "kind 1"),
    "a long goodbye": (struct.pack("<IBH", 0, 3, TEXT_BYTES + 1), DecodeError, "kind 3"),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_messages_end_the_link(transport: TcpTransport, said: str) -> None:
    stage = Stage(transport, limits=Limits(tensors=4, message_bytes=10_000, header_bytes=100))
    with stage.welcomed() as peer:
        peer.sendall(struct.pack("<IQ", 1, 2) + b"ok")
        data, kind, text = HOSTILE[said]
        peer.sendall(data)
        told = ends(peer)
        assert text.encode() in told and told.startswith(struct.pack("<IB", 0, Signal.GOODBYE))
        link, recorder = stage.arrived[0]
        eventually(lambda: recorder.losses)
        (cause,) = recorder.losses
        assert type(cause) is kind and text in str(cause)
        assert recorder.messages == [[b"ok"]] and not recorder.late
        with pytest.raises(TransportError):
            link.write([b"x"])


TRUNCATED = {
    "nothing": b"",
    "half a count": b"\x01\x00",
    "half a size": struct.pack("<I", 2) + bytes(11),
    "a small message": struct.pack("<IQ", 1, 100) + bytes(99),
    "a large message": struct.pack("<IQ", 1, 3 * MEBI) + bytes(2 * MEBI),
    "half a signal": struct.pack("<IB", 0, 3),
    "half a goodbye": struct.pack("<IBH", 0, 3, 10) + b"good",
}


@pytest.mark.parametrize("said", TRUNCATED)
def test_what_is_cut_off_is_not_delivered(transport: TcpTransport, said: str) -> None:
    stage = Stage(transport)
    with stage.welcomed() as peer:
        peer.sendall(struct.pack("<IQ", 1, 2) + b"ok" + TRUNCATED[said])
    _, recorder = stage.arrived[0]
    eventually(lambda: recorder.losses)
    assert recorder.messages == [[b"ok"]]
    assert isinstance(recorder.losses[0], TransportError) and "without a goodbye" in str(recorder.losses[0])


def test_a_size_that_never_comes_costs_little() -> None:
    stage = Stage(TcpTransport())
    peers = [stage.welcomed() for _ in range(16)]
    eventually(lambda: len(stage.arrived) == 16)
    before = _resident()
    for peer in peers:
        peer.sendall(struct.pack("<IQ", 1, 4 * 2**30) + bytes(1000))
    for link, _ in stage.arrived:
        assert isinstance(link, StreamLink)
        eventually(partial(_midway, link))
    assert _resident() - before < 16 * 4 * MEBI
    for peer in peers:
        peer.close()


def _midway(link: StreamLink) -> bool:
    return link._inbound._body is not None


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_goodbye_with_a_reason_is_the_cause(transport: TcpTransport) -> None:
    stage = Stage(transport)
    with stage.welcomed() as peer:
        peer.sendall(struct.pack("<IQ", 1, 2) + b"ok" + signal_bytes(Signal.GOODBYE, "enough\x1b[31m"))
        _, recorder = stage.arrived[0]
        eventually(lambda: recorder.losses)
    assert "the peer has ended the link: enough [31m" in str(recorder.losses[0])
    assert recorder.messages == [[b"ok"]]


def test_the_side_that_wrote_too_much_is_told(transport: TcpTransport) -> None:
    pair = Pair(transport, far_limits=Limits(message_bytes=MEBI))
    with pytest.raises(TransportError):
        pair.near_link.write([bytes(512 * MEBI)])
    eventually(lambda: pair.near.losses and pair.far.losses)
    assert isinstance(pair.far.losses[0], LimitError)
    assert "message_bytes=1048576" in str(pair.near.losses[0])
    assert not pair.far.messages


SIZES = st.sampled_from([0, 1, 7, 100, 4_000, 16_300, 16_384, 40_000, 70_000])


@settings(max_examples=50, deadline=None)
@given(
    messages=st.lists(st.lists(SIZES, min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.one_of(st.integers(1, 30), st.integers(1000, 60_000)), min_size=1, max_size=10),
)
def test_messages_are_the_same_however_they_are_cut(messages: list[list[int]], cuts: list[int]) -> None:
    pattern = bytes(range(251)) * 400
    sent = [[pattern[size % 7 + place :][:size] for place, size in enumerate(sizes)] for sizes in messages]
    wire = b"".join(bytes(buffer) for message in sent for buffer in [PING, *encode(message)])
    assembler = Assembler(Limits())
    got, at, turn = [], 0, 0
    while at < len(wire):
        space = assembler.space()
        assert len(space)
        count = min(len(space), cuts[turn % len(cuts)], len(wire) - at)
        space[:count] = wire[at : at + count]
        assembler.advance(count)
        at, turn = at + count, turn + 1
        while assembler.ready:
            frames, cost = assembler.ready.popleft()
            got.append([bytes(frame) for frame in frames])
            assert cost == sum(map(len, frames)) + FRAME_COST * len(frames)
    assert got == sent and assembler._body is None and assembler.pinged == bool(sent)


PIECES = [
    struct.pack("<I", 0),
    bytes(8),
    struct.pack("<IQ", 1, 110) + bytes(110),
    struct.pack("<IQ", 1, 111) + bytes(111),
    struct.pack("<IQQ", 2, 60, 51) + bytes(111),
    struct.pack("<I4Q", 4, 1, 0, 2, 0) + bytes(3),
    struct.pack("<I5Q", 5, 1, 0, 2, 0, 0) + bytes(3),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(PIECES))))
def test_random_bytes_are_messages_or_refused(pieces: list[bytes]) -> None:
    limits = Limits(tensors=3, message_bytes=100, header_bytes=10)
    assembler = Assembler(limits)
    try:
        for piece in pieces:
            at = 0
            while at < len(piece) and assembler.goodbye is None:
                space = assembler.space()
                count = min(len(space), len(piece) - at)
                space[:count] = piece[at : at + count]
                assembler.advance(count)
                at += count
    except DecodeError:
        pass
    for frames, _ in assembler.ready:
        assert 1 <= len(frames) <= 4 and sum(map(len, frames)) <= 110


def test_more_frames_than_the_stage_holds_sizes_of() -> None:
    frames: list[Frame] = [b"%d" % number for number in range(20_000)]
    wire = b"".join(bytes(buffer) for buffer in encode(frames))
    assembler = Assembler(Limits(tensors=20_000))
    at = 0
    while at < len(wire):
        space = assembler.space()
        count = min(len(space), len(wire) - at)
        space[:count] = wire[at : at + count]
        assembler.advance(count)
        at += count
    ((got, _),) = assembler.ready
    assert [bytes(frame) for frame in got] == frames


class Liar:
    """A server that answers with given bytes to whatever comes, then waits for the caller to hang up."""

    def __init__(self, said: bytes = b"", *, hangs_up: bool = True, drip: bool = False) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._said, self._hangs_up, self._drip = said, hangs_up, drip
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sock, _ = self._listening.accept()
        with sock, self._listening:
            sock.settimeout(PATIENCE)
            sock.recv(65536)
            try:
                for piece in [bytes([byte]) for byte in self._said] if self._drip else [self._said]:
                    sock.sendall(piece)
                    if self._drip and select.select([sock], [], [], 0.1)[0]:
                        return
                if not self._hangs_up:
                    ends(sock)
            except OSError:
                pass

    def close(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


# What a lying server gets.

LIARS: dict[str, tuple[bytes, str]] = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "ws://"),
    "HTML": (b"<!DOCTYPE HTML>\n<html>", "ws://"),
    "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0"),
    "TLS": (b"\x15\x03\x03\x00\x02\x02\x46", "tls://"),
    "nothing": (b"", "hangs up without a word"),
    "half an answer": (ANSWER_MAGIC, "no farpoint listener"),
    "another version": (ANSWER_MAGIC + b"\x09\x00", "another version"),
    "an unknown answer": (ANSWER_MAGIC + b"\x01\x63", "another version"),
    "an echo": (greeting(b""), "no farpoint listener"),
    "a refusal": (answer(Answer.NOT_LET_IN), "Credentials"),
}


@pytest.mark.parametrize("who", LIARS)
def test_who_is_no_listener_is_named(who: str) -> None:
    said, text = LIARS[who]
    liar = Liar(said)
    receiver = Recorder()
    with pytest.raises(TransportError, match=text) as caught:
        TcpTransport().connect(liar.url, receiver)
    assert caught.value.url == liar.url and not receiver.losses
    liar.close()


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_does_not_greet_is_given_up(drip: bool) -> None:
    liar = Liar(answer(Answer.WELCOME) if drip else b"", hangs_up=False, drip=drip)
    with pytest.raises(TransportError, match=r"did not greet within 0.3 s") as caught:
        TcpTransport().connect(liar.url, Recorder(), Credentials(limits=Limits(open_seconds=0.3)))
    assert "ws://" in caught.value.cause
    liar.close()


def test_a_server_that_welcomes_and_lies_ends_the_link() -> None:
    liar = Liar(answer(Answer.WELCOME) + struct.pack("<IQ", 1, 2**63), hangs_up=False)
    receiver = Recorder()
    TcpTransport().connect(liar.url, receiver)
    eventually(lambda: receiver.losses)
    assert isinstance(receiver.losses[0], LimitError) and not receiver.messages
    liar.close()


