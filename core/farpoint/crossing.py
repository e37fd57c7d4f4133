"""Autograd across workers: what goes one way in forward, its gradient comes back the other way in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # With create_graph this is recorded too, for `back` is differentiable itself.
        return ctx.back(grads[0]), None, None


def is_recorded(tensor: torch.Tensor) -> bool:
    """Return whether autograd would record what is done with a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


def cross(tensor: torch.Tensor, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
    """Let a tensor change hands within the graph.

    Args:
        tensor: What changes hands; autograd records it.
        there: Takes it, and returns what it becomes, without a history.
        back: Takes the gradient of that, and returns the gradient of the tensor. The gradient may be somebody else's too: it must
            not be spent. Nothing that `back` refers to may keep the tensor alive.
    """
    return _Crossing.apply(tensor, there, back)  # type: ignore[no-untyped-call]  # torch leaves it untyped
