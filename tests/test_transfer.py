"""The states of a `move`: each row of the tables, and three workers on a network that means harm.

`World` is the model: workers that carry effects out as the real ones do, links that lose, double and delay,
crashes between any two effects. It is driven by seeds (`FARPOINT_TRANSFER_SEEDS` says how many) and by
Hypothesis, and its own power is tested: each of the `MUTATIONS` takes one rule away, and must be noticed.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from farpoint.errors import ProtocolError, StaleIncarnationError
from farpoint.protocol import transfer as protocol
from farpoint.protocol.arrival import Arrivals
from farpoint.protocol.departure import Departures, Ground, Peer
from farpoint.protocol.transfer import (
    ARRIVALS,
    DEPARTURES,
    Abort,
    Aborted,
    Activate,
    Activated,
    Arriving,
    Commit,
    Departure,
    Discard,
    Done,
    Drop,
    Effect,
    Entry,
    Failed,
    Freeze,
    Inquire,
    Leaving,
    Missing,
    Prepared,
    Probe,
    Push,
    Record,
    Refused,
    Released,
    Send,
    Stage,
    Thaw,
    TransferMessage,
    Transfers,
    Withdraw,
)

SEEDS = int(os.environ.get("FARPOINT_TRANSFER_SEEDS", "2000"))

# --- The model --------------------------------------------------------------------------------------------


class Violation(AssertionError):
    """A guarantee of the protocol does not hold."""


class Crash(Exception):
    """The worker died between two effects."""


Token = tuple[int, int]
"""What stands for a payload: which object, and how often it was written."""


@attrs.define(eq=False)
class Link:
    """One connection: `queues` by sender, `cut` when it is broken, `ends` who has not noticed that yet."""

    queues: dict[str, deque[Any]]
    ends: set[str]
    cut: bool = False


@attrs.define(eq=False)
class Worker:
    """What a worker keeps: on disk `store`, `staged` and `records`, in memory the rest."""

    name: str
    durable: bool
    machine: Transfers
    up: bool = True
    store: dict[int, Token] = attrs.Factory(dict)
    staged: dict[int, Token] = attrs.Factory(dict)
    promised: set[int] = attrs.Factory(set)  # what it has said is staged
    records: dict[int, Entry] = attrs.Factory(dict)
    withdrawn: set[int] = attrs.Factory(set)
    frozen: set[int] = attrs.Factory(set)
    known: dict[str, int] = attrs.Factory(dict)
    buried: set[str] = attrs.Factory(set)  # who was known to be dead, and has not greeted since
    answers: dict[int, list[Effect]] = attrs.Factory(dict)

    def serving(self) -> Iterable[int]:
        """Ids that it would answer for."""
        return (i for i in self.store if i not in self.withdrawn) if self.up else ()


class World:
    """Three workers, and everything that may happen to them."""

    def __init__(self, durable: tuple[bool, bool, bool], objects: int, remembered: int = 4096) -> None:
        self.ids = iter(range(1, 1_000_000))
        self.rng = random.Random(0)
        self.remembered = remembered
        self.workers = {n: Worker(n, d, self.born(d)) for n, d in zip("ABC", durable, strict=True)}
        self.links: dict[tuple[str, str], Link | None] = dict.fromkeys([("A", "B"), ("A", "C"), ("B", "C")])
        self.late: list[tuple[str, str, int, int, TransferMessage]] = []
        self.begun: dict[int, tuple[str, int, str, int, int]] = {}
        self.versions: dict[int, int] = {}
        self.copies: dict[int, int] = {}
        self.protected: set[int] = set()  # staged copies whose source died without an abort: must be promoted
        self.activated: dict[int, tuple[Worker, Transfers]] = {}
        self.doomed = False  # a volatile worker has died, so a last copy may go
        self.fuse: int | None = None  # effects until whoever carries them out dies
        self.refusing = 0.0
        self.doubling = 0.0
        self.volatile_crashes = 0
        self.buries = False  # whether the volatile dead stay dead in the end
        for number in range(objects):
            worker = self.workers["ABC"[number % 3]]
            worker.store[next(self.ids)] = (number, 0)
            self.versions[number] = 0
        self.check()

    # Workers.

    def born(self, durable: bool) -> Transfers:
        return Transfers(next(self.ids), durable=durable, remembered=self.remembered)

    def carry_out(self, worker: Worker, effects: list[Effect]) -> None:
        """Do what a worker does with effects, and die in between if the fuse says so."""
        try:
            for effect in effects:
                self.burn()
                if isinstance(effect, Stage) and self.rng.random() < self.refusing:
                    self.carry_out(worker, worker.machine.refuse(effect.transfer, "full"))
                    break
                self.apply(worker, effect)
                if not isinstance(effect, Send):
                    self.check()
        except Crash:
            self.crash(worker.name)

    def burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Crash

    def apply(self, worker: Worker, effect: Effect) -> None:
        match effect:
            case Send(peer, message, object_id):
                if object_id is not None:
                    assert isinstance(message, Push)
                    assert object_id in worker.store
                    message = attrs.evolve(message, payload=worker.store[object_id])
                if isinstance(message, Prepared):
                    worker.promised.add(message.transfer)
                self.post(worker, peer, message)
            case Freeze(object_id):
                assert object_id in worker.store
                worker.frozen.add(object_id)
            case Withdraw(object_id):
                assert object_id in worker.store
                worker.frozen.discard(object_id)
                worker.withdrawn.add(object_id)
            case Thaw(object_id):
                assert object_id in worker.store
                worker.frozen.discard(object_id)
                worker.withdrawn.discard(object_id)
            case Drop(object_id):
                # An Activated may be the last word of a volatile life, and nobody can know.
                for transfer, (owner, life) in self.activated.items():
                    if self.begun[transfer][:2] == (worker.name, object_id):
                        self.doomed |= not owner.durable and (not owner.up or owner.machine is not life)
                worker.store.pop(object_id, None)
                worker.withdrawn.discard(object_id)
                worker.frozen.discard(object_id)
                self.check()
                self.doomed = False
            case Stage(transfer, _, _, payload, _):
                worker.staged[transfer] = payload
            case Activate(transfer, new_id, _):
                if transfer in worker.staged:
                    worker.store[new_id] = worker.staged.pop(transfer)
                    self.protected.discard(transfer)
                    self.activated[transfer] = worker, worker.machine
            case Discard(transfer):
                worker.staged.pop(transfer, None)
                worker.promised.discard(transfer)
            case Record(transfer, None):
                worker.records.pop(transfer, None)
            case Record(transfer, entry):
                assert entry is not None
                worker.records[transfer] = entry
            case Done() | Failed():
                answers = worker.answers.setdefault(effect.transfer, [])
                answers.append(effect)
                if answers[0] != effect:
                    raise Violation(f"answered {answers[0]}, then {effect}")

    def crash(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.up:
            return
        worker.up = False
        for pair, link in self.links.items():
            if link is not None and name in pair:
                self.cut(pair)
                self.notice(pair, name)
        worker.withdrawn.clear()
        worker.frozen.clear()
        worker.known.clear()
        worker.buried.clear()
        worker.answers.clear()
        if not worker.durable:
            self.volatile_crashes += 1
            for entry in worker.machine._departures.entries.values():
                if entry.state in (Leaving.OUT, Leaving.COMMITTED):
                    self.protected.add(entry.transfer)
            self.doomed = True
            worker.store.clear()
            worker.staged.clear()
            worker.promised.clear()
            self.check()
            self.doomed = False

    def restart(self, name: str) -> None:
        worker = self.workers[name]
        if worker.up:
            return
        worker.machine = self.born(worker.durable)
        if worker.durable:
            try:
                for effect in worker.machine.restore(tuple(worker.records.values())):
                    self.burn()
                    self.apply(worker, effect)
            except Crash:
                worker.withdrawn.clear()
                return
            named = {t for t, e in worker.records.items() if isinstance(e, protocol.Arrival)}
            for transfer in set(worker.staged) - named:
                del worker.staged[transfer]
        worker.up = True
        self.check()

    # The network.

    def post(self, worker: Worker, peer: str, message: TransferMessage) -> None:
        pair = (min(worker.name, peer), max(worker.name, peer))
        link = self.links[pair]
        if peer in worker.buried:
            raise Violation(f"{worker.name} speaks to {peer}, who is dead")
        item = (worker.machine.incarnation, worker.known[peer], message)
        if link is None or link.cut:
            if self.rng.random() < 0.3:
                self.late.append((worker.name, peer, *item))
        else:
            link.queues[worker.name].append(item)

    def connect(self, pair: tuple[str, str]) -> None:
        if self.links[pair] is None and all(self.workers[n].up for n in pair):
            hellos = {n: deque([self.workers[n].machine.incarnation]) for n in pair}
            self.links[pair] = Link(hellos, set(pair))

    def cut(self, pair: tuple[str, str]) -> None:
        link = self.links[pair]
        if link is None or link.cut:
            return
        link.cut = True
        for sender, receiver in (pair, pair[::-1]):
            for item in link.queues[sender]:
                if isinstance(item, tuple) and self.rng.random() < 0.6:
                    self.late.append((sender, receiver, *item))
            link.queues[sender].clear()

    def notice(self, pair: tuple[str, str], name: str, *, dead: bool = False) -> None:
        link = self.links[pair]
        if link is None or not link.cut or name not in link.ends:
            return
        link.ends.discard(name)
        if not link.ends:
            self.links[pair] = None
        worker = self.workers[name]
        peer = pair[pair[0] == name]
        if worker.up and dead:
            self.told_dead(worker, peer)
        elif worker.up:
            self.carry_out(worker, worker.machine.peer_lost(peer))

    def deliver(self, sender: str, receiver: str) -> bool:
        link = self.links[min(sender, receiver), max(sender, receiver)]
        if link is None or link.cut or not link.queues[sender]:
            return False
        item = link.queues[sender].popleft()
        worker = self.workers[receiver]
        if isinstance(item, int):
            worker.known[sender] = item
            worker.buried.discard(sender)
            self.carry_out(worker, worker.machine.peer_back(sender, item))
        else:
            if self.rng.random() < self.doubling:
                self.late.append((sender, receiver, *item))
            self.hand_over(sender, receiver, *item)
        return True

    def deliver_late(self, index: int) -> None:
        if self.late:
            self.hand_over(*self.late.pop(index % len(self.late)))

    def hand_over(
        self, sender: str, receiver: str, incarnation: int, addressed: int, message: TransferMessage
    ) -> None:
        worker = self.workers[receiver]
        if not worker.up:
            return
        try:
            effects = worker.machine.receive(sender, incarnation, addressed, message)
        except StaleIncarnationError:
            return
        except ProtocolError as error:
            raise Violation(f"an honest peer is blamed: {error}") from error
        self.carry_out(worker, effects)

    # What a worker may learn of another one. `Movers.peer_lost` says it of the session that the worker has dialled; in its
    # network, too, messages may still come that the other one had sent.

    def lose(self, name: str, peer: str) -> None:
        """End the session that one side has dialled. It dials again, and hears nothing before.

        What was on its way in it may be lost, for the next one is another session. A link that breaks ends none. The other
        side has lost a guest: if something is open, it asks again.
        """
        link = self.links[min(name, peer), max(name, peer)]
        if link is None or link.cut:
            return
        for item in link.queues[name]:
            if isinstance(item, tuple) and self.rng.random() < 0.6:
                self.late.append((name, peer, *item))
        link.queues[name] = deque(item for item in link.queues[name] if isinstance(item, int))
        link.queues[peer].appendleft(self.workers[peer].machine.incarnation)
        worker = self.workers[name]
        if name in self.workers[peer].machine.open_peers():
            link.queues[name].append(worker.machine.incarnation)
        self.carry_out(worker, worker.machine.peer_lost(peer))
        self.give_up(name, peer)

    def unheard(self, name: str, peer: str) -> None:
        """Let a message come to nothing, because who shall take it has too much that waits for its own session, or gets none.

        The sender learns that (`Movers.unheard`): it moves nothing then, or asks again.
        """
        link = self.links[min(name, peer), max(name, peer)]
        if link is None or link.cut or [type(item) for item in link.queues[name]][:2] != [int, tuple]:
            return
        *_, message = link.queues[name][1]
        del link.queues[name][1]
        worker = self.workers[name]
        if message.transfer in worker.machine._departures.entries:
            self.carry_out(worker, worker.machine.abort(message.transfer, "unheard"))
        if worker.up and peer in worker.machine.open_peers():
            link.queues[peer].append(self.workers[peer].machine.incarnation)

    def is_over(self, name: str, peer: str) -> bool:
        """Return whether the last life of another worker that a worker knows of is over for certain.

        Nobody listens where it was, and it has no link to here, or a new life answers there. Of a durable one nobody may say
        that it is dead: it comes back with what it had.
        """
        other = self.workers[peer]
        return not other.durable and (not other.up or self.workers[name].known.get(peer) not in (None, other.machine.incarnation))

    def bury(self, name: str, peer: str) -> None:
        """Let a worker learn that another one is dead."""
        worker = self.workers[name]
        if worker.up and self.is_over(name, peer):
            pair = (min(name, peer), max(name, peer))
            link = self.links[pair]
            if link is not None and link.cut and name in link.ends:
                self.notice(pair, name, dead=True)
            else:
                self.told_dead(worker, peer)
            self.give_up(name, peer)

    def told_dead(self, worker: Worker, peer: str) -> None:
        worker.buried.add(peer)
        with self.answered(worker, peer, Leaving.WAITING, Leaving.OUT, Leaving.COMMITTED):
            self.carry_out(worker, worker.machine.peer_dead(peer))
        if worker.up and peer in worker.machine.open_peers():
            raise Violation(f"{worker.name} waits for {peer}, who is dead")

    def give_up(self, name: str, peer: str) -> None:
        """Let a worker wait no more for another one: whoever began what is not committed has an answer. That needs no reason."""
        worker = self.workers[name]
        if worker.up:
            with self.answered(worker, peer, Leaving.WAITING, Leaving.OUT):
                self.carry_out(worker, worker.machine.give_up(peer, "given up"))

    @contextmanager
    def answered(self, worker: Worker, peer: str, *states: Leaving) -> Iterator[None]:
        """Check that whoever began what leaves for a worker, and is in one of some states, is answered meanwhile."""
        leaving = [known.transfer for known in worker.machine._departures.leaving_for(peer) if known.state in states]
        yield
        for transfer in leaving:
            if worker.up and not worker.answers.get(transfer):
                raise Violation(f"transfer {transfer} has failed, and nobody was told")

    # The client.

    def begin(self, name: str, index: int, other: int) -> None:
        worker = self.workers[name]
        if worker.up and worker.store:
            object_id = sorted(worker.store)[index % len(worker.store)]
            destination = [n for n in "ABC" if n != name][other % 2]
            transfer = next(self.ids)
            self.begun[transfer] = (name, object_id, destination, next(self.ids), 7)
            self.begin_again(transfer)

    def begin_again(self, transfer: int) -> None:
        name, object_id, *rest = self.begun[transfer]
        worker = self.workers[name]
        # Of what the machine has forgotten, the session's own answer is the answer.
        unheard = object_id in worker.store and transfer not in worker.answers
        if worker.up and (transfer in worker.machine or unheard):
            self.carry_out(worker, worker.machine.begin(transfer, object_id, *rest))  # type: ignore[arg-type]

    def abort(self, transfer: int) -> None:
        worker = self.workers[self.begun[transfer][0]]
        if worker.up and transfer in worker.machine._departures.entries:
            self.carry_out(worker, worker.machine.abort(transfer))

    def write(self, name: str) -> None:
        worker = self.workers[name]
        for object_id in sorted(worker.serving()):
            if object_id not in worker.frozen:
                number, version = worker.store[object_id]
                if version == self.versions[number] or self.volatile_crashes:
                    self.versions[number] = max(version, self.versions[number]) + 1
                    worker.store[object_id] = (number, self.versions[number])
                    return
                raise Violation(f"object {number} is served with an old value, and nothing volatile has died")

    # The guarantees.

    def check(self) -> None:
        """At most one serves (G3); one copy at least is safe (G2), or died with a volatile worker."""
        serving: dict[int, list[str]] = {}
        copies: dict[int, int] = dict.fromkeys(self.versions, 0)
        for worker in self.workers.values():
            for object_id, (number, _) in worker.store.items():
                copies[number] += 1
                if worker.up and object_id not in worker.withdrawn:
                    serving.setdefault(number, []).append(worker.name)
            for transfer, (number, _) in worker.staged.items():
                copies[number] += transfer in worker.promised and transfer in self.protected
        for number, names in serving.items():
            if len(names) > 1:
                raise Violation(f"object {number} is served by {names}")
        for number, count in copies.items():
            if not count and self.copies.get(number, 1) and not self.doomed:
                raise Violation(f"the last safe copy of object {number} was discarded")
        self.copies = copies

    def settle(self) -> None:
        """Stop the faults, run until nothing happens, and look at what is left (G4)."""
        self.fuse = None
        for name, worker in self.workers.items():
            if worker.durable or not self.buries:
                self.restart(name)
        for name in self.workers:
            for peer, other in self.workers.items():
                if not other.up:
                    self.bury(name, peer)
        for pair, link in self.links.items():
            if link is not None and link.cut:
                for name in pair:
                    self.notice(pair, name)
            self.connect(pair)
        for _ in range(10_000):
            ways = [(s, r) for s in "ABC" for r in "ABC" if s != r and self.waiting(s, r)]
            if self.late and (not ways or self.rng.random() < 0.3):
                self.deliver_late(self.rng.randrange(len(self.late)))
            elif ways:
                self.deliver(*self.rng.choice(ways))
            else:
                break
        else:
            raise Violation("no end")
        for worker in [worker for worker in self.workers.values() if worker.up]:
            for what in ("staged", "withdrawn", "frozen"):
                if getattr(worker, what):
                    raise Violation(f"{worker.name}: {what} {getattr(worker, what)} left over")
            if set(worker.machine._ground.held) or any(worker.machine._departures.waiting.values()):
                raise Violation(f"{worker.name} still holds {worker.machine._ground.held}")
            if worker.durable and set(worker.records.values()) != set(worker.machine.snapshot()):
                raise Violation(f"{worker.name} keeps other records than its snapshot")
        served = [t for w in self.workers.values() for t in w.store.values()]
        for number, version in self.versions.items():
            found = [v for n, v in served if n == number]
            if len(found) != (1 if self.copies[number] else 0):
                raise Violation(f"object {number}: copies {found}")
            if found and found[0] != version and not self.volatile_crashes:
                raise Violation(f"object {number} has value {found[0]}, last written {version}")
        for transfer, (name, *_) in self.begun.items():
            if self.workers[name].up and transfer in self.workers[name].machine:
                self.begin_again(transfer)
                if not self.workers[name].answers.get(transfer):
                    raise Violation(f"transfer {transfer} was never answered")

    def waiting(self, sender: str, receiver: str) -> bool:
        link = self.links[min(sender, receiver), max(sender, receiver)]
        return link is not None and not link.cut and bool(link.queues[sender])


EVENTS = {
    "deliver": (12.0,),
    "connect": (5.0,),
    "begin": (0.7, 2.0),
    "late": (0.2, 1.0, 4.0),
    "cut": (0.2, 1.0),
    "notice": (2.0,),
    "begin again": (0.3, 2.0),
    "abort": (0.0, 0.3, 1.0),
    "write": (1.0,),
    "crash": (0.0, 0.2, 0.6),
    "fuse": (0.0, 0.2, 0.6),
    "restart": (0.5, 2.0),
    "bury": (0.0, 1.0),
    "give up": (0.0, 0.5),
    "lose": (0.0, 0.0, 0.3, 1.0),
    "unheard": (0.0, 0.5),
}
"""What may happen, and how often; each seed draws weights of its own, to be rich in what others lack."""


def simulate(seed: int, steps: int = 120) -> World:
    """Run one seed."""
    rng = random.Random(seed)
    mixed = (rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5)
    durable = rng.choice([(True, True, True), (False, False, False), mixed, mixed])
    world = World(durable, rng.choice((1, 1, 2, 3)), rng.choice((4096, 4096, 1, 0)))
    world.rng = rng
    world.refusing = rng.choice((0.0, 0.0, 0.1, 0.4))
    world.doubling = rng.choice((0.05, 0.4))
    world.buries = rng.random() < 0.5
    pairs = list(world.links)[: rng.choice((1, 3, 3))]
    names = sorted({name for pair in pairs for name in pair})
    for event in rng.choices(list(EVENTS), [rng.choice(w) for w in EVENTS.values()], k=steps):
        pair, name = rng.choice(pairs), rng.choice(names)
        recent = list(world.begun)[-4:]
        if event == "deliver":
            ways = [way for p in pairs for way in (p, p[::-1]) if world.waiting(*way)]
            if ways:
                world.deliver(*rng.choice(ways))
        elif event == "connect":
            world.connect(pair)
        elif event == "begin":
            world.begin(name, rng.randrange(3), rng.randrange(2))
        elif event == "late" and world.late:
            world.deliver_late(rng.randrange(len(world.late)))
        elif event == "cut":
            world.cut(pair)
        elif event == "notice":
            world.notice(pair, rng.choice(pair))
        elif event == "begin again" and recent:
            world.begin_again(rng.choice(recent))
        elif event == "abort" and recent:
            world.abort(rng.choice(recent))
        elif event == "write":
            world.write(name)
        elif event == "crash":
            world.crash(name)
        elif event == "fuse":
            world.fuse = rng.randrange(4)
        elif event == "restart":
            world.restart(name)
        elif event == "bury":
            world.bury(*rng.choice((pair, pair[::-1])))
        elif event == "give up":
            world.give_up(*rng.choice((pair, pair[::-1])))
        elif event == "lose":
            world.lose(*rng.choice((pair, pair[::-1])))
        elif event == "unheard":
            world.unheard(*rng.choice((pair, pair[::-1])))
    world.settle()
    return world


def test_seeds() -> None:
    moved = 0
    for seed in range(SEEDS):
        try:
            world = simulate(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        answers = [a[0] for w in world.workers.values() for a in w.answers.values()]
        moved += sum(isinstance(a, Done) for a in answers)
    assert moved > SEEDS / 5, "the seeds do not exercise what they should"


# --- The tables, row by row -------------------------------------------------------------------------------

ME, BOB, OBJECT, NEW, HOLDER = 10, 20, 5, 6, 7
PUSH = Push(1, 1, 1, NEW, HOLDER, durable=False, payload="bytes")
SAID: dict[type[TransferMessage], TransferMessage] = {
    Prepared: Prepared(1),
    Refused: Refused(1, "full"),
    Missing: Missing(1),
    Activated: Activated(1),
    Aborted: Aborted(1),
    Inquire: Inquire(1, 9),
    Push: PUSH,
    Probe: Probe(1),
    Commit: Commit(1),
    Abort: Abort(1, BOB, 1),
    Released: Released(1, 1),
}
SOURCE_ROWS = """
UNKNOWN    Prepared=Abort Inquire=Abort Activated=Released Refused= Missing= Aborted=
WAITING    Prepared=Abort Inquire=Abort Activated=! Refused= Missing= Aborted=
OUT        Prepared=Withdraw,Commit Inquire=Abort Activated=! Refused=Thaw,Failed Missing=Push Aborted=
COMMITTED  Prepared=Commit Inquire=Commit Activated=Drop,Released,Done
COMMITTED  Refused=Thaw,Failed Missing=Push Aborted=
ABORTING   Prepared= Inquire=Abort Activated=! Refused= Missing= Aborted=
MOVED      Prepared=Commit Inquire=Commit Activated=Released Refused= Missing= Aborted=
ABORTED    Prepared=Abort Inquire=Abort Activated=! Refused= Missing= Aborted=
"""
DESTINATION_ROWS = """
UNKNOWN    Push=Stage,Prepared Probe=Missing Commit=Missing Abort=Aborted Released=
STAGED     Push=Prepared Probe=Prepared Commit=Activate,Activated Abort=Discard,Aborted Released=
LIVE       Push=Activated Probe=Activated Commit=Activated Abort=Activated Released=
SETTLED    Push=Activated Probe=Activated Commit=Activated Abort=Activated Released=
ABORTED    Push=Refused Probe=Refused Commit=Refused Abort=Aborted Released=
"""
AFTER = {
    (Leaving.OUT, Prepared): Leaving.COMMITTED,
    (Leaving.OUT, Refused): Leaving.ABORTED,
    (Leaving.COMMITTED, Activated): Leaving.MOVED,
    (Leaving.COMMITTED, Refused): Leaving.ABORTED,
    (Leaving.ABORTING, Aborted): Leaving.ABORTED,
    (Leaving.ABORTING, Refused): Leaving.ABORTED,
    (Arriving.UNKNOWN, Push): Arriving.STAGED,
    (Arriving.UNKNOWN, Abort): Arriving.ABORTED,
    (Arriving.STAGED, Commit): Arriving.LIVE,
    (Arriving.STAGED, Abort): Arriving.ABORTED,
    (Arriving.LIVE, Released): Arriving.SETTLED,
}
"""Where a row leads; every other stays."""


def hear(machine: Transfers, *messages: TransferMessage) -> list[Effect]:
    """Feed messages of bob's; return the effects of the last."""
    effects: list[Effect] = []
    for message in messages:
        effects = machine.receive("bob", BOB, ME, message)
    return effects


