"""The multi-pointer: one tensor's worth of pointers on several workers, and what is done with it is done with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from farpoint import aggregate, gate, handover
from farpoint.errors import NotColocatedError, PointerError
from farpoint.pointer import PointerTensor, describe
from farpoint.remote import RemoteWorker

_T: Any = torch.Tensor
_ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_OTHERS = "neg pos abs invert eq ne lt le gt ge getitem setitem len contains bool int float complex index format array"
_OPERATORS = [f"__{side}{name}__" for name in _ARITHMETIC.split() for side in ("", "r", "i")] + [f"__{name}__" for name in _OTHERS.split()]
_NOT_FOR_ALL = frozenset({"move", "send"})
_PLAIN = (bool, int, float, complex, str, tuple, torch.dtype, torch.device, torch.layout, torch.memory_format)


@overload
def send(tensor: torch.Tensor, worker: RemoteWorker | str, *, requires_grad: bool | None = None) -> PointerTensor: ...


@overload
def send(
    tensor: torch.Tensor,
    worker: RemoteWorker | str,
    other: RemoteWorker | str,
    /,
    *others: RemoteWorker | str,
    requires_grad: bool | None = None,
) -> MultiPointer: ...


def send(tensor: torch.Tensor, worker: Any, *others: Any, requires_grad: bool | None = None) -> Any:
    """Send a copy of a tensor, or of a pointer, to a worker, and return a pointer to it; of several workers, a multi-pointer.

    Args:
        tensor: Values, dtype, `requires_grad`, `.grad` and tags are copied. The tensor stays usable, and later
            changes to it are not seen by the worker. Of a pointer the reference is copied; it stays valid.
        worker: Who gets it, as a handle or by name.
        others: Who else does. Each has a copy of its own.
        requires_grad: Whether the pointer requires a gradient. If not given it is a fresh leaf that does as the tensor. With True it
            stays in the tensor's graph, if that has one: gradients come back.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
        EncodeError: The tensor is of a kind that cannot travel.
    """
    if not others:
        return handover.send(tensor, worker, requires_grad=requires_grad)
    return MultiPointer([handover.send(tensor, each, requires_grad=requires_grad) for each in (worker, *others)])


class MultiPointer:
    """Pointers on several workers that are used as one: torch's functions, operators and methods are applied to each.

    It is no tensor. Results are multi-pointers again, or what is the same for all (a shape, a dtype). Two of them are combined member
    by member; numbers, and local tensors without dimensions, go to all. What may fail for one member (a shape that does not fit) has
    been done for those before it, which matters to in-place operations only.

    Args:
        pointers: Its members, in order, on any workers.

    Attributes:
        pointers: Its members, for what is to be done with one alone.

    Raises:
        PointerError: There are none, or one is no pointer.
    """

    __slots__ = ("__weakref__", "pointers")

    pointers: tuple[PointerTensor, ...]

    def __init__(self, pointers: Sequence[PointerTensor]) -> None:
        wrong = [type(pointer).__name__ for pointer in pointers if not isinstance(pointer, PointerTensor)]
        if wrong or not pointers:
            raise PointerError(f"a multi-pointer is made of pointers, and not of {wrong[0] if wrong else 'nothing'}")
        object.__setattr__(self, "pointers", tuple(pointers))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _each(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        attribute = None if name.startswith("_") or name in _NOT_FOR_ALL else getattr(torch.Tensor, name, None)
        if attribute is None:
            raise AttributeError(f"a multi-pointer has no attribute {name!r}; its members are in .pointers")
        if not callable(attribute):
            return _joined(name, self, [getattr(pointer, name) for pointer in self.pointers])

        def method(*args: Any, **kwargs: Any) -> Any:
            return _each(_Method(name), (self, *args), kwargs)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a multi-pointer has no attribute {name!r} to set; its members are in .pointers")
        _each(setattr, (self, name, value), {})

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        for pointer in self.pointers:
            gate.check_live(pointer)
        members = [describe(pointer).removeprefix("(Wrapper)>") for pointer in self.pointers]
        return f"(Wrapper)>[MultiPointer | {', '.join(members)}]"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __copy__(self) -> MultiPointer:
        return MultiPointer(self.pointers)

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiPointer:
        return MultiPointer([pointer.__deepcopy__(memo) for pointer in self.pointers])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise gate.not_here(self.pointers[0], "pickling")

    def get(self, keep: bool = False, *, sum_results: bool = False) -> Any:
        """Bring what the members point at here, all at once, as `get` of each would.

        Args:
            keep: Copy instead, and leave the pointers valid.
            sum_results: Whether to return the sum, which is made here, instead of a list. `farpoint.average` does not bring the
                members here.

        Raises:
            PointerError: They have different shapes, and cannot be summed.
            FarpointError: One could not be fetched; then all pointers are valid.
        """
        if sum_results and len({pointer.shape for pointer in self.pointers}) > 1:
            raise PointerError(f"get(sum_results=True): the shapes differ, they are {_spell([tuple(p.shape) for p in self.pointers], self)}")
        found = aggregate.fetch(self.pointers, keep=keep)
        if not keep:
            aggregate.give_up(self.pointers)
        return sum(found[1:], found[0]) if sum_results else found

    def backward(self, gradient: Any = None, **options: Any) -> None:
        """Run `torch.autograd.backward` on all members in one go: they may share a graph here.

        Args:
            gradient: A multi-pointer; ones for members without dimensions, if not given.
            options: Those of `torch.Tensor.backward`.
        """
        _check("backward", self, [gradient])
        if not isinstance(gradient, MultiPointer | None):
            raise PointerError("backward: the gradient of a multi-pointer is one too")
        gradients = None if gradient is None else gradient.pointers
        with torch._C.DisableTorchFunctionSubclass():  # for this is no operation on operands that must meet
            torch.autograd.backward(self.pointers, gradients, **options)


class _Method:
    """A method by name: that of the pointer, which may differ from that of a tensor."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, pointer: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(pointer, self.__name__)(*args, **kwargs)


