"""The client's side of a session: issues commands to one worker, and holds references there."""

from __future__ import annotations

import copy
import json
import os
import secrets
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from farpoint.channel import BATCH, Channel, bare
from farpoint.errors import (
    FarpointError,
    LimitError,
    MalformedMessageError,
    ProtocolError,
    SynchronizationTimeoutError,
    TransportError,
)
from farpoint.failures import read_failure, revive_failure
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import FAILURE, WELCOME, brief, check_answer
from farpoint.provenance import NOWHERE, Origin, spell
from farpoint.serializer import Frame
from farpoint.transport import Link

if TYPE_CHECKING:
    from farpoint.template import Template
    from farpoint.worker import Worker

PROMISED_BYTES = 16 * 2**20
LARGE_ANSWER = 64 * 1024
"""Bytes of an answer that is acknowledged at once: the worker keeps it until then."""
WELCOME_BYTES = 64 * 1024

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
    """

    def __init__(self, owner: Worker, name: str, url: str, serializers: Sequence[str]) -> None:
        self.owner = owner
        self.name = name
        self.url = url
        self.session_id = secrets.randbits(62) + 1
        self.limits = owner.limits
        self.dropped: deque[int] = deque()
        self.pending: dict[int, Reply] = {}
        self.orphans: deque[int] = deque(maxlen=self.limits.failures)
        self._ids: list[int] = []
        self._counts: dict[int, int] = {}
        self._slots: dict[int, tuple[int, Template]] = {}
        self._issued: deque[tuple[int, Origin]] = deque(maxlen=2 * self.limits.commands_in_flight)
        self._welcome = threading.Event()
        self._welcomed = False
        self._deferred: list[Callable[[], None]] = []
        self._refusal: FarpointError | None = None
        self._promised = 0
        self._room = self.limits.commands_in_flight // 2
        self._milestone: Reply | None = None
        self._offered = list(serializers)
        self._link: Link | None = None
        self.incarnation = b""
        self.channel = Channel(name, self._deliver, self._after)
        self.channel.session = Session(owner.incarnation, self.incarnation, self.limits)

    def dial(self) -> None:
        """Make the link, greet, and wait for the welcome, unless this thread must not wait.

        Raises:
            FarpointError: There is nobody, or somebody else, or we are refused.
        """
        owner = self.owner
        hello = {
            "farpoint": 1,
            "client": owner.id,
            "url": owner.url,
            "session": self.session_id,
            "incarnation": owner.incarnation.hex(),
            "serializers": self._offered,
        }
        try:
            self._link = plugins.transport(self.url).connect(self.url, self)
            self._link.write([json.dumps(hello).encode()])
            if self.channel.may_wait() and not self._welcome.wait(5):
                raise SynchronizationTimeoutError(self.name or self.url, 5)
            if self._refusal is not None:
                raise copy.copy(self._refusal)
        except FarpointError as error:
            # Without the traceback, whose frames would keep the pointers of whoever called.
            self.channel.lost = self._refusal = copy.copy(error)
            self._welcome.set()
            self.close()
            raise

    def defer(self, call: Callable[[], None]) -> bool:
        """Call something as soon as the other worker has said who it is; return False, and do not, if it has.

        Raises:
            LimitError: Too much waits for that already.
        """
        if self._welcomed:
            return False
        if len(self._deferred) >= self.limits.transfers:
            raise LimitError("transfers", self.limits.transfers, f"another message while {self.name} has not greeted us")
        self._deferred.append(call)
        return True

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the welcome, then packets."""
        if not self._welcome.is_set():
            try:
                self._take_welcome(bytes(frames[0][:WELCOME_BYTES]) if frames else b"")
            except (ValueError, RecursionError, FarpointError) as error:
                self._refusal = ProtocolError(f"{self.name or self.url} does not greet like a worker: {str(error)[:500]}")
            if self._refusal is not None:
                self.channel.fail(self._refusal)
            self._welcome.set()
            self.soon()
            self._after()
        elif self._refusal is None:
            self.channel.received(frames)
            if self.channel.lost is None and (
                self.channel.session.owed >= BATCH or any(len(frame) > LARGE_ANSWER for frame in frames)
            ):
                self.channel.flush()

    def _take_welcome(self, text: bytes) -> None:
        welcome = json.loads(text)
        if isinstance(welcome, dict) and isinstance(welcome.get("refused"), str):
            self._refusal = ProtocolError(f"{self.name or self.url} refused us: {welcome['refused'][:500]}")
            return
        WELCOME.check_map(welcome)
        name, serializer = welcome["worker"], welcome["serializer"]
        if self.name and name != self.name:
            raise MalformedMessageError("the welcome", "worker", f"{self.name!r}, who was called", repr(name))
        if serializer not in self._offered:
            raise MalformedMessageError("the welcome", "serializer", f"one of {self._offered}", repr(serializer))
        if self._link is None:
            raise MalformedMessageError("the welcome", "it", "the answer to a greeting", "one before it")
        theirs = welcome.get("limits")
        for limit in ("commands_in_flight", "templates"):
            allowed = theirs.get(limit) if isinstance(theirs, dict) else None
            if type(allowed) is int and 2 <= allowed < getattr(self.limits, limit):
                self.limits = attrs.evolve(self.limits, **{limit: allowed})
        self._room = self.limits.commands_in_flight // 2
        self.incarnation = bytes.fromhex(welcome["incarnation"])
        self.name = self.channel.name = name
        self.channel.session.remote = self.incarnation
        self.channel.open(self._link, self.channel.session, plugins.serializer(serializer, self.owner.limits))
        with self.owner.lock:
            self._welcomed = True
            self.owner.peer_back(self)
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call()

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone: everybody who waits is told."""
        with self.channel.lock:
            self.channel.lost = self.channel.lost or bare(cause) or ConnectionError("the worker was closed")
            waiting = list(self.pending.values())
            self.pending.clear()
        if not self._welcomed:
            closed = TransportError(self.url, f"the link was closed before {self.name or 'the worker'} greeted us")
            self._refusal = self._refusal or closed
            self._welcome.set()
        self.owner.peer_lost(self)
        for reply in waiting:
            reply.error = {"lost": True}
            self._settle(reply)
        self.owner.settle()

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
            before, self._milestone = self._milestone, self.ask([SYNC, []])
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
            self._issued.append((self.channel.submit(message), origin))
            self._promised += nbytes
            full = self.channel.session.waiting >= BATCH or self._promised > PROMISED_BYTES
        if full and origin is not NOWHERE:
            self.soon()

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
            self.pending[self.channel.submit(message)] = reply
        return reply

    def wait(self, reply: Reply, seconds: float = 60.0) -> Any:
        """Return an answer, or raise the error that came instead.

        Raises:
            SynchronizationTimeoutError: Neither came.
        """
        self.flush()
        if not reply.done.wait(seconds):
            raise SynchronizationTimeoutError(self.name, seconds)
        if reply.error is not None:
            raise self.error(reply.error)
        return reply.value

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
        """End the link."""
        if self._link is not None and not self.channel.inherited:
            self._link.close()

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
            self._note(about, content)
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

    def _note(self, about: int, failure: dict[str, Any]) -> None:
        origin = next((place for number, place in reversed(self._issued) if number == about), NOWHERE)
        if isinstance(origin[0], int):  # it was passed on: whoever issued it is told instead
            guest = self.owner.guests.get(origin[0])
            if guest is not None:
                guest.fail(origin[1], failure)
            return
        failures = self.owner.failures
        if failure["uid"] not in failures:
            failures[failure["uid"]] = (revive_failure(failure, spell(origin)), False)
            if failure["orphan"]:
                self.orphans.append(failure["uid"])
            while len(failures) > self.limits.failures:
                failures.pop(next(iter(failures)), None)

    def _after(self) -> None:
        self.owner.settle()