def machine_in(state: Leaving | Arriving, *, durable: bool = False) -> Transfers:
    """Bring transfer 1 into a state."""
    machine = Transfers(ME, durable=durable)
    machine.peer_back("bob", BOB)
    if isinstance(state, Arriving):
        steps = {"UNKNOWN": 0, "STAGED": 1, "LIVE": 2, "SETTLED": 3, "ABORTED": 1}[state.name]
        hear(machine, *(PUSH, Commit(1), Released(1, 1))[:steps])
        if state is Arriving.ABORTED:
            hear(machine, Abort(1, BOB, 1))
    elif state is not Leaving.UNKNOWN:
        if state is Leaving.WAITING:
            machine.begin(2, OBJECT, "bob", 8, HOLDER)
        machine.begin(1, OBJECT, "bob", NEW, HOLDER)
        steps = {"COMMITTED": 1, "MOVED": 2}.get(state.name, 0)
        hear(machine, *(Prepared(1), Activated(1))[:steps])
        if state is Leaving.ABORTING:
            machine.abort(1)
        elif state is Leaving.ABORTED:
            hear(machine, Refused(1, "full"))
    assert state_of(machine, type(state)) is state
    return machine


def state_of(machine: Transfers, role: type) -> Leaving | Arriving:
    entry = (machine._departures if role is Leaving else machine._arrivals).entries.get(1)
    return entry.state if entry else role["UNKNOWN"]  # type: ignore[index]


