"""What an operation will return, known before it runs: cached on its operator, operand specs and constants."""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from farpoint.errors import OperationNotAllowedError, ProtocolError, ResizedOutputError
from farpoint.operations import Hole, Operation, of
from farpoint.spec import TensorSpec, spec_of
from farpoint.surroundings import plain
from farpoint.template import Template, encode_argument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_SIGNATURES = 16_384
_REAL_BYTES = 64 * 2**20
_SMALL_BYTES = 64 * 2**10
_NUMBERS = (bool, int, float, complex)
# What kernels say of operands whose dtypes they do not take; inference takes many of them.
_ABOUT_TYPES = re.compile(r"not implemented for|dtype|data type|scalar ?type|expected .* (?:type|Long|Int|Float|Double|Bool)\b", re.IGNORECASE)


class Layout:
    """Where the holes of an operator's arguments are."""

    __slots__ = ("operation", "run_time", "run_time_names")

    def __init__(self, overload: OpOverload[Any, Any]) -> None:
        self.operation: Operation = of(overload)
        arguments = overload._schema.arguments
        # A number in place of a tensor, as in `x + 2`, never decides a shape either.
        self.run_time = self.operation.scalar_positions | {
            i for i, a in enumerate(arguments) if str(a.type) == "Tensor" and not a.kwarg_only
        }
        self.run_time_names = self.operation.scalar_names


class Signature:
    """One operator with the specs of its operands and its constants: what to send, and what comes back.

    Attributes:
        template: What is sent.
        outputs: A `TensorSpec` for a new tensor, an `int` for an operand that is returned, None for nothing; or None as a
            whole if the worker must be asked.
        structure: How the outputs are nested, None for a single one.
        changed: Operands whose metadata the operation changes, with their new specs.
        resized: Outputs that must be resized before it runs: torch would do it on its way, without looking who shares their memory.
        only: The spec of the one new tensor, if that is all there is, as it is for almost every operation.
        nbytes: Bytes of the new tensors.
        count: How many there are where the worker must be asked, None if that is not known either.
        is_list: Whether they come as a list there.
    """

    __slots__ = ("changed", "count", "is_list", "nbytes", "only", "outputs", "resized", "structure", "template")

    def __init__(self, template: Template, count: int | None, is_list: bool) -> None:
        self.template = template
        self.count = count
        self.is_list = is_list
        self.outputs: list[Any] | None = None
        self.structure: Any = None
        self.changed: list[tuple[int, TensorSpec]] = []
        self.resized: list[tuple[int, TensorSpec]] = []
        self.only: TensorSpec | None = None
        self.nbytes = 0


_layouts: dict[int, Layout] = {}
_signatures: dict[tuple[Any, ...], Signature] = {}
_templates: WeakValueDictionary[str, Template] = WeakValueDictionary()


def layout_of(overload: OpOverload[Any, Any]) -> Layout:
    """Return where the holes of an operator are.

    Raises:
        OperationNotAllowedError: No worker executes it.
    """
    # By identity, which the layout keeps alive: the hash of an overload is written in Python.
    found = _layouts.get(id(overload))
    if found is None:
        found = _layouts[id(overload)] = Layout(overload)
    return found


def signature_of(
    key: tuple[Any, ...], layout: Layout, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]
) -> Signature:
    """Return the signature of a call, from the cache if it was seen before.

    Args:
        key: Layout of the operator, specs and constants.
        layout: The operator.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        tensors: The tensors among them, in order.

    Raises:
        Exception: What torch raises for such arguments, in its own words.
    """
    found = _signatures.get(key)
    if found is None:
        specs: list[TensorSpec] = [t._spec if hasattr(t, "_spec") else spec_of(t) for t in tensors]
        holed = [_empty(a) for a in args]
        named = {name: _empty(a) for name, a in kwargs.items()}
        # What is tried here draws from this process's generator, as many operations do that carry no tag which says so.
        with plain(), torch.random.fork_rng(devices=()):
            found = _infer(layout, holed, named, specs)
        if len(_signatures) >= MAX_SIGNATURES:
            del _signatures[next(iter(_signatures))]
        _signatures[key] = found
    return found


