"""Making every call wait for its effect: slow, and good for finding the line that an error comes from."""

from __future__ import annotations

import os
from types import TracebackType

_state = {"on": os.environ.get("FARPOINT_BLOCKING", "0") not in ("", "0")}


class blocking:  # noqa: N801  # a context manager that is called like a function
    """Make every operation wait until its worker has carried it out, and raise its error on the line that issued it.

    As a context manager, or for good: `farpoint.blocking()` alone switches it on, `farpoint.blocking(False)` off. The variable
    `FARPOINT_BLOCKING=1` has it on from the start. It applies to all threads.

    Args:
        on: Whether to wait.
    """

    def __init__(self, on: bool = True) -> None:
        self._before = _state["on"]
        _state["on"] = on

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _state["on"] = self._before


def is_blocking() -> bool:
    """Return whether calls wait."""
    return _state["on"]
