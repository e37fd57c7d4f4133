"""Modules that change hands: their parameters and buffers do, in place, so that whoever refers to one keeps the right one.

`torch.utils.swap_tensors` would refuse while an old graph still knows a parameter, as in any training loop. Here the graph keeps the
old contents, under another object, and the parameter gets the new ones.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from farpoint import followers, handover
from farpoint.errors import FarpointError
from farpoint.pointer import PointerTensor
from farpoint.remote import RemoteWorker, resolve
from farpoint.worker import Worker

_Module = TypeVar("_Module", bound=nn.Module)


def send(module: _Module, worker: RemoteWorker | str) -> _Module:
    """Send the parameters and buffers of a module to a worker, with their gradients, and return the module itself.

    It has pointers then, and computes where they lead. Parameters keep their identity: an optimizer that was made before goes on,
    and what it has noted of them follows at its next step.

    Args:
        module: Changed in place. One that has pointers already gets pointers to them: a chain.
        worker: Who gets them.

    Raises:
        FarpointError: One could not be sent; then nothing has changed.
        WorkerNotFoundError: Nobody of that name is known.
    """
    target = resolve(worker)
    olds = list(tensors(module))
    news = [handover.send(tensor, target) for tensor in olds]
    for old, new in zip(olds, news, strict=True):
        become(old, new)
    return module


def get(module: _Module) -> _Module:
    """Bring the parameters and buffers of a module here, one hop nearer, with their gradients, and return the module itself.

    Raises:
        FarpointError: One could not be fetched; then nothing has changed.
    """
    olds = [tensor for tensor in tensors(module) if isinstance(tensor, PointerTensor)]
    news = [handover.fetch(tensor) for tensor in olds]
    for old, new in zip(olds, news, strict=True):
        become(old, new)
    return module


def move(module: _Module, worker: RemoteWorker | Worker | str) -> _Module:
    """Move the parameters and buffers of a module to a worker, straight from where they are, and return the module itself.

    Raises:
        FarpointError: One could not be moved. Those before it have arrived, and the module knows where each one is: the call may be
            repeated.
        WorkerNotFoundError: Nobody of that name is known.
    """
    if worker == "me" or isinstance(worker, Worker):
        while any(isinstance(tensor, PointerTensor) for tensor in tensors(module)):
            get(module)
        return module
    target = resolve(worker)
    if not any(isinstance(tensor, PointerTensor) for tensor in tensors(module)):
        return send(module, target)
    for tensor in list(tensors(module)):
        moved = handover.move(tensor, target)
        if moved is not tensor:
            become(tensor, moved)
    return module


def copy(module: _Module) -> _Module:
    """Return a copy of a module, where it is: `copy.deepcopy`."""
    return copying.deepcopy(module)


def become(tensor: Any, other: Any) -> None:
    """Let a tensor become what another one is, and the other way round; references, also weak ones, stay with the objects.

    Args:
        tensor: A leaf; graphs that know it go on with what it was.
        other: A leaf that nobody else refers to.
    """
    if isinstance(tensor, nn.Parameter):
        if isinstance(other, PointerTensor):
            other._is_param = True  # as torch marks parameters of a class of their own
        else:
            gradient, other.grad = other.grad, None
            other = nn.Parameter(other.detach(), requires_grad=other.requires_grad)
            other.grad = gradient
    tensor.__class__, other.__class__ = other.__class__, tensor.__class__
    tensor.__dict__, other.__dict__ = other.__dict__, tensor.__dict__
    torch._C._swap_tensor_impl(tensor, other)
    followers.moved()


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield each parameter and buffer once."""
    for tensor in chain(module.parameters(), module.buffers()):
        if nn.parameter.is_lazy(tensor):
            raise FarpointError(f"a lazy module has no parameters before it has run: call {type(module).__name__} once, then send it")
        yield tensor
