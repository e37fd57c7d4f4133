"""Ways to data: the workers that a chain passes through, and the order of what is issued over different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farpoint.errors import WorkerLostError
from farpoint.protocol.messages import Kind

if TYPE_CHECKING:
    from farpoint.peer import Peer


class Route:
    """The workers of a chain, from the first hop to the data. Routes are interned: equal ones are one object.

    Attributes:
        peer: The session with the first worker.
        workers: Names, the data's worker last.
    """

    def __init__(self, peer: Peer | None, workers: tuple[str, ...]) -> None:
        self.peer: Peer = peer  # type: ignore[assignment]  # only the route of a spent pointer has none
        self.workers = workers
        self.owner_name = peer.owner.id if peer is not None else "me"
        self._last: dict[str, Route] = _last if peer is not None else {}
        self._alone = len(workers) == 1

    def order(self) -> None:
        """Wait until what was issued to these workers by another way has taken effect: program order."""
        if self._alone and self._last.get(self.workers[0]) is self:
            return
        for position, worker in enumerate(self.workers):
            before = self._last.get(worker)
            if before is not None and before is not self and before.way(worker) != self.workers[: position + 1]:
                try:
                    before.synchronize()
                except WorkerLostError:
                    pass  # what had not come by that way will not come any more: whoever asks for it is told
            self._last[worker] = self

    def way(self, worker: str) -> tuple[str, ...]:
        """Return the part of the route that leads to a worker."""
        return self.workers[: len(self.workers) - self.workers[::-1].index(worker)]

    def synchronize(self) -> None:
        """Wait until everything issued by this way has taken effect, down to its end."""
        if self.peer.channel.lost is None:
            self.peer.request([int(Kind.SYNC), [], list(self.workers[1:])])


_last: dict[str, Route] = {}
_routes: dict[tuple[int, tuple[str, ...]], Route] = {}

SPENT = Route(None, ())


def route_of(peer: Peer, *further: str) -> Route:
    """Return the route over a peer and further workers."""
    key = (peer.session_id, (peer.name, *further))
    found = _routes.get(key)
    if found is None:
        found = _routes.setdefault(key, Route(peer, key[1]))
    return found


def forget_routes(peer: Peer) -> None:
    """Forget the routes over a peer that is gone."""
    for key in [key for key, route in _routes.items() if route.peer is peer]:
        del _routes[key]
    for name in [name for name, route in _last.items() if route.peer is peer]:
        del _last[name]


def forget_all_routes() -> None:
    """Forget every route, in a child that was just forked."""
    _routes.clear()
    _last.clear()