def names(effects: list[Effect]) -> str:
    """Name effects as the tables above do."""
    return ",".join(type(e.message if isinstance(e, Send) else e).__name__ for e in effects)


def rows(text: str, role: type[Leaving | Arriving]) -> Iterable[tuple[Leaving | Arriving, str, str]]:
    for line in text.strip().splitlines():
        state, *cells = line.split()
        for cell in cells:
            kind, _, expected = cell.partition("=")
            yield role[state], kind, expected


ROWS = [*rows(SOURCE_ROWS, Leaving), *rows(DESTINATION_ROWS, Arriving)]


def check_row(state: Leaving | Arriving, kind: str, expected: str) -> None:
    machine = machine_in(state)
    message = next(m for k, m in SAID.items() if k.__name__ == kind)
    if expected == "!":
        with pytest.raises(ProtocolError):
            hear(machine, message)
    else:
        assert names(hear(machine, message)) == expected
    assert state_of(machine, type(state)) is AFTER.get((state, type(message)), state)


@pytest.mark.parametrize(("state", "kind", "expected"), ROWS, ids=[f"{s}-{k}" for s, k, _ in ROWS])
def test_row(state: Leaving | Arriving, kind: str, expected: str) -> None:
    check_row(state, kind, expected)


def test_every_row_is_tested() -> None:
    tested = {(state, kind) for state, kind, expected in ROWS if expected != "!"}
    assert tested == {(state, kind.__name__) for state, kind in (*DEPARTURES, *ARRIVALS)}


