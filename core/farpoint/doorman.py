"""Whom a worker lets in with a capability, and what that is good for inside."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs

from farpoint.access import EVERYBODY, Admission
from farpoint.capability import HOLD_SECONDS, PREFIX, check, mint, read
from farpoint.errors import CapabilityError, PermissionDeniedError
from farpoint.protocol.messages import Kind

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.peer import Peer
    from farpoint.worker import Worker

FOR_CLIENTS = (Kind.PUT, Kind.LINK, Kind.SEARCH, Kind.LIST, Kind.CLEAR, Kind.SEED, Kind.PLAN, Kind.RUNPLAN)
"""What only somebody with a token of their own may ask."""

_REMEMBERED = 4096


class Doorman:
    """Makes the capabilities of one worker, and checks those that are shown to it.

    Args:
        worker: Whose.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._secret = secrets.token_bytes(32)
        self._admission = EVERYBODY
        self.counting = threading.Lock()
        """Held from `is_full` until the session is among the worker's."""
        self._used: dict[str, float] = {}

    def admission(self, admission: Admission) -> Admission:
        """Return an admission that lets those in as well who show a capability of this worker."""
        self._admission = admission
        return attrs.evolve(admission, verify=self._opens)

    def welcome(self, guest: Guest) -> dict[str, Any]:
        """Return what a new client is told: what it may hand on, and what our clock says."""
        return {"capability": mint(self._secret, self._worker.id, session=guest.holder), "clock": time.time()}

    def introduce(self, peer: Peer) -> str:
        """Return what a worker that we dial may dial us with, while that session lives."""
        return mint(self._secret, self._worker.id, session=peer.session_id, operation="dial")

    def invite(self, peer: Peer) -> str:
        """Return what a worker may dial us with soon."""
        if peer.channel.inline:
            return ""
        soon = int(time.time()) + HOLD_SECONDS
        return mint(self._secret, self._worker.id, audience=peer.incarnation.hex(), operation="dial", expiry=soon)

    def introduced(self, token: str, incarnation: str) -> bool:
        """Return whether somebody came in with a capability, and not with a token.

        Raises:
            CapabilityError: It was made for somebody else.
        """
        if not token.startswith(PREFIX) or not self._admission.tokens:
            return False
        audience = self._read(token).get("audience", incarnation)
        if audience != incarnation:
            raise CapabilityError(self._worker.id, "it was made for somebody else")
        return True

    def principal(self, token: str, identity: str) -> str:
        """Return whom somebody who was let in counts as: see `Admission.principal`."""
        return self._admission.principal(token, identity)

    def is_full(self, principal: str) -> bool:
        """Return whether a principal has as many sessions as it may, those included whose link is lost."""
        # A copy: a session may end meanwhile.
        present = [guest.principal for guest in list(self._worker.guests.values())]
        return bool(principal) and present.count(principal) >= self._worker.limits.sessions_per_principal

    def check_kind(self, kind: int) -> None:
        """Refuse what only somebody with a token may ask.

        Raises:
            PermissionDeniedError: It is that.
        """
        if kind in FOR_CLIENTS:
            reason = "whoever was introduced by another client may only use what it was handed"
            raise PermissionDeniedError(self._worker.id, Kind(kind).name.lower(), reason)

    def check_hold(self, guest: Guest, object_id: int, capability: str) -> None:
        """Check that somebody who was introduced may become a holder of an object. A capability is good for this once.

        Raises:
            CapabilityError: It may not.
        """
        found = self._check(guest, object_id, "hold", capability)
        if object_id not in self._worker.holders.held(int(found["session"])):
            raise CapabilityError(self._worker.id, "whoever gave it does not hold the object")
        now = time.time()
        if len(self._used) >= _REMEMBERED:
            self._used = {used: until for used, until in self._used.items() if until >= now}
        if capability in self._used or len(self._used) >= _REMEMBERED:
            raise CapabilityError(self._worker.id, "it was used already")
        self._used[capability] = float(found["expiry"])

    def check_move(self, guest: Guest, new_id: int, holder: int, capability: str) -> None:
        """Check that somebody who was introduced may bring an object for a client. Its id can be taken only once.

        Raises:
            CapabilityError: It may not.
        """
        if self._check(guest, new_id, "move", capability)["session"] != str(holder):
            raise CapabilityError(self._worker.id, "it is of another session")

    def _check(self, guest: Guest, object_id: int, operation: str, capability: str) -> dict[str, str]:
        use: dict[str, str | int] = {"object": object_id, "operation": operation, "audience": guest.incarnation.hex()}
        found = check(self._secret, self._worker.id, capability, time.time(), **use)
        if "session" not in found or "expiry" not in found:
            raise CapabilityError(self._worker.id, "it does not say whose it is, or for how long it is good")
        return found

    def _read(self, token: str) -> dict[str, str]:
        return read(self._secret, self._worker.id, token, time.time())

    def _opens(self, token: str) -> bool:
        if not token.startswith(PREFIX):
            return False
        try:
            found = self._read(token)
        except CapabilityError:
            return False
        session = found.get("session")
        if session is None:
            return "expiry" in found
        return int(session) in self._worker.guests or any(
            peer.session_id == int(session) for peer in list(self._worker.peers.values()) if not peer.over
        )
