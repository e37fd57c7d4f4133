"""A transfer at its destination: what it says, what it knows, its steps."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from farpoint.protocol.departure import TransferMessage

if TYPE_CHECKING:
    from farpoint.protocol.departure import Abort, Commit, Effect, Ground, Probe, Push, Released


@attrs.frozen
class Prepared(TransferMessage):
    """Destination to source: verified and staged."""


@attrs.frozen
class Refused(TransferMessage):
    """Destination to source: I have no copy, and will take none, because of `reason`."""

    reason: str


@attrs.frozen
class Missing(TransferMessage):
    """Destination to source: I have nothing of it, push."""


@attrs.frozen
class Activated(TransferMessage):
    """Destination to source: it is live here."""


@attrs.frozen
class Aborted(TransferMessage):
    """Destination to source: discarded, or never seen."""


@attrs.frozen
class Inquire(TransferMessage):
    """Destination to source: an earlier `life` of yours pushed this; what did it decide?"""

    life: int


class Arriving(enum.Enum):
    """State of a transfer at its destination."""

    UNKNOWN = "unknown"
    STAGED = "staged"
    LIVE = "live"  # the source may still have its copy
    SETTLED = "settled"
    ABORTED = "aborted"


@attrs.frozen
class Arrival:
    """What a destination knows of a transfer. `life` is the source's incarnation that pushed it."""

    transfer: int
    source: str
    life: int
    number: int = 0
    durable: bool = False
    new_id: int = 0
    holder: int = 0
    state: Arriving = Arriving.UNKNOWN
    reason: str = ""


@attrs.frozen
class Stage:
    """Verify and keep the payload under the transfer's id, in place of an earlier one; nobody sees it."""

    transfer: int
    new_id: int
    holder: int
    payload: Any
    checksum: str | None


@attrs.frozen
class Activate:
    """Make the staged payload the object `new_id`, in one step. Nothing staged: it is done already."""

    transfer: int
    new_id: int
    holder: int


@attrs.frozen
class Discard:
    """Free the staged payload, if there is one."""

    transfer: int


