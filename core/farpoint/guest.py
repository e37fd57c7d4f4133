"""The worker's side of a session: greets a client, and hands its commands to the worker in order."""

from __future__ import annotations

import hmac
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from farpoint.about import VERSIONS
from farpoint.channel import Channel, Lane
from farpoint.errors import (
    CapabilityError,
    FarpointError,
    LimitError,
    ProtocolError,
    TransportError,
    WorkerLostError,
)
from farpoint.executor import Executor
from farpoint.failures import describe_failure
from farpoint.macro import Macro, Unfolding, apart
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import HELLO, OPTIONAL_IN_HELLO, brief
from farpoint.quota import Quota
from farpoint.serializer import Frame
from farpoint.template import Template
from farpoint.transport import Link

if TYPE_CHECKING:
    from farpoint.peer import Peer
    from farpoint.worker import Worker

GREETING_BYTES = 64 * 1024


class Doorstep:
    """One link to a worker: it takes the greeting, and then what the client sends.

    Args:
        worker: Whom the link leads to.
        link: The link.
        inline: Whether its transport is inline.
    """

    def __init__(self, worker: Worker, link: Link, *, inline: bool) -> None:
        self._worker = worker
        self._link = link
        self._inline = inline
        self._lane = Lane(link, held=True)
        self._guest: Guest | None = None

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the greeting, then packets."""
        guest = self._guest
        if guest is not None:
            guest.channel.received(self._lane, frames)
            return
        answer = self._greet(bytes(frames[0][:GREETING_BYTES]) if frames else b"")
        try:
            self._link.write([json.dumps(answer).encode()])
        except TransportError:
            return  # it has hung up; `lost` follows
        if self._guest is None:
            self._link.close()
        else:
            self._guest.channel.release(self._lane)

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone."""
        if self._guest is not None:
            self._guest.parted(self._lane, cause)

    def _greet(self, text: bytes) -> dict[str, Any]:
        worker = self._worker
        try:
            hello = json.loads(text)
            version = hello.get("farpoint") if isinstance(hello, dict) else hello
            if version != 1:
                return {"refused": f"{worker.id} speaks protocol 1, not {brief(version)}"}
            if isinstance(hello, dict):
                hello = {**OPTIONAL_IN_HELLO, **hello}
            HELLO.check_map(hello, worker.limits)
        except (ValueError, RecursionError, FarpointError) as error:
            return {"refused": f"this is not the greeting of a farpoint client: {str(error)[:200]}"}
        known = plugins.serializer_names()
        shared = [name for name in hello["serializers"] if name in known]
        if not shared:
            return {"refused": f"none of the serializers that were offered is known here; known: {known}"}
        if hello["taken"] is not None:
            return self._take_back(hello, shared[0])
        if len(worker.guests) >= worker.limits.links and not worker.quarantine.give_room():
            return {"refused": f"{worker.id} has {worker.limits.links} clients, as many as it takes"}
        try:
            introduced = worker.doorman.introduced(self._link.token, hello["incarnation"])
        except CapabilityError as error:
            return {"refused": str(error)}
        principal = worker.doorman.principal(self._link.token, self._link.identity)
        # Not under the worker's lock: the thread that dials us may hold that of its own worker.
        with worker.doorman.counting:
            if worker.doorman.is_full(principal):
                allowed = worker.limits.sessions_per_principal
                worker.logger.warning("%s: no room for another session of whoever shows %s", worker.id, principal)
                return {"refused": f"whoever shows {principal} has {allowed} sessions, and the limit is sessions_per_principal={allowed}: close one"}
            guest = Guest(worker, hello, introduced=introduced, identity=self._link.identity, principal=principal)
            # Whoever has learnt the number of a session must not become that session.
            if worker.guests.setdefault(guest.holder, guest) is not guest:
                return {"refused": "this session is in use"}
        serializer = plugins.serializer(shared[0], worker.limits)
        session = Session(worker.incarnation, guest.incarnation, worker.limits.answers())
        guest.channel.open(self._lane, session, serializer, worker.limits, inline=self._inline)
        self._guest = guest
        worker.logger.info("%s: a session with %s at %s begins", worker.id, guest.name, self._link.address or "this process")
        return {
            "worker": worker.id,
            "incarnation": worker.incarnation.hex(),
            "serializer": shared[0],
            "url": worker.url,
            "limits": worker.limits.advertised(),
            **({} if self._inline else worker.doorman.welcome(guest)),
            **VERSIONS,
        }

    def _take_back(self, hello: dict[str, Any], serializer: str) -> dict[str, Any]:
        """Answer a client that had a session here: with how much of it has come, if it is still there."""
        worker = self._worker
        answer = {"worker": worker.id, "incarnation": worker.incarnation.hex(), "serializer": serializer}
        guest = worker.guests.get(hello["session"])
        if guest is None or not guest.secret or not hmac.compare_digest(guest.secret, (hello["secret"] or "").encode()):
            return answer
        if guest.identity != self._link.identity:
            return {"refused": "this session belongs to somebody with another certificate"}
        try:
            if not guest.take_back(self._lane, hello["taken"]):
                return answer
        except FarpointError as error:
            return {"refused": str(error)[:200]}
        self._guest = guest
        worker.logger.info("%s: the session with %s goes on from %s", worker.id, guest.name, self._link.address)
        return {**answer, "taken": guest.channel.session.taken}


