"""Streams of commands that a worker keeps as plans, and sending one of them with one message."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from farpoint.macro import pack
from farpoint.protocol.messages import Kind
from farpoint.provenance import spell
from farpoint.recording import Command, Registration, Stream

if TYPE_CHECKING:
    from farpoint.peer import Peer

VARIANTS = 16
"""Streams of one function that are remembered for a worker: those of other shapes, of every fourth step, of evaluation."""


class Variants:
    """The streams of one function that one worker has seen, the latest last. What comes a second time becomes a plan there."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Command, ...], Registration | None] = OrderedDict()

    def submit(self, stream: Stream) -> bool:
        """Send a stream, and return whether it went as a plan.

        Raises:
            FarpointError: The session is over.
        """
        registration, fresh = self.register(stream)
        if registration is None:
            stream.send()
            return False
        ids, stream.ids = stream.ids, []
        send_plan(stream.peer, registration, stream, ids, stream.values, ids, fresh=fresh)
        return True

    def register(self, stream: Stream) -> tuple[Registration | None, bool]:
        """Return the number of the plan for a stream, None if it has none yet, and whether the worker must be told of it."""
        key = tuple(stream.commands)
        peer = stream.peer
        known = key in self._known
        registration = self._known.pop(key, None)
        fresh = known and registration is None and _fits(stream)
        if fresh:
            registration = peer.plans.new(peer.limits.plans)
        self._known[key] = registration
        while len(self._known) > VARIANTS:
            self._known.popitem(last=False)
        return registration, fresh


def send_plan(
    peer: Peer, registration: Registration, stream: Stream, ids: list[int], values: list[Any], given_up: list[int], *, fresh: bool
) -> None:
    """Send the one message that has a worker carry a stream out.

    Args:
        peer: The worker.
        registration: The number of the plan.
        stream: What is to be done.
        ids: The id in each place.
        values: The numbers and small tensors in it.
        given_up: Ids of which one reference is given up with it.
        fresh: Whether the worker must be told of the plan first.
    """
    _make_room(peer, len(stream.commands))
    with peer.channel.lock:
        if fresh:
            peer.channel.submit([int(Kind.PLAN), registration.number, _spell(peer, stream.commands)])
        released = [object_id for gone in peer.references.take_released() for object_id in gone]
        released += peer.references.unpin(given_up)
        number = peer.channel.submit([int(Kind.RUNPLAN), registration.number, pack(ids), values, pack(released)])
        peer.answers.issued.append((number, (tuple(stream.origins), 0)))
        peer.take_room(len(stream.commands))
    peer.soon()


def _fits(stream: Stream) -> bool:
    """Return whether a plan, and a call of it, are no larger than a message may be."""
    limits = stream.peer.limits
    items = sum(3 + len(operands) + len(results) for _, operands, results in stream.commands)
    largest = 9 * max(items, 2 * len(stream.ids) + len(stream.values))  # bytes at most
    return len(stream.values) <= limits.array_items and largest <= limits.header_bytes // 2


def _make_room(peer: Peer, commands: int) -> None:
    peer.await_room()
    if commands > peer.limits.commands_in_flight // 2:
        peer.make_room()  # which waits for all that was before


def _spell(peer: Peer, commands: list[Command]) -> list[Any]:
    """Return commands as a PLAN carries them, when the worker knows each template."""
    slots: list[int] = []
    while True:
        found = [peer.slot(template) for template, _, _ in commands]
        if found == slots:  # defining one may have cost another its slot
            break
        slots = found
    return [[slot, list(operands), list(results)] for slot, (_, operands, results) in zip(slots, commands, strict=True)]


def difference(before: Stream, now: Stream) -> tuple[str, str]:
    """Return in words what is different in two streams first, and the line of it."""
    for position, (old, new) in enumerate(zip(before.commands, now.commands, strict=False)):
        if old != new:
            names = [command[0].operation.name for command in (old, new)]
            if names[0] != names[1]:
                return f"{names[0]} the one time and {names[1]} the other", spell(now.origins[position])
            what = "constants or shapes" if old[0] is not new[0] else "operands"
            return f"{names[0]} with other {what}", spell(now.origins[position])
    longer = max(before, now, key=lambda stream: len(stream.commands))
    position = min(len(before.commands), len(now.commands))
    if position == len(longer.commands):
        return "", ""
    return f"{longer.commands[position][0].operation.name} the one time and nothing the other", spell(longer.origins[position])
