"""One party: an id, an object store, links to peers. It executes what clients ask, and passes on what is not here."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any

import attrs
import torch

from farpoint.channel import LARGE
from farpoint.errors import (
    FarpointError,
    GetNotPermittedError,
    LimitError,
    MalformedMessageError,
    NotColocatedError,
    ObjectNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    WorkerNotFoundError,
)
from farpoint.executor import execute, leaves
from farpoint.failures import describe_failure
from farpoint.guest import Guest
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.movers import Movers
from farpoint.peer import Peer, Reference
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.references import Holders
from farpoint.protocol.shapes import ID, MAX_ID, NAME, brief, check_command, check_run, is_number, kind_of
from farpoint.quota import weigh
from farpoint.spec import TensorSpec, describe_tensor, spec_from_wire
from farpoint.store import Annotation
from farpoint.template import Template
from farpoint.tensors import dense
from farpoint.transport import Link, Receiver

_RUN = int(Kind.RUN)


@attrs.frozen(eq=False)
class StoredPointer:
    """A pointer as a worker keeps it: one reference to an object of another worker.

    Attributes:
        owner: Name of the worker that keeps it.
        id: Under which id.
        reference: The reference that it is.
        spec: Metadata of the tensor at the end of the chain, where known.
    """

    owner: str
    id: int
    reference: Reference
    spec: TensorSpec | None

    def __repr__(self) -> str:
        target = f"{self.reference.peer.name}:{self.reference.id}"
        return f"(Wrapper)>[PointerTensor | {self.owner}:{self.id} -> {target}]"


class Worker:
    """A party of this process.

    Args:
        name: What others call it.
        url: Where to listen, empty for nowhere. The attribute `url` says where it became: a port of 0 is resolved.
        serializers: Names of serializers that it offers when it dials, best first.
        store: Name of the kind of its object store.
        limits: What it puts up with.

    Raises:
        ValueError: The name is none that travels.
    """

    def __init__(
        self, name: str, url: str, serializers: list[str], store: str = "memory", limits: Limits = DEFAULT_LIMITS
    ) -> None:
        if not NAME.holds(name) or len(name) > limits.name_chars:
            raise ValueError(f"{name!r} cannot be a worker's name: that is {NAME.wants}, at most {limits.name_chars}")
        self.id = name
        self.limits = limits
        self.serializers = serializers
        self.incarnation = secrets.token_bytes(16)
        self.store = plugins.store(store, name)
        self.holders = Holders()
        self.guests: dict[int, Guest] = {}
        self.peers: dict[str, Peer] = {}
        self.urls: dict[str, str] = {}
        self.poisoned: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, tuple[FarpointError, bool]] = {}
        self.dirty: set[Guest | Peer] = set()
        self.lock = threading.RLock()
        self.expose_tracebacks = True
        self.movers = Movers(self)
        self._listener = plugins.transport(url).listen(url, self._accept) if url else None
        self.url = self._listener.url if self._listener is not None else ""
        self._commands: dict[int, Callable[[Guest, int, list[Any]], object]] = {
            int(Kind.DEFINE): self._define,
            int(Kind.RUN): self._run,
            int(Kind.ASK): self._ask,
            int(Kind.PUT): self._put,
            int(Kind.LINK): self._link,
            int(Kind.CLAIM): self._claim,
            int(Kind.RELEASE): self._release,
            int(Kind.FETCH): self._fetch,
            int(Kind.MOVE): self.movers.move,
            int(Kind.SEARCH): self._search,
            int(Kind.TAG): self._tag,
            int(Kind.CLEAR): self._clear,
            int(Kind.SYNC): self._sync,
            int(Kind.DESCRIBE): self._describe,
            int(Kind.TRANSFER): self.movers.receive,
        }

    def peer(self, name: str, url: str = "") -> Peer:
        """Return the session with another worker, made when it is first needed.

        Raises:
            WorkerNotFoundError: Nobody said where it listens.
        """
        known = self.peers.get(name)
        if known is not None and known.channel.lost is None:
            return known
        url = url or self.urls.get(name, "")
        if not url:
            raise WorkerNotFoundError(name, self.urls)
        made = Peer(self, name, url, self.serializers)
        if name:
            self.peers[name] = made
        made.dial()
        return made

    def peer_back(self, peer: Peer) -> None:
        """Learn who is at the other end of a new session with a peer. Called with the lock held."""
        self.urls[peer.name] = peer.url
        self.peers[peer.name] = peer
        self.movers.peer_back(peer)

    def peer_lost(self, peer: Peer) -> None:
        """Learn that a session with a peer is over."""
        if self.peers.get(peer.name) is peer:
            self.movers.peer_lost(peer)

    def guest_lost(self, guest: Guest) -> None:
        """Give up what a client held."""
        with self.lock:
            if not guest.left:
                guest.left = True
                del self.guests[guest.holder]
                self._free(self.holders.leave(guest.holder))
        self.settle()

    def execute(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Carry a command out. What goes wrong is told to the client, and changes nothing."""
        with self.lock:
            if guest.left:
                return  # what is still on its way of a client that is gone: nobody would hold what it makes
            try:
                kind = kind_of(message)
                command = self._commands.get(kind)
                if command is None:
                    raise ProtocolError(f"messages of kind {brief(kind)} are unimplemented here")
                if kind != _RUN:
                    check_command(kind, message, self.limits)
                command(guest, number, message)
            except Exception as error:
                self._poison(guest, number, self._describe_error(error, message, guest), message)
                if isinstance(error, MalformedMessageError):
                    guest.malformed()
        if guest.at_once:
            guest.at_once = False
            guest.flush()

    def settle(self) -> None:
        """Send what commands have left to be said: now, or, if this thread holds the lock, when it has given it up.

        A write may need the lock of another worker, whose thread may be waiting for this one.
        """
        if self.lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition does
            return
        while self.dirty:
            try:
                self.dirty.pop().flush()
            except KeyError:
                return

    def close(self) -> None:
        """Stop: no client is served any more."""
        if self._listener is not None:
            self._listener.close()
        for guest in list(self.guests.values()):
            guest.close()
        for peer in list(self.peers.values()):
            peer.close()
        self.store.close()

    def find(self, guest: Guest, object_id: int) -> Any:
        """Return an object that a client holds.

        Raises:
            ObjectNotFoundError: It does not hold it, or it is gone.
        """
        if type(object_id) is not int:
            raise MalformedMessageError("a message", "an operand", "an id or a tensor", brief(object_id))
        if object_id in guest.held:
            value = self.store.get(object_id)
            if value is not None:
                return value
            if object_id in self.poisoned:
                raise _Poisoned(self.poisoned[object_id])
        raise ObjectNotFoundError(object_id, self.id)

    def check_new(self, object_id: int) -> None:
        """Check that an object may be stored under an id.

        Raises:
            MalformedMessageError: The id is taken, or is none.
        """
        ID.check("a message", "an id", object_id, self.limits)
        if object_id in self.store or object_id in self.poisoned:
            raise MalformedMessageError("a message", "an id", "new: what exists is never overwritten", str(object_id))

    def add(self, holder: int, object_id: int, value: Any) -> None:
        """Store a new object for a holder, under an id that was checked."""
        self.store[object_id] = value
        self.holders.create(holder, object_id)

    def release(self, holder: int, object_id: int) -> None:
        """Strike a holder of an object out, and free the object with the last one."""
        if self.holders.release(holder, object_id):
            self._free([object_id])

    def introduce(self, guest: Guest, name: str, url: str) -> Peer:
        """Return the session with a worker that a client has named.

        Raises:
            LimitError: There are too many already.
            WorkerNotFoundError: Nobody said where it listens.
        """
        if name not in self.peers and len(self.peers) >= self.limits.links:
            self.peers = {known: peer for known, peer in self.peers.items() if peer.channel.lost is None}
        if name not in self.peers and len(self.peers) >= self.limits.links:
            raise LimitError("links", self.limits.links, f"a link to {name}, beside {len(self.peers)} others")
        return self.peer(name, url)

    def _free(self, object_ids: list[int], guest: Guest | None = None) -> None:
        for object_id in object_ids:
            gone = self.store.pop(object_id, None)
            if gone is None:
                self.poisoned.pop(object_id, None)
            if isinstance(gone, StoredPointer):
                self.dirty.add(gone.reference.peer)
                if guest is not None:
                    guest.reaches.add(gone.reference.peer)

    def authorize(self, guest: Guest, action: str, object_id: int = 0) -> None:
        """Ask the policy.

        Raises:
            PermissionDeniedError: It refuses.
        """
        refusal = plugins.authorize(action, guest.name, object_id)
        if refusal is not None:
            kind = GetNotPermittedError if action == "get" else PermissionDeniedError
            raise kind(self.id, action, refusal)

    def _accept(self, link: Link) -> Receiver:
        return Guest(self, link)

    def _describe_error(self, error: Exception, message: Any, guest: Guest) -> dict[str, Any]:
        if isinstance(error, _Poisoned):
            return error.failure
        operation = "a message"
        if _runs(message) and type(message[1]) is int and message[1] in guest.templates:
            operation = guest.templates[message[1]].operation.name
        elif isinstance(message, list) and message and type(message[0]) is int and message[0] in self._commands:
            operation = Kind(message[0]).name
        return describe_failure(error, self.id, operation, expose=self.expose_tracebacks)

    def _poison(self, guest: Guest, number: int, failure: dict[str, Any], message: Any) -> None:
        new: set[int] = set()
        results = message[3] if _runs(message) else None
        if isinstance(results, list):
            room = min(self.limits.objects - len(guest.held), self.limits.results)
            taken = (self.store, self.poisoned)
            for result in results:
                fits = type(result) is int and 0 < result < MAX_ID and not any(result in ids for ids in taken)
                if fits and len(new) < room:
                    new.add(result)
        if len(self.poisoned) >= self.limits.failures:
            failure = {**failure, "traceback": ""}  # it is most of what an error weighs
        for result in new:
            self.poisoned[result] = failure
            self.holders.create(guest.holder, result)
        # An operation in place, or a check, has no result that could carry its error.
        guest.fail(number, {**failure, "orphan": not new})

    def _define(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, slot, name, args, kwargs = message
        limits = self.limits
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
            guest.refused[slot] = describe_failure(error, self.id, name[: limits.error_chars], expose=False)
            raise _Poisoned(guest.refused[slot]) from error

    def _run(self, guest: Guest, number: int, message: list[Any]) -> None:
        check_run(message, self.limits)
        _, slot, given, results = message
        template = guest.templates.get(slot)
        if template is None:
            if slot in guest.refused:
                raise _Poisoned(guest.refused[slot])
            raise MalformedMessageError("RUN", "slot", "one that was defined", str(slot))
        if len(given) != template.size:
            raise MalformedMessageError("RUN", "values", f"{template.size} for {template.operation.name}", str(len(given)))
        for result in results:
            if result in self.store or result in self.poisoned:
                self.check_new(result)
        values = given.copy()
        remote = False
        held, stored = guest.held, self.store.get
        for hole in template.tensors:
            value = values[hole]
            if type(value) is int:
                found = stored(value) if value in held else None
                values[hole] = found = found if found is not None else self.find(guest, value)
                remote = remote or type(found) is StoredPointer
            elif not isinstance(value, torch.Tensor):
                raise MalformedMessageError("RUN", f"values[{hole}]", "an id or a tensor", brief(value))
        for hole in template.numbers:
            if not is_number(values[hole]):
                raise MalformedMessageError("RUN", f"values[{hole}]", "a number", brief(values[hole]))
        if plugins.has_policy:
            about = given[0] if given and type(given[0]) is int else 0
            self.authorize(guest, template.operation.name, about)
        if remote:
            self._pass_on(guest, number, template, values, results)
            return
        # Stored tensors require no grad: the tape is the client's.
        returned = execute(template, values)
        if type(returned) is torch.Tensor and len(results) == 1 and results[0]:
            guest.quota.check(weigh(returned))
            self.add(guest.holder, results[0], returned)
            return
        outputs = leaves(returned)
        weight = sum([weigh(value) for value in outputs if isinstance(value, torch.Tensor)])
        if any(results):
            guest.quota.check(weight, len(results))
        else:
            guest.quota.note(weight)
        for object_id, value in zip(results, outputs, strict=False):
            if object_id and isinstance(value, torch.Tensor):
                self.add(guest.holder, object_id, value)

    def _pass_on(
        self, guest: Guest, number: int, template: Template, values: list[Any], results: list[int]
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
        for value in values:
            if isinstance(value, torch.Tensor) and value.ndim:
                raise NotColocatedError(
                    template.operation.name, f"on {peer.name}", f"on {self.id}", f"p.remote_send({peer.name})"
                )
        guest.quota.check(0, len(results))
        guest.pass_on(peer)
        created = [peer.new_id() if result else 0 for result in results]
        peer.run(template, onward, created, (guest.holder, number))
        for result, target in zip(results, created, strict=True):
            if result:
                self.add(guest.holder, result, StoredPointer(self.id, result, peer.refer(target), None))
        self.dirty.add(peer)

    def _ask(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._run(guest, number, message)
        self._describe_many(guest, number, [self.store[result] for result in message[3] if result in self.store])

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
        self.dirty.add(peer)

    def _relay(self, guest: Guest, number: int, instead: Any = None) -> Callable[[Any], None]:
        def pass_back(answer: Any) -> None:
            if isinstance(answer, Exception):
                guest.fail(number, describe_failure(answer, self.id, "", expose=False))
            else:
                guest.answer(number, answer if instead is None else instead)

        return pass_back

    def _put(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, tensor, requires_grad, tags, description = message
        self.check_new(object_id)
        guest.quota.check(weigh(tensor))
        self.add(guest.holder, object_id, tensor)
        if requires_grad or tags or description:
            self.store.annotate(object_id, Annotation(frozenset(tags), description, requires_grad))

    def _link(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, name, url, target, spec, tags, description = message
        self.check_new(object_id)
        guest.quota.check()
        peer = self.introduce(guest, name, url)
        guest.pass_on(peer)
        described = spec_from_wire(spec, interned=False)
        pointer = StoredPointer(self.id, object_id, peer.refer(target, claimed=True), described)
        self.add(guest.holder, object_id, pointer)
        if tags or description:
            self.store.annotate(object_id, Annotation(frozenset(tags), description))
        peer.ask([int(Kind.CLAIM), target], self._relay(guest, number))
        self.dirty.add(peer)

    def _claim(self, guest: Guest, number: int, message: list[Any]) -> None:
        object_id = message[1]
        value = self.store.get(object_id)
        if value is None and object_id not in self.poisoned:
            raise ObjectNotFoundError(object_id, self.id, "it was freed before you became a holder")
        guest.quota.check(weigh(value) if isinstance(value, torch.Tensor) else 0)
        self.holders.claim(guest.holder, object_id)
        guest.answer(number, True)

    def _release(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._free([object_id for object_id in message[1] if self.holders.release(guest.holder, object_id)], guest)

    def _fetch(self, guest: Guest, number: int, message: list[Any]) -> None:
        value = self.find(guest, message[1])
        self.authorize(guest, "get", message[1])
        note = self.store.annotation(message[1])
        about = [note.requires_grad, sorted(note.tags), note.description]
        if isinstance(value, StoredPointer):
            peer = value.reference.peer
            answer = ["pointer", peer.name, peer.url, value.reference.id, *about]
            guest.pass_on(peer)
            # A pointer leaves only when its target is known to exist there.
            peer.ask([int(Kind.SYNC), []], self._relay(guest, number, answer), keep=value)
            self.dirty.add(peer)
        else:
            if value.nbytes > self.limits.message_bytes:  # an expanded tensor may be far larger than its memory
                raise LimitError("message_bytes", self.limits.message_bytes, f"a tensor of {value.nbytes} bytes")
            guest.quota.check_answer(guest.channel.session, value.nbytes)
            plain = dense(value)
            if plain.data_ptr() == value.data_ptr():
                # What follows in this packet may change the tensor: copy it, or write the answer before going on.
                guest.at_once = value.nbytes >= LARGE
                plain = plain if guest.at_once else plain.clone()
            guest.answer(number, ["tensor", plain, *about])

    def _search(self, guest: Guest, number: int, message: list[Any]) -> None:
        self.authorize(guest, "search")
        wanted = {str(tag) for tag in message[1]}
        notes = ((object_id, self.store.annotation(object_id)) for object_id in self.store)
        found = [i for i, note in notes if wanted <= note.tags | set(note.description.split())]
        guest.answer(number, found[: self.limits.results])

    def _tag(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, tags, description = message
        self.find(guest, object_id)
        old = self.store.annotation(object_id)
        self.store.annotate(
            object_id, attrs.evolve(old, tags=frozenset(map(str, tags)), description=str(description))
        )

    def _clear(self, guest: Guest, number: int, message: list[Any]) -> None:
        self.authorize(guest, "clear")
        every = list(self.store)
        self._free(every)
        self.holders.forget(every)
        guest.answer(number, True)

    def _sync(self, guest: Guest, number: int, message: list[Any]) -> None:
        visited = [*message[1], self.id]
        # Only where commands of this client went: another worker is not its business, and may be slow.
        onward = [peer for peer in guest.reaches if peer.name not in visited and peer.channel.lost is None]
        left = len(onward)
        if not left or len(visited) >= self.limits.hops:
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
            peer.ask([int(Kind.SYNC), visited], arrived)
            self.dirty.add(peer)

    def _describe(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._describe_many(guest, number, [self.find(guest, object_id) for object_id in message[1]])


def _runs(message: Any) -> bool:
    """Return whether this names an operation and its results, whatever else is wrong with it."""
    return isinstance(message, list) and len(message) == 4 and type(message[0]) is int and message[0] in (_RUN, Kind.ASK)


def _count_items(wire: Any) -> int:
    if isinstance(wire, dict):
        return sum(1 + _count_items(value) for value in wire.values())
    if isinstance(wire, list):
        return sum(1 + _count_items(item) for item in wire)
    return 0


class _Poisoned(Exception):
    """An operand carries the error of an earlier operation."""

    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(failure["text"])
        self.failure = failure
