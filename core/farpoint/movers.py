"""Carries out moves: what `farpoint.protocol.transfer` decides, with this worker's store and peers."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from farpoint.answers import LOCAL
from farpoint.channel import LARGE
from farpoint.errors import (
    FarpointError,
    LimitError,
    ProtocolError,
    QuotaError,
    StaleIncarnationError,
    TransportError,
)
from farpoint.failures import describe_failure
from farpoint.names import check_note
from farpoint.protocol import transfer as states
from farpoint.protocol.fields import fields_of, message_of
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import ID, PAYLOAD
from farpoint.quota import weigh
from farpoint.store import Annotation
from farpoint.stored import StoredPointer
from farpoint.tensors import dense

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.peer import Peer
    from farpoint.worker import Worker


class Movers:
    """The moves of one worker, as source, destination or in the middle of a chain."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._states = states.Transfers(int.from_bytes(worker.incarnation, "big"))
        self._leaving: dict[int, tuple[torch.Tensor, Annotation, str]] = {}
        self._staged: dict[int, tuple[states.Stage, list[Any]]] = {}
        self._expected: dict[int, Guest] = {}
        self._awaiting: dict[int, list[Callable[[], None]]] = {}
        self._ends: dict[int, tuple[Callable[[], None], Callable[[str], None]]] = {}
        self._renounced: deque[tuple[int, int]] = deque(maxlen=worker.limits.transfers)
        self._doubtful: dict[Peer, list[Callable[[], None]]] = {}

    def move(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Take a MOVE: begin it if the data is here, or pass it on along the chain."""
        _, object_id, hops, destination, url, _, _, leave, capability = message
        worker = self._worker
        value = worker.find(guest, object_id)
        worker.authorize(guest, "move", object_id)
        if hops > worker.limits.hops:
            raise LimitError("hops", worker.limits.hops, f"a chain of {hops} hops")
        if isinstance(value, torch.Tensor) != (hops == 0):
            raise ProtocolError(f"object {object_id} is not {hops} hops from the data")
        if hops == 0:
            # A worker that is its own destination must have greeted itself, or nobody could hold what arrives.
            if destination != worker.id or not self._greets(guest, number, message):
                self._depart(guest, number, value, message)
            return
        # The middle of a chain. The last pointer before the data is re-pointed, unless the data end only grows.
        peer = value.reference.peer
        here = hops == 1 and not leave and destination != worker.id
        if here and self._greets(guest, number, message):
            return  # what arrives there before this worker has a session there would have no holder
        guest.pass_on(peer)
        onward = [int(Kind.MOVE), value.reference.id, hops - 1, *message[3:]]
        done: Callable[[], None] = lambda: guest.answer(number, True)  # noqa: E731
        arrived = 0
        if hops == 1 and not leave:
            if destination == worker.id:
                arrived = secrets.randbits(62) + 1
                onward[4:7] = [worker.url, arrived, LOCAL]
                onward[8] = worker.doorman.invite(peer)

                def done() -> None:
                    if arrived not in worker.store:
                        raise ProtocolError(f"{peer.name} says that it has moved an object here, and nothing has come")
                    note = worker.store.annotation(arrived)
                    worker.store[object_id] = worker.store.pop(arrived)
                    worker.holders.release(LOCAL, arrived)
                    worker.store.annotate(object_id, note)
                    worker.dirty.add(peer)
                    guest.answer(number, True)
            else:
                there = worker.introduce(destination, url, capability)
                onward[5:7] = [there.references.new_id(), there.session_id]
                onward[8] = there.terms.give(object=onward[5], operation="move", audience=peer.incarnation.hex())
                reference = there.references.refer(onward[5])

                def done() -> None:
                    worker.store[object_id] = attrs.evolve(value, reference=reference)
                    worker.dirty.add(peer)
                    guest.answer(number, True)

        def then(answer: Any) -> None:
            self._expected.pop(arrived, None)
            try:
                if isinstance(answer, FarpointError):
                    raise answer
                if object_id not in worker.store:
                    raise ProtocolError("the pointer to what moved was given up meanwhile, and what moved with it")
                done()
            except FarpointError as error:
                guest.fail(number, describe_failure(error, worker.id, "MOVE", expose=False))
            if arrived:
                worker.release(LOCAL, arrived)

        peer.ask(onward, then)
        if arrived:
            self._expected[arrived] = guest
        worker.dirty.add(peer)

    def _greets(self, guest: Guest, number: int, message: list[Any]) -> bool:
        """Return whether a session with a worker has yet to begin; then the message is carried out when it has."""
        worker = self._worker

        def go_on(error: FarpointError | None) -> None:
            if error is None:
                worker.execute(guest, number, message)
            else:
                guest.fail(number, describe_failure(error, worker.id, "MOVE", expose=False))

        return worker.introduce(message[3], message[4], message[8]).defer(go_on)

    def _depart(self, guest: Guest, number: int, value: torch.Tensor, message: list[Any]) -> None:
        worker = self._worker
        _, object_id, _, destination, url, new_id, holder, leave, capability = message
        note = worker.store.annotation(object_id)
        if value.nbytes > worker.limits.message_bytes:  # an expanded tensor may be far larger than its memory
            raise LimitError("message_bytes", worker.limits.message_bytes, f"a tensor of {value.nbytes} bytes")
        plain = dense(value)
        if guest.moves >= worker.limits.transfers:
            raise QuotaError(worker.id, "transfers", worker.limits.transfers, f"move {guest.moves + 1} at a time")
        there = worker.introduce(destination, url, capability)
        if leave:
            new_id, holder = there.references.new_id(), there.session_id

        def done() -> None:
            guest.moves -= 1
            if leave:
                pointer = StoredPointer(worker.id, object_id, there.references.refer(new_id), None)
                if object_id in worker.store:  # or the last holder has left meanwhile, and what moved is given up there
                    worker.store[object_id] = pointer
                worker.dirty.add(there)
            # Otherwise the mover gives its reference up itself: it may have pinned it for a hand-over.
            guest.answer(number, True)

        def failed(reason: str) -> None:
            guest.moves -= 1
            error = TransportError(f"object {object_id}", f"it did not move to {destination}, and is where it was: {reason}")
            guest.fail(number, describe_failure(error, worker.id, "MOVE", expose=False))

        if destination == worker.id:
            self._check_place(holder, new_id, weigh(value))
            guest.moves += 1
            worker.add(holder, new_id, value)
            worker.store.annotate(new_id, note)
            done()
            return
        ID.check("MOVE", "new_id", new_id)
        transfer = secrets.randbits(62) + 1
        guest.moves += 1
        # What travels is a second entry of the object: other holders keep theirs, and a failure changes nothing.
        self._leaving[transfer] = (plain, note, "" if leave else capability)
        self._ends[transfer] = (done, failed)
        self._carry_out(self._states.begin(transfer, transfer, destination, new_id, holder))

    def receive(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Take a TRANSFER message of another worker."""
        _, name, fields, payload = message
        parsed = message_of(name, fields)
        if isinstance(parsed, states.Push):
            parsed = attrs.evolve(parsed, payload=payload)
        # Who answers there is who speaks here, or the state machine takes what it says for that of a life that is over.
        peer = self._worker.introduce(guest.name, guest.url, guest.introduction)
        again: Callable[[], None] = lambda: self._worker.execute(guest, number, message)  # noqa: E731

        def greeted(error: FarpointError | None) -> None:
            if error is None:
                again()
            else:
                guest.fail(number, describe_failure(error, self._worker.id, "TRANSFER", expose=False))

        if peer.defer(greeted) or self._doubts(peer, guest, again):
            return
        here, there = self._states.incarnation, int.from_bytes(guest.incarnation, "big")
        self._carry_out(self._states.receive(guest.name, there, here, parsed), guest)

    def _doubts(self, peer: Peer, guest: Guest, again: Callable[[], None]) -> bool:
        """Return whether two lives of a worker speak, one at each end. What the guest says is then carried out if the peer is dead.

        Raises:
            LimitError: Too much waits for that already.
        """
        if peer.incarnation == guest.incarnation:
            return False

        def answered(answer: Any) -> None:
            waiting = self._doubtful.pop(peer)
            if isinstance(answer, FarpointError):
                for call in waiting:
                    call()

        limit = self._worker.limits.transfers
        if len(self._doubtful.setdefault(peer, [])) >= limit:
            raise LimitError("transfers", limit, f"another message while nobody knows whether {peer.name} has restarted")
        self._doubtful[peer].append(again)
        if len(self._doubtful[peer]) == 1:
            peer.ask([int(Kind.DESCRIBE), []], answered)
            self._worker.dirty.add(peer)
        return True

    def unheard(self, peer: Peer, transfer: int, reason: str, *, forbidden: bool) -> None:
        """Learn that another worker could not take what it was told about a transfer. It is not moved then, or told again.

        Args:
            peer: The other worker.
            transfer: Which.
            reason: Why it could not.
            forbidden: Whether that is so because it may not.
        """
        with self._worker.lock:
            if forbidden:
                self._carry_out(self._states.forbidden(transfer))
            if transfer in self._ends:
                self._carry_out(self._states.abort(transfer, f"{peer.name}: {reason}"))
            if peer.name in self._states.open_peers():
                self._worker.look_after(peer.name)

    def peer_back(self, peer: Peer) -> None:
        """Learn that a session with another worker begins."""
        self._carry_out(self._states.peer_back(peer.name, int.from_bytes(peer.incarnation, "big")))

    def peer_lost(self, peer: Peer) -> None:
        """Learn that one is over, and whether the worker has died with it, or may still be there."""
        # Nobody listening where a worker is dialled means nothing while it has a link to here.
        dead = peer.dead and not (isinstance(peer.channel.lost, TransportError) and self._speaks(peer))
        with self._worker.lock:
            gone = [] if peer.established else self._states.give_up(peer.name, str(peer.channel.ended()))
            self._carry_out(gone)
            self._carry_out(self._states.peer_dead(peer.name) if dead else self._states.peer_lost(peer.name))
            self._carry_out(self._states.give_up(peer.name, str(peer.channel.ended())))
            if not dead and peer.name in self._states.open_peers():
                self._worker.look_after(peer.name)

    def guest_lost(self, guest: Guest) -> None:
        """Learn that the session of a client is over. If it is a worker, what it said last may be lost, also that all is done."""
        if guest.name in self._states.open_peers():
            self._worker.look_after(guest.name)

    def _speaks(self, peer: Peer) -> bool:
        """Return whether a worker has a link to here, though perhaps none leads from here to it."""
        # Not `peer.incarnation`: whoever was dialled in vain has not said which life it is in.
        life = self._states.life_of(peer.name)
        guests = [guest for guest in list(self._worker.guests.values()) if guest.channel.lane is not None]
        return any(guest.name == peer.name and int.from_bytes(guest.incarnation, "big") == life for guest in guests)

    def on_the_way(self, new_id: int, holder: int, then: Callable[[], None]) -> bool:
        """Call something when it is decided whether an object arrives that is on its way to a holder here.

        Return False, and do not, if none of that id is. Then none is taken later either: who asks is told that it is lost.
        """
        for stage, _ in self._staged.values():
            if (stage.new_id, stage.holder) == (new_id, holder):
                self._awaiting.setdefault(stage.transfer, []).append(then)
                return True
        self._renounced.append((holder, new_id))
        return False

    def _carry_out(self, effects: list[states.Effect], source: Guest | None = None) -> None:
        worker = self._worker
        for effect in effects:
            match effect:
                case states.Send(peer=name, message=message, object_id=object_id):
                    try:
                        self._send(worker.peer(name), message, object_id)
                    except FarpointError:
                        pass  # the link is gone, and `peer_back` asks again
                case states.Stage():
                    try:
                        self._stage(effect, source)
                    except FarpointError as error:
                        reason = str(error)[: worker.limits.error_chars]
                        self._carry_out(self._states.refuse(effect.transfer, reason))
                        return
                case states.Activate(transfer=transfer, new_id=new_id, holder=holder):
                    _, staged = self._staged.pop(transfer, (None, None))
                    if staged is not None and self._awaited(holder, new_id):
                        arrived = staged[0] if worker.isolation is None else worker.isolation.share(staged[0])
                        worker.add(holder, new_id, arrived)
                        worker.store.annotate(new_id, Annotation(frozenset(staged[2]), staged[3], staged[1]))
                    self._decided(transfer)
                case states.Discard(transfer=transfer):
                    self._staged.pop(transfer, None)
                    self._decided(transfer)
                case states.Drop(object_id=object_id):
                    self._leaving.pop(object_id, None)
                case states.Done(transfer=transfer):
                    self._ends.pop(transfer)[0]()
                case states.Failed(transfer=transfer, reason=reason):
                    self._leaving.pop(transfer, None)
                    self._ends.pop(transfer)[1](reason)

    def _decided(self, transfer: int) -> None:
        for then in self._awaiting.pop(transfer, ()):
            then()

    def _send(self, peer: Peer, message: states.TransferMessage, object_id: int | None) -> None:
        payload: list[Any] | None = None
        if object_id is not None:
            value, note, capability = self._leaving[object_id]
            payload = [value, note.requires_grad, sorted(note.tags), note.description, capability]
        told = [int(Kind.TRANSFER), type(message).__name__, fields_of(message), payload]
        if payload is not None and payload[0].nbytes >= LARGE and not peer.channel.inline:
            value, payload[0] = payload[0], None
            peer.stream(told, [3, 0], value, (LOCAL, message.transfer))
        else:
            peer.tell(told, (LOCAL, message.transfer))
        self._worker.dirty.add(peer)

    def _stage(self, effect: states.Stage, source: Guest | None) -> None:
        payload = effect.payload
        if payload is None:
            raise ProtocolError("the push carries no tensor")
        # Not with the other fields of the message: who began the move shall learn that this one refuses it.
        PAYLOAD.check([int(Kind.TRANSFER), *payload], self._worker.limits)
        check_note(payload[2], payload[3], payload[1])
        others = [staged for transfer, staged in self._staged.items() if transfer != effect.transfer]
        if any(other.new_id == effect.new_id for other, _ in others):
            raise ProtocolError(f"object {effect.new_id} is on its way here already")
        # What is staged for the same holder counts as if it held it.
        beside = [weigh(content[0]) for other, content in others if other.holder == effect.holder]
        self._check_place(effect.holder, effect.new_id, weigh(payload[0]) + sum(beside), 1 + len(beside))
        assert source is not None  # only a Push stages, and somebody sent it
        if source.introduced and effect.holder not in (LOCAL, source.holder):
            self._worker.doorman.check_move(source, effect.new_id, effect.holder, payload[4])
        self._worker.authorize(source, "put", effect.new_id)
        self._staged[effect.transfer] = (effect, payload)

    def _check_place(self, holder: int, new_id: int, nbytes: int, objects: int = 1) -> None:
        """Check that whoever shall hold what arrives is here, and may hold it."""
        worker = self._worker
        worker.check_new(new_id)
        guest = worker.guests.get(holder) if holder != LOCAL else self._expected.get(new_id)
        if guest is None:
            raise StaleIncarnationError(f"whoever shall hold the object has no session here: {worker.id} may have restarted meanwhile")
        if (holder, new_id) in self._renounced:
            raise ProtocolError("whoever shall hold the object has been told that it is lost")
        guest.quota.check(nbytes, objects)

    def _awaited(self, holder: int, new_id: int) -> bool:
        """Return whether what was staged still has a holder and a place: the holder may have gone, or taken the id itself."""
        here = holder in self._worker.guests if holder != LOCAL else new_id in self._expected
        return here and new_id not in self._worker.store and new_id not in self._worker.poisoned
