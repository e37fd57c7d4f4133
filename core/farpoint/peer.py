"""The client's side of a session: issues commands to one worker, and holds references there."""

from __future__ import annotations

import json
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from farpoint.channel import BATCH, Channel
from farpoint.errors import FarpointError, ProtocolError, SynchronizationTimeoutError, WorkerLostError
from farpoint.failures import revive_failure
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.provenance import NOWHERE, Origin, spell
from farpoint.serializer import Frame

if TYPE_CHECKING:
    from farpoint.template import Template
    from farpoint.worker import Worker

PROMISED_BYTES = 16 * 2**20

RUN, DEFINE = int(Kind.RUN), int(Kind.DEFINE)


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

    def __init__(self, then: Callable[[Any], None] | None = None, keep: object = None) -> None:
        self.value: Any = None
        self.error: dict[str, Any] | None = None
        self.done = threading.Event()
        self.then = then
        self.keep = keep


class Peer:
    """What one worker knows of another that it commands.

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
        self.dropped: deque[int] = deque()
        self.pending: dict[int, Reply] = {}
        self.orphans: deque[int] = deque()
        self._ids = count(secrets.randbits(61) + 2**61)
        self._counts: dict[int, int] = {}
        self._slots: dict[int, tuple[int, Template]] = {}
        self._issued: deque[tuple[int, Origin]] = deque(maxlen=2 * DEFAULT_LIMITS.commands_in_flight)
        self._welcome = threading.Event()
        self._refusal: str = ""
        self._promised = 0
        self.channel = Channel(name, self._deliver, self._after)
        self._link = plugins.transport(url).connect(url, self)
        hello = {
            "farpoint": 1,
            "client": owner.id,
            "url": owner.url,
            "session": self.session_id,
            "incarnation": owner.incarnation.hex(),
            "serializers": list(serializers),
        }
        self._link.write([json.dumps(hello).encode()])
        if not self._welcome.wait(5):
            raise SynchronizationTimeoutError(name, 5)
        if self._refusal:
            raise ProtocolError(self._refusal)

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the welcome, then packets."""
        if self._welcome.is_set():
            self.channel.received(frames)
            return
        welcome = json.loads(bytes(frames[0]))
        if "refused" in welcome:
            self._refusal = str(welcome["refused"])
        else:
            self.incarnation = bytes.fromhex(welcome["incarnation"])
            self.name = self.channel.name = str(welcome["worker"])
            serializer = plugins.serializer(str(welcome["serializer"]), DEFAULT_LIMITS)
            self.channel.open(self._link, Session(self.owner.incarnation, self.incarnation), serializer)
        self._welcome.set()

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone: everybody who waits is told."""
        with self.channel.lock:
            self.channel.lost = self.channel.lost or cause or ConnectionError("the worker was closed")
            waiting = list(self.pending.values())
            self.pending.clear()
        self.owner.peer_lost(self)
        for reply in waiting:
            reply.error = {"lost": True}
            reply.done.set()

    def new_id(self) -> int:
        """Return an id for a new object there, and hold a reference to it."""
        object_id = next(self._ids)
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
        """Issue an operation. Nothing waits.

        Args:
            template: What runs.
            values: What fills its holes, in order: ids, small tensors and numbers.
            results: Ids for what it returns.
            origin: Where it comes from.
            nbytes: Bytes that the results take there. When they add up the batch is sent early: releases must not wait.
        """
        with self.channel.lock:
            known = self._slots.get(id(template))
            slot = known[0] if known is not None else self.slot(template)
            number = self.channel.submit([RUN, slot, *values, *results])
            self._issued.append((number, origin))
            self._promised += nbytes
            due = self.channel.session.waiting >= BATCH or self._promised > PROMISED_BYTES
        if due:
            self.flush()

    def slot(self, template: Template) -> int:
        """Return the slot of a template, and define it if the worker does not know it yet."""
        known = self._slots.get(id(template))
        if known is not None:
            return known[0]
        if len(self._slots) >= DEFAULT_LIMITS.templates:
            # The oldest is forgotten; its slot is defined anew, in order with the commands that use it.
            oldest = next(iter(self._slots))
            slot = self._slots.pop(oldest)[0]
        else:
            slot = len(self._slots)
        self._slots[id(template)] = (slot, template)
        self.channel.submit([DEFINE, slot, *template.wire])
        return slot

    def tell(self, message: list[Any], origin: Origin = NOWHERE) -> None:
        """Issue a command that is not answered."""
        with self.channel.lock:
            self._issued.append((self.channel.submit(message), origin))

    def ask(
        self, message: list[Any], then: Callable[[Any], None] | None = None, keep: object = None
    ) -> Reply:
        """Issue a command that is answered.

        Args:
            message: The command.
            then: Called with the answer, if it is not a failure, or with an exception if it is one.
            keep: Something to keep alive until then: the pin of a hand-over.
        """
        reply = Reply(then, keep)
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
            error, seen = self.owner.failures[self.orphans[0]]
            self.owner.failures[self.orphans.popleft()] = (error, True)
            if not seen:
                raise error

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
        """Return the exception for a failure, with the line that issued it; it counts as looked at."""
        if "lost" in failure:
            return WorkerLostError(self.name, str(self.channel.lost))
        known = self.owner.failures.get(failure["uid"])
        error = known[0] if known else revive_failure(failure, "")
        self.owner.failures[failure["uid"]] = (error, True)
        return error

    def close(self) -> None:
        """End the link."""
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
        kind, about, content = message
        reply = self.pending.pop(about, None)
        if kind == Kind.ANSWER and reply is not None:
            reply.value = content
            if reply.then is not None:
                reply.then(content)
            reply.done.set()
        elif kind == Kind.FAILURE:
            self._note(about, content)
            if reply is not None:
                reply.error = content
                if reply.then is not None:
                    reply.then(self.error(content))
                reply.done.set()

    def _note(self, about: int, failure: dict[str, Any]) -> None:
        origin = next((place for number, place in reversed(self._issued) if number == about), NOWHERE)
        if isinstance(origin[0], int):  # it was passed on: whoever issued it is told instead
            guest = self.owner.guests.get(origin[0])
            if guest is not None:
                guest.fail(origin[1], failure)
            return
        if failure["uid"] not in self.owner.failures:
            self.owner.failures[failure["uid"]] = (revive_failure(failure, spell(origin)), False)
            if failure.get("orphan"):
                self.orphans.append(failure["uid"])

    def _after(self) -> None:
        self.owner.settle()
