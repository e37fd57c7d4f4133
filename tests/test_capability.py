"""Capabilities: what they allow, what they do not, and that nobody can widen one."""

from __future__ import annotations

import base64
import gc
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farpoint
from farpoint.access import Admission, Credentials
from farpoint.capability import CAVEATS, LONGEST, check, mint, narrow, read
from farpoint.errors import (
    CapabilityError,
    ObjectNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    TransportError,
)
from farpoint.peer import Peer
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.testing.transport import eventually
from farpoint.worker import Worker

farpoint.TorchHook(torch)
SECRET = b"s" * 32
VALUES = st.text(alphabet="abcdef0123456789", min_size=1, max_size=20)


class TestChain:
    def test_it_says_what_it_is_for(self) -> None:
        capability = narrow(mint(SECRET, "bob", session=7), object=5, audience="aa", expiry=100)
        assert read(SECRET, "bob", capability, 100) == {"session": "7", "object": "5", "audience": "aa", "expiry": "100"}
        assert check(SECRET, "bob", capability, 99, session=7, object=5, audience="aa")

    @pytest.mark.parametrize(
        ("worker", "now", "use", "text"),
        [
            ("alice", 0, {}, "of another worker"),
            ("bob", 101, {}, "expired"),
            ("bob", 0, {"object": 6}, "for object '5', not for '6'"),
            ("bob", 0, {"operation": "move"}, "for operation 'any', not for 'move'"),
        ],
    )
    def test_it_is_for_nothing_else(self, worker: str, now: float, use: dict[str, Any], text: str) -> None:
        capability = mint(SECRET, "bob", object=5, expiry=100)
        with pytest.raises(CapabilityError, match=text):
            check(SECRET, worker, capability, now, **use)

    def test_of_another_life_it_is_worth_nothing(self) -> None:
        with pytest.raises(CapabilityError, match="signature"):
            read(secrets.token_bytes(32), "bob", mint(SECRET, "bob"), 0)

    def test_what_is_said_twice_must_agree(self) -> None:
        assert read(SECRET, "bob", narrow(mint(SECRET, "bob", object=5), object=5), 0) == {"object": "5"}
        with pytest.raises(CapabilityError, match="at once"):
            read(SECRET, "bob", narrow(mint(SECRET, "bob", object=5), object=6), 0)
        # The earliest time counts, whatever is appended.
        with pytest.raises(CapabilityError, match="expired"):
            read(SECRET, "bob", narrow(mint(SECRET, "bob", expiry=5), expiry=50), 10)

    def test_a_caveat_that_is_unknown_forbids(self) -> None:
        with pytest.raises(CapabilityError, match="unknown here: 'weekday'"):
            read(SECRET, "bob", narrow(mint(SECRET, "bob"), weekday="sunday"), 0)

    @given(caveats=st.dictionaries(st.sampled_from(CAVEATS[2:]), VALUES, min_size=1), position=st.integers(0, 5))
    def test_no_caveat_can_be_taken_away(self, caveats: dict[str, str], position: int) -> None:
        parts = narrow(mint(SECRET, "bob", audience="x"), **caveats).split(".")
        position = 2 + position % (len(parts) - 3)
        with pytest.raises(CapabilityError, match="signature"):
            read(SECRET, "bob", ".".join(parts[:position] + parts[position + 1 :]), 0)

    @given(st.text(max_size=50) | st.binary(max_size=50).map(lambda raw: f"fp1.{base64.urlsafe_b64encode(raw).decode()}.AAAA"))
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(CapabilityError):
            read(SECRET, "bob", text, 0)

    @pytest.mark.parametrize("when", ["soon", "-1", "", "1e9", 21 * "9"])
    def test_a_time_that_is_no_number_is_over(self, when: str) -> None:
        with pytest.raises(CapabilityError, match="expired"):
            read(SECRET, "bob", mint(SECRET, "bob", expiry=when), 0)

    @pytest.mark.parametrize("session", ["x", "-1", "", 21 * "9"])
    def test_a_session_that_is_no_number_is_none(self, session: str) -> None:
        with pytest.raises(CapabilityError, match="is no number"):
            read(SECRET, "bob", mint(SECRET, "bob", session=session), 0)

    def test_of_another_version_it_is_none(self) -> None:
        with pytest.raises(CapabilityError, match="no capability"):
            read(SECRET, "bob", "fp2." + mint(SECRET, "bob").partition(".")[2], 0)

    def test_it_is_not_endless(self) -> None:
        capability = mint(SECRET, "bob")
        while len(capability) <= LONGEST:
            capability = narrow(capability, object="5")
        with pytest.raises(CapabilityError, match="no capability"):
            read(SECRET, "bob", capability, 0)
        assert narrow("", object=5) == ""


