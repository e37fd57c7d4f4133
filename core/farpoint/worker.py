"""One party: an id, an object store, links to peers. It executes what clients ask, and passes on what is not here."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from fnmatch import fnmatchcase
from typing import Any

import attrs

from farpoint.access import EVERYBODY, Admission, Credentials, is_local
from farpoint.commands import Command, Commands
from farpoint.doorman import Doorman
from farpoint.errors import (
    FarpointError,
    GetNotPermittedError,
    LimitError,
    MalformedMessageError,
    ObjectNotFoundError,
    PermissionDeniedError,
    ProtocolError,
    TransportError,
    WorkerNotFoundError,
)
from farpoint.executor import InProcess
from farpoint.failures import describe_failure
from farpoint.guest import Doorstep, Guest
from farpoint.isolation import isolation_of
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.macro import Macros
from farpoint.movers import Movers
from farpoint.peer import Peer
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.references import Holders
from farpoint.protocol.shapes import ID, MAX_ID, NAME, brief, check_command, kind_of
from farpoint.quarantine import Quarantine
from farpoint.stored import Poisoned, StoredPointer
from farpoint.transport import Link, Receiver

_RUN = int(Kind.RUN)
_SEEK_SECONDS = 2.0


class Worker:
    """A party of this process.

    Args:
        name: What others call it.
        url: Where to listen, empty for nowhere. The attribute `url` says where it became: a port of 0 is resolved.
        serializers: Names of serializers that it offers when it dials, best first.
        store: Name of the kind of its object store.
        limits: What it puts up with.
        admission: Whom it lets in.
        credentials: What it shows where it dials itself.
        advertise: Where others shall dial, if that is not where it listens.
        reachable: Patterns of the URLs that it dials when a client introduces a worker; none for all.
        isolate: Whether the operations of each session run in a process of its own, with a memory limit and a deadline.

    Raises:
        ValueError: The name is none that travels.
    """

    def __init__(
        self,
        name: str,
        url: str,
        serializers: list[str],
        store: str = "memory",
        limits: Limits = DEFAULT_LIMITS,
        *,
        admission: Admission = EVERYBODY,
        credentials: Credentials | None = None,
        advertise: str = "",
        reachable: tuple[str, ...] = (),
        isolate: bool = False,
    ) -> None:
        if not NAME.holds(name) or len(name) > limits.name_chars:
            raise ValueError(f"{name!r} cannot be a worker's name: that is {NAME.wants}, at most {limits.name_chars}")
        self.id = name
        self.limits = limits
        self.serializers = serializers
        self.credentials = credentials or Credentials(limits=limits)
        self.logger = logging.getLogger("farpoint.worker")
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
        self.quarantine = Quarantine(self)
        self._reachable = reachable
        self.doorman = Doorman(self)
        self._sought: set[str] = set()
        self._serving = threading.local()
        self._closed = threading.Event()
        self.in_process = InProcess()
        self.isolation = isolation_of(self) if isolate else None
        commands = Commands(self)
        self.macros = Macros(self, commands.perform)
        self._commands = commands.table()
        self._inline = bool(url) and plugins.transport(url).inline
        self.url = advertise
        self._listener = plugins.transport(url).listen(url, self._accept, self.doorman.admission(admission)) if url else None
        self.listens = self._listener.url if self._listener is not None else ""
        self.url = advertise or self.listens
        if self.isolation is not None:
            self.isolation.start()

    def peer(
        self, name: str, url: str = "", serializers: list[str] | None = None, credentials: Credentials | None = None
    ) -> Peer:
        """Return the session with another worker, made when it is first needed.

        Args:
            name: The other worker.
            url: Where it listens, if that is not known yet.
            serializers: What a new session offers, best first; what this worker was made with, if not given.
            credentials: What a new session shows; what this worker was made with, if not given.

        Raises:
            TransportError: Others could listen in, and this worker has what it takes to prevent that.
            WorkerNotFoundError: Nobody said where it listens.
        """
        with self.lock:
            known = self.peers.get(name)
            if known is not None and known.channel.lost is None:
                return known
            url = url or self.urls.get(name, "")
            if not url:
                raise WorkerNotFoundError(name, self.urls)
            made = Peer(self, name, url, serializers or self.serializers, _fitting(credentials or self.credentials, url))
            if name:
                self.peers[name] = made
        made.dial()
        return made

    def peer_back(self, peer: Peer) -> None:
        """Learn who is at the other end of a new session with a peer. Called with the lock held."""
        self.urls[peer.name] = peer.url
        known = self.peers.get(peer.name)
        if known is None or known.channel.lost is not None:
            self.peers[peer.name] = peer
        self.movers.peer_back(peer)

    def peer_lost(self, peer: Peer) -> None:
        """Learn that a session with a peer is over."""
        if self.peers.get(peer.name) is peer:
            self.movers.peer_lost(peer)

    def look_after(self, name: str) -> None:
        """Keep trying to reach a worker with whom something is not decided, until it answers or is known to be dead."""
        if self._inline or name in self._sought or self._closed.is_set():
            return
        self._sought.add(name)
        threading.Thread(target=self._seek, args=(name,), name=f"farpoint seeks {name}", daemon=True).start()

    def _seek(self, name: str) -> None:
        while not self._closed.wait(_SEEK_SECONDS):
            try:
                peer = self.peer(name)
            except FarpointError:
                continue
            if peer.established:
                self._sought.discard(name)
                with self.lock:
                    self.movers.peer_back(peer)  # a session that was there all the time does not ask by itself
                self.settle()
                return

    def guest_lost(self, guest: Guest) -> None:
        """Give up what a client held."""
        with self.lock:
            if not guest.left:
                guest.leave()
                del self.guests[guest.holder]
                self.movers.guest_lost(guest)
                self.free(self.holders.leave(guest.holder))
                self.logger.info("%s: the session with %s is over", self.id, guest.name)
        guest.executor.close()
        self.settle()
        guest.gone.set()

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
                    if guest.introduced:
                        self.doorman.check_kind(kind)
                    check_command(kind, message, self.limits)
                self._carry_out(command, guest, number, message)
            except Exception as error:
                malformed = isinstance(error, MalformedMessageError)
                self.failed(guest, number, error, self._name_of(message, guest), _results(message, malformed=malformed))
        if guest.unfolding is not None:
            self.macros.unfold(guest, number)
        if guest.at_once:
            guest.at_once = False
            guest.flush()

    def _carry_out(self, command: Command, guest: Guest, number: int, message: list[Any]) -> None:
        """Carry a command out, and know meanwhile on this thread whom it is for: with an executor, others are served in between."""
        before = self._asking
        self._serving.guest = guest
        try:
            command(guest, number, message)
        finally:
            self._serving.guest = before

    @property
    def _asking(self) -> Guest | None:
        """Who has sent the command that this thread carries out."""
        guest: Guest | None = getattr(self._serving, "guest", None)
        return guest

    def failed(self, guest: Guest, number: int, error: Exception, operation: str, results: list[Any]) -> None:
        """Tell a client that a command of it failed, and let what it should have made carry the error."""
        if guest.left:
            return  # while an executor of its own was at work
        self._poison(guest, number, self._describe_error(error, operation), results)
        if isinstance(error, MalformedMessageError):
            guest.malformed()

    def refuse(self, guest: Guest, number: int, message: list[Any], reason: FarpointError) -> None:
        """Let a command fail before it was carried out."""
        with self.lock:
            if not guest.left:
                failure = self._describe_error(reason, self._name_of(message, guest))
                self._poison(guest, number, failure, _results(message, malformed=False))

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

    def close(self, *, farewell: bool = False) -> None:
        """Stop: no client is served any more.

        Args:
            farewell: Whether to wait until every client has been told, but not for one that does not listen.
        """
        self._closed.set()
        guests = [guest for guest in list(self.guests.values()) if guest.channel.lane is not None]
        if self._listener is not None:
            self._listener.close()
        if self.isolation is not None:
            self.isolation.close()  # first: a link may wait for what its executor is doing
        for guest in list(self.guests.values()):
            guest.close()
        for peer in list(self.peers.values()):
            peer.close()
        self.store.close()
        deadline = time.monotonic() + 2 * self.limits.close_seconds
        for guest in guests if farewell else []:
            guest.gone.wait(max(0.0, deadline - time.monotonic()))

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
                raise Poisoned(self.poisoned[object_id])
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
            self.free([object_id])

    def introduce(self, name: str, url: str, capability: str = "") -> Peer:
        """Return the session with a worker that a client has named, and given us a capability to come in with.

        Raises:
            LimitError: There are too many already.
            PermissionDeniedError: The operator has listed others, or a policy refuses.
            WorkerNotFoundError: Nobody said where it listens.
        """
        known = self.peers.get(name)
        url = url or self.urls.get(name, "")
        dials = url and (known is None or known.channel.lost is not None)
        if dials and self._reachable and not any(fnmatchcase(url, pattern) for pattern in self._reachable):
            raise PermissionDeniedError(self.id, "dial", f"{url} is none of the addresses that its operator has listed")
        if dials and self._asking is not None:
            self.authorize(self._asking, "dial", url)
        if name not in self.peers and len(self.peers) >= self.limits.links:
            self.peers = {known: peer for known, peer in self.peers.items() if peer.channel.lost is None}
        if name not in self.peers and len(self.peers) >= self.limits.links:
            raise LimitError("links", self.limits.links, f"a link to {name}, beside {len(self.peers)} others")
        return self.peer(name, url, credentials=attrs.evolve(self.credentials, token=capability) if capability else None)

    def free(self, object_ids: list[int], guest: Guest | None = None) -> None:
        """Drop objects that nobody holds."""
        for object_id in object_ids:
            gone = self.store.pop(object_id, None)
            if gone is None:
                self.poisoned.pop(object_id, None)
            if isinstance(gone, StoredPointer):
                self.dirty.add(gone.reference.peer)
                if guest is not None:
                    guest.reaches.add(gone.reference.peer)

    def authorize(self, guest: Guest, action: str, about: Any = 0) -> None:
        """Ask the policies, before anything has happened.

        Args:
            guest: Who wants to do it.
            action: One of `farpoint.plugins.hookspecs.ACTIONS`, or the name of an operator.
            about: What it is about, as it came from the wire: the id of an object, of `dial` the URL.

        Raises:
            PermissionDeniedError: One refuses.
        """
        shown = about if type(about) is int or action == "dial" else 0
        refusal = plugins.authorize(action, guest.name, shown, self.id, guest.identity)
        if refusal is not None:
            kind = GetNotPermittedError if action == "get" else PermissionDeniedError
            raise kind(self.id, action, refusal)

    def _accept(self, link: Link) -> Receiver:
        return Doorstep(self, link, inline=self._inline)

    def _describe_error(self, error: Exception, operation: str) -> dict[str, Any]:
        if isinstance(error, Poisoned):
            return error.failure
        return describe_failure(error, self.id, operation, expose=self.expose_tracebacks)

    def _name_of(self, message: Any, guest: Guest) -> str:
        operation = "a message"
        if isinstance(message, list) and message and type(message[0]) is int and message[0] in self._commands:
            operation = Kind(message[0]).name
            if message[0] in (_RUN, Kind.ASK) and len(message) > 1 and type(message[1]) is int and message[1] in guest.templates:
                operation = guest.templates[message[1]].operation.name
        return operation

    def _poison(self, guest: Guest, number: int, failure: dict[str, Any], results: list[Any]) -> None:
        new: set[int] = set()
        room = min(self.limits.objects - len(guest.held), self.limits.results)
        taken = (self.store, self.poisoned)
        for result in results:
            fits = type(result) is int and 0 < result < MAX_ID and not any(result in ids for ids in taken)
            if fits and len(new) < room:
                new.add(result)
        if len(self.poisoned) >= self.limits.failures:
            # It is most of what an error weighs.
            failure = {**failure, "evidence": {**failure["evidence"], "remote_traceback": ""}}
        for result in new:
            self.poisoned[result] = failure
            self.holders.create(guest.holder, result)
        # An operation in place, or a check, has no result that could carry its error.
        guest.fail(number, {**failure, "orphan": not new})


def _fitting(credentials: Credentials, url: str) -> Credentials:
    """Return credentials as they are shown at a URL: without the part about TLS where the link is in the clear.

    Raises:
        TransportError: Others could listen in there, also to the token.
    """
    if credentials.tls is None:
        return credentials
    transport = plugins.transport(url)
    if transport.encrypts(url):
        return credentials
    if not (credentials.insecure or transport.within_process or is_local(url)):
        fix = "let it listen at wss:// or tls://, or run the worker that dials with --insecure if the network is trusted"
        raise TransportError(url, "this link would be in the clear where others can listen in, and who dials has TLS", fix)
    return attrs.evolve(credentials, tls=None)


def _results(message: Any, *, malformed: bool) -> list[Any]:
    """Return the ids of what a command makes: if it fails, they carry its error.

    What is malformed no honest client has sent, and it keeps nothing; but an operation may have been misled by its template.
    """
    if not isinstance(message, list) or len(message) < 4 or type(message[0]) is not int:
        return []
    if message[0] in (_RUN, Kind.ASK) and len(message) == 4:
        return message[3] if isinstance(message[3], list) else []
    return message[1:2] if message[0] in (Kind.PUT, Kind.LINK) and not malformed else []