@attrs.define
class Arrivals:
    """The destination's side: every method is a step of the table in `transfer.py`.

    `free` is called with an object that may move on now.
    """

    ground: Ground
    free: Callable[[int], list[Effect]]
    entries: dict[int, Arrival] = attrs.Factory(dict)

    def resume(self, known: Arrival) -> list[Effect]:
        """Say again, on a new link, what is open, and forget what only a dead life could mean.

        The source asks by itself when its own link is a new one. But each has one of its own, and it may not be.
        """
        peer, transfer = known.source, known.transfer
        same_life = known.life == self.ground.peers[peer].incarnation
        if known.state is Arriving.LIVE:
            return self.ground.send(peer, Activated(transfer))
        if same_life:
            return self.ground.send(peer, Prepared(transfer)) if known.state is Arriving.STAGED else []
        if known.state is not Arriving.STAGED:
            del self.entries[transfer]
            return []
        if known.durable:
            return self.ground.send(peer, Inquire(transfer, known.life))
        # The source's copy died with it, and nobody else has one: an abort would have had to be acknowledged.
        return self.activate(known)

    def orphaned(self, known: Arrival) -> list[Effect]:
        """Take over what a worker that is dead has left, and forget what only it could mean.

        A durable one may come back with its copy, so that is not taken over.
        """
        if known.state is Arriving.STAGED and known.durable:
            return []
        effects = self.activate(known) if known.state is Arriving.STAGED else []
        del self.entries[known.transfer]
        if known.state not in (Arriving.STAGED, Arriving.LIVE):
            return []
        return [*effects, *self.ground.record(known.transfer, None), *self.free(known.new_id)]

    def stage(self, known: Arrival, message: Push) -> list[Effect]:
        """Take a copy that nobody sees yet."""
        peer, transfer, link = known.source, known.transfer, self.ground.peers[known.source]
        if message.number < link.floor:
            return []
        self._raise_floor(peer, message.oldest)
        if known.state is Arriving.STAGED and known.life == link.incarnation:
            return self.ground.send(peer, Prepared(transfer))
        entry = Arrival(
            transfer,
            peer,
            link.incarnation,
            message.number,
            message.durable,
            message.new_id,
            message.holder,
            Arriving.STAGED,
        )
        self.entries[transfer] = entry
        return [
            Stage(transfer, message.new_id, message.holder, message.payload, message.checksum),
            *self.ground.record(transfer, entry),
            *self.ground.send(peer, Prepared(transfer)),
        ]

    def refuse(self, known: Arrival, reason: str) -> list[Effect]:
        """Give a staged copy up that cannot be kept."""
        self.entries[known.transfer] = attrs.evolve(known, state=Arriving.ABORTED, reason=reason)
        recorded = self.ground.record(known.transfer, None)
        refusal = self.ground.send(known.source, Refused(known.transfer, reason))
        return [*recorded, Discard(known.transfer), *refusal]

    def refuse_again(self, known: Arrival, message: TransferMessage) -> list[Effect]:
        """Repeat the refusal."""
        return self.ground.send(known.source, Refused(known.transfer, known.reason))

    def tell(self, known: Arrival, message: Probe) -> list[Effect]:
        """Say what is here of that life's push."""
        if known.state is Arriving.STAGED and known.life == self.ground.peers[known.source].incarnation:
            return self.ground.send(known.source, Prepared(known.transfer))
        return self.ground.send(known.source, Missing(known.transfer))

    def missing(self, known: Arrival, message: Commit) -> list[Effect]:
        """Ask for what was committed to an earlier life."""
        return self.ground.send(known.source, Missing(known.transfer))

    def activate(self, known: Arrival, message: Commit | None = None) -> list[Effect]:
        """Make the staged copy live; it may not move on before the source has given its own up."""
        known = attrs.evolve(known, state=Arriving.LIVE)
        self.entries[known.transfer] = known
        self.ground.held[known.new_id] = known.transfer
        recorded = self.ground.record(known.transfer, known)
        live = Activate(known.transfer, known.new_id, known.holder)
        return [*recorded, live, *self.activated(known)]

    def activated(self, known: Arrival, message: TransferMessage | None = None) -> list[Effect]:
        """Say that it is live."""
        return self.ground.send(known.source, Activated(known.transfer))

    def settle(self, known: Arrival, message: Released) -> list[Effect]:
        """Let the object move on, now that it is the only copy."""
        if known.life == self.ground.peers[known.source].incarnation:
            self.entries[known.transfer] = attrs.evolve(known, state=Arriving.SETTLED)
        else:
            del self.entries[known.transfer]
        self._raise_floor(known.source, message.oldest)
        return [*self.ground.record(known.transfer, None), *self.free(known.new_id)]

    def discard(self, known: Arrival, message: Abort) -> list[Effect]:
        """Free the staged copy, and refuse its push if that is still under way."""
        transfer, link = known.transfer, self.ground.peers[known.source]
        if message.life not in (known.life, link.incarnation):
            return []  # about a dead life's push, and the present one's is staged
        effects: list[Effect] = []
        if known.state is Arriving.STAGED:
            effects = [*self.ground.record(transfer, None), Discard(transfer)]
        self.entries.pop(transfer, None)
        if message.life == link.incarnation and message.number >= link.floor:
            self.entries[transfer] = attrs.evolve(
                known,
                life=message.life,
                number=message.number,
                state=Arriving.ABORTED,
                reason="aborted by its source",
            )
        return effects + self.aborted(known)

    def aborted(self, known: Arrival, message: Abort | None = None) -> list[Effect]:
        """Say that there is no copy here."""
        return self.ground.send(known.source, Aborted(known.transfer))

    def ignore(self, known: Arrival, message: TransferMessage) -> list[Effect]:
        """Do nothing: a late copy."""
        return []

    def restore(self, entry: Arrival) -> list[Effect]:
        """Take an entry of the previous life."""
        self.entries[entry.transfer] = entry
        if entry.state is Arriving.STAGED:
            return []
        self.ground.held[entry.new_id] = entry.transfer
        return [Activate(entry.transfer, entry.new_id, entry.holder)]

    def _raise_floor(self, peer: str, oldest: int) -> None:
        link = self.ground.peers[peer]
        if oldest <= link.floor:
            return
        link.floor = oldest
        for entry in [e for e in self.entries.values() if e.source == peer and e.number < oldest]:
            if entry.state in (Arriving.SETTLED, Arriving.ABORTED) and entry.life == link.incarnation:
                del self.entries[entry.transfer]