class Town:
    """Three workers with doors of their own, and what this process holds of them."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.handles: dict[str, farpoint.RemoteWorker] = {}
        for stem in ("bob", "alice", "charlie"):
            name, token = f"{stem}-{secrets.token_hex(3)}", secrets.token_urlsafe(24)
            url = plugins.transport("tcp://").local_url(name)
            self.workers[stem] = Worker(name, url, ["msgpack"], admission=Admission(tokens=(token,)))
            self.handles[stem] = farpoint.connect(self.workers[stem].url, token=token)

    def intruder(self, token: str, name: str = "mallory") -> Peer:
        """Return a session of somebody else with bob, who shows a token."""
        worker = Worker(name, "", ["msgpack"])
        bob = self.workers["bob"]
        peer = Peer(worker, bob.id, bob.url, ["msgpack"], Credentials(token=token))
        peer.dial()
        return peer

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()
        for worker in self.workers.values():
            worker.close()


@pytest.fixture
def town() -> Iterator[Town]:
    made = Town()
    yield made
    made.close()


def handed(town: Town, held: Any, audience: Peer | None = None, **caveats: Any) -> str:
    """Return what bob's client hands to somebody: a capability for one of its objects."""
    own = town.handles["bob"].peer
    caveats = {"object": held._reference.id, "operation": "hold", **caveats}
    return own.terms.give(audience=(audience.owner if audience else own.owner).incarnation.hex(), **caveats)


def claim(peer: Peer, held: Any, capability: str) -> Any:
    return peer.request([int(Kind.CLAIM), held._reference.id, capability])