def _each(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function for each member of the multi-pointers among its arguments."""
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    name = getattr(func, "__name__", str(func))
    first = next(leaf for leaf in leaves if isinstance(leaf, MultiPointer))
    _check(name, first, leaves)
    results = []
    for number in range(len(first.pointers)):
        chosen = [leaf.pointers[number] if isinstance(leaf, MultiPointer) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(chosen, structure)
        results.append(func(*own_args, **own_kwargs))
    for leaf in leaves:
        if isinstance(leaf, MultiPointer) and all(a is b for a, b in zip(results, leaf.pointers, strict=True)):
            return leaf  # as an operation in place returns its operand
    return _joined(name, first, results)


def _check(name: str, first: MultiPointer, leaves: Sequence[Any]) -> None:
    """Check that everything is where the members are, before anything is done with one."""
    ways = [_way(pointer) for pointer in first.pointers]
    names = ", ".join(ways)
    fix = "make a multi-pointer of the same workers, or take the members from .pointers"
    for leaf in leaves:
        if isinstance(leaf, MultiPointer):
            others = [_way(pointer) for pointer in leaf.pointers]
            if others != ways:
                raise NotColocatedError(name, f"on {names}", f"on {', '.join(others)}", fix)
        elif isinstance(leaf, PointerTensor):
            raise NotColocatedError(name, f"on {names}", f"a pointer to {_way(leaf)} alone", fix)
        elif isinstance(leaf, torch.Tensor) and leaf.ndim and name != "copy_":
            raise NotColocatedError(name, f"on {names}", "a local tensor", f"send it there with x.send({names})")


def _way(pointer: PointerTensor) -> str:
    gate.check_live(pointer)
    return " -> ".join(pointer._route.workers)


def _joined(name: str, first: MultiPointer, results: Sequence[Any]) -> Any:
    """Return the results of all members as one."""
    flat = [pytree.tree_flatten(result) for result in results]
    structure = flat[0][1]
    if any(other != structure for _, other in flat):
        raise PointerError(f"{name}: the results are not alike: {_spell(results, first)}; take the members from .pointers")
    return pytree.tree_unflatten([_one(name, first, leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], structure)


def _one(name: str, first: MultiPointer, values: Sequence[Any]) -> Any:
    if all(isinstance(value, PointerTensor) for value in values):
        return MultiPointer(values)
    if all(value is values[0] for value in values):
        return values[0]
    if not all(isinstance(value, _PLAIN) for value in values):
        return list(values)
    if any(value != values[0] for value in values):
        raise PointerError(f"{name}: it is not the same for all: {_spell(values, first)}; take the members from .pointers")
    return values[0]


def _spell(values: Sequence[Any], first: MultiPointer) -> str:
    return ", ".join(f"{value} on {_way(pointer)}" for value, pointer in zip(values, first.pointers, strict=True))


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: MultiPointer, *args: Any) -> Any:
        return _each(getattr(torch.Tensor, name), (self, *args), {})

    operator.__name__ = name
    return operator


for _name in _OPERATORS:
    if hasattr(torch.Tensor, _name):
        setattr(MultiPointer, _name, _operator(_name))
