"""Plans as a worker keeps them: lists of operations that one short message has carried out, each as if it had come alone.

A PLAN names the commands::

    [20, plan, [[slot, operands, results], …]]

`slot` is that of a template. Each operand, and each result, is a *place* of the plan, or -1: the operand is then the next one of
the values that come with the call, the result is discarded. A RUNPLAN fills the places::

    [21, plan, ids, values, released]

`ids` has 8 bytes for each place, `values` the numbers and small tensors in order. `released` has the ids that the client has given
up: those in a place after the last command that names it, all others before the first one.

A plan is no way around anything: each of its commands is looked at, allowed, counted, passed on and refused like one that comes
alone, and what fails poisons its results alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from farpoint.errors import LimitError, MalformedMessageError
from farpoint.protocol.shapes import MAX_ID
from farpoint.stored import Poisoned

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.template import Template
    from farpoint.worker import Worker

_STEPS = 2**64


def step_number(number: int, step: int) -> int:
    """Return the number of one step of a command, from 1, as one int: it is kept with what is passed on."""
    return number + step * _STEPS


def apart(number: int) -> tuple[int, int]:
    """Return the number of a command, and of the step of it that is meant, 0 for the command as a whole."""
    step, number = divmod(number, _STEPS)
    return number, step


@attrs.frozen
class Step:
    """One command of a plan.

    Attributes:
        template: What runs; or why it does not, if the template was refused.
        operands: Places, -1 for what comes with the call.
        results: Places, -1 for what is discarded.
    """

    template: Template | dict[str, Any]
    operands: list[int]
    results: list[int]


class Macro:
    """A plan that a client has registered.

    Args:
        steps: Its commands.

    Attributes:
        steps: Its commands.
        places: How many ids it takes.
        values: How many values it takes.
        last: The step after which a place is not named any more, from 0.
        items: How large it is.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.last: dict[int, int] = {}
        self.values = 0
        self.items = 0
        for position, step in enumerate(steps):
            self.values += step.operands.count(-1)
            self.items += 1 + len(step.operands) + len(step.results)
            self.last.update(dict.fromkeys((*step.operands, *step.results), position))
        self.last.pop(-1, None)
        self.places = max(self.last, default=-1) + 1


@attrs.frozen
class Unfolding:
    """A plan with what fills it, checked.

    Attributes:
        macro: The plan.
        ids: The id in each place.
        values: What fills the other operands, in order.
        dying: Ids that are given up after a step, from 0.
    """

    macro: Macro
    ids: tuple[int, ...]
    values: list[Any]
    dying: dict[int, list[int]]


class Macros:
    """What a worker does with the plans of its clients.

    Args:
        worker: Whose.
        perform: Carries one operation out.
    """

    def __init__(self, worker: Worker, perform: Callable[[Guest, int, Template, list[Any], list[int]], None]) -> None:
        self._worker = worker
        self._perform = perform

    def keep(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Carry a PLAN out."""
        _, plan, commands = message
        limits = self._worker.limits
        if plan >= limits.plans:
            raise MalformedMessageError("PLAN", "plan", f"below {limits.plans}", str(plan))
        guest.macros.pop(plan, None)
        if not commands:
            return
        steps = []
        for slot, operands, results in commands:
            template: Template | dict[str, Any] | None = guest.templates.get(slot) or guest.refused.get(slot)
            if template is None:
                raise MalformedMessageError("PLAN", "slot", "one that was defined", str(slot))
            if len(results) > limits.results:
                raise LimitError("results", limits.results, f"PLAN: results of length {len(results)}")
            named = [place for place in results if place >= 0]
            if len(named) != len(set(named)):
                raise MalformedMessageError("PLAN", "results", "places, each at most once", "one twice")
            steps.append(Step(template, operands, results))
        macro = Macro(steps)
        items = macro.items + sum(known.items for known in guest.macros.values())
        if items > limits.template_items:
            raise LimitError("template_items", limits.template_items, f"plans of {items} items")
        guest.macros[plan] = macro

    def run(self, guest: Guest, number: int, message: list[Any]) -> None:
        """Check a RUNPLAN, for `unfold` to carry it out."""
        _, plan, packed, values, released = message
        macro = guest.macros.get(plan)
        if macro is None:
            raise MalformedMessageError("RUNPLAN", "plan", "one that was registered", str(plan))
        ids = _unpack(packed, "ids")
        if len(ids) != macro.places or len(set(ids)) != len(ids):
            raise MalformedMessageError("RUNPLAN", "ids", f"{macro.places} different ones", str(len(ids)))
        if len(values) != macro.values:
            raise MalformedMessageError("RUNPLAN", "values", f"{macro.values} of them", str(len(values)))
        places = {object_id: place for place, object_id in enumerate(ids)}
        dying: dict[int, list[int]] = {}
        before = []
        for object_id in _unpack(released, "released"):
            position = macro.last.get(places.get(object_id, -1))
            if position is None:
                before.append(object_id)
            else:
                dying.setdefault(position, []).append(object_id)
        self._release(guest, before)
        guest.unfolding = Unfolding(macro, ids, values, dying)

    def unfold(self, guest: Guest, number: int) -> None:
        """Carry out what a RUNPLAN has brought. Others are served between its commands, as they are between those of a packet."""
        unfolding, guest.unfolding = guest.unfolding, None
        assert unfolding is not None
        ids, values, dying = unfolding.ids, iter(unfolding.values), unfolding.dying
        lock, perform = self._worker.lock, self._perform
        for position, step in enumerate(unfolding.macro.steps):
            template = step.template
            given = [next(values) if place < 0 else ids[place] for place in step.operands]
            results = [0 if place < 0 else ids[place] for place in step.results]
            with lock:
                if guest.left:
                    return
                number += _STEPS
                try:
                    if type(template) is dict:
                        raise Poisoned(template)
                    perform(guest, number, template, given, results)  # type: ignore[arg-type]  # it is no dict
                except Exception as error:
                    name = "RUNPLAN" if isinstance(template, dict) else template.operation.name
                    self._worker.failed(guest, number, error, name, results)
                if position in dying:
                    self._release(guest, dying[position])
            if guest.doomed is not None:
                return

    def _release(self, guest: Guest, object_ids: list[int]) -> None:
        holders = self._worker.holders
        self._worker.free([object_id for object_id in object_ids if holders.release(guest.holder, object_id)], guest)


def _unpack(packed: bytes, field: str) -> tuple[int, ...]:
    ids = struct.unpack(f">{len(packed) // 8}Q", packed)
    if ids and not 0 < min(ids) <= max(ids) < MAX_ID:
        raise MalformedMessageError("RUNPLAN", field, "ids, integers from 1 to 2**63 - 1", "another")
    return ids


def pack(ids: list[int]) -> bytes:
    """Return ids as a RUNPLAN carries them."""
    return struct.pack(f">{len(ids)}Q", *ids)
