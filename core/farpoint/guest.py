"""The worker's side of a session: greets a client, and hands its commands to the worker in order."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from farpoint.channel import Channel
from farpoint.errors import FarpointError, LimitError, ProtocolError
from farpoint.executor import IN_PROCESS, Executor
from farpoint.failures import describe_failure
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import HELLO, brief
from farpoint.quota import Quota
from farpoint.serializer import Frame
from farpoint.template import Template
from farpoint.transport import Link

if TYPE_CHECKING:
    from farpoint.peer import Peer
    from farpoint.worker import Worker

GREETING_BYTES = 64 * 1024


class Guest:
    """A client of this worker.

    Attributes:
        name: What the client calls itself.
        holder: Its session, as the holders' list names it.
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
        left: Whether it is gone, and what it held with it.
        executor: What runs its operations.
    """

    quota: Quota

    def __init__(self, worker: Worker, link: Link) -> None:
        self.worker = worker
        self.name = ""
        self.url = ""
        self.holder = 0
        self.incarnation = b""
        self.held: set[int] = set()
        self.templates: dict[int, Template] = {}
        self.refused: dict[int, dict[str, Any]] = {}
        self.template_items = 0
        self.reaches: set[Peer] = set()
        self.moves = 0
        self.bad = 0
        self.doomed: ProtocolError | None = None
        self.left = False
        isolation = worker.isolation
        self.executor: Executor = isolation.executor(self) if isolation is not None else IN_PROCESS
        self._onward: dict[Peer, deque[int]] = {}
        self.at_once = False
        self._link = link
        self._greeted = False
        self.channel = Channel("a client", self._deliver, self._after, self._complain)

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the greeting, then packets."""
        if self._greeted:
            self.channel.received(frames)
            return
        answer = self._greet(frames)
        self._link.write([json.dumps(answer).encode()])
        if not self._greeted:
            self._link.close()

    def _greet(self, frames: Sequence[Frame]) -> dict[str, Any]:
        worker = self.worker
        try:
            hello = json.loads(bytes(frames[0][:GREETING_BYTES]) if frames else b"")
            version = hello.get("farpoint") if isinstance(hello, dict) else hello
            if version != 1:
                return {"refused": f"{worker.id} speaks protocol 1, not {brief(version)}"}
            HELLO.check_map(hello, worker.limits)
        except (ValueError, RecursionError, FarpointError) as error:
            return {"refused": f"this is not the greeting of a farpoint client: {str(error)[:200]}"}
        known = plugins.serializer_names()
        shared = [name for name in hello["serializers"] if name in known]
        if not shared:
            return {"refused": f"none of the serializers that were offered is known here; known: {known}"}
        if len(worker.guests) >= worker.limits.links:
            return {"refused": f"{worker.id} has {worker.limits.links} clients, as many as it takes"}
        self.name, self.url, self.holder = hello["client"], hello["url"], hello["session"]
        self.incarnation = bytes.fromhex(hello["incarnation"])
        self.channel.name = self.name
        serializer = plugins.serializer(shared[0], worker.limits)
        self.channel.open(self._link, Session(worker.incarnation, self.incarnation, worker.limits.answers()), serializer)
        self.held = worker.holders.held(self.holder)
        self.quota = Quota(worker.id, worker.store, self.held, worker.limits)
        # Whoever has learnt the number of a session must not become that session. Not under the worker's lock: the thread
        # that dials us may hold that of its own worker.
        if worker.guests.setdefault(self.holder, self) is not self:
            return {"refused": "this session is in use"}
        self._greeted = True
        return {
            "worker": worker.id,
            "incarnation": worker.incarnation.hex(),
            "serializer": shared[0],
            "limits": worker.limits.advertised(),
        }

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone: without leases yet, its references are given up at once."""
        if self._greeted:
            self.worker.guest_lost(self)

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

    def fail(self, number: int, failure: dict[str, Any]) -> None:
        """Report that a command failed."""
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
        """End the link."""
        self._link.close()

    def _deliver(self, number: int, message: list[Any]) -> None:
        self.worker.execute(self, number, message)
        if self.doomed is not None:
            raise self.doomed

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
