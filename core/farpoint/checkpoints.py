"""Random numbers within `torch.utils.checkpoint`, which runs a function a second time and must get the same ones.

Torch puts the random generator of this process back for the second time. That of a worker cannot be put back without disturbing
whoever else draws there. So what was drawn the first time stays on the worker, and is taken again: as long as torch keeps what the
second time needs. Without `preserve_rng_state` torch promises nothing, and each time draws anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from farpoint.errors import FarpointError
from farpoint.operations import Operation

_FILE = checkpoint.__file__
_KEPT = "_farpoint_draws"
_aten: Any = torch.ops.aten


@attrs.define
class _Draw:
    """What one operation drew: copies of the operands that it wrote, and of its results, or which of these operands each one is."""

    name: str
    operands: list[Any]
    results: list[Any]


@attrs.define
class _Draws:
    """What was drawn in one checkpoint, in order, and how much of it each second run has taken, by the run's id."""

    made: list[_Draw] = attrs.field(factory=list)
    taken: dict[Any, int] = attrs.field(factory=dict)


def draw(dispatch: Callable[..., Any], operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Draw random numbers, or take those of the first time.

    Args:
        dispatch: Issues an operation on pointers.
        operation: What draws.
        args: Its arguments.
        kwargs: The same by name.

    Raises:
        FarpointError: What is run again is not what ran first.
    """
    firsts = []
    for owner, run in _checkpoints():
        if run is None:
            firsts.append(owner)
            continue
        result = _again(dispatch, operation, args, kwargs, owner, run)
        break
    else:
        result = dispatch(operation.overload, args, kwargs)
    for owner in firsts:
        written = _written(operation, args, kwargs)
        found = [next((i for i, operand in enumerate(written) if operand is value), value) for value in _tensors(result)]
        owner.__dict__.setdefault(_KEPT, _Draws()).made.append(_Draw(operation.name, _copies(dispatch, written), _copies(dispatch, found)))
    return result


def _again(
    dispatch: Callable[..., Any], operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], owner: Any, run: Any
) -> Any:
    draws: _Draws = owner.__dict__.setdefault(_KEPT, _Draws())
    position = draws.taken.get(run, 0)
    if position >= len(draws.made) or draws.made[position].name != operation.name:
        raise FarpointError(f"{operation.name} draws other random numbers in a checkpoint that runs again than when it ran first")
    draws.taken[run] = position + 1
    made = draws.made[position]
    written = _written(operation, args, kwargs)
    for operand, copy in zip(written, made.operands, strict=True):
        dispatch(_aten.copy_.default, (operand, copy), {})
    results = [written[value] if isinstance(value, int) else value for value in _copies(dispatch, made.results)]
    return results[0] if len(results) == 1 else tuple(results)


def _copies(dispatch: Callable[..., Any], values: Sequence[Any]) -> list[Any]:
    return [value if isinstance(value, int) else dispatch(_aten.clone.default, (value,), {}) for value in values]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _written(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    given = [args[i] for i in sorted(operation.written) if i < len(args)]
    return _tensors([given, [kwargs[name] for name in sorted(operation.written_names) if name in kwargs]])


def _checkpoints() -> Iterator[tuple[Any, Any]]:
    """Yield the checkpoints that are under way, the innermost first: what is kept of each, and the second run's id, None in the first.

    Both kinds keep an object for each call, which dies when nothing needs a second run any more.
    """
    frame: Any = sys._getframe(2)
    preserved = True
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE:
            found = frame.f_locals
            if code.co_name == "recompute_fn":
                preserved = found["preserve_rng_state"]
            elif code.co_name == "unpack_hook" and "gid" in found and preserved:
                yield found["frame"], found["gid"]
            elif code.co_name == "checkpoint" and found.get("gen") is not None:
                kept = found["gen"].gi_frame.f_locals
                if kept["preserve_rng_state"]:
                    yield kept["new_frame"], None
            elif code.co_name in ("forward", "backward") and "ctx" in found and found["ctx"].preserve_rng_state:
                yield found["ctx"], None if code.co_name == "forward" else torch._C._current_graph_task_id()
        frame = frame.f_back
