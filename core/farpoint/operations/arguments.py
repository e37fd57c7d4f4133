"""The arguments of one call, checked against the schema and against what is known to crash or hang torch.

`check_arguments` sees a call before its tensors and run-time numbers are filled in, so a call that is repeated with other
operands is checked once. `check_scalar` looks at a run-time number; `operands.py` looks at the tensors.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import torch

from farpoint.errors import ProtocolError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.operations.parameters import ANY, MAX_DIMS, MAX_SIZE, MAX_TEXT, Parameter, signature
from farpoint.operations.rules import MAX_DEGREE
from farpoint.operations.table import Operation
from farpoint.tensors import DTYPE_NAMES


class Hole(enum.Enum):
    """What stands in a tree of arguments for a value that is filled in when the call runs."""

    TENSOR = "a tensor"
    SCALAR = "a number"


_CPU: Final = torch.device("cpu")
_PRODUCT: Final = 2**62


# Lists whose length is the number of results, or grows with a tensor; other lists have an item a dimension.
_LONG_LISTS: Final = frozenset({"split_sizes", "indices"})
_LENGTH_LISTS: Final = frozenset(
    {"input_lengths", "target_lengths", "path", "range", "scalars", "bins", "spacing"}
)

_POLYNOMIAL: Final = re.compile(r"aten::special_\w+_polynomial_\w+\.")


def check_arguments(
    operation: Operation,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Check the arguments of a call that a peer asks for.

    Args:
        operation: What is to be called.
        args: Positional arguments, with a `Hole` for each tensor and each number that is filled in later.
        kwargs: The same by name.
        limits: How many tensors and results there may be.

    Raises:
        ProtocolError: The schema does not take them, or they are beyond what is safe to give to torch.
    """
    known = signature(operation)
    if len(args) > len(known.positional):
        raise ProtocolError(
            f"{operation.name} takes {len(known.positional)} positional arguments, and {len(args)} were sent"
        )
    for parameter, value in zip(known.positional, args, strict=False):
        _check(operation, parameter, value, limits)
    for name, value in kwargs.items():
        if name not in known.by_name:
            raise ProtocolError(f"{operation.name} has no argument {str(name)[:MAX_TEXT]!r}")
        position, parameter = known.by_name[name]
        if position < len(args):
            raise ProtocolError(f"{operation.name} was sent its argument {name!r} twice")
        _check(operation, parameter, value, limits)
    for name, (position, parameter) in known.by_name.items():
        if parameter.required and position >= len(args) and name not in kwargs:
            raise ProtocolError(
                f"{operation.name} needs its argument {name!r}: {parameter.wants}, and none was sent"
            )
    combined = _COMBINED.get(operation.name.partition(".")[0])
    if combined is not None:
        given = {parameter.name: value for parameter, value in zip(known.positional, args, strict=False)}
        combined(operation, {**given, **kwargs})


def check_scalar(operation: Operation, value: object) -> None:
    """Check a number that is filled into a call at run time.

    Raises:
        ProtocolError: It is no plain number, or one that torch does not survive.
    """
    kind = type(value)
    if kind is float or kind is bool or kind is complex:
        number: Any = value
    elif kind is int:
        number = value
        if not -ANY <= number < ANY:
            raise ProtocolError(f"{operation.name} was sent an integer beyond 64 bits")
    else:
        raise ProtocolError(
            f"{operation.name} was sent {_kind(value)}, where it wants a bool, int, float or complex"
        )
    if _POLYNOMIAL.match(operation.name) and kind is not complex and _beyond(number, MAX_DEGREE):
        # Its recurrence takes one step for each degree, for each element.
        raise ProtocolError(f"{operation.name} was sent {number!r}, and a degree may be at most {MAX_DEGREE}")


def _kind(value: object) -> str:
    if isinstance(value, Hole):
        return value.value
    if value is None:
        return "None"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if type(value) in (bool, int, float, complex, str):
        return (
            f"the {type(value).__name__} {str(value)[:40]!r}"
            if _short(value)
            else f"a huge {type(value).__name__}"
        )
    return f"a {type(value).__name__}"


def _short(value: object) -> bool:
    # The decimal form of a huge integer takes quadratic time, and beyond 4300 digits raises.
    return not isinstance(value, int) or value.bit_length() <= 128


def _beyond(value: float, bound: float) -> bool:
    return not math.isfinite(value) or abs(value) > bound


def _wrong(operation: Operation, parameter: Parameter, value: object) -> NoReturn:
    raise ProtocolError(
        f"{operation.name} wants {parameter.wants} for its argument {parameter.name!r}, and {_kind(value)} was sent"
    )


def _check(operation: Operation, parameter: Parameter, value: object, limits: Limits) -> None:
    if value is None:
        if not parameter.optional:
            _wrong(operation, parameter, value)
        return
    if not parameter.is_list:
        _check_leaf(operation, parameter, value)
        return
    if not isinstance(value, list | tuple):
        # int[2] takes one int for both.
        if parameter.fixed is None or parameter.leaf not in ("int", "float"):
            _wrong(operation, parameter, value)
        _check_leaf(operation, parameter, value)
        return
    _check_length(operation, parameter, value, limits)
    _check_items(operation, parameter, value)
    if parameter.leaf != "int":
        return
    product = math.prod(abs(item) or 1 for item in value)
    if parameter.bound == MAX_SIZE and product > _PRODUCT:
        raise ProtocolError(f"{operation.name} was sent {parameter.name!r} whose product overflows 62 bits")
    if parameter.name == "bins" and product > parameter.bound:
        raise ProtocolError(f"{operation.name} was sent more than {parameter.bound} bins")


