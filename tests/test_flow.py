"""Back-pressure: what is under way is bounded, whoever may wait does, and nobody waits for somebody who waits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import farpoint
from farpoint import RemoteWorker, VirtualWorker
from farpoint.channel import Channel
from farpoint.errors import WorkerLostError
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.worker import Worker
from wire import LateTransport, RawClient, check_books, error_of, late_links

farpoint.TorchHook(torch)
names = itertools.count()
WINDOW = 16
SMALL = Limits(commands_in_flight=WINDOW)


class Place(RemoteWorker):
    """A worker of this process with limits of its own."""

    def __init__(self, name: str, transport: str, limits: Limits = SMALL) -> None:
        name = f"{name}-{next(names)}"
        self.worker = Worker(name, f"{transport}://{name}", ["msgpack"], limits=limits)
        super().__init__(name, self.worker.url)

    def close(self) -> None:
        super().close()
        self.worker.close()


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return how many messages any session has ever had under way."""
    found = {"under way": 0, "kept": 0}
    submit = Session.submit

    def counted(self: Session, message: list[Any]) -> int:
        number = submit(self, message)
        found["under way"] = max(found["under way"], number - self.acknowledged)
        found["kept"] = max(found["kept"], len(self._waiting) + sum(len(packet[3]) for packet in self._packed))
        return number

    monkeypatch.setattr(Session, "submit", counted)
    return found


