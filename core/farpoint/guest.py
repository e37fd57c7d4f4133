"""The worker's side of a session: greets a client, and hands its commands to the worker in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from farpoint.channel import Channel
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.serializer import Frame
from farpoint.template import Template
from farpoint.transport import Link

if TYPE_CHECKING:
    from farpoint.worker import Worker


class Guest:
    """A client of this worker.

    Attributes:
        name: What the client calls itself.
        holder: Its session, as the holders' list names it.
        held: The ids that it has a reference to.
        templates: What it has defined, by slot.
        at_once: Whether the last answer must be written before the next command is executed.
    """

    def __init__(self, worker: Worker, link: Link) -> None:
        self.worker = worker
        self.name = ""
        self.url = ""
        self.holder = 0
        self.incarnation = b""
        self.held: set[int] = set()
        self.templates: dict[int, Template] = {}
        self.at_once = False
        self._link = link
        self._greeted = False
        self.channel = Channel("a client", partial(worker.execute, self), self._after)

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the greeting, then packets."""
        if self._greeted:
            self.channel.received(frames)
            return
        self._link.write([json.dumps(self._greet(frames)).encode()])

    def _greet(self, frames: Sequence[Frame]) -> dict[str, Any]:
        try:
            hello = json.loads(bytes(frames[0])[: DEFAULT_LIMITS.header_bytes])
            if hello["farpoint"] != 1:
                return {"refused": f"{self.worker.id} speaks protocol 1, not {hello['farpoint']!r}"}
            known = plugins.serializer_names()
            shared = [name for name in hello["serializers"] if name in known]
            if not shared:
                return {"refused": f"none of the serializers {hello['serializers']} is known here; known: {known}"}
            self.name, self.url = str(hello["client"])[:64], str(hello["url"])[:1024]
            self.holder = int(hello["session"])
            self.incarnation = bytes.fromhex(hello["incarnation"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return {"refused": f"this is not the greeting of a farpoint client: {error!r}"}
        serializer = plugins.serializer(shared[0], DEFAULT_LIMITS)
        self.channel.name = self.name
        self.channel.open(self._link, Session(self.worker.incarnation, self.incarnation), serializer)
        self.held = self.worker.holders.held(self.holder)
        self.worker.guests[self.holder] = self
        self._greeted = True
        return {
            "worker": self.worker.id,
            "incarnation": self.worker.incarnation.hex(),
            "serializer": shared[0],
        }

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone: without leases yet, its references are given up at once."""
        if self._greeted:
            self.worker.guest_lost(self)

    def answer(self, number: int, value: Any) -> None:
        """Answer a command."""
        self._say([int(Kind.ANSWER), number, value])

    def fail(self, number: int, failure: dict[str, Any]) -> None:
        """Report that a command failed."""
        self._say([int(Kind.FAILURE), number, failure])

    def _say(self, message: list[Any]) -> None:
        with self.channel.lock:
            if self.channel.lost is None:
                self.channel.submit(message)
                self.worker.dirty.add(self)

    def flush(self) -> None:
        """Send what is waiting."""
        self.channel.flush()

    def close(self) -> None:
        """End the link."""
        self._link.close()

    def _after(self) -> None:
        self.worker.dirty.add(self)
        self.worker.settle()
