"""What each message must look like: names, types and ranges of its fields, checked before anything is done with it.

`COMMANDS` is what a worker takes, `ANSWERS` what a client takes, by the kind of the command that it had sent. What is of the wrong
type or out of range is a `MalformedMessageError`; what is merely longer than this party allows is a `LimitError`.

RUN is most of what travels, so `check_run` says in one pass what the table says field by field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import torch

from farpoint.errors import LimitError, MalformedMessageError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.protocol.messages import Kind
from farpoint.tensors import DTYPES

MAX_ID: Final = 2**63
_MAX_SIZE: Final = 2**40
_MAX_BYTES: Final = 2**62
_MOST_READ: Final = 2**20
_NAME: Final = re.compile(r"[A-Za-z0-9_.:#-]+")
_INCARNATION: Final = re.compile(r"[0-9a-f]{32}")


def brief(value: object) -> str:
    """Return what a value is, in few words, however large it is."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"[:80]
    if isinstance(value, list | tuple | dict):
        return f"a {kind} of {len(value)}"
    if isinstance(value, str | bytes):
        return f"{value[:40]!r}" if len(value) <= 40 else f"a {kind} of {len(value)} that begins with {value[:24]!r}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge int"  # its decimal form takes quadratic time, and beyond 4300 digits raises
    return f"{value!r}"[:80]