class Guest:
    """A client of this worker.

    Args:
        worker: The worker.
        hello: Its greeting, which was checked.
        introduced: Whether it came in with a capability: it may only use what it was handed.
        identity: The name in its certificate, empty if it has shown none.
        principal: Whom its sessions are counted for, empty if that is not known.

    Attributes:
        name: What the client calls itself.
        holder: Its session, as the holders' list names it.
        introduction: What opens its own door to us, if it listens.
        secret: What shows that a later link is of the same client.
        held: The ids that it has a reference to.
        templates: What it has defined, by slot.
        at_once: Whether the last answer must be written before the next command is executed.
        refused: Why a template was refused, by slot.
        template_items: How large all templates are together.
        quota: How much may be kept for it.
        reaches: The workers that commands of it were passed on to.
        moves: How many moves of it are under way.
        bad: How many malformed messages have come.
        doomed: Why its link is about to be closed.
        reading: What it reads piece by piece, as it is stored and as bytes.
        macros: The plans that it has registered, by number.
        unfolding: What a RUNPLAN has brought, until it is carried out.
        left: Whether it is gone, and what it held with it.
        gone: Set as soon as it is, for whoever waits for that.
        away: Whether its lease has run out, and it may still come back.
        executor: What runs its operations.
    """

    def __init__(self, worker: Worker, hello: dict[str, Any], *, introduced: bool, identity: str = "", principal: str = "") -> None:
        self.worker = worker
        self.identity = identity
        self.principal = principal
        self.name: str = hello["client"]
        self.url: str = hello["url"]
        self.holder: int = hello["session"]
        self.secret = (hello["secret"] or "").encode()
        self.incarnation = bytes.fromhex(hello["incarnation"])
        self.introduced = introduced
        self.introduction: str = hello["introduction"] or ""
        self.held: set[int] = worker.holders.held(self.holder)
        self.quota = Quota(worker.id, worker.store, self.held, worker.limits)
        self.templates: dict[int, Template] = {}
        self.refused: dict[int, dict[str, Any]] = {}
        self.template_items = 0
        self.macros: dict[int, Macro] = {}
        self.unfolding: Unfolding | None = None
        self._told: tuple[int, set[int]] = (0, set())
        self.reaches: set[Peer] = set()
        self.moves = 0
        self.bad = 0
        self.doomed: ProtocolError | None = None
        self.left = False
        self.gone = threading.Event()
        self.away = False
        self.reading: tuple[torch.Tensor, torch.Tensor] | None = None
        isolation = worker.isolation
        self.executor: Executor = isolation.executor(self) if isolation is not None else worker.in_process
        self.at_once = False
        self._onward: dict[Peer, deque[int]] = {}
        self._timer: threading.Timer | None = None
        self.channel = Channel(
            self.name,
            self._deliver,
            self._after,
            self._complain,
            patient=True,
            admit=lambda nbytes: self.quota.check(nbytes, 0),
            refuse=self._refuse,
        )

    def take_back(self, lane: Lane, taken: int) -> bool:
        """Go on over a new link. Return False if this session is over.

        Raises:
            ProtocolError: The client cannot have taken what it says it has.
        """
        with self.worker.lock:
            if self.left or self.channel.lost is not None or self.doomed is not None:
                return False
            self.channel.resume(lane, taken)
            self._expect_nothing()
            self.away = False
            return True

    def parted(self, lane: Lane, cause: Exception | None) -> None:
        """Learn that a link is gone. Unless one side has ended the session, it waits for another one while its lease runs."""
        if not self.channel.part(lane):
            return
        if cause is None or self.channel.inline or self.channel.lost is not None or not self.secret:
            self.worker.guest_lost(self)
            return
        self.worker.logger.info("%s: the link to %s is lost: %s", self.worker.id, self.name, cause)
        with self.worker.lock:
            if self.channel.lane is None and not self.left:
                self.expect(self.worker.limits.lease_seconds, self.worker.quarantine.take)

    def expect(self, seconds: float, otherwise: Callable[[Guest], None]) -> None:
        """Do something if the client has not come back by then. Called with the worker's lock held."""
        self._expect_nothing()
        self._timer = threading.Timer(seconds, otherwise, [self])
        self._timer.daemon = True
        self._timer.start()

    def leave(self) -> None:
        """End the session. Called with the worker's lock held."""
        self.left = True
        self._expect_nothing()
        self.channel.fail(WorkerLostError(self.name, "its session is over"))
        self.channel.end()

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pass_on(self, peer: Peer) -> None:
        """Count a command that is about to be passed on to another worker.

        A client that waits, as it should, until what it has issued has taken effect, also at the end of a chain, never
        meets this limit. A worker must not wait for another: two that wait for each other would do so for ever.

        Raises:
            LimitError: The other worker has not even taken the last ones.
        """
        session = peer.channel.session
        under_way = self._onward.get(peer)
        if under_way is None:
            for lost in [known for known in self.reaches if known.channel.lost is not None]:
                self.reaches.discard(lost)
                self._onward.pop(lost, None)
            under_way = self._onward[peer] = deque()
            self.reaches.add(peer)
        while under_way and under_way[0] <= session.acknowledged:
            under_way.popleft()
        allowed = 2 * self.worker.limits.commands_in_flight
        if len(under_way) >= allowed:
            found = f"another command for {peer.name}, which has not yet taken {len(under_way)} others"
            raise LimitError("commands_in_flight", self.worker.limits.commands_in_flight, found)
        under_way.append(session.submitted + 1)

    def answer(self, number: int, value: Any) -> None:
        """Answer a command."""
        self._say([int(Kind.ANSWER), number, value])

    def answer_in_chunks(self, number: int, value: list[Any], position: int, tensor: torch.Tensor) -> None:
        """Answer a command with a list that holds a large tensor, which nobody changes any more."""
        with self.channel.lock:
            if self.channel.lost is None and self.doomed is None:
                self.channel.stream([int(Kind.ANSWER), number, value], [2, position], tensor, number)
                self.worker.dirty.add(self)

    def fail(self, number: int, failure: dict[str, Any]) -> None:
        """Report that a command failed, or a step of one."""
        number, step = apart(number)
        if step:
            # What follows from one failure fails for the same reason, which is told once.
            if self._told[0] != number:
                self._told = (number, set())
            if failure["uid"] in self._told[1]:
                return
            self._told[1].add(failure["uid"])
            failure = {**failure, "step": step}
        self._say([int(Kind.FAILURE), number, failure])

    def malformed(self) -> None:
        """Count a malformed message."""
        self.bad += 1
        if self.bad >= self.worker.limits.bad_requests:
            self.doomed = ProtocolError(f"{self.bad} malformed messages came over this link")

    def _say(self, message: list[Any]) -> None:
        with self.channel.lock:
            if self.channel.lost is not None or self.doomed is not None:
                return
            if self.channel.session.full:
                self.doomed = ProtocolError(f"{self.channel.session.submitted} answers were sent and not acknowledged")
                return
            self.channel.submit(message)
            self.worker.dirty.add(self)

    def flush(self) -> None:
        """Send what is waiting."""
        self.channel.flush()

    def close(self) -> None:
        """End the link, in good order."""
        lane = self.channel.lane
        if lane is not None:
            lane.link.close()

    def _deliver(self, number: int, message: list[Any]) -> None:
        self.worker.execute(self, number, message)
        if self.doomed is not None:
            raise self.doomed

    def _refuse(self, number: int, message: list[Any], reason: FarpointError) -> None:
        self.worker.refuse(self, number, message, reason)

    def _complain(self, error: FarpointError) -> None:
        """Tell the client why its link is about to be closed."""
        failure = describe_failure(error, self.worker.id, "this link", expose=False)
        with self.channel.lock:
            if self.channel.lost is not None:
                return
            self.channel.submit([int(Kind.FAILURE), 0, failure])
        self.channel.flush()

    def _after(self) -> None:
        self.worker.dirty.add(self)
        self.worker.settle()
