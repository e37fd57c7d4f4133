"""What several workers have, brought together: in this process, or on one worker."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from farpoint import gate, handover, modules
from farpoint.crossing import cross, is_recorded
from farpoint.errors import PointerError
from farpoint.pointer import PointerTensor, spend
from farpoint.remote import RemoteWorker, resolve

if TYPE_CHECKING:
    from farpoint.answers import Reply


def gather(pointers: Iterable[torch.Tensor], *, keep: bool = False) -> list[torch.Tensor]:
    """Bring what pointers point at here, from all workers at once: everything is asked for before anything is waited for.

    Args:
        pointers: They are spent afterwards. A chain is followed to its data. A tensor that is here is returned as it is.
        keep: Copy instead, and leave the pointers valid.

    Returns:
        The tensors, in the order of the pointers, and as `get` of each would return them.

    Raises:
        FarpointError: One could not be fetched; then all pointers are valid.
    """
    asked = list(pointers)
    found = fetch(asked, keep=keep)
    while any(isinstance(tensor, PointerTensor) for tensor in found):
        found = fetch(found, keep=keep)
    if not keep:
        give_up(asked)
    return found


def fetch(pointers: Sequence[torch.Tensor], *, keep: bool) -> list[torch.Tensor]:
    """Return what pointers point at, one hop nearer each, as `get` does. The pointers stay valid.

    Args:
        pointers: They, or tensors that are here.
        keep: Whether it is done for `get(keep=True)`, and not for a `get`.
    """
    replies = [handover.ask(pointer) if isinstance(pointer, PointerTensor) else None for pointer in pointers]
    return [pointer if reply is None else _receive(pointer, reply, keep) for pointer, reply in zip(pointers, replies, strict=True)]


def give_up(pointers: Iterable[torch.Tensor]) -> None:
    """Spend pointers whose values have been fetched, with their gradients."""
    for pointer in {id(pointer): pointer for pointer in pointers if isinstance(pointer, PointerTensor)}.values():
        peer, grad = pointer._route.peer, handover.gradient_of(pointer)
        spend(pointer, "get")
        if isinstance(grad, PointerTensor):
            spend(grad, "get")
        peer.flush()


def _receive(pointer: Any, reply: Reply, keep: bool) -> Any:
    if is_recorded(pointer) and (keep or not pointer.is_leaf):
        worker = pointer._route.workers[0]
        return cross(pointer, lambda value: handover.receive(value, reply, True, False), lambda grad: handover.place(grad, [worker]))
    return handover.receive(pointer, reply, True, bool(pointer.requires_grad and pointer.is_leaf))


def average(items: Iterable[Any], *, on: RemoteWorker | str) -> Any:
    """Average tensors, or modules, of several workers on one that all of them trust.

    A copy of each goes straight to that worker, which is the only one to see it; this process fetches none. The average is made there,
    and the copies are given up before this returns. The originals stay as they are. To be sure that nobody else reads them, let the
    policies of their workers refuse `get`.

    Args:
        items: Pointers to tensors of one shape and dtype, or modules of one structure. Of this process's own, copies are sent.
        on: The worker.

    Returns:
        A pointer to the mean of the tensors; or a module on that worker, like the first one, with the means of all parameters and
        buffers. In a module, what is no floating point or complex number is not averaged: of integers (such as
        `num_batches_tracked`) and bools the largest is taken. Nothing of it is in a graph.

    Raises:
        PointerError: There are none, or they do not match.
        WorkerNotFoundError: Nobody of that name is known.
        FarpointError: One could not be copied there.
    """
    target, given = resolve(on), list(items)
    if not given:
        raise PointerError("farpoint.average() of nothing: give it one pointer or module of each party")
    if all(isinstance(item, nn.Module) for item in given):
        return _average_modules(given, target)
    for number, tensor in enumerate(given):
        _match(f"item {number}", _describe(tensor), _describe(given[0]))
    with torch.no_grad():
        return _mean(_copies(given, target))


def _average_modules(given: Sequence[nn.Module], target: RemoteWorker) -> nn.Module:
    tensors = [list(modules.tensors(module)) for module in given]
    described = [_describe_module(module) for module in given]
    for number, other in enumerate(described):
        _match(f"module {number}", list(other), list(described[0]))
        for name, wanted in described[0].items():
            _match(f"{name} of module {number}", other[name], wanted)
    averaged: dict[int, Any] = {}
    with torch.no_grad():
        for group in _groups(tensors):
            first = group[0]
            joined = [torch.cat([tensor.detach().reshape(-1) for tensor in party]) for party in group]
            merge = _mean if first[0].is_floating_point() or first[0].is_complex() else _largest
            parts = merge(_copies(joined, target)).split([tensor.numel() for tensor in first])
            for tensor, part in zip(first, parts, strict=True):
                averaged[id(tensor)] = _like(tensor, part.reshape(tensor.shape).clone())
    # What is averaged stands in for the tensors of the first module, which are not copied.
    return copy.deepcopy(given[0], averaged)


def _groups(tensors: Sequence[Sequence[torch.Tensor]]) -> list[list[list[torch.Tensor]]]:
    """Return the tensors of each party, in groups that can be joined: a module moves in one go for each dtype it has."""
    groups: dict[Any, list[list[torch.Tensor]]] = {}
    for together in zip(*tensors, strict=True):
        places = tuple(tensor._route.workers if isinstance(tensor, PointerTensor) else () for tensor in together)
        group = groups.setdefault((together[0].dtype, places), [[] for _ in together])
        for party, tensor in zip(group, together, strict=True):
            party.append(tensor)
    return list(groups.values())


def _like(tensor: torch.Tensor, value: Any) -> Any:
    value.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        value._is_param = True  # torch's mark
    return value


def _copies(tensors: Iterable[Any], target: RemoteWorker) -> list[Any]:
    # What moves is a second reference: what another one leads to stays where it is. Nothing here writes to what did not need to move.
    return [handover.move(_straight(tensor.detach()), target) for tensor in tensors]


def _straight(tensor: Any) -> Any:
    """Return a pointer straight to where a chain leads."""
    while isinstance(tensor, PointerTensor) and len(tensor._route.workers) > 1:
        tensor = handover.get(tensor, keep=True)
    return tensor


def _mean(copies: Sequence[Any]) -> Any:
    total = copies[0]
    for tensor in copies[1:]:
        total = total + tensor  # not in place: the first may be somebody else's
    return total / len(copies)


def _largest(copies: Sequence[Any]) -> Any:
    largest = copies[0]
    for tensor in copies[1:]:
        largest = torch.maximum(largest, tensor)
    return largest


def _describe(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, torch.Tensor):
        raise PointerError(f"farpoint.average() takes tensors, or modules, and not {type(tensor).__name__}")
    if isinstance(tensor, PointerTensor):
        gate.check_live(tensor)
    return tuple(tensor.shape), tensor.dtype


def _describe_module(module: Any) -> dict[str, Any]:
    return {name: _describe(tensor) for name, tensor in chain(module.named_parameters(), module.named_buffers())}


def _match(which: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise PointerError(f"farpoint.average() takes what is alike: {which} is {found}, where the first is {wanted}")
