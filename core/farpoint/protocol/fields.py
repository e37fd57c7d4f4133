"""The messages of a move as a TRANSFER carries them: a name and a list of fields."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import attrs

from farpoint.errors import MalformedMessageError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.protocol import transfer
from farpoint.protocol.shapes import brief

_MESSAGES: dict[str, type[transfer.TransferMessage]] = {
    kind.__name__: kind
    for kind in (
        *(transfer.Push, transfer.Probe, transfer.Commit, transfer.Abort, transfer.Released, transfer.Prepared),
        *(transfer.Refused, transfer.Missing, transfer.Activated, transfer.Aborted, transfer.Inquire),
    )
}
_HEX = re.compile(r"[0-9a-f]{1,32}")
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer of up to 128 bits", lambda v: type(v) is int and 0 <= v < 2**128),
    "bool": ("true or false", lambda v: type(v) is bool),
    "str": ("a short text", lambda v: type(v) is str and len(v) <= 2 * DEFAULT_LIMITS.error_chars),
    "str | None": ("a short text, or nothing", lambda v: v is None or type(v) is str and len(v) <= 128),
    "Any": ("nothing: the payload comes beside the fields", lambda v: v is None),
}


def fields_of(message: transfer.TransferMessage) -> list[Any]:
    """Return the fields of a message. The payload of a Push travels beside them."""
    values = [None if f.name == "payload" else getattr(message, f.name) for f in attrs.fields(type(message))]
    # Incarnations have 128 bits, more than an integer of the wire.
    return [["x", f"{v:x}"] if type(v) is int and v >= 2**63 else v for v in values]


def message_of(name: str, fields: list[Any]) -> transfer.TransferMessage:
    """Return the message of a state machine that a TRANSFER carries.

    Raises:
        MalformedMessageError: It is none.
    """
    kind = _MESSAGES.get(name)
    if kind is None:
        raise MalformedMessageError("TRANSFER", "name", f"one of {', '.join(_MESSAGES)}", brief(name))
    wanted = attrs.fields(kind)
    if len(fields) != len(wanted):
        raise MalformedMessageError(f"TRANSFER {name}", "the number of its fields", str(len(wanted)), str(len(fields)))
    values = []
    for field, value in zip(wanted, fields, strict=True):
        if type(value) is list and len(value) == 2 and value[0] == "x" and type(value[1]) is str and _HEX.fullmatch(value[1]):
            value = int(value[1], 16)
        wants, holds = _TYPES[str(field.type)]
        if not holds(value):
            raise MalformedMessageError(f"TRANSFER {name}", field.name, wants, brief(value))
        values.append(value)
    return kind(*values)
