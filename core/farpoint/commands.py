"""What a worker does for its clients: one method for each kind of message but those of moves, plans and queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from farpoint.channel import LARGE
from farpoint.errors import (
    FarpointError,
    LimitError,
    MalformedMessageError,
    NotColocatedError,
    ObjectNotFoundError,
    ProtocolError,
)
from farpoint.executor import leaves
from farpoint.failures import describe_failure
from farpoint.forecast import forecast
from farpoint.names import check_note
from farpoint.operations import RESIZING
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import brief, check_run, is_number
from farpoint.queries import Queries
from farpoint.quota import weigh
from farpoint.resizing import resize
from farpoint.spec import describe_tensor, spec_from_wire
from farpoint.stored import Poisoned, StoredPointer
from farpoint.template import Template
from farpoint.tensors import dense, snapshot

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.peer import Peer
    from farpoint.worker import Worker

Command = Callable[["Guest", int, list[Any]], object]


class Commands:
    """The commands of one worker. Whoever calls one holds the worker's lock, and has checked the message's shape.

    Args:
        worker: Whose.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def table(self) -> dict[int, Command]:
        """Return what carries each kind of message out."""
        moves = self._worker.movers
        return {
            int(Kind.DEFINE): self._define,
            int(Kind.RUN): self._run,
            int(Kind.ASK): self._ask,
            int(Kind.PUT): self._put,
            int(Kind.LINK): self._link,
            int(Kind.CLAIM): self._claim,
            int(Kind.RELEASE): self._release,
            int(Kind.FETCH): self._fetch,
            int(Kind.MOVE): moves.move,
            int(Kind.SYNC): self._sync,
            int(Kind.DESCRIBE): self._describe,
            int(Kind.TRANSFER): moves.receive,
            int(Kind.LOCATE): self._locate,
            int(Kind.PLAN): self._worker.macros.keep,
            int(Kind.RUNPLAN): self._worker.macros.run,
            **Queries(self._worker).table(),
        }

    def _define(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, slot, name, args, kwargs = message
        limits = self._worker.limits
        if slot >= limits.templates:
            raise MalformedMessageError("DEFINE", "slot", f"below {limits.templates}", str(slot))
        old = guest.templates.pop(slot, None)
        guest.refused.pop(slot, None)
        if old is not None:
            guest.template_items -= _count_items(old.wire)
        try:
            items = guest.template_items + _count_items([name, args, kwargs])
            if items > limits.template_items:
                raise LimitError("template_items", limits.template_items, f"templates of {items} items")
            guest.templates[slot] = Template.from_wire(name, args, kwargs)
            guest.template_items = items
        except FarpointError as error:
            # Whatever uses the slot fails for this reason, not for the lack of a template.
            guest.refused[slot] = describe_failure(error, self._worker.id, name[: limits.error_chars], expose=False)
            raise Poisoned(guest.refused[slot]) from error

    def _run(self, guest: Guest, number: int, message: list[Any]) -> None:
        check_run(message, self._worker.limits)
        _, slot, given, results = message
        template = guest.templates.get(slot)
        if template is None:
            if slot in guest.refused:
                raise Poisoned(guest.refused[slot])
            raise MalformedMessageError("RUN", "slot", "one that was defined", str(slot))
        self.perform(guest, number, template, given, results)

    def perform(self, guest: Guest, number: int, template: Template, given: list[Any], results: list[int]) -> None:
        """Run a template.

        Args:
            guest: Who wants it.
            number: By which command.
            template: What runs.
            given: What fills its holes, not checked yet.
            results: Ids for what it returns, 0 for what is discarded.
        """
        if len(given) != template.size:
            raise MalformedMessageError("RUN", "values", f"{template.size} for {template.operation.name}", str(len(given)))
        for result in results:
            if result in self._worker.store or result in self._worker.poisoned:
                self._worker.check_new(result)
        values = given.copy()
        remote = False
        held, stored = guest.held, self._worker.store.get
        for hole in template.tensors:
            value = values[hole]
            if type(value) is int:
                found = stored(value) if value in held else None
                values[hole] = found = found if found is not None else self._worker.find(guest, value)
                remote = remote or type(found) is StoredPointer
            elif not isinstance(value, torch.Tensor):
                raise MalformedMessageError("RUN", f"values[{hole}]", "an id or a tensor", brief(value))
        for hole in template.numbers:
            if not is_number(values[hole]):
                raise MalformedMessageError("RUN", f"values[{hole}]", "a number", brief(values[hole]))
        if not template.tensors:
            self._admit_new(guest, template, values)
        if plugins.has_policy:
            about = given[0] if given and type(given[0]) is int else 0
            self._worker.authorize(guest, template.operation.name, about)
        if remote:
            self._pass_on(guest, number, template, values, results, given)
            return
        # Stored tensors require no grad: the tape is the client's.
        if template.operation.name in RESIZING:
            returned = resize(self._worker, guest, template, values, given)
        else:
            returned = guest.executor.execute(template, values)
        if self._worker.isolation is not None:
            for result in filter(None, results):  # others have been served meanwhile
                self._worker.check_new(result)
        if type(returned) is torch.Tensor and len(results) == 1 and results[0]:
            guest.quota.check(weigh(returned))
            self._worker.add(guest.holder, results[0], returned)
            return
        outputs = leaves(returned)
        weight = sum([weigh(value) for value in outputs if isinstance(value, torch.Tensor)])
        if any(results):
            guest.quota.check(weight, len(results))
        else:
            guest.quota.note(weight)
        for object_id, value in zip(results, outputs, strict=False):
            if object_id and isinstance(value, torch.Tensor):
                self._worker.add(guest.holder, object_id, value)

    def _admit_new(self, guest: Guest, template: Template, values: list[Any]) -> None:
        """Check that somebody may have a tensor made of nothing, and that there is room for it before it is made."""
        if guest.introduced:
            self._worker.doorman.check_kind(Kind.PUT)  # it is one, without the values
        guest.quota.check(forecast(template, values), 0)

    def _pass_on(
        self, guest: Guest, number: int, template: Template, values: list[Any], results: list[int], given: list[Any]
    ) -> None:
        peer: Peer | None = None
        onward = values.copy()
        for position, value in enumerate(values):
            if type(value) is StoredPointer:
                if peer is None:
                    peer = value.reference.peer
                elif value.reference.peer is not peer:
                    there = value.reference.peer.name
                    raise NotColocatedError(
                        template.operation.name, f"on {peer.name}", f"on {there}", f"p.move({peer.name})"
                    )
                onward[position] = value.reference.id
        assert peer is not None
        for value, sent in zip(values, given, strict=True):
            # What came with the command, a constant of a formula of torch's, goes on with it.
            if isinstance(value, torch.Tensor) and value.ndim and value is not sent:
                raise NotColocatedError(
                    template.operation.name, f"on {peer.name}", f"on {self._worker.id}", f"p.remote_send({peer.name})"
                )
        guest.quota.check(0, len(results))
        guest.pass_on(peer)
        created = [peer.references.new_id() if result else 0 for result in results]
        peer.run(template, onward, created, (guest.holder, number))
        for result, target in zip(results, created, strict=True):
            if result:
                self._worker.add(guest.holder, result, StoredPointer(self._worker.id, result, peer.references.refer(target), None))
        self._worker.dirty.add(peer)

    def _ask(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._run(guest, number, message)
        self._describe_many(guest, number, [self._worker.store[result] for result in message[3] if result in self._worker.store])

    def _describe_many(self, guest: Guest, number: int, values: list[Any]) -> None:
        peers = {value.reference.peer if isinstance(value, StoredPointer) else None for value in values}
        if len(peers) > 1:
            raise ProtocolError("objects that are in different places are described one by one")
        peer = peers.pop() if peers else None
        if peer is None:
            guest.answer(number, [describe_tensor(value) for value in values])
            return
        guest.pass_on(peer)
        peer.ask([int(Kind.DESCRIBE), [value.reference.id for value in values]], self._relay(guest, number))
        self._worker.dirty.add(peer)

    def _relay(self, guest: Guest, number: int, instead: Any = None, object_id: int = 0) -> Callable[[Any], None]:
        def pass_back(answer: Any) -> None:
            if object_id in self._worker.poisoned:  # meanwhile, by what this is a consequence of
                guest.fail(number, self._worker.poisoned[object_id])
            elif isinstance(answer, Exception):
                guest.fail(number, describe_failure(answer, self._worker.id, "", expose=False))
            else:
                guest.answer(number, answer if instead is None else instead)

        return pass_back

    def _put(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, tensor, requires_grad, tags, description = message
        self._worker.check_new(object_id)
        note = check_note(tags, description, requires_grad)
        self._worker.authorize(guest, "put", object_id)
        guest.quota.check(weigh(tensor))
        if self._worker.isolation is not None:
            tensor = self._worker.isolation.share(tensor)
        self._worker.add(guest.holder, object_id, tensor)
        if requires_grad or tags or description:
            self._worker.store.annotate(object_id, note)

    def _link(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, name, url, target, spec, tags, description, capability = message
        self._worker.check_new(object_id)
        note = check_note(tags, description)
        self._worker.authorize(guest, "link", object_id)
        guest.quota.check()
        peer = self._worker.introduce(name, url, capability)
        guest.pass_on(peer)
        described = spec_from_wire(spec, interned=False)
        pointer = StoredPointer(self._worker.id, object_id, peer.references.refer(target, claimed=True), described)

        def linked(answer: Any) -> None:
            with self._worker.lock:
                if not isinstance(answer, Exception):
                    guest.answer(number, answer)
                    return
                failure = {**describe_failure(answer, self._worker.id, "LINK", expose=False), "orphan": False}
                if self._worker.store.pop(object_id, None) is not None:
                    self._worker.poisoned[object_id] = failure
                guest.fail(number, failure)

        peer.ask([int(Kind.CLAIM), target, capability], linked)
        self._worker.add(guest.holder, object_id, pointer)  # if that did not raise: there may be no session any more
        if tags or description:
            self._worker.store.annotate(object_id, note)
        self._worker.dirty.add(peer)

    def _claim(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._hold(guest, message[1], message[2])
        guest.answer(number, True)

    def _hold(self, guest: Guest, object_id: int, capability: str = "") -> None:
        if guest.introduced and object_id not in guest.held:
            self._worker.doorman.check_hold(guest, object_id, capability)
        value = self._worker.store.get(object_id)
        if value is None and object_id not in self._worker.poisoned:
            raise ObjectNotFoundError(object_id, self._worker.id, "it was freed before you became a holder")
        guest.quota.check(weigh(value) if isinstance(value, torch.Tensor) else 0)
        self._worker.holders.claim(guest.holder, object_id)

    def _release(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._worker.free([object_id for object_id in message[1] if self._worker.holders.release(guest.holder, object_id)], guest)

    def _fetch(self, guest: Guest, number: int, message: list[Any]) -> None:
        value = self._worker.find(guest, message[1])
        self._worker.authorize(guest, "get", message[1])
        note = self._worker.store.annotation(message[1])
        about = [note.requires_grad, sorted(note.tags), note.description]
        if isinstance(value, StoredPointer):
            peer = value.reference.peer
            capability = peer.terms.give(object=value.reference.id, operation="hold", audience=guest.incarnation.hex())
            answer = ["pointer", peer.name, peer.terms.advertised, value.reference.id, *about, capability]
            guest.pass_on(peer)
            # A pointer leaves only when its target is known to exist there.
            peer.ask([int(Kind.SYNC), [], []], self._relay(guest, number, answer, message[1]), keep=value)
            self._worker.dirty.add(peer)
        else:
            if value.nbytes > self._worker.limits.message_bytes:  # an expanded tensor may be far larger than its memory
                raise LimitError("message_bytes", self._worker.limits.message_bytes, f"a tensor of {value.nbytes} bytes")
            guest.quota.check_answer(guest.channel.session, value.nbytes)
            plain = dense(value)
            if value.nbytes >= LARGE and not guest.channel.inline:
                # It leaves in chunks, and commands that follow, which may change it, do not wait for that.
                plain = snapshot(plain) if plain.data_ptr() == value.data_ptr() else plain
                guest.answer_in_chunks(number, ["tensor", None, *about], 1, plain)
                return
            if plain.data_ptr() == value.data_ptr():
                # What follows in this packet may change the tensor: copy it, or write the answer before going on.
                guest.at_once = value.nbytes >= LARGE
                plain = plain if guest.at_once else plain.clone()
            guest.answer(number, ["tensor", plain, *about])

    def _locate(self, guest: Guest, number: int, message: list[Any]) -> None:
        if message[1] not in self._worker.store and self._worker.movers.on_the_way(
            message[1], guest.holder, lambda: self._worker.execute(guest, number, message)
        ):
            return
        self._hold(guest, message[1])
        value = self._worker.find(guest, message[1])
        note = self._worker.store.annotation(message[1])
        about = [note.requires_grad, sorted(note.tags), note.description]
        if not isinstance(value, StoredPointer):
            guest.answer(number, [describe_tensor(value), [self._worker.id], *about])
            return
        relay = self._relay(guest, number)

        def located(answer: Any) -> None:
            # What is written further down the chain is about other objects.
            if isinstance(answer, list) and len(answer) > 1 and isinstance(answer[1], list):
                answer = [answer[0], [self._worker.id, *answer[1]], *about]
            relay(answer)

        peer = value.reference.peer
        guest.pass_on(peer)
        peer.ask([int(Kind.LOCATE), value.reference.id], located)
        self._worker.dirty.add(peer)

    def _sync(self, guest: Guest, number: int, message: list[Any]) -> None:
        visited, further = [*message[1], self._worker.id], message[2]
        # Only where commands of this client went: another worker is not its business, and may be slow. By one chain, or by
        # all, which may lead to a worker twice: one that has sent a pointer to itself.
        if further:
            onward = [peer for peer in guest.reaches if peer.name == further[0] and peer.channel.lost is None]
        else:
            onward = [peer for peer in guest.reaches if visited.count(peer.name) < 2 and peer.channel.lost is None]
        left = len(onward)
        if not left or len(visited) >= self._worker.limits.hops:
            guest.answer(number, True)
            return
        for peer in onward:
            guest.pass_on(peer)

        def arrived(_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                guest.answer(number, True)

        for peer in onward:
            peer.ask([int(Kind.SYNC), visited, further[1:]], arrived)
            self._worker.dirty.add(peer)

    def _describe(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._describe_many(guest, number, [self._worker.find(guest, object_id) for object_id in message[1]])


def _count_items(wire: Any) -> int:
    if isinstance(wire, dict):
        return sum(1 + _count_items(value) for value in wire.values())
    if isinstance(wire, list):
        return sum(1 + _count_items(item) for item in wire)
    return 0
