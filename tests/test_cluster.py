"""Clusters of processes on this machine: they start, reach each other, are restarted, and end whatever ends their owner."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farpoint
from farpoint import (
    LocalCluster,
    PluginError,
    QuotaError,
    TransportError,
    WorkerLostError,
    WorkerRestartedError,
)
from farpoint.access import Credentials
from farpoint.limits import Limits
from farpoint.plugins import plugins
from farpoint.testing.transport import Recorder

farpoint.TorchHook(torch)
SECONDS = 60


def data() -> Any:
    return torch.arange(3.0)


def ended(pid: int, within: float = SECONDS) -> bool:
    """Return whether a process has ended, or does so in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within)[0])
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with farpoint.local_cluster("one", "two", limits=Limits(objects=50)) as made:
        yield made


@pytest.mark.parametrize("transport", ["tcp", "tls", "unix", "websocket"])
def test_workers_reach_each_other(transport: str) -> None:
    with farpoint.local_cluster("bob", "alice", transport=transport) as cluster:
        assert list(cluster) == ["bob", "alice"] and len(cluster) == 2
        assert cluster.bob is cluster["bob"] is farpoint.connect(cluster.urls["bob"], token=cluster.token)
        assert {process.pid for process in cluster.processes.values()}.isdisjoint({os.getpid()})
        p = data().send(cluster.bob).send(cluster.alice)
        assert torch.equal((p + p).get().get(), 2 * data())
        assert torch.equal(data().send(cluster.bob).move(cluster.alice).get(), data())
    assert [process.returncode for process in cluster.processes.values()] == [0, 0]
    cluster.close()


def test_what_it_shows_holds_no_secret(cluster: LocalCluster) -> None:
    assert cluster.token not in repr(cluster) and "one at tcp://127.0.0.1:" in repr(cluster)
    assert all(cluster.token not in cluster.output(name) for name in cluster)
    assert "one: a session with me" in cluster.output("one")
    for process in cluster.processes.values():
        assert cluster.token not in Path(f"/proc/{process.pid}/cmdline").read_text()


def test_a_token_is_needed(cluster: LocalCluster) -> None:
    url = cluster.urls["two"]
    with pytest.raises(TransportError, match="does not let us in"):
        plugins.transport(url).connect(url, Recorder(), Credentials("a wrong one"))


def test_names_that_it_does_not_have(cluster: LocalCluster) -> None:
    with pytest.raises(AttributeError, match="no worker 'bob': it has one, two"):
        cluster.bob  # noqa: B018  # to be refused
    with pytest.raises(KeyError):
        cluster["bob"]


def test_limits_reach_the_workers(cluster: LocalCluster) -> None:
    kept = [data().send(cluster.two) for _ in range(50)]
    kept.append(data().send(cluster.two))
    with pytest.raises(QuotaError, match="objects=50"):
        cluster.two.synchronize()
    kept.clear()
    assert len(cluster.two) == 0


def test_a_forked_child_leaves_it_alone(cluster: LocalCluster) -> None:
    pid = os.fork()
    if not pid:
        cluster.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(data().send(cluster.two).get(), data())


def test_restart_is_a_new_life_at_the_same_place() -> None:
    with farpoint.local_cluster("bob") as cluster:
        old, process, url = cluster.bob, cluster.processes["bob"], cluster.urls["bob"]
        p = data().send(old)
        old.synchronize()
        cluster.restart("bob")
        assert process.returncode == -signal.SIGKILL and cluster.urls["bob"] == url
        assert cluster.processes["bob"].pid != process.pid
        with pytest.raises(WorkerRestartedError):
            p.get()
        assert cluster.bob is not old
        assert torch.equal(data().send(cluster.bob).get(), data())


def test_it_closes_though_workers_are_stopped_or_dead() -> None:
    cluster = farpoint.local_cluster("bob", "alice")
    cluster.processes["bob"].send_signal(signal.SIGSTOP)
    cluster.processes["alice"].kill()
    cluster.close()
    assert cluster.processes["bob"].returncode == 0 and cluster.processes["alice"].returncode == -signal.SIGKILL


def test_why_a_worker_did_not_start() -> None:
    with pytest.raises(WorkerLostError, match=r"ended with code 2 before it listened.*store 'shelf': no installed plugin provides it"):
        farpoint.local_cluster("bob", store="shelf")


def test_a_transport_that_stays_within_a_process() -> None:
    with pytest.raises(PluginError, match="VirtualWorker"):
        farpoint.local_cluster("bob", transport="virtual")


def test_a_name_that_is_none() -> None:
    with pytest.raises(farpoint.InvalidNameError):
        farpoint.local_cluster("bob and alice")


OWNER = """
import signal, sys, farpoint
cluster = farpoint.local_cluster("bob")
print(cluster.processes["bob"].pid, cluster._folder.name, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, None])
def test_workers_end_with_their_owner(number: int | None) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert owner.stdin is not None and owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    if number is not None:
        owner.send_signal(number)
    owner.stdin.close()
    owner.wait(SECONDS)
    assert ended(int(pid))
    assert number == signal.SIGKILL or not Path(folder.decode()).exists()
    owner.stdout.close()
