"""Command templates: the part of an operation that repeats, sent once and then named by its slot.

A template is an operation with its arguments, in which each tensor and each run-time number is a hole. In plain data an
argument is a list that begins with a tag: `["t"]` and `["s"]` are holes, `["c", value]` a constant,
`["l", item …]` a list, and `["complex", re, im]`, `["dtype", name]`, `["layout", name]`, `["format", name]`, `["device"]` the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from farpoint.errors import EncodeError, ProtocolError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.operations import Hole, Operation, check_arguments, lookup
from farpoint.tensors import DTYPE_NAMES, DTYPES

_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
    "preserve": torch.preserve_format,
}
_FORMAT_NAMES = {value: name for name, value in _FORMATS.items()}
_CPU = torch.device("cpu")


def encode_argument(value: Any) -> list[Any]:
    """Return an argument, with `Hole`s in it, as plain data.

    Raises:
        EncodeError: It is of a kind that cannot travel.
    """
    if value is Hole.TENSOR:
        return ["t"]
    if value is Hole.SCALAR:
        return ["s"]
    if value is None or isinstance(value, bool | int | float | str):
        return ["c", value]
    if isinstance(value, list | tuple):
        return ["l", *(encode_argument(item) for item in value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return ["dtype", DTYPE_NAMES[value]]
    if value is torch.strided:
        return ["layout", "strided"]
    if isinstance(value, torch.memory_format) and value in _FORMAT_NAMES:
        return ["format", _FORMAT_NAMES[value]]
    if isinstance(value, torch.device) and value.type == "cpu":
        return ["device"]
    if isinstance(value, torch.Generator):
        raise EncodeError("a worker draws from a random generator of its own, not from one that is here: worker.manual_seed(seed) seeds it")
    raise EncodeError(f"{value!r} of type {type(value).__name__} cannot be an argument of a remote operation")


def decode_argument(wire: Any) -> Any:
    """Return the argument that `encode_argument` made this of.

    Raises:
        ProtocolError: It is none.
    """
    if not isinstance(wire, list) or not wire:
        raise ProtocolError("an argument must be a list that begins with a tag")
    tag, *rest = wire
    try:
        match tag, rest:
            case "t", []:
                return Hole.TENSOR
            case "s", []:
                return Hole.SCALAR
            case "c", [bool() | int() | float() | str() | None as value]:
                return value
            case "l", items:
                return [decode_argument(item) for item in items]
            case "complex", [float() as real, float() as imaginary]:
                return complex(real, imaginary)
            case "dtype", [str() as name]:
                return DTYPES[name]
            case "layout", ["strided"]:
                return torch.strided
            case "format", [str() as name]:
                return _FORMATS[name]
            case "device", []:
                return _CPU
    except KeyError as error:
        raise ProtocolError(f"unknown {tag} {error}") from error
    raise ProtocolError(f"not an argument: {str(wire)[:100]}")


class Template:
    """An operation and its arguments with holes, checked once.

    Args:
        operation: What runs.
        args: Positional arguments as plain data.
        kwargs: Named arguments as plain data.

    Attributes:
        wire: What a DEFINE message carries of it.
        size: How many holes it has.
        tensors: Which of them are for tensors.
        numbers: Which are for numbers.
    """

    __slots__ = (
        *("__weakref__", "_args", "_kwargs", "_positions"),
        *("numbers", "operation", "size", "tensors", "wire"),
    )

    def __init__(self, operation: Operation, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.operation = operation
        self.wire = [operation.name, args, kwargs]
        self._args = [decode_argument(argument) for argument in args]
        self._kwargs = {name: decode_argument(argument) for name, argument in kwargs.items()}
        holes = [*_holes(self._args), *_holes(list(self._kwargs.values()))]
        self.size = len(holes)
        self.tensors = [i for i, hole in enumerate(holes) if hole is Hole.TENSOR]
        self.numbers = [i for i, hole in enumerate(holes) if hole is Hole.SCALAR]
        # Almost every call has its holes at the top of its positional arguments: those are filled without a walk.
        positions = [i for i, argument in enumerate(self._args) if isinstance(argument, Hole)]
        self._positions = positions if len(positions) == self.size else None

    @classmethod
    def from_wire(cls, name: Any, args: Any, kwargs: Any, limits: Limits = DEFAULT_LIMITS) -> Template:
        """Return the template that a peer defines.

        Raises:
            OperationNotAllowedError: The operation is not in the table.
            ProtocolError: Its arguments are not what its schema takes.
        """
        if not isinstance(name, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ProtocolError("a template must be [name, args, kwargs]")
        template = cls(lookup(name), args, kwargs)
        template.check(limits)
        return template

    def check(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check the arguments against the schema and the limits.

        Raises:
            ProtocolError: A worker would refuse them.
        """
        check_arguments(self.operation, self._args, self._kwargs, limits)

    def fill(self, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with the holes filled, in order.

        Args:
            values: One for each hole.
        """
        if self._positions is None:
            queue = iter(values)
            return [_fill(a, queue) for a in self._args], {n: _fill(a, queue) for n, a in self._kwargs.items()}
        if len(self._args) == self.size:
            return values, self._kwargs
        args = self._args.copy()
        for hole, position in enumerate(self._positions):
            args[position] = values[hole]
        return args, self._kwargs


def _holes(arguments: list[Any]) -> list[Hole]:
    found: list[Hole] = []
    for argument in arguments:
        if isinstance(argument, Hole):
            found.append(argument)
        elif isinstance(argument, list):
            found += _holes(argument)
    return found


def _fill(argument: Any, values: Iterator[Any]) -> Any:
    if isinstance(argument, Hole):
        return next(values)
    return [_fill(item, values) for item in argument] if isinstance(argument, list) else argument
