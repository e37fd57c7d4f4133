"""Checking a plan: the worker carries it out on copies, and the commands one by one on the originals, and both must agree bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from farpoint.errors import PlanError
from farpoint.handover import get
from farpoint.pointer import PointerTensor
from farpoint.provenance import spell
from farpoint.references import Reference
from farpoint.submission import send_plan

if TYPE_CHECKING:
    from farpoint.recording import Registration, Run, Stream

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_streams(run: Run, stream: Stream, registration: Registration, *, fresh: bool) -> None:
    """Send a stream of commands, and check that its plan does the same.

    Where it draws random numbers nothing is compared: a second run draws others. It is then sent as a plan.

    Args:
        run: The call, which was watched.
        stream: What it has issued to one worker.
        registration: The number of its plan.
        fresh: Whether the worker must be told of the plan first.

    Raises:
        PlanError: It does not. Then the commands have taken effect as a run without a plan.
    """
    peer = stream.peer
    if any(command[0].operation.random for command in stream.commands):
        ids, stream.ids = stream.ids, []
        send_plan(peer, registration, stream, ids, stream.values, ids, fresh=fresh)
        return
    pairs: list[tuple[int, PointerTensor, PointerTensor]] = []
    copies: list[PointerTensor] = []
    names = [(peer, object_id) for object_id in stream.ids]
    with torch.no_grad():
        for place, name in enumerate(names):
            if place in stream.results:
                route, spec = run.specs[name]
                copy = PointerTensor.wrap(route, Reference(peer, peer.references.new_id()), spec)
                weak = run.made[name]()
                original = PointerTensor.wrap(route, weak, spec) if weak is not None else None
            else:
                original = run.used[name]
                copy = original.detach().clone()  # type: ignore[assignment]  # of a pointer
            copies.append(copy)  # also what nobody looks at: it must not be given up before it is made
            if original is not None and original._spec == copy._spec:
                pairs.append((place, copy, original))
        ids = [copy._reference.id for copy in copies if copy._reference is not None]
        send_plan(peer, registration, stream, ids, stream.values, [], fresh=fresh)
        stream.send()
        for place, copy, original in pairs:
            if not bool(get(_equal(copy, original))):
                command, origin = next((c, o) for c, o in zip(reversed(stream.commands), reversed(stream.origins), strict=True) if place in (*c[1], *c[2]))
                reason = f"gives another result of {command[0].operation.name} as a plan than one by one"
                fix = "call it without farpoint.plan; tensors in it that share memory are told apart by this check"
                raise PlanError(run.name, reason, spell(origin), fix)


def _equal(one: Any, other: Any) -> Any:
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    bits = _BITS[one.itemsize]
    return one.view(bits).eq(other.view(bits)).all()
