"""How much a peer may send before it has to wait.

A link never stops reading its socket. A paused socket would also hold up pings, goodbyes and the other side's credit
behind the data: two parties that send to each other would stop each other, and a slow one would pass for dead. What
bounds memory in its place is credit: a peer sends what it was granted, and is granted more when its messages have been
received. So a link holds at most one message and a window, whatever its receiver does.

=========================  ==============================================================================
nothing waits              the peer may send a window more, and so on: one message of any size gets in
messages wait, or one is   the peer may send what fits into the window beside them and what there is of
being received             the next one
=========================  ==============================================================================
"""

from __future__ import annotations

from farpoint.limits import Limits
from farpoint_websocket.wire import FRAME_COST, MAX_CHUNK

WINDOW = 8 * 1024 * 1024
"""Cost of the messages that may wait for the receiver."""

STEP = WINDOW // 4
"""The least amount that is worth a notice."""


class Window:
    """The account of one direction.

    Args:
        limits: Those of this side.
    """

    def __init__(self, limits: Limits) -> None:
        self._granted = 0
        # Who has any credit may send one more chunk, with the frames that begin in it.
        self._slack = MAX_CHUNK + FRAME_COST * (limits.tensors + 1)

    def exceeded(self, arrived: int) -> bool:
        """Return whether the peer has sent more than it was allowed to."""
        return arrived > self._granted + self._slack

    def low(self, arrived: int) -> bool:
        """Return whether more credit is due as soon as more is received."""
        return self._granted - arrived <= WINDOW - STEP

    def grant(self, arrived: int, completed: int, received: int) -> int:
        """Return how much to grant now, 0 if it is not worth a notice.

        Args:
            arrived: Cost of everything that has arrived.
            completed: Cost of the messages that have arrived whole.
            received: Cost of the messages that the receiver is done with.
        """
        waiting = completed - received
        room = max(0, WINDOW - waiting - (arrived - completed)) if waiting else WINDOW
        amount = arrived + room - self._granted
        if amount < STEP:
            return 0
        self._granted += amount
        return amount
