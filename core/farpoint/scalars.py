"""The permission to read single numbers: code of others that asks a loss for its value works as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree as pytree

_T: Any = torch.Tensor
_READERS: frozenset[Any] = frozenset(
    {
        *(_T.__bool__, _T.__int__, _T.__float__, _T.__complex__, _T.__index__, _T.__format__),
        *(_T.item, _T.tolist, _T.is_nonzero, torch.is_nonzero, torch.ops.aten._local_scalar_dense.default),
    }
)
_allowed: ContextVar[bool] = ContextVar("farpoint_scalars", default=False)


class allow_scalars:  # noqa: N801  # a context manager that is called like a function
    """Let `float(p)`, `p.item()`, `if p:` and the like fetch the value of a pointer to a single number, and wait for it.

    Without it they raise, so that no value leaves a worker by accident, and no line waits unseen. Optimizers that look at the loss
    need it: `with farpoint.allow_scalars(): optimizer.step(closure)`. Each number is asked for as by `p.get(keep=True)`, which the
    policy of the worker may refuse. It applies to this thread, or this task, until the block ends.

    Args:
        on: Whether they may.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._tokens.append(_allowed.set(self._on))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _allowed.reset(self._tokens.pop())


def may_read(func: Any, pointer: torch.Tensor) -> bool:
    """Return whether a call may have the value of a pointer."""
    return _allowed.get() and func in _READERS and pointer.numel() == 1


def read(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Call something with values in place of pointers."""
    from farpoint.handover import get

    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda value: get(value.detach(), keep=True), (tuple(args), dict(kwargs or {})))
    return func(*args, **kwargs)
