"""What was asked of a worker and is not answered yet, and what it says of commands that failed."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from farpoint.errors import (
    FarpointError,
    MalformedMessageError,
    ObjectNotFoundError,
    SynchronizationTimeoutError,
    TransportError,
)
from farpoint.failures import read_failure, revive_failure
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import FAILURE, brief, check_answer
from farpoint.provenance import NOWHERE, Origin, spell

if TYPE_CHECKING:
    from farpoint.peer import Peer

_LOOK_SECONDS = 0.1
LOCAL = 0
"""The holder that a worker is in its own list, and the session that its own moves belong to."""


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


class Answers:
    """The replies that are awaited from one worker, and the lines that issued what it was told.

    Args:
        peer: The worker.

    Attributes:
        pending: Replies by the number of the command.
        orphans: Failures of commands that had no result to carry them.
        issued: Numbers of the last commands, and where each comes from.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.pending: dict[int, Reply] = {}
        self.orphans: deque[int] = deque(maxlen=peer.limits.failures)
        self.issued: deque[tuple[int, Origin]] = deque(maxlen=2 * peer.limits.commands_in_flight)

    def deliver(self, message: Any) -> None:
        """Take a message of the worker's: an answer, or a failure.

        Raises:
            MalformedMessageError: It is none.
        """
        if type(message) is not list or len(message) != 3 or type(message[0]) is not int:
            raise MalformedMessageError("a message", "it", "a list of kind, number and content", brief(message))
        kind, about, content = message
        if kind not in (Kind.ANSWER, Kind.FAILURE):
            return  # a newer worker may say more
        peer = self._peer
        if type(about) is not int or not 0 <= about <= peer.channel.session.submitted:
            raise MalformedMessageError(Kind(kind).name, "the number", "that of a command", brief(about))
        reply = self.pending.get(about)
        if kind == Kind.FAILURE:
            FAILURE.check_map(content)
            if about == 0:
                peer.channel.fail(TransportError(peer.url, f"{peer.name} ended the link: {content['text']}"))
                return
            step = content.get("step")
            content = read_failure(content, peer.name)
            self._note(about, step if type(step) is int else 0, content, awaited=reply is not None)
            if reply is not None:
                reply.error = content
        elif reply is not None:
            check_answer(reply.asked, content)
            reply.value = content
        if reply is not None:
            del self.pending[about]
            self._settle(reply)

    def take_pending(self) -> list[Reply]:
        """Return what is awaited, for `lose`; nothing is awaited any more. The channel's lock is held."""
        waiting = list(self.pending.values())
        self.pending.clear()
        return waiting

    def lose(self, waiting: list[Reply]) -> None:
        """Tell everybody who waits that the session is over."""
        for reply in waiting:
            reply.error = {"lost": True}
            self._settle(reply)

    def value(self, reply: Reply) -> Any:
        """Return the answer that has come, or raise the error that came instead."""
        if reply.error is not None:
            # Not by way of a variable: with the traceback it would be a ring, which keeps the pointers of whoever called.
            raise self._cause_of(self.error(reply.error))
        return reply.value

    def wait(self, done: threading.Event, seconds: float | None, look: Callable[[], object] = lambda: None) -> None:
        """Wait for something that the worker does, as long as it gives signs of life.

        Args:
            done: Set when it is done.
            seconds: For how long at most, whatever signs there are.
            look: Called again and again meanwhile, and at the end.

        Raises:
            SynchronizationTimeoutError: It is not done.
        """
        peer = self._peer
        patience = peer.limits.progress_seconds if seconds is None else seconds
        began = time.monotonic()
        left = patience
        while not done.wait(min(left, _LOOK_SECONDS)):
            look()
            lane = peer.channel.lane
            alive = 0.0 if seconds is not None else max(peer.channel.heard, lane.link.heard if lane is not None else 0.0)
            left = max(began, alive) + patience - time.monotonic()
            if left <= 0:
                raise SynchronizationTimeoutError(peer.name or peer.url, patience, "" if lane is not None else peer.absence)
        look()

    def _cause_of(self, error: FarpointError) -> FarpointError:
        if isinstance(error, ObjectNotFoundError):
            self.raise_orphan()  # what should have made the object has failed, and left nothing that could say so
        return error

    def raise_orphan(self) -> None:
        """Raise the first error of a command that had no result to carry it, and that nobody has seen yet."""
        failures = self._peer.owner.failures
        while self.orphans:
            uid = self.orphans.popleft()
            error, seen = failures.get(uid, (None, True))
            if error is not None and not seen:
                failures[uid] = (error, True)
                raise copy.copy(error)

    def error(self, failure: dict[str, Any]) -> FarpointError:
        """Return the exception for a failure, with the line that issued it; it counts as looked at.

        Who raises it gets a copy: what is kept must never have a traceback, whose frames would keep their pointers.
        """
        if "lost" in failure:
            return self._peer.channel.ended()
        failures = self._peer.owner.failures
        known = failures.get(failure["uid"])
        error = known[0] if known else revive_failure(failure, "")
        failures[failure["uid"]] = (error, True)
        return copy.copy(error)

    def _settle(self, reply: Reply) -> None:
        try:
            if reply.then is not None:
                with self._peer.owner.lock:  # as for a command: it speaks for the worker, and may change its store
                    reply.then(self.error(reply.error) if reply.error is not None else reply.value)
        finally:
            reply.done.set()

    def _note(self, about: int, step: int, failure: dict[str, Any], *, awaited: bool) -> None:
        owner = self._peer.owner
        origin = next((place for number, place in reversed(self.issued) if number == about), NOWHERE)
        if isinstance(origin[0], tuple):
            origin = origin[0][step - 1] if 0 < step <= len(origin[0]) else origin[0][0]
        if origin[0] == LOCAL:  # it was said about a move
            owner.movers.unheard(self._peer, origin[1], failure["text"], forbidden=failure["kind"] == "PermissionDeniedError")
            return
        if isinstance(origin[0], int):  # it was passed on: whoever issued it is told instead
            guest = owner.guests.get(origin[0])
            if guest is not None:
                guest.fail(origin[1], failure)
            return
        failures = owner.failures
        if failure["uid"] not in failures:
            failures[failure["uid"]] = (revive_failure(failure, spell(origin)), False)
            if failure["orphan"] and not awaited:
                self.orphans.append(failure["uid"])
            while len(failures) > self._peer.limits.failures:
                failures.pop(next(iter(failures)), None)
