"""Where torch itself reads a value on its way: what is done instead, without the value leaving its worker.

Torch reads values for four reasons. To refuse what is wrong: then it is presumed to be right, and its worker is told to raise
if it is not. To take a short cut: then there is none. To know the shape of a result: then the operation is done on the worker
as a whole, and where a gradient has to come back through it, in steps that need no value. To have a factor: then the worker
multiplies by it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributions import Distribution
from torch.nn import functional
from torch.nn.modules import batchnorm, transformer
from torch.utils import _pytree as pytree

from farpoint.surroundings import plain

_aten: Any = torch.ops.aten
_HERE: Final = str(Path(__file__).parent)
_SPLIT: Any = _aten.tensor_split.tensor_indices_or_sections

_PRESUMED: Final[dict[Any, tuple[bool, str]]] = {
    functional.gaussian_nll_loss: (False, "var has negative entry/entries"),
    torch.istft: (False, "window overlap add min is below 1e-11"),
    torch.Tensor.istft: (False, "window overlap add min is below 1e-11"),
}
"""Functions that read a truth value only to raise if it is not this one, and what they say then."""

_WHOLE: Final[dict[Any, Any]] = {
    torch.cov: _aten.cov.default,
    torch.Tensor.cov: _aten.cov.default,
    torch.narrow: _aten.narrow.Tensor,
    torch.Tensor.narrow: _aten.narrow.Tensor,
    torch.tensor_split: _SPLIT,
    torch.Tensor.tensor_split: _SPLIT,
    functional.one_hot: _aten.one_hot.default,
}
"""Functions that a worker executes as a whole."""

COMPOSED: Final = frozenset({torch._C._nn.pad_sequence})
"""Functions that write their operands into what they have made first, without a look at where the operands are."""

_NAMES: Final = {"input": "self", "tensor": "self", "indices_or_sections": "tensor_indices_or_sections"}

_AVERAGING: Final = batchnorm._BatchNorm.forward.__code__
"""What asks for the number of batches, to divide by it, where a module has no momentum."""

_SHORT_CUTS: Final = (transformer._detect_is_causal_mask.__code__,)
"""Functions that ask for a truth value only to be faster if it is so."""

_VALIDATORS: Final = (Distribution.__init__.__code__, Distribution._validate_sample.__code__)
"""Functions that ask for a truth value only to raise if it is not so."""

_ANSWERS: Final[dict[Any, Any]] = {_aten._nested_tensor_from_mask_left_aligned.default: False}
"""Operators that ask only that, and the answer."""

ZEROS: Final = _aten._new_zeros_with_same_feature_meta.default
"""What a tangent is copied to if its layout is not that of its tensor: zeros like its second argument."""

_LONGEST: Final = 64  # characters that a worker takes

_SAME_STORAGE: Final = _aten._has_same_storage_numel.default
_METADATA: Final = (_aten.is_same_size.default, _SAME_STORAGE)
"""What forward-mode asks of a tensor and its tangent. The client knows."""

_ALLCLOSE: Final = _aten.allclose.default


def presume(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dispatch: Callable[..., Any]) -> bool | None:
    """Return the truth value that an operator shall have read, None if there is none to presume.

    Args:
        func: An operator that returns a value.
        args: Its arguments.
        kwargs: The same by name.
        dispatch: Issues an operation on pointers.
    """
    if func in _ANSWERS:
        answer: bool = _ANSWERS[func]
        return answer
    if func in _METADATA:
        return args[0].shape == args[1].shape and (func is not _SAME_STORAGE or args[0].stride() == args[1].stride())
    if func is _ALLCLOSE:
        # Users ask above dispatch, where they are refused. Formulas ask whether a loss depends on what is arbitrary.
        if torch._C._current_graph_task_id() == -1:
            return None
        wanted, text = True, "the loss depends on what is arbitrary in a decomposition"
        with plain():  # composite operations do not come apart below dispatch
            truth: Any = torch.isclose(*args, **kwargs).all()
    else:
        found = _PRESUMED.get(_function())
        if found is None:
            return None
        wanted, text = found
        truth = args[0]
        if func is _aten.equal.default:
            truth = dispatch(_aten.all.default, (dispatch(_aten.eq.Tensor, args, kwargs),), {})
        if truth.dtype is not torch.bool:
            return None
    if not wanted:
        truth = dispatch(_aten.logical_not.default, (truth,), {})
    dispatch(_aten._assert_async.msg, (truth, text), {})
    return wanted


def no_short_cut() -> bool:
    """Return whether a truth value is asked for only to be faster. It may be said to be false, then."""
    return _asker().f_code in _SHORT_CUTS


def is_anomaly_check(func: Any) -> bool:
    """Return whether a number is read because the engine looks for NaN in what backward has computed."""
    return func is _aten._local_scalar_dense.default and torch.is_anomaly_check_nan_enabled() and torch._C._current_graph_task_id() != -1


def no_doubt(truth: torch.Tensor, dispatch: Callable[..., Any]) -> bool:
    """Return whether a truth value is asked for only for a distribution to refuse arguments.

    Then they are presumed to be right, and the worker is told to raise if they are not.

    Args:
        truth: The value.
        dispatch: Issues an operation on pointers.
    """
    frame = _asker()
    if frame.f_code not in _VALIDATORS:
        return False
    found = frame.f_locals
    constraint = type(found.get("constraint", found.get("support"))).__name__.strip("_")
    text = f"{found.get('param', 'value')} of {type(found['self']).__name__} must satisfy {constraint}"
    dispatch(_aten._assert_async.msg, (truth, text[:_LONGEST]), {})
    return True


def otherwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dispatch: Callable[..., Any]) -> Any:
    """Do what a function cannot do without a value: as a whole, or in steps if a gradient has to come back.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: The same by name.
        dispatch: Issues an operation on pointers.

    Returns:
        What the function returns, or NotImplemented if there is no other way.
    """
    operator = _WHOLE.get(func)
    if operator is None:
        return NotImplemented
    named = {_NAMES.get(name, name): value for name, value in kwargs.items()}
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if operator is _SPLIT or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _STEPS[operator](dispatch, *args, **named)
    with torch._C.DisableTorchFunctionSubclass():
        return dispatch(operator, args, named)


def _cov(
    dispatch: Callable[..., Any],
    self: torch.Tensor,
    correction: int = 1,
    fweights: torch.Tensor | None = None,
    aweights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what torch does, with `where` for the formula that it chooses by a value."""
    _as_a_whole(dispatch, _aten.cov.default, self, correction=correction, fweights=fweights, aweights=aweights)  # refuses what is wrong
    given = [weights for weights in (fweights, aweights) if weights is not None]
    weights = given[0] * given[1] if len(given) == 2 else given[0]
    rows = self if self.ndim == 2 else self.view(1, -1)
    total = weights.sum()
    mean = (rows * weights).sum(1) / total
    if aweights is not None and correction != 0:
        divisor = total - correction * (weights * aweights).sum() / total
    else:
        divisor = total - correction
    divisor = torch.where(divisor <= 0, 0, divisor)
    rows = rows - mean.unsqueeze(1)
    product = torch.mm(rows, (rows * weights).t().conj())
    if product.is_complex() and len(rows) == 1:
        product = torch.complex(product.real, torch.zeros_like(product.real))
    return torch.true_divide(product, divisor).squeeze()


