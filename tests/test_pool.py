"""Worker processes that tests use one after another: each test finds them empty, and each loan is a session of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import farpoint
from farpoint import LocalCluster
from farpoint.access import Credentials
from farpoint.peer import Peer
from farpoint.protocol.messages import Kind
from farpoint.provenance import caller
from farpoint.testing.laws.network import Network
from farpoint.testing.pool import Pool
from farpoint.worker import Worker

farpoint.TorchHook(torch)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with farpoint.local_cluster("bob", "alice", "charlie") as made:
        yield made


@pytest.fixture
def pool(cluster: LocalCluster) -> Pool:
    return Pool(cluster)


@pytest.fixture
def stranger(cluster: LocalCluster) -> Iterator[Peer]:
    """Return the session of another client with bob, which keeps what it sends there."""
    worker = Worker("stranger", "", ["msgpack"])
    yield worker.peer("bob", cluster.urls["bob"], credentials=Credentials(cluster.token))
    worker.close()


def test_it_lends_by_name_and_takes_back(pool: Pool, cluster: LocalCluster) -> None:
    processes = dict(cluster.processes)
    first = pool("bob7")
    session = first.peer.session_id
    assert first.id == "bob" and pool("alice7").id == "alice"
    first.close()
    again = pool("bob8")
    assert again.id == "bob" and again.peer.session_id != session
    assert pool("bob9").id == "bob.2"
    pool.check()
    assert cluster.processes["bob"] is processes["bob"]
    assert pool("bob10").id == "bob"
    pool.check()


def test_what_is_left_behind_is_found(pool: Pool, stranger: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool("bob1")
    held = stranger.references.refer(stranger.references.new_id())
    stranger.tell([int(Kind.PUT), held.id, torch.ones(2), False, [], ""], caller())
    stranger.request([int(Kind.SYNC), [], []])
    monkeypatch.setattr("farpoint.testing.transport.PATIENCE", 0)
    with pytest.raises(AssertionError, match=r"left something behind: bob stores \{.*size=\(2,\)"):
        pool.check()
    monkeypatch.undo()
    assert len(pool("bob2")) == 0
    pool.check()


def test_a_worker_that_was_lost_is_found(pool: Pool, cluster: LocalCluster) -> None:
    pool("bob1").synchronize()
    cluster.processes["bob"].kill()
    cluster.processes["bob"].wait()
    with pytest.raises(AssertionError, match="bob has ended with code -9"):
        pool.check()
    assert len(pool("bob2")) == 0
    pool.check()


def test_a_network_ends_a_worker_itself(pool: Pool, cluster: LocalCluster) -> None:
    network = Network(pool)
    network.end(network.alice)
    assert cluster.processes["alice"].returncode is not None
    network.close()
    pool.check()
    fresh = Network(pool)
    assert [worker.id for worker in fresh.all] == ["bob", "alice", "charlie"] and fresh.sizes() == [0, 0, 0]
    fresh.close()
    pool.check()
