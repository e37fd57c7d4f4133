"""Workers that stand still, and clients that are cut off: calls say so in time, and everything goes on where it was."""

from __future__ import annotations

import signal
from pathlib import Path

import attrs
import pytest
import torch

import farpoint
from farpoint import SynchronizationTimeoutError, TransportError, WorkerLostError, WorkerRestartedError
from farpoint.limits import Limits
from farpoint.testing.transport import eventually
from proxy import Proxy
from saboteur import EMPTY, SECONDS
from stage import LIMITS, begin, data, performance, works

PATIENT = Limits(progress_seconds=1.0)
ALERT = attrs.evolve(PATIENT, ping_seconds=0.3, pong_seconds=0.3, open_seconds=0.5)
"""Also about links: who is silent loses its link, and the session goes on without."""


@pytest.mark.parametrize("limits", [PATIENT, ALERT], ids=["link kept", "link given up"])
def test_a_worker_is_stopped(limits: Limits) -> None:
    with farpoint.local_cluster("bob", limits=limits) as cluster:
        x = data("small")
        p = x.send(cluster.bob)
        cluster.bob.synchronize()
        peer = cluster.bob.peer
        link = peer.channel.lane
        cluster.processes["bob"].send_signal(signal.SIGSTOP)
        p.add_(1)
        with pytest.raises(SynchronizationTimeoutError, match="bob"):
            p.get()
        if limits is ALERT:
            eventually(lambda: peer.channel.lane is None)
            with pytest.raises(SynchronizationTimeoutError, match="bob"):
                data("large").send(cluster.bob)
        cluster.processes["bob"].send_signal(signal.SIGCONT)
        assert torch.equal((p + 1).get(), x + 2)
        assert torch.equal(p.get(), x + 1)
        assert peer is cluster.bob.peer and (peer.channel.lane is link) == (limits is PATIENT)
        assert len(cluster.bob) == 0


def test_nothing_is_executed_for_a_second_time_in_the_next_life() -> None:
    with farpoint.local_cluster("bob") as cluster:
        p = data("small").send(cluster.bob)
        cluster.bob.synchronize()
        cluster.processes["bob"].send_signal(signal.SIGSTOP)
        q = p + 1
        cluster.bob.flush()
        cluster.restart("bob")
        for call in (q.get, p.get, q.get):
            with pytest.raises(WorkerRestartedError, match=r"bob.* has begun a new life, without our objects"):
                call()
        assert len(cluster.bob) == 0


@pytest.mark.parametrize("staged", [False, True])
def test_the_destination_of_a_move_is_stopped(tmp_path: Path, staged: bool) -> None:
    with performance(tmp_path, attrs.evolve(ALERT, lease_seconds=2.0, kept_seconds=2.0)) as stage, stage.station("alice") as alice:
        works(stage)
        p = data("small").send(stage.cluster.bob)
        if staged:
            alice.stop("sends", "Prepared")
            moving = begin(p.move, stage.cluster.alice)
            alice.wait()
        stage.cluster.processes["alice"].send_signal(signal.SIGSTOP)
        if not staged:
            moving = begin(p.move, stage.cluster.alice)
        error = moving.exception(SECONDS)
        assert isinstance(error, TransportError) and "is where it was: alice" in str(error)
        assert torch.equal(p.get(), data("small"))
        stage.cluster.processes["alice"].send_signal(signal.SIGCONT)
        if staged:
            alice.go()  # what it says now is too late
        del p, moving, error
        stage.cluster.bob.ping()
        alice.becomes(**EMPTY)
        stage.becomes("bob", **EMPTY)


def test_a_client_is_cut_off(tmp_path: Path) -> None:
    with performance(tmp_path, LIMITS) as stage, Proxy(stage.cluster.urls["bob"]) as way, stage.station("bob") as station:
        stage.cluster.bob.close()
        bob = farpoint.connect(way.url, token=stage.cluster.token, limits=attrs.evolve(LIMITS, reconnect_seconds=60.0))
        p = data("small").send(bob)
        guests = station.state()["guests"]
        for _ in range(3):
            way.cut()
            p.add_(1)
        assert torch.equal(p.get(keep=True), data("small") + 3)
        station.becomes(objects=1, guests=guests)
        port = int(way.url.rpartition(":")[2])
        way.close()
        station.becomes(**EMPTY, guests=guests - 1)  # for longer than the lease
        # Whoever comes first: the worker says so, or the client itself knows that the lease has run out.
        refused = "has given our session up|cannot be reached any more"
        with Proxy(stage.cluster.urls["bob"], port=port), pytest.raises(WorkerLostError, match=refused):
            p.get()
        bob.close()
