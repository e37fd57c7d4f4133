"""How large a new tensor will be, before an operation makes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from farpoint.template import Template

_META: Final = torch.device("meta")
_known: WeakKeyDictionary[Template, int] = WeakKeyDictionary()
_TOO_LARGE: Final = 2**58


def forecast(template: Template, values: list[Any]) -> int:
    """Return the bytes of what an operation without operands returns, 0 if it makes nothing but numbers.

    They are the same at every run of a template: no number that is filled in decides a shape.

    Args:
        template: The operation.
        values: What fills its holes: numbers.

    Raises:
        Exception: What torch raises for such arguments.
    """
    found = _known.get(template)
    if found is None:
        operation = template.operation
        if not any(argument.name == "device" for argument in operation.overload._schema.arguments):
            return 0
        args, kwargs = template.fill([complex(*value) if type(value) is list else value for value in values])
        # Torch multiplies in 64 bits, and does not always look whether that was enough.
        found = count_elements(operation.name, args)
        if found < _TOO_LARGE:
            with torch.no_grad():
                found = operation.overload(*args, **{**kwargs, "device": _META}).untyped_storage().nbytes()
        _known[template] = found
    return found


def count_elements(name: str, args: Sequence[Any]) -> int:
    """Return how many elements an operation without operands makes at least, as far as its sizes say so."""
    if name.startswith(("aten::eye.", "aten::tril_indices.", "aten::triu_indices.")):
        rows, columns = args[0], args[name != "aten::eye.default"]
        return int(max(rows, 0) * max(columns, 0))
    sizes = next((argument for argument in args if isinstance(argument, list)), [])
    return math.prod(max(size, 0) for size in sizes)
