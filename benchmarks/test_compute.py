"""What operations on pointers cost, beside the same operations of plain torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.memory import growth
from benchmarks.race import FEW, Lane, Race
from benchmarks.table import duration
from farpoint import PointerTensor, VirtualWorker


def double(x: torch.Tensor) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            x + x

    return run


def increment(start: torch.Tensor) -> Callable[[int], None]:
    def run(times: int) -> None:
        x = start
        for _ in range(times):
            x = x + 1  # a new tensor each time: it is the old one's end that costs

    return run


def train(model: nn.Linear, x: torch.Tensor) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            model(x).sum().backward()
            model.weight.grad = None
            model.bias.grad = None

    return run


def chain(x: torch.Tensor, *workers: VirtualWorker) -> torch.Tensor:
    """Return a pointer to a pointer and so on: the first worker is the first hop."""
    for worker in reversed(workers):
        x = x.send(worker)  # type: ignore[attr-defined]  # TorchHook has added it
    return x


def test_add(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(4)
    local = Lane("x + x in torch", double(x))
    remote = Lane("p + p", double(chain(x, bob)), bob.synchronize, few=FEW)
    race.run(local, remote, rounds=30)
    race.report(local)
    race.report(remote, local)


def test_chain(race: Race, workers: list[VirtualWorker]) -> None:
    x = torch.ones(4)
    local = Lane("x + x in torch", double(x))
    lanes = [
        Lane(f"p + p over a chain of {hops}", double(chain(x, *workers[:hops])), workers[0].synchronize, 500, FEW)
        for hops in (1, 2, 3)
    ]
    race.run(local, *lanes, rounds=20)
    race.report(lanes[0], local)
    for shorter, lane in itertools.pairwise(lanes):
        hop = statistics.median(one - other for one, other in zip(lane.totals, shorter.totals, strict=True))
        ratio = lane.seconds / lanes[0].seconds
        race.report(lane, local, f"this hop: {duration(hop)}; {ratio:.2f} x one hop")


def test_linear(race: Race, bob: VirtualWorker) -> None:
    model, x = nn.Linear(64, 64), torch.ones(16, 64)
    there = nn.Linear(64, 64)
    there.weight = nn.Parameter(chain(there.weight.detach(), bob))
    there.bias = nn.Parameter(chain(there.bias.detach(), bob))
    assert isinstance(there.weight, PointerTensor)
    local = Lane("Linear(64, 64) in torch", train(model, x), many=50)
    # One time is about a dozen commands.
    remote = Lane("Linear(64, 64), forward + backward", train(there, chain(x, bob)), bob.synchronize, 50, FEW // 16)
    race.run(local, remote, rounds=20)
    race.report(local)
    race.report(remote, local)


def test_ten_thousand(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(4)
    local = Lane("10 000 x = x + 1 in torch, each", increment(x), many=10_000)
    remote = Lane("10 000 x = x + 1, each", increment(chain(x, bob)), bob.synchronize, 10_000, FEW)
    race.run(local, remote, rounds=3)
    race.report(local, note=memory_of(local))
    race.report(remote, local, f"{memory_of(remote)}; {len(bob._objects)} object stored")


def test_one_mebibyte(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(2**18)
    local = Lane("500 x = x + 1 of 1 MiB in torch, each", increment(x), many=500)
    remote = Lane("500 x = x + 1 of 1 MiB, each", increment(chain(x, bob)), bob.synchronize, 500)
    race.run(local, remote, rounds=5)
    race.report(local, note=memory_of(local))
    race.report(remote, local, f"{memory_of(remote)}; {len(bob._objects)} object stored")


def memory_of(lane: Lane) -> str:
    """Return what one round of a lane takes of memory, as text."""
    wait = lane.wait or (lambda: None)

    def work() -> None:
        lane.run(lane.many)
        wait()

    # The second wait sends the references of whatever was garbage when the first one came.
    return str(growth(work, wait))
