"""What the laws are tested on: three workers, made by the fixture `farpoint_workers`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch

import farpoint
from farpoint import PointerTensor
from farpoint.testing.contract import Contract
from farpoint.testing.transport import PATIENCE

_numbers = count()


class Sizes(list[int]):
    """How many objects workers store.

    When they are compared they are counted again until they are what they should be, or patience is at its end: a
    release may still be on its way from one worker to the next.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = workers
        self.recount()

    def recount(self) -> None:
        """Count anew."""
        gc.collect()  # what a traceback or a ring keeps alive is nobody's any more
        self[:] = [len(worker) for worker in self._workers]

    def __eq__(self, other: object) -> bool:
        deadline = time.monotonic() + PATIENCE
        while list.__ne__(self, other):
            if time.monotonic() > deadline:
                return False
            self.recount()
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # a list has none


class Network:
    """Three workers of one kind.

    The laws use of a handle only what every handle has: `id`, `search`, `synchronize`, `close`, and `len`,
    which counts what the worker stores when everything that this process issued has taken effect.

    Args:
        make: Returns the handle of a new worker of this name. If closing a handle does not end the worker itself, it has a
            method `end` that does.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        farpoint.TorchHook(torch)
        self._end = getattr(make, "end", None)
        # Counting objects collects garbage: what exists already, all of torch and pytest, need not be searched each time.
        gc.freeze()
        number = next(_numbers)
        self.bob, self.alice, self.charlie = self.all = [make(f"{name}{number}") for name in ("bob", "alice", "charlie")]

    def __getitem__(self, letters: str) -> list[Any]:
        """Return workers by their first letters, `a`, `b` and `c`."""
        known = {worker.id[0]: worker for worker in self.all}
        return [known[letter] for letter in letters]

    def sizes(self) -> Sizes:
        """Return how many objects bob, alice and charlie store."""
        return Sizes(self.all)

    def send(self, tensor: Any, chain: str) -> Any:
        """Send a tensor so that it is reached by this chain: `ab` is me -> alice -> bob, with the data on bob."""
        for worker in reversed(self[chain]):
            tensor = tensor.send(worker)
        return tensor

    def end(self, worker: Any) -> None:
        """End a worker itself, and the session with it."""
        if self._end is not None:
            self._end(worker)
        else:
            worker.close()

    def close(self) -> None:
        """End the sessions with the workers, and those of this process altogether."""
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


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run these at once, each in a thread, and raise what one of them raises."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait(60)
            work()
        except BaseException as error:  # a thread tells nobody of its own accord
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    if failures:
        raise failures[0]
