"""What an optimizer has noted of a parameter follows the parameter: to a worker, to the next one, and home."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from farpoint import handover, recording
from farpoint.pointer import PointerTensor

_moves = count(1)
_last = 0
_seen: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()


def moved() -> None:
    """Note that a parameter is somewhere else now. From the first time on, each optimizer looks after its notes before a step."""
    global _last  # noqa: PLW0603  # one process has one set of hooks of torch
    if not _last:
        register_optimizer_step_pre_hook(_follow)
    _last = next(_moves)


def _follow(optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
    if _seen.get(optimizer) == _last:
        return
    if optimizer not in _seen:  # what is saved after a model has come home is home, too
        optimizer.register_state_dict_pre_hook(_follow)
    now = _last
    with recording.openly(), torch.no_grad():
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                state[name] = beside(value, parameter)
    _seen[optimizer] = now


def beside(value: Any, parameter: torch.Tensor) -> Any:
    """Return what was noted of a parameter, brought to where that is.

    Args:
        value: A tensor, or a container of such; anything else is returned as it is. A local number, as a tensor without
            dimensions, stays here: it travels along with each operation.
        parameter: It.
    """
    if isinstance(value, list | tuple | dict):
        return _contents_beside(value, parameter)
    if not isinstance(value, torch.Tensor):
        return value
    there = parameter._route.workers if isinstance(parameter, PointerTensor) else ()
    here = value._route.workers if isinstance(value, PointerTensor) else ()
    if here == there or (not here and not value.ndim):
        return value
    if len(here) == len(there) == 1:
        return handover.move(value, there[0])
    while isinstance(value, PointerTensor):
        value = handover.get(value)
    return handover.place(value, there)


def _contents_beside(value: Any, parameter: torch.Tensor) -> Any:
    if isinstance(value, dict):
        return {key: beside(item, parameter) for key, item in value.items()}
    return type(value)(beside(item, parameter) for item in value)
