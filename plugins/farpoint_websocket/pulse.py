"""When a link is given up: no sign of life, or no progress."""

from __future__ import annotations

from farpoint.limits import Limits

PATIENCE = 40
"""How many times `stall_seconds` a peer may keep a writer waiting while it says that it is busy."""


class Pulse:
    """What one end of a link knows about the life of the other, from a clock that its owner reads.

    * Whatever arrives is a sign of life. After `ping_seconds` of silence the peer is tested; `pong_seconds` later it
      is dead.
    * A write that waits must see progress within `stall_seconds`: bytes that leave, credit, or the word of the peer
      that its receiver is busy. The last one is believed `PATIENCE` times as long.
    * Time that this side has overslept (a stopped process, a loop that had no processor) counts for nobody.

    Args:
        limits: The time-outs.
        now: The time.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        shortest = min(limits.ping_seconds, limits.pong_seconds, limits.stall_seconds, limits.close_seconds)
        self.interval = max(0.01, shortest / 4)
        self._limits = limits
        self._looked = self._heard = self._progress = self._moved = now
        self._waits = False
        self._asked = now
        self._tested = now

    def heard(self, when: float) -> None:
        """Note when bytes have arrived."""
        self._heard = max(self._heard, when)

    def moved(self, now: float) -> None:
        """Note that bytes have left, or may leave again."""
        self._progress = self._moved = now

    def busy(self, now: float) -> None:
        """Note that the peer says that its receiver is at work."""
        self._progress = now

    def look(self, now: float, waits: bool) -> str:
        """Return what kills the link, empty if nothing does.

        Args:
            now: The time.
            waits: Whether anything waits to be sent.
        """
        limits = self._limits
        late = max(0.0, now - self._looked - self.interval)
        self._heard, self._progress, self._moved, self._asked, self._tested = (
            min(now, mark + late)
            for mark in (self._heard, self._progress, self._moved, self._asked, self._tested)
        )
        self._looked = now
        if not waits or not self._waits:
            self._progress = self._moved = self._asked = now
        self._waits = waits
        if now - self._heard > limits.ping_seconds + limits.pong_seconds:
            return f"no sign of life for {limits.ping_seconds + limits.pong_seconds:g} s, and no answer to a ping"
        if now - self._progress > limits.stall_seconds:
            return f"a write made no progress for {limits.stall_seconds:g} s"
        if now - self._moved > PATIENCE * limits.stall_seconds:
            return f"the receiver of the peer took nothing for {PATIENCE * limits.stall_seconds:g} s"
        return ""

    def asks(self, now: float) -> bool:
        """Return whether to ask the peer if it is busy."""
        if now - max(self._asked, self._progress) < self._limits.stall_seconds / 3:
            return False
        self._asked = now
        return True

    def tests(self, now: float) -> bool:
        """Return whether to ping the peer."""
        if now - max(self._tested, self._heard) < self._limits.ping_seconds:
            return False
        self._tested = now
        return True
