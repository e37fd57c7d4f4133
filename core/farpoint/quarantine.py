"""What clients hold whose lease has run out: nobody is shown it, and it is not freed yet.

A client that is away may be dead, or on the other side of a network that is down. So its session is kept for longer than its
lease: it goes on where it was if the client comes back, and whoever has the id of an object of it can become a holder
(`p.bypass()`). Meanwhile its objects are neither listed nor found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farpoint.answers import LOCAL

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.worker import Worker


class Quarantine:
    """The clients of one worker that have been away for longer than their lease.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._away: list[Guest] = []

    def take(self, guest: Guest) -> None:
        """Let a client be away: its lease has run out."""
        worker, limits = self._worker, self._worker.limits
        with worker.lock:
            if guest.left or guest.channel.lane is not None:
                return  # it has come back in this very moment
            guest.away = True
            guest.reading = None
            self._away = [*self._guests(), guest]
            guest.expect(max(0.0, limits.kept_seconds - limits.lease_seconds), worker.guest_lost)
            worker.logger.info("%s: the lease of the session with %s has run out", worker.id, guest.name)
        guest.executor.rest()
        with worker.lock:
            while worker.store.bytes_of(self.objects()) > limits.quarantine_bytes and self.give_room():
                pass

    def objects(self) -> set[int]:
        """Return the ids of what nobody holds but clients that are away."""
        away = self._guests()
        if not away:
            return set()
        worker = self._worker
        here = [guest.held for guest in worker.guests.values() if not guest.away]
        return set().union(*(guest.held for guest in away)).difference(worker.holders.held(LOCAL), *here)

    def give_room(self) -> bool:
        """End the session of the client that has been away the longest, and return whether there was one."""
        away = self._guests()
        if away:
            self._worker.guest_lost(away[0])
        return bool(away)

    def _guests(self) -> list[Guest]:
        self._away = [guest for guest in self._away if guest.away and not guest.left]
        return self._away
