"""The pointer: a `torch.Tensor` whose elements are on another worker."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import attrs
import torch
from torch.utils import _pytree as pytree

from farpoint import checkpoints, gate, presumptions, recording
from farpoint.engine import CALLS
from farpoint.errors import (
    FarpointError,
    NotColocatedError,
    OperationNotAllowedError,
    RemoteExecutionError,
    ValueNotHereError,
    WorkerLostError,
)
from farpoint.handle import Handle
from farpoint.inference import Signature, layout_of, signature_of
from farpoint.operands import Operands
from farpoint.operations import RESIZING
from farpoint.protocol.messages import Kind
from farpoint.provenance import Place, caller
from farpoint.references import Reference
from farpoint.route import SPENT, Route
from farpoint.scalars import may_read, read
from farpoint.spec import TensorSpec, spec_from_wire
from farpoint.surroundings import not_compiled, without_onednn

_make = torch.Tensor._make_wrapper_subclass
_forbid_reading = torch._C._set_throw_on_mutable_data_ptr  # the shell is no memory, and some of torch's C++ would not ask
_ids = itertools.count(1)
_COPY: Any = torch.Tensor.copy_
_BATCH_NORM: Any = torch.nn.functional.batch_norm
_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # of a property in C
_SETTER = type(_SET_DATA)
_SHELL = re.compile("its data is not allocated yet|Cannot access data pointer")  # what torch says of a tensor without memory
_SET: Any = torch.ops.aten.set_.source_Tensor
_RESIZE: Any = torch.ops.aten.resize_.default


@attrs.frozen
class Beyond:
    """The second hop of a chain, as far as this process knows it: no reference, for the first worker has that.

    Attributes:
        worker: Name of the second worker.
        url: Where it is dialled.
        target: The object there.
        further: The hop after it.
    """

    worker: str
    url: str
    target: int
    further: Beyond | None


class PointerTensor(Handle, torch.Tensor):
    """A tensor that owns one reference to a remote object, and knows its metadata.

    Operations on it run where the data is. Nothing waits for them: an error that only the worker can see is raised by
    whatever asks for the results.
    """

    _reference: Reference | None
    _route: Route
    _spec: TensorSpec
    _spent: tuple[str, str, Place]
    _beyond: Beyond | None = None

    @staticmethod
    def wrap(route: Route, reference: Reference, spec: TensorSpec, requires_grad: bool = False) -> PointerTensor:
        """Return a pointer for a reference.

        Args:
            route: The way to the data.
            reference: The reference that the pointer owns.
            spec: Metadata of the tensor.
            requires_grad: Whether autograd records what is done with it.
        """
        pointer = PointerTensor.shell(spec, requires_grad)
        pointer._route = route
        pointer._reference = reference
        pointer._spec = spec
        if recording.runs:
            recording.made(pointer)
        return pointer

    @staticmethod
    def shell(spec: TensorSpec, requires_grad: bool = False) -> PointerTensor:
        """Return a pointer that points at nothing yet: what torch knows of one."""
        pointer: PointerTensor
        if spec.compact:
            pointer = _make(PointerTensor, spec.shape, dtype=spec.dtype, requires_grad=requires_grad)
        else:
            pointer = _make(
                PointerTensor, spec.shape, spec.stride, spec.offset, dtype=spec.dtype, requires_grad=requires_grad
            )
            torch._C._set_conj(pointer, spec.conj)
            torch._C._set_neg(pointer, spec.neg)
        _forbid_reading(pointer)
        return pointer

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if len(types) > 1 and not all(issubclass(kind, torch.Tensor) for kind in types):
            return NotImplemented  # what is no tensor, such as a multi-pointer, decides about itself
        if func is _COPY and type(args[0]) is cls and type(args[1]) is not cls:
            from farpoint.handover import place

            args = (args[0], place(args[1], args[0]._route.workers), *args[2:])  # as torch copies from one device to another
        if func is _BATCH_NORM and kwargs:
            result = presumptions.average(args, kwargs)
            if result is not NotImplemented:
                return result
        try:
            gate.check(cls, func, args, kwargs)
            if func in CALLS:
                return CALLS[func](*args, **kwargs or {})
            with torch._C.DisableTorchFunctionSubclass():
                if type(func) is _SETTER and func == _SET_DATA:
                    return _set_data(args[0], args[1])
                return func(*args, **kwargs) if kwargs else func(*args)
        except OperationNotAllowedError:
            if func is not torch.lstm:
                raise
            # oneDNN's kernel, which no worker executes, as its workspace cannot be checked. Step by step it is the same.
            with torch._C.DisableTorchFunctionSubclass(), without_onednn():
                return func(*args, **kwargs or {})
        except NotColocatedError:
            if func not in presumptions.COMPOSED:
                raise
            from farpoint.factories import Issue

            with torch._C.DisableTorchFunctionSubclass(), Issue(gate.first_pointer(cls, args, kwargs)._route):
                return func(*args, **kwargs or {})
        except ValueNotHereError:
            result = _otherwise(func, args, kwargs or {})
            if result is NotImplemented:
                raise
            return result
        except RuntimeError as error:
            if not _SHELL.search(str(error)):
                raise
            # torch's C++ wanted to read the elements
            result = _otherwise(func, args, kwargs or {})
            if result is NotImplemented:
                raise gate.not_here(gate.first_pointer(cls, args, kwargs), func.__name__) from error
            return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks cls and func
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            if kwargs and str(kwargs.get("device")) == "meta":
                return presumptions.without_data(func, args, kwargs)
            return dispatch(func, args, kwargs or {})
        except OperationNotAllowedError as error:
            if func is _SET:
                return _set(*args)
            if func is presumptions.ZEROS:
                return dispatch(torch.ops.aten.zeros_like.default, args[1:], {})
            if func in gate.VALUES:
                if may_read(func, gate.first_pointer(cls, args, kwargs)):
                    return read(func, args, kwargs)
                value = presumptions.presume(func, args, kwargs or {}, dispatch)
                if value is not None:
                    return value
                wanted = "torch.autograd.detect_anomaly()" if presumptions.is_anomaly_check(func) else str(func)
                raise gate.not_here(gate.first_pointer(cls, args, kwargs), wanted) from error
            raise
        except WorkerLostError as error:
            if error.route:
                raise
            with gate.underway(gate.first_pointer(cls, args, kwargs)):
                raise
        except TypeError as error:
            # torch would turn it into NotImplemented below a dunder, and `p == x` into False.
            raise RemoteExecutionError("me", str(func), "TypeError", str(error)) from error

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        gate.check_live(self)
        text = f"{describe(self)}, shape={tuple(self._spec.shape)}, dtype={self._spec.dtype}"
        with torch._C.DisableTorchFunctionSubclass():
            return f"{text}, requires_grad=True" if self.requires_grad else text

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise gate.not_here(self, "pickling")

    def __deepcopy__(self, memo: dict[int, Any]) -> PointerTensor:
        found: PointerTensor | None = memo.get(id(self))
        if found is not None:
            return found
        gate.check_live(self)
        if not self.is_leaf:
            raise RuntimeError("a pointer with a history cannot be copied deeply, as no tensor with one can; p.detach() has none")
        with torch.no_grad():
            copied: PointerTensor = self.detach().clone()  # type: ignore[assignment]  # of a pointer
        copied.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # torch's mark
        elif self.grad is not None:  # a copy of a parameter of torch's has none either
            copied.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = copied
        return copied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._reference is not None:
            self.free()

    def new(self, *shape: Any) -> torch.Tensor:  # type: ignore[override]  # torch leaves out what it takes
        """Return a tensor of some shape, or of a list of values, where this one is. Torch's own would be here, and asks nobody."""
        if len(shape) == 1 and isinstance(shape[0], list):
            return self.new_tensor(shape[0])
        return self.new_empty(*shape or (0,))

    @property
    def id(self) -> int:
        """The number that this pointer prints for itself: no other pointer of this process has it, now or later.

        It is drawn when it is first asked for; most pointers live and die without one.
        """
        number: int | None = self.__dict__.get("_number")
        if number is None:
            # One step even between threads, so that all of them see the same number.
            number = self.__dict__.setdefault("_number", next(_ids))
        return number


