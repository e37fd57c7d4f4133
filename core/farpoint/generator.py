"""The random generator of a worker: how operations draw from it, and from no other."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch._ops import OpOverload

from farpoint.operations import Operation

_default = threading.Lock()

# The overload that takes a generator, of those that do not.
_SIBLINGS: Final = {
    "default": "generator",
    "out": "generator_out",
    "low": "low_generator",
    "low_out": "low_generator_out",
    "low_dtype": "low_generator_dtype",
}
_ways: dict[Operation, tuple[Any, int] | None] = {}


def new_generator() -> torch.Generator:
    """Return a generator that nobody can foresee: torch gives every new one the same seed."""
    generator = torch.Generator()
    generator.seed()
    return generator


def check_seed(seed: object) -> int:
    """Return a seed as it travels, from 0 to 2**64 - 1. Torch counts negative ones from the end, and so does this.

    Raises:
        ValueError: It is none that `torch.manual_seed` takes.
    """
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        shown = "an int out of range" if type(seed) is int else f"{seed!r:.40} of type {type(seed).__name__}"
        raise ValueError(f"a seed is an int from -2**63 to 2**64 - 1, as torch.manual_seed takes it, and this is {shown}")
    return seed % 2**64


def draw(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], generator: torch.Generator) -> Any:
    """Run an operation that draws random numbers, with a generator in place of torch's own.

    Torch's own is also that of whoever else computes in this process, on any thread, and kernels run without the interpreter's
    lock. So the generator is an argument, of the operation itself or of its sibling that takes one, which draws the same. Only
    an operation that has neither runs with torch's own, which is then put in this generator's state and back; another thread
    that draws meanwhile would be in its way. Of torch's operations that is `native_dropout`, which nothing calls on a CPU.
    """
    try:
        way = _ways[operation]
    except KeyError:
        way = _ways[operation] = _way(operation.overload)
    if way is None:
        return _swapped(operation, args, kwargs, generator)
    call, position = way
    if len(args) > position:
        return call(*args[:position], generator, *args[position + 1 :], **kwargs)
    return call(*args, **{**kwargs, "generator": generator})


def _way(overload: OpOverload[Any, Any]) -> tuple[Any, int] | None:
    """Return what to call, and at which position of its arguments a generator may be."""
    sibling = getattr(overload._overloadpacket, _SIBLINGS.get(overload._overloadname, ""), None)
    for found in (overload, sibling):
        if isinstance(found, OpOverload):
            for position, argument in enumerate(found._schema.arguments):
                if "Generator" in str(argument.type):
                    return found._op, position
    return None


def _swapped(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], generator: torch.Generator) -> Any:
    with _default:
        own = torch.default_generator
        before = own.get_state()
        own.set_state(generator.get_state())
        try:
            return operation.call(*args, **kwargs)
        finally:
            generator.set_state(own.get_state())
            own.set_state(before)