@pytest.fixture(params=["virtual", "late"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with late_links():
        yield request.param


def at(value: torch.Tensor, *places: Any) -> Any:
    """Return a pointer to a value at the end of a chain: the data is at the first of these places."""
    for place in places:
        value = farpoint.send(value, place)
    return value


def home(pointer: Any) -> torch.Tensor:
    while isinstance(pointer, farpoint.PointerTensor):
        pointer = pointer.get()
    tensor: torch.Tensor = pointer
    return tensor


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_busy_client_keeps_to_the_window(transport: str, hops: int, most: dict[str, int]) -> None:
    places = [Place(name, transport) for name in ("bob", "alice", "carol")]
    p = at(torch.zeros(2), *places[:hops])
    for _ in range(20 * WINDOW):
        p.add_(1)
    assert home(p).tolist() == [20 * WINDOW] * 2
    # A SYNC, a template and a release may come on top of it.
    assert WINDOW // 2 < most["under way"] <= WINDOW + 4
    assert most["kept"] <= 2 * WINDOW + 4
    for place in places:
        place.close()


def test_sending_is_bounded_too(transport: str, most: dict[str, int]) -> None:
    bob, alice = Place("bob", transport), Place("alice", transport)
    kept = [at(torch.full((1,), float(i)), bob) for i in range(5 * WINDOW)]
    twice = [p.send(alice) for p in kept]
    assert [home(p).item() for p in twice] == list(range(5 * WINDOW))
    assert most["under way"] <= WINDOW + 4
    bob.close()
    alice.close()


def test_a_client_obeys_the_window_of_the_worker() -> None:
    bob = Place("bob", "virtual", Limits(commands_in_flight=10, templates=3))
    assert (bob.peer.limits.commands_in_flight, bob.peer.limits.templates) == (10, 3)
    p = at(torch.ones(3), bob)
    results = [home(f(p)).tolist() for f in (torch.neg, torch.exp, torch.abs, torch.sin, torch.neg)]
    assert results[0] == results[-1] == [-1, -1, -1]
    assert max(slot for guest in bob.worker.guests.values() for slot in guest.templates) == 2
    bob.close()


def test_a_worker_acknowledges_when_it_has_nothing_else_to_say() -> None:
    bob = Place("bob", "virtual")
    p = at(torch.ones(3), bob)
    bob.flush()
    session = bob.peer.channel.session
    assert session.acknowledged == session.submitted > 0
    assert not session._packed
    del p
    bob.close()


def test_a_client_acknowledges_large_answers_at_once_and_small_ones_soon() -> None:
    bob = Place("bob", "virtual", Limits())
    (guest,) = bob.worker.guests.values()
    large = at(torch.ones(100_000), bob)
    large.get(keep=True)
    assert not guest.channel.session._packed, "the worker keeps what it has answered until it hears that it came"
    small = at(torch.ones(2), bob)
    for _ in range(300):
        bob.peer.ask([int(Kind.FETCH), small._reference.id])
    bob.flush()
    assert sum(len(packet[3]) for packet in guest.channel.session._packed) <= 128
    bob.close()


def test_nothing_is_written_while_a_worker_is_locked(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Place(name, transport) for name in ("bob", "alice")]
    flush = Channel.flush
    violations: list[str] = []

    def checked(self: Channel) -> None:
        if self.lane is not None:
            violations.extend(place.id for place in places if place.worker.lock._is_owned())  # type: ignore[attr-defined]
        flush(self)

    monkeypatch.setattr(Channel, "flush", checked)
    bob, alice = places
    p, back = at(torch.zeros(2), bob, alice), at(torch.zeros(2), alice, bob)
    for _ in range(3 * WINDOW):
        p, back = p + 1, back + 1
    view: Any = p[0]
    view.remote_get()
    assert home(p).tolist() == home(back).tolist() == [3 * WINDOW] * 2
    assert violations == []
    for place in places:
        place.close()


def test_two_workers_that_command_each_other_never_wait_for_each_other(transport: str) -> None:
    bob, alice = Place("bob", transport), Place("alice", transport)
    failures: list[BaseException] = []

    def work(first: Place, second: Place) -> None:
        try:
            p = at(torch.zeros(2), first, second)
            for _ in range(10 * WINDOW):
                p = p + 1
            assert home(p).tolist() == [10 * WINDOW] * 2
        except BaseException as error:  # noqa: BLE001  # told below, on the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in ((bob, alice), (alice, bob)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    bob.close()
    alice.close()


class TestMiddle:
    """A worker that passes on what a client, who does not wait, sends for another one, who takes nothing."""

    @pytest.fixture
    def late(self) -> Iterator[LateTransport]:
        with late_links() as late:
            yield late

    def test_overload_is_refused(self, late: LateTransport) -> None:
        bob, alice = Place("bob", "late"), Place("alice", "virtual")
        alice.worker.urls[bob.id] = bob.url
        p = at(torch.zeros(2), bob)
        bob.synchronize()
        mallory = RawClient(alice.url)
        mallory.say([int(Kind.LINK), 7, bob.id, bob.url, p._reference.id, p._spec.to_wire(), [], "", ""])
        (peer,) = alice.worker.peers.values()
        peer.wait(peer.ask([int(Kind.SYNC), [], []]))
        late.held_back = lambda url: url == bob.url
        mallory.say([int(Kind.DEFINE), 0, "aten::add_.Tensor", [["t"], ["s"]], {}])
        refused = 0
        for _ in range(10 * WINDOW):
            (number,) = mallory.say([int(Kind.RUN), 0, [7, 1], [0]])
            if number in mallory.answers:
                kind, failure = mallory.answers[number]
                assert (kind, error_of(failure)) == (Kind.FAILURE, "LimitError")
                assert bob.id in failure["text"]
                refused += 1
        taken = 10 * WINDOW - refused
        assert taken <= 2 * WINDOW
        session = peer.channel.session
        assert session.submitted - session.acknowledged <= 2 * WINDOW + 2

        honest = at(torch.ones(2), alice)
        assert (honest + honest).get().tolist() == [2, 2], "others do not notice"

        late.held_back = lambda _: False
        late.wake()
        (peer_session,) = [guest.channel.session for guest in bob.worker.guests.values() if guest.name == alice.id]
        peer.wait(peer.ask([int(Kind.SYNC), [], []]))
        assert p.get().tolist() == [taken] * 2
        assert not peer_session.owed
        for place in (alice, bob):
            check_books(place.worker)
            place.close()

    def test_whoever_waits_is_told_when_the_other_worker_is_lost(self, late: LateTransport) -> None:
        bob, alice = Place("bob", "late"), Place("alice", "virtual")
        p = at(torch.zeros(2), bob, alice)
        alice.synchronize()
        late.held_back = lambda url: url == bob.url
        waiting = [
            alice.peer.ask([int(Kind.FETCH), p._reference.id]),
            alice.peer.ask([int(Kind.SYNC), [], []]),
            alice.peer.ask([int(Kind.DESCRIBE), [p._reference.id]]),
            alice.peer.ask([int(Kind.MOVE), p._reference.id, 1, alice.id, alice.url, 0, 0, False, ""]),
        ]
        alice.flush()
        (peer,) = alice.worker.peers.values()
        peer.close()
        late.held_back = lambda _: False
        late.wake()
        fetch, sync, describe, move = waiting
        assert alice.peer.wait(sync, 10) is True, "a SYNC does not wait for the dead"
        for reply in (fetch, describe, move):
            with pytest.raises(WorkerLostError):
                alice.peer.wait(reply, 10)
        with pytest.raises(WorkerLostError, match="cannot be reached"):
            (p + 1).get()
        check_books(alice.worker)
        alice.close()
        bob.close()


def test_a_worker_that_never_greets_stops_nobody_else() -> None:
    with late_links() as late:
        bob, alice = VirtualWorker(id=f"bob-{next(names)}", transport="late"), Place("alice", "virtual")
        p = at(torch.zeros(2), bob)
        bob.synchronize()
        late.held_back = lambda url: url == bob.url
        mallory = RawClient(alice.url)
        mallory.say([int(Kind.LINK), 7, bob.id, bob.url, p._reference.id, p._spec.to_wire(), [], "", ""])
        honest = at(torch.ones(2), alice)
        assert (honest + honest).get().tolist() == [2, 2]
        synchronized = alice.peer.ask([int(Kind.SYNC), [], []])
        alice.flush()
        assert synchronized.done.is_set(), "this client has nothing to do with that worker"
        late.held_back = lambda _: False
        late.wake()
        (peer,) = alice.worker.peers.values()
        peer.wait(peer.ask([int(Kind.SYNC), [], []]))
        assert mallory.answers[1] == [Kind.ANSWER, True]
        mallory.close()
        alice.close()
        bob.close()
