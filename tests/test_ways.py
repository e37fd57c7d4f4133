"""Two workers reach each other by two links, one of each: what happens when one of the two fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint.errors import NobodyListensError, TransportError, WorkerLostError
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.remote import RemoteWorker, me
from farpoint.testing.transport import eventually
from farpoint.worker import Worker
from proxy import Proxy
from wire import check_books, check_idle

farpoint.TorchHook(torch)
SECONDS = 20.0
LIMITS = Limits(reconnect_seconds=0.2, open_seconds=2.0, close_seconds=0.5)
NOBODY = "tcp://127.0.0.1:9"
"""Where nobody listens: that port has been nobody's since the days of the discard service."""


@attrs.frozen
class Place:
    """A worker of this process behind a socket, and its handle."""

    worker: Worker
    handle: RemoteWorker


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    with ExitStack() as stack:

        def make(name: str, limits: Limits = LIMITS, advertise: str = "") -> Place:
            worker = Worker(f"{name}.way", "tcp://127.0.0.1:0", ["msgpack"], limits=limits, advertise=advertise)
            stack.callback(worker.close)
            handle = farpoint.connect(worker.listens, limits=limits)
            stack.callback(handle.close)
            return Place(worker, handle)

        yield make


def data() -> Any:
    return torch.arange(4)


