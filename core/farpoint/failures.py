"""Errors that travel: as plain data on the way, as exceptions of ours where they arrive."""

from __future__ import annotations

import secrets
import traceback
from typing import Any

from farpoint import errors
from farpoint.errors import FarpointError, RemoteExecutionError
from farpoint.limits import DEFAULT_LIMITS

_KINDS: dict[str, type[FarpointError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FarpointError)
}


def describe_failure(error: Exception, worker: str, operation: str, *, expose: bool) -> dict[str, Any]:
    """Return an exception as plain data, under an id of its own.

    Args:
        error: What was raised.
        worker: Where.
        operation: By what.
        expose: Whether the traceback may travel.
    """
    kind = type(error).__name__ if type(error).__name__ in _KINDS else "RemoteExecutionError"
    behind = "".join(traceback.format_exception(error))[-DEFAULT_LIMITS.traceback_chars :] if expose else ""
    return {
        "uid": secrets.randbits(62) + 1,
        "kind": kind,
        "error": type(error).__name__[: DEFAULT_LIMITS.error_chars],
        "text": str(error)[: DEFAULT_LIMITS.error_chars],
        "worker": worker,
        "operation": operation,
        "traceback": behind,
    }


def revive_failure(failure: dict[str, Any], line: str) -> FarpointError:
    """Return the exception that a peer described.

    Args:
        failure: What `describe_failure` returned there.
        line: File and line that issued the operation, where known.
    """
    text, worker = str(failure["text"]), str(failure["worker"])
    kind = _KINDS.get(str(failure["kind"]), RemoteExecutionError)
    if kind is RemoteExecutionError:
        return RemoteExecutionError(
            worker, str(failure["operation"]), str(failure["error"]), text, line, str(failure["traceback"])
        )
    revived = kind.__new__(kind)
    Exception.__init__(revived, f"{line}: {text}" if line else text)
    revived.worker = worker  # type: ignore[attr-defined]  # the evidence that every refusal has
    return revived
