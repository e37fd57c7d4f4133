"""The parameters of an operation as its schema declares them, and how large their integers may be."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

import attrs

from farpoint.operations.rules import MAX_DEGREE
from farpoint.operations.table import Operation

MAX_DIMS: Final = 64
MAX_SIZE: Final = 2**40
MAX_WINDOW: Final = 2**31 - 1
MAX_TEXT: Final = 64
ANY: Final = 2**63


def _each(names: str, bound: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), bound)


# Bounds of integers by the name of the parameter. A name that is not here is bounded by MAX_WINDOW.
_BOUNDS: Final[dict[str, int]] = {
    **_each(
        "dim dims dim0 dim1 dim2 axis axis0 axis1 start_dim end_dim source destination ch_axis", MAX_DIMS
    ),
    **_each("physical_layout dims_self dims_other expand1 expand2 expand3 sumdim unroll_dim r", MAX_DIMS),
    **_each(
        "size sizes self_sizes input_size input_sizes output_size bias_sizes shape normalized_shape", MAX_SIZE
    ),
    **_each(
        "storage_offset offset length split_size split_sizes s last_dim_size steps n m window_length",
        MAX_SIZE,
    ),
    **_each("num_weights total_length N C HxW diagonal numel row col step shifts repeats", MAX_SIZE),
    **_each("minlength num_classes num_samples", MAX_SIZE),
    # Positions are clamped or compared by torch, and its own defaults use the whole range.
    **_each("start end from to low high index indices ignore_index padding_idx seed fill_value", ANY),
    # Enumerations of torch, which it switches over.
    **_each("reduction mode interpolation_mode padding_mode normalization compute_mode mask_type", 3),
    "bins": 2**24,
    "decimals": 400,
}

_WINDOWS: Final = frozenset({"kernel_size", "stride", "dilation", "groups"})

# Where the operation matters, not only the name of the parameter.
_BOUNDS_OF: Final[dict[tuple[str, str], int]] = {
    **{
        (base, "stride"): MAX_SIZE
        for base in ("as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter")
    },
    **{(base, "stride"): MAX_SIZE for base in ("empty_strided", "new_empty_strided")},
    ("unfold", "dimension"): MAX_DIMS,
    ("unfold_copy", "dimension"): MAX_DIMS,
    ("polygamma", "n"): 2**20,
    ("polygamma_", "n"): 2**20,
    # Materialises a range of p for each element.
    ("mvlgamma", "p"): MAX_DEGREE,
    ("mvlgamma_", "p"): MAX_DEGREE,
}


@attrs.frozen(eq=False)
class Parameter:
    """One parameter of a schema, read once.

    Attributes:
        name: Its name.
        wants: How the schema spells its type.
        leaf: The innermost type.
        optional: Whether None is a value.
        is_list: Whether it is a list. No operation of the table takes lists of lists.
        optional_items: Whether None may be an item of the list.
        fixed: Length of the list where the schema names one.
        required: Whether it has no default.
        bound: Largest absolute value of an integer.
        least: Smallest integer, where that is not the negative of `bound`.
        lengths: Lengths that a list of fixed size may have.
    """

    name: str
    wants: str
    leaf: str
    optional: bool
    is_list: bool
    optional_items: bool
    fixed: int | None
    required: bool
    bound: int
    least: int | None
    lengths: frozenset[int]


@attrs.frozen(eq=False)
class Signature:
    positional: tuple[Parameter, ...]
    by_name: dict[str, tuple[int, Parameter]]


@cache
def signature(operation: Operation) -> Signature:
    positional = []
    by_name = {}
    for position, argument in enumerate(operation.overload._schema.arguments):
        parameter = _parameter(operation, argument)
        by_name[parameter.name] = (position, parameter)
        if not argument.kwarg_only:
            positional.append(parameter)
    return Signature(tuple(positional), by_name)


def _parameter(operation: Operation, argument: Any) -> Parameter:
    # `type` writes dtypes, layouts and memory formats as int; `real_type` tells them apart.
    spelled = leaf = str(argument.real_type)
    optional, leaf = _unwrap(leaf, "Optional")
    is_list, leaf = _unwrap(leaf, "List")
    optional_items, leaf = _unwrap(leaf, "Optional") if is_list else (False, leaf)
    base = operation.name.partition("::")[2].partition(".")[0]
    bound = _BOUNDS_OF.get((base, argument.name), _BOUNDS.get(argument.name, MAX_WINDOW))
    return Parameter(
        name=argument.name,
        wants=f"{spelled} of {argument.N}" if argument.N else spelled,
        leaf={"SymInt": "int"}.get(leaf, leaf),
        optional=optional,
        is_list=is_list,
        optional_items=optional_items,
        fixed=argument.N,
        required=not argument.has_default_value(),
        bound=bound,
        # A window that goes backwards never ends.
        least=1 if argument.name in _WINDOWS and bound == MAX_WINDOW else None,
        lengths=_lengths(base, argument),
    )


def _lengths(base: str, argument: Any) -> frozenset[int]:
    lengths = {argument.N or 0}
    # Pooling takes one number for all dimensions, and no stride for the kernel's own size. Others index what they get.
    if re.search(r"(avg|max)_pool[123]d", base) and not base.startswith(
        ("adaptive", "_adaptive", "fractional")
    ):
        if argument.name in ("kernel_size", "stride", "padding", "dilation"):
            lengths.add(1)
        if argument.name == "stride":
            lengths.add(0)
    return frozenset(lengths)


def _unwrap(spelled: str, wrapper: str) -> tuple[bool, str]:
    if spelled.startswith(f"{wrapper}[") and spelled.endswith("]"):
        return True, spelled[len(wrapper) + 1 : -1]
    return False, spelled
