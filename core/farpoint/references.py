"""What this process holds of the objects of one worker."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farpoint.peer import Peer

_RELEASED_AT_ONCE = 1024


def unguessable_ids() -> list[int]:
    """Return ids of which none tells anything about another: an id is all that one needs to become a holder."""
    return [number >> 1 or 1 for number in struct.unpack("<512Q", os.urandom(4096))]


class Reference:
    """One reference of this process to a remote object. Its end is noted, and told with the next batch."""

    __slots__ = ("__weakref__", "id", "peer")

    def __init__(self, peer: Peer, object_id: int) -> None:
        self.peer = peer
        self.id = object_id

    def __del__(self) -> None:
        # No I/O in a finalizer: it may run anywhere, also while the channel's lock is held.
        try:
            self.peer.references.dropped.append(self.id)
        except AttributeError:
            pass  # made without `__init__`, as torch.compile makes examples of what it meets


class References:
    """The references to the objects of one worker, counted: the worker is told of the last one only.

    Args:
        peer: The worker.

    Attributes:
        dropped: Ids of references that have ended, and are not told of yet.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.dropped: deque[int] = deque()
        self._ids: list[int] = []
        self._counts: dict[int, int] = {}

    def new_id(self) -> int:
        """Return an id for a new object there, and hold a reference to it."""
        try:
            object_id = self._ids.pop()
        except IndexError:
            object_id, *fresh = unguessable_ids()
            self._ids.extend(fresh)
        self._counts[object_id] = 1
        return object_id

    def refer(self, object_id: int, *, claimed: bool = False) -> Reference:
        """Return a reference to an object that `new_id` has counted, or count one more for one that was claimed."""
        if claimed:
            with self._peer.channel.lock:
                self._counts[object_id] = self._counts.get(object_id, 0) + 1
        return Reference(self._peer, object_id)

    def pin(self, object_id: int) -> None:
        """Count one more reference to an object, for somebody who gives it up by `unpin`, or by `dropped`."""
        with self._peer.channel.lock:
            self._counts[object_id] = self._counts.get(object_id, 0) + 1

    def pin_new(self, object_id: int) -> None:
        """Do as `pin` for what `new_id` has just returned: nobody else knows it."""
        self._counts[object_id] += 1

    def unpin(self, ids: list[int]) -> list[int]:
        """Give pins up, and return the ids of which nothing is held any more, for the caller to tell. The channel's lock is held."""
        gone = []
        for object_id in ids:
            left = self._counts.get(object_id, 0) - 1
            if left > 0:
                self._counts[object_id] = left
            else:
                self._counts.pop(object_id, None)
                gone.append(object_id)
        return gone

    def take_released(self) -> Iterator[list[int]]:
        """Yield the ids of which nothing is held any more, for commands to tell. The channel's lock is held."""
        dropped = []
        while self.dropped:
            dropped.append(self.dropped.popleft())
        gone = self.unpin(dropped)
        for start in range(0, len(gone), _RELEASED_AT_ONCE):
            yield gone[start : start + _RELEASED_AT_ONCE]
