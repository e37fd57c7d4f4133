"""The states of a `move`, without I/O: a source that commits once, a destination that stages first.

::

    source        live ── begin ─► OUT ── Prepared ─► COMMITTED ── Activated ─► MOVED
                    ▲               └── abort ─► ABORTING ── Aborted ─► ABORTED
                    └──────────── Thaw ───────────┘
    destination   none ── Push ─► STAGED ── Commit ─► LIVE ── Released ─► SETTLED
                                    └── Abort ─► ABORTED

A worker owns one `Transfers`, feeds it events, and carries out the effects that each call returns **in order
and before the next event**; the first that fails ends its list. A crash may fall between any two of them.

Beyond the steps of the design, practice forced this; the tests keep the counter-examples:

* **Released.** bob activates, his Activated is lost, he moves the object on to charlie and dies. alice,
  committed, finds bob empty and pushes again: bob and charlie serve one object. So an object that arrived
  moves on only when its source has confirmed that it gave its copy up. Until then a `begin` waits.
* **Probe and Missing.** A source asks what the destination has instead of guessing from its incarnation: a
  staged copy is not sent twice, and a volatile and a durable destination need no different rules.
* **Refused after a commit.** A destination that came back empty may have no room for the second push; the
  source would stay committed for ever, its object served by nobody. This refusal is the one way back from a
  commit: who refuses has no copy and will not take one, and by *Released* an earlier life of it cannot have
  passed one on. Merely coming back empty is no way back: a late Missing would leave two that serve.
* **Life and number.** `life` is the source's incarnation that pushed, so that an Abort about a dead life's
  push cannot end the push of the next. `number` counts pushes to a destination, and `oldest` is the first
  one unfinished: below it, Push and Abort are late copies, and the destination needs no tombstone to know
  them. Tombstones so go when what they guard against is over, not only when one of the two lives is.

Two things no rule can give. An Activated may be the last word of a volatile life: the source frees its
copy, and the object is as lost as if the destination had died a moment later. And a volatile source that
serves again after an abort, is written to, and dies before the abort is heard, leaves an older value, which
the destination promotes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs

from farpoint.errors import ProtocolError, StaleIncarnationError
from farpoint.protocol.arrival import (
    Aborted,
    Activate,
    Activated,
    Arrival,
    Arrivals,
    Arriving,
    Discard,
    Inquire,
    Missing,
    Prepared,
    Refused,
    Stage,
)
from farpoint.protocol.departure import (
    Abort,
    Commit,
    Departure,
    Departures,
    Done,
    Drop,
    Effect,
    Failed,
    Freeze,
    Ground,
    Leaving,
    Peer,
    Probe,
    Push,
    Record,
    Released,
    Send,
    Thaw,
    TransferMessage,
    Withdraw,
)

__all__ = [
    "Abort",
    "Aborted",
    "Activate",
    "Activated",
    "Arrival",
    "Arriving",
    "Commit",
    "Departure",
    "Discard",
    "Done",
    "Drop",
    "Effect",
    "Entry",
    "Failed",
    "Freeze",
    "Inquire",
    "Leaving",
    "Missing",
    "Prepared",
    "Probe",
    "Push",
    "Record",
    "Refused",
    "Released",
    "Send",
    "Stage",
    "Thaw",
    "TransferMessage",
    "Transfers",
    "Withdraw",
]


Entry: TypeAlias = Departure | Arrival
Step: TypeAlias = Callable[[Any, Any, Any], list[Effect]]

# The source. What is not in the table is a violation by the destination: `ProtocolError`, nothing changes.
#
# (1) A Prepared commits once. It commits again from the tombstone: the decision outlives the bytes.
# (2) A commit is taken back for one reason only: the destination's own refusal.
# (3) Inquire comes from who staged a push of an earlier life. No commit record: that push is aborted,
#     whatever this life has begun under the same id since.
# (4) Activated for a transfer that is over, or that this life has never known: there is no copy here.
# (5) Missing: push, committed or not. Before that an answer to an older question may arrive late: ignored.
# (6) The object is free to go elsewhere when the abort is acknowledged, and a refusal acknowledges it.
DEPARTURES: Mapping[tuple[Leaving, type[TransferMessage]], Step] = {
    (Leaving.UNKNOWN, Prepared): Departures.disown,
    (Leaving.UNKNOWN, Inquire): Departures.disown,  # (3)
    (Leaving.UNKNOWN, Activated): Departures.release,  # (4)
    (Leaving.UNKNOWN, Refused): Departures.ignore,
    (Leaving.UNKNOWN, Missing): Departures.ignore,
    (Leaving.UNKNOWN, Aborted): Departures.ignore,
    (Leaving.WAITING, Prepared): Departures.disown,
    (Leaving.WAITING, Inquire): Departures.disown,  # (3)
    (Leaving.WAITING, Refused): Departures.ignore,
    (Leaving.WAITING, Missing): Departures.ignore,
    (Leaving.WAITING, Aborted): Departures.ignore,
    (Leaving.OUT, Prepared): Departures.commit,  # (1)
    (Leaving.OUT, Refused): Departures.refused,
    (Leaving.OUT, Missing): Departures.push,  # (5)
    (Leaving.OUT, Inquire): Departures.disown,  # (3)
    (Leaving.OUT, Aborted): Departures.ignore,
    (Leaving.COMMITTED, Prepared): Departures.commit_again,  # (1)
    (Leaving.COMMITTED, Inquire): Departures.commit_again,
    (Leaving.COMMITTED, Missing): Departures.push,  # (5)
    (Leaving.COMMITTED, Activated): Departures.finish,
    (Leaving.COMMITTED, Refused): Departures.refused,  # (2)
    (Leaving.COMMITTED, Aborted): Departures.ignore,
    (Leaving.ABORTING, Aborted): Departures.aborted,  # (6)
    (Leaving.ABORTING, Refused): Departures.aborted,  # (6)
    (Leaving.ABORTING, Inquire): Departures.disown,  # (3)
    (Leaving.ABORTING, Prepared): Departures.ignore,
    (Leaving.ABORTING, Missing): Departures.ignore,
    (Leaving.MOVED, Prepared): Departures.commit_again,  # (1)
    (Leaving.MOVED, Inquire): Departures.commit_again,  # (1)
    (Leaving.MOVED, Activated): Departures.release,  # (4)
    (Leaving.MOVED, Refused): Departures.ignore,
    (Leaving.MOVED, Missing): Departures.ignore,
    (Leaving.MOVED, Aborted): Departures.ignore,
    (Leaving.ABORTED, Prepared): Departures.disown,
    (Leaving.ABORTED, Inquire): Departures.disown,  # (3)
    (Leaving.ABORTED, Refused): Departures.ignore,
    (Leaving.ABORTED, Missing): Departures.ignore,
    (Leaving.ABORTED, Aborted): Departures.ignore,
}

NOBODY = -1
"""The incarnation of a peer whose last life is over."""
UNDECIDED = (Leaving.WAITING, Leaving.OUT, Leaving.COMMITTED, Leaving.ABORTING)

# The destination. Every message is possible in every state: all of them may be late.
#
# (1) A Push is staged once; one of a later life of the source replaces what an earlier life pushed, which can
#     never be committed any more.
# (2) A Commit finds a staged copy, whichever life pushed it, or nothing: then it asks for another push.
# (3) An Abort is remembered until its push cannot be under way any more; after a Commit it is too late.
# (4) What is live is answered with Activated; what was refused or aborted with the same again.
ARRIVALS: Mapping[tuple[Arriving, type[TransferMessage]], Step] = {
    (Arriving.UNKNOWN, Push): Arrivals.stage,  # (1)
    (Arriving.UNKNOWN, Probe): Arrivals.tell,
    (Arriving.UNKNOWN, Commit): Arrivals.missing,  # (2)
    (Arriving.UNKNOWN, Abort): Arrivals.discard,  # (3)
    (Arriving.UNKNOWN, Released): Arrivals.ignore,
    (Arriving.STAGED, Push): Arrivals.stage,  # (1)
    (Arriving.STAGED, Probe): Arrivals.tell,
    (Arriving.STAGED, Commit): Arrivals.activate,  # (2)
    (Arriving.STAGED, Abort): Arrivals.discard,  # (3)
    (Arriving.STAGED, Released): Arrivals.ignore,
    (Arriving.LIVE, Push): Arrivals.activated,  # (4)
    (Arriving.LIVE, Probe): Arrivals.activated,  # (4)
    (Arriving.LIVE, Commit): Arrivals.activated,  # (4)
    (Arriving.LIVE, Abort): Arrivals.activated,  # (3)
    (Arriving.LIVE, Released): Arrivals.settle,
    (Arriving.SETTLED, Push): Arrivals.activated,  # (4)
    (Arriving.SETTLED, Probe): Arrivals.activated,  # (4)
    (Arriving.SETTLED, Commit): Arrivals.activated,  # (4)
    (Arriving.SETTLED, Abort): Arrivals.activated,  # (3)
    (Arriving.SETTLED, Released): Arrivals.ignore,
    (Arriving.ABORTED, Push): Arrivals.refuse_again,  # (4)
    (Arriving.ABORTED, Probe): Arrivals.refuse_again,  # (4)
    (Arriving.ABORTED, Commit): Arrivals.refuse_again,  # (4)
    (Arriving.ABORTED, Abort): Arrivals.aborted,  # (4)
    (Arriving.ABORTED, Released): Arrivals.ignore,
}


class Transfers:
    """The transfers of one worker, in both roles.

    Args:
        incarnation: This life of the worker.
        durable: Whether store and records survive a crash; then `restore` comes first in the next life.
        remembered: How many finished departures are kept to answer a repeated `begin`, their one use.
    """

    def __init__(self, incarnation: int, *, durable: bool = False, remembered: int = 4096) -> None:
        self.incarnation = incarnation
        self._ground = Ground(incarnation, durable)
        self._departures = Departures(self._ground, remembered)
        self._arrivals = Arrivals(self._ground, self._departures.free)

    def __repr__(self) -> str:
        return (
            f"<Transfers: {len(self._departures.entries)} departures, {len(self._arrivals.entries)} arrivals>"
        )

    def __contains__(self, transfer: int) -> bool:
        """Tell whether the transfer is known. If not, the worker first checks that it has the object."""
        return transfer in self._departures.entries or transfer in self._arrivals.entries

    def begin(
        self, transfer: int, object_id: int, destination: str, new_id: int, holder: int
    ) -> list[Effect]:
        """Move an object of this worker. The same transfer again is recognised, and answered if it has ended.

        An object that another transfer holds waits, served as ever; `Freeze` comes when its turn has come.

        Raises:
            ValueError: The transfer is known as another one.
        """
        asked = Departure(transfer, destination, object_id, new_id, holder)
        if transfer in self._arrivals.entries:
            raise ValueError(
                f"transfer {transfer} is known: it comes from {self._arrivals.entries[transfer].source}"
            )
        known = self._departures.entries.get(transfer)
        if known is None:
            return self._departures.begin(asked)
        if _identity(known) != _identity(asked):
            raise ValueError(
                f"transfer {transfer} is known: it takes object {known.object_id} to {known.destination} "
                f"as {known.new_id}. Every transfer needs an id of its own"
            )
        if known.state is Leaving.MOVED:
            return [Done(transfer, destination, new_id)]
        if known.state in (Leaving.ABORTING, Leaving.ABORTED):
            return [Failed(transfer, known.reason)]
        return []

    def abort(self, transfer: int, reason: str = "aborted") -> list[Effect]:
        """Give a departure up. Once it is committed, and once it has ended, nothing happens.

        Raises:
            ValueError: No such departure is known.
        """
        known = self._departures.entries.get(transfer)
        if known is None:
            raise ValueError(
                f"transfer {transfer} is not known as one that leaves here, so it cannot be aborted"
            )
        return self._departures.abort(known, reason)

    def give_up(self, peer: str, reason: str) -> list[Effect]:
        """Give up everything that leaves for a peer and is not committed: nobody knows when it will be reached again."""
        effects: list[Effect] = []
        for known in self._departures.leaving_for(peer):
            effects += self._departures.abort(known, reason)
        return effects

    def forbidden(self, transfer: int) -> list[Effect]:
        """Learn that the destination may not speak with us, and so does not hear that a transfer is aborted: it has nothing of it."""
        known = self._departures.entries.get(transfer)
        if known is None or known.state is not Leaving.ABORTING:
            return []
        return self._departures.aborted(known, Aborted(transfer))

    def refuse(self, transfer: int, reason: str) -> list[Effect]:
        """Report that a `Stage` could not be carried out; the effects that followed it are void.

        Raises:
            ValueError: Nothing is staged under that transfer.
        """
        known = self._arrivals.entries.get(transfer)
        if known is None or known.state is not Arriving.STAGED:
            raise ValueError(f"transfer {transfer} is not staged here, so it cannot be refused")
        return self._arrivals.refuse(known, reason)

    def peer_lost(self, peer: str) -> list[Effect]:
        """Note that the link is gone. Nothing is decided; `peer_back` asks again about what is open."""
        if peer in self._ground.peers:
            self._ground.peers[peer].linked = False
        return []

    def peer_dead(self, peer: str) -> list[Effect]:
        """Note that the last known life of a peer is over for certain, with all that it kept in memory.

        What leaves for it stays here, also after a commit: by *Released* no copy of it has gone further. What it
        has pushed, and not taken back, is the last copy, and becomes live.
        """
        known = self._ground.peers.get(peer)
        if known is not None:
            # What it has said and comes late is stale: nobody would be there to decide about it.
            self._ground.peers[peer] = attrs.evolve(known, incarnation=NOBODY, linked=False)
        effects = self._departures.orphaned(peer)
        for arrival in [a for a in self._arrivals.entries.values() if a.source == peer]:
            effects += self._arrivals.orphaned(arrival)
        return effects

    def peer_back(self, peer: str, incarnation: int) -> list[Effect]:
        """Note a new link, the first one too, to that life of a peer, and ask again about what is open.

        The peer must have proved on this link that it lives now: the greeting of a dead life, read late,
        would make the present one look dead.
        """
        known = self._ground.peers.get(peer)
        if known is None:
            self._ground.peers[peer] = Peer(incarnation)
        elif known.incarnation == incarnation:
            known.linked = True
        else:
            self._ground.peers[peer] = attrs.evolve(known, incarnation=incarnation, linked=True, floor=1)
        effects: list[Effect] = []
        for departure in self._departures.leaving_for(peer):
            effects += self._departures.resume(departure)
        for arrival in [a for a in self._arrivals.entries.values() if a.source == peer]:
            effects += self._arrivals.resume(arrival)
        return effects

    def receive(self, peer: str, incarnation: int, addressed: int, message: TransferMessage) -> list[Effect]:
        """Take a message of a peer.

        Args:
            peer: Who sent it.
            incarnation: The life of it that did.
            addressed: The life of this worker that it was meant for.
            message: The message.

        Raises:
            StaleIncarnationError: One of the two lives is over, or unknown; the message is dropped.
            ProtocolError: The peer may not say this now. Nothing has changed.
        """
        kind, transfer = type(message), message.transfer
        link = self._ground.peers.get(peer)
        if link is None or (incarnation, addressed) != (link.incarnation, self.incarnation):
            raise StaleIncarnationError(
                f"{kind.__name__} of transfer {transfer}: it is from or to a life that is over"
            )
        leaving = self._departures.entries.get(transfer)
        arriving = self._arrivals.entries.get(transfer)
        if (leaving and leaving.destination != peer) or (arriving and arriving.source != peer):
            raise ProtocolError(f"{kind.__name__} of transfer {transfer}: {peer} has no part in it")
        if not arriving and (leaving or (Leaving.UNKNOWN, kind) in DEPARTURES):
            departure = leaving or Departure(transfer, peer)
            step = DEPARTURES.get((departure.state, kind))
            if step is None:
                raise ProtocolError(
                    f"{kind.__name__} of transfer {transfer}: it is {departure.state.value} here"
                )
            return step(self._departures, departure, message)
        arrival = arriving or Arrival(transfer, peer, incarnation)
        step = ARRIVALS.get((arrival.state, kind))
        if step is None:
            raise ProtocolError(f"{kind.__name__} of transfer {transfer}: it is {arrival.state.value} here")
        return step(self._arrivals, arrival, message)

    def life_of(self, peer: str) -> int | None:
        """Return the last known life of a peer, None if it has never been here."""
        known = self._ground.peers.get(peer)
        return known.incarnation if known is not None else None

    def open_peers(self) -> set[str]:
        """Return the peers with whom something is not decided yet."""
        leaving = {d.destination for d in self._departures.entries.values() if d.state in UNDECIDED}
        arriving = {a.source for a in self._arrivals.entries.values() if a.state in (Arriving.STAGED, Arriving.LIVE)}
        return leaving | arriving

    def snapshot(self) -> tuple[Entry, ...]:
        """Return the entries that must survive: what all `Record` effects so far amount to."""
        leaving, arriving = self._departures.entries.values(), self._arrivals.entries.values()
        departures = [d for d in leaving if d.state in (Leaving.COMMITTED, Leaving.MOVED)]
        arrivals = [a for a in arriving if a.state in (Arriving.STAGED, Arriving.LIVE)]
        return (*departures, *arrivals)

    def restore(self, entries: Iterable[Entry]) -> list[Effect]:
        """Take the entries of the previous life; carry the effects out before anything is served.

        They repeat what the crash may have cut off, so each must be harmless the second time. A staged
        payload that no entry names is a left-over, and the worker frees it.

        Raises:
            ValueError: This machine has been in use already.
        """
        if self._ground.peers or self._departures.entries or self._arrivals.entries:
            raise ValueError("restore comes before everything else, in a machine that was not used yet")
        effects: list[Effect] = []
        for entry in entries:
            if isinstance(entry, Arrival):
                effects += self._arrivals.restore(entry)
            else:
                effects += self._departures.restore(entry)
        return effects


def _identity(departure: Departure) -> tuple[str, int, int, int]:
    return departure.destination, departure.object_id, departure.new_id, departure.holder
