"""Handles by URL: connecting, once or twice, sessions that outlive links, relays, and calls that wait for their effect."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint import (
    InvalidNameError,
    PointerError,
    RefusedError,
    RemoteExecutionError,
    WorkerLostError,
    WorkerRestartedError,
)
from farpoint.access import Admission, Credentials
from farpoint.approach import Approach
from farpoint.channel import Lane
from farpoint.errors import (
    GetNotPermittedError,
    NobodyListensError,
    ProtocolError,
    SynchronizationTimeoutError,
    TransportError,
    UnreachableError,
)
from farpoint.limits import Limits
from farpoint.peer import SYNC, Peer
from farpoint.plugins import hookimpl, plugins
from farpoint.testing.transport import PATIENCE, eventually
from farpoint.worker import Worker

farpoint.TorchHook(torch)
TOKEN = 30 * "t"
QUICK = Limits(kept_seconds=PATIENCE, reconnect_seconds=0.5, progress_seconds=PATIENCE)


def numbers() -> Any:
    return torch.arange(4.0)


Make = Callable[..., Worker]


@pytest.fixture(params=["tcp", "unix", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make(transport: str) -> Iterator[Make]:
    made: list[Worker] = []

    def begin(stem: str = "bob", **options: Any) -> Worker:
        options.setdefault("limits", QUICK)
        url = options.pop("url", "") or plugins.local_url(transport, stem)
        worker = Worker(options.pop("name", f"{stem}-{secrets.token_hex(3)}"), url, ["msgpack"], **options)
        made.append(worker)
        return worker

    yield begin
    for worker in made:
        worker.close()


def cut(handle: farpoint.RemoteWorker) -> None:
    """Break the link of a session, without a goodbye."""
    lane = handle.peer.channel.lane
    assert lane is not None
    link: Any = lane.link
    if hasattr(link, "give_up"):
        link.give_up(TransportError("test", "cut"))
    else:
        link._runner.soon(link._connection.transport.abort)


def another_lane(handle: farpoint.RemoteWorker, before: Lane | None) -> bool:
    return handle.peer.channel.lane not in (None, before)


class TestConnecting:
    def test_a_script(self, make: Make) -> None:
        worker = make(admission=Admission(tokens=(TOKEN,)))
        with farpoint.connect(worker.url, token=TOKEN) as bob:
            assert bob.id == worker.id and bob.ping() > 0
            p = numbers().send(bob)
            assert torch.equal((p + p).get(), numbers() * 2) and len(bob) == 1
            assert "bob" in repr(bob) and numbers().send(worker.id).get().tolist() == [0, 1, 2, 3]
        with pytest.raises(WorkerLostError):
            p.get()
        eventually(lambda: not worker.guests)
        assert not worker.store

    def test_twice_is_once(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url) as bob:
            assert farpoint.connect(worker.url) is bob
            other = worker.url.replace("127.0.0.1", "localhost")
            assert farpoint.connect(other) is bob
            eventually(lambda: len(worker.guests) == 1)
            assert numbers().send(bob).get().tolist() == [0, 1, 2, 3]

    def test_a_worker_that_others_have_shown_us(self, make: Make) -> None:
        bob, alice = farpoint.connect(make().url), make("alice")
        pointer = numbers().send(farpoint.connect(alice.url)).send(bob)
        back = pointer.get()
        assert farpoint.connect(alice.url).peer is back._reference.peer
        bob.close()
        farpoint.connect(alice.url).close()

    def test_two_of_one_name(self, make: Make) -> None:
        first, second = make(name="bob"), make(name="bob")
        with farpoint.connect(first.url) as bob:
            with pytest.raises(InvalidNameError, match=r"at .* is connected; close\(\) it first"):
                farpoint.connect(second.url)
            assert numbers().send(bob).get().tolist() == [0, 1, 2, 3]

    def test_who_answers_is_who_was_called(self, make: Make) -> None:
        worker, alice = make(), make("alice")
        with pytest.raises(ProtocolError, match="who was called"):
            alice.peer("charlie", worker.url)
        assert not alice.peers["charlie"].established

    def test_awaiting(self, make: Make) -> None:
        worker = make()

        async def script() -> list[float]:
            async with farpoint.aconnect(worker.url) as bob:
                assert await farpoint.aconnect(worker.url) is bob
                return numbers().send(bob).get().tolist()  # type: ignore[no-any-return]  # the hook's

        assert asyncio.run(script()) == [0, 1, 2, 3]
        eventually(lambda: not worker.guests)

    def test_nobody(self, make: Make) -> None:
        worker = make()
        worker.close()
        with pytest.raises(NobodyListensError):
            farpoint.connect(worker.url)

    @pytest.mark.parametrize("token", ["", 30 * "T"])
    def test_a_token_that_is_wrong(self, make: Make, token: str) -> None:
        worker = make(admission=Admission(tokens=(TOKEN,)))
        with pytest.raises(TransportError, match="token") as caught:
            farpoint.connect(worker.url, token=token)
        assert TOKEN not in str(caught.value) and not worker.guests

    def test_a_token_of_the_environment(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        worker = make(admission=Admission(tokens=(TOKEN,)))
        monkeypatch.setenv("FARPOINT_TOKEN", TOKEN)
        farpoint.connect(worker.url).close()


class TestPrincipals:
    """Sessions are counted for whoever can be told apart, and for nobody else."""

    @pytest.fixture
    def come(self) -> Iterator[Callable[..., Peer]]:
        clients: list[Worker] = []

        def come(worker: Worker, token: str = "") -> Peer:
            clients.append(Worker(f"client-{len(clients)}", "", ["msgpack"], credentials=Credentials(token)))
            return clients[-1].peer(worker.id, worker.url)

        yield come
        for client in clients:
            client.close()

    def test_one_of_several_tokens(self, make: Make, come: Callable[..., Peer]) -> None:
        worker = make(admission=Admission(tokens=("a" * 22, "b" * 22)), limits=Limits(sessions_per_principal=2))
        first, second = come(worker, "a" * 22), come(worker, "a" * 22)
        with pytest.raises(RefusedError, match="whoever shows token 1 has 2 sessions, and the limit is sessions_per_principal=2") as caught:
            come(worker, "a" * 22)
        assert caught.value.worker == worker.id and "a" * 22 not in str(caught.value)
        other = come(worker, "b" * 22)
        for peer in (first, second, other):
            assert peer.request([SYNC, [], []])
        first.close()
        eventually(lambda: len(worker.guests) == 2)
        assert come(worker, "a" * 22).request([SYNC, [], []])

    def test_the_one_token_of_everybody_and_none(self, make: Make, come: Callable[..., Peer]) -> None:
        for tokens in (("a" * 22,), ()):
            worker = make(admission=Admission(tokens=tokens), limits=Limits(sessions_per_principal=2))
            peers = [come(worker, *tokens) for _ in range(4)]
            assert all(peer.request([SYNC, [], []]) for peer in peers) and len(worker.guests) == 4

    def test_who_is_who(self) -> None:
        door = Admission(tokens=("a" * 22, "b" * 22), verify=lambda token: token.startswith("fp1."))
        shown = [door.principal(*shown) for shown in (("a" * 22, ""), ("b" * 22, ""), ("a" * 22, "carol"), ("b" * 22, "carol"), ("fp1.x", ""))]
        assert shown == ["token 1", "token 2", "the certificate of 'carol'", "the certificate of 'carol'", ""]
        assert Admission(tokens=("a" * 22,)).principal("a" * 22, "") == Admission().principal("a" * 22, "") == ""


class TestSessions:
    def test_a_session_outlives_its_links(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url, limits=QUICK) as bob:
            x = torch.zeros(3, dtype=torch.int64)
            p = x.send(bob)  # type: ignore[attr-defined]  # the hook's
            big = torch.rand(3 * 2**18)
            for number in range(300):
                p.mul_(3).add_(number).remainder_(1009)
                x.mul_(3).add_(number).remainder_(1009)
                if number % 20 == 0:
                    bob.flush()
                    before = bob.peer.channel.lane
                    cut(bob)
                    eventually(partial(another_lane, bob, before))
                if number % 100 == 50:
                    assert torch.equal(big.send(bob).get(), big)  # type: ignore[attr-defined]  # the hook's
            assert torch.equal(p.get(), x)
            assert len(worker.guests) == 1 and len(bob) == 0

    def test_when_nobody_listens_any_more_it_is_over(self, make: Make) -> None:
        worker = make()
        bob = farpoint.connect(worker.url, limits=QUICK)
        p = numbers().send(bob)
        worker._listener.close()  # type: ignore[union-attr]  # it listens
        cut(bob)
        with pytest.raises(WorkerLostError, match=worker.id):
            p.get()
        bob.close()

    def test_a_lease_ends(self, make: Make) -> None:
        worker = make(limits=Limits(lease_seconds=0.2, kept_seconds=0.2))
        bob = farpoint.connect(worker.url)
        p = numbers().send(bob)
        bob.synchronize()
        (guest,) = worker.guests.values()
        listener: Any = worker._listener
        listener.close()
        cut(bob)
        eventually(lambda: not worker.guests and not worker.store)
        assert guest.left
        with pytest.raises(WorkerLostError):
            p.get()
        bob.close()

    def test_a_session_that_is_back_waits_for_no_end_of_its_lease(self, make: Make, transport: str) -> None:
        worker = make()
        with farpoint.connect(worker.url, limits=Limits(lease_seconds=PATIENCE, reconnect_seconds=PATIENCE)) as bob:
            bob.synchronize()
            (guest,) = worker.guests.values()
            bob.peer.url = plugins.local_url(transport, "nowhere")
            before = bob.peer.channel.lane
            cut(bob)
            eventually(lambda: guest._timer is not None)
            lease: Any = guest._timer
            bob.peer.url = worker.url
            eventually(partial(another_lane, bob, before))
            assert guest._timer is None and lease.finished.is_set()
            assert numbers().send(bob).get().tolist() == [0, 1, 2, 3]

    def test_what_an_earlier_link_brings_late_is_nothing(self, make: Make) -> None:
        with farpoint.connect(make().url, limits=QUICK) as bob:
            bob.synchronize()
            before = bob.peer.channel.lane
            assert before is not None
            cut(bob)
            eventually(partial(another_lane, bob, before))
            bob.peer.channel.received(before, [b"nonsense"])
            assert numbers().send(bob).get().tolist() == [0, 1, 2, 3]

    def test_a_new_life_is_noticed(self, make: Make) -> None:
        worker = make(name="bob")
        bob = farpoint.connect(worker.url, limits=QUICK)
        p = numbers().send(bob)
        bob.synchronize()
        worker._listener.close()  # type: ignore[union-attr]  # it listens
        again = make(name="bob", url=worker.url)
        cut(bob)
        with pytest.raises(WorkerRestartedError, match="bob"):
            p.get()
        with farpoint.connect(again.url) as new:
            assert numbers().send(new).get().tolist() == [0, 1, 2, 3]
            with pytest.raises(WorkerLostError):
                p.get()

    def test_whoever_lacks_the_secret_gets_no_session(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url, limits=QUICK) as bob:
            p = numbers().send(bob)
            bob.peer.secret, secret = "00" * 16, bob.peer.secret
            bob.synchronize()
            cut(bob)
            with pytest.raises(WorkerLostError, match="given our session up"):
                p.get()
            assert worker.guests[bob.peer.session_id].secret == secret.encode()

    def test_a_session_without_a_secret_is_nobody_elses(self, make: Make) -> None:
        worker, alice = make(), make("alice")
        peer = Peer(alice, "", worker.url, ["msgpack"])
        peer.secret = ""
        peer.dial()
        again = Approach(peer, resumes=True)
        again.dial()
        with pytest.raises(WorkerLostError, match="given our session up"):
            again.wait(PATIENCE)
        again.close()
        peer.close()

    def test_a_session_that_is_over_is_not_taken_back(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url) as bob:
            bob.synchronize()
            (guest,) = worker.guests.values()
            lane = guest.channel.lane
            assert lane is not None
        eventually(lambda: guest.left)
        assert not guest.take_back(lane, 0)

    def test_a_worker_that_hangs_is_named(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url, limits=Limits(progress_seconds=0.3, ping_seconds=1000.0)) as bob:
            p = numbers().send(bob)
            bob.synchronize()
            with worker.lock, pytest.raises(SynchronizationTimeoutError, match=f"{worker.id} made no progress for 0.3 s"):
                p.get()
            assert p.get().tolist() == [0, 1, 2, 3]


class TestRelay:
    @pytest.mark.parametrize("shape", [(), (0, 3), (5,), (700, 900), (3 * 2**20,)])
    def test_it_brings_what_cannot_be_moved(self, make: Make, shape: tuple[int, ...]) -> None:
        # Where alice says that she is, nobody is.
        there = make("alice")
        bob = farpoint.connect(make().url)
        alice = farpoint.connect(there.listens)
        alice.peer.terms = attrs.evolve(alice.peer.terms, advertised=plugins.local_url(there.listens.partition(":")[0], "nowhere"))
        x = torch.rand(shape).t() if len(shape) == 2 else torch.rand(shape)
        p = x.send(bob)  # type: ignore[attr-defined]  # the hook's
        with pytest.raises((TransportError, UnreachableError), match=r"relay=True|where it was"):
            p.move(alice)
        assert torch.equal(p.get(keep=True), x) and len(bob) == 1
        q = p.move(alice, relay=True)
        assert torch.equal(q.get(keep=True), x) and (len(bob), len(alice)) == (0, 1)
        with pytest.raises(PointerError, match="spent"):
            p.get()
        del q
        for handle in (bob, alice):
            handle.close()

    def test_a_chain_is_not_relayed(self, make: Make) -> None:
        workers = [farpoint.connect(make(stem).url) for stem in ("bob", "alice", "charlie")]
        bob, alice, charlie = workers
        pp = numbers().send(bob).send(alice)
        with pytest.raises(PointerError, match="chain"):
            pp.move(charlie, relay=True)
        assert pp.get().get().tolist() == [0, 1, 2, 3]
        for handle in workers:
            handle.close()

    def test_what_may_not_leave_is_not_relayed(self, make: Make) -> None:
        class Policy:
            @hookimpl
            def farpoint_authorize(self, action: str) -> str | None:
                return "no value leaves" if action == "get" else None

        bob, alice = farpoint.connect(make().url), farpoint.connect(make("alice").url)
        p = torch.rand(2**20).send(bob)  # type: ignore[attr-defined]  # the hook's
        policy = Policy()
        plugins.register(policy)
        try:
            with pytest.raises(GetNotPermittedError, match="no value leaves"):
                p.move(alice, relay=True)
        finally:
            plugins.unregister(policy)
        assert (len(bob), len(alice)) == (1, 0)
        assert p.get().shape == (2**20,)
        for handle in (bob, alice):
            handle.close()


class TestBlocking:
    def test_an_error_comes_on_its_line(self, make: Make) -> None:
        with farpoint.connect(make().url) as bob:
            p = torch.zeros(2, 2).send(bob)  # type: ignore[attr-defined]  # the hook's
            with farpoint.blocking(), pytest.raises(RemoteExecutionError, match="singular"):
                torch.linalg.inv(p)
            q = torch.linalg.inv(p)
            with pytest.raises(RemoteExecutionError, match="singular"):
                q.get()

    def test_a_call_has_taken_effect(self, make: Make) -> None:
        worker = make()
        with farpoint.connect(worker.url) as bob, farpoint.blocking():
            p = numbers().send(bob)
            assert len(worker.store) == 1
            q = p + p
            assert len(worker.store) == 2
            farpoint.blocking(False)
            assert torch.equal(q.get(), numbers() * 2)
