"""Processes that are killed and stopped: what a move, a call and a session come to when somebody dies at a given step.

`FARPOINT_FAULTS=all` tries every step with every victim; without it there are some of each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint import LocalCluster, TransportError, WorkerLostError
from farpoint.limits import Limits
from saboteur import EMPTY, IDLE, PLUGIN, SECONDS, Station
from strangers import install

farpoint.TorchHook(torch)
ALL = os.environ.get("FARPOINT_FAULTS") == "all"
LIMITS = Limits(lease_seconds=2.0, reconnect_seconds=1.0)
SIZES = {"small": 4, "large": 2**20}  # of int64: 8 MiB are eight chunks

SOURCE = [("bob", *point.split()) for point in (
    "takes Move", "sends Push", "sends chunk", "sent Push", "takes Prepared", "sends Commit", "sent Commit", "takes Activated",
    "sends Released", "sent Released",
)]
DESTINATION = [("alice", *point.split()) for point in (
    "takes chunk", "takes Push", "sends Prepared", "sent Prepared", "takes Commit", "sends Activated", "sent Activated",
    "takes Released", "took Released",
)]
UNSENT = [("bob", "takes", "Move"), ("bob", "sends", "Push"), ("bob", "sends", "chunk")]
"""Where nobody but the source has all of it."""
IN_FLIGHT = [("alice", "takes", "chunk"), ("alice", "takes", "Push")]
"""Where the destination is about to have it, and may learn before that the source is dead."""
OVER = [("bob", "takes", "Activated"), ("bob", "sends", "Released"), ("bob", "sent", "Released"), ("alice", "sent", "Activated"),
        ("alice", "takes", "Released"), ("alice", "took", "Released")]
"""Where the source has heard that the destination has it, or is about to."""


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
        return int(self.host.stdout.readline())

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
    limits = Limits(lease_seconds=2.0, reconnect_seconds=1.0)
    bob, alice = [farpoint.connect(urls[name], token=token, limits=limits) for name in ("bob", "alice")]
    x = torch.arange(size)
    p = x.send(bob)
    if what == "move":
        q = p.move(alice)
    elif what == "get":
        p.get()
    elif what == "hold":
        pp = (p + p).send(alice)
        alice.synchronize()
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("saboteur")
    install(folder, "stranger-sabotage", "sabotage", PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("FARPOINT_SABOTEUR", str(folder))
        host = subprocess.Popen(
            [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            with farpoint.local_cluster("bob", "alice", limits=LIMITS) as cluster:
                yield Stage(cluster, folder, host)
        finally:
            host.kill()
            host.communicate()


def data(size: str) -> Any:
    return torch.arange(SIZES[size])


def begin(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call something on another thread."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(call, *arguments)
    executor.shutdown(wait=False)
    return future


def interrupt(stage: Stage, p: Any, point: tuple[str, ...], victim: str, *, restarts: bool) -> Future[Any]:
    """Begin a move from bob to alice, and let somebody die when it has come to a point."""
    with stage.station(point[0]) as station:
        station.stop(*point[1:], times=3 if point[2] == "chunk" else 1)
        moving = begin(p.move, stage.cluster.alice)
        station.wait()
        stage.kill(victim)
        if restarts:
            stage.revive(victim)
        station.go()
    return moving


def cases(points: list[Any], *, slices: int) -> list[Any]:
    """Return every point with a small and a large tensor, or, unless all are wanted, some of them."""
    every = [(point, size) for point in points for size in SIZES if size == "large" or "chunk" not in point]
    return [pytest.param(*case, id=f"{'-'.join(case[0])}-{case[1]}") for case in (every if ALL else every[::slices])]


def works(stage: Stage) -> None:
    """Assert that moves go both ways, and leave nothing behind."""
    bob, alice = stage.cluster.bob, stage.cluster.alice
    for one, other in ((bob, alice), (alice, bob)):
        assert torch.equal(data("small").send(one).move(other).get(), data("small"))
    bob.synchronize()
    alice.synchronize()
    stage.becomes("bob", **EMPTY)
    stage.becomes("alice", **EMPTY)


@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize(("point", "size"), cases(SOURCE + DESTINATION, slices=5))
def test_the_source_is_killed(stage: Stage, point: tuple[str, str, str], size: str, restarts: bool) -> None:
    x = data(size)
    p = x.send(stage.cluster.bob)
    moving = interrupt(stage, p, point, "bob", restarts=restarts)
    error = moving.exception(SECONDS)
    if point in UNSENT or error is not None:
        assert point in UNSENT + IN_FLIGHT
        assert isinstance(error, WorkerLostError) and "bob" in str(error)
        stage.becomes("alice", **EMPTY)
        with pytest.raises(WorkerLostError, match="bob"):
            p.get()
    else:
        stage.becomes("alice", **IDLE, objects=1)
        assert torch.equal(moving.result().get(), x)
    del p, moving, error
    if not restarts:
        stage.revive("bob")
    works(stage)


@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize(("point", "size"), cases(SOURCE + DESTINATION, slices=5))
def test_the_destination_is_killed(stage: Stage, point: tuple[str, str, str], size: str, restarts: bool) -> None:
    x = data(size)
    p = x.send(stage.cluster.bob)
    moving = interrupt(stage, p, point, "alice", restarts=restarts)
    error = moving.exception(SECONDS)
    if point in OVER:
        assert error is None
        with pytest.raises(WorkerLostError, match="alice"):
            moving.result().get()
    else:
        assert isinstance(error, TransportError) and "is where it was" in str(error) and "alice" in str(error)
        stage.becomes("bob", **IDLE, objects=1)
        assert torch.equal(p.get(), x)
    del p, moving, error
    if not restarts:
        stage.cluster.bob.ping()
        stage.becomes("bob", **EMPTY)
        stage.revive("alice")
    works(stage)


@pytest.mark.parametrize(("point", "size"), cases(SOURCE + DESTINATION, slices=4))
def test_the_client_is_killed(stage: Stage, point: tuple[str, str, str], size: str) -> None:
    works(stage)
    with stage.station(point[0]) as station:
        station.stop(*point[1:], times=3 if point[2] == "chunk" else 1)
        pid = stage.client(size, "move")
        station.wait()
        os.kill(pid, signal.SIGKILL)
        station.go()
    stage.becomes("bob", **EMPTY)
    stage.becomes("alice", **EMPTY)
    works(stage)


def test_a_worker_is_back_before_others_know_that_it_was_gone(stage: Stage) -> None:
    works(stage)
    with stage.station("alice") as alice:
        alice.stop("loses", "bob")
        stage.kill("bob")
        alice.wait()
        stage.revive("bob")
        taken = alice.state()["taken"]
        p = data("small").send(stage.cluster.bob)
        moving = begin(p.move, stage.cluster.alice)
        alice.becomes(taken=taken + 1)
        alice.go()
        assert torch.equal(moving.result(SECONDS).get(), data("small"))
    works(stage)
