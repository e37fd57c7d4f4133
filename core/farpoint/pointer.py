"""The pointer: a `torch.Tensor` whose elements are on another worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils import _pytree as pytree

from farpoint import gate
from farpoint.errors import FarpointError, NotColocatedError, RemoteExecutionError
from farpoint.inference import layout_of, signature_of
from farpoint.operations import Hole
from farpoint.protocol.messages import Kind
from farpoint.route import SPENT, Route
from farpoint.spec import TensorSpec, spec_from_wire, spec_of

if TYPE_CHECKING:
    from farpoint.peer import Reference

_make = torch.Tensor._make_wrapper_subclass
# Whole directories, not names: a user's own folder may be called farpoint too.
_PACKAGES = tuple(str(Path(package).parent) + os.sep for package in (torch.__file__, __file__))
_ours: dict[Any, bool] = {}


class PointerTensor(torch.Tensor):
    """A tensor that owns one reference to a remote object, and knows its metadata.

    Operations on it run where the data is. Nothing waits for them: an error that only the worker can see is raised by
    whatever asks for the results.
    """

    _reference: Reference | None
    _route: Route
    _spec: TensorSpec
    _spent: tuple[str, str, str] | None

    @staticmethod
    def wrap(route: Route, reference: Reference, spec: TensorSpec, requires_grad: bool = False) -> PointerTensor:
        """Return a pointer for a reference.

        Args:
            route: The way to the data.
            reference: The reference that the pointer owns.
            spec: Metadata of the tensor.
            requires_grad: Whether autograd records what is done with it.
        """
        pointer: PointerTensor = _make(
            PointerTensor, spec.shape, spec.stride, spec.offset, dtype=spec.dtype, requires_grad=requires_grad
        )
        if spec.conj:
            torch._C._set_conj(pointer, True)
        if spec.neg:
            torch._C._set_neg(pointer, True)
        pointer._route = route
        pointer._reference = reference
        pointer._spec = spec
        return pointer

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        gate.check(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks cls and func
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return dispatch(func, args, kwargs or {})
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._reference is not None:
            self.free()

    @property
    def id(self) -> int:
        """The id that this pointer prints for itself."""
        return id(self) & 0xFFFFFFFFFFF

    @property
    def id_at_location(self) -> int:
        """The id of the object that it points at, on `location`."""
        return gate.check_live(self).id

    @property
    def location(self) -> Any:
        """The worker that it points at."""
        from farpoint.remote import handle_of

        return handle_of(self._route.workers[0])

    def send(self, worker: Any, **options: Any) -> PointerTensor:
        """Send this pointer: see `farpoint.send`."""
        from farpoint.handover import send

        return send(self, worker, **options)

    def get(self, keep: bool = False) -> torch.Tensor:
        """Bring what it points at here: see `farpoint.handover.get`."""
        from farpoint.handover import get

        return get(self, keep=keep)

    def move(self, worker: Any) -> torch.Tensor:
        """Move the data at the end of the chain: see `farpoint.handover.move`."""
        from farpoint.handover import move

        return move(self, worker)

    def remote_get(self) -> torch.Tensor:
        """Make the chain one hop shorter at its data end."""
        from farpoint.handover import remote_get

        return remote_get(self)

    def remote_send(self, worker: Any) -> PointerTensor:
        """Make the chain one hop longer at its data end."""
        from farpoint.handover import remote_send

        return remote_send(self, worker)

    def free(self) -> None:
        """Give the reference up now."""
        gate.check_live(self)
        spend(self, "free")

    def tag(self, *tags: str) -> PointerTensor:
        """Write tags on the remote object, in place of its present ones."""
        from farpoint.handover import annotate

        annotate(self, tags=tags)
        return self

    def describe(self, description: str) -> PointerTensor:
        """Write a description on the remote object."""
        from farpoint.handover import annotate

        annotate(self, description=description)
        return self


def describe(pointer: PointerTensor) -> str:
    """Return how a pointer prints, without its metadata."""
    reference = pointer._reference
    target = f"{reference.peer.name}:{reference.id}" if reference is not None else "nothing"
    return f"(Wrapper)>[PointerTensor | {pointer._route.owner_name}:{pointer.id} -> {target}]"


def spend(pointer: PointerTensor, how: str) -> None:
    """Take the reference of a pointer away; every later use says where that was."""
    code, line = user_line()
    pointer._spent = (describe(pointer), how, f"{code.co_filename}:{line}" if code else "an unknown place")
    pointer._route = SPENT
    pointer._reference = None


def user_line() -> tuple[Any, int]:
    """Return code and line of the nearest caller that is neither torch nor farpoint."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        ours = _ours.get(code)
        if ours is None:
            ours = _ours[code] = code.co_filename.startswith(_PACKAGES)
        if not ours:
            return code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None, 0


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Issue one aten operation whose operands are pointers, and return pointers to its results."""
    if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.equal.default:
        raise gate.not_here(args[0] if isinstance(args[0], PointerTensor) else args[1], f"{func}")
    layout = layout_of(func)
    key: list[Any] = [func]
    operands: list[Any] = []
    tensors: list[Any] = []
    specs: list[TensorSpec] = []
    scalars: list[Any] = []
    route: Route | None = None
    holed: list[Any] = []

    def take(value: Any, run_time: bool) -> Any:
        nonlocal route
        kind = type(value)
        if kind is PointerTensor:
            if value._route is not route:
                if route is not None or value._route is SPENT:
                    gate.check_live(value)
                    raise gate.elsewhere(func, next(t for t in tensors if type(t) is PointerTensor), value)
                route = value._route
            key.append(value._spec)
            specs.append(value._spec)
            tensors.append(value)
            operands.append(value._reference.id)
            return Hole.TENSOR
        if kind is float or kind is int or kind is bool or kind is complex:
            key.append(kind)
            if run_time:
                scalars.append([value.real, value.imag] if kind is complex else value)
            else:
                key.append(value)
            return value
        if value is None or kind is str:
            key.append(value)
            return value
        if isinstance(value, list | tuple):
            key.append("(")
            taken = [take(item, run_time) for item in value]
            key.append(")")
            return taken
        if isinstance(value, torch.Tensor):
            spec = spec_of(value)
            key.append(spec)
            specs.append(spec)
            tensors.append(value)
            # Not the user's own argument, which the gate has seen: a constant of a formula, shipped along.
            operands.append(value.detach().clone().contiguous())
            return Hole.TENSOR
        key.append(value)
        return value

    run_time = layout.run_time
    for position, value in enumerate(args):
        holed.append(take(value, position in run_time))
    named = {}
    for name, value in kwargs.items():
        key.append(name)
        named[name] = take(value, name in layout.run_time_names)
    if route is None:
        raise NotColocatedError(str(func), "here", "nowhere", "p.get()")
    if layout.operation.written_names:
        _refuse_local_writes(func, layout.operation, args, kwargs)
    signature = signature_of(tuple(key), layout, holed, named, specs)
    peer = route.peer
    route.order()
    code, line = user_line()
    if signature.outputs is None:
        return _ask(func, route, signature, operands, scalars, code, line)
    results = [peer.new_id() if type(output) is TensorSpec else 0 for output in signature.outputs]
    peer.run(signature.template, operands, scalars, results, code, line)
    peer.account(signature.nbytes)
    for position, spec in signature.changed:
        tensors[position]._spec = spec
    if signature.changed:
        _change_metadata(func, args, kwargs)
    values: list[Any] = []
    for output, result in zip(signature.outputs, results, strict=True):
        if type(output) is TensorSpec:
            values.append(PointerTensor.wrap(route, peer.refer(result), output))
        else:
            values.append(None if output is None else tensors[output])
    if signature.structure is None:
        return values[0] if values else None
    return pytree.tree_unflatten(values, signature.structure)


def _refuse_local_writes(func: Any, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    written = [args[i] for i in operation.written if i < len(args)]
    written += [kwargs[name] for name in operation.written_names if name in kwargs]
    for value in pytree.tree_leaves(written):
        if isinstance(value, torch.Tensor) and type(value) is not PointerTensor:
            raise NotColocatedError(
                str(func), "a local tensor that would be written to", "a pointer", "send the local tensor first"
            )


def _change_metadata(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    from torch.utils._mode_utils import no_dispatch

    with no_dispatch():
        func(*args, **kwargs)


def _ask(
    func: Any, route: Route, signature: Any, operands: list[Any], scalars: list[Any], code: Any, line: int
) -> Any:
    peer = route.peer
    returns = func._schema.returns
    if any("[]" in str(r.type) or "List" in str(r.type) for r in returns):
        raise FarpointError(f"{func}: how many tensors it returns depends on data, and cannot be known here")
    results = [peer.new_id() for _ in returns]
    references = [peer.refer(result) for result in results]
    with peer.channel.lock:
        slot = peer.slot(signature.template)
        reply = peer.ask([int(Kind.ASK), slot, operands, scalars, results])
    specs = [spec_from_wire(wire) for wire in peer.wait(reply)]
    values = [
        PointerTensor.wrap(route, reference, spec) for reference, spec in zip(references, specs, strict=True)
    ]
    return values[0] if len(values) == 1 else tuple(values)
