"""Capabilities: what a worker lets others hand on, as a chain of caveats that anybody may lengthen and nobody shorten.

A capability is text::

    fp1.<name of the worker>.<caveat>.<caveat>…<signature>

The first signature is an HMAC of the worker's name under its root secret; each caveat replaces it by its own HMAC under the
signature before. So whoever holds a capability can append a caveat, which only narrows it, and cannot take one away.
(A. Birgisson et al., "Macaroons", NDSS 2014.)
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from farpoint.errors import CapabilityError

CAVEATS = ("audience", "expiry", "nonce", "object", "operation", "session")
"""What a caveat may be about. One of any other kind refuses: who appended it meant to forbid something."""

PREFIX = "fp1."
LONGEST = 2048
"""Characters of a capability at most."""

HOLD_SECONDS, MOVE_SECONDS = 60, 3600
"""How long a capability that is handed on is good for: to hold an object, and to move one, which has to arrive first."""


def mint(secret: bytes, worker: str, **caveats: str | int) -> str:
    """Return a capability of a worker.

    Args:
        secret: The worker's root secret: at least 128 random bits.
        worker: Its name.
        caveats: What it is good for, by kind; `expiry` in seconds of the worker's clock.
    """
    return narrow(f"{PREFIX}{_pack(worker.encode())}.{_pack(_sign(secret, worker.encode()))}", **caveats)


def narrow(capability: str, **caveats: str | int) -> str:
    """Return a capability that is good for less; of none, none.

    Raises:
        CapabilityError: This is no capability.
    """
    if not capability:
        return ""
    *parts, signature = _split(capability)
    key = _unpack(signature)
    for kind, value in sorted(caveats.items()):
        caveat = f"{kind}={value}".encode()
        parts.append(_pack(caveat))
        key = _sign(key, caveat)
    return ".".join((*parts, _pack(key)))


def read(secret: bytes, worker: str, capability: str, now: float) -> dict[str, str]:
    """Return the caveats of a capability, by kind, after checking that it is genuine and not late.

    Args:
        secret: The worker's root secret.
        worker: Its name.
        capability: What somebody has shown.
        now: The worker's clock, in seconds.

    Raises:
        CapabilityError: It is forged, late, of another worker, or has caveats that cannot hold together.
    """
    _, name, *packed, signature = _split(capability)
    if not hmac.compare_digest(_unpack(name), worker.encode()):
        raise CapabilityError(worker, "it is of another worker")
    key = _sign(secret, worker.encode())
    caveats = [_unpack(caveat) for caveat in packed]
    for caveat in caveats:
        key = _sign(key, caveat)
    if not hmac.compare_digest(key, _unpack(signature)):
        raise CapabilityError(worker, "its signature is wrong")
    found: dict[str, str] = {}
    for caveat in caveats:
        kind, _, value = caveat.decode(errors="replace").partition("=")
        if kind not in CAVEATS:
            raise CapabilityError(worker, f"it has a caveat that is unknown here: {kind[:40]!r}")
        if kind == "expiry":
            if not value.isdecimal() or len(value) > 20 or now > int(value):
                raise CapabilityError(worker, "it has expired")
        elif found.get(kind, value) != value:
            raise CapabilityError(worker, f"it is for {kind} {found[kind][:64]!r} and {value[:64]!r} at once")
        elif kind == "session" and not (value.isdecimal() and len(value) <= 20):
            raise CapabilityError(worker, f"its session {value[:64]!r} is no number")
        found[kind] = value
    return found


def check(secret: bytes, worker: str, capability: str, now: float, **use: str | int) -> dict[str, str]:
    """Check that a capability is good for a use, and return its caveats.

    Args:
        secret: The worker's root secret.
        worker: Its name.
        capability: What somebody has shown.
        now: The worker's clock, in seconds.
        use: What it is to be used for: a value for each kind of caveat that applies. It must be for just this.

    Raises:
        CapabilityError: It is none, or good for something else.
    """
    found = read(secret, worker, capability, now)
    for kind, value in use.items():
        if found.get(kind) != str(value):
            raise CapabilityError(worker, f"it is for {kind} {found.get(kind, 'any')[:64]!r}, not for {str(value)[:64]!r}")
    return found


def _sign(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, hashlib.sha256)


def _pack(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unpack(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _split(capability: str) -> list[str]:
    parts = capability.split(".") if len(capability) <= LONGEST and capability.isascii() else []
    try:
        if len(parts) < 3 or f"{parts[0]}." != PREFIX:
            raise ValueError(parts)
        for part in parts[1:]:
            _unpack(part)
    except ValueError as error:
        raise CapabilityError("a worker", "it is no capability at all") from error
    return parts
