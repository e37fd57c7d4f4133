"""Fuzz the reader of capabilities: text that is forged, and caveats that whoever holds a capability has appended."""

from __future__ import annotations

from farpoint.access import Admission
from farpoint.capability import LONGEST, PREFIX, _pack, _sign, check, mint, narrow, read
from farpoint.errors import CapabilityError
from farpoint.worker import Worker
from fuzz.target import Target

_SECRET, _NOW = b"s" * 32, 1.7e9
_bob = Worker("bob", "", ["msgpack"])
_bob.doorman._secret = _SECRET
_bob.doorman.admission(Admission(tokens=("t" * 32,)))


def _run(data: bytes) -> bool:
    text = _signed(data[1:LONGEST].split(b"\0")) if data[:1] == b"S" else data[1:].decode("latin-1")
    try:
        found = read(_SECRET, "bob", text, _NOW)
        assert _bob.doorman._opens(text) in {True, False}
        check(_SECRET, "bob", text, _NOW, **found)
        narrow(text, object=5)
    except CapabilityError:
        assert not _bob.doorman._opens(text)
        return False
    return True


def _signed(caveats: list[bytes]) -> str:
    """Return a capability with these caveats, whatever is in them."""
    key = _sign(_SECRET, b"bob")
    for caveat in caveats:
        key = _sign(key, caveat)
    return PREFIX + ".".join(map(_pack, (b"bob", *caveats, key)))


def _seeds() -> list[bytes]:
    session = mint(_SECRET, "bob", session=7)
    texts = [session, narrow(session, object=6, operation="move", audience="f" * 32, expiry=2**40)]
    caveats = [[b"session=7"], [b"audience=ff", b"expiry=1099511627776", b"operation=dial"], [b"session=7", b"nonce=1", b"object=6"]]
    return [*(b"T" + text.encode() for text in texts), *(b"S" + b"\0".join(each) for each in caveats)]


TARGET = Target("capability", _run, _seeds, (b"\0session=", b"\0expiry=", b"\0operation=dial", b"\xd9\xa3", b"9" * 30, b"fp1.", b"="))
