"""The thin gate above dispatch: what the user passed must live together, and values do not leave by accident."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn
import torch.optim

from farpoint.errors import (
    FarpointError,
    NotColocatedError,
    PointerSpentError,
    ValueNotHereError,
    WorkerLostError,
)
from farpoint.provenance import spell
from farpoint.route import SPENT

if TYPE_CHECKING:
    from farpoint.pointer import PointerTensor
    from farpoint.references import Reference

_TORCH, _HERE = (str(Path(package).parent) + os.sep for package in (torch.__file__, __file__))
_T: Any = torch.Tensor
_REFUSED: dict[Any, str] = {
    function: name
    for name, function in {
        "bool(p)": _T.__bool__,
        "int(p)": _T.__int__,
        "float(p)": _T.__float__,
        "complex(p)": _T.__complex__,
        "using p as an index": _T.__index__,
        "p.item()": _T.item,
        "p.tolist()": _T.tolist,
        "p.numpy()": _T.numpy,
        "numpy.asarray(p)": _T.__array__,
        "formatting p": _T.__format__,
        "p.__dlpack__()": _T.__dlpack__,
        "p.data_ptr()": _T.data_ptr,
        "p.untyped_storage()": _T.untyped_storage,
        "p.storage()": _T.storage,
        "x in p": _T.__contains__,
        "torch.equal(p, q)": torch.equal,
        "p.equal(q)": _T.equal,
        "torch.allclose(p, q)": torch.allclose,
        "p.allclose(q)": _T.allclose,
        "torch.is_nonzero(p)": torch.is_nonzero,
        "p.is_nonzero()": _T.is_nonzero,
        "p.share_memory_()": _T.share_memory_,
        "p.apply_()": _T.apply_,
        "p.map_()": _T.map_,
        "p.map2_()": _T.map2_,
        "p.pin_memory()": _T.pin_memory,
    }.items()
}
VALUES = frozenset(
    {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten._nested_tensor_from_mask_left_aligned.default,
        torch.ops.aten.allclose.default,
        torch.ops.aten.equal.default,
        torch.ops.aten._has_same_storage_numel.default,
        torch.ops.aten.is_same_size.default,
    }
)
"""Operators that return a value rather than tensors. No worker executes them."""
_ABOUT_TYPES: Any = torch._has_compatible_shallow_copy_type
"""What `module.to` asks of a parameter and what becomes of it, which may be on the device `meta`."""
_PLAIN = frozenset({int, float, bool, str, type(None), complex, torch.dtype, torch.Size, slice})
_CONTAINERS = frozenset({list, tuple, dict})


def check(pointers: Any, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
    """Check a call of the user's before torch sees it.

    Args:
        pointers: The class of pointers.
        func: What is called.
        args: Its positional arguments.
        kwargs: Its arguments by name.

    Raises:
        PointerSpentError: One of its pointers is spent.
        NotColocatedError: Its tensors live in different places.
        ValueNotHereError: It needs a value that is elsewhere.
    """
    first: Any = None
    local: Any = None
    values: Iterable[Any] = _tensors(args, kwargs) if kwargs else args
    for value in values:
        if type(value) is pointers:
            if first is None:
                first = value
                if value._route is SPENT:
                    check_live(value)
            elif value._route is not first._route:
                check_live(value)
                raise elsewhere(func, first, value)
        elif type(value) in _PLAIN:
            continue
        elif type(value) in _CONTAINERS:
            check(pointers, func, tuple(_tensors(args, kwargs)), None)
            return
        elif isinstance(value, torch.Tensor) and value.ndim and local is None and not _wraps(pointers, value):
            local = value
    if first is None:
        return
    if func in _REFUSED:
        raise not_here(first, _REFUSED[func])
    if local is not None and func is not _ABOUT_TYPES and not _is_torchs_own():
        workers = first._route.workers
        chain = "".join(f".send({worker})" for worker in reversed(workers))
        raise NotColocatedError(_name(func), f"on {workers[-1]}", "a local tensor", f"send it there with x{chain}")


def _wraps(pointers: Any, value: torch.Tensor) -> bool:
    """Return whether a tensor is one that `torch.func` has made of a pointer, for a transform that is under way."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return type(value) is pointers


