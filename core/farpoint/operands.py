"""The operands of one operation: what a call with pointers brings, and where it leads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from farpoint import gate
from farpoint.errors import NotColocatedError
from farpoint.inference import Layout
from farpoint.operations import Operation
from farpoint.route import Route
from farpoint.spec import spec_of

if TYPE_CHECKING:
    from farpoint.pointer import PointerTensor


class Operands:
    """What one call brings.

    Args:
        pointers: The class of pointers.
        func: The overload that is called.
        layout: What is known of it.
        place: Where it runs if no pointer is among its operands.

    Attributes:
        key: What its signature depends on.
        tensors: Its tensors, in order.
        values: What fills the holes of its template, in order: ids, and numbers.
        route: Where it runs, and all pointers among the tensors lead.
    """

    __slots__ = ("_func", "_pointers", "key", "route", "tensors", "values")

    def __init__(self, pointers: type[PointerTensor], func: Any, layout: Layout, place: Route | None) -> None:
        self._pointers = pointers
        self._func = func
        self.key: list[Any] = [layout]
        self.route = place
        self.tensors: list[Any] = []
        self.values: list[Any] = []

    def take(self, value: Any, run_time: bool) -> None:
        """Take an argument.

        Args:
            value: What the operation was called with.
            run_time: Whether a number in this place is a hole.
        """
        kind = type(value)
        if kind is self._pointers:
            if value._route is not self.route:
                self._join(value)
            self.key.append(value._spec)
            self.tensors.append(value)
            self.values.append(value._reference.id)
        elif kind is float or kind is int or kind is bool or kind is complex:
            self.key.append(kind)
            if not run_time:
                self.key.append(value)
            elif kind is complex:
                self.values.append([value.real, value.imag])
            else:
                self.values.append(value)
        elif value is None or kind is str:
            self.key.append(value)
        elif isinstance(value, list | tuple):
            self.key.append("(")
            for item in value:
                self.take(item, run_time)
            self.key.append(")")
        elif isinstance(value, torch.Tensor):
            self.key.append(spec_of(value))
            self.tensors.append(value)
            # Not the user's own argument, which the gate has seen: a constant of a formula, shipped along.
            self.values.append(value.detach().clone().contiguous())
        else:
            self.key.append(value)

    def _join(self, pointer: PointerTensor) -> None:
        gate.check_live(pointer)
        if self.route is not None:
            raise gate.elsewhere(self._func, next(t for t in self.tensors if type(t) is self._pointers), pointer)
        self.route = pointer._route

    def refuse_local_writes(self, operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check that what the operation writes to is a pointer."""
        written = [args[i] for i in operation.written if i < len(args)]
        written += [kwargs[name] for name in operation.written_names if name in kwargs]
        for value in pytree.tree_leaves(written):
            if isinstance(value, torch.Tensor) and type(value) is not self._pointers:
                raise NotColocatedError(
                    str(self._func), "a local tensor that would be written to", "a pointer", "send the local tensor first"
                )
