"""Large tensors in chunks: what arrives is what was sent, others pass, and what is wrong is noticed."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

import farpoint
from farpoint.bulk import CHUNK_BYTES, WINDOW_BYTES, Bulk, Stream
from farpoint.errors import DecodeError, FarpointError, LimitError, MalformedMessageError, QuotaError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.tensors import DTYPES

farpoint.TorchHook(torch)


class Pair:
    """Two ends of a session without a link: `carry` takes one packet over."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, admit: Any = lambda _: None) -> None:
        self.near, self.far = Session(b"n", b"f"), Session(b"f", b"n")
        self.out, self.into = Bulk(limits), Bulk(limits, admit)
        self.arrived: list[tuple[list[Any], FarpointError | None]] = []
        self.others: list[list[Any]] = []

    def send(self, tensor: torch.Tensor, **options: Any) -> Stream:
        return self.out.add([int(Kind.PUT), 5, None, False, [], ""], [2], tensor, **options)

    def carry(self, change: Any = lambda message: message) -> bool:
        if not self.out.load(self.near):
            return False
        self.take(self.near.pack(), change)
        return True

    def take(self, packet: Any, change: Any = lambda message: message) -> None:
        for _, message in self.far.receive(packet):
            message = change(message)
            if message[0] == Kind.CHUNK:
                self.into.take_chunk(message)
            elif message[0] == Kind.WHOLE:
                self.arrived.append(self.into.take_whole(message))
            else:
                self.others.append(message)

    def acknowledge(self) -> bool:
        packet = self.far.pack()
        if packet is not None:
            self.near.receive(packet)
        return self.out.settle(self.near)

    def carry_all(self) -> None:
        while self.carry():
            self.acknowledge()
        self.acknowledge()


def some(nbytes: int) -> torch.Tensor:
    return torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bool"])
