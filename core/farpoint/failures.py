"""Errors that travel: as plain data on the way, as exceptions of ours where they arrive.

::

    {"uid": 62 random bits, "kind": "ObjectNotFoundError", "worker": "bob", "operation": "FETCH", "text": "bob has no object …",
     "evidence": {"object_id": 7, "worker": "bob", "reason": ""}, "orphan": false}

The evidence of an error is the arguments of its class, which its message is built from. What arrives is believed only as far as
it fits the signature of a class that is listed here: no class, and no attribute, is looked up by a name from the wire.
"""

from __future__ import annotations

import inspect
import secrets
import traceback
from collections.abc import Mapping
from typing import Any, Final

from farpoint import errors
from farpoint.errors import FarpointError, ProtocolError, RemoteExecutionError
from farpoint.limits import DEFAULT_LIMITS

_TRACEBACK_CHARS: Final = 4_000
_MANY: Final = 64

_KINDS: Final[dict[str, type[FarpointError]]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FarpointError)
}
_BLANKS: Final[dict[str, Any]] = {
    "str": "",
    "int": 0,
    "float": 0.0,
    "int | str": "",
    "Iterable[str]": (),
    "Sequence[str]": (),
}


def _parameters(kind: type[FarpointError]) -> dict[str, str]:
    """Return the arguments of an error's class with their types as written; the base classes take a text only."""
    init = kind.__init__
    if not inspect.isfunction(init):
        return {}
    return {name: str(kind) for name, kind in inspect.get_annotations(init).items() if name != "return"}


_EVIDENCE: Final = {name: _parameters(kind) for name, kind in _KINDS.items()}


def describe_failure(error: Exception, worker: str, operation: str, *, expose: bool) -> dict[str, Any]:
    """Return an exception as plain data, under an id of its own.

    Args:
        error: What was raised.
        worker: Where.
        operation: By what.
        expose: Whether the traceback may travel.
    """
    name = type(error).__name__
    known = _KINDS.get(name) is type(error)
    if not known:
        behind = "".join(traceback.format_exception(error)) if expose else ""
        error = RemoteExecutionError(worker, operation, name, _text(error), "", behind)
        name = type(error).__name__
    evidence = {}
    for field, type_name in _EVIDENCE[name].items():
        evidence[field] = _trim(getattr(error, field, _BLANKS[type_name]), field)
    text = evidence["text"] if not known else str(error)[: DEFAULT_LIMITS.error_chars]
    return {
        "uid": secrets.randbits(62) + 1,
        "kind": name,
        "worker": getattr(error, "origin", "") or worker,
        "operation": operation,
        "text": text,
        "evidence": evidence,
        "orphan": False,
    }


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # of a plugin's exception; whoever waits must hear of it all the same
        return "its text cannot be had: its __str__ raises"


def read_failure(content: Any, worker: str) -> dict[str, Any]:
    """Return a failure that a peer sent, with everything in its place.

    Args:
        content: What arrived: anything.
        worker: The peer.
    """
    if not isinstance(content, dict) or type(content.get("uid")) is not int:
        error = ProtocolError(f"{worker} reported a failure in a form that is none")
        return describe_failure(error, worker, "", expose=False)
    texts = {}
    for field, longest in (
        *(("kind", 64), ("worker", DEFAULT_LIMITS.name_chars)),
        *(("operation", 200), ("text", DEFAULT_LIMITS.error_chars)),
    ):
        value = content.get(field)
        texts[field] = value[:longest] if isinstance(value, str) else ""
    texts["worker"] = texts["worker"] or worker
    evidence = _read_evidence(_EVIDENCE.get(texts["kind"]), content.get("evidence"))
    return {"uid": content["uid"], **texts, "evidence": evidence, "orphan": content.get("orphan") is True}


def revive_failure(failure: Mapping[str, Any], line: str) -> FarpointError:
    """Return the exception for a failure: it has the attributes that it had where it was raised.

    Args:
        failure: What `read_failure` returned.
        line: File and line that issued the operation, where known.
    """
    name, evidence, text = failure["kind"], failure["evidence"], failure["text"]
    kind = _KINDS.get(name)
    error: FarpointError
    if kind is None:
        # A newer peer may raise what is not known here.
        error = RemoteExecutionError(failure["worker"], failure["operation"], name, text, line)
    elif kind is RemoteExecutionError:
        error = RemoteExecutionError(**{**(evidence or _blank(name)), "line": line})
    elif evidence:
        error = kind(**evidence)
    else:
        blank = _blank(name)
        error = kind(**blank) if blank else kind(text)
        error.args = (text,)
    error.origin = failure["worker"]
    error.line = line
    if line and kind is not None and kind is not RemoteExecutionError:
        error.args = (f"{line}: {error.args[0]}",)
    return error


def _blank(name: str) -> dict[str, Any]:
    return {field: _BLANKS[type_name] for field, type_name in _EVIDENCE[name].items()}


def _trim(value: Any, field: str) -> Any:
    """Return a value as it may travel."""
    if isinstance(value, str):
        # The end of a traceback says what happened, the beginning of a text what it is about.
        return value[-_TRACEBACK_CHARS:] if field == "remote_traceback" else value[: DEFAULT_LIMITS.error_chars]
    if isinstance(value, tuple | list):
        return [_trim(item, field) for item in value[:_MANY]]
    return value


def _read_evidence(parameters: dict[str, str] | None, content: Any) -> dict[str, Any] | None:
    """Return evidence that fits the signature of its class, or None."""
    if not parameters or not isinstance(content, dict):
        return None
    checked = {}
    for field, type_name in parameters.items():
        value = content.get(field)
        match type_name, value:
            case "str" | "int | str", str():
                checked[field] = _trim(value, field)
            case "int" | "int | str", int() if type(value) is int:
                checked[field] = value
            case "float", float() | int() if type(value) is not bool:
                checked[field] = value
            case "Iterable[str]" | "Sequence[str]", list() if all(isinstance(item, str) for item in value):
                checked[field] = _trim(value, field)
            case _:
                return None
    return checked
