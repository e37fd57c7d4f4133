"""A move between two worker processes passes the client by: its sockets carry commands, and its memory does not grow."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
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

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "TCP_INFO") or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="bytes of a socket and peaks of memory are counted by Linux",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with farpoint.local_cluster("bob", "alice", transport="tcp") as cluster:
        yield cluster


def carried(worker: RemoteWorker) -> int:
    """Return the bytes that the client's socket to a worker has carried, in both directions, as the kernel counts them."""
    lane = worker.peer.channel.lane
    assert lane is not None
    link: Any = lane.link
    # `struct tcp_info` of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, two of its 64 bits.
    facts = link._stream._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acknowledged, received = struct.unpack_from("=QQ", facts, 120)
    return int(acknowledged + received)


def test_a_tensor_moves_directly(cluster: LocalCluster) -> None:
    one: Any = torch.ones(4)
    large = one.send(cluster.bob).repeat(SIZE // 16)  # made there
    cluster.bob.synchronize()
    cluster.alice.synchronize()
    before, peak = carried(cluster.bob) + carried(cluster.alice), Peak()
    moved = large.move(cluster.alice)
    cluster.alice.synchronize()
    grown, passed = peak.growth(), carried(cluster.bob) + carried(cluster.alice) - before
    assert moved.location is cluster.alice and moved.sum().get().item() == SIZE // 4
    assert 0 < passed < MEBI
    assert grown is not None and grown < 8 * MEBI


def test_the_counters_see_what_does_pass_the_client(cluster: LocalCluster) -> None:
    x: Any = torch.ones(4 * MEBI)
    before = carried(cluster.bob)
    p = x.send(cluster.bob)
    sent = carried(cluster.bob) - before
    before = carried(cluster.bob)
    y = p.get()
    received = carried(cluster.bob) - before
    assert x.nbytes <= sent < 1.1 * x.nbytes and x.nbytes <= received < 1.1 * x.nbytes
    assert torch.equal(x, y)