def test_what_a_push_carries() -> None:
    machine = Transfers(ME, durable=True)
    machine.peer_back("bob", BOB)
    effects = machine.begin(1, OBJECT, "bob", NEW, HOLDER)
    assert effects == [Freeze(OBJECT), Send("bob", Push(1, 1, 1, NEW, HOLDER, durable=True), OBJECT)]
    _, send = machine.begin(2, 8, "bob", 9, HOLDER)
    assert isinstance(send, Send) and isinstance(send.message, Push)
    assert (send.message.number, send.message.oldest) == (2, 1)


def test_durable_records_come_first() -> None:
    machine = machine_in(Leaving.OUT, durable=True)
    assert names(hear(machine, Prepared(1))) == "Record,Withdraw,Commit"
    assert names(hear(machine, Activated(1))) == "Record,Drop,Released,Done"
    machine = machine_in(Arriving.UNKNOWN, durable=True)
    assert names(hear(machine, PUSH)) == "Stage,Record,Prepared"
    assert names(hear(machine, Commit(1))) == "Record,Activate,Activated"
    assert hear(machine, Released(1, 1)) == [Record(1, None)]


def test_forgetting_comes_after_the_drop() -> None:
    machine = Transfers(ME, durable=True, remembered=0)
    machine.peer_back("bob", BOB)
    machine.begin(1, OBJECT, "bob", NEW, HOLDER)
    assert names(hear(machine, Prepared(1), Activated(1))) == "Record,Drop,Released,Done,Record"
    assert machine.snapshot() == () and 1 not in machine


@pytest.mark.parametrize("state", [s for s in Leaving if s is not Leaving.UNKNOWN])
def test_begin_again(state: Leaving) -> None:
    machine = machine_in(state)
    answer = machine.begin(1, OBJECT, "bob", NEW, HOLDER)
    assert names(answer) == {"MOVED": "Done", "ABORTING": "Failed", "ABORTED": "Failed"}.get(state.name, "")
    assert machine.begin(1, OBJECT, "bob", NEW, HOLDER) == answer
    with pytest.raises(ValueError, match="transfer 1 is known"):
        machine.begin(1, OBJECT, "bob", NEW + 1, HOLDER)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (Leaving.WAITING, "Failed"),
        (Leaving.OUT, "Thaw,Failed,Abort"),
        (Leaving.COMMITTED, ""),
        (Leaving.ABORTING, ""),
        (Leaving.MOVED, ""),
        (Leaving.ABORTED, ""),
    ],
)
def test_abort(state: Leaving, expected: str) -> None:
    machine = machine_in(state)
    assert names(machine.abort(1)) == expected
    assert machine.abort(1) == []


def test_abort_of_what_nobody_has_seen_needs_no_acknowledgement() -> None:
    machine = Transfers(ME)
    assert names(machine.begin(1, OBJECT, "bob", NEW, HOLDER)) == "Freeze"
    assert names(machine.abort(1)) == "Thaw,Failed"
    assert names(machine.begin(2, OBJECT, "alice", NEW, HOLDER)) == "Freeze"


def test_a_waiting_transfer_starts_when_its_object_is_free() -> None:
    machine = machine_in(Leaving.ABORTING)
    assert machine.begin(2, OBJECT, "bob", 8, HOLDER) == []
    assert names(hear(machine, Aborted(1))) == "Freeze,Push"
    machine = machine_in(Arriving.LIVE)
    assert machine.begin(2, NEW, "bob", 8, HOLDER) == []
    assert names(hear(machine, Released(1, 2))) == "Freeze,Push"
    machine = machine_in(Leaving.WAITING)
    assert names(hear(machine, Prepared(2), Activated(2))) == "Drop,Released,Done,Failed"


@pytest.mark.parametrize(
    ("state", "expected"),
    [(Leaving.OUT, "Probe"), (Leaving.COMMITTED, "Commit"), (Leaving.ABORTING, "Abort"), (Leaving.MOVED, "")]
    + [(Arriving.STAGED, "Prepared"), (Arriving.LIVE, "Activated"), (Arriving.SETTLED, ""), (Arriving.ABORTED, "")],
)
def test_peer_back(state: Leaving | Arriving, expected: str) -> None:
    machine = machine_in(state)
    machine.peer_lost("bob")
    assert names(machine.peer_back("bob", BOB)) == expected
    assert state_of(machine, type(state)) is state


@pytest.mark.parametrize(
    ("state", "expected", "after"),
    [
        (Leaving.WAITING, "Failed,Thaw,Failed", Leaving.ABORTED),
        (Leaving.OUT, "Thaw,Failed", Leaving.ABORTED),
        (Leaving.COMMITTED, "Thaw,Failed", Leaving.ABORTED),
        (Leaving.ABORTING, "", Leaving.ABORTED),
        (Leaving.MOVED, "", Leaving.MOVED),
        (Leaving.ABORTED, "", Leaving.ABORTED),
        (Arriving.STAGED, "Activate", Arriving.UNKNOWN),
        (Arriving.LIVE, "", Arriving.UNKNOWN),
        (Arriving.SETTLED, "", Arriving.UNKNOWN),
        (Arriving.ABORTED, "", Arriving.UNKNOWN),
    ],
)
def test_peer_dead(state: Leaving | Arriving, expected: str, after: Leaving | Arriving) -> None:
    machine = machine_in(state)
    assert names(machine.peer_dead("bob")) == expected
    assert state_of(machine, type(state)) is after
    assert not machine._ground.held and machine.open_peers() == set()
    assert machine.peer_dead("bob") == []


def test_the_death_of_a_stranger() -> None:
    machine = Transfers(ME)
    machine.begin(1, OBJECT, "bob", NEW, HOLDER)
    assert names(machine.peer_dead("bob")) == "Thaw,Failed"
    assert machine.peer_dead("charlie") == []