def _check_length(
    operation: Operation, parameter: Parameter, value: Sequence[object], limits: Limits
) -> None:
    length = len(value)
    if parameter.leaf == "bool":
        if parameter.fixed is not None and length != parameter.fixed:
            _wrong(operation, parameter, value)
        allowed = MAX_DIMS
    elif parameter.leaf == "Tensor":
        allowed = limits.tensor_list
    elif parameter.name in _LONG_LISTS:
        allowed = limits.results
    elif parameter.name in _LENGTH_LISTS:
        allowed = limits.array_items
    else:
        allowed = MAX_DIMS
        # int[1] is how a schema spells "a list, or one int".
        if parameter.fixed is not None and parameter.fixed > 1 and length not in parameter.lengths:
            _wrong(operation, parameter, value)
    if length > allowed:
        raise ProtocolError(
            f"{operation.name} takes at most {allowed} items in {parameter.name!r}, and {length} were sent"
        )


def _check_items(operation: Operation, parameter: Parameter, value: Sequence[object]) -> None:
    for item in value:
        if item is None and parameter.optional_items:
            continue
        elif parameter.leaf == "Tensor" and item is not Hole.TENSOR:
            _wrong(operation, parameter, item)
        else:
            _check_leaf(operation, parameter, item)


def _check_leaf(operation: Operation, parameter: Parameter, value: object) -> None:
    check = _LEAVES.get(parameter.leaf)
    if check is None:
        raise ProtocolError(
            f"{operation.name} wants {parameter.wants} for its argument {parameter.name!r}, which no peer may send"
        )
    check(operation, parameter, value)


def _check_tensor(operation: Operation, parameter: Parameter, value: object) -> None:
    # Below autograd `x + 2` is add.Tensor(x, 2): torch takes a number wherever it takes one tensor.
    if value is Hole.TENSOR:
        return
    if parameter.name in operation.written_names:
        _wrong(operation, parameter, value)
    if value is Hole.SCALAR:
        return
    if type(value) not in (bool, int, float, complex):
        _wrong(operation, parameter, value)
    check_scalar(operation, value)


def _check_number(operation: Operation, parameter: Parameter, value: object) -> None:
    if value is Hole.SCALAR and (
        parameter.name in operation.scalar_names or _at_run_time(operation, parameter)
    ):
        return
    if type(value) not in (bool, int, float, complex):
        _wrong(operation, parameter, value)
    check_scalar(operation, value)


def _check_float(operation: Operation, parameter: Parameter, value: object) -> None:
    if value is not Hole.SCALAR and type(value) not in (float, int):
        _wrong(operation, parameter, value)
    _check_number(operation, parameter, value)


def _at_run_time(operation: Operation, parameter: Parameter) -> bool:
    position, _ = signature(operation).by_name[parameter.name]
    return position in operation.scalar_positions


def _check_int(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not int:
        _wrong(operation, parameter, value)
    bound = parameter.bound
    least = parameter.least if parameter.least is not None else -bound
    within = least <= value < bound if bound == ANY else least <= value <= bound
    if not within:
        raise ProtocolError(
            f"{operation.name} was sent {_kind(value)} for {parameter.name!r}, which may be at least {least} "
            f"and at most {bound}"
        )


def _check_bool(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not bool:
        _wrong(operation, parameter, value)
    if value and parameter.name == "pin_memory":
        raise ProtocolError(f"{operation.name} was sent pin_memory=True, and a worker pins no memory")


def _check_text(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not str:
        _wrong(operation, parameter, value)
    if len(value) > MAX_TEXT:
        raise ProtocolError(
            f"{operation.name} takes at most {MAX_TEXT} characters for {parameter.name!r}, and {len(value)} were sent"
        )


def _check_dtype(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not torch.dtype:
        _wrong(operation, parameter, value)
    if value not in DTYPE_NAMES:
        raise ProtocolError(
            f"{operation.name} was sent {value} for {parameter.name!r}, a dtype that does not travel"
        )


def _check_layout(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not torch.layout:
        _wrong(operation, parameter, value)
    if value is not torch.strided:
        raise ProtocolError(
            f"{operation.name} was sent {value} for {parameter.name!r}, and workers keep strided tensors only"
        )


def _check_memory_format(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not torch.memory_format:
        _wrong(operation, parameter, value)


def _check_device(operation: Operation, parameter: Parameter, value: object) -> None:
    if type(value) is not torch.device:
        _wrong(operation, parameter, value)
    if value != _CPU:
        raise ProtocolError(
            f"{operation.name} was sent device {value}, and this worker computes on {_CPU} only"
        )


_LEAVES: Final[dict[str, Callable[[Operation, Parameter, object], None]]] = {
    "Tensor": _check_tensor,
    "number": _check_number,
    "float": _check_float,
    "int": _check_int,
    "bool": _check_bool,
    "str": _check_text,
    "ScalarType": _check_dtype,
    "Layout": _check_layout,
    "MemoryFormat": _check_memory_format,
    "Device": _check_device,
}
"""What is checked for each type of a schema. A type that is not here (Generator, Storage, Stream ...) takes None or nothing."""


def _check_range(operation: Operation, given: Mapping[str, object]) -> None:
    end: Any = given.get("end", 0)
    start: Any = given.get("start", 0)
    step: Any = given.get("step", 1)
    if any(isinstance(value, complex) or _beyond(value, ANY) for value in (start, end, step)) or step == 0:
        raise ProtocolError(f"{operation.name} wants finite real numbers and a step that is not zero")
    if abs(end - start) > abs(step) * MAX_SIZE:
        raise ProtocolError(
            f"{operation.name} from {start!r} to {end!r} by {step!r} has more than {MAX_SIZE} elements"
        )


_COMBINED: Final[dict[str, Callable[[Operation, Mapping[str, object]], None]]] = {
    "aten::arange": _check_range,
    "aten::range": _check_range,
}
