"""Runs one operation on tensors of this worker."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from farpoint.generator import draw, new_generator
from farpoint.operations import UNINITIALISED, check_operands, check_scalar
from farpoint.template import Template


def execute(template: Template, values: list[Any], generator: torch.Generator) -> Any:
    """Return what the operation returns.

    Args:
        template: The operation, checked when it was defined.
        values: What fills its holes: tensors, and numbers that are not checked yet.
        generator: What it draws random numbers from.

    Raises:
        ProtocolError: The values do not fit the template.
        Exception: Whatever torch raises.
    """
    operation = template.operation
    for hole in template.numbers:
        number = values[hole]
        if type(number) is list:  # a complex number travels as its two parts
            values[hole] = complex(*number)
        else:
            check_scalar(operation, number)
    args, kwargs = template.fill(values)
    check_operands(operation, values, args, kwargs)
    result = draw(operation, args, kwargs, generator) if operation.random else operation.call(*args, **kwargs)
    if operation.name in UNINITIALISED:
        result.untyped_storage().fill_(0)
    return result


class Executor(Protocol):
    """What runs the operations of one session."""

    def execute(self, template: Template, values: list[Any]) -> Any:
        """Return what an operation returns. See the function `execute`."""

    def seed(self, seed: int) -> None:
        """Let the next random numbers be those that follow a seed."""

    def rest(self) -> None:
        """Keep nothing but the random generator until the next operation."""

    def close(self) -> None:
        """Run no more."""


class InProcess:
    """Runs them here, on the thread that asks: those of all sessions of a worker, which share its random generator."""

    def __init__(self) -> None:
        self._generator = new_generator()

    def execute(self, template: Template, values: list[Any]) -> Any:
        return execute(template, values, self._generator)

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def leaves(result: Any) -> list[Any]:
    """Return the values of a result in order, out of tuples and lists."""
    if type(result) is not tuple and type(result) is not list:
        return [result]
    return [leaf for item in result for leaf in leaves(item)]
