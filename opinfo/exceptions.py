"""What does not work through pointers, why, and the error that says so."""

from __future__ import annotations

from typing import Final

import attrs

from farpoint import errors

OPERATIONS: Final = ("forward", "backward", "chain")


@attrs.frozen
class Listed:
    """An expected exception.

    Attributes:
        entry: Name in the database.
        error: Class of what must be raised, exactly.
        reason: Why it cannot work.
        columns: Where it is expected.
    """

    entry: str
    error: type[Exception]
    reason: str
    columns: tuple[str, ...] = OPERATIONS


_WITHOUT_GRADIENT: Final = ("forward", "chain")
_SPARSE: Final = "Sparse tensors do not travel: what checks all invariants of their indices is not written yet."

_ALL: Final[tuple[Listed, ...]] = (
    Listed("item", errors.ValueNotHereError, "It is the value, which leaves a worker by `get` alone.", _WITHOUT_GRADIENT),
    Listed("equal", errors.ValueNotHereError, "Likewise: `(p == q).all()` is the pointer that answers it.", _WITHOUT_GRADIENT),
    Listed("allclose", errors.ValueNotHereError, "Likewise: `torch.isclose(p, q).all()`.", _WITHOUT_GRADIENT),
    Listed("sparse.sampled_addmm", errors.EncodeError, _SPARSE),
    Listed("sparse.mm.reduce", errors.EncodeError, _SPARSE),
    Listed("to_sparse", errors.OperationNotAllowedError, _SPARSE),
    Listed("SparseAdam", errors.OperationNotAllowedError, "Likewise: it takes sparse gradients only.", ("optimizers",)),
    Listed(
        "nn.functional.linear_cross_entropy.chunked_none",
        errors.NotColocatedError,
        "Its backward formula is Python with buffers of its own, which it makes here and writes to. `options=None` has another one.",
        ("backward",),
    ),
)

LISTED: Final[dict[tuple[str, str], Listed]] = {(column, listed.entry): listed for listed in _ALL for column in listed.columns}
"""By column and entry."""

ROUNDED: Final = {"nn.LSTM": "oneDNN's kernel is not executed by workers: the steps are done one by one."}
"""Entries whose results need not be those of local torch to the bit, and why. How far they may be apart is in `comparing.py`."""
