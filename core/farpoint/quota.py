"""What one client may make a worker keep."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from farpoint.errors import QuotaError

if TYPE_CHECKING:
    from farpoint.limits import Limits
    from farpoint.protocol.session import Session
    from farpoint.store import ObjectStore

_SMALL = 2**20


def weigh(tensor: torch.Tensor) -> int:
    """Return the bytes that a new object may add: its elements', but never more than its storage has."""
    size = tensor.nbytes
    return size if size < _SMALL else min(size, tensor.untyped_storage().nbytes())


class Quota:
    """Counts the objects and the tensor bytes of one session.

    Bytes are only added up as objects come, which costs next to nothing. When the sum reaches the limit, the store is asked
    what the session's objects really keep alive: views share memory, and much has been freed. So that this stays rare, a
    client may exceed the limit by a 64th part.

    Args:
        worker: Who keeps.
        store: Where.
        held: The ids that the session holds, as they change.
        limits: How much.
    """

    __slots__ = ("_answers", "_held", "_left", "_limits", "_store", "_under_way", "_worker")

    def __init__(self, worker: str, store: ObjectStore, held: set[int], limits: Limits) -> None:
        self._worker = worker
        self._store = store
        self._held = held
        self._limits = limits
        self._left = limits.bytes
        self._answers: deque[tuple[int, int]] = deque()
        self._under_way = 0

    def check(self, nbytes: int = 0, objects: int = 1) -> None:
        """Make room for new objects.

        Args:
            nbytes: What they weigh.
            objects: How many they are.

        Raises:
            QuotaError: There is none.
        """
        limits = self._limits
        if len(self._held) + objects > limits.objects:
            raise QuotaError(self._worker, "objects", limits.objects, f"object {len(self._held) + objects}")
        self._left -= nbytes
        if self._left < 0:
            used = self._store.bytes_of(self._held)
            self._left = limits.bytes - used - nbytes
            if self._left < 0:
                raise QuotaError(self._worker, "bytes", limits.bytes, f"{nbytes} bytes beside the {used} that it keeps")
            self._left += limits.bytes // 64

    def note(self, nbytes: int) -> None:
        """Count bytes that have been written in place: an `out=` may have grown."""
        self._left -= nbytes

    def check_answer(self, session: Session, nbytes: int) -> None:
        """Make room for an answer that is kept until it is acknowledged. The first is always let pass.

        Raises:
            QuotaError: There is none.
        """
        answers = self._answers
        while answers and answers[0][0] <= session.acknowledged:
            self._under_way -= answers.popleft()[1]
        if answers and self._under_way + nbytes > self._limits.bytes:
            found = f"{nbytes} bytes more, while {self._under_way} bytes of answers wait for an acknowledgement"
            raise QuotaError(self._worker, "bytes", self._limits.bytes, found)
        answers.append((session.submitted + 1, nbytes))
        self._under_way += nbytes
