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
    NotColocatedError,
    ObjectNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    WorkerNotFoundError,
)
from farpoint.executor import execute, leaves
from farpoint.failures import describe_failure
from farpoint.guest import Guest
from farpoint.limits import DEFAULT_LIMITS
from farpoint.movers import Movers
from farpoint.peer import Peer, Reference
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.references import Holders
from farpoint.spec import TensorSpec, spec_from_wire, spec_of
from farpoint.store import Annotation
from farpoint.template import Template
from farpoint.transport import Link, Receiver


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
    """

    def __init__(self, name: str, url: str, serializers: list[str], store: str = "memory") -> None:
        self.id = name
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
        self.urls[made.name] = url
        self.peers[made.name] = made
        self.movers.peer_back(made)
        return made

    def peer_lost(self, peer: Peer) -> None:
        """Learn that a session with a peer is over."""
        self.movers.peer_lost(peer)

    def guest_lost(self, guest: Guest) -> None:
        """Give up what a client held."""
        with self.lock:
            if self.guests.get(guest.holder) is guest:
                del self.guests[guest.holder]
                self._free(self.holders.leave(guest.holder))
        self.settle()

    def execute(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Carry a command out. What goes wrong is told to the client, and changes nothing."""
        with self.lock:
            try:
                if not isinstance(message, list) or not message:
                    raise ProtocolError("a message must be a list that begins with its kind")
                command = self._commands.get(message[0]) if type(message[0]) is int else None
                if command is None:
                    raise ProtocolError(f"message kind {message[0]!r} is unimplemented here")
                command(guest, number, message)
            except Exception as error:
                self._poison(guest, number, self._describe_error(error, message, guest), self._results(guest, message))
        if guest.at_once:
            guest.at_once = False
            guest.flush()

    def _results(self, guest: Guest, message: list[Any]) -> list[int]:
        template = guest.templates.get(message[1]) if message[0] in (Kind.RUN, Kind.ASK) else None
        return message[2 + template.size :] if template is not None else []

    def settle(self) -> None:
        """Send what commands have left to be said. Called without the lock held."""
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
        if object_id in guest.held:
            value = self.store.get(object_id)
            if value is not None:
                return value
            if object_id in self.poisoned:
                raise _Poisoned(self.poisoned[object_id])
        raise ObjectNotFoundError(object_id if type(object_id) is int else 0, self.id)

    def add(self, holder: int, object_id: int, value: Any) -> None:
        """Store a new object for a holder.

        Raises:
            ProtocolError: The id is taken, or is none.
        """
        if type(object_id) is not int or not 0 < object_id < 2**63:
            raise ProtocolError(f"{object_id!r} is no object id")
        if self.store.get(object_id) is not None or object_id in self.poisoned:
            raise ProtocolError(f"object {object_id} exists and is never overwritten")
        self.store[object_id] = value
        self.holders.create(holder, object_id)

    def release(self, holder: int, object_id: int) -> None:
        """Strike a holder of an object out, and free the object with the last one."""
        if self.holders.release(holder, object_id):
            self._free([object_id])

    def _free(self, object_ids: list[int]) -> None:
        for object_id in object_ids:
            gone = self.store.pop(object_id, None)
            if gone is None:
                self.poisoned.pop(object_id, None)
            if isinstance(gone, StoredPointer):
                self.dirty.add(gone.reference.peer)

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

    def _describe_error(self, error: Exception, message: list[Any], guest: Guest) -> dict[str, Any]:
        if isinstance(error, _Poisoned):
            return error.failure
        operation = str(message[0] if message else "")
        if operation.isdigit():
            template = guest.templates.get(message[1]) if message[0] in (Kind.RUN, Kind.ASK) else None
            operation = template.operation.name if template else Kind(message[0]).name
        return describe_failure(error, self.id, operation, expose=self.expose_tracebacks)

    def _poison(self, guest: Guest, number: int, failure: dict[str, Any], results: list[int]) -> None:
        new = [r for r in results if type(r) is int and r and r not in self.store]
        for result in new:
            self.poisoned[result] = failure
            self.holders.create(guest.holder, result)
        # An operation in place, or a check, has no result that could carry its error.
        guest.fail(number, {**failure, "orphan": not new})

    def _define(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, slot, name, args, kwargs = message
        if type(slot) is not int or not 0 <= slot < DEFAULT_LIMITS.templates:
            raise ProtocolError(f"{slot!r} is no template slot")
        guest.templates.pop(slot, None)
        guest.templates[slot] = Template.from_wire(name, args, kwargs)

    def _run(self, guest: Guest, number: int, message: list[Any]) -> list[int]:
        template = guest.templates.get(message[1])
        if template is None:
            raise ProtocolError(f"no template is defined in slot {message[1]}")
        end = 2 + template.size
        values, results = message[2:end], message[end:]
        if len(message) < end:
            raise ProtocolError(f"{template.operation.name}: {len(values)} values for {end - 2} holes")
        remote = False
        held, stored = guest.held, self.store.get
        for hole in template.tensors:
            value = values[hole]
            if type(value) is int:
                found = stored(value) if value in held else None
                values[hole] = found = found if found is not None else self.find(guest, value)
                remote = remote or type(found) is StoredPointer
            elif not isinstance(value, torch.Tensor):
                raise ProtocolError(f"{template.operation.name}: {type(value).__name__} in place of a tensor")
        if plugins.has_policy:
            about = message[2] if values and type(message[2]) is int else 0
            self.authorize(guest, template.operation.name, about)
        if remote:
            self._pass_on(guest, number, template, values, results)
            return results
        # Stored tensors require no grad: the tape is the client's.
        returned = execute(template, values)
        if type(returned) is torch.Tensor and len(results) == 1:
            if results[0]:
                self.add(guest.holder, results[0], returned)
            return results
        for object_id, value in zip(results, leaves(returned), strict=False):
            if object_id and isinstance(value, torch.Tensor):
                self.add(guest.holder, object_id, value)
        return results

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
        created = [peer.new_id() if result else 0 for result in results]
        peer.run(template, onward, created, (guest.holder, number))
        for result, target in zip(results, created, strict=True):
            if result:
                self.add(guest.holder, result, StoredPointer(self.id, result, peer.refer(target), None))
        self.dirty.add(peer)

    def _ask(self, guest: Guest, number: int, message: list[Any]) -> None:
        results = self._run(guest, number, message)
        self._describe_many(guest, number, [self.store[result] for result in results if result in self.store])

    def _describe_many(self, guest: Guest, number: int, values: list[Any]) -> None:
        if not any(isinstance(value, StoredPointer) for value in values):
            guest.answer(number, [spec_of(value).to_wire() for value in values])
            return
        peer = values[0].reference.peer
        ids = [value.reference.id for value in values]
        peer.ask([int(Kind.DESCRIBE), ids], self._relay(guest, number))
        self.dirty.add(peer)

    def _relay(self, guest: Guest, number: int) -> Callable[[Any], None]:
        def pass_back(answer: Any) -> None:
            if isinstance(answer, Exception):
                guest.fail(number, describe_failure(answer, self.id, "", expose=False))
            else:
                guest.answer(number, answer)

        return pass_back

    def _put(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, tensor, requires_grad, tags, description = message
        if not isinstance(tensor, torch.Tensor):
            raise ProtocolError("PUT carries no tensor")
        self.add(guest.holder, object_id, tensor)
        if requires_grad or tags or description:
            self.store.annotate(object_id, Annotation(frozenset(tags), str(description), bool(requires_grad)))

    def _link(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, name, url, target, spec, tags, description = message
        peer = self.peer(str(name), str(url))
        pointer = StoredPointer(self.id, object_id, peer.refer(target, claimed=True), spec_from_wire(spec))
        self.add(guest.holder, object_id, pointer)
        if tags or description:
            self.store.annotate(object_id, Annotation(frozenset(tags), str(description)))
        peer.ask([int(Kind.CLAIM), target], self._relay(guest, number))
        self.dirty.add(peer)

    def _claim(self, guest: Guest, number: int, message: list[Any]) -> None:
        object_id = message[1]
        if object_id not in self.store and object_id not in self.poisoned:
            raise ObjectNotFoundError(object_id, self.id, "it was freed before you became a holder")
        self.holders.claim(guest.holder, object_id)
        guest.answer(number, True)

    def _release(self, guest: Guest, number: int, message: list[Any]) -> None:
        release, holder = self.holders.release, guest.holder
        self._free([object_id for object_id in message[1] if release(holder, object_id)])

    def _fetch(self, guest: Guest, number: int, message: list[Any]) -> None:
        value = self.find(guest, message[1])
        self.authorize(guest, "get", message[1])
        note = self.store.annotation(message[1])
        about = [note.requires_grad, sorted(note.tags), note.description]
        if isinstance(value, StoredPointer):
            peer = value.reference.peer
            answer = ["pointer", peer.name, peer.url, value.reference.id, *about]
            # A pointer leaves only when its target is known to exist there.
            peer.ask([int(Kind.SYNC), []], lambda _: guest.answer(number, answer), keep=value)
            self.dirty.add(peer)
        else:
            # What follows in this packet may change the tensor: copy it, or write the answer before going on.
            guest.at_once = value.nbytes >= LARGE
            guest.answer(number, ["tensor", value if guest.at_once else value.clone(), *about])

    def _search(self, guest: Guest, number: int, message: list[Any]) -> None:
        self.authorize(guest, "search")
        wanted = {str(tag) for tag in message[1]}
        notes = ((object_id, self.store.annotation(object_id)) for object_id in self.store)
        found = [i for i, note in notes if wanted <= note.tags | set(note.description.split())]
        guest.answer(number, found[: DEFAULT_LIMITS.results])

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
        onward = [peer for name, peer in self.peers.items() if name not in visited and peer.channel.lost is None]
        left = len(onward)
        if not left or len(visited) >= DEFAULT_LIMITS.hops:
            guest.answer(number, True)
            return

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


class _Poisoned(Exception):
    """An operand carries the error of an earlier operation."""

    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(failure["text"])
        self.failure = failure
