"""How a session gets a link: the greeting, the welcome, and both once more after a link was lost."""

from __future__ import annotations

import copy
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from farpoint.capability import PREFIX
from farpoint.channel import Lane, bare
from farpoint.errors import (
    FarpointError,
    MalformedMessageError,
    NobodyListensError,
    NotAdmittedError,
    ProtocolError,
    RefusedError,
    SynchronizationTimeoutError,
    TransportError,
    WorkerLostError,
    WorkerRestartedError,
)
from farpoint.plugins import plugins
from farpoint.protocol.shapes import WELCOME
from farpoint.serializer import Frame
from farpoint.transport import Link

if TYPE_CHECKING:
    from farpoint.peer import Peer

WELCOME_BYTES = 64 * 1024
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two attempts to come back: they double, and chance shortens each, so that not all clients come at once."""


class Approach:
    """One link to a worker: it greets, takes the welcome, and then brings packets.

    Args:
        peer: Whose session.
        resumes: Whether the session has had a link before.
    """

    def __init__(self, peer: Peer, *, resumes: bool = False) -> None:
        self._peer = peer
        self._resumes = resumes
        self._link: Link | None = None
        self._lane: Lane | None = None
        self._answered = threading.Event()
        self._over = False
        self.refusal: FarpointError | None = None

    def dial(self) -> None:
        """Make the link, and greet.

        Raises:
            FarpointError: There is nobody, or it does not let us in.
        """
        peer, owner = self._peer, self._peer.owner
        transport = plugins.transport(peer.url)
        hello: dict[str, Any] = {
            "farpoint": 1,
            "client": owner.id,
            "url": owner.url,
            "session": peer.session_id,
            "secret": peer.secret,
            "incarnation": owner.incarnation.hex(),
            "serializers": peer.offered,
        }
        credentials = peer.credentials
        if self._resumes:
            hello["taken"] = peer.channel.session.taken
            if credentials.token.startswith(PREFIX):  # what we came in with was good for the first time only
                credentials = attrs.evolve(credentials, token=owner.credentials.token or peer.terms.capability)
        elif owner.url and not transport.inline:
            hello["introduction"] = owner.doorman.introduce(peer)
        self._link = transport.connect(peer.url, self, credentials)
        if peer.over:
            self._link.close()
        self._link.write([json.dumps(hello).encode()])

    def wait(self, seconds: float) -> None:
        """Wait for the welcome.

        Raises:
            SynchronizationTimeoutError: It does not come.
            FarpointError: It is a refusal, or there is no link any more.
        """
        if not self._answered.wait(seconds):
            raise SynchronizationTimeoutError(self._peer.name or self._peer.url, seconds, "it accepts a link, and does not greet")
        if self.refusal is not None:
            raise copy.copy(self.refusal)

    def close(self) -> None:
        """End the link."""
        if self._link is not None:
            self._link.close()

    def received(self, frames: Sequence[Frame]) -> None:
        """Take a message from the link: the welcome, then packets."""
        if self._lane is not None:
            self._peer.channel.received(self._lane, frames)
        elif self.refusal is None:
            try:
                with self._peer.channel.delivering():
                    self._take(bytes(frames[0][:WELCOME_BYTES]) if frames else b"")
            except (ValueError, RecursionError, FarpointError) as error:
                if isinstance(error, ProtocolError | WorkerLostError) and not isinstance(error, MalformedMessageError):
                    self.refusal = error.with_traceback(None)
                else:
                    name = self._peer.name or self._peer.url
                    self.refusal = ProtocolError(f"{name} does not greet like a worker: {str(error)[:500]}")
                self._peer.refused(self, self.refusal)
                self.close()
            self._answered.set()
            self._peer.owner.settle()

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone."""
        if not self._answered.is_set():
            self.refusal = TransportError(self._peer.url, "the link was closed before the worker greeted us")
            self._answered.set()
        self._peer.parted(self, self._lane, bare(cause))

    def _take(self, text: bytes) -> None:
        peer = self._peer
        welcome = json.loads(text)
        if isinstance(welcome, dict) and isinstance(welcome.get("refused"), str):
            raise RefusedError(peer.name or peer.url, welcome["refused"][:500])
        WELCOME.check_map(welcome)
        name, serializer, incarnation = welcome["worker"], welcome["serializer"], bytes.fromhex(welcome["incarnation"])
        if peer.name and name != peer.name:
            raise MalformedMessageError("the welcome", "worker", f"{peer.name!r}, who was called", repr(name))
        if serializer not in peer.offered:
            raise MalformedMessageError("the welcome", "serializer", f"one of {peer.offered}", repr(serializer))
        if self._link is None:
            raise MalformedMessageError("the welcome", "it", "the answer to a greeting", "one before it")
        lane = Lane(self._link, held=True)
        if not self._resumes:
            peer.begin(lane, welcome)
        elif incarnation != peer.incarnation:
            raise WorkerRestartedError(name, "it has begun a new life, without our objects")
        elif type(welcome.get("taken")) is not int:
            raise WorkerLostError(name, "it has given our session up: we were away for longer than it waits")
        else:
            peer.channel.resume(lane, welcome["taken"])
        self._lane = lane
        peer.channel.release(lane)
        peer.soon()
        if peer.over:
            self._link.close()


def come_back(peer: Peer, cause: Exception) -> None:
    """Bring a session back over a new link, or end it.

    Args:
        peer: Whose session.
        cause: Why it lost its link.
    """
    began = time.monotonic()
    pause = FIRST_PAUSE
    reason: Exception = cause
    while not peer.over:
        approach = Approach(peer, resumes=True)
        try:
            approach.dial()
            approach.wait(peer.limits.open_seconds)
        except WorkerLostError as error:
            reason = error
            break
        except FarpointError as error:
            approach.close()
            reason = error
        else:
            return
        patience = peer.limits.kept_seconds
        if isinstance(reason, NobodyListensError):
            patience = min(patience, peer.limits.reconnect_seconds)
        elif isinstance(reason, NotAdmittedError) and peer.invited:
            reason = WorkerLostError(peer.name, "it does not know our session any more")
            break
        elif isinstance(reason, ProtocolError):
            break
        if time.monotonic() - began > patience:
            break
        peer.absence = str(reason)
        peer.closing.wait(random.uniform(pause / 2, pause))  # noqa: S311  # to spread attempts out, not to keep a secret
        pause = min(2 * pause, LONGEST_PAUSE)
    peer.end(bare(reason) or cause)
