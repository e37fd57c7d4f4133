"""Rules about the shapes and values of operands, in a notation of one letter a dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import attrs
import torch

from farpoint.errors import ProtocolError
from farpoint.limits import Limits
from farpoint.operations.table import Operation


@attrs.frozen(eq=False)
class Call:
    """The arguments of a call by name, and the sizes that shape rules have named so far."""

    operation: Operation
    values: Mapping[str, Any]
    limits: Limits
    sizes: dict[str, int] = attrs.field(factory=dict)
    groups: dict[str, tuple[int, ...]] = attrs.field(factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def tensor(self, name: str) -> torch.Tensor:
        value = self.values.get(name)
        if not isinstance(value, torch.Tensor):
            self.refuse(f"needs a tensor for its argument {name!r}")
        return value

    def require(self, holds: bool, text: str) -> None:
        if not holds:
            self.refuse(text)

    def refuse(self, text: str) -> NoReturn:
        raise ProtocolError(f"{self.operation.name} {text}")


Rule: TypeAlias = Callable[[Call], None]
"""Raises `ProtocolError` where a call breaks it."""


def shapes(pattern: str) -> Rule:
    """Return a rule like `grad=*hw self=*YX`: one letter a dimension, the same letter the same size everywhere.

    A capital is a size that must not be zero, a star stands for any number of dimensions, the same ones everywhere.
    Arguments that are None are passed over.
    """
    wanted = [tuple(part.split("=")) for part in pattern.split()]

    def rule(call: Call) -> None:
        for name, dims in wanted:
            if call.get(name) is not None:
                _match(call, name, dims)

    return rule


def _match(call: Call, name: str, dims: str) -> None:
    shape = tuple(call.tensor(name).shape)
    text = f"was sent {name!r} of shape {list(shape)}, which does not fit its other operands"
    before, star, after = dims.partition("*")
    fixed = len(before) + len(after)
    call.require(len(shape) == fixed or bool(star and len(shape) > fixed), text)
    end = len(shape) - len(after)
    if star:
        group = shape[len(before) : end]
        call.require(call.groups.setdefault("*", group) == group, text)
    named = zip(before + after, shape[: len(before)] + shape[end:], strict=True)
    for letter, size in named:
        call.require(call.sizes.setdefault(letter.lower(), size) == size, text)
        call.require(size > 0 or letter.islower(), text)


def bounded(name: str, letters: str, low: int = 0) -> Rule:
    """Return a rule that all values of a tensor are from `low` to below the product of the sizes that letters name."""

    def rule(call: Call) -> None:
        if call.get(name) is not None:
            check_values(call, name, low, math.prod(call.sizes[letter] for letter in letters))

    return rule


def check_values(call: Call, name: str, low: int, below: int) -> None:
    tensor = call.tensor(name)
    call.require(not tensor.is_floating_point() and not tensor.is_complex(), f"wants integers in {name!r}")
    if tensor.numel():
        least, most = (int(bound) for bound in torch.aminmax(tensor))
        call.require(
            low <= least and most < below, f"was sent {name!r} with values outside {low} to {below - 1}"
        )
