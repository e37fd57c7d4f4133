"""A transfer at its source: what it says, what it knows, its steps; and what both roles stand on."""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

if TYPE_CHECKING:
    from farpoint.protocol.arrival import (
        Aborted,
        Activate,
        Activated,
        Arrival,
        Discard,
        Inquire,
        Missing,
        Prepared,
        Refused,
        Stage,
    )


@attrs.frozen
class TransferMessage:
    """A message about one transfer; `transfer` is its id, unique for ever."""

    transfer: int


@attrs.frozen
class Push(TransferMessage):
    """Source to destination: stage this.

    Attributes:
        number: Which push to this life of the destination it is.
        oldest: The first number that is not finished.
        new_id: Id of the object at the destination.
        holder: Who will hold it there.
        durable: Whether the source survives a crash.
        payload: The object, filled in by the worker.
        checksum: Over the payload, filled in by the worker.
    """

    number: int
    oldest: int
    new_id: int
    holder: int
    durable: bool
    payload: Any = None
    checksum: str | None = None


@attrs.frozen
class Probe(TransferMessage):
    """Source to destination: what have you got of it?"""


@attrs.frozen
class Commit(TransferMessage):
    """Source to destination: it is yours, make it live."""


@attrs.frozen
class Abort(TransferMessage):
    """Source to destination: discard what `life` pushed; `number` as in `Push`, 0 if it is forgotten."""

    life: int
    number: int


@attrs.frozen
class Released(TransferMessage):
    """Source to destination: my copy is gone; `oldest` as in `Push`."""

    oldest: int


class Leaving(enum.Enum):
    """State of a transfer at its source."""

    UNKNOWN = "unknown"
    WAITING = "waiting"  # the object is held by another transfer
    OUT = "out"
    COMMITTED = "committed"
    ABORTING = "aborting"
    MOVED = "moved"
    ABORTED = "aborted"


@attrs.frozen
class Departure:
    """What a source knows of a transfer."""

    transfer: int
    destination: str
    object_id: int = 0
    new_id: int = 0
    holder: int = 0
    state: Leaving = Leaving.UNKNOWN
    number: int = 0
    offered: bool = False
    reason: str = ""


@attrs.frozen
class Freeze:
    """Let reads of the object pass and its writes, and its release, wait."""

    object_id: int


@attrs.frozen
class Withdraw:
    """Serve the object no more, and keep its bytes."""

    object_id: int


@attrs.frozen
class Thaw:
    """Serve the object as before the transfer."""

    object_id: int


@attrs.frozen
class Drop:
    """Free the bytes of a withdrawn object, if they are still there."""

    object_id: int


@attrs.frozen
class Done:
    """Answer whoever began the transfer: the object lives over there."""

    transfer: int
    destination: str
    new_id: int


@attrs.frozen
class Failed:
    """Answer whoever began the transfer: it has moved nothing. If another one has, `reason` says so."""

    transfer: int
    reason: str


@attrs.frozen
class Send:
    """Send a message; a `Push` takes payload and checksum from `object_id`. Forget it if the link is gone."""

    peer: str
    message: TransferMessage
    object_id: int | None = None


@attrs.frozen
class Record:
    """Persist the entry, or erase that of the transfer, before what follows; for durable workers only."""

    transfer: int
    entry: Departure | Arrival | None


Effect: TypeAlias = (
    "Send | Freeze | Withdraw | Thaw | Drop | Stage | Activate | Discard | Record | Done | Failed"
)


@attrs.define
class Peer:
    """What is known of a peer. `opened` maps each unfinished push, by number, to its transfer, in order."""

    incarnation: int
    linked: bool = True
    floor: int = 1
    next_number: int = 1
    opened: dict[int, int] = attrs.Factory(dict)

    @property
    def oldest(self) -> int:
        """The first number that is not finished."""
        return next(iter(self.opened), self.next_number)


