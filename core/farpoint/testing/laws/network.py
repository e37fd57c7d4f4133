"""What the laws are tested on: three workers, made by the fixture `farpoint_workers`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

import farpoint
from farpoint import PointerTensor
from farpoint.testing.contract import Contract

_numbers = count()


class Network:
    """Three workers of one kind.

    The laws use of a handle only what every handle has: `id`, `search`, `synchronize`, `close`, and `len` and
    `_objects`, which show what the worker stores when everything that this process issued has taken effect.

    Args:
        make: Returns the handle of a new worker of this name.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        farpoint.TorchHook(torch)
        # `sizes` collects garbage: what exists already, all of torch and pytest, need not be searched each time.
        gc.freeze()
        number = next(_numbers)
        self.bob, self.alice, self.charlie = self.all = [make(f"{name}{number}") for name in ("bob", "alice", "charlie")]

    def __getitem__(self, letters: str) -> list[Any]:
        """Return workers by their first letters, `a`, `b` and `c`."""
        known = {worker.id[0]: worker for worker in self.all}
        return [known[letter] for letter in letters]

    def sizes(self) -> list[int]:
        """Return how many objects bob, alice and charlie store."""
        # What an exception's traceback keeps alive is nobody's any more.
        gc.collect()
        return [len(worker) for worker in self.all]

    def send(self, tensor: Any, chain: str) -> Any:
        """Send a tensor so that it is reached by this chain: `ab` is me -> alice -> bob, with the data on bob."""
        for worker in reversed(self[chain]):
            tensor = tensor.send(worker)
        return tensor

    def close(self) -> None:
        """End the workers."""
        for worker in self.all:
            worker.close()
        gc.unfreeze()


class Law(Contract):
    """A law, to be run on every combination. The tests themselves cannot be overridden."""

    @pytest.fixture
    def network(self, farpoint_workers: Callable[[str], Any]) -> Iterator[Network]:
        """Return three workers."""
        network = Network(farpoint_workers)
        yield network
        network.close()


def numbers() -> Any:
    """Return the tensor that most tests send: 1, 2, 3, 4, 5."""
    return torch.arange(1.0, 6.0)


def home(x: Any) -> torch.Tensor:
    """Return what is at the end of a chain, with every pointer on the way spent."""
    while isinstance(x, PointerTensor):
        x = x.get()
    assert type(x) is torch.Tensor
    return x


def look(x: Any) -> torch.Tensor:
    """Return a copy of what is at the end of a chain, and leave the chain as it is."""
    while isinstance(x, PointerTensor):
        x = x.get(keep=True)
    assert type(x) is torch.Tensor
    return x


def as_user(source: str, **names: Any) -> dict[str, Any]:
    """Run lines as those of a user's file, `user.py`, and return its names: lines of this package count as farpoint's."""
    exec(compile(source, "user.py", "exec"), names)  # noqa: S102  # the source is a test's own
    return names


def raised(call: Callable[[], object]) -> Exception:
    """Return what a call raises, without the traceback, which would keep pointers alive."""
    try:
        call()
    except Exception as error:  # whatever it is, the test judges it
        return error.with_traceback(None)
    raise AssertionError("it raises nothing")
