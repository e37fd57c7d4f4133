"""The methods that `TorchHook` adds to `torch.Tensor` and `torch.nn.Module`. It adds names, and changes none."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from farpoint import handover, modules, multi
from farpoint.catalogue import annotate
from farpoint.errors import FarpointError
from farpoint.remote import me
from farpoint.worker import Worker


def _send(self: Any, worker: Any, *others: Any, **options: Any) -> Any:
    """Send a copy of this tensor to a worker, or to several: see `farpoint.send`."""
    return multi.send(self, worker, *others, **options)


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
_OF_MODULES = {"send": modules.send, "get": modules.get, "move": modules.move, "copy": modules.copy}


class TorchHook:
    """Adds `send`, `get`, `move`, `tag` and `describe` to the tensors of torch, and `send`, `get`, `move` and `copy` to its modules.

    Args:
        torch: The module `torch`.

    Raises:
        FarpointError: Torch, or somebody else, has a method of that name.
    """

    def __init__(self, torch: ModuleType) -> None:
        added: list[tuple[Any, str, Any]] = [(torch.Tensor, *item) for item in _METHODS.items()]
        added += [(torch.nn.Module, *item) for item in _OF_MODULES.items()]
        for kind, name, method in added:
            present = getattr(kind, name, None)
            if present is not None and present is not method:
                where = "farpoint" if kind is torch.Tensor else "farpoint.modules"
                raise FarpointError(f"torch.{kind.__name__}.{name} exists already, and TorchHook replaces nothing; use {where}.{name}()")
        for kind, name, method in added:
            setattr(kind, name, method)

    @property
    def local_worker(self) -> Worker:
        """The worker of this process."""
        return me()
