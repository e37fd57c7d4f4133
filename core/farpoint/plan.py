"""Plans: what a function does on workers, sent as one message for each worker and call."""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from farpoint import recording
from farpoint.blocking import is_blocking
from farpoint.errors import PlanError, ValueNotHereError
from farpoint.frozen import Places, Recording, sign
from farpoint.peer import Peer
from farpoint.pointer import PointerTensor
from farpoint.provenance import raised_at, spell
from farpoint.recording import Registration, Run, Stream
from farpoint.remote import me
from farpoint.submission import VARIANTS, Variants, difference
from farpoint.verification import verify_streams

PATIENCE = 8
"""Calls in a row that may each do something new."""

P = ParamSpec("P")
R = TypeVar("R")


class _Known:
    """The last recording for one kind of arguments of a frozen plan, and whether the one before it was the same."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.steady = False
        self.registrations: dict[str, tuple[Registration, bool]] = {}


class Plan(Generic[P, R]):
    """A function whose calls reach each worker as one message: see `plan`.

    Args:
        function: The function.
        frozen: Whether it is not run any more once two calls have done the same.
        verify: Whether calls are checked: all, or each n-th.

    Attributes:
        frozen: As given.
        verify: As given.
        calls: How often it was called.
        replays: How many of these calls went as plans, to all of their workers.
        runs: How many of them ran the function.
    """

    def __init__(self, function: Callable[P, R], *, frozen: bool = False, verify: bool | int = False) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._name = getattr(function, "__name__", str(function))
        self._variants: WeakKeyDictionary[Peer, Variants] = WeakKeyDictionary()
        self._known: OrderedDict[tuple[Any, ...], _Known] = OrderedDict()
        self._before: tuple[dict[str, Stream], dict[str, Stream]] = ({}, {})
        self._last: _Known | None = None
        self._differs = ("", "")
        self._new = 0
        self.frozen = frozen
        self.verify = verify
        self.calls = 0
        self.replays = 0
        self.runs = 0

    def __repr__(self) -> str:
        kind = "frozen plan" if self.frozen else "plan"
        return f"<farpoint.{kind} of {self._name}: {self.replays} of {self.calls} calls were one message, {self.runs} ran it>"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if recording.current() is not None or is_blocking():
            return self._function(*args, **kwargs)  # a part of another plan, or of none
        signed = sign(args, kwargs) if self.frozen else None
        known, pointers = self._kind(*signed) if signed is not None else (None, [])
        due = bool(self.verify) and self.calls % int(self.verify) == 0
        self.calls += 1
        if known is not None and known.steady and not due:
            last = known.recording
            # What one recording has left, the run of another may have replaced: then it is not what the function would find.
            if last is not None and (known is self._last or last.stateless) and last.ready():
                self._last = known
                self.replays += 1
                return cast(R, last.replay(pointers, known.registrations))
            known.steady = False
        if self._new > PATIENCE:
            self._new = 0
            raise self._unsteady()
        return cast(R, self._run(known, pointers, due, args, kwargs))

    def _kind(self, key: tuple[Any, ...], pointers: list[PointerTensor]) -> tuple[_Known, list[PointerTensor]]:
        known = self._known.pop(key, None) or _Known()
        self._known[key] = known
        while len(self._known) > VARIANTS:
            self._known.popitem(last=False)
        return known, pointers

    def _run(self, known: _Known | None, pointers: list[PointerTensor], due: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.runs += 1
        self._last = known
        was_steady = known is not None and known.steady
        earlier: Places = known.recording.places() if known is not None and known.recording is not None else {}
        run = Run(me(), self._name, watched=known is not None or due)
        with run:
            try:
                result: Any = self._function(*args, **kwargs)
            except ValueNotHereError as error:
                run.give_up()
                where = spell(raised_at(error))
                raise PlanError(self._name, "needs a value", where, "get() what the function returns, and decide after the call") from error
            except BaseException:
                run.give_up()
                raise
        if not run.held:
            return result
        if known is not None:
            made = Recording(run, pointers, result, earlier)
            result = made.take_result()
        try:
            if known is not None:
                self._compare(known, made, due)
            self._submit(run, due)
        finally:
            for stream in run.streams.values():
                stream.forget()
        if known is not None:
            del run
            self._freeze(known, made, thorough=not was_steady)
        return result

    def _submit(self, run: Run, due: bool) -> None:
        went = True
        for peer, stream in run.streams.items():
            variants = self._variants.setdefault(peer, Variants())
            if due:
                registration, fresh = variants.register(stream)
                if registration is not None:
                    verify_streams(run, stream, registration, fresh=fresh)
                    continue
                stream.send()
                went = False
            else:
                went &= variants.submit(stream)
        self.replays += went
        if not self.frozen:
            self._new = 0 if went else self._new + 1
        self._before = (self._before[1], {peer.name: stream for peer, stream in run.streams.items()})

    def _compare(self, known: _Known, made: Recording, due: bool) -> None:
        """Look whether a call has done what the one before did."""
        before = known.recording
        was_steady = known.steady
        self._differs = made.unlike(before) if before is not None else ("", "")
        known.steady = before is not None and not self._differs[0]
        known.recording = made
        self._new = 0 if known.steady else self._new + 1
        if was_steady and not known.steady and due:
            what, where = self._differs
            for part in made.parts.values():
                part.stream.send()  # what the function has done, run as it is, is what was meant
            raise PlanError(self._name, f"is frozen, and does something else now: {what}", where, "call it without frozen=True")

    def _freeze(self, known: _Known, made: Recording, *, thorough: bool) -> None:
        if known.steady:
            if thorough:
                gc.collect()  # what a ring keeps alive was not left behind
            made.settle()
            known.registrations = {}
            for name, part in made.parts.items():
                registration, fresh = self._variants[part.peer].register(part.stream)
                if registration is None or fresh:
                    known.steady = False
                    return
                known.registrations[name] = (registration, False)

    def _unsteady(self) -> PlanError:
        what, where = self._differs
        if not what:
            before, now = self._before
            for name, stream in now.items():
                what, where = difference(before[name], stream) if name in before else (f"something on {name}", "")
                if what:
                    break
        reason = f"has done something else in each of its last {PATIENCE} calls, which saves nothing: {what or 'other workers'}"
        fix = "take what changes out of it, or leave frozen=True away" if self.frozen else "take what changes out of it, or call it without farpoint.plan"
        return PlanError(self._name, reason, where, fix)


@overload
def plan(function: Callable[P, R], /) -> Plan[P, R]: ...
@overload
def plan(*, frozen: bool = False, verify: bool | int = False) -> Callable[[Callable[P, R]], Plan[P, R]]: ...
def plan(function: Callable[..., Any] | None = None, /, *, frozen: bool = False, verify: bool | int = False) -> Any:
    """Let each call of a function reach each of its workers as one message.

    The function runs at each call, and what it issues is held back until it returns. A stream of commands that has come before is
    registered with the worker, and from then on a call sends what differs: ids, and numbers. So learning rates, schedulers, counters and
    branches on Python values are always right. What has not come before is sent command by command.

    With `frozen`, the function is not run any more once two calls in a row have done the same, down to each number: the calls that
    follow do what that one did. They send as little and cost next to nothing here. They do not see a changed learning rate, variable or
    mode of a module. Arguments of another shape are recorded anew, and so is everything if something that it needs was given up.
    What it returns has no autograd history; what it leaves behind otherwise (`param.grad`) is the same object, with new contents.

    Below it a value cannot be read, nothing sent, fetched or moved: that raises `PlanError`, with the line.

    Args:
        function: A function of pointers.
        frozen: Whether to replay without running it.
        verify: Whether to check that a replay gives bit for bit what a run gives: True for each call, n for each n-th one. It waits, takes
            memory for copies, and fetches a truth value.

    Raises:
        PlanError: At a call: it cannot be a plan, or each call does something else.

    Example::

        @farpoint.plan
        def step(x, y):
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            return loss
    """
    if function is None:
        return functools.partial(Plan, frozen=frozen, verify=verify)
    return Plan(function, frozen=frozen, verify=verify)
