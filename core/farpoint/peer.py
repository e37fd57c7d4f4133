"""The client's side of a session: issues commands to one worker, and holds references there."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from farpoint import recording
from farpoint.access import NO_CREDENTIALS, Credentials
from farpoint.answers import Answers, Reply
from farpoint.approach import Approach, come_back
from farpoint.blocking import is_blocking
from farpoint.bulk import Stream
from farpoint.capability import PREFIX
from farpoint.channel import BATCH, Channel, Lane, bare
from farpoint.errors import (
    FarpointError,
    LimitError,
    NobodyListensError,
    ProtocolError,
    TransportError,
    UnreachableError,
    WorkerRestartedError,
)
from farpoint.plugins import plugins
from farpoint.progress import progress_bar
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.provenance import NOWHERE, Origin
from farpoint.recording import PlanNumbers
from farpoint.references import References
from farpoint.terms import Terms, read_terms

if TYPE_CHECKING:
    from farpoint.template import Template
    from farpoint.worker import Worker

PROMISED_BYTES = 16 * 2**20

RUN, DEFINE, SYNC = int(Kind.RUN), int(Kind.DEFINE), int(Kind.SYNC)


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
        limits: What must not be exceeded: ours, and what the worker has told of its own.
        terms: What the worker has told.
        references: To its objects.
        answers: What it is asked.
        plans: The numbers of the plans that it keeps for us.
    """

    def __init__(
        self, owner: Worker, name: str, url: str, serializers: Sequence[str], credentials: Credentials = NO_CREDENTIALS
    ) -> None:
        self.owner = owner
        self.name = name
        self.url = url
        self.credentials = credentials
        self.offered = list(serializers)
        self.session_id = secrets.randbits(62) + 1
        self.secret = secrets.token_hex(16)
        self.closing = threading.Event()
        self.absence = ""
        self.dead = False
        self.limits = credentials.limits
        self.terms = Terms(self.limits, url)
        self.references = References(self)
        self.answers = Answers(self)
        self.plans = PlanNumbers()
        self._slots: dict[int, tuple[int, Template]] = {}
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
        self.terms = read_terms(welcome, self.url, self.limits)
        self.limits = self.terms.limits
        self._room = self.limits.commands_in_flight // 2
        self.incarnation = bytes.fromhex(welcome["incarnation"])
        self.name = self.channel.name = welcome["worker"]
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
            waiting = self.answers.take_pending()
        self.channel.end()
        self.owner.peer_lost(self)
        with self.owner.lock:
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call(self.channel.ended())
        self.answers.lose(waiting)
        self.owner.settle()

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
        if recording.runs and recording.hold(self, template, values, results, origin, nbytes):
            return
        channel = self.channel
        if channel.session.submitted >= self._room:
            self.make_room()
        with channel.lock:
            known = self._slots.get(id(template))
            slot = known[0] if known is not None else self.slot(template)
            number = channel.submit([RUN, slot, values, results])
            self.answers.issued.append((number, origin))
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

    def await_room(self) -> None:
        """Wait, if very many commands are under way."""
        if self.channel.session.submitted >= self._room:
            self.make_room()

    def take_room(self, commands: int) -> None:
        """Count the commands of a plan, of which the message counts as one. The channel's lock is held."""
        self._room -= commands

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
        if recording.runs:
            recording.check(self, message)
        if self.channel.session.submitted >= self._room:
            self.make_room()
        with self.channel.lock:
            self._drop()  # before it: there may be no room for both
            self.answers.issued.append((self.channel.submit(message), origin))
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
        if recording.runs:
            recording.check(self, message)
        return self.channel.stream(message, path, tensor, 0, lambda number: self.answers.issued.append((number, origin)))

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
                self.answers.wait(stream.done, None, lambda: bar(stream.sent))
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
        if recording.runs:
            recording.check(self, message)
        if self.channel.session.submitted >= self._room:
            self.make_room()
        reply = Reply(message, then, keep)
        with self.channel.lock:
            self._drop()
            reply.number = self.channel.submit(message)
            self.answers.pending[reply.number] = reply
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
            self.answers.wait(reply.done, seconds)
        return self.answers.value(reply)

    def request(self, message: list[Any]) -> Any:
        """Issue a command and wait for its answer."""
        return self.wait(self.ask(message))

    def download(self, reply: Reply, nbytes: int) -> Any:
        """Wait for an answer that may be large, and return it."""
        self.flush()
        if self.channel.bulk is not None and not self.channel.inline and not reply.done.is_set():
            bulk = self.channel.bulk
            with progress_bar(f"from {self.name}", nbytes) as bar:
                self.answers.wait(reply.done, None, lambda: bar(bulk.progress(reply.number)[0]))
        return self.wait(reply)

    def flush(self) -> None:
        """Send what is waiting, with the references that were given up."""
        with self.channel.lock:
            self._promised = 0
            if self.channel.lost is None:
                self._drop()
        self.channel.flush()

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
        for ids in self.references.take_released():
            self.channel.submit([int(Kind.RELEASE), ids])
        for number in self.plans.take_dropped():
            self.channel.submit([int(Kind.PLAN), number, []])

    def _deliver(self, number: int, message: list[Any]) -> None:
        self.answers.deliver(message)

    def _after(self) -> None:
        self.owner.settle()
