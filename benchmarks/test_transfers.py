"""What it costs to send a tensor and to get it back, beside copying it here."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable

import torch

from benchmarks.memory import growth
from benchmarks.race import Lane, Race
from farpoint import VirtualWorker

LARGE = 64 * 2**20


def there_and_back(x: torch.Tensor, worker: VirtualWorker) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            x.send(worker).get()  # type: ignore[attr-defined]  # TorchHook has added it

    return run


def clone(x: torch.Tensor) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            x.clone()

    return run


def memcpy(x: torch.Tensor) -> Callable[[int], None]:
    target = torch.zeros_like(x)
    size = x.numel() * x.itemsize

    def run(times: int) -> None:
        for _ in range(times):
            ctypes.memmove(target.data_ptr(), x.data_ptr(), size)

    return run


def test_four_floats(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(4)
    local = Lane("clone of 4 floats", clone(x), many=100)
    remote = Lane("send + get of 4 floats", there_and_back(x, bob), bob.synchronize, 100)
    race.run(local, remote, rounds=30)
    race.report(local)
    race.report(remote, local)


def test_64_mebibytes(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(LARGE // 4)
    cloned = Lane("clone of 64 MiB", clone(x), many=1)
    copied = Lane("memcpy of 64 MiB", memcpy(x), many=1)
    remote = Lane("send + get of 64 MiB", there_and_back(x, bob), bob.synchronize, 1)
    race.run(cloned, copied, remote, rounds=10)
    for lane in (cloned, copied):
        race.report(lane, None if lane is cloned else cloned, f"{LARGE / lane.seconds / 1e6:,.0f} MB/s")
    beside = statistics.median(one / other for one, other in zip(remote.totals, copied.totals, strict=True))
    peak = growth(lambda: remote.run(1), bob.synchronize).peak
    copies = "" if peak is None else f"; at most {peak / LARGE:.1f} further copies in memory"
    speed = f"{2 * LARGE / remote.seconds / 1e6:,.0f} MB/s, counting both ways; {beside:.1f} x memcpy"
    race.report(remote, cloned, speed + copies)
