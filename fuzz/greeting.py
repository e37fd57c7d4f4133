"""Fuzz the greeting that a worker reads and the welcome that a client reads: the first message of each, in JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from farpoint.access import Admission
from farpoint.approach import Approach
from farpoint.capability import mint
from farpoint.channel import Lane
from farpoint.errors import CapabilityError
from farpoint.guest import Doorstep
from farpoint.peer import Peer
from farpoint.plugins import plugins
from farpoint.serializer import Frame
from farpoint.transport import Link
from farpoint.worker import Worker
from fuzz.target import Target

_SESSION, _SECRET, _LIFE = 7, "s" * 32, "0123456789abcdef" * 2
_HELLO = {"farpoint": 1, "client": "me", "url": "", "session": _SESSION, "secret": _SECRET, "incarnation": _LIFE, "serializers": ["msgpack"]}
_WORDS = (b"null", b"[]", b"{}", b"true", b"1e999", b"NaN", b'"\\ud800"', b"9" * 400, b"-1", b'"taken": 0', b'"taken": []', b"[" * 2000)


class _Ear(Link):
    """The other end of a link: it keeps the last message."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.heard_last: list[bytes] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.heard_last = [bytes(frame) for frame in frames]

    def close(self) -> None:
        pass


def _worker() -> Worker:
    worker = Worker("bob", "", ["msgpack"])
    worker.doorman.admission(Admission(tokens=("t" * 32,)))
    return worker


_bob = _worker()
_me = Worker("me", "", ["msgpack"])
_token = mint(_bob.doorman._secret, "bob", operation="dial", expiry=2**40)


def _run_hello(data: bytes) -> bool:
    """Greet a worker on which the session of an honest client waits to be resumed."""
    if _SESSION not in _bob.guests:
        # Held back, so that no thread is made to write to it.
        Doorstep(_bob, _Ear(""), inline=True).received([json.dumps(_HELLO).encode()])
        _bob.guests[_SESSION].channel.inline = False
    ear = _Ear(_token if data[:1] == b"C" else "")
    step = Doorstep(_bob, ear, inline=True)
    step.received([data[1:]])
    answer = json.loads(ear.heard_last[0])
    step.lost(None)
    assert len(_bob.guests) <= 1
    return "refused" not in answer


def _run_welcome(data: bytes) -> bool:
    """Welcome a client that dials for the first time, or comes back."""
    peer = Peer(_me, "bob", "virtual://bob", ["msgpack"])
    resumes = data[:1] == b"R"
    if resumes:
        peer.incarnation = bytes.fromhex(_LIFE)
        peer.channel.open(Lane(_Ear("")), peer.channel.session, plugins.serializer("msgpack", _me.limits), _me.limits, inline=True)
    approach = Approach(peer, resumes=resumes)
    approach._link = _Ear("")
    approach.received([data[1:]])
    assert approach._answered.is_set()
    with contextlib.suppress(KeyError):
        del _me.peers["bob"]
    if approach.refusal is None:
        with contextlib.suppress(CapabilityError):
            peer.terms.give(object=5, operation="hold", audience=_LIFE)
    return approach.refusal is None


def _hellos() -> list[bytes]:
    greetings: list[dict[str, Any]] = [
        {**_HELLO, "session": 8, "introduction": _token},
        {**_HELLO, "session": 8, "serializers": ["later", "torch"], "url": "tcp://127.0.0.1:7001"},
        {**_HELLO, "taken": 0},
    ]
    return [first + json.dumps(greeting).encode() for greeting in greetings for first in (b"-", b"C")]


def _welcomes() -> list[bytes]:
    welcome = {"worker": "bob", "incarnation": _LIFE, "serializer": "msgpack"}
    more = {
        "url": "tcp://127.0.0.1:7001", "limits": {"commands_in_flight": 64, "templates": 8, "lease_seconds": 1.5},
        "capability": _token, "clock": 1.7e9, "farpoint": "0.1.0", "torch": "2.13.0",
    }  # fmt: skip
    return [b"-" + json.dumps({**welcome, **more}).encode(), b"-" + json.dumps(welcome).encode(), b"R" + json.dumps({**welcome, "taken": 0}).encode()]


HELLO = Target("hello", _run_hello, _hellos, _WORDS)
WELCOME = Target("welcome", _run_welcome, _welcomes, _WORDS)