def test_what_a_durable_worker_has_pushed_waits_for_it() -> None:
    machine = Transfers(ME)
    machine.peer_back("bob", BOB)
    hear(machine, attrs.evolve(PUSH, durable=True))
    assert machine.peer_dead("bob") == []
    assert state_of(machine, Arriving) is Arriving.STAGED


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (Leaving.WAITING, "Failed,Thaw,Failed"),
        (Leaving.OUT, "Thaw,Failed"),
        (Leaving.COMMITTED, ""),
        (Leaving.ABORTING, ""),
        (Leaving.MOVED, ""),
        (Leaving.ABORTED, ""),
        (Arriving.STAGED, ""),
        (Arriving.LIVE, ""),
        (Arriving.SETTLED, ""),
        (Arriving.ABORTED, ""),
    ],
)
def test_give_up(state: Leaving | Arriving, expected: str) -> None:
    machine = machine_in(state)
    machine.peer_lost("bob")
    assert names(machine.give_up("bob", "away")) == expected
    assert machine.give_up("bob", "away") == []
    again = {Leaving.OUT: "Abort", Leaving.WAITING: "Abort", Leaving.ABORTING: "Abort", Leaving.COMMITTED: "Commit"}
    again |= {Arriving.STAGED: "Prepared", Arriving.LIVE: "Activated"}  # type: ignore[dict-item]
    assert names(machine.peer_back("bob", BOB)) == again.get(state, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "open_"),
    [(Leaving.WAITING, True), (Leaving.OUT, True), (Leaving.COMMITTED, True), (Leaving.ABORTING, True), (Leaving.MOVED, False)]
    + [(Arriving.STAGED, True), (Arriving.LIVE, True), (Arriving.SETTLED, False), (Arriving.ABORTED, False)],
)
def test_with_whom_something_is_open(state: Leaving | Arriving, open_: bool) -> None:
    assert machine_in(state).open_peers() == ({"bob"} if open_ else set())


def test_who_is_given_up_or_dead_is_that_alone() -> None:
    for far in ("give_up", "peer_dead"):
        machine = Transfers(ME)
        machine.peer_back("bob", BOB)
        machine.peer_back("charlie", 30)
        machine.begin(1, OBJECT, "bob", NEW, HOLDER)
        hear(machine, attrs.evolve(PUSH, transfer=2))
        assert (machine.give_up("charlie", "away") if far == "give_up" else machine.peer_dead("charlie")) == []
        assert (state_of(machine, Leaving), machine.open_peers()) == (Leaving.OUT, {"bob"})


def test_an_object_that_was_given_up_goes_elsewhere_when_that_is_acknowledged() -> None:
    machine = machine_in(Leaving.OUT)
    machine.peer_back("charlie", 30)
    machine.peer_lost("bob")
    machine.give_up("bob", "away")
    assert machine.begin(2, OBJECT, "charlie", NEW, HOLDER) == []
    machine.peer_back("bob", BOB)
    assert names(hear(machine, Aborted(1))) == "Freeze,Push"


def test_an_orphan() -> None:
    machine = machine_in(Arriving.STAGED)
    assert names(machine.peer_back("bob", 21)) == "Activate,Activated"
    machine = Transfers(ME)
    machine.peer_back("bob", BOB)
    hear(machine, attrs.evolve(PUSH, durable=True))
    assert machine.peer_back("bob", 21) == [Send("bob", Inquire(1, BOB))]
    assert names(machine.receive("bob", 21, ME, Probe(1))) == "Missing"
    assert names(machine.receive("bob", 21, ME, Commit(1))) == "Activate,Activated"


def test_a_later_life_pushes_again() -> None:
    machine = Transfers(ME)
    machine.peer_back("bob", BOB)
    hear(machine, attrs.evolve(PUSH, durable=True))
    machine.peer_back("bob", 21)
    assert names(machine.receive("bob", 21, ME, attrs.evolve(PUSH, payload="new"))) == "Stage,Prepared"
    assert machine.receive("bob", 21, ME, Abort(1, BOB, 1)) == []
    assert names(machine.receive("bob", 21, ME, Commit(1))) == "Activate,Activated"


def test_late_copies_are_known_without_a_tombstone() -> None:
    machine = machine_in(Arriving.LIVE)
    hear(machine, Push(2, 2, 1, 8, HOLDER, durable=False), Commit(2), Released(2, 1))
    assert names(hear(machine, Push(2, 2, 1, 8, HOLDER, durable=False))) == "Activated"  # 1 is unfinished
    hear(machine, Released(1, 3))
    assert 1 not in machine and 2 not in machine
    assert hear(machine, Push(2, 2, 1, 8, HOLDER, durable=False)) == []
    assert names(hear(machine, Abort(2, BOB, 2))) == "Aborted"
    assert 2 not in machine


def test_memory_is_bounded() -> None:
    source, destination = Transfers(1, remembered=10), Transfers(2)
    source.peer_back("bob", 2)
    destination.peer_back("alice", 1)
    for transfer in range(1, 1000):
        effects = source.begin(transfer, 2 * transfer, "bob", 2 * transfer + 1, HOLDER)
        for _ in range(3):
            sent = [e.message for e in effects if isinstance(e, Send)]
            back = [b for m in sent for b in destination.receive("alice", 1, 2, m)]
            effects = [e for b in back if isinstance(b, Send) for e in source.receive("bob", 2, 1, b.message)]
    assert repr(source) == "<Transfers: 10 departures, 0 arrivals>"
    assert repr(destination) == "<Transfers: 0 departures, 0 arrivals>"
    assert not destination._ground.held and not source._ground.held and not source._ground.peers["bob"].opened


def test_refuse() -> None:
    machine = machine_in(Arriving.STAGED)
    assert machine.refuse(1, "full") == [Discard(1), Send("bob", Refused(1, "full"))]
    with pytest.raises(ValueError, match="not staged"):
        machine.refuse(1, "full")


def test_whose_fault() -> None:
    machine = machine_in(Leaving.OUT)
    for incarnation, addressed in ((BOB, 11), (21, ME)):
        with pytest.raises(StaleIncarnationError):
            machine.receive("bob", incarnation, addressed, Prepared(1))
    with pytest.raises(StaleIncarnationError):
        machine.receive("stranger", 1, ME, Prepared(1))
    machine.peer_back("mallory", 30)
    messages: list[TransferMessage] = [Prepared(1), PUSH]
    for message in messages:
        with pytest.raises(ProtocolError, match="mallory has no part"):
            machine.receive("mallory", 30, ME, message)
    for message in [PUSH, TransferMessage(1), TransferMessage(99)]:
        with pytest.raises(ProtocolError):
            hear(machine, message)
    assert state_of(machine, Leaving) is Leaving.OUT
    with pytest.raises(ValueError, match="not known"):
        machine.abort(99)
    with pytest.raises(ValueError, match="it comes from bob"):
        machine_in(Arriving.STAGED).begin(1, OBJECT, "bob", NEW, HOLDER)
    with pytest.raises(ValueError, match="restore comes before"):
        machine.restore(())


@pytest.mark.parametrize(
    ("state", "expected"),
    [(Leaving.COMMITTED, [Withdraw(OBJECT)]), (Leaving.MOVED, [Drop(OBJECT)]), (Leaving.OUT, [])]
    + [(Arriving.STAGED, []), (Arriving.LIVE, [Activate(1, NEW, HOLDER)]), (Arriving.SETTLED, [])],
)
def test_restore(state: Leaving | Arriving, expected: list[Effect]) -> None:
    entries = machine_in(state, durable=True).snapshot()
    machine = Transfers(11, durable=True)
    assert machine.restore(entries) == expected
    assert (1 in machine) is bool(entries)
    again = {Leaving.COMMITTED: "Commit", Arriving.STAGED: "Prepared", Arriving.LIVE: "Activated"}.get(state, "")
    assert names(machine.peer_back("bob", BOB)) == again


def test_after_a_refused_second_push_the_source_serves() -> None:
    world = World((False, False, False), 1)
    world.connect(("A", "B"))
    world.deliver("A", "B")
    world.deliver("B", "A")
    world.begin("A", 0, 0)
    world.deliver("A", "B")
    world.deliver("B", "A")
    alice, bob = world.workers["A"], world.workers["B"]
    assert alice.withdrawn and bob.staged
    world.crash("B")
    world.restart("B")
    world.notice(("A", "B"), "A")
    world.connect(("A", "B"))
    world.refusing = 1.0
    for sender, receiver in ("AB", "BA", "AB", "BA", "AB"):  # greetings, Commit, Missing, Push
        assert alice.withdrawn and world.deliver(sender, receiver)
    world.cut(("A", "B"))  # what is in flight now is the refusal
    world.late.clear()
    world.settle()
    assert list(alice.serving()) and not bob.store
    assert [names(answer) for answer in alice.answers.values()] == ["Failed,Failed"]


# --- The tests bite ---------------------------------------------------------------------------------------

Mutation = Callable[[pytest.MonkeyPatch], None]
LEAVING: Any = DEPARTURES  # which are read-only to everybody else
ARRIVING: Any = ARRIVALS


def row(table: Any, state: Leaving | Arriving, kind: type[TransferMessage], step: Any) -> Mutation:
    """Replace one row of a table."""
    return lambda patch: patch.setitem(table, (state, kind), step)


def nothing(*_: Any) -> list[Effect]:
    return []