class TestThreeParties:
    def test_workers_that_share_no_secret_reach_each_other(self, town: Town) -> None:
        bob, alice, charlie = town.handles.values()
        x = torch.arange(5.0)
        p: Any = x.send(bob)  # type: ignore[attr-defined]  # the hook's
        pp = p.send(alice)
        assert torch.equal((pp + pp).get().get(), x + x)
        assert torch.equal(pp.send(charlie).get().get(keep=True).get(keep=True), x)
        assert torch.equal(p.move(charlie).get(), x)
        for how in (lambda q: q.remote_get(), lambda q: q.move(charlie), lambda q: q.remote_send(charlie)):
            q = how(x.send(bob).send(alice))  # type: ignore[attr-defined, no-untyped-call]  # the hook's
            while isinstance(q, farpoint.PointerTensor):
                q = q.get()
            assert torch.equal(q, x)
        del p, pp, q
        assert [len(handle) for handle in town.handles.values()] == [0, 0, 0]

    def test_whoever_was_introduced_may_only_use_what_it_was_handed(self, town: Town) -> None:
        bob = town.handles["bob"]
        p, other = torch.ones(2).send(bob), torch.zeros(2).send(bob)  # type: ignore[attr-defined]  # the hook's
        invitation = bob.peer.terms.give(operation="dial")
        mallory = town.intruder(invitation)
        for message in (
            [int(Kind.PUT), 5, torch.ones(1), False, [], ""],
            [int(Kind.LINK), 5, "alice", "", 6, [], [], "", ""],
            [int(Kind.SEARCH), []],
            [int(Kind.LIST), 0],
            [int(Kind.CLEAR)],
        ):
            with pytest.raises(PermissionDeniedError, match="introduced by another client"):
                mallory.request(message)
        for unanswered in ([int(Kind.SEED), 0], [int(Kind.PLAN), 0, []], [int(Kind.RUNPLAN), 0, b"", [], b""]):
            mallory.tell(unanswered)
            mallory.request([int(Kind.SYNC), [], []])
            with pytest.raises(PermissionDeniedError, match="introduced by another client"):
                mallory.answers.raise_orphan()
        assert len(bob) == 2
        for capability in ("", invitation, handed(town, other, mallory), "fp1.AAAA.AAAA"):
            with pytest.raises(CapabilityError):
                claim(mallory, p, capability)
        with pytest.raises(ObjectNotFoundError, match="has no object"):
            mallory.request([int(Kind.FETCH), p._reference.id])
        assert claim(mallory, p, handed(town, p, mallory)) is True
        assert mallory.request([int(Kind.FETCH), p._reference.id])[1].tolist() == [1.0, 1.0]
        mallory.close()

    def test_a_capability_is_good_once_in_time_and_for_one(self, town: Town) -> None:
        bob = town.handles["bob"]
        p = torch.ones(2).send(bob)  # type: ignore[attr-defined]  # the hook's
        bob.synchronize()
        mallory, eve = (town.intruder(bob.peer.terms.give(operation="dial"), name) for name in ("mallory", "eve"))
        capability = handed(town, p, mallory)
        with pytest.raises(CapabilityError, match="for audience"):
            claim(eve, p, capability)
        assert claim(mallory, p, capability)
        mallory.request([int(Kind.SYNC), [], []])
        mallory.tell([int(Kind.RELEASE), [p._reference.id]])
        with pytest.raises(CapabilityError, match="used already"):
            claim(mallory, p, capability)
        late = narrow(handed(town, p, mallory), expiry=int(time.time()) - 1)
        with pytest.raises(CapabilityError, match="expired"):
            claim(mallory, p, late)
        with pytest.raises(CapabilityError, match="for operation 'move'"):
            claim(mallory, p, handed(town, p, mallory, operation="move"))
        capability = handed(town, p, mallory)
        del p
        gc.collect()  # the tracebacks of what was refused refer to it
        bob.synchronize()
        with pytest.raises(CapabilityError, match="does not hold"):
            claim(mallory, Remembered(capability), capability)
        for peer in (mallory, eve):
            peer.close()

    def test_what_was_used_is_remembered_as_long_as_it_is_good(self, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("farpoint.doorman._REMEMBERED", 1)
        bob, doorman = town.handles["bob"], town.workers["bob"].doorman
        p = torch.ones(2).send(bob)  # type: ignore[attr-defined]  # the hook's
        mallory = town.intruder(bob.peer.terms.give(operation="dial"))
        bob.synchronize()
        first, second = handed(town, p, mallory), handed(town, p, mallory)
        assert claim(mallory, p, first)
        mallory.tell([int(Kind.RELEASE), [p._reference.id]])
        for capability in (first, second):  # there is no room for the second, and the first is not forgotten for it
            with pytest.raises(CapabilityError, match="used already"):
                claim(mallory, p, capability)
        doorman._used[first] = 0.0
        assert claim(mallory, p, second)
        assert list(doorman._used) == [second]
        mallory.close()

    def test_a_capability_says_whose_it_is_and_how_long_it_is_good(self, town: Town) -> None:
        bob = town.handles["bob"]
        p = torch.ones(2).send(bob)  # type: ignore[attr-defined]  # the hook's
        mallory = town.intruder(bob.peer.terms.give(operation="dial"))
        for_ever = narrow(
            bob.peer.terms.capability, object=p._reference.id, operation="hold", audience=mallory.owner.incarnation.hex()
        )
        bob.synchronize()
        with pytest.raises(CapabilityError, match="for how long"):
            claim(mallory, p, for_ever)
        doorman = town.workers["bob"].doorman
        assert not doorman._opens(mint(doorman._secret, bob.id))
        mallory.close()

    def test_who_brings_an_object_shows_a_capability_for_it(self, town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
        bob, alice, _ = town.handles.values()
        p: Any = torch.ones(2).send(alice)  # type: ignore[attr-defined]  # the hook's
        give = bob.peer.terms.give
        monkeypatch.setattr(type(bob.peer.terms), "give", lambda _, **caveats: give(**{**caveats, "object": 5}))
        with pytest.raises(TransportError, match="for object '5'"):
            p.move(bob)
        assert (len(alice), len(bob)) == (1, 0)

    def test_it_brings_an_object_for_whoever_gave_it(self, town: Town) -> None:
        bob, doorman = town.handles["bob"], town.workers["bob"].doorman
        mallory = town.intruder(bob.peer.terms.give(operation="dial"))
        guest = town.workers["bob"].guests[mallory.session_id]
        capability = bob.peer.terms.give(object=5, operation="move", audience=mallory.owner.incarnation.hex())
        doorman.check_move(guest, 5, bob.peer.session_id, capability)
        with pytest.raises(CapabilityError, match="of another session"):
            doorman.check_move(guest, 5, mallory.session_id, capability)
        mallory.close()

    def test_an_introduction_opens_while_the_session_lives_and_an_invitation_for_one(self, town: Town) -> None:
        bob, alice = town.workers["bob"], town.workers["alice"]
        peer = bob.peer(alice.id, alice.url, credentials=Credentials(token=town.handles["alice"].peer.terms.give(operation="dial")))
        introduction, invitation = bob.doorman.introduce(peer), bob.doorman.invite(peer)
        assert bob.doorman._opens(introduction) and bob.doorman._opens(invitation)
        assert bob.doorman.introduced(invitation, alice.incarnation.hex())
        with pytest.raises(CapabilityError, match="for somebody else"):
            bob.doorman.introduced(invitation, bob.incarnation.hex())
        peer.close()
        assert not bob.doorman._opens(introduction)

    def test_who_was_let_in_comes_back_with_what_it_got_there(self, town: Town) -> None:
        bob, worker = town.handles["bob"], town.workers["bob"]
        mallory = town.intruder(bob.peer.terms.give(operation="dial"))
        bob.close()  # with that session ends the invitation
        eventually(lambda: list(worker.guests) == [mallory.session_id])
        before: Any = mallory.channel.lane
        before.link.give_up(TransportError("test", "cut"))
        eventually(lambda: mallory.channel.lane not in (None, before))
        assert mallory.request([int(Kind.DESCRIBE), []]) == []
        mallory.close()

    def test_where_nobody_needs_a_token_nobody_is_introduced(self, town: Town) -> None:
        bob = town.workers["bob"]
        with_tokens = bob.doorman.welcome(next(iter(bob.guests.values())))["capability"]
        assert bob.doorman.introduced(with_tokens, "00")
        bob.doorman.admission(Admission())
        assert not bob.doorman.introduced(with_tokens, "00")

    @pytest.mark.parametrize("token", ["", "fp1", "fp1.x.y", "wrong", "fp1.AAAA.AAAA"])
    def test_the_door_stays_shut(self, town: Town, token: str) -> None:
        with pytest.raises(TransportError, match="token"):
            town.intruder(token)

    def test_the_door_takes_no_late_and_no_borrowed_invitation(self, town: Town) -> None:
        bob, alice = town.handles["bob"], town.handles["alice"]
        for token in (
            narrow(bob.peer.terms.capability, expiry=int(time.time()) - 1),
            alice.peer.terms.give(operation="dial"),
            narrow(bob.peer.terms.capability, weekday="sunday"),
        ):
            with pytest.raises(TransportError, match="token"):
                town.intruder(token)
        with pytest.raises(ProtocolError, match="made for somebody else"):
            town.intruder(bob.peer.terms.give(operation="dial", audience="00" * 16))

    def test_an_invitation_ends_with_the_session_that_gave_it(self, town: Town) -> None:
        invitation = town.handles["bob"].peer.terms.give(operation="dial")
        town.intruder(invitation).close()
        town.handles["bob"].close()
        eventually(lambda: not town.workers["bob"].guests)
        with pytest.raises(TransportError, match="token"):
            town.intruder(invitation)


class Remembered:
    """The id in a capability, where the pointer is gone."""

    def __init__(self, capability: str) -> None:
        caveats = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in capability.split(".")[2:-1]]
        self._reference = self
        self.id = int(next(c for c in caveats if c.startswith(b"object=")).partition(b"=")[2])


def test_a_worker_dials_only_where_its_operator_lets_it() -> None:
    url = plugins.transport("tcp://").local_url("bob")
    bob = Worker("bob-listed", url, ["msgpack"], reachable=("tcp://127.0.0.1:7", "tls://*.example.org:*"))
    alice = Worker("alice-listed", url, ["msgpack"])
    near, far = farpoint.connect(bob.url), farpoint.connect(alice.url)
    one: Any = torch.ones(2)
    p = one.send(far)
    calls: list[Callable[[], Any]] = [lambda: p.send(near).get(), lambda: one.send(near).move(far)]
    for call in calls:
        with pytest.raises(PermissionDeniedError, match="none of the addresses that its operator has listed"):
            call()
    assert p.get().tolist() == [1.0, 1.0]
    for end in (near, far, bob, alice):
        end.close()
