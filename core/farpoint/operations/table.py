"""The frozen table of operators that a worker executes, and what callers need to know about each.

The table is `aten.txt`, beside this file. Plugins add operators of namespaces of their own. Nothing that arrives from a
peer is looked up anywhere else, so an operator that is not listed does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch._ops import OpOverload

from farpoint.errors import OperationNotAllowedError, PluginError
from farpoint.plugins import plugins

UNINITIALISED: Final[frozenset[str]] = frozenset(
    f"aten::{name}"
    for name in (
        "empty.memory_format",
        "empty_like.default",
        "empty_permuted.default",
        "empty_strided.default",
        "new_empty.default",
        "new_empty_strided.default",
    )
)
"""Operations that return memory they have not written. It held somebody's values before, so whoever runs one for a peer
clears the result's whole storage: a strided result has gaps between its elements that a view would show."""

_READ_ONLY = frozenset({("aten::_fused_adagrad_.default", "state_steps")})
"""Arguments that a schema marks as written, though the kernel reads them only: they may be local, as those of `_fused_adam_`."""

RESIZING: Final = frozenset({"aten::resize_.default", "aten::resize_as_.default"})
"""Operations that resize an operand. A worker does not let torch do it: see `farpoint.resizing`."""

# Names in a schema cannot say it: the value of these Scalars is the shape.
_SHAPED_BY_SCALARS = re.compile(r"aten::(arange|range)\.")

# Outputs whose shape depends on values (or, for histogram, that torch cannot infer without them) and which carry no tag.
_DATA_DEPENDENT = re.compile(
    r"aten::(masked_select|_?unique\w*|nonzero|argwhere|bincount|histogram\w*|_histogramdd\w*|_ctc_loss|linalg_lstsq|"
    r"_pack_padded_sequence|one_hot|cov\.|narrow\.Tensor|tensor_split\.tensor\w*|index\.Tensor|_unsafe_index\.|repeat_interleave\.(Tensor|self_Tensor))\b"
)
_REGISTERING: Final = ("torch.nn.modules.linear_cross_entropy",)
_DATA_TAGS = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
_NUMBERS = frozenset({"number", "float", "Optional[number]", "Optional[float]"})


@attrs.frozen(eq=False)
class Operation:
    """One overload of an operator, and what its schema says about it.

    Attributes:
        name: Like `aten::add.Tensor`, always with the overload, `default` spelled out.
        overload: The operator.
        call: What runs it: what the overload itself calls, without a Python frame in between.
        scalar_positions: Positional arguments that are numbers whose value never decides the shape or dtype of a result.
            Only their Python type may decide the dtype.
        scalar_names: The same for keyword-only arguments.
        written: Positions of the arguments that the operation writes to.
        written_names: Names of all arguments that it writes to, keyword-only ones included.
        data_dependent: The shape of its result depends on the values of its operands. It is set for `aten::index.Tensor`
            too, although only boolean and uint8 indices make it so there.
        random: It draws from a random generator.
        metadata_writing: It changes the shape or strides of an operand, as `t_` does.
    """

    name: str
    overload: OpOverload[Any, Any]
    call: Callable[..., Any]
    scalar_positions: frozenset[int]
    scalar_names: frozenset[str]
    written: frozenset[int]
    written_names: frozenset[str]
    data_dependent: bool
    random: bool
    metadata_writing: bool


def lookup(name: str) -> Operation:
    """Return the operation of a name that may come from a peer.

    Raises:
        OperationNotAllowedError: It is not in the table.
    """
    known = _by_name.get(name)
    if known is not None:
        return known
    if name not in _aten_names() and name not in _plugin_names():
        raise _refusal(name)
    operation = _describe(name, _resolve(name))
    _by_name[name] = operation
    _by_overload[operation.overload] = operation
    return operation


def of(overload: OpOverload[Any, Any]) -> Operation:
    """Return the operation that an overload is.

    Raises:
        OperationNotAllowedError: It is not in the table.
    """
    known = _by_overload.get(overload)
    if known is not None:
        return known
    return lookup(_spell(overload))


def names() -> frozenset[str]:
    """Return the names of everything that a worker of this process executes."""
    return _aten_names() | _plugin_names()


_by_name: dict[str, Operation] = {}
_by_overload: dict[OpOverload[Any, Any], Operation] = {}


@cache
def _aten_names() -> frozenset[str]:
    # Torch registers what a few of its own functions are made of in namespaces of their own, when they are first used.
    for module in _REGISTERING:
        try:
            import_module(module)
        except ImportError:  # an older torch has neither
            pass
    listed = Path(__file__).with_name("aten.txt").read_text(encoding="utf-8").split("\n")
    installed = frozenset(torch._C._dispatch_get_all_op_names())
    return frozenset(
        line
        for line in listed
        if line and not line.startswith("#") and line.removesuffix(".default") in installed
    )


def _plugin_names() -> frozenset[str]:
    found: set[str] = set()
    for record in plugins.operators():
        for name in record.operators:
            # A plugin vouches for its own operators; the review of torch's is not for it to overrule.
            if record.name in ("aten", "prim", "prims") or not re.fullmatch(
                rf"{re.escape(record.name)}::\w+\.\w+", name
            ):
                expected = f"like '{record.name}::scale.default', in a namespace of the plugin's own"
                raise PluginError(
                    "operator", name, f"plugin {record.name!r} may only name operators {expected}"
                )
            found.add(name)
    return frozenset(found)


def _refusal(name: str) -> OperationNotAllowedError:
    return OperationNotAllowedError(
        worker="this worker",
        action=str(name)[:100],
        reason="it is not in the table of operations that workers execute",
    )


def _spell(overload: OpOverload[Any, Any]) -> str:
    if not isinstance(overload, OpOverload):
        raise _refusal(str(overload))
    name = str(overload.name())  # type: ignore[no-untyped-call]
    return name if "." in name else f"{name}.default"


def _resolve(name: str) -> OpOverload[Any, Any]:
    namespace, _, rest = name.partition("::")
    base, _, which = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), base), which)
    except AttributeError as error:
        raise PluginError("operator", name, f"it is not registered in torch.ops.{namespace}") from error
    if not isinstance(found, OpOverload):
        raise _refusal(name)
    return found


def _describe(name: str, overload: OpOverload[Any, Any]) -> Operation:
    arguments = overload._schema.arguments
    shaped = _SHAPED_BY_SCALARS.match(name) is not None
    numbers = [] if shaped else [(i, a) for i, a in enumerate(arguments) if str(a.type) in _NUMBERS]
    written = [
        (i, a)
        for i, a in enumerate(arguments)
        if a.alias_info is not None and a.alias_info.is_write and (name, a.name) not in _READ_ONLY
    ]
    tags = frozenset(overload.tags)
    return Operation(
        name=name,
        overload=overload,
        call=overload._op,
        scalar_positions=frozenset(i for i, argument in numbers if not argument.kwarg_only),
        scalar_names=frozenset(argument.name for _, argument in numbers if argument.kwarg_only),
        written=frozenset(i for i, _ in written),
        written_names=frozenset(argument.name for _, argument in written),
        data_dependent=bool(tags & _DATA_TAGS) or _DATA_DEPENDENT.match(name) is not None,
        random=torch.Tag.nondeterministic_seeded in tags,
        metadata_writing=torch.Tag.inplace_view in tags,
    )