for _name in ("__torch_function__", "__torch_dispatch__"):
    not_compiled(vars(PointerTensor)[_name].__func__)


def _set_data(pointer: Any, value: Any) -> None:
    """Carry out `pointer.data = value`: both are the same object there then."""
    if not (type(pointer) is type(value) is PointerTensor):
        raise TypeError("p.data = x takes a pointer for a pointer, and a local tensor for a local one; p.copy_(x) writes values")
    _SET_DATA(pointer, value)
    pointer._reference, pointer._route, pointer._spec = value._reference, value._route, value._spec


def _set(pointer: Any, value: Any) -> Any:
    """Carry out `pointer.set_(value)`, by which torch changes what a parameter is when it is parametrized."""
    if not (type(pointer) is type(value) is PointerTensor):
        raise NotColocatedError("p.set_(x)", "a pointer", "a local tensor", "send it there first, and set it to the pointer")
    _change_metadata(pointer, value._spec)
    pointer._reference, pointer._route = value._reference, value._route
    return pointer


def describe(pointer: PointerTensor) -> str:
    """Return how a pointer prints, without its metadata."""
    reference = pointer._reference
    target = f"{reference.peer.name}:{reference.id}" if reference is not None else "nothing"
    return f"(Wrapper)>[PointerTensor | {pointer._route.owner_name}:{pointer.id} -> {target}]"


def spend(pointer: PointerTensor, how: str) -> None:
    """Take the reference of a pointer away; every later use says where that was."""
    pointer._spent = (describe(pointer), how, caller())
    pointer._route = SPENT
    pointer._reference = None


