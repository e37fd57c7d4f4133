"""Two workers and their clients as processes, to be killed and stopped; what the tests of faults share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint import LocalCluster, WorkerLostError
from farpoint.limits import Limits
from saboteur import EMPTY, PLUGIN, SECONDS, Station
from strangers import install

farpoint.TorchHook(torch)
LIMITS = Limits(lease_seconds=2.0, kept_seconds=2.0, reconnect_seconds=1.0)
SIZES = {"small": 4, "large": 2**20}  # of int64: 8 MiB are eight chunks


@attrs.frozen
class Stage:
    """Two workers with a saboteur each, and a host of clients."""

    cluster: LocalCluster
    folder: Path
    host: subprocess.Popen[str]

    def station(self, name: str) -> Station:
        return Station(self.folder, name)

    def kill(self, name: str) -> None:
        self.cluster.processes[name].kill()
        self.cluster.processes[name].wait(SECONDS)

    def revive(self, name: str) -> None:
        """Begin a new life of a worker, and a session with it: that with the old one may not have been given up yet."""
        known = self.cluster._handles[name]
        self.cluster.restart(name)
        with pytest.raises(WorkerLostError):
            known.ping()

    def client(self, size: str, what: str) -> int:
        """Let a client that is a process of its own do something, and return its pid."""
        assert self.host.stdin is not None and self.host.stdout is not None
        self.host.stdin.write(json.dumps([self.cluster.urls, self.cluster.token, SIZES[size], what]) + "\n")
        self.host.stdin.flush()
        while (line := self.host.stdout.readline()) == "done\n":
            pass  # of one that was killed a moment too late to keep it from saying so
        return int(line)

    def client_is_done(self) -> None:
        assert self.host.stdout is not None and self.host.stdout.readline() == "done\n"

    def becomes(self, name: str, **wanted: int) -> None:
        with self.station(name) as station:
            station.becomes(**wanted)


HOST = """
import json, os, signal, sys, torch, farpoint
from farpoint.limits import Limits
farpoint.TorchHook(torch)
torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    urls, token, size, what = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    limits = Limits(lease_seconds=2.0, kept_seconds=2.0, reconnect_seconds=1.0)
    bob, alice = [farpoint.connect(urls[name], token=token, limits=limits) for name in ("bob", "alice")]
    p = torch.arange(size).send(bob)
    if what == "move":
        q = p.move(alice)
    elif what == "get":
        p.get()
    else:
        pp = (p + p).send(alice)
        alice.synchronize()
    print("done", flush=True)
    signal.pause()
"""


@contextmanager
def performance(folder: Path, limits: Limits) -> Iterator[Stage]:
    """Set a stage, with limits."""
    install(folder, "stranger-sabotage", "sabotage", PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("FARPOINT_SABOTEUR", str(folder))
        host = subprocess.Popen(
            [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            with farpoint.local_cluster("bob", "alice", limits=limits) as cluster:
                yield Stage(cluster, folder, host)
        finally:
            os.killpg(host.pid, signal.SIGKILL)  # with the clients that it has forked
            host.communicate()


def data(size: str) -> Any:
    return torch.arange(SIZES[size])


def begin(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call something on another thread."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(call, *arguments)
    executor.shutdown(wait=False)
    return future


def works(stage: Stage) -> None:
    """Assert that moves go both ways, and leave nothing behind."""
    bob, alice = stage.cluster.bob, stage.cluster.alice
    for one, other in ((bob, alice), (alice, bob)):
        assert torch.equal(data("small").send(one).move(other).get(), data("small"))
    bob.synchronize()
    alice.synchronize()
    stage.becomes("bob", **EMPTY)
    stage.becomes("alice", **EMPTY)
