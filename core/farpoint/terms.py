"""What a worker tells in its welcome: limits that hold in the session, and what we may do there."""

from __future__ import annotations

import secrets
import time
from typing import Any

import attrs

from farpoint.about import read_versions
from farpoint.capability import HOLD_SECONDS, MOVE_SECONDS, narrow
from farpoint.limits import Limits

_AGREED: tuple[tuple[str, tuple[type, ...], int], ...] = (
    ("commands_in_flight", (int,), 2),
    ("templates", (int,), 2),
    ("transfers", (int,), 1),
    ("plans", (int,), 0),
    ("plan_commands", (int,), 0),
    ("kept_seconds", (int, float), 2),
)
"""Limits of which the lower one holds, if it is at least so much."""


@attrs.frozen
class Terms:
    """What is agreed with a worker.

    Attributes:
        limits: What must not be exceeded there.
        advertised: Where it wants to be dialled by others.
        capability: What we may do there, to be narrowed for others; empty if it asks for none.
        ahead: Seconds that its clock is ahead of ours.
        versions: Of `farpoint` and `torch` there, as far as it tells.
    """

    limits: Limits
    advertised: str
    capability: str = attrs.field(default="", repr=False)
    ahead: float = 0.0
    versions: dict[str, str] = attrs.field(factory=dict)

    def give(self, **caveats: str | int) -> str:
        """Return a capability for somebody else who is to act there for us, empty if the worker asks for none.

        Args:
            caveats: What it is good for: see `farpoint.capability`.
        """
        if not self.capability:
            return ""
        seconds = MOVE_SECONDS if caveats.get("operation") == "move" else HOLD_SECONDS
        # The nonce tells two capabilities for the same apart, for each can be used once.
        expiry = int(time.time() + self.ahead) + seconds
        return narrow(self.capability, expiry=expiry, nonce=secrets.token_hex(8), **caveats)


def read_terms(welcome: dict[str, Any], url: str, limits: Limits) -> Terms:
    """Return the terms in a welcome; what is not as it should be in it counts as not said.

    Args:
        welcome: It.
        url: Where the worker was dialled.
        limits: Those of this side.
    """
    theirs = welcome.get("limits")
    for limit, kinds, least in _AGREED:
        allowed: Any = theirs.get(limit) if isinstance(theirs, dict) else None
        if type(allowed) in kinds and least <= allowed < getattr(limits, limit):
            limits = attrs.evolve(limits, **{limit: allowed})
    if not isinstance(theirs, dict) or "plans" not in theirs:
        limits = attrs.evolve(limits, plans=0)  # it is from before there were plans
    terms = Terms(limits, url, versions=read_versions(welcome))
    advertised: Any = welcome.get("url")
    if type(advertised) is str and 0 < len(advertised) <= limits.url_chars:
        terms = attrs.evolve(terms, advertised=advertised)
    capability: Any = welcome.get("capability")
    clock: Any = welcome.get("clock")
    if type(capability) is str and capability.isascii() and type(clock) in (int, float) and abs(clock) < 2**53:
        ahead = float(clock) - time.time()
        terms = attrs.evolve(terms, capability=capability[: limits.capability_chars], ahead=ahead)
    return terms