def unless(owner: type, method: str, state: Leaving | Arriving) -> Mutation:
    """Let a method do nothing in one state."""
    original = getattr(owner, method)

    def mutant(self: Any, known: Any, *rest: Any) -> list[Effect]:
        return [] if known.state is state else list(original(self, known, *rest))

    return lambda patch: patch.setattr(owner, method, mutant)


def believe_everybody(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.receive

    def receive(self: Transfers, peer: str, inc: int, to: int, message: TransferMessage) -> list[Effect]:
        link = self._ground.peers.get(peer)
        return original(self, peer, link.incarnation if link else inc, self.incarnation, message)

    patch.setattr(Transfers, "receive", receive)


def believe_the_dead(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.receive

    def receive(self: Transfers, peer: str, inc: int, to: int, message: TransferMessage) -> list[Effect]:
        link = self._ground.peers.get(peer)
        return original(self, peer, link.incarnation if link else inc, to, message)

    patch.setattr(Transfers, "receive", receive)


def believe_mail_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.receive

    def receive(self: Transfers, peer: str, inc: int, to: int, message: TransferMessage) -> list[Effect]:
        return original(self, peer, inc, self.incarnation, message)

    patch.setattr(Transfers, "receive", receive)


def roll_back(self: Departures, known: Departure, message: Missing) -> list[Effect]:
    return self.refused(known, Refused(known.transfer, "the destination came back empty"))


def abort_without_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    original = Departures.abort

    def mutant(self: Departures, known: Departure, reason: str) -> list[Effect]:
        effects = original(self, known, reason)
        left = self.entries.get(known.transfer)
        if left is not None and left.state is Leaving.ABORTING:
            effects += self._close(left)
        return effects

    patch.setattr(Departures, "abort", mutant)


def abort_after_commit(patch: pytest.MonkeyPatch) -> None:
    original = Departures.abort

    def mutant(self: Departures, known: Departure, reason: str) -> list[Effect]:
        if known.state is Leaving.COMMITTED:
            known = attrs.evolve(known, state=Leaving.OUT)
        return original(self, known, reason)

    patch.setattr(Departures, "abort", mutant)


def drop_on_commit(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Departures, known: Departure, message: Prepared) -> list[Effect]:
        return [*self.commit_again(known), *self.finish(known, Activated(known.transfer))]

    patch.setitem(LEAVING, (Leaving.OUT, Prepared), mutant)


def arrival_moves_on_at_once(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.activate

    def mutant(self: Arrivals, known: Any, message: Any = None) -> list[Effect]:
        effects = original(self, known, message)
        del self.ground.held[known.new_id]
        return effects

    def settle(self: Arrivals, known: Any, message: Released) -> list[Effect]:
        onward = self.ground.held.get(known.new_id)
        if onward in (None, known.transfer):
            return self.settle(known, message)
        self.entries[known.transfer] = attrs.evolve(known, state=Arriving.SETTLED)
        return self.ground.record(known.transfer, None)

    patch.setattr(Arrivals, "activate", mutant)
    patch.setitem(ARRIVING, (Arriving.STAGED, Commit), mutant)
    patch.setitem(ARRIVING, (Arriving.LIVE, Released), settle)


def resume_staged(durable: bool, decide: Any) -> Mutation:
    """Let a destination whose source has a new life decide in another way."""
    original = Arrivals.resume

    def mutant(self: Arrivals, known: Any) -> list[Effect]:
        stranger = known.life != self.ground.peers[known.source].incarnation
        if known.state is Arriving.STAGED and stranger and known.durable is durable:
            return list(decide(self, known))
        return original(self, known)

    return lambda patch: patch.setattr(Arrivals, "resume", mutant)


def throw_away(self: Arrivals, known: Any) -> list[Effect]:
    return self.refuse(known, "the source has died")


def forget(state: Arriving, method: str) -> Mutation:
    """Let a destination keep no tombstone."""
    original = getattr(Arrivals, method)

    def mutant(self: Arrivals, known: Any, message: Any) -> list[Effect]:
        effects = list(original(self, known, message))
        if known.transfer in self.entries and self.entries[known.transfer].state is state:
            del self.entries[known.transfer]
        return effects

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Arrivals, method, mutant)
        for key, step in list(ARRIVALS.items()):
            if step is original:
                patch.setitem(ARRIVING, key, mutant)

    return apply


def no_floor(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.stage

    def mutant(self: Arrivals, known: Any, message: Push) -> list[Effect]:
        self.ground.peers[known.source].floor = 1
        return original(self, known, message)

    for state in (Arriving.UNKNOWN, Arriving.STAGED):
        patch.setitem(ARRIVING, (state, Push), mutant)


def floor_too_high(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Peer, "oldest", property(lambda self: self.next_number))


def keep_the_floor(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.peer_back

    def mutant(self: Transfers, peer: str, incarnation: int) -> list[Effect]:
        known = self._ground.peers.get(peer)
        floor = known.floor if known else 1
        effects = original(self, peer, incarnation)
        self._ground.peers[peer].floor = floor
        return effects

    patch.setattr(Transfers, "peer_back", mutant)


def staged_is_staged(patch: pytest.MonkeyPatch) -> None:
    """Keep what an earlier life pushed, when the next pushes again."""

    def mutant(self: Arrivals, known: Any, message: TransferMessage) -> list[Effect]:
        return self.ground.send(known.source, Prepared(known.transfer))

    patch.setitem(ARRIVING, (Arriving.STAGED, Push), mutant)
    patch.setitem(ARRIVING, (Arriving.STAGED, Probe), mutant)


def abort_any_life(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.discard

    def mutant(self: Arrivals, known: Any, message: Abort) -> list[Effect]:
        return original(self, known, attrs.evolve(message, life=self.ground.peers[known.source].incarnation))

    for state in (Arriving.UNKNOWN, Arriving.STAGED):
        patch.setitem(ARRIVING, (state, Abort), mutant)


def record_nothing(role: type) -> Mutation:
    """Let a durable worker forget what it decided."""

    def mutant(self: Ground, transfer: int, entry: Entry | None) -> list[Effect]:
        return [] if isinstance(entry, role) or not self.durable else [Record(transfer, entry)]

    return lambda patch: patch.setattr(Ground, "record", mutant)


def record_last(patch: pytest.MonkeyPatch) -> None:
    """Tell the peer before the decision is safe."""
    original = Departures.commit

    def mutant(self: Departures, known: Any, message: Prepared) -> list[Effect]:
        effects = original(self, known, message)
        return sorted(effects, key=lambda effect: isinstance(effect, Record))

    patch.setitem(LEAVING, (Leaving.OUT, Prepared), mutant)


def record_staged_last(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.stage

    def mutant(self: Arrivals, known: Any, message: Push) -> list[Effect]:
        effects = original(self, known, message)
        return sorted(effects, key=lambda effect: isinstance(effect, Record))

    for state in (Arriving.UNKNOWN, Arriving.STAGED):
        patch.setitem(ARRIVING, (state, Push), mutant)


def restore_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transfers, "restore", lambda self, entries: [])


def restore_no_effects(role: type) -> Mutation:
    original = role.restore  # type: ignore[attr-defined]

    def mutant(self: Any, entry: Any) -> list[Effect]:
        original(self, entry)
        return []

    return lambda patch: patch.setattr(role, "restore", mutant)


def never_wait(patch: pytest.MonkeyPatch) -> None:
    def finish(self: Departures, known: Departure, message: Activated) -> list[Effect]:
        self.ground.held.setdefault(known.object_id, known.transfer)
        return self.finish(known, message)

    patch.setitem(LEAVING, (Leaving.COMMITTED, Activated), finish)
    patch.setattr(Departures, "begin", lambda self, asked: self._start(asked))


def not_orphaned(role: type, *states: Leaving | Arriving) -> Mutation:
    """Let the death of a peer change nothing for what is in some states."""
    original = role.orphaned  # type: ignore[attr-defined]

    def departures(self: Departures, peer: str) -> list[Effect]:
        kept = {t: known for t, known in self.entries.items() if known.state in states and known.destination == peer}
        for transfer in kept:
            del self.entries[transfer]
        effects = list(original(self, peer))
        self.entries |= kept
        return effects

    def arrivals(self: Arrivals, known: Any) -> list[Effect]:
        return [] if known.state in states else list(original(self, known))

    return lambda patch: patch.setattr(role, "orphaned", departures if role is Departures else arrivals)


def hear_the_dead(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.peer_dead

    def mutant(self: Transfers, peer: str) -> list[Effect]:
        known = self._ground.peers.get(peer)
        effects = original(self, peer)
        if known is not None:
            self._ground.peers[peer].incarnation = known.incarnation
        return effects

    patch.setattr(Transfers, "peer_dead", mutant)


def change_orphaned(change: Callable[[Any, Any, list[Effect]], list[Effect]]) -> Mutation:
    """Let a destination do something else when the source of an arrival is dead."""
    original = Arrivals.orphaned

    def mutant(self: Arrivals, known: Any) -> list[Effect]:
        return change(self, known, original(self, known))

    return lambda patch: patch.setattr(Arrivals, "orphaned", mutant)


def keep_entry(self: Arrivals, known: Any, effects: list[Effect]) -> list[Effect]:
    self.entries[known.transfer] = known
    return effects


def promote_all(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.orphaned
    patch.setattr(Arrivals, "orphaned", lambda self, known: original(self, attrs.evolve(known, durable=False)))


def keep_the_line(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.peer_dead

    def mutant(self: Transfers, peer: str) -> list[Effect]:
        linked = peer in self._ground.peers and self._ground.peers[peer].linked
        effects = original(self, peer)
        if linked:
            self._ground.peers[peer].linked = True
        return effects

    patch.setattr(Transfers, "peer_dead", mutant)


def speak_to_the_dead(patch: pytest.MonkeyPatch) -> None:
    """Note that they cannot hear only after all has been said."""
    original = Transfers.peer_dead

    def mutant(self: Transfers, peer: str) -> list[Effect]:
        effects: list[Effect] = []
        for known in [a for a in self._arrivals.entries.values() if a.source == peer]:
            effects += self._arrivals.orphaned(known)
        return self._departures.orphaned(peer) + effects + original(self, peer)

    patch.setattr(Transfers, "peer_dead", mutant)


def bury_everybody(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.peer_dead

    def mutant(self: Transfers, peer: str) -> list[Effect]:
        return [e for other in sorted({peer, *self._ground.peers}) for e in original(self, other)]

    patch.setattr(Transfers, "peer_dead", mutant)


def in_any_order(patch: pytest.MonkeyPatch) -> None:
    def leaving_for(self: Departures, peer: str) -> list[Departure]:
        return [known for known in self.entries.values() if known.destination == peer]

    patch.setattr(Departures, "leaving_for", leaving_for)


def serve_without(kind: type) -> Mutation:
    original = Departures._serve

    def mutant(self: Departures, known: Departure, reason: str) -> list[Effect]:
        return [effect for effect in original(self, known, reason) if not isinstance(effect, kind)]

    return lambda patch: patch.setattr(Departures, "_serve", mutant)


def serve_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Serve again what was leaving, and never let it leave again."""
    original = Departures._serve

    def mutant(self: Departures, known: Departure, reason: str) -> list[Effect]:
        effects = original(self, known, reason)
        self.ground.held.setdefault(known.object_id, known.transfer)
        return effects

    patch.setattr(Departures, "_serve", mutant)


def give_up_unless(state: Leaving) -> Mutation:
    original = Transfers.give_up

    def mutant(self: Transfers, peer: str, reason: str) -> list[Effect]:
        kept = {t: d for t, d in self._departures.entries.items() if d.state is state and d.destination == peer}
        for transfer in kept:
            del self._departures.entries[transfer]
        effects = original(self, peer, reason)
        self._departures.entries |= kept
        return effects

    return lambda patch: patch.setattr(Transfers, "give_up", mutant)


def give_up_the_committed(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.give_up

    def mutant(self: Transfers, peer: str, reason: str) -> list[Effect]:
        committed = [d for d in self._departures.leaving_for(peer) if d.state is Leaving.COMMITTED]
        effects = [e for known in committed for e in self._departures._serve(known, reason)]
        return effects + original(self, peer, reason)

    patch.setattr(Transfers, "give_up", mutant)


def give_up_at_once(patch: pytest.MonkeyPatch) -> None:
    """Do not wait until an abort is acknowledged."""
    original = Transfers.give_up

    def mutant(self: Transfers, peer: str, reason: str) -> list[Effect]:
        effects = original(self, peer, reason)
        for known in [d for d in self._departures.leaving_for(peer) if d.state is Leaving.ABORTING]:
            effects += self._departures._close(known)
        return effects

    patch.setattr(Transfers, "give_up", mutant)


def give_up_everybody(patch: pytest.MonkeyPatch) -> None:
    original = Transfers.give_up

    def mutant(self: Transfers, peer: str, reason: str) -> list[Effect]:
        others = {known.destination for known in self._departures.entries.values()}
        return [e for other in sorted({peer, *others}) for e in original(self, other, reason)]

    patch.setattr(Transfers, "give_up", mutant)


def wait_for_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transfers, "open_peers", lambda self: set())


def no_second_announcement(patch: pytest.MonkeyPatch) -> None:
    original = Arrivals.resume

    def mutant(self: Arrivals, known: Any) -> list[Effect]:
        same = known.life == self.ground.peers[known.source].incarnation
        return [] if same and known.state is Arriving.STAGED else original(self, known)

    patch.setattr(Arrivals, "resume", mutant)


MUTATIONS: dict[str, Mutation] = {
    "a staged arrival is not announced again": no_second_announcement,
    "what leaves for the dead is not served again": not_orphaned(Departures, Leaving.OUT),
    "what is committed to the dead is not served again": not_orphaned(Departures, Leaving.COMMITTED),
    "an abort waits for the dead": not_orphaned(Departures, Leaving.ABORTING),
    "what waits to leave for the dead goes on waiting": not_orphaned(Departures, Leaving.WAITING),
    "what the dead have pushed is not promoted": not_orphaned(Arrivals, Arriving.STAGED),
    "what came from the dead may not move on": not_orphaned(Arrivals, Arriving.LIVE),
    "the dead are heard when they are late": hear_the_dead,
    "one speaks to the dead afterwards": keep_the_line,
    "one speaks to the dead before": speak_to_the_dead,
    "with one all are dead": bury_everybody,
    "what came from the dead stays open": change_orphaned(keep_entry),
    "the record of what came from the dead stays": change_orphaned(
        lambda self, known, effects: [e for e in effects if not (isinstance(e, Record) and e.entry is None)]
    ),
    "what a durable worker has pushed is promoted when it is away": promote_all,
    "what waits for its turn gets it when it is given up": in_any_order,
    "the record of what was committed to the dead stays": serve_without(Record),
    "nobody is told that what left for the dead is served again": serve_without(Failed),
    "what was leaving for the dead leaves no more": serve_for_ever,
    "what waits is not given up": give_up_unless(Leaving.WAITING),
    "what is offered is not given up": give_up_unless(Leaving.OUT),
    "what is committed is given up": give_up_the_committed,
    "who gives up does not wait for an acknowledgement": give_up_at_once,
    "with one all are given up": give_up_everybody,
    "nobody is asked again when the other side has lost its session": wait_for_nobody,
    "giving up does nothing": lambda patch: patch.setattr(Transfers, "give_up", nothing),
    "stale incarnations are believed": believe_everybody,
    "the sender's incarnation is not looked at": believe_the_dead,
    "the addressed incarnation is not looked at": believe_mail_for_the_dead,
    "an offered departure is not probed": unless(Departures, "resume", Leaving.OUT),
    "a committed one is not committed again": unless(Departures, "resume", Leaving.COMMITTED),
    "an abort is not repeated": unless(Departures, "resume", Leaving.ABORTING),
    "a live arrival is not announced again": unless(Arrivals, "resume", Arriving.LIVE),
    "an empty destination gets no second push": row(DEPARTURES, Leaving.COMMITTED, Missing, nothing),
    "an empty destination makes the source roll back": row(DEPARTURES, Leaving.COMMITTED, Missing, roll_back),
    "a lost push is not repeated": row(DEPARTURES, Leaving.OUT, Missing, nothing),
    "a commit is not taken back when refused": row(DEPARTURES, Leaving.COMMITTED, Refused, nothing),
    "a refusal is not heard": row(DEPARTURES, Leaving.OUT, Refused, nothing),
    "a refusal does not acknowledge an abort": row(DEPARTURES, Leaving.ABORTING, Refused, nothing),
    "an abort is possible after the commit": abort_after_commit,
    "an abort needs no acknowledgement": abort_without_acknowledgement,
    "the source drops its copy when it commits": drop_on_commit,
    "a committed source does not answer an inquiry": row(
        DEPARTURES, Leaving.COMMITTED, Inquire, Departures.disown
    ),
    "a source without a record does not answer": row(DEPARTURES, Leaving.UNKNOWN, Inquire, nothing),
    "an unknown Activated is not answered": row(DEPARTURES, Leaving.UNKNOWN, Activated, nothing),
    "a second Activated is not answered": row(DEPARTURES, Leaving.MOVED, Activated, nothing),
    "a commit is not asked for when it finds nothing": row(ARRIVALS, Arriving.UNKNOWN, Commit, nothing),
    "a probe that finds nothing is not answered": row(ARRIVALS, Arriving.UNKNOWN, Probe, nothing),
    "a probe of a staged copy is not answered": row(ARRIVALS, Arriving.STAGED, Probe, nothing),
    "a probe of a refused copy is not answered": row(ARRIVALS, Arriving.ABORTED, Probe, nothing),
    "a commit to who refused is not answered": row(ARRIVALS, Arriving.ABORTED, Commit, nothing),
    "a second Abort is not acknowledged": row(ARRIVALS, Arriving.ABORTED, Abort, nothing),
    "a second Commit is not answered": row(ARRIVALS, Arriving.LIVE, Commit, nothing),
    "an Abort destroys what is live": row(ARRIVALS, Arriving.LIVE, Abort, Arrivals.discard),
    "an orphan of a durable source does not ask": resume_staged(True, nothing),
    "an orphan of a durable source is promoted": resume_staged(True, Arrivals.activate),
    "an orphan of a durable source is thrown away": resume_staged(True, throw_away),
    "an orphan of a volatile source is not promoted": resume_staged(False, nothing),
    "an orphan of a volatile source is thrown away": resume_staged(False, throw_away),
    "an arrival moves on before it is released": arrival_moves_on_at_once,
    "an arrival is never settled": row(ARRIVALS, Arriving.LIVE, Released, nothing),
    "no tombstone of a settled arrival": forget(Arriving.SETTLED, "settle"),
    "no tombstone of an aborted arrival": forget(Arriving.ABORTED, "discard"),
    "no tombstone of a refused arrival": forget(Arriving.ABORTED, "refuse"),
    "no floor below which a push is late": no_floor,
    "a floor above what is unfinished": floor_too_high,
    "a floor that outlives the source": keep_the_floor,
    "a later life's push does not replace": staged_is_staged,
    "an abort of a dead life ends the present push": abort_any_life,
    "no record of departures": record_nothing(protocol.Departure),
    "no record of arrivals": record_nothing(protocol.Arrival),
    "the commit is recorded last": record_last,
    "the staged copy is recorded last": record_staged_last,
    "nothing is restored": restore_nothing,
    "what was withdrawn is served after a restart": restore_no_effects(Departures),
    "what was cut off is not activated after a restart": restore_no_effects(Arrivals),
    "a transfer does not wait for another": never_wait,
}

UNSEEN: dict[str, Callable[[], None]] = {
    "a staged arrival is not announced again": lambda: test_peer_back(Arriving.STAGED, "Prepared"),
    "what a durable worker has pushed is promoted when it is away": lambda: test_what_a_durable_worker_has_pushed_waits_for_it(),
    "who gives up does not wait for an acknowledgement": (
        lambda: test_an_object_that_was_given_up_goes_elsewhere_when_that_is_acknowledged()
    ),
    "with one all are given up": lambda: test_who_is_given_up_or_dead_is_that_alone(),
    "no tombstone of an aborted arrival": lambda: check_row(Arriving.ABORTED, "Push", "Refused"),
    "a commit to who refused is not answered": test_after_a_refused_second_push_the_source_serves,
    "a refusal does not acknowledge an abort": lambda: check_row(Leaving.ABORTING, "Refused", ""),
    "a committed source does not answer an inquiry": lambda: check_row(
        Leaving.COMMITTED, "Inquire", "Commit"
    ),
    "a probe of a staged copy is not answered": lambda: check_row(Arriving.STAGED, "Probe", "Prepared"),
    "a second Commit is not answered": lambda: check_row(Arriving.LIVE, "Commit", "Activated"),
    "an orphan of a durable source is thrown away": test_an_orphan,
    "no tombstone of a settled arrival": test_late_copies_are_known_without_a_tombstone,
    "a later life's push does not replace": test_a_later_life_pushes_again,
    "an abort of a dead life ends the present push": (test_a_later_life_pushes_again),
}
"""Rules that the seeds do not miss, and who does: the first needs a rare sequence, the lack of the others is
made good by another rule, at the price of a failed transfer or of a second push."""

RARE = {
    "the staged copy is recorded last": 18960,
    "an Abort destroys what is live": 18891,
    "an abort needs no acknowledgement": 7247,
    "a floor that outlives the source": 2352,
    "the addressed incarnation is not looked at": 1865,
    "a probe of a refused copy is not answered": 1796,
    "the commit is recorded last": 1734,
    "the dead are heard when they are late": 1650,
    "nobody is asked again when the other side has lost its session": 1388,
    "no tombstone of a refused arrival": 1282,
}
"""Where the search for a rare violation begins."""


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in UNSEEN])
def test_seeds_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    first = RARE.get(name, 0)
    for seed in range(first, first + 20_000):
        try:
            simulate(seed)
        except (AssertionError, LookupError, ValueError):  # a machine that has lost a rule may trip over itself, too
            return
    pytest.fail(f"nobody misses this rule: {name}")


@pytest.mark.parametrize("name", UNSEEN)
def test_others_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    UNSEEN[name]()
    MUTATIONS[name](monkeypatch)
    with pytest.raises(AssertionError):
        UNSEEN[name]()


# --- The same model, driven by Hypothesis -----------------------------------------------------------------

NAMES = st.sampled_from("ABC")
PAIRS = st.sampled_from([("A", "B"), ("A", "C"), ("B", "C")])
ANY = st.integers(0, 7)


class TransferMachine(RuleBasedStateMachine):
    """Hypothesis chooses what happens, and shrinks what goes wrong."""

    world: World

    @initialize(
        durable=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        objects=st.integers(1, 3),
        remembered=st.sampled_from([0, 1, 4096]),
        seed=ANY,
        refusing=st.sampled_from([0.0, 0.3]),
        buries=st.booleans(),
    )
    def create(
        self, durable: tuple[bool, bool, bool], objects: int, remembered: int, seed: int, refusing: float, buries: bool
    ) -> None:
        self.world = World(durable, objects, remembered)
        self.world.rng = random.Random(seed)  # only for the fate of what is in flight when a link is cut
        self.world.refusing = refusing
        self.world.buries = buries
        self.world.doubling = 0.3
        for pair in self.world.links:
            self.world.connect(pair)

    @rule(times=st.integers(1, 6), first=ANY)
    def deliver(self, times: int, first: int) -> None:
        for _ in range(times):
            ways = [(s, r) for s in "ABC" for r in "ABC" if s != r and self.world.waiting(s, r)]
            if ways:
                self.world.deliver(*ways[first % len(ways)])

    @precondition(lambda self: self.world.late)
    @rule(index=ANY)
    def deliver_late(self, index: int) -> None:
        self.world.deliver_late(index)

    @rule(pair=PAIRS, noticed=st.booleans())
    def cut(self, pair: tuple[str, str], noticed: bool) -> None:
        self.world.cut(pair)
        if noticed:
            for name in pair:
                self.world.notice(pair, name)

    @rule(pair=PAIRS)
    def connect(self, pair: tuple[str, str]) -> None:
        for name in pair:
            self.world.restart(name)
            self.world.notice(pair, name)
        self.world.connect(pair)

    @rule(name=NAMES, index=ANY, other=ANY)
    def begin(self, name: str, index: int, other: int) -> None:
        self.world.begin(name, index, other)

    @precondition(lambda self: self.world.begun)
    @rule(index=ANY)
    def begin_again(self, index: int) -> None:
        self.world.begin_again(list(self.world.begun)[-1 - index % len(self.world.begun)])

    @precondition(lambda self: self.world.begun)
    @rule(index=ANY)
    def abort(self, index: int) -> None:
        self.world.abort(list(self.world.begun)[-1 - index % len(self.world.begun)])

    @rule(name=NAMES)
    def write(self, name: str) -> None:
        self.world.write(name)

    @rule(name=NAMES)
    def crash(self, name: str) -> None:
        self.world.crash(name)

    @rule(name=NAMES)
    def restart(self, name: str) -> None:
        self.world.restart(name)

    @rule(pair=PAIRS, first=st.booleans())
    def bury(self, pair: tuple[str, str], first: bool) -> None:
        self.world.bury(*(pair if first else pair[::-1]))

    @rule(pair=PAIRS, first=st.booleans())
    def give_up(self, pair: tuple[str, str], first: bool) -> None:
        self.world.give_up(*(pair if first else pair[::-1]))

    @rule(pair=PAIRS, first=st.booleans())
    def lose(self, pair: tuple[str, str], first: bool) -> None:
        self.world.lose(*(pair if first else pair[::-1]))

    @rule(pair=PAIRS, first=st.booleans())
    def unheard(self, pair: tuple[str, str], first: bool) -> None:
        self.world.unheard(*(pair if first else pair[::-1]))

    @rule(effects=st.integers(0, 3))
    def crash_soon(self, effects: int) -> None:
        self.world.fuse = effects

    @invariant()
    def guarantees_hold(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestStateMachine = TransferMachine.TestCase
TestStateMachine.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
