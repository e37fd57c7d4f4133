"""What local torch returns against what pointers return: values, dtype, shape, stride."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

import farpoint
from opinfo.places import Place

UNWRITTEN: Final = frozenset(
    "empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize_ resize_as_".split()
)
"""Entries whose values torch leaves open, all or some of them: of these only the metadata is compared."""

ROUNDING: Final = 1e-4
"""How far results may be apart, relatively and absolutely, where torch takes another route for subclasses of tensors."""


class DifferenceError(Exception):
    """Pointers returned something else, and said nothing: silently wrong."""


class RoundingError(DifferenceError):
    """They differ by no more than what another route of torch's to the same result may explain."""


def compare(entry: str, expected: Any, found: Any, place: Place) -> None:
    """Compare two results of one call.

    Raises:
        RoundingError: They differ, by very little.
        DifferenceError: They differ.
    """
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        raise DifferenceError(f"{len(theirs)} results became {len(ours)}")
    for position, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        where = f"result {position}: " if len(theirs) > 1 else ""
        if not isinstance(one, torch.Tensor):
            if one is not other and one != other:
                raise DifferenceError(f"{where}{one!r} became {other!r}")
            continue
        _compare_tensors(entry, where, one.detach(), other, place)


def _compare_tensors(entry: str, where: str, one: torch.Tensor, other: Any, place: Place) -> None:
    if not isinstance(other, torch.Tensor):
        raise DifferenceError(f"{where}a tensor became {other!r}")
    other = other.detach()
    _same(where, one, other)
    if isinstance(other, farpoint.PointerTensor):
        value = place.fetch(other)
        stored = place.stored(other)
        if stored is not None:
            _same(f"{where}on the worker, ", one, stored)
    else:
        value = other
    if value.dtype != one.dtype or value.shape != one.shape:
        raise DifferenceError(f"{where}a tensor of {one.dtype} {tuple(one.shape)} came as {value.dtype} {tuple(value.shape)}")
    if entry in UNWRITTEN:
        return
    one, value = _plain(one), _plain(value)
    same = (one == value) | (one.isnan() & value.isnan())
    if bool(same.all()):
        return
    apart = float((one - value).abs().nan_to_num(torch.inf, torch.inf).max())
    kind = RoundingError if torch.allclose(one, value, rtol=ROUNDING, atol=ROUNDING, equal_nan=True) else DifferenceError
    raise kind(f"{where}{int((~same).sum())} of {one.numel()} values differ, by up to {apart:.3g}")


def _same(where: str, one: torch.Tensor, other: torch.Tensor) -> None:
    for name, what, it in (
        ("shape", tuple(one.shape), tuple(other.shape)),
        ("dtype", one.dtype, other.dtype),
        ("stride", one.stride(), other.stride()),
        ("conj bit", one.is_conj(), other.is_conj()),
        ("neg bit", one.is_neg(), other.is_neg()),
    ):
        if what != it:
            # The strides may be another route's as well.
            raise (RoundingError if name == "stride" else DifferenceError)(f"{where}{name} {what} became {it}")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    return tensor.to(torch.float64) if tensor.is_floating_point() or tensor.dtype is torch.bool else tensor.to(torch.int64)
