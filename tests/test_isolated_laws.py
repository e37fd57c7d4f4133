"""The laws that say what operations do, on workers that run them in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from farpoint import RemoteWorker, VirtualWorker, remote
from farpoint.isolation.processes import zygote
from farpoint.testing.laws import TestL9ErrorsHappenWhereYouMadeThem, TestL12TorchIsTorch, TestPlans
from farpoint.worker import Worker

__all__ = ["TestL9ErrorsHappenWhereYouMadeThem", "TestL12TorchIsTorch", "TestPlans"]


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    """Keep one zygote for all tests: each would wait for torch to be imported."""
    zygote.enter()
    yield
    zygote.leave()


@pytest.fixture
def farpoint_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RemoteWorker]:
    """Return a function that makes an isolated worker of this process."""

    def make(name: str) -> RemoteWorker:
        with monkeypatch.context() as patch:
            patch.setattr(remote, "Worker", partial(Worker, isolate=True))
            return VirtualWorker(id=name)

    return make


def test_they_run_on_isolated_workers(farpoint_workers: Callable[[str], RemoteWorker]) -> None:
    bob = farpoint_workers("bob")
    assert isinstance(bob, VirtualWorker) and bob._worker.isolation is not None
    bob.close()
