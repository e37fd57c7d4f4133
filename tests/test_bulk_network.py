"""Large transfers between processes: others pass them, and they take one copy of the tensor on each side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farpoint
from benchmarks.memory import Peak
from farpoint.cluster import LocalCluster
from farpoint.remote import RemoteWorker

farpoint.TorchHook(torch)
MEBI = 2**20
SIZE = 256 * MEBI
ROUND_TRIPS = 10
"""At least: each flushes at most twice, and each time at most 9 MiB may go."""
BESIDE = 64 * MEBI
"""Memory that a transfer may take beside the copy that it makes: chunks under way, and what the allocator keeps of them."""


@pytest.fixture(scope="module", params=["tcp", "unix", "websocket"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with farpoint.local_cluster("bob", transport=request.param) as cluster:
        warm: Any = torch.ones(4 * MEBI)
        warm.send(cluster.bob).get()  # whatever is made once
        yield cluster


@pytest.fixture(scope="module")
def large() -> Any:
    return torch.arange(SIZE // 8)


def passed(worker: RemoteWorker, transfer: Callable[[], Any], progress: Callable[[], tuple[int, int]]) -> int:
    """Return how many round trips were begun and done while a transfer of another thread was under way.

    The client's reader acknowledges nothing by itself meanwhile, and sends no chunks: only what these round trips say does. So
    the transfer cannot end before they have passed it, however fast it is, and if they could not pass, neither would end.
    """
    small: Any = torch.ones(4)
    p = small.send(worker)
    worker.synchronize()
    channel = worker.peer.channel
    flush = channel.flush
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(transfer()))
    trips = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "flush", lambda: flush() if channel.may_wait() else None)
        thread.start()
        while thread.is_alive():
            for trip in (worker.ping, lambda: p.get(keep=True)):
                before, _ = progress()
                trip()
                done, total = progress()
                trips += 0 < before <= done < total
        thread.join()
    assert len(outcome) == 1
    return trips


def test_others_pass_a_tensor_that_is_sent(cluster: LocalCluster, large: Any) -> None:
    bulk = cluster.bob.peer.channel.bulk
    assert bulk is not None
    add, streams = bulk.add, []

    def noted(*arguments: Any) -> Any:
        streams.append(add(*arguments))
        return streams[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "add", noted)
        trips = passed(cluster.bob, lambda: large.send(cluster.bob), lambda: (streams[0].sent, streams[0].total) if streams else (0, 0))
    assert [stream.total for stream in streams] == [SIZE]
    assert trips >= ROUND_TRIPS


def test_others_pass_a_tensor_that_is_got(cluster: LocalCluster, large: Any) -> None:
    bulk = cluster.bob.peer.channel.bulk
    assert bulk is not None
    p = large.send(cluster.bob)
    received: list[Any] = []

    def progress() -> tuple[int, int]:
        return next(((arrival.received, arrival.total) for arrival in list(bulk._arrivals.values())), (0, 0))

    trips = passed(cluster.bob, lambda: received.append(p.get()), progress)
    assert torch.equal(received[0], large)
    assert trips >= ROUND_TRIPS


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are counted by Linux")
def test_a_transfer_takes_one_copy_on_each_side(cluster: LocalCluster, large: Any) -> None:
    pid = cluster.processes["bob"].pid
    here, there = Peak(), Peak(pid)
    p = large.send(cluster.bob)
    cluster.bob.synchronize()
    sent = here.growth(), there.growth()
    here, there = Peak(), Peak(pid)
    back = p.get()
    received = here.growth(), there.growth()
    assert torch.equal(back, large)
    assert sent[0] is not None and sent[1] is not None and received[0] is not None and received[1] is not None
    assert sent[0] < BESIDE, "who sends copies nothing"
    assert SIZE * 0.9 < sent[1] < SIZE + BESIDE
    assert SIZE * 0.9 < received[0] < SIZE + BESIDE
    assert received[1] < SIZE + BESIDE, "what leaves may be changed by what follows: it is copied first"
