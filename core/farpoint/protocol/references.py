"""Who holds what: the owner's list of holders, by object."""

from __future__ import annotations

from collections.abc import Iterable


class Holders:
    """Lists the objects that each holder has a reference to.

    An object that one holder has, the usual case, costs one entry of a set; a count is kept only of shared ones.
    """

    def __init__(self) -> None:
        self._held: dict[int, set[int]] = {}
        self._shared: dict[int, int] = {}

    def held(self, holder: int) -> set[int]:
        """Return the live set of what a holder has; only this class changes it."""
        found = self._held.get(holder)
        if found is None:
            found = self._held[holder] = set()
        return found

    def create(self, holder: int, object_id: int) -> None:
        """List the maker of a new object. Nobody holds it yet: whoever stores an object has seen that its id is new."""
        self.held(holder).add(object_id)

    def claim(self, holder: int, object_id: int) -> None:
        """List one more holder of an object. A second claim changes nothing."""
        held = self.held(holder)
        if object_id in held:
            return
        if object_id in self._shared:
            self._shared[object_id] += 1
        elif any(object_id in other for other in self._held.values()):
            self._shared[object_id] = 2
        held.add(object_id)

    def release(self, holder: int, object_id: int) -> bool:
        """Strike a holder out, and return whether nobody holds the object now. A second release changes nothing."""
        held = self._held.get(holder)
        if held is None or object_id not in held:
            return False
        held.remove(object_id)
        count = self._shared.get(object_id)
        if count is None:
            return True
        if count == 2:
            del self._shared[object_id]
        else:
            self._shared[object_id] = count - 1
        return False

    def leave(self, holder: int) -> list[int]:
        """Strike a holder out everywhere, and return what nobody holds now."""
        gone = [object_id for object_id in list(self._held.get(holder, ())) if self.release(holder, object_id)]
        self._held.pop(holder, None)
        return gone

    def sole(self, holder: int, object_id: int) -> bool:
        """Return whether this is the only holder of an object."""
        return object_id in self._held.get(holder, ()) and object_id not in self._shared

    def forget(self, object_ids: Iterable[int]) -> None:
        """Strike objects out of every list."""
        gone = set(object_ids)
        for held in self._held.values():
            held -= gone
        for object_id in gone:
            self._shared.pop(object_id, None)
