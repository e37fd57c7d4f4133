"""The client's side of a session: issues commands to one worker, and holds references there."""

from __future__ import annotations

import copy
import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import attrs
import torch

from farpoint.about import read_versions
from farpoint.access import NO_CREDENTIALS, Credentials
from farpoint.approach import Approach, come_back
from farpoint.blocking import is_blocking
from farpoint.bulk import Stream
from farpoint.capability import HOLD_SECONDS, MOVE_SECONDS, PREFIX, narrow
from farpoint.channel import BATCH, Channel, Lane, bare
from farpoint.errors import (
    FarpointError,
    LimitError,
    MalformedMessageError,
    NobodyListensError,
    ObjectNotFoundError,
    ProtocolError,
    SynchronizationTimeoutError,
    TransportError,
    UnreachableError,
    WorkerRestartedError,
)
from farpoint.failures import read_failure, revive_failure
from farpoint.plugins import plugins
from farpoint.progress import progress_bar
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import FAILURE, brief, check_answer
from farpoint.provenance import NOWHERE, Origin, spell

if TYPE_CHECKING:
    from farpoint.template import Template
    from farpoint.worker import Worker

PROMISED_BYTES = 16 * 2**20
_LOOK_SECONDS = 0.1

LOCAL = 0
"""The holder that a worker is in its own list, and the session that its own moves belong to."""
RUN, DEFINE, SYNC = int(Kind.RUN), int(Kind.DEFINE), int(Kind.SYNC)


def unguessable_ids() -> list[int]:
    """Return ids of which none tells anything about another: an id is all that one needs to become a holder."""
    return [number >> 1 or 1 for number in struct.unpack("<512Q", os.urandom(4096))]


class Reference:
    """One reference of this process to a remote object. Its end is noted, and told with the next batch."""

    __slots__ = ("__weakref__", "id", "peer")

    def __init__(self, peer: Peer, object_id: int) -> None:
        self.peer = peer
        self.id = object_id

    def __del__(self) -> None:
        # No I/O in a finalizer: it may run anywhere, also while the channel's lock is held.
        self.peer.dropped.append(self.id)


class Reply:
    """The answer to one command, when it comes."""

    def __init__(
        self, asked: list[Any], then: Callable[[Any], None] | None = None, keep: object = None
    ) -> None:
        self.asked = asked
        self.number = 0
        self.value: Any = None
        self.error: dict[str, Any] | None = None
        self.done = threading.Event()
        self.then = then
        self.keep = keep