def begin(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call something on another thread, for it might never return."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(call, *arguments)
    executor.shutdown(wait=False)
    return future


def lose(place: Place, name: str) -> threading.Event:
    """Let the next step of that name that comes to a worker be lost. What is returned is set when it was."""
    commands, lost = place.worker._commands, threading.Event()
    receive = commands[int(Kind.TRANSFER)]

    def once(guest: Any, number: int, message: list[Any]) -> None:
        if message[1] == name and not lost.is_set():
            lost.set()
        else:
            receive(guest, number, message)

    commands[int(Kind.TRANSFER)] = once
    return lost


def check_empty(*places: Place) -> None:
    """Assert that nothing is left."""
    for one in places:
        one.handle.ping()
    for one in places:
        movers = one.worker.movers
        eventually(lambda store=one.worker.store, m=movers: not store and not m._leaving and not m._staged)  # type: ignore[misc]
        check_books(one.worker)
        check_idle(one.worker)


def test_who_holds_the_lock_dials_and_does_not_wait(place: Callable[..., Place]) -> None:
    bob, alice = place("bob"), place("alice")
    with bob.worker.lock:
        peer = bob.worker.peer(alice.worker.id, alice.worker.url)
        assert not peer.established
    eventually(lambda: peer.established)


def test_a_worker_that_cannot_answer_is_told_of(place: Callable[..., Place]) -> None:
    bob, alice = place("bob", advertise=NOBODY), place("alice")
    p = data().send(bob.handle)
    with pytest.raises(TransportError, match=r"is where it was: alice.way: .*discard|is where it was: alice.way: .*:9: cannot be reached"):
        begin(p.move, alice.handle).result(SECONDS)
    assert not alice.worker.store
    assert torch.equal(p.get(), data())
    check_empty(bob, alice)


def test_a_large_tensor_for_which_there_is_no_room(place: Callable[..., Place]) -> None:
    bob, alice = place("bob"), place("alice", attrs.evolve(LIMITS, bytes=2**20))
    x = torch.zeros(2**21, dtype=torch.uint8)
    p: Any = x.send(bob.handle)  # type: ignore[attr-defined]
    with pytest.raises(TransportError, match=r"is where it was: alice.way: .* its limit is bytes=1048576"):
        begin(p.move, alice.handle).result(SECONDS)
    assert torch.equal(p.get(), x)
    check_empty(bob, alice)


@pytest.mark.parametrize("step", ["Prepared", "Activated"])
def test_what_was_lost_with_the_session_of_the_destination(place: Callable[..., Place], step: str) -> None:
    bob, alice = place("bob"), place("alice")
    lost = lose(bob, step)
    moving = begin(data().send(bob.handle).move, alice.handle)
    assert lost.wait(SECONDS)
    alice.worker.peers[bob.worker.id].end(TransportError(bob.worker.url, "given up"))
    assert torch.equal(moving.result(SECONDS).get(), data())
    check_empty(bob, alice)


@pytest.mark.parametrize("step", ["Push", "Commit"])
def test_what_was_lost_with_the_session_of_the_source(place: Callable[..., Place], step: str) -> None:
    bob, alice = place("bob"), place("alice")
    lost = lose(alice, step)
    p = data().send(bob.handle)
    moving = begin(p.move, alice.handle)
    assert lost.wait(SECONDS)
    bob.worker.peers[alice.worker.id].end(TransportError(alice.worker.url, "given up"))
    if step == "Push":
        with pytest.raises(TransportError, match=r"is where it was: .*given up"):
            moving.result(SECONDS)
        assert torch.equal(p.get(), data())
    else:
        assert torch.equal(moving.result(SECONDS).get(), data())
    del p, moving
    check_empty(bob, alice)


def test_who_speaks_is_not_dead_though_nobody_listens(place: Callable[..., Place]) -> None:
    alice = place("alice")
    with Proxy(NOBODY) as reserved:
        pass
    bob = place("bob", advertise=reserved.url)
    port = int(reserved.url.rpartition(":")[2])
    way = Proxy(bob.worker.listens, port=port)
    lost = lose(bob, "Prepared")
    moving = begin(data().send(bob.handle).move, alice.handle)
    assert lost.wait(SECONDS)
    way.close()
    eventually(lambda: alice.worker._sought or alice.worker.store)
    assert not alice.worker.store, "the object is served twice"
    with Proxy(bob.worker.listens, port=port):
        assert torch.equal(moving.result(SECONDS).get(), data())
        check_empty(bob, alice)


def test_who_speaks_is_not_dead_however_often_it_is_dialled_in_vain(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farpoint.worker._SEEK_SECONDS", 0.05)
    alice = place("alice")
    with Proxy(NOBODY) as reserved:
        pass
    bob = place("bob", advertise=reserved.url)
    port = int(reserved.url.rpartition(":")[2])
    way = Proxy(bob.worker.listens, port=port)
    lost = lose(bob, "Prepared")
    moving = begin(data().send(bob.handle).move, alice.handle)
    assert lost.wait(SECONDS)
    dialled, peer_lost = [], alice.worker.peer_lost

    def count(peer: Any) -> None:
        peer_lost(peer)
        dialled.append(peer)

    monkeypatch.setattr(alice.worker, "peer_lost", count)
    way.close()
    eventually(lambda: len(dialled) > 2)
    assert not alice.worker.store, "the object is served twice"
    with Proxy(bob.worker.listens, port=port):
        assert torch.equal(moving.result(SECONDS).get(), data())
        check_empty(bob, alice)


def test_a_last_word_that_was_lost_is_asked_for(place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farpoint.worker._SEEK_SECONDS", 0.05)
    bob, alice = place("bob"), place("alice")
    lost = lose(alice, "Released")
    p = data().send(bob.handle).move(alice.handle)
    assert lost.wait(SECONDS)
    assert alice.worker.movers._states.open_peers() == {bob.worker.id}
    bob.worker.peers[alice.worker.id].channel.fail(TransportError(alice.worker.url, "given up"))
    eventually(lambda: not alice.worker.movers._states.open_peers())
    assert torch.equal(p.get(), data())
    check_empty(bob, alice)


def test_what_comes_after_its_holder_was_told_that_it_is_lost(place: Callable[..., Place]) -> None:
    bob, alice = place("bob"), place("alice")
    execute, came, goes_on = alice.worker.execute, threading.Event(), threading.Event()

    def late(guest: Any, number: int, message: list[Any]) -> None:
        if message[:2] == [int(Kind.TRANSFER), "Push"]:
            came.set()
            assert goes_on.wait(SECONDS)
        execute(guest, number, message)

    alice.worker.execute = late  # type: ignore[method-assign]
    moving = begin(data().send(bob.handle).move, alice.handle)
    assert came.wait(SECONDS)
    bob.handle.peer.end(NobodyListensError(bob.worker.url, "it has died"))
    error = moving.exception(SECONDS)
    assert isinstance(error, WorkerLostError) and "bob" in str(error)
    del moving, error
    alice.handle.ping()  # with it goes the reference to what did not come
    goes_on.set()
    eventually(lambda: not bob.worker.movers._leaving)
    check_empty(alice)
    # That it did not move is said as well, and nobody looks at that.
    eventually(lambda: any("has been told" in str(error) for error, seen in list(me().failures.values()) if not seen))
    me().failures.clear()
