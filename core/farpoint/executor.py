"""Runs one operation on tensors of this worker."""

from __future__ import annotations

from typing import Any

from farpoint.operations import UNINITIALISED, check_operands, check_scalar
from farpoint.template import Template


def execute(template: Template, tensors: list[Any], scalars: list[Any]) -> Any:
    """Return what the operation returns.

    Args:
        template: The operation, checked when it was defined.
        tensors: A value for each tensor hole, in order.
        scalars: A number for each number hole.

    Raises:
        ProtocolError: The values do not fit the template.
        Exception: Whatever torch raises.
    """
    operation = template.operation
    for position, scalar in enumerate(scalars):
        if isinstance(scalar, list):  # a complex number travels as its two parts
            scalars = [*scalars[:position], complex(*scalar), *scalars[position + 1 :]]
        else:
            check_scalar(operation, scalar)
    args, kwargs = template.fill(tensors, scalars)
    check_operands(operation, tensors, args, kwargs)
    result = operation.overload(*args, **kwargs)
    if operation.name in UNINITIALISED:
        result.untyped_storage().fill_(0)
    return result


def leaves(result: Any) -> list[Any]:
    """Return the values of a result in order, out of tuples and lists."""
    if isinstance(result, tuple | list):
        return [leaf for item in result for leaf in leaves(item)]
    return [result]