class Peer:
    """What one worker knows of another that it commands.

    Commands may be issued before the other worker has said who it is: they wait for that, nobody else does.

    Args:
        owner: The worker that issues.
        name: The worker that executes.
        url: Where it listens.
        serializers: Names to offer, best first.
        credentials: What is shown there.

    Attributes:
        closing: Set when the session is over.
        dead: Whether that is so because the worker's process has ended.
        absence: Why there is no link now, if there is none.
        advertised: Where it wants to be dialled by others.
        capability: What we may do there, to be narrowed for others.
        versions: Of `farpoint` and `torch` there, as far as the worker has told them.
    """

    def __init__(
        self, owner: Worker, name: str, url: str, serializers: Sequence[str], credentials: Credentials = NO_CREDENTIALS
    ) -> None:
        self.owner = owner
        self.name = name
        self.url = url
        self.advertised = url
        self.credentials = credentials
        self.offered = list(serializers)
        self.session_id = secrets.randbits(62) + 1
        self.secret = secrets.token_hex(16)
        self.closing = threading.Event()
        self.absence = ""
        self.dead = False
        self.capability = ""
        self._ahead = 0.0
        self.versions: dict[str, str] = {}
        self.limits = credentials.limits
        self.dropped: deque[int] = deque()
        self.pending: dict[int, Reply] = {}
        self.orphans: deque[int] = deque(maxlen=self.limits.failures)
        self._ids: list[int] = []
        self._counts: dict[int, int] = {}
        self._slots: dict[int, tuple[int, Template]] = {}
        self._issued: deque[tuple[int, Origin]] = deque(maxlen=2 * self.limits.commands_in_flight)
        self._welcomed = False
        self._deferred: list[Callable[[FarpointError | None], None]] = []
        self._promised = 0
        self._room = self.limits.commands_in_flight // 2
        self._milestone: Reply | None = None
        self._approach = Approach(self)
        self.incarnation = b""
        self.channel = Channel(name, self._deliver, self._after)
        self.channel.session = Session(owner.incarnation, self.incarnation, self.limits)

    @property
    def invited(self) -> bool:
        """Whether we have nothing to show there but what the worker itself has given us."""
        return self.credentials.token.startswith(PREFIX) and not self.owner.credentials.token

    @property
    def established(self) -> bool:
        """Whether the worker has greeted us."""
        return self._welcomed

    @property
    def over(self) -> bool:
        """Whether the session is over, or about to be."""
        return self.closing.is_set()

    def dial(self) -> None:
        """Make the link, greet, and wait for the welcome, unless this thread must not wait: then another one does.

        Raises:
            FarpointError: There is nobody, or somebody else, or we are refused.
        """
        self._approach = Approach(self)
        # The welcome needs the owner's lock.
        locked = self.owner.lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition does
        if not locked and self.channel.may_wait() or plugins.transport(self.url).inline:
            self._dial(self._approach)
            return
        threading.Thread(target=self._dial_alone, name=f"farpoint dials {self.url}", daemon=True).start()

    def _dial(self, approach: Approach) -> None:
        try:
            approach.dial()
            if self.channel.may_wait():
                approach.wait(self.limits.open_seconds)
            elif approach.refusal is not None:
                raise copy.copy(approach.refusal)
        except FarpointError as error:
            # Without the traceback, whose frames would keep the pointers of whoever called.
            self.end(copy.copy(error))
            approach.close()
            raise

    def _dial_alone(self) -> None:
        try:
            self._dial(self._approach)
        except FarpointError:
            pass  # who waits for an answer has been told

    def defer(self, call: Callable[[FarpointError | None], None]) -> bool:
        """Call something as soon as the other worker has said who it is; return False, and do not, if it has.

        It is called with None, or with the error for which there will be no session. This is done with the owner's lock held.

        Raises:
            LimitError: Too much waits for that already.
        """
        if self._welcomed:
            return False
        if len(self._deferred) >= self.limits.transfers:
            raise LimitError("transfers", self.limits.transfers, f"another message while {self.name} has not greeted us")
        self._deferred.append(call)
        return True

    def begin(self, lane: Lane, welcome: dict[str, Any]) -> None:
        """Take a welcome that was checked: the session begins."""
        theirs = welcome.get("limits")
        for limit, kinds, least in (
            *(("commands_in_flight", (int,), 2), ("templates", (int,), 2), ("transfers", (int,), 1)),
            ("lease_seconds", (int, float), 2),
        ):
            allowed: Any = theirs.get(limit) if isinstance(theirs, dict) else None
            if type(allowed) in kinds and least <= allowed < getattr(self.limits, limit):
                self.limits = attrs.evolve(self.limits, **{limit: allowed})
        self._room = self.limits.commands_in_flight // 2
        self.incarnation = bytes.fromhex(welcome["incarnation"])
        url = welcome.get("url")
        if type(url) is str and 0 < len(url) <= self.limits.url_chars:
            self.advertised = url
        capability: Any = welcome.get("capability")
        clock: Any = welcome.get("clock")
        if type(capability) is str and capability.isascii() and type(clock) in (int, float) and abs(clock) < 2**53:
            self.capability = capability[: self.limits.capability_chars]
            self._ahead = float(clock) - time.time()
        self.name = self.channel.name = welcome["worker"]
        self.versions = read_versions(welcome)
        self.channel.session.remote = self.incarnation
        serializer = plugins.serializer(welcome["serializer"], self.owner.limits)
        self.channel.open(lane, self.channel.session, serializer, self.owner.limits, inline=plugins.transport(self.url).inline)
        assert self.channel.bulk is not None
        self.channel.bulk.at_once = self.limits.transfers
        with self.owner.lock:
            self._welcomed = True
            self.owner.peer_back(self)
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call(None)

    def refused(self, approach: Approach, refusal: FarpointError) -> None:
        """Learn that a worker does not take us: at first, that is the end."""
        if approach is self._approach:
            self.channel.fail(refusal)

    def parted(self, approach: Approach, lane: Lane | None, cause: Exception | None) -> None:
        """Learn that a link is gone: the session goes on over another one, unless one side has ended it."""
        if lane is None:
            if approach is self._approach:
                self.end(approach.refusal)
        elif self.channel.part(lane):
            if cause is None or self.channel.inline or self.channel.lost is not None or self.over:
                self.end(cause)
                return
            self.absence = str(cause)
            threading.Thread(target=come_back, args=(self, cause), name=f"farpoint redials {self.url}", daemon=True).start()

    def end(self, cause: Exception | None) -> None:
        """End the session: everybody who waits is told."""
        self.closing.set()
        self.dead = isinstance(cause, NobodyListensError | WorkerRestartedError)
        if isinstance(cause, TransportError) and not self._welcomed and self.owner.url:
            fix = f"let {self.name} advertise an address that {self.owner.id} reaches, or move with relay=True"
            cause = UnreachableError(self.url, cause.cause, fix, self.owner.id, self.name)
        with self.channel.lock:
            self.channel.lost = self.channel.lost or bare(cause) or ConnectionError("the worker was closed")
            waiting = list(self.pending.values())
            self.pending.clear()
        self.channel.end()
        self.owner.peer_lost(self)
        with self.owner.lock:
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call(self.channel.ended())
        for reply in waiting:
            reply.error = {"lost": True}
            self._settle(reply)
        self.owner.settle()

    def give(self, **caveats: str | int) -> str:
        """Return a capability for somebody else who is to act there for us, empty if the worker asks for none.

        Args:
            caveats: What it is good for: see `farpoint.capability`.
        """
        if not self.capability:
            return ""
        seconds = MOVE_SECONDS if caveats.get("operation") == "move" else HOLD_SECONDS
        # The nonce tells two capabilities for the same apart, for each can be used once.
        expiry = int(time.time() + self._ahead) + seconds
        return narrow(self.capability, expiry=expiry, nonce=secrets.token_hex(8), **caveats)

    def new_id(self) -> int:
        """Return an id for a new object there, and hold a reference to it."""
        try:
            object_id = self._ids.pop()
        except IndexError:
            object_id, *fresh = unguessable_ids()
            self._ids.extend(fresh)
        self._counts[object_id] = 1
        return object_id

    def refer(self, object_id: int, *, claimed: bool = False) -> Reference:
        """Return a reference to an object that `new_id` has counted, or count one more for one that was claimed."""
        if claimed:
            with self.channel.lock:
                self._counts[object_id] = self._counts.get(object_id, 0) + 1
        return Reference(self, object_id)

    def run(
        self,
        template: Template,
        values: list[Any],
        results: list[int],
        origin: Origin = NOWHERE,
        nbytes: int = 0,
    ) -> None:
        """Issue an operation. Nothing waits, unless very many commands are under way.

        Args:
            template: What runs.
            values: What fills its holes, in order: ids, small tensors and numbers.
            results: Ids for what it returns.
            origin: Where it comes from.
            nbytes: Bytes that the results take there. When they add up the batch is sent early: releases must not wait.
        """
        channel = self.channel
        if channel.session.submitted >= self._room:
            self.make_room()
        with channel.lock:
            known = self._slots.get(id(template))
            slot = known[0] if known is not None else self.slot(template)
            number = channel.submit([RUN, slot, values, results])
            self._issued.append((number, origin))
            self._promised += nbytes
            due = channel.session.waiting >= BATCH or self._promised > PROMISED_BYTES
        if due:
            self.soon()
        if is_blocking() and isinstance(origin[0], CodeType):
            self.prove()

    def prove(self) -> None:
        """Wait until everything has taken effect, and raise what went wrong; a thread that must not wait does not.

        Raises:
            FarpointError: The first error that nobody has seen.
        """
        if not self.channel.may_wait():
            return
        self.request([SYNC, [], []])
        for uid, (error, seen) in list(self.owner.failures.items()):
            if not seen:
                self.owner.failures[uid] = (error, True)
                raise copy.copy(error)

    def soon(self) -> None:
        """Send what is waiting: at once, or, on a thread that carries out what a link has brought, as soon as it is done.

        Such a thread holds the lock of a worker, and a write may need that of another one.
        """
        if self.channel.may_wait():
            self.flush()
        else:
            self.owner.dirty.add(self)

    def make_room(self) -> None:
        """Wait until not too many commands are under way, here and wherever they are passed on to.

        Halfway to the limit a SYNC follows the commands, and at the limit its answer is waited for, which has usually
        come. A thread that must not wait does not: what it issues for others is limited by `Guest.pass_on`.
        """
        if not self.channel.may_wait():
            return
        with self.channel.lock:
            self._room = self.channel.session.submitted + self.limits.commands_in_flight // 2
            before, self._milestone = self._milestone, self.ask([SYNC, [], []])
        self.flush()
        if before is not None:
            self.wait(before)

    def slot(self, template: Template) -> int:
        """Return the slot of a template, and define it if the worker does not know it yet."""
        known = self._slots.get(id(template))
        if known is not None:
            return known[0]
        if len(self._slots) >= self.limits.templates:
            # The oldest is forgotten; its slot is defined anew, in order with the commands that use it.
            oldest = next(iter(self._slots))
            slot = self._slots.pop(oldest)[0]
        else:
            slot = len(self._slots)
        self._slots[id(template)] = (slot, template)
        self.channel.submit([DEFINE, slot, *template.wire])
        return slot

    def tell(self, message: list[Any], origin: Origin = NOWHERE, nbytes: int = 0) -> None:
        """Issue a command that is not answered. One that a line of the user's issued may be sent together with those before it.

        Args:
            message: The command.
            origin: Where it comes from.
            nbytes: Bytes that it adds there.
        """
        if self.channel.session.submitted >= self._room:
            self.make_room()
        with self.channel.lock:
            self._drop()  # before it: there may be no room for both
            self._issued.append((self.channel.submit(message), origin))
            self._promised += nbytes
            full = self.channel.session.waiting >= BATCH or self._promised > PROMISED_BYTES
        if full and isinstance(origin[0], CodeType):
            self.soon()
        if is_blocking() and isinstance(origin[0], CodeType):
            self.prove()

    def stream(self, message: list[Any], path: list[int], tensor: torch.Tensor, origin: Origin) -> Stream:
        """Issue a command with a large tensor, for `flush` to send in chunks, and do not wait for it.

        Args:
            message: The command.
            path: Where in it the tensor belongs.
            tensor: The tensor, dense; nobody changes it.
            origin: Where the command comes from.
        """
        return self.channel.stream(message, path, tensor, 0, lambda number: self._issued.append((number, origin)))

    def upload(self, message: list[Any], position: int, tensor: torch.Tensor, origin: Origin = NOWHERE) -> None:
        """Issue a command with a large tensor, and return when it has arrived: until then it must not change.

        Args:
            message: The command.
            position: Where in it the tensor belongs.
            tensor: The tensor, dense.
            origin: Where the command comes from.

        Raises:
            SynchronizationTimeoutError: The worker takes no more of it. Then it was taken back.
        """
        stream = self.stream(message, [position], tensor, origin)
        try:
            with progress_bar(f"to {self.name}", stream.total) as bar:
                self.flush()
                self._await(stream.done, None, lambda: bar(stream.sent))
        except BaseException:
            with self.channel.lock:
                if self.channel.bulk is not None:
                    self.channel.bulk.cancel(stream, self.channel.session)
            raise
        if self.channel.lost is not None:
            raise self.channel.ended()

    def ask(
        self, message: list[Any], then: Callable[[Any], None] | None = None, keep: object = None
    ) -> Reply:
        """Issue a command that is answered.

        Args:
            message: The command.
            then: Called with the answer, if it is not a failure, or with an exception if it is one.
            keep: Something to keep alive until then: the pin of a hand-over.
        """
        if self.channel.session.submitted >= self._room:
            self.make_room()
        reply = Reply(message, then, keep)
        with self.channel.lock:
            self._drop()
            reply.number = self.channel.submit(message)
            self.pending[reply.number] = reply
        return reply

    def wait(self, reply: Reply, seconds: float | None = None) -> Any:
        """Return an answer, or raise the error that came instead.

        Args:
            reply: What is waited for.
            seconds: For how long at most. If not given, as long as the worker gives signs of life.

        Raises:
            SynchronizationTimeoutError: Neither came.
        """
        self.flush()
        if not reply.done.is_set():
            self._await(reply.done, seconds)
        if reply.error is not None:
            # Not by way of a variable: with the traceback it would be a ring, which keeps the pointers of whoever called.
            raise self._cause_of(self.error(reply.error))
        return reply.value

    def _cause_of(self, error: FarpointError) -> FarpointError:
        if isinstance(error, ObjectNotFoundError):
            self.raise_orphan()  # what should have made the object has failed, and left nothing that could say so
        return error

    def _await(self, done: threading.Event, seconds: float | None, look: Callable[[], object] = lambda: None) -> None:
        patience = self.limits.progress_seconds if seconds is None else seconds
        began = time.monotonic()
        left = patience
        while not done.wait(min(left, _LOOK_SECONDS)):
            look()
            lane = self.channel.lane
            alive = 0.0 if seconds is not None else max(self.channel.heard, lane.link.heard if lane is not None else 0.0)
            left = max(began, alive) + patience - time.monotonic()
            if left <= 0:
                raise SynchronizationTimeoutError(self.name or self.url, patience, "" if lane is not None else self.absence)
        look()

    def raise_orphan(self) -> None:
        """Raise the first error of a command that had no result to carry it, and that nobody has seen yet."""
        while self.orphans:
            uid = self.orphans.popleft()
            error, seen = self.owner.failures.get(uid, (None, True))
            if error is not None and not seen:
                self.owner.failures[uid] = (error, True)
                raise copy.copy(error)

    def request(self, message: list[Any]) -> Any:
        """Issue a command and wait for its answer."""
        return self.wait(self.ask(message))

    def download(self, message: list[Any], nbytes: int) -> Any:
        """Issue a command whose answer may be large, and wait for it."""
        reply = self.ask(message)
        self.flush()
        if self.channel.bulk is not None and not reply.done.is_set():
            bulk = self.channel.bulk
            with progress_bar(f"from {self.name}", nbytes) as bar:
                self._await(reply.done, None, lambda: bar(bulk.progress(reply.number)[0]))
        return self.wait(reply)

    def flush(self) -> None:
        """Send what is waiting, with the references that were given up."""
        with self.channel.lock:
            self._promised = 0
            if self.channel.lost is None:
                self._drop()
        self.channel.flush()

    def error(self, failure: dict[str, Any]) -> FarpointError:
        """Return the exception for a failure, with the line that issued it; it counts as looked at.

        Who raises it gets a copy: what is kept must never have a traceback, whose frames would keep their pointers.
        """
        if "lost" in failure:
            return self.channel.ended()
        known = self.owner.failures.get(failure["uid"])
        error = known[0] if known else revive_failure(failure, "")
        self.owner.failures[failure["uid"]] = (error, True)
        return copy.copy(error)

    def broke(self, error: ProtocolError) -> FarpointError:
        """Close the link to a worker that has broken the protocol, and return the error for whoever noticed."""
        self.channel.fail(error)
        return self.channel.ended()

    def close(self) -> None:
        """End the session."""
        self.closing.set()
        if not self.channel.inherited:
            self._approach.close()
            lane = self.channel.lane
            if lane is not None:
                lane.link.close()

    def _drop(self) -> None:
        gone = []
        while self.dropped:
            object_id = self.dropped.popleft()
            left = self._counts.get(object_id, 0) - 1
            if left > 0:
                self._counts[object_id] = left
            else:
                self._counts.pop(object_id, None)
                gone.append(object_id)
        for start in range(0, len(gone), 1024):
            self.channel.submit([int(Kind.RELEASE), gone[start : start + 1024]])

    def _deliver(self, number: int, message: list[Any]) -> None:
        if type(message) is not list or len(message) != 3 or type(message[0]) is not int:
            raise MalformedMessageError("a message", "it", "a list of kind, number and content", brief(message))
        kind, about, content = message
        if kind not in (Kind.ANSWER, Kind.FAILURE):
            return  # a newer worker may say more
        if type(about) is not int or not 0 <= about <= self.channel.session.submitted:
            raise MalformedMessageError(Kind(kind).name, "the number", "that of a command", brief(about))
        reply = self.pending.get(about)
        if kind == Kind.FAILURE:
            FAILURE.check_map(content)
            if about == 0:
                self.channel.fail(TransportError(self.url, f"{self.name} ended the link: {content['text']}"))
                return
            content = read_failure(content, self.name)
            self._note(about, content, awaited=reply is not None)
            if reply is not None:
                reply.error = content
                del self.pending[about]
                self._settle(reply)
        elif reply is not None:
            check_answer(reply.asked, content)
            reply.value = content
            del self.pending[about]
            self._settle(reply)

    def _settle(self, reply: Reply) -> None:
        try:
            if reply.then is not None:
                with self.owner.lock:  # as for a command: it speaks for the worker, and may change its store
                    reply.then(self.error(reply.error) if reply.error is not None else reply.value)
        finally:
            reply.done.set()

    def _note(self, about: int, failure: dict[str, Any], *, awaited: bool) -> None:
        origin = next((place for number, place in reversed(self._issued) if number == about), NOWHERE)
        if origin[0] == LOCAL:  # it was said about a move
            self.owner.movers.unheard(self, origin[1], failure["text"])
            return
        if isinstance(origin[0], int):  # it was passed on: whoever issued it is told instead
            guest = self.owner.guests.get(origin[0])
            if guest is not None:
                guest.fail(origin[1], failure)
            return
        failures = self.owner.failures
        if failure["uid"] not in failures:
            failures[failure["uid"]] = (revive_failure(failure, spell(origin)), False)
            if failure["orphan"] and not awaited:
                self.orphans.append(failure["uid"])
            while len(failures) > self.limits.failures:
                failures.pop(next(iter(failures)), None)

    def _after(self) -> None:
        self.owner.settle()
