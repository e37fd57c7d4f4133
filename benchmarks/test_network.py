"""What a network adds: workers that are processes of their own, beside bare TCP over loopback between two processes.

Large sizes are chosen with `FARPOINT_BENCHMARK_MEBIBYTES` (64,1024).
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import farpoint
from benchmarks.conftest import ROWS
from benchmarks.memory import Peak, size
from benchmarks.race import Lane, Race
from benchmarks.reference import MEBI, Reference
from farpoint.cluster import LocalCluster
from farpoint.tensors import payload
from pytest_farpoint import Combination

SIZES = [int(number) * MEBI for number in os.environ.get("FARPOINT_BENCHMARK_MEBIBYTES", "64,1024").split(",")]
PIPELINED = 2_000
TENSORS = 1_000


@pytest.fixture(scope="module", params=["tcp", "unix", "websocket"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    farpoint.progress(False)  # as users write it
    with farpoint.local_cluster("bob", "alice", transport=request.param, serializer="msgpack") as cluster:
        yield cluster
    farpoint.progress(os.environ.get("FARPOINT_PROGRESS") != "0")


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    with Reference() as reference:
        yield reference


@pytest.fixture
def race(benchmark: BenchmarkFixture, cluster: LocalCluster, request: pytest.FixtureRequest) -> Race:
    combination = Combination(cluster.urls["bob"].partition(":")[0], "msgpack", "memory")
    return Race(benchmark, combination, request.node.originalname, request.config.stash[ROWS])


def repeat(work: Callable[[], object]) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            work()

    return run


def test_round_trip(race: Race, cluster: LocalCluster, reference: Reference) -> None:
    one: Any = torch.ones(4)
    p, pp = one.send(cluster.bob), one.send(cluster.bob).send(cluster.alice)
    bare = Lane("64 bytes there and back over bare TCP", reference.echo, many=200)
    lanes = [
        Lane("bob.ping()", repeat(cluster.bob.ping), many=200),
        Lane("p.get(keep=True) of 4 floats", repeat(lambda: p.get(keep=True)), many=200),
        Lane("(p + p).sum().get()", repeat(lambda: (p + p).sum().get()), many=100),
        Lane("(pp + pp).sum().get().get() over a chain of two", repeat(lambda: (pp + pp).sum().get().get()), many=50),
    ]
    race.run(bare, *lanes, rounds=10)
    race.report(bare)
    for lane in lanes:
        race.report(lane, bare)


def test_pipelined(race: Race, cluster: LocalCluster, reference: Reference) -> None:
    def increment(start: Any) -> Callable[[int], None]:
        def run(times: int) -> None:
            x = start
            for _ in range(times):
                x = x + 1
            while isinstance(x, farpoint.PointerTensor):
                x = x.get()

        return run

    one: Any = torch.ones(4)
    bare = Lane("64 bytes there and back over bare TCP", reference.echo, many=200)
    direct = Lane(f"{PIPELINED} x = x + 1, then get: each", increment(one.send(cluster.bob)), many=PIPELINED)
    chain = Lane("the same over a chain of two", increment(one.send(cluster.bob).send(cluster.alice)), many=PIPELINED)
    race.run(bare, direct, chain, rounds=5)
    race.report(bare)
    race.report(direct, bare)
    race.report(chain, bare, f"{chain.seconds / direct.seconds:.2f} x one hop")


def test_many_small_tensors(race: Race, cluster: LocalCluster, reference: Reference) -> None:
    tensors: list[Any] = [torch.ones(256) for _ in range(TENSORS)]
    data = memoryview(bytes(1024))
    kept: list[Any] = []

    def send(times: int) -> None:
        kept[:] = [tensor.send(cluster.bob) for tensor in tensors[:times]]
        cluster.bob.synchronize()

    def get(times: int) -> None:
        for p in kept[:times]:
            p.get(keep=True)

    bare = Lane("1 KiB there, and an answer, over bare TCP", repeat(lambda: reference.send(data)), many=TENSORS)
    sent = Lane(f"{TENSORS} tensors of 1 KiB sent, each", send, many=TENSORS)
    got = Lane("got one by one, each", get, many=TENSORS)
    race.run(bare, sent, got, rounds=5)
    for lane in (bare, sent, got):
        race.report(lane, None if lane is bare else bare)


@pytest.mark.parametrize("nbytes", SIZES, ids=size)
def test_large(race: Race, cluster: LocalCluster, reference: Reference, nbytes: int) -> None:
    x: Any = torch.ones(nbytes // 4)
    held: list[Any] = [None]

    def send(times: int) -> None:
        held[0] = x.send(cluster.bob)

    def move(times: int) -> None:
        held[0] = held[0].move(cluster.alice)
        cluster.alice.synchronize()

    def get(times: int) -> None:
        held[0] = held[0].get()

    lanes = {
        "send": (Lane(f"{size(nbytes)} sent over bare TCP", lambda _: reference.send(payload(x)), many=1), Lane("x.send(bob)", send, many=1)),
        "get": (Lane(f"{size(nbytes)} received over bare TCP", lambda _: reference.get(nbytes), many=1), Lane("p.get()", get, many=1)),
    }
    moved = Lane("p.move(alice)", move, many=1)
    rounds = 5 if nbytes <= 128 * MEBI else 2
    # In this order each finds what it needs.
    race.run(lanes["send"][0], lanes["get"][0], lanes["send"][1], moved, lanes["get"][1], rounds=rounds)
    memory = {lane.name: peaks(cluster, lane) for lane in (lanes["send"][1], moved, lanes["get"][1])}
    for bare, lane in lanes.values():
        race.report(bare, note=speed(nbytes, bare))
        race.report(lane, bare, f"{speed(nbytes, lane)}; {memory[lane.name]}")
    race.report(moved, lanes["send"][0], f"{speed(nbytes, moved)}; {memory[moved.name]}")


@pytest.mark.parametrize("nbytes", SIZES[-1:], ids=size)
def test_round_trips_beside_a_large_tensor(race: Race, cluster: LocalCluster, nbytes: int) -> None:
    x: Any = torch.ones(nbytes // 4)
    one: Any = torch.ones(4)
    p = one.send(cluster.bob)
    alone = Lane("p.get(keep=True) of 4 floats", repeat(lambda: p.get(keep=True)), many=50)
    beside = Lane(f"the same while {size(nbytes)} are sent", lambda _: None, many=1)
    counts: list[int] = []

    def together(times: int) -> None:
        thread = threading.Thread(target=lambda: x.send(cluster.bob).free())
        thread.start()
        counts.append(0)
        while thread.is_alive():
            p.get(keep=True)
            counts[-1] += 1

    whole = Lane(f"{size(nbytes)} sent, with round trips beside it", together, many=1)
    race.run(alone, whole, rounds=2)
    beside.totals = [total / count for total, count in zip(whole.totals, counts[-len(whole.totals) :], strict=True)]
    race.report(alone)
    race.report(beside, alone, f"{statistics.median(counts):.0f} of them before it ends")


def peaks(cluster: LocalCluster, lane: Lane) -> str:
    """Do the work of a lane once more, and return how much memory each process took for it at most."""
    watched = {"me": Peak(), **{name: Peak(process.pid) for name, process in cluster.processes.items()}}
    lane.run(1)
    grown = {name: peak.growth() for name, peak in watched.items()}
    return "peak " + ", ".join(f"{name} +{'?' if nbytes is None else size(max(0, nbytes))}" for name, nbytes in grown.items())


def speed(nbytes: int, lane: Lane) -> str:
    return f"{nbytes / lane.seconds / 1e6:,.0f} MB/s"