def _narrow(dispatch: Callable[..., Any], self: torch.Tensor, dim: int, start: torch.Tensor, length: int) -> torch.Tensor:
    line = self.detach().new_zeros(self.size(dim), dtype=torch.bool)
    _as_a_whole(dispatch, _aten.narrow.Tensor, line, 0, start, length)  # refuses what is wrong
    before, _ = _as_a_whole(dispatch, _SPLIT, line, start.long().reshape(1))
    return torch.narrow(self, dim, before.shape[0], length)


def _tensor_split(
    dispatch: Callable[..., Any], self: torch.Tensor, tensor_indices_or_sections: torch.Tensor, dim: int = 0
) -> tuple[torch.Tensor, ...]:
    if not tensor_indices_or_sections.ndim:
        one = self.detach().new_zeros(1, dtype=torch.bool)
        return torch.tensor_split(self, len(torch.repeat_interleave(one, tensor_indices_or_sections.reshape(1))), dim)
    line = self.detach().new_zeros(self.size(dim), dtype=torch.bool)
    parts = _as_a_whole(dispatch, _SPLIT, line, tensor_indices_or_sections)
    # Where a part begins and how long it is comes with its metadata: what has a shape that depends on values tells of them.
    begin = parts[0].storage_offset()
    return tuple(torch.narrow(self, dim, part.storage_offset() - begin, part.shape[0]) for part in parts)


def _as_a_whole(dispatch: Callable[..., Any], operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a worker execute an operator that torch would take apart, on operands without a history."""
    plain_args = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
    named = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        return dispatch(operator, plain_args, named)


_STEPS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.cov.default: _cov,
    _aten.narrow.Tensor: _narrow,
    _SPLIT: _tensor_split,
}
"""What is done with pointers, in operations that have gradients, where an operator as a whole would have none."""


def is_averaging() -> bool:
    """Return whether a number of batches is asked for to divide by it. It may be said to be NaN, then.

    What comes of that is `average`'s to see, and so must be about pointers.
    """
    frame = _asker()
    return frame.f_code is _AVERAGING and hasattr(frame.f_locals["input"], "_route")


def average(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do what `batch_norm` does for a module without a momentum, whose factor is NaN as it could not be read.

    A kernel that begins with zeros and has the factor one leaves the statistics of the batch. The average of these and the present
    ones rounds as torch's kernels do that are for contiguous memory; those for other layouts do it in double precision.

    Args:
        args: What it was called with.
        kwargs: The same by name.

    Returns:
        What it returns, or NotImplemented if it was called by somebody else.
    """
    momentum = kwargs.get("momentum")
    if type(momentum) is not float or not math.isnan(momentum):
        return NotImplemented
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _AVERAGING:
        frame = frame.f_back
    source, *running = args
    if frame is None or frame.f_locals["self"].momentum is not None or any(one is None for one in running):
        return NotImplemented
    batch = [torch.zeros_like(one) for one in running]
    result = functional.batch_norm(source, batch[0], batch[1], **{**kwargs, "momentum": 1.0})
    with torch.no_grad():
        factor = (1.0 / frame.f_locals["self"].num_batches_tracked.double()).to(running[0].dtype)
        for one in running:
            one.mul_(1 - factor)
        running[0].add_(factor * batch[0])
        running[1].copy_(running[1].double() + factor.double() * batch[1].double())  # a fused multiply-add
    return result


def without_data(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a function makes of pointers on the device `meta`: it is here, for metadata is."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, _metadata, (tuple(args), dict(kwargs)))
    return func(*args, **kwargs)


def _metadata(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _asker() -> Any:
    """Return the frame that asks for a truth value: the nearest one that is not ours, in which modes may be on the way as well."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return frame


def _function() -> Any:
    """Return the function of torch's that is under way on pointers, the innermost."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__torch_function__" and "types" in frame.f_locals:
            return frame.f_locals["func"]
        frame = frame.f_back
    return None
