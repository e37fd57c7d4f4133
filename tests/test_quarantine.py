"""After the lease: what clients hold that are away is hidden, kept, and given back; and ways around a worker that has died."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint import ObjectNotFoundError, PointerError, WorkerLostError
from farpoint.guest import Guest
from farpoint.limits import Limits
from farpoint.listing import fetch_listing
from farpoint.peer import Peer
from farpoint.protocol.messages import Kind
from farpoint.remote import RemoteWorker
from farpoint.testing.transport import eventually
from farpoint.worker import Worker
from proxy import Proxy

farpoint.TorchHook(torch)
LIMITS = Limits(lease_seconds=0.1, kept_seconds=600.0, reconnect_seconds=600.0)


@attrs.define
class Place:
    """A worker, and ways to it: the one that a client takes can be closed."""

    worker: Worker
    way: Proxy
    client: RemoteWorker
    stack: ExitStack

    def stranger(self) -> Peer:
        """Return the session of another process, as far as the worker knows."""
        other = Worker("stranger", "", ["msgpack"])
        self.stack.callback(other.close)
        return other.peer("bob", self.worker.listens)

    def cut_off(self) -> Guest:
        """Cut the client off for longer than its lease, and return what the worker knows of it."""
        self.client.synchronize()
        guest = self.worker.guests[self.client.peer.session_id]
        self.way.close()
        eventually(lambda: guest.away)
        return guest

    def open_again(self) -> None:
        self.way = self.stack.enter_context(Proxy(self.worker.listens, port=int(self.way.url.rpartition(":")[2])))
        self.stack.callback(self.client.close)  # while there is a way


Make = Callable[..., Place]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def begin(**limits: Any) -> Place:
            worker = Worker("bob", "tcp://127.0.0.1:0", ["msgpack"], limits=attrs.evolve(LIMITS, **limits))
            stack.callback(worker.close)
            way = stack.enter_context(Proxy(worker.listens))
            client = farpoint.connect(way.url, limits=LIMITS)
            stack.callback(client.close)
            return Place(worker, way, client, stack)

        yield begin


def data() -> Any:
    return torch.arange(4)


def test_who_comes_back_goes_on(make: Make) -> None:
    bob = make()
    stranger = bob.stranger()
    p = data().tag("#mine").send(bob.client)
    bob.client.synchronize()
    found = [int(Kind.SEARCH), ["#mine"]]
    assert stranger.request(found) == [p.id_at_location]
    guest = bob.cut_off()
    p.add_(1)  # waits for the link
    assert fetch_listing(stranger) == {} and stranger.request(found) == [] and len(bob.worker.store) == 1
    bob.open_again()
    bob.client.synchronize()
    assert not guest.away and list(fetch_listing(stranger)) == [p.id_at_location] == stranger.request(found)
    assert torch.equal(p.get(), data() + 1)
    bob.client.synchronize()
    assert not bob.worker.store


def test_who_does_not_come_back_loses_it(make: Make) -> None:
    bob = make(kept_seconds=0.3)
    p = data().send(bob.client)
    guest = bob.cut_off()
    eventually(lambda: guest.left)
    assert not bob.worker.store and not bob.worker.guests
    bob.open_again()
    with pytest.raises(WorkerLostError, match=r"given our session up|cannot be reached"):
        p.get()


def test_what_others_hold_is_shown_until_they_give_it_up(make: Make) -> None:
    bob = make()
    stranger = bob.stranger()
    p = data().send(bob.client)
    bob.client.synchronize()
    stranger.request([int(Kind.CLAIM), p.id_at_location, ""])
    bob.cut_off()
    assert list(fetch_listing(stranger)) == [p.id_at_location]
    stranger.tell([int(Kind.RELEASE), [p.id_at_location]])
    assert fetch_listing(stranger) == {}
    bob.open_again()
    assert torch.equal(p.get(), data())


def test_there_is_only_so_much_room(make: Make) -> None:
    bob = make(quarantine_bytes=data().nbytes)
    p = data().send(bob.client)
    guest = bob.cut_off()
    assert not guest.left
    with Proxy(bob.worker.listens) as way:
        other = Worker("other", "", ["msgpack"])
        bob.stack.callback(other.close)
        peer = other.peer("bob", way.url)
        peer.tell([int(Kind.PUT), peer.references.new_id(), data(), False, [], ""])
        peer.request([int(Kind.SYNC), [], []])
        second = bob.worker.guests[peer.session_id]
    eventually(lambda: guest.left)
    assert not second.left and second.away and len(bob.worker.store) == 1
    del p


def test_who_is_away_makes_room_for_who_comes(make: Make) -> None:
    bob = make(links=2)
    guest = bob.cut_off()
    first = bob.stranger()
    assert not guest.left
    second = bob.stranger()
    assert guest.left and first.request([int(Kind.DESCRIBE), []]) == [] == second.request([int(Kind.DESCRIBE), []])


@pytest.fixture(scope="module")
def processes() -> Iterator[farpoint.LocalCluster]:
    limits = Limits(lease_seconds=0.1, reconnect_seconds=0.5)
    with farpoint.local_cluster("bob", "alice", "charlie", limits=limits) as made:
        yield made


@pytest.fixture
def cluster(processes: farpoint.LocalCluster) -> farpoint.LocalCluster:
    for name, process in processes.processes.items():
        if process.poll() is not None:
            processes.restart(name)
    return processes


def kill(cluster: farpoint.LocalCluster, name: str) -> None:
    cluster.processes[name].kill()
    cluster.processes[name].wait()


class TestBypass:
    def test_the_middle_has_died(self, cluster: farpoint.LocalCluster) -> None:
        pp = data().send(cluster.bob).send(cluster.alice)
        cluster.alice.synchronize()
        kill(cluster, "alice")
        eventually(lambda: len(cluster.bob) == 0)  # it is in quarantine
        for call in (pp.get, lambda: pp + pp, lambda: pp.move(cluster.charlie)):
            with pytest.raises(WorkerLostError, match=r"alice cannot be .*, on the way me -> alice -> bob: .*p\.bypass\(\)"):
                call()
        p = pp.bypass()
        assert p.location is cluster.bob and list(cluster.bob._objects) == [p.id_at_location]
        assert torch.equal((p + 1).get(), data() + 1) and torch.equal(p.get(), data())
        assert len(cluster.bob) == 0

    def test_two_have_died(self, cluster: farpoint.LocalCluster) -> None:
        ppp = data().send(cluster.charlie).send(cluster.bob).send(cluster.alice)
        cluster.alice.synchronize()
        kill(cluster, "alice")
        kill(cluster, "bob")
        p = ppp.bypass()
        assert p.location is cluster.charlie and torch.equal(p.get(), data())

    def test_nothing_is_lost_when_nobody_has_died(self, cluster: farpoint.LocalCluster) -> None:
        ppp = data().requires_grad_(False).send(cluster.charlie).send(cluster.bob).send(cluster.alice)
        pp = ppp.bypass()
        p = pp.bypass()
        assert [len(worker) for worker in (cluster.alice, cluster.bob, cluster.charlie)] == [0, 0, 1]
        assert torch.equal(p.get(), data()) and len(cluster.charlie) == 0

    def test_the_way_is_kept_by_get(self, cluster: farpoint.LocalCluster) -> None:
        pp: Any = data().send(cluster.charlie).send(cluster.bob).send(cluster.alice).get()
        cluster.bob.synchronize()
        kill(cluster, "bob")
        assert torch.equal(pp.bypass().get(), data())

    def test_what_has_moved_on(self, cluster: farpoint.LocalCluster) -> None:
        pp = data().send(cluster.bob).send(cluster.alice)
        twin = pp.send(cluster.charlie).get()
        moved = pp.move(cluster.charlie)
        with pytest.raises(ObjectNotFoundError, match="bob"):
            twin.send(cluster.alice).get().bypass()
        with pytest.raises(PointerError, match="not known here where on charlie"):
            moved.bypass()
        assert torch.equal(moved.get().get(), data())

    def test_there_is_no_way_around(self, cluster: farpoint.LocalCluster) -> None:
        p = data().send(cluster.bob)
        with pytest.raises(PointerError, match="leads straight to its data"):
            p.bypass()
        pp = p.send(cluster.alice)
        cluster.alice.synchronize()
        kill(cluster, "bob")
        with pytest.raises(WorkerLostError, match="bob"):
            pp.bypass()
        with pytest.raises(WorkerLostError, match="bob"):
            pp.get().get()