@pytest.mark.parametrize("shape", [(3 * CHUNK_BYTES // 16,), (2, 5, 70_001), (1, 1, CHUNK_BYTES)])
def test_what_arrives_is_what_was_sent(dtype: str, shape: tuple[int, ...]) -> None:
    pair = Pair()
    numel = torch.Size(shape).numel()
    tensor = some(numel * DTYPES[dtype].itemsize).view(DTYPES[dtype]).view(shape)
    stream = pair.send(tensor)
    pair.carry_all()
    [(message, refusal)] = pair.arrived
    assert refusal is None and stream.done.is_set() and stream.sent == stream.total == tensor.nbytes
    got = message[2]
    assert got.dtype is tensor.dtype and got.shape == tensor.shape and got.is_contiguous()
    assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    got.view(-1).view(torch.uint8).zero_()  # it owns its memory
    assert tensor.view(-1).view(torch.uint8).any()


def test_so_much_is_under_way_and_no_more() -> None:
    pair = Pair()
    pair.send(some(3 * WINDOW_BYTES))
    sent = 0
    while pair.carry():
        sent += 1
    assert sent == WINDOW_BYTES // CHUNK_BYTES and not pair.arrived
    assert pair.acknowledge(), "there is more to send"
    assert pair.carry()


def test_tensors_take_turns_and_others_pass() -> None:
    pair = Pair()
    first, second = pair.send(some(4 * CHUNK_BYTES)), pair.send(some(2 * CHUNK_BYTES))
    order = []
    while pair.carry():
        order.append((first.sent // CHUNK_BYTES, second.sent // CHUNK_BYTES))
        pair.near.submit([int(Kind.FETCH), len(order)])
        pair.take(pair.near.pack())
    assert order == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (4, 2)]
    assert [message[2].numel() for message, _ in pair.arrived] == [2 * CHUNK_BYTES, 4 * CHUNK_BYTES]
    assert len(pair.others) == 6


def test_after_a_lost_link_it_goes_on() -> None:
    pair = Pair()
    tensor = some(3 * CHUNK_BYTES + 1)
    pair.send(tensor)
    pair.carry()
    pair.out.load(pair.near)
    pair.near.pack()  # and is lost
    for packet in pair.near.resume(pair.far.taken):
        pair.take(packet)
    pair.acknowledge()
    pair.carry_all()
    assert torch.equal(pair.arrived[0][0][2], tensor)


def flip(message: list[Any]) -> list[Any]:
    if message[0] == Kind.CHUNK and message[3] == CHUNK_BYTES:
        changed = message[5].clone()
        changed[77] ^= 4
        return [*message[:5], changed]
    return message


def grow(message: list[Any]) -> list[Any]:
    later = message[0] == Kind.CHUNK and message[3] > 0
    return [*message[:4], message[4] + 1, message[5]] if later else message


def replace(position: int, value: Any, kind: Kind = Kind.WHOLE) -> Any:
    return lambda message: [*message[:position], value, *message[position + 1 :]] if message[0] == kind else message


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (flip, DecodeError, "changed on the way"),
        (replace(4, 0), DecodeError, "changed on the way"),
        (replace(1, 9), MalformedMessageError, "one that has arrived"),
        (replace(3, [5]), MalformedMessageError, "shape"),
        (replace(3, [2**40, 2**40]), LimitError, "product"),
        (replace(2, "object"), DecodeError, "dtype"),
        (replace(5, [9]), MalformedMessageError, "path"),
        (replace(5, []), MalformedMessageError, "path"),
        (replace(5, [0, 0]), MalformedMessageError, "path"),
        (replace(5, [9, 0]), MalformedMessageError, "path"),
        (replace(5, [0, 0, 0]), MalformedMessageError, "path"),
        (grow, MalformedMessageError, "offset"),
        (replace(2, "bool"), DecodeError, "other than 0 and 1"),
        (replace(3, 0, Kind.CHUNK), MalformedMessageError, "offset"),
        (replace(4, 5, Kind.CHUNK), MalformedMessageError, "offset|CHUNK"),
        (replace(4, 2**70, Kind.CHUNK), MalformedMessageError, "total"),
        (replace(5, torch.zeros(2, 2), Kind.CHUNK), MalformedMessageError, "bytes"),
        (replace(5, some(5), Kind.CHUNK), MalformedMessageError, "offset"),
    ],
)
def test_what_is_wrong_is_noticed(change: Any, error: type[Exception], text: str) -> None:
    pair = Pair()
    pair.send(some(2 * CHUNK_BYTES + 1))

    def carry() -> None:
        while pair.carry(change):
            pass

    with pytest.raises(error, match=text):
        carry()
    assert not pair.arrived


def test_what_has_not_wholly_arrived_is_not_there() -> None:
    pair = Pair()
    half = some(5)
    pair.into.take_chunk([int(Kind.CHUNK), 1, 0, 0, 10, half])
    with pytest.raises(MalformedMessageError, match="one that has arrived"):
        pair.into.take_whole([int(Kind.WHOLE), 1, "uint8", [10], zlib.crc32(half.numpy().tobytes()), [2], [1, 2, None]])


def test_what_there_is_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def room_for(nbytes: int) -> torch.Tensor:
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp] you tried to allocate {nbytes} bytes")

    monkeypatch.setattr("farpoint.bulk.room_for", room_for)
    pair = Pair()
    pair.send(some(2 * CHUNK_BYTES))
    pair.carry_all()
    [(_, refusal)] = pair.arrived
    assert isinstance(refusal, LimitError) and "there is no memory" in str(refusal)


def test_a_tensor_is_done_when_it_has_arrived_and_its_number_is_told_before() -> None:
    pair = Pair()
    numbers: list[int] = []
    stream = pair.send(some(2 * CHUNK_BYTES), submitted=numbers.append)
    pair.carry()
    assert not numbers
    pair.carry()
    assert numbers == [stream.last] == [3] and not stream.done.is_set()
    pair.out.settle(pair.near)
    assert not stream.done.is_set()
    pair.acknowledge()
    assert stream.done.is_set()


def test_what_there_is_no_room_for_is_refused_before_memory_is_taken() -> None:
    asked = []

    def admit(nbytes: int) -> None:
        asked.append(nbytes)
        if nbytes > 5 * CHUNK_BYTES:
            raise QuotaError("bob", "bytes", 5 * CHUNK_BYTES, str(nbytes))

    pair = Pair(admit=admit)
    pair.send(some(4 * CHUNK_BYTES))
    pair.send(some(2 * CHUNK_BYTES))
    pair.send(some(CHUNK_BYTES + 1))
    pair.carry()
    pair.carry()
    pair.carry()
    # What is refused takes no room.
    assert asked == [4 * CHUNK_BYTES, 6 * CHUNK_BYTES, 5 * CHUNK_BYTES + 1]
    assert [arrival.bytes.numel() for arrival in pair.into._arrivals.values()] == [4 * CHUNK_BYTES, 0, 0]
    pair.carry_all()
    assert sorted(type(refusal).__name__ for _, refusal in pair.arrived) == ["NoneType", "QuotaError", "QuotaError"]
    assert not pair.into._arrivals


def test_a_tensor_larger_than_a_message_may_be_is_refused() -> None:
    pair = Pair(Limits(message_bytes=CHUNK_BYTES))
    pair.send(some(2 * CHUNK_BYTES))
    pair.carry_all()
    assert isinstance(pair.arrived[0][1], LimitError)


def test_no_more_is_under_way_than_the_other_side_takes() -> None:
    pair = Pair(Limits(transfers=2))
    for _ in range(3):
        pair.send(some(2 * CHUNK_BYTES))
    order = []
    while pair.carry():
        order.append(len(pair.into._arrivals))
    assert order == [1, 2, 1, 0, 1, 0] and len(pair.arrived) == 3


def test_there_are_only_so_many_at_a_time() -> None:
    pair = Pair(Limits(transfers=2))
    pair.out.at_once = 3  # it does not know what the other side takes
    for _ in range(3):
        pair.send(some(2 * CHUNK_BYTES))
    pair.carry()
    pair.carry()
    with pytest.raises(LimitError, match="transfers"):
        pair.carry()


def test_what_is_taken_back_leaves_nothing() -> None:
    pair = Pair()
    stream, kept = pair.send(some(3 * CHUNK_BYTES)), pair.send(some(2 * CHUNK_BYTES))
    pair.carry()
    pair.out.cancel(stream, pair.near)
    assert stream.done.is_set() and pair.near.waiting == 1
    never = pair.send(some(CHUNK_BYTES))
    pair.out.cancel(never, pair.near)
    assert never.done.is_set() and pair.near.waiting == 1, "nobody needs to hear of what has not begun"
    pair.carry_all()
    assert not pair.into._arrivals and kept.done.is_set() and len(pair.arrived) == 1


def test_progress_is_that_of_the_command_that_is_answered() -> None:
    pair = Pair()
    pair.send(some(4 * CHUNK_BYTES), about=7)
    assert pair.into.progress(7) == (0, 0)
    pair.carry()
    assert pair.into.progress(7) == (CHUNK_BYTES, 4 * CHUNK_BYTES) and pair.into.progress(8) == (0, 0)


def test_the_end_of_a_session_is_the_end_of_what_waits() -> None:
    pair = Pair()
    streams = [pair.send(some(CHUNK_BYTES)), pair.send(some(9 * CHUNK_BYTES))]
    pair.carry()
    pair.out.end()
    assert all(stream.done.is_set() for stream in streams) and not pair.out.waiting
    pair.send(some(2 * CHUNK_BYTES))
    pair.carry()
    assert pair.into._arrivals
    pair.into.end()
    assert not pair.into._arrivals
