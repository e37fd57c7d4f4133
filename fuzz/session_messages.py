"""Fuzz what looks at messages once they are decoded: the session, the shapes of messages, templates, failures, listings."""

from __future__ import annotations

from typing import Any

from farpoint.errors import DecodeError, InvalidNameError, OperationNotAllowedError, ProtocolError
from farpoint.failures import read_failure, revive_failure
from farpoint.listing import _read_entry
from farpoint.names import check_note, check_query
from farpoint.protocol.fields import message_of
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.protocol.shapes import (
    COMMANDS,
    FAILURE,
    PAYLOAD,
    check_answer,
    check_command,
    check_run,
    kind_of,
)
from farpoint.spec import spec_from_wire
from farpoint.template import Template
from farpoint_msgpack.serializer import MsgpackSerializer
from fuzz import messages
from fuzz.target import LIMITS, Target, join, split

_LOCAL = b"l" * 16
_ASKED: list[list[Any]] = [
    [int(Kind.RUN), 0, [], []],
    *([int(kind)] for kind in messages.ANSWERS if kind != Kind.ASK),
    [int(Kind.DESCRIBE), [6]],
    [int(Kind.ASK), 1, [3], [5]],
]
_DOCUMENTED = (DecodeError, ProtocolError, OperationNotAllowedError, InvalidNameError)
_serializer = MsgpackSerializer(LIMITS)


def _run(data: bytes) -> bool:
    session = Session(_LOCAL, b"r" * 16, LIMITS)
    for _ in range(8):
        session.submit([int(Kind.CLEAR)])
    session.pack()
    try:
        numbered = session.receive(_serializer.decode(split(data)))
    except (DecodeError, ProtocolError):
        return False
    assert session.taken == len(numbered)
    outcomes = [_take(message) for _, message in numbered]  # each, whatever became of those before
    return all(outcomes)


def _take(message: Any) -> bool:
    try:
        kind = kind_of(message)
        if kind == Kind.ANSWER and len(message) == 3:
            return _take_answer(message[2])
        if kind == Kind.FAILURE and len(message) == 3:
            _take_failure(message[2])
        elif kind == Kind.RUN:
            check_run(message, LIMITS)
        elif kind in COMMANDS:
            check_command(kind, message, LIMITS)
            _carry_out(kind, message)
        else:
            return False
    except _DOCUMENTED:
        return False
    return True


def _carry_out(kind: int, message: list[Any]) -> None:
    if kind == Kind.DEFINE:
        Template.from_wire(*message[2:])
    elif kind == Kind.PUT:
        check_note(message[4], message[5], message[3])
    elif kind == Kind.LINK:
        spec_from_wire(message[5], interned=False)
        check_note(message[6], message[7])
    elif kind == Kind.SEARCH:
        check_query(message[1])
    elif kind == Kind.TRANSFER:
        message_of(message[1], message[2])
        if message[3] is not None:
            PAYLOAD.check([0, *message[3]], LIMITS)


def _take_answer(content: Any) -> bool:
    taken = False
    for asked in _ASKED:
        try:
            check_answer(asked, content, LIMITS)
            if asked[0] == Kind.LIST:
                for entry in content:
                    _read_entry(entry, "bob")
            taken = True
        except _DOCUMENTED:
            pass
    return taken


def _take_failure(content: Any) -> None:
    read = read_failure(content, "bob")  # believes nothing, so it takes everything
    str(revive_failure(read, "a.py:3"))
    FAILURE.check_map(content)


def _seeds() -> list[bytes]:
    return [join(_serializer.encode(packet)) for packet in messages.packets(_LOCAL)]


TARGET = Target("messages", _run, _seeds, (b"\x81\xa2$t\x92\xa7float32\x90", b"\xa1t", b"\xa1l", b"\xa1c", b"\xa5dtype", b"\x91\x01", *(bytes([0x9C, k]) for k in Kind)))