def _is_torchs_own() -> bool:
    """Return whether a local tensor beside a pointer is one that torch's own Python has made, and not the user's.

    It is if torch's Python makes the call, and was itself called with pointers alone: `nn.LSTM` makes its first state so. What is
    torch's own is shipped along, as are the constants of formulas below dispatch.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back  # type: ignore[assignment]
    entry = None
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        entry, frame = frame, frame.f_back  # type: ignore[assignment]
    if entry is None:
        return False
    code = entry.f_code
    named = code.co_argcount + code.co_kwonlyargcount
    named += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    passed = [entry.f_locals.get(name) for name in code.co_varnames[:named]]
    return not any(_holds_local(value) for value in passed)


def _holds_local(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return any(map(_holds_local, itertools.chain(value.parameters(), value.buffers())))
    if isinstance(value, torch.optim.Optimizer):
        return _holds_local([value.param_groups, value.state])
    if isinstance(value, Mapping):
        return any(map(_holds_local, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_local, value))
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return not hasattr(value, "_route")


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[Any]:
    pending: list[Any] = [args, kwargs.values()] if kwargs else [args]
    for values in pending:
        for value in values:
            if type(value) in _CONTAINERS:
                pending.append(value.values() if type(value) is dict else value)
            elif isinstance(value, torch.Tensor):
                yield value


def check_live(pointer: PointerTensor) -> Reference:
    """Return the reference of a pointer.

    Raises:
        PointerSpentError: It was given up.
    """
    if pointer._route is SPENT or pointer._reference is None:
        pointer_text, how, place = pointer._spent
        raise PointerSpentError(pointer_text, how, spell(place) or "an unknown place")
    return pointer._reference


@contextmanager
def underway(pointer: PointerTensor) -> Iterator[None]:
    """Let an error of a worker that is lost say on which way it was needed."""
    workers = pointer._route.workers
    try:
        yield
    except WorkerLostError as error:
        if len(workers) == 1 or error.route:
            raise
        raise type(error)(error.worker, error.cause, workers) from None


def first_pointer(pointers: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> PointerTensor:
    """Return the first pointer among the arguments of a call."""
    found: PointerTensor = next(value for value in _tensors(args, kwargs) if type(value) is pointers)
    return found


def elsewhere(func: Any, first: PointerTensor, second: PointerTensor) -> FarpointError:
    """Return the error for two pointers that do not meet: another place, or the same one in another life."""
    for pointer in (first, second):
        if pointer._route.peer.channel.lost is not None:
            return pointer._route.peer.channel.ended()
    one, other = (" -> ".join(("me", *p._route.workers)) for p in (first, second))
    ways = [p._route.workers for p in (first, second)]
    if ways[0][-1] == ways[1][-1]:
        fix = f"both are on {ways[0][-1]}, and reached by different ways: get() shortens the longer one, p.send(worker) the other one"
    elif len(ways[0]) == len(ways[1]) == 1:
        fix = f"p.move({ways[1][0]}) takes the first one there, q.move({ways[0][0]}) the second one here"
    else:
        fix = "get() both, and send them the same way"
    return NotColocatedError(_name(func), f"at {one}", f"at {other}", fix)


def _name(func: Any) -> str:
    """Return what a function is called by those who use it: that which assigns to an attribute, `p.grad = x`."""
    name: str = getattr(func, "__name__", str(func))
    return f"p.{func.__self__.__name__} = x" if name == "__set__" else name


def not_here(pointer: PointerTensor, request: str) -> ValueNotHereError:
    """Return the error for a call that needs the value."""
    return ValueNotHereError(request, pointer._route.workers[-1] if pointer._route.workers else "its worker")