def _empty(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Hole.TENSOR
    return [_empty(item) for item in value] if isinstance(value, list | tuple) else value


def _infer(layout: Layout, args: Sequence[Any], kwargs: dict[str, Any], specs: list[TensorSpec]) -> Signature:
    operation = layout.operation
    names = layout.run_time_names
    wire_args = [encode_argument(_hole(a, i in layout.run_time)) for i, a in enumerate(args)]
    wire_kwargs = {n: encode_argument(_hole(a, n in names)) for n, a in kwargs.items()}
    returns = operation.overload._schema.returns
    is_list = any("List" in str(r.type) or "[]" in str(r.type) for r in returns)
    count = _count(operation, args, kwargs, specs) if is_list else len(returns)
    signature = Signature(_template(operation, wire_args, wire_kwargs), count, is_list)
    if operation.data_dependent and not _integer_index(operation, specs):
        _check(signature.template)
        return signature
    # What is expanded takes little memory, and as long as if it took all of it.
    size = sum(max(_span(s), math.prod(s.shape)) * s.dtype.itemsize for s in specs)
    try:
        tensors, result = _dry_run(operation, args, kwargs, specs)
    except Exception as error:
        if size > _REAL_BYTES or _needs_data(error):
            return signature
        # torch's own kernels say it in the words that users know. If they accept what inference refused, the worker decides.
        _run_on_zeros(operation, args, kwargs, specs)
        return signature
    # Every worker checks the same. Here it is on the line that caused it; but what torch itself refuses is told in its words.
    _check(signature.template)
    made = [value for value in pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
    if any(value.layout is not torch.strided for value in made):
        raise OperationNotAllowedError("any worker", operation.name, "its result is sparse, and workers store dense tensors")
    if size + sum(value.nbytes for value in made) <= _SMALL_BYTES and not operation.random:
        # Inference does not know which dtypes the kernels take, and is wrong about some layouts; they say it themselves.
        # Whatever else zeros provoke is about values, which are not the worker's.
        try:
            tensors, result = _run_on_zeros(operation, args, kwargs, specs)
        except NotImplementedError:
            raise
        except Exception as error:
            if _ABOUT_TYPES.search(str(error)):
                raise
    flat, structure = pytree.tree_flatten(result)
    signature.structure = None if isinstance(result, torch.Tensor) or result is None else structure
    signature.outputs = []
    for value in flat:
        if not isinstance(value, torch.Tensor):
            signature.outputs.append(None)
            continue
        same = next((i for i, t in enumerate(tensors) if t is value), None)
        signature.outputs.append(spec_of(value) if same is None else same)
        if same is None:
            signature.nbytes += value.numel() * value.itemsize
    if signature.structure is None and len(signature.outputs) == 1 and not operation.written_names:
        (only,) = signature.outputs
        signature.only = only if isinstance(only, TensorSpec) else None
    if operation.written or operation.written_names:
        changed = [(i, spec_of(t)) for i, t in enumerate(tensors) if spec_of(t) is not specs[i]]
        if operation.metadata_writing:
            signature.changed = changed
            return signature
        for position, wanted in changed:
            plain_stride = torch.empty(wanted.shape, device="meta").stride()
            if specs[position].shape == wanted.shape or wanted.stride != plain_stride:
                raise ResizedOutputError(operation.name, str(list(specs[position].shape)), str(list(wanted.shape)))
        signature.resized = changed
    return signature


def _count(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], specs: list[TensorSpec]) -> int | None:
    """Return how many tensors are in a list whose shapes depend on data."""
    if operation.name == "aten::_histogramdd_bin_edges.default":
        return len(args[1] if len(args) > 1 else kwargs["bins"])
    if operation.name == "aten::tensor_split.tensor_indices_or_sections" and len(specs[1].shape) == 1:
        return specs[1].shape[0] + 1
    return None


def _check(template: Template) -> None:
    try:
        template.check()
    except ProtocolError as error:  # what a peer should not have sent is here what the user has typed
        raise OperationNotAllowedError("any worker", template.operation.name, error.reason) from error


def _template(operation: Operation, args: list[Any], kwargs: dict[str, Any]) -> Template:
    # Signatures that differ in shapes alone share their template, which a worker is told once.
    key = f"{operation.name} {args} {kwargs}"
    known = _templates.get(key)
    if known is None:
        known = _templates[key] = Template(operation, args, kwargs)
    return known


def _hole(value: Any, run_time: bool) -> Any:
    return Hole.SCALAR if run_time and isinstance(value, _NUMBERS) else value


def _integer_index(operation: Operation, specs: list[TensorSpec]) -> bool:
    # Only boolean masks make the shape of an indexing depend on data.
    return operation.name.startswith(("aten::index.", "aten::_unsafe_index.")) and not any(
        s.dtype in (torch.bool, torch.uint8) for s in specs[1:]
    )


def _needs_data(error: Exception) -> bool:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    wanted = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
    return isinstance(error, wanted)


def _span(spec: TensorSpec) -> int:
    if math.prod(spec.shape) == 0:
        return 0
    return spec.offset + 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))


def _dry_run(
    operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], specs: list[TensorSpec]
) -> tuple[list[torch.Tensor], Any]:
    # Not at the top: what this imports takes half a second. Not the meta device, which is four times as fast: over torch's
    # operation database (3,685 calls) it is wrong about 30 layouts, FakeTensor about 4.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # What inference refuses is asked again of the kernels; its log of each refusal would only disturb.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True
    try:
        with FakeTensorMode():
            return _run_on_zeros(operation, args, kwargs, specs)
    finally:
        log.disabled = False


def _run_on_zeros(
    operation: Operation, args: Sequence[Any], kwargs: dict[str, Any], specs: list[TensorSpec]
) -> tuple[list[torch.Tensor], Any]:
    tensors: list[torch.Tensor] = []
    for spec in specs:
        tensor = torch.zeros(_span(spec), dtype=spec.dtype).as_strided(spec.shape, spec.stride, spec.offset)
        if spec.conj:
            tensor = tensor.conj()
        if spec.neg:
            tensor = torch._neg_view(tensor)
        tensors.append(tensor)
    queue = iter(tensors)

    def fill(value: Any) -> Any:
        if value is Hole.TENSOR:
            return next(queue)
        return [fill(item) for item in value] if isinstance(value, list | tuple) else value

    filled = [fill(argument) for argument in args]
    with torch.no_grad():
        return tensors, operation.overload(*filled, **{name: fill(argument) for name, argument in kwargs.items()})
