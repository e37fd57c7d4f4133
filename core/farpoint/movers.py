"""Carries out moves: what `farpoint.protocol.transfer` decides, with this worker's store and peers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from farpoint.errors import ObjectNotFoundError, ProtocolError, TransportError
from farpoint.failures import describe_failure
from farpoint.protocol import transfer as states
from farpoint.protocol.messages import Kind
from farpoint.store import Annotation

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.peer import Peer
    from farpoint.worker import Worker

_MESSAGES: dict[str, type[states.TransferMessage]] = {
    kind.__name__: kind
    for kind in (
        *(states.Push, states.Probe, states.Commit, states.Abort, states.Released, states.Prepared),
        *(states.Refused, states.Missing, states.Activated, states.Aborted, states.Inquire),
    )
}
LOCAL = 0
"""The holder that a worker is in its own list."""


class Movers:
    """The moves of one worker, as source, destination or in the middle of a chain."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._states = states.Transfers(int.from_bytes(worker.incarnation, "big"))
        self._leaving: dict[int, tuple[torch.Tensor, Annotation]] = {}
        self._staged: dict[int, list[Any]] = {}
        self._expected: set[int] = set()
        self._ends: dict[int, tuple[Callable[[], None], Callable[[str], None]]] = {}

    def move(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Take a MOVE: begin it if the data is here, or pass it on along the chain."""
        _, object_id, hops, destination, url, new_id, holder, leave = message
        worker = self._worker
        value = worker.find(guest, object_id)
        worker.authorize(guest, "move", object_id)
        failed = self._failed(guest, number, object_id)
        if type(hops) is not int or not 0 <= hops <= 8:
            raise ProtocolError(f"a chain of {hops!r} hops")
        if isinstance(value, torch.Tensor) != (hops == 0):
            raise ProtocolError(f"object {object_id} is not {hops} hops from the data")
        if hops == 0:
            self._depart(guest, number, object_id, value, (destination, url, new_id, holder), leave, failed)
            return
        # The middle of a chain. The last pointer before the data is re-pointed, unless the data end only grows.
        peer = value.reference.peer
        onward = [int(Kind.MOVE), value.reference.id, hops - 1, destination, url, new_id, holder, leave]
        done: Callable[[], None] = lambda: guest.answer(number, True)  # noqa: E731
        if hops == 1 and not leave:
            if destination == worker.id:
                onward[4:7] = [worker.url, secrets.randbits(62) + 1, LOCAL]
                arrived = onward[5]
                self._expected.add(arrived)

                def done() -> None:
                    self._expected.discard(arrived)
                    note = worker.store.annotation(arrived)
                    worker.store[object_id] = worker.store.pop(arrived)
                    worker.holders.release(LOCAL, arrived)
                    worker.store.annotate(object_id, note)
                    worker.dirty.add(peer)
                    guest.answer(number, True)
            else:
                there = worker.peer(destination, url)
                onward[5:7] = [there.new_id(), there.session_id]
                reference = there.refer(onward[5])

                def done() -> None:
                    worker.store[object_id] = attrs.evolve(value, reference=reference)
                    worker.dirty.add(peer)
                    guest.answer(number, True)

        def then(answer: Any) -> None:
            if isinstance(answer, Exception):
                guest.fail(number, describe_failure(answer, worker.id, "MOVE", expose=False))
            else:
                done()

        peer.ask(onward, then)
        worker.dirty.add(peer)

    def _failed(self, guest: Guest, number: int, object_id: int) -> Callable[[str], None]:
        def failed(reason: str) -> None:
            error = TransportError(f"object {object_id}", f"it did not move, and is where it was: {reason}")
            guest.fail(number, describe_failure(error, self._worker.id, "MOVE", expose=False))

        return failed

    def _depart(
        self,
        guest: Guest,
        number: int,
        object_id: int,
        value: torch.Tensor,
        place: tuple[str, str, int, int],
        leave: bool,
        failed: Callable[[str], None],
    ) -> None:
        from farpoint.worker import StoredPointer

        worker = self._worker
        destination, url, new_id, holder = place
        note = worker.store.annotation(object_id)
        there = worker.peer(destination, url)
        if leave:
            new_id, holder = there.new_id(), there.session_id

        def done() -> None:
            if leave:
                worker.store[object_id] = StoredPointer(worker.id, object_id, there.refer(new_id), None)
            # Otherwise the mover gives its reference up itself: it may have pinned it for a hand-over.
            guest.answer(number, True)

        if destination == worker.id:
            worker.add(holder, new_id, value)
            worker.store.annotate(new_id, note)
            done()
            return
        transfer = secrets.randbits(62) + 1
        # What travels is a second entry of the object: other holders keep theirs, and a failure changes nothing.
        self._leaving[transfer] = (value, note)
        self._ends[transfer] = (done, failed)
        self._carry_out(self._states.begin(transfer, transfer, destination, new_id, holder))

    def receive(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Take a TRANSFER message of another worker."""
        _, name, fields, payload = message
        kind = _MESSAGES.get(name)
        if kind is None or not isinstance(fields, list):
            raise ProtocolError(f"{str(name)[:40]!r} is no transfer message")
        values = [int(field[1], 16) if isinstance(field, list) else field for field in fields]
        parsed = kind(*values)
        if isinstance(parsed, states.Push):
            parsed = attrs.evolve(parsed, payload=payload)
        self._worker.peer(guest.name, guest.url)
        here, there = self._states.incarnation, int.from_bytes(guest.incarnation, "big")
        self._carry_out(self._states.receive(guest.name, there, here, parsed))

    def peer_back(self, peer: Peer) -> None:
        """Learn that a session with another worker begins."""
        with self._worker.lock:
            self._carry_out(self._states.peer_back(peer.name, int.from_bytes(peer.incarnation, "big")))

    def peer_lost(self, peer: Peer) -> None:
        """Learn that one is over."""
        with self._worker.lock:
            self._carry_out(self._states.peer_lost(peer.name))

    def _carry_out(self, effects: list[states.Effect]) -> None:
        worker = self._worker
        for effect in effects:
            match effect:
                case states.Send(peer=name, message=message, object_id=object_id):
                    self._send(worker.peer(name), message, object_id)
                case states.Stage():
                    try:
                        self._stage(effect)
                    except (ProtocolError, ObjectNotFoundError) as error:
                        self._carry_out(self._states.refuse(effect.transfer, str(error)))
                        return
                case states.Activate(transfer=transfer, new_id=new_id, holder=holder):
                    staged = self._staged.pop(transfer, None)
                    if staged is not None:
                        worker.add(holder, new_id, staged[0])
                        worker.store.annotate(new_id, Annotation(frozenset(staged[2]), staged[3], staged[1]))
                case states.Discard(transfer=transfer):
                    self._staged.pop(transfer, None)
                case states.Drop(object_id=object_id):
                    self._leaving.pop(object_id, None)
                case states.Done(transfer=transfer):
                    self._ends.pop(transfer)[0]()
                case states.Failed(transfer=transfer, reason=reason):
                    self._leaving.pop(transfer, None)
                    self._ends.pop(transfer)[1](reason)

    def _send(self, peer: Peer, message: states.TransferMessage, object_id: int | None) -> None:
        payload = None
        if object_id is not None:
            value, note = self._leaving[object_id]
            payload = [value, note.requires_grad, sorted(note.tags), note.description]
        skipped = ("payload",)
        values = [getattr(message, f.name) for f in attrs.fields(type(message)) if f.name not in skipped]
        # Incarnations have 128 bits, more than an integer of the wire.
        fields = [["x", f"{v:x}"] if type(v) is int and v >= 2**63 else v for v in values]
        if isinstance(message, states.Push):
            fields = [*fields[:6], None, fields[6]]
        peer.tell([int(Kind.TRANSFER), type(message).__name__, fields, payload])
        self._worker.dirty.add(peer)

    def _stage(self, effect: states.Stage) -> None:
        worker, payload = self._worker, effect.payload
        if not isinstance(payload, list) or not payload or not isinstance(payload[0], torch.Tensor):
            raise ProtocolError("the push carries no tensor")
        if effect.holder not in worker.guests and effect.new_id not in self._expected:
            raise ProtocolError("whoever shall hold the object has no session here")
        if effect.new_id in worker.store:
            raise ProtocolError(f"object {effect.new_id} exists and is never overwritten")
        self._staged[effect.transfer] = payload
