"""`resize_` on a worker: an object gets another geometry, and more memory where its storage is too small for that.

Torch would reallocate the storage. A storage that is mapped from a file, or from bytes that have arrived, cannot be; memory that torch
adds is not written; and whatever reads the old memory, without the interpreter's lock, must not lose it. So a storage that grows
is replaced in the store, in all objects that lie in it, which goes for what is lent to another process as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import torch

from farpoint.errors import MalformedMessageError, ProtocolError
from farpoint.protocol.shapes import brief, is_spec
from farpoint.tensors import DTYPE_NAMES

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.template import Template
    from farpoint.worker import Worker

outgrown: Final[WeakSet[torch.UntypedStorage]] = WeakSet()
"""Storages that were replaced. What was written to one, or made of one, after that is not what the store has."""

_TOO_MANY: Final = 2**58


def resize(worker: Worker, guest: Guest, template: Template, values: list[Any], given: Sequence[Any]) -> torch.Tensor:
    """Resize an object, and return what it is now. Its elements stay where they are; new memory is zero.

    Args:
        worker: Whose object it is.
        guest: Who asks, and is charged for growth before it happens.
        template: The operation, one of `RESIZING` in `farpoint.operations`.
        values: Its operands.
        given: The same as they came: their ids.

    Raises:
        MalformedMessageError: What shall be resized is no object.
        ProtocolError: The size is beyond all storages, or of more dimensions than tensors that travel.
        QuotaError: There is no room for it.
        RuntimeError: It is none that torch takes.
    """
    args, kwargs = template.fill(values)
    operand: torch.Tensor = args[0] if args else kwargs["self"]
    object_id = next(sent for sent, value in zip(given, values, strict=True) if value is operand)
    if type(object_id) is not int:
        raise MalformedMessageError("RUN", "values", "the id of what shall be resized", brief(object_id))
    shape, stride = _geometry(template.operation.call, args, kwargs)
    offset, storage = int(operand.storage_offset()), operand.untyped_storage()
    if not is_spec([shape, stride, offset, DTYPE_NAMES[operand.dtype], operand.is_conj(), operand.is_neg()]):
        raise ProtocolError(f"{template.operation.name} would make a tensor of {len(shape)} dimensions that nobody could be told of")
    size = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    growth = size * operand.itemsize - storage.nbytes()
    if growth > 0:
        guest.quota.check(growth, 0)
        storage = _replace(worker, storage, storage.nbytes() + growth)
    # Another tensor, as what is under way with the present one has its size. The storage is large enough, or torch would let it grow.
    resized = operand.detach().set_(storage, offset, shape, stride)
    worker.store[object_id] = resized
    return resized


def _geometry(call: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the shape and the strides that torch would give to the operand."""
    shadows = {id(value): _shadow(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)}
    named = {name: shadows.get(id(value), value) for name, value in kwargs.items()}
    wanted: Any = named.get("size", args[1] if len(args) > 1 else named.get("the_template"))
    sizes = wanted.shape if isinstance(wanted, torch.Tensor) else wanted
    if math.prod(max(size, 1) for size in sizes) > _TOO_MANY:  # torch multiplies in 64 bits, and does not always look
        raise ProtocolError(f"a tensor of shape {list(sizes)} is larger than any storage")
    with torch.no_grad():
        resized = call(*(shadows.get(id(value), value) for value in args), **named)
    return list(resized.shape), list(resized.stride())


def _shadow(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.uint8, device="meta")


def _replace(worker: Worker, storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    """Let all objects that lie in a storage lie in a larger one."""
    grown = worker.isolation.grow(storage, nbytes) if worker.isolation is not None else grow(storage, nbytes)
    views = [(i, v) for i in worker.store if isinstance(v := worker.store.get(i), torch.Tensor) and _lies_in(v, storage)]
    try:
        for object_id, view in views:
            worker.store[object_id] = view.detach().set_(grown, view.storage_offset(), view.shape, view.stride())
    except BaseException:  # a store that could not take one; none may see other memory than the rest
        for object_id, view in views:
            worker.store[object_id] = view
        raise
    outgrown.add(storage)
    return grown


def _lies_in(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return bool(tensor.untyped_storage()._cdata == storage._cdata)


def grow(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    """Return a larger storage with the same content, and zeros after it."""
    return fill(torch.zeros(nbytes, dtype=torch.uint8).untyped_storage(), storage)


def fill(grown: torch.UntypedStorage, storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy the content of a storage to the beginning of another one."""
    whole, before = (torch.empty(0, dtype=torch.uint8).set_(one) for one in (grown, storage))
    whole[: before.numel()].copy_(before)
    return grown
