"""The methods that `TorchHook` adds to `torch.Tensor`. It adds names, and changes none."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from farpoint import handover
from farpoint.catalogue import annotate
from farpoint.errors import FarpointError
from farpoint.remote import me
from farpoint.worker import Worker


def _send(self: Any, worker: Any, **options: Any) -> Any:
    """Send a copy of this tensor to a worker: see `farpoint.send`."""
    return handover.send(self, worker, **options)


def _get(self: Any, keep: bool = False) -> Any:
    """Return this tensor: it is here."""
    return self


def _move(self: Any, worker: Any, **options: Any) -> Any:
    """Send this tensor to a worker: it has no other place to leave. To `me` it need not go."""
    return handover.move(self, worker, **options)


def _tag(self: Any, *tags: str) -> Any:
    """Write tags on this tensor; they travel with it."""
    return annotate(self, tags=tags)


def _describe(self: Any, description: str) -> Any:
    """Write a description on this tensor; it travels with it."""
    return annotate(self, description=description)


_METHODS = {"send": _send, "get": _get, "move": _move, "tag": _tag, "describe": _describe}


class TorchHook:
    """Adds `send`, `get`, `move`, `tag` and `describe` to the tensors of torch.

    Args:
        torch: The module `torch`.

    Raises:
        FarpointError: Torch, or somebody else, has a method of that name.
    """

    def __init__(self, torch: ModuleType) -> None:
        for name, method in _METHODS.items():
            present = getattr(torch.Tensor, name, None)
            if present is not None and present is not method:
                raise FarpointError(f"torch.Tensor.{name} exists already, and TorchHook replaces nothing; use farpoint.{name}()")
            setattr(torch.Tensor, name, method)

    @property
    def local_worker(self) -> Worker:
        """The worker of this process."""
        return me()
