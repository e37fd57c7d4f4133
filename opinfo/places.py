"""Where operands are: on one worker, or at the end of a chain of two."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

import farpoint
from farpoint import VirtualWorker


def seed() -> None:
    """Let the next random numbers be the same ones, here and on the workers, each of which has a generator of its own."""
    farpoint.manual_seed(0)
    random.seed(0)


class Place:
    """Workers of this process, and the way to send tensors to the last of them.

    Args:
        hops: How many workers a pointer leads over.
    """

    def __init__(self, hops: int = 1) -> None:
        self._workers = [VirtualWorker(id=f"opinfo-{number}") for number in range(hops)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in reversed(self._workers):
            worker.close()

    def settle(self) -> None:
        """Forget the errors that nobody looked at: a failed sample leaves some."""
        for worker in self._workers:
            while True:
                try:
                    worker.synchronize()
                    break
                except farpoint.FarpointError:
                    continue

    def send(self, tensor: torch.Tensor) -> Any:
        """Return a pointer to a copy of a tensor."""
        pointer: Any = tensor
        for worker in self._workers:
            pointer = farpoint.send(pointer, worker)
        return pointer

    def fetch(self, pointer: Any) -> torch.Tensor:
        """Return a copy of what a pointer leads to."""
        for _ in self._workers:
            pointer = pointer.get(keep=True)
        value: torch.Tensor = pointer
        return value

    def stored(self, pointer: Any) -> torch.Tensor | None:
        """Return the tensor that the worker has, if it is the first one."""
        if len(self._workers) > 1:
            return None
        value: torch.Tensor | None = self._workers[0]._worker.store.get(pointer.id_at_location)
        return value


def copies(structure: Any, send: Callable[[torch.Tensor], Any]) -> Any:
    """Return arguments with every tensor copied, its strides, its bits and what it shares with others included.

    What is sent is the storage. The tensor is made of it again by `as_strided`, so that operations meet the layouts that
    the database has thought of.

    Args:
        structure: Arguments of a call.
        send: What copies a storage, as a tensor of one dimension.
    """
    bases: dict[tuple[int, torch.dtype], Any] = {}

    def copy(tensor: torch.Tensor) -> Any:
        if tensor.layout is not torch.strided:
            return send(tensor.detach())
        plain = tensor.detach()
        if tensor.is_conj():
            plain = plain.conj()
        if tensor.is_neg():
            plain = torch._neg_view(plain)
        storage = plain.untyped_storage()
        if plain.stride() == torch.empty(plain.shape, device="meta").stride() and plain.nbytes == storage.nbytes():
            base, made = None, send(plain)
        else:
            key = (storage._cdata, plain.dtype)
            base = bases.get(key)
            if base is None:
                whole = torch.empty(0, dtype=plain.dtype).set_(storage)
                base = bases[key] = send(whole)
            made = base.as_strided(plain.shape, plain.stride(), int(plain.storage_offset()))
        if tensor.is_conj():
            made = made.conj()
        if tensor.is_neg():
            made = torch._neg_view(made)
        return made.detach().requires_grad_(tensor.requires_grad) if tensor.requires_grad or base is not None else made

    return pytree.tree_map_only(torch.Tensor, copy, structure)
