"""One direction-aware end of a session: numbered messages, acknowledged cumulatively, each taken once.

A packet is a list of four items::

    [ incarnation of the receiver, number of the first message, highest number received, messages ]

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
        self._packed: deque[tuple[int, list[Any]]] = deque()
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
        """Whether the peer must acknowledge before more may be submitted."""
        return self.submitted - self.acknowledged >= self._limit

    def pack(self) -> list[Any] | None:
        """Return the next packet, or None if there is nothing to say."""
        if not self._waiting and not self._owes_acknowledgement:
            return None
        messages, self._waiting = self._waiting, []
        first = self.submitted - len(messages) + 1
        if messages:
            self._packed.append((first, messages))
        self._owes_acknowledgement = False
        return [self.remote, first, self.taken, messages]

    def resume(self, taken: int) -> list[list[Any]]:
        """Return the packets to send again on a new link.

        Args:
            taken: What the peer says it has taken.

        Raises:
            ProtocolError: It cannot have taken that much.
        """
        self._acknowledge(taken)
        return [[self.remote, first, self.taken, messages] for first, messages in self._packed]

    def receive(self, packet: Any) -> list[tuple[int, list[Any]]]:
        """Return the new messages of a packet with their numbers, in order.

        Raises:
            StaleIncarnationError: It is meant for an earlier life of this process.
            ProtocolError: It is not a packet, or one before it is missing.
        """
        if not isinstance(packet, list) or len(packet) != 4:
            raise ProtocolError("a packet must be a list of four items")
        incarnation, first, acknowledged, messages = packet
        if type(first) is not int or type(acknowledged) is not int or not isinstance(messages, list):
            raise ProtocolError("a packet must be [bytes, int, int, list]")
        if incarnation != self.local:
            raise StaleIncarnationError("a packet for an earlier life of this process was dropped")
        self._acknowledge(acknowledged)
        if not messages:
            return []
        if first > self.taken + 1 or first < 1:
            raise ProtocolError(f"messages {self.taken + 1} to {first - 1} are missing")
        self._owes_acknowledgement = True
        fresh = messages[self.taken + 1 - first :]
        numbered = list(enumerate(fresh, self.taken + 1))
        self.taken += len(fresh)
        return numbered

    def _acknowledge(self, number: int) -> None:
        if number > self.submitted - len(self._waiting):
            raise ProtocolError(f"message {number} is acknowledged and was never sent")
        if number <= self.acknowledged:
            return
        self.acknowledged = number
        while self._packed and self._packed[0][0] + len(self._packed[0][1]) - 1 <= number:
            self._packed.popleft()
