"""One direction-aware end of a session: numbered messages, acknowledged cumulatively, each taken once.

A packet is a list of four items::

    [ incarnation of the receiver, number of the first message, highest number received, messages ]

What was submitted is kept until the peer has acknowledged it, and `resume` returns it for a new link. That is the reply
cache as well: a query that is sent again is dropped by its number, and its answer, if the asker has not acknowledged it, is
sent again. So nothing is executed twice, and nothing but numbers is compared.

No I/O happens here: packets go in, messages come out, and the other way round.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from farpoint.errors import ProtocolError, StaleIncarnationError
from farpoint.limits import DEFAULT_LIMITS, Limits


class Session:
    """Numbers what is sent, keeps it until it is acknowledged, and drops what was received before.

    Args:
        local: Incarnation of this process: 16 random bytes.
        remote: Incarnation of the peer.
        limits: How many messages may be unacknowledged.

    Attributes:
        submitted: Number of the last message that was submitted here.
        acknowledged: Number of the last of them that the peer has taken.
        taken: Number of the last message that was taken from the peer.
    """

    def __init__(self, local: bytes, remote: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
        self.local = local
        self.remote = remote
        self.submitted = 0
        self.acknowledged = 0
        self.taken = 0
        self._limit = limits.commands_in_flight
        self._waiting: list[Any] = []
        self._packed: deque[list[Any]] = deque()
        self._room = 0
        self._told = 0
        self._owes_acknowledgement = False

    def submit(self, message: list[Any]) -> int:
        """Take a message for the next packet and return its number."""
        self._waiting.append(message)
        self.submitted += 1
        return self.submitted

    @property
    def waiting(self) -> int:
        """How many messages the next packet would hold."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the peer must acknowledge before more may be submitted.

        An acknowledgement that `resume` was told makes no room: only one that came in a packet, behind the answers to what
        it acknowledges, shows that these have come too. Or the peer's answers would add up while links keep breaking.
        """
        return self.submitted - self._room >= self._limit

    @property
    def owed(self) -> int:
        """How many messages were taken since the peer was last told."""
        return self.taken - self._told

    def pack(self, most: int | None = None) -> list[Any] | None:
        """Return the next packet, or None if there is nothing to say.

        Args:
            most: How many messages it may hold.
        """
        if not self._waiting and not self._owes_acknowledgement:
            return None
        first = self.submitted - len(self._waiting) + 1
        messages, self._waiting = self._waiting[:most], self._waiting[most:] if most is not None else []
        packet = [self.remote, first, self.taken, messages]
        if messages:
            self._packed.append(packet)
        self._owes_acknowledgement = False
        self._told = self.taken
        return packet

    def resume(self, taken: int) -> list[list[Any]]:
        """Return the packets to send again on a new link.

        Args:
            taken: What the peer says it has taken.

        Raises:
            ProtocolError: It cannot have taken that, or has acknowledged more: it has forgotten, and what it lacks is gone.
        """
        self._check(taken)
        if taken < self.acknowledged:
            raise ProtocolError(f"message {self.acknowledged} was acknowledged, and now only {taken} is known to have come")
        self._acknowledge(taken)
        self._owes_acknowledgement = True
        return list(self._packed)

    def receive(self, packet: Any) -> list[tuple[int, list[Any]]]:
        """Return the new messages of a packet with their numbers, in order.

        Raises:
            StaleIncarnationError: It is meant for an earlier life of this process.
            ProtocolError: It is not a packet, or one before it is missing. It has changed nothing.
        """
        if not isinstance(packet, list) or len(packet) != 4:
            raise ProtocolError("a packet must be a list of four items")
        incarnation, first, acknowledged, messages = packet
        if type(first) is not int or type(acknowledged) is not int or type(messages) is not list:
            raise ProtocolError("a packet must be [bytes, int, int, list]")
        if incarnation != self.local:
            raise StaleIncarnationError("a packet for an earlier life of this process was dropped")
        if messages and not 1 <= first <= self.taken + 1:
            raise ProtocolError(f"message {self.taken + 1} is next, and a packet begins with {first}")
        self._check(acknowledged)
        self._acknowledge(acknowledged)
        self._room = max(self._room, acknowledged)
        if not messages:
            return []
        self._owes_acknowledgement = True
        fresh = messages[self.taken + 1 - first :]
        numbered = list(enumerate(fresh, self.taken + 1))
        self.taken += len(fresh)
        return numbered

    def _check(self, number: int) -> None:
        if not 0 <= number <= self.submitted - len(self._waiting):
            raise ProtocolError(f"message {number} is acknowledged and was never sent")

    def _acknowledge(self, number: int) -> None:
        if number <= self.acknowledged:
            return
        self.acknowledged = number
        while self._packed and self._packed[0][1] + len(self._packed[0][3]) - 1 <= number:
            self._packed.popleft()