def _otherwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do what torch cannot do here, as it reads a value, in another way; return NotImplemented if there is none."""
    if func is torch.Tensor.__bool__ and presumptions.no_short_cut():
        return False
    if func is torch.Tensor.__bool__ and presumptions.no_doubt(args[0], dispatch):
        return True
    if func is torch.Tensor.__float__ and presumptions.is_averaging():
        return math.nan
    if may_read(func, gate.first_pointer(PointerTensor, args, kwargs)):
        return read(func, args, kwargs)
    return presumptions.otherwise(func, args, kwargs, dispatch)


def dispatch(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], place: Route | None = None, *, drawing: bool = False
) -> Any:
    """Issue one aten operation whose operands are pointers, and return pointers to its results.

    Args:
        func: The overload.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        place: Where it runs if it has no operands; a pointer among them then must lead there.
        drawing: Whether it may draw random numbers without looking for a checkpoint that has drawn them before.
    """
    layout = layout_of(func)
    if layout.operation.random and not drawing:
        return checkpoints.draw(partial(dispatch, place=place, drawing=True), layout.operation, args, kwargs)
    operands = Operands(PointerTensor, func, layout, place)
    run_time = layout.run_time
    for position, value in enumerate(args):
        operands.take(value, position in run_time)
    if kwargs:
        for name, value in kwargs.items():
            operands.key.append(name)
            operands.take(value, name in layout.run_time_names)
    route, tensors = operands.route, operands.tensors
    if route is None:
        raise NotColocatedError(str(func), "here", "nowhere", "p.get()")
    if layout.operation.written_names:
        operands.refuse_local_writes(layout.operation, args, kwargs)
    signature = signature_of(tuple(operands.key), layout, args, kwargs, tensors)
    if signature.resized:
        for position, spec in signature.resized:
            dispatch(_RESIZE, (tensors[position], spec.shape), {})
        return dispatch(func, args, kwargs, place)
    peer = route.peer
    route.order()
    # Three frames need not be looked at: this one, __torch_dispatch__ and the function itself.
    origin = caller(3)
    if recording.runs:
        recording.used(tensors)
    if signature.only is not None:
        result = peer.references.new_id()
        peer.run(signature.template, operands.values, [result], origin, signature.nbytes)
        return PointerTensor.wrap(route, Reference(peer, result), signature.only)
    if signature.outputs is None:
        return _ask(func, route, signature, operands)
    results = [peer.references.new_id() if type(output) is TensorSpec else 0 for output in signature.outputs]
    resizing = bool(signature.changed) and signature.template.operation.name in RESIZING
    if resizing:
        peer.flush()  # what was given up makes room for it
    peer.run(signature.template, operands.values, results, origin, signature.nbytes)
    for position, spec in signature.changed:
        if resizing:
            _await_resize(tensors[position], spec)
        _change_metadata(tensors[position], spec)
    values: list[Any] = []
    for output, result in zip(signature.outputs, results, strict=True):
        if type(output) is TensorSpec:
            values.append(PointerTensor.wrap(route, Reference(peer, result), output))
        else:
            values.append(None if output is None else tensors[output])
    if signature.structure is None:
        return values[0] if values else None
    return pytree.tree_unflatten(values, signature.structure)


def _await_resize(pointer: PointerTensor, spec: TensorSpec) -> None:
    """Wait until an object has another geometry: its worker may have no room, and the pointer must not say that it has grown, then."""
    peer = pointer._route.peer
    (wire,) = peer.request([int(Kind.DESCRIBE), [gate.check_live(pointer).id]])
    found = spec_from_wire(wire)
    if (found.shape, found.stride) != (spec.shape, spec.stride):
        peer.prove()
        raise FarpointError(f"{describe(pointer)} has the shape {list(found.shape)} and not {list(spec.shape)}: somebody else has resized it")


def _change_metadata(pointer: PointerTensor, spec: TensorSpec) -> None:
    from torch.utils._mode_utils import no_dispatch

    # Not by the operation itself: torch would clear the memory of a shell that grows, and it has none.
    shell = PointerTensor.shell(spec)
    with no_dispatch(), torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(pointer, shell)
    pointer._spec = spec


def _ask(func: Any, route: Route, signature: Signature, operands: Operands) -> Any:
    peer = route.peer
    count = signature.count
    if count is None:
        raise FarpointError(f"{func}: how many tensors it returns depends on data, and cannot be known here")
    results = [peer.references.new_id() for _ in range(count)]
    references = [peer.references.refer(result) for result in results]
    with peer.channel.lock:
        slot = peer.slot(signature.template)
        reply = peer.ask([int(Kind.ASK), slot, operands.values, results])
    specs = [spec_from_wire(wire) for wire in peer.wait(reply)]
    values = [
        PointerTensor.wrap(route, reference, spec) for reference, spec in zip(references, specs, strict=True)
    ]
    if signature.is_list:
        return values
    return values[0] if count == 1 else tuple(values)