@attrs.define
class Ground:
    """What both roles stand on. `held` maps an object to the transfer that must end before another begins."""

    incarnation: int
    durable: bool
    peers: dict[str, Peer] = attrs.Factory(dict)
    held: dict[int, int] = attrs.Factory(dict)

    def send(self, peer: str, message: TransferMessage, object_id: int | None = None) -> list[Effect]:
        """Send, or leave it to `peer_back` when there is no link."""
        link = self.peers.get(peer)
        return [Send(peer, message, object_id)] if link is not None and link.linked else []

    def record(self, transfer: int, entry: Departure | Arrival | None) -> list[Effect]:
        """Persist, on a durable worker."""
        return [Record(transfer, entry)] if self.durable else []


@attrs.define
class Departures:
    """The source's side: every method is a step of the table in `transfer.py`."""

    ground: Ground
    remembered: int
    entries: dict[int, Departure] = attrs.Factory(dict)
    finished: deque[int] = attrs.Factory(deque)
    waiting: dict[int, deque[int]] = attrs.Factory(dict)

    def leaving_for(self, peer: str) -> list[Departure]:
        """Return the transfers to a peer; those that wait come first, or the end of another one would start them."""
        found = [known for known in self.entries.values() if known.destination == peer]
        return sorted(found, key=lambda known: known.state is not Leaving.WAITING)

    def begin(self, asked: Departure) -> list[Effect]:
        """Start a transfer, or let it wait until its object is free."""
        if asked.object_id not in self.ground.held:
            return self._start(asked)
        self._put(attrs.evolve(asked, state=Leaving.WAITING))
        self.waiting.setdefault(asked.object_id, deque()).append(asked.transfer)
        return []

    def abort(self, known: Departure, reason: str) -> list[Effect]:
        """Give a transfer up that is not committed."""
        transfer, peer = known.transfer, known.destination
        known = attrs.evolve(known, reason=reason)
        if known.state is Leaving.WAITING:
            self.waiting[known.object_id].remove(transfer)
            self._end(known, Leaving.ABORTED)
            return [Failed(transfer, reason), *self._forget()]
        if known.state is not Leaving.OUT:
            return []
        effects: list[Effect] = [Thaw(known.object_id), Failed(transfer, reason)]
        if not known.offered:
            return effects + self._close(known)
        self._put(attrs.evolve(known, state=Leaving.ABORTING))
        return effects + self.ground.send(peer, Abort(transfer, self.ground.incarnation, known.number))

    def resume(self, known: Departure) -> list[Effect]:
        """Ask again, on a new link, about what is not finished."""
        peer, transfer = known.destination, known.transfer
        if known.state is Leaving.OUT:
            return self.ground.send(peer, Probe(transfer)) if known.offered else self.push(known)
        if known.state is Leaving.COMMITTED:
            return self.ground.send(peer, Commit(transfer))
        if known.state is Leaving.ABORTING:
            return self.ground.send(peer, Abort(transfer, self.ground.incarnation, known.number))
        return []

    def push(self, known: Departure, message: Missing | None = None) -> list[Effect]:
        """Send the object, the first time or again."""
        link = self.ground.peers.get(known.destination)
        if link is None or not link.linked:
            return []
        if not known.number:
            known = attrs.evolve(known, number=link.next_number)
            link.opened[link.next_number] = known.transfer
            link.next_number += 1
        self._put(attrs.evolve(known, offered=True))
        push = Push(
            known.transfer, known.number, link.oldest, known.new_id, known.holder, self.ground.durable
        )
        return self.ground.send(known.destination, push, known.object_id)

    def commit(self, known: Departure, message: Prepared) -> list[Effect]:
        """Decide: from here on it is the destination's."""
        known = attrs.evolve(known, state=Leaving.COMMITTED)
        self._put(known)
        recorded = self.ground.record(known.transfer, known)
        return [*recorded, Withdraw(known.object_id), *self.commit_again(known)]

    def commit_again(self, known: Departure, message: Prepared | Inquire | None = None) -> list[Effect]:
        """Repeat the decision, which outlives the bytes."""
        return self.ground.send(known.destination, Commit(known.transfer))

    def finish(self, known: Departure, message: Activated) -> list[Effect]:
        """Free the bytes, tell the destination and whoever began, and fail those who wait for the object."""
        transfer, peer = known.transfer, known.destination
        recorded = self.ground.record(transfer, self._end(known, Leaving.MOVED))
        effects = [*recorded, Drop(known.object_id), *self.release(known), Done(transfer, peer, known.new_id)]
        del self.ground.held[known.object_id]
        reason = f"the object moved to {peer} by transfer {transfer}"
        for late in self.waiting.pop(known.object_id, ()):
            self._end(attrs.evolve(self.entries[late], reason=reason), Leaving.ABORTED)
            effects.append(Failed(late, reason))
        # Last: a record erased before its Drop is carried out would, after a crash, leave two that serve.
        return effects + self._forget()

    def release(self, known: Departure, message: Activated | None = None) -> list[Effect]:
        """Say that there is no copy here (any more)."""
        oldest = self.ground.peers[known.destination].oldest
        return self.ground.send(known.destination, Released(known.transfer, oldest))

    def refused(self, known: Departure, message: Refused) -> list[Effect]:
        """Serve the object as before, also after a commit: who refuses has no copy."""
        return self._serve(known, message.reason)

    def orphaned(self, peer: str) -> list[Effect]:
        """Serve what was leaving for a worker that is dead: its copy has died with it."""
        effects: list[Effect] = []
        for known in self.leaving_for(peer):
            if known.state in (Leaving.OUT, Leaving.COMMITTED):
                effects += self._serve(known, f"{peer} has died")
            elif known.state is Leaving.ABORTING:
                effects += self._close(known)
            elif known.state is Leaving.WAITING:
                effects += self.abort(known, f"{peer} has died")
        return effects

    def aborted(self, known: Departure, message: Aborted | Refused) -> list[Effect]:
        """Let the object go elsewhere, now that this destination will not have it."""
        return self._close(known)

    def disown(self, known: Departure, message: Prepared | Inquire) -> list[Effect]:
        """Let the destination discard what is not going to be committed."""
        life = getattr(message, "life", self.ground.incarnation)
        return self.ground.send(known.destination, Abort(known.transfer, life, known.number))

    def ignore(self, known: Departure, message: TransferMessage) -> list[Effect]:
        """Do nothing: a late copy, or an answer that another one overtook."""
        return []

    def free(self, object_id: int) -> list[Effect]:
        """Let go of an object, and let the next transfer that waits for it start."""
        self.ground.held.pop(object_id, None)
        queue = self.waiting.pop(object_id, None)
        if not queue:
            return []
        transfer = queue.popleft()
        self.waiting[object_id] = queue
        return self._start(self.entries[transfer])

    def restore(self, entry: Departure) -> list[Effect]:
        """Take an entry of the previous life."""
        if entry.state is Leaving.MOVED:
            self._put(entry)
            self.finished.append(entry.transfer)
            return [Drop(entry.object_id)]
        self._put(attrs.evolve(entry, number=0))
        self.ground.held[entry.object_id] = entry.transfer
        return [Withdraw(entry.object_id)]

    def _start(self, departure: Departure) -> list[Effect]:
        departure = attrs.evolve(departure, state=Leaving.OUT)
        self._put(departure)
        self.ground.held[departure.object_id] = departure.transfer
        return [Freeze(departure.object_id), *self.push(departure)]

    def _serve(self, known: Departure, reason: str) -> list[Effect]:
        recorded = self.ground.record(known.transfer, None) if known.state is Leaving.COMMITTED else []
        known = attrs.evolve(known, reason=reason)
        told: list[Effect] = [Thaw(known.object_id), Failed(known.transfer, reason)]
        return recorded + told + self._close(known)

    def _close(self, known: Departure) -> list[Effect]:
        self._end(known, Leaving.ABORTED)
        return [*self.free(known.object_id), *self._forget()]

    def _put(self, departure: Departure) -> None:
        self.entries[departure.transfer] = departure

    def _end(self, known: Departure, state: Leaving) -> Departure:
        known = attrs.evolve(known, state=state)
        self._put(known)
        self.finished.append(known.transfer)
        if known.number:
            self.ground.peers[known.destination].opened.pop(known.number, None)
        return known

    def _forget(self) -> list[Effect]:
        effects: list[Effect] = []
        while len(self.finished) > self.remembered:
            oldest = self.entries.pop(self.finished.popleft())
            if oldest.state is Leaving.MOVED:
                effects += self.ground.record(oldest.transfer, None)
        return effects
