"""Optimizers whose parameters are pointers, with a scheduler, for some steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import farpoint
from opinfo.places import Place
from opinfo.running import Trial, spread

STEPS = 5
_IMPLEMENTATIONS = ("foreach", "fused")
_READERS = (torch.optim.LBFGS, torch.optim.Adafactor)
"""Optimizers that read numbers in each step, for which `farpoint.allow_scalars()` is needed."""


@attrs.frozen
class Entry:
    """An optimizer of torch's database, with one of its implementations.

    Attributes:
        info: What the database says of it.
        flag: The argument that chooses the implementation; none for the one that torch chooses.
    """

    info: Any
    flag: str


def optimizers() -> dict[str, Any]:
    """Return the entries of torch's database of optimizers, by name: each implementation is one."""
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        for flag in ("", *(flag for flag in _IMPLEMENTATIONS if flag in info.supported_impls)):
            found[f"{info.name}.{flag}" if flag else info.name] = Entry(info, flag)
    return found


def trials(entry: Entry, count: int, place: Place) -> Iterator[Trial]:
    """Yield trainings, one for each of some sets of arguments: the losses, the parameters and the state are to be the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 3), (8, 2), (3, 4), (1, 4), (4, 2))
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    schedulers = entry.info.scheduler_inputs
    for number, given in enumerate(spread(iter(entry.info.optim_inputs_func(device="cpu")), count)):
        options = {**given.kwargs, entry.flag: True} if entry.flag else given.kwargs
        yield Trial(tensors, _Training(entry.info, options, schedulers[number % len(schedulers)]))


@attrs.frozen
class _Training:
    info: Any
    options: dict[str, Any]
    schedulers: Any

    def __call__(self, structure: Any) -> Any:
        x, y, *weights = structure
        sparse = self.info.only_supports_sparse_grads
        first, bias, last = (nn.Parameter(weight, not sparse or number == 0) for number, weight in enumerate(weights))
        parameters = [first] if sparse else [first, bias, last]
        optimizer = self.info.optim_cls(parameters, **copy.deepcopy(self.options))  # torch writes to a rate that is a tensor
        schedulers = [make(optimizer) for make in self.schedulers]
        losses: list[Any] = []

        def closure() -> Any:
            optimizer.zero_grad()
            found = nn.functional.embedding(x.argmax(dim=1), first, sparse=True) if sparse else torch.tanh(x @ first + bias)
            loss: Any = nn.functional.mse_loss(found @ last, y)
            loss.backward()
            losses.append(loss.detach())
            return loss

        for _ in range(STEPS):
            with farpoint.allow_scalars() if self.info.optim_cls in _READERS else nullcontext():
                if self.info.step_requires_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    with farpoint.allow_scalars():
                        scheduler.step(losses[-1])
                else:
                    scheduler.step()
        return losses, parameters, [dict(optimizer.state[parameter]) for parameter in parameters]