@attrs.frozen
class Field:
    """What one field of a message may be.

    Attributes:
        wants: The same in words.
        holds: Tells whether a value is of that kind.
        limit: Which limit bounds its length, if any does. It is looked at before the items are.
        items: What its items are, if it is a list.
    """

    wants: str
    holds: Callable[[Any], bool]
    limit: str = ""
    items: Field | None = None

    def check(self, kind: str, name: str, value: Any, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check one value.

        Raises:
            MalformedMessageError: It is none.
            LimitError: It is one, and too long.
        """
        if not self.holds(value):
            raise MalformedMessageError(kind, name, self.wants, brief(value))
        if value is None:
            return
        if self.limit and len(value) > getattr(limits, self.limit):
            raise LimitError(self.limit, getattr(limits, self.limit), f"{kind}: {name} of length {len(value)}")
        if self.items is not None:
            for position, item in enumerate(value):
                self.items.check(kind, f"{name}[{position}]", item, limits)


class Shape:
    """The fields of a message, in order.

    Args:
        name: What the message is called in errors.
        fields: What each of them may be.
    """

    def __init__(self, name: str, /, **fields: Field) -> None:
        self.name = name
        self.fields = fields

    def check(self, message: list[Any], limits: Limits = DEFAULT_LIMITS) -> None:
        """Check a message: its first item, which has named this shape, and then one for each field.

        Raises:
            MalformedMessageError: It is none.
            LimitError: A field of it is too long.
        """
        if len(message) != len(self.fields) + 1:
            wanted = f"{len(self.fields)} ({', '.join(self.fields) or 'none'})"
            raise MalformedMessageError(self.name, "the number of its fields", wanted, str(len(message) - 1))
        for (name, field), value in zip(self.fields.items(), message[1:], strict=True):
            field.check(self.name, name, value, limits)

    def check_map(self, message: Any, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check a message that is a map. It may hold more than the fields: a newer peer says more.

        Raises:
            MalformedMessageError: It is none.
            LimitError: A field of it is too long.
        """
        if type(message) is not dict:
            raise MalformedMessageError(self.name, "the message", "a map", brief(message))
        for name, field in self.fields.items():
            if name not in message:
                raise MalformedMessageError(self.name, name, field.wants, "nothing")
            field.check(self.name, name, message[name], limits)


def integer(least: int, most: int, wants: str = "") -> Field:
    """Return the field of an integer of a range."""
    return Field(wants or f"an integer from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def text(limit: str) -> Field:
    """Return the field of a text whose length is limited."""
    return Field("a text", lambda v: type(v) is str, limit)


def listed(items: Field, limit: str) -> Field:
    """Return the field of a list whose length is limited."""
    return Field(f"a list, each item {items.wants}", lambda v: type(v) is list, limit, items)


def optional(field: Field) -> Field:
    """Return the field that may be nothing as well."""
    return attrs.evolve(field, wants=f"{field.wants}, or nothing", holds=lambda v: v is None or field.holds(v))


def is_number(value: object) -> bool:
    """Return whether this is a number as RUN carries it: a complex one as the list of its two parts."""
    if type(value) is list:
        return len(value) == 2 and type(value[0]) is float and type(value[1]) is float
    return type(value) in (bool, int, float)


def is_spec(value: object) -> bool:
    """Return whether this is `[shape, stride, offset, dtype, conj, neg]` of a tensor that torch can describe."""
    if type(value) is not list or len(value) != 6:
        return False
    shape, stride, offset, dtype, conj, neg = value
    if type(shape) is not list or type(stride) is not list or type(dtype) is not str or dtype not in DTYPES:
        return False
    if type(conj) is not bool or type(neg) is not bool or (conj and not DTYPES[dtype].is_complex):
        return False
    if len(shape) != len(stride) or len(shape) > DEFAULT_LIMITS.tensor_dims:
        return False
    if any(type(n) is not int or not 0 <= n <= _MAX_SIZE for n in (*shape, *stride, offset)):
        return False
    numel = 1
    for n in shape:
        numel *= n or 1
    span: int = offset + sum((n or 1) * s for n, s in zip(shape, stride, strict=True))
    return max(numel, span) * DTYPES[dtype].itemsize <= _MAX_BYTES


FLAG: Final = Field("true or false", lambda v: type(v) is bool)
TENSOR: Final = Field("a tensor", lambda v: isinstance(v, torch.Tensor))
ID: Final = integer(1, MAX_ID - 1, "an id, an integer from 1 to 2**63 - 1")
NAME: Final = Field(
    "a name of 1 or more of the characters A-Z a-z 0-9 _ . : # -",
    lambda v: type(v) is str and _NAME.fullmatch(v) is not None,
    "name_chars",
)
URL: Final = Field("a URL, or an empty text", lambda v: type(v) is str and v.isascii() and v.isprintable(), "url_chars")
TAGS: Final = listed(NAME, "tags")
CAPABILITY: Final = Field("a capability, or an empty text", lambda v: type(v) is str and v.isascii(), "capability_chars")
DESCRIPTION: Final = text("description_chars")
SPEC: Final = Field("the metadata of a tensor, [shape, stride, offset, dtype, conj, neg]", is_spec)
SPECS: Final = listed(SPEC, "results")
TRUE: Final = Field("true", lambda v: v is True)
_BYTES: Final = Field("a vector of bytes", lambda v: isinstance(v, torch.Tensor) and v.dtype is torch.uint8 and v.ndim == 1)
_LIST: Final = Field("a list", lambda v: type(v) is list, "array_items")
_ID_OR_NONE: Final = integer(0, MAX_ID - 1, "an id, or 0")
_SLOT: Final = Field("an integer, 0 or more", lambda v: type(v) is int and v >= 0)
_VALUE: Final = Field("an id, a tensor or a number", lambda v: is_number(v) or isinstance(v, torch.Tensor))
_NEW_IDS: Final = Field(
    "a list of ids, each at most once, with 0 for what is discarded",
    lambda v: type(v) is list and (len(v) < 2 or _distinct(v)),
    "results",
    _ID_OR_NONE,
)
_RUN: Final = {
    "slot": _SLOT,
    "values": listed(_VALUE, "array_items"),
    "results": _NEW_IDS,
}
_PACKED: Final = Field("bytes, 8 for each id", lambda v: type(v) is bytes and len(v) % 8 == 0)
_STEP: Final = Field("a list of a slot, operands and results, with -1 for what is no place of the plan", lambda v: _is_step(v))
PAYLOAD: Final = Shape(
    "the payload of TRANSFER", tensor=TENSOR, requires_grad=FLAG, tags=TAGS, description=DESCRIPTION, capability=CAPABILITY
)


def _distinct(ids: list[Any]) -> bool:
    named = [i for i in ids if type(i) is int and i]
    return len(named) == len(set(named))


def _is_step(value: Any) -> bool:
    if type(value) is not list or len(value) != 3 or type(value[0]) is not int or value[0] < 0:
        return False
    return all(type(places) is list and all(type(place) is int and -1 <= place < MAX_ID for place in places) for places in value[1:])


COMMANDS: Final[Mapping[int, Shape]] = {
    kind: Shape(kind.name, **fields)
    for kind, fields in {
        Kind.DEFINE: {
            "slot": _SLOT,
            "operation": text("url_chars"),
            "args": _LIST,
            "kwargs": Field("a map", lambda v: type(v) is dict, "map_items"),
        },
        Kind.RUN: _RUN,
        Kind.ASK: _RUN,
        Kind.PUT: {"id": ID, "tensor": TENSOR, "requires_grad": FLAG, "tags": TAGS, "description": DESCRIPTION},
        Kind.LINK: {
            "id": ID, "worker": NAME, "url": URL, "target": ID, "spec": SPEC,
            "tags": TAGS, "description": DESCRIPTION, "capability": CAPABILITY,
        },
        Kind.CLAIM: {"id": ID, "capability": CAPABILITY},
        Kind.RELEASE: {"ids": listed(ID, "array_items")},
        Kind.FETCH: {"id": ID},
        Kind.MOVE: {
            "id": ID, "hops": integer(0, 64), "destination": NAME, "url": URL,
            "new_id": _ID_OR_NONE, "holder": _ID_OR_NONE, "leave": FLAG, "capability": CAPABILITY,
        },
        Kind.SEARCH: {"words": listed(text("name_chars"), "tags")},
        Kind.TAG: {"id": ID, "tags": optional(TAGS), "description": optional(DESCRIPTION)},
        Kind.CLEAR: {},
        Kind.SYNC: {"visited": listed(NAME, "hops"), "further": listed(NAME, "hops")},
        Kind.DESCRIBE: {"ids": listed(ID, "results")},
        Kind.TRANSFER: {
            "name": text("name_chars"),
            "fields": _LIST,
            "payload": Field("a list of five items, or nothing", lambda v: v is None or type(v) is list and len(v) == 5),
        },
        Kind.LIST: {"after": _ID_OR_NONE},
        Kind.LOCATE: {"id": ID},
        Kind.SEED: {"seed": integer(0, 2**64 - 1)},
        Kind.PLAN: {"plan": _SLOT, "commands": listed(_STEP, "plan_commands")},
        Kind.RUNPLAN: {"plan": _SLOT, "ids": _PACKED, "values": listed(_VALUE, "array_items"), "released": _PACKED},
        Kind.READ: {"id": ID, "offset": integer(0, MAX_ID - 1), "length": integer(1, _MOST_READ)},
    }.items()
}
"""What a worker takes."""

_ABOUT: Final = {"requires_grad": FLAG, "tags": TAGS, "description": DESCRIPTION}
_FETCHED: Final = {
    "tensor": Shape("ANSWER to FETCH", tensor=TENSOR, **_ABOUT),
    "pointer": Shape("ANSWER to FETCH", worker=NAME, url=URL, id=ID, **_ABOUT, capability=CAPABILITY),
}

ANSWERS: Final[Mapping[int, Field]] = {
    Kind.ASK: SPECS,
    Kind.LINK: TRUE,
    Kind.CLAIM: TRUE,
    Kind.MOVE: TRUE,
    Kind.SEARCH: listed(ID, "results"),
    Kind.CLEAR: TRUE,
    Kind.SYNC: TRUE,
    Kind.DESCRIBE: SPECS,
    Kind.LIST: _LIST,
    Kind.READ: _BYTES,
    Kind.LOCATE: Field("a list of five items", lambda v: type(v) is list and len(v) == 5),
}
"""What a client takes for an answer; that to FETCH has a shape for each thing that may be there."""

CHUNK: Final = Shape(
    "CHUNK",
    stream=ID,
    about=integer(0, MAX_ID - 1),
    offset=integer(0, MAX_ID - 1),
    total=integer(1, MAX_ID - 1),
    bytes=_BYTES,
)
WHOLE: Final = Shape(
    "WHOLE",
    stream=ID,
    dtype=text("name_chars"),
    shape=listed(integer(0, _MAX_SIZE), "tensor_dims"),
    checksum=integer(0, 2**32 - 1),
    path=Field("a list of 1 or more indices", lambda v: type(v) is list and bool(v), "depth", integer(0, 15)),
    message=_LIST,
)

FAILURE: Final = Shape(
    "FAILURE",
    uid=ID,
    kind=text("error_chars"),
    text=text("error_chars"),
    worker=text("name_chars"),
    operation=text("error_chars"),
    evidence=Field("a map", lambda v: type(v) is dict, "map_items"),
    orphan=FLAG,
)

_GREETING: Final = {"incarnation": Field("32 hexadecimal digits", lambda v: type(v) is str and _INCARNATION.fullmatch(v) is not None)}
HELLO: Final = Shape(
    "the greeting",
    client=NAME,
    url=URL,
    session=ID,
    serializers=listed(text("name_chars"), "map_items"),
    secret=optional(Field("a text of ASCII characters", lambda v: type(v) is str and v.isascii(), "capability_chars")),
    introduction=optional(CAPABILITY),
    taken=optional(integer(0, MAX_ID - 1)),
    **_GREETING,
)
"""What a client says first; and what stands for those parts of it that it may leave out."""
OPTIONAL_IN_HELLO: Final = {"secret": None, "introduction": None, "taken": None}
WELCOME: Final = Shape("the welcome", worker=NAME, serializer=text("name_chars"), **_GREETING)


def kind_of(message: Any) -> int:
    """Return the kind of a message.

    Raises:
        MalformedMessageError: It has none.
    """
    if type(message) is not list or not message or type(message[0]) is not int:
        raise MalformedMessageError("a message", "it", "a list that begins with its kind", brief(message))
    return message[0]


def check_command(kind: int, message: list[Any], limits: Limits = DEFAULT_LIMITS) -> None:
    """Check a command.

    Raises:
        MalformedMessageError: It is not what its kind declares.
        LimitError: It is longer than this party allows.
    """
    COMMANDS[kind].check(message, limits)


def check_run(message: list[Any], limits: Limits = DEFAULT_LIMITS) -> None:
    """Check a RUN, all but its values: what each of them must be, its template says.

    Raises:
        MalformedMessageError: It is not what its kind declares.
        LimitError: It is longer than this party allows.
    """
    if len(message) == 4:
        _, slot, values, results = message
        if type(slot) is int and slot >= 0 and type(values) is list and type(results) is list:
            count = len(results)
            if count < 2 or (count <= limits.results and _distinct(results)):
                for result in results:
                    if type(result) is not int or not 0 <= result < MAX_ID:
                        break
                else:
                    return
    COMMANDS[Kind.RUN].check(message, limits)


def check_answer(asked: list[Any], content: Any, limits: Limits = DEFAULT_LIMITS) -> None:
    """Check the answer to a command.

    Args:
        asked: The command.
        content: What came.
        limits: How long its parts may be.

    Raises:
        MalformedMessageError: It answers something else.
        LimitError: It is longer than this party allows.
    """
    kind: int = asked[0]
    name = f"ANSWER to {Kind(kind).name}"
    if kind == Kind.FETCH:
        shape = _FETCHED.get(content[0]) if type(content) is list and content and type(content[0]) is str else None
        if shape is None:
            raise MalformedMessageError(name, "it", "a list that begins with 'tensor' or 'pointer'", brief(content))
        shape.check(content, limits)
        return
    if kind not in ANSWERS:
        raise MalformedMessageError(name, "it", "nothing: this command is not answered", brief(content))
    ANSWERS[kind].check(name, "it", content, limits)
    wanted = None
    if kind == Kind.DESCRIBE:
        wanted = len(asked[1])
    elif kind == Kind.ASK:
        wanted = sum(1 for result in asked[3] if result)
    if wanted is not None and len(content) != wanted:
        raise MalformedMessageError(name, "it", f"the metadata of {wanted} tensors", f"that of {len(content)}")
