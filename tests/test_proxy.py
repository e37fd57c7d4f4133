"""Through a proxy that means harm: everything takes effect once and in order, and nothing is left behind.

`FARPOINT_PROXY_SEEDS` says how many seeds are tried of each kind.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
import torch

import farpoint
from farpoint.errors import FarpointError, SynchronizationTimeoutError, TransportError
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.remote import handles
from farpoint.testing.transport import eventually
from farpoint.worker import Worker
from proxy import Proxy
from wire import check_books, check_idle

farpoint.TorchHook(torch)
SEEDS = int(os.environ.get("FARPOINT_PROXY_SEEDS", "3"))
CUTS = 12
LIMITS = Limits(
    ping_seconds=0.5, pong_seconds=0.5, open_seconds=2.0, close_seconds=0.5, stall_seconds=2.0, lease_seconds=60.0, links_per_address=1000,
    failed_logins=1000,
)
NOWHERE = {"tcp": "tcp://127.0.0.1:0", "ws": "ws://127.0.0.1:0"}
names = itertools.count()
T = TypeVar("T")


def persist(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Repeat what needs a first link, which only a session that exists gets anew."""
    for _ in range(2 * CUTS):
        try:
            return call(*arguments, **options)
        except (TransportError, SynchronizationTimeoutError):
            pass
    return call(*arguments, **options)


class Place:
    """A worker that is reached through a proxy only, also by others of its kind."""

    def __init__(self, stack: ExitStack, scheme: str, seed: int, cuts: int, **options: Any) -> None:
        self.worker = Worker(f"bob-{next(names)}.far", NOWHERE[scheme], ["msgpack"], limits=LIMITS)
        stack.callback(self.worker.close)
        self.proxy = stack.enter_context(Proxy(self.worker.listens, seed, cuts, **options))
        self.worker.url = self.proxy.url
        self.executed: list[tuple[int, int]] = []
        execute = self.worker.execute

        def counted(guest: Any, number: int, message: list[Any]) -> None:
            if message[0] in (Kind.RUN, Kind.RUNPLAN):
                self.executed.append((guest.holder, number))
            execute(guest, number, message)

        self.worker.execute = counted  # type: ignore[method-assign]
        self.handle = persist(farpoint.connect, self.proxy.url, limits=LIMITS)
        stack.callback(self.handle.close)

    def check_empty(self) -> None:
        """Assert that nothing is left, as soon as all has arrived."""
        for handle in handles():
            handle.ping()
        eventually(lambda: not self.worker.store and not self.worker.poisoned)
        check_books(self.worker)
        check_idle(self.worker)
        for guest in self.worker.guests.values():
            assert guest.channel.bulk is not None
            assert not guest.channel.bulk._arrivals and not guest.channel.bulk._waiting and not guest.channel.bulk._loaded


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def seeds() -> list[Any]:
    return [pytest.param(scheme, seed, id=f"{scheme}-{seed}") for seed in range(SEEDS) for scheme in NOWHERE]


@pytest.mark.parametrize(("scheme", "seed"), seeds())
def test_dependent_operations(stack: ExitStack, scheme: str, seed: int) -> None:
    place = Place(stack, scheme, seed, CUTS)
    chance = random.Random(seed)
    x: Any = torch.arange(8)
    p = x.send(place.handle)
    for _ in range(2000):
        factor, term = 2 * chance.randrange(1000) + 1, chance.randrange(2**40)
        match chance.randrange(100):
            case 0:
                assert torch.equal(p.get(keep=True), x)
            case 1 | 2:
                place.handle.flush()
        if chance.random() < 0.5:
            p.mul_(factor).add_(term)
            x.mul_(factor).add_(term)
        else:
            p = (p + term) * factor
            x = (x + term) * factor
    assert torch.equal(p.get(), x), "out of order, or not all of it, or some of it twice"
    assert len(place.executed) == len(set(place.executed)) == 4000
    place.check_empty()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("scheme", "seed"), seeds())
def test_plans(stack: ExitStack, scheme: str, seed: int, frozen: bool) -> None:
    place = Place(stack, scheme, seed, CUTS)
    x: Any = torch.arange(8)
    p = x.send(place.handle)

    @farpoint.plan(frozen=frozen)
    def step(q: Any) -> Any:
        return q.mul_(3).add_(7) + 1

    for _ in range(600):
        q = step(p)
        x.mul_(3).add_(7)
    assert torch.equal(q.get(), x + 1) and torch.equal(p.get(), x), "out of order, or not all of it, or some of it twice"
    assert step.replays >= 598 and len(place.executed) == len(set(place.executed)) < 610
    del step
    place.check_empty()


@pytest.mark.parametrize(("scheme", "seed"), seeds())
def test_large_tensors(stack: ExitStack, scheme: str, seed: int) -> None:
    place = Place(stack, scheme, seed, CUTS)
    x: Any = torch.randint(256, (3 * 2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        p = x.send(place.handle)
        q = p + 1
        assert torch.equal(q.get(), x + 1)
        assert torch.equal(p.get(), x)
    assert len(place.executed) == len(set(place.executed)) == 3
    place.check_empty()


@pytest.mark.parametrize(("scheme", "seed"), seeds())
def test_moves(stack: ExitStack, scheme: str, seed: int) -> None:
    places = [Place(stack, scheme, seed + number, CUTS) for number in range(2)]
    x: Any = torch.arange(2**18 if seed % 2 else 8)
    p = x.send(places[0].handle)
    for turn in range(1, 11):
        p = persist(p.move, places[turn % 2].handle)
        p += 1
    pp = p.send(places[1].handle)
    assert torch.equal((pp + p.send(places[1].handle)).get().get(), 2 * (x + 10))
    del pp
    assert torch.equal(p.get(), x + 10)
    for place in places:
        place.check_empty()


class Flip:
    """Changes one bit of what passes in one direction, behind the first megabyte and a half."""

    def __init__(self, *, upwards: bool) -> None:
        self.upwards = upwards
        self.passed = 0
        self.done = False

    def __call__(self, piece: bytes, dialled: bool) -> bytes:
        if dialled is self.upwards and not self.done:
            self.passed += len(piece)
            if self.passed > 3 * 2**19:
                self.done = True
                return piece[:-1] + bytes([piece[-1] ^ 4])
        return piece


@pytest.mark.parametrize("scheme", NOWHERE)
@pytest.mark.parametrize("upwards", [True, False], ids=["send", "get"])
def test_a_flipped_bit_is_noticed(stack: ExitStack, scheme: str, upwards: bool) -> None:
    flip = Flip(upwards=upwards)
    place = Place(stack, scheme, 0, 0, change=flip)
    x: Any = torch.zeros(3 * 2**20, dtype=torch.uint8)
    call = (lambda: x.send(place.handle)) if upwards else x.send(place.handle).get
    with pytest.raises(FarpointError, match="changed on the way: its checksum is wrong"):
        call()
    assert flip.done
    again = farpoint.connect(place.proxy.url, limits=LIMITS)
    assert torch.equal(x.send(again).get(), x)
    place.handle = again
    place.check_empty()
    again.close()
