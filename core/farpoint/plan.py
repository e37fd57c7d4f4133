"""Plans: what a function does on workers, sent as one message for each worker and call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from farpoint import recording
from farpoint.blocking import is_blocking
from farpoint.errors import PlanError, ValueNotHereError
from farpoint.peer import Peer
from farpoint.provenance import raised_at, spell
from farpoint.recording import Run, Stream
from farpoint.remote import me
from farpoint.submission import Variants, difference

PATIENCE = 8
"""Calls in a row that may each do something new."""


class Plan:
    """A function whose calls reach each worker as one message: see `plan`.

    Args:
        function: The function.

    Attributes:
        calls: How often it was called.
        replays: How many of these calls went as plans, to all of their workers.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._name = getattr(function, "__name__", str(function))
        self._variants: WeakKeyDictionary[Peer, Variants] = WeakKeyDictionary()
        self._before: tuple[dict[str, Stream], dict[str, Stream]] = ({}, {})
        self._new = 0
        self.calls = 0
        self.replays = 0

    def __repr__(self) -> str:
        return f"<farpoint.plan of {self._name}: {self.replays} of {self.calls} calls were one message>"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recording.current() is not None or is_blocking():
            return self._function(*args, **kwargs)  # a part of another plan, or of none
        if self._new > PATIENCE:
            self._new = 0
            raise self._unsteady()
        self.calls += 1
        run = Run(me(), self._name, watched=False)
        with run:
            try:
                result = self._function(*args, **kwargs)
            except ValueNotHereError as error:
                run.give_up()
                where = spell(raised_at(error))
                raise PlanError(self._name, "needs a value", where, "get() what the function returns, and decide after the call") from error
            except BaseException:
                run.give_up()
                raise
        if run.held:
            self._submit(run)
        return result

    def _submit(self, run: Run) -> None:
        went = True
        try:
            for peer, stream in run.streams.items():
                variants = self._variants.setdefault(peer, Variants())
                went &= variants.submit(stream)
        finally:
            for stream in run.streams.values():
                stream.forget()
        self.replays += went
        self._new = 0 if went else self._new + 1
        self._before = (self._before[1], {peer.name: stream for peer, stream in run.streams.items()})

    def _unsteady(self) -> PlanError:
        before, now = self._before
        for name, stream in now.items():
            what, where = difference(before[name], stream) if name in before else (f"something on {name}", "")
            if what != "nothing":
                break
        else:
            what, where = "something on another worker", ""
        reason = f"has done something else in each of its last {PATIENCE} calls, which saves nothing; in the last one {what}"
        return PlanError(self._name, reason, where, "take what changes out of it, or call it without farpoint.plan")


def plan(function: Callable[..., Any]) -> Plan:
    """Let each call of a function reach each of its workers as one message."""
    return Plan(function)
