"""Handing a pointer over: whoever gives one away keeps its own reference until the owner lists the receiver.

First a model of three parties without I/O, over links that are each late by as much as they like: me commands alice and bob,
and alice commands bob. Sessions and lists of holders are the real ones. Then the real parties, over links of that kind.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farpoint
from farpoint import PointerTensor, VirtualWorker
from farpoint.protocol.references import Holders
from farpoint.protocol.session import Session
from wire import check_books, check_idle, late_links

farpoint.TorchHook(torch)


class Freed(AssertionError):
    """An object was needed and is gone."""


class Client:
    """One party's session with another: commands, the answers to them, and how many references it has there."""

    def __init__(self, execute: Callable[[int, list[Any]], Any]) -> None:
        self.here, self.there = Session(b"c", b"w"), Session(b"w", b"c")
        self.lines: dict[bool, deque[Any]] = {True: deque(), False: deque()}
        self.pending: dict[int, Callable[[Any], object]] = {}
        self.counts: dict[int, int] = {}
        self.execute = execute

    def refer(self, object_id: int) -> int:
        self.counts[object_id] = self.counts.get(object_id, 0) + 1
        return object_id

    def drop(self, object_id: int) -> None:
        self.counts[object_id] -= 1
        if not self.counts[object_id]:
            del self.counts[object_id]
            self.here.submit(["RELEASE", object_id])

    def ask(self, message: list[Any], then: Callable[[Any], object]) -> None:
        self.pending[self.here.submit(message)] = then

    def steps(self) -> list[Callable[[], None]]:
        """Return what may happen on this link next."""
        found = []
        if self.here.waiting:
            found.append(lambda: self.lines[True].append(self.here.pack()))
        if self.there.waiting:
            found.append(lambda: self.lines[False].append(self.there.pack()))
        if self.lines[True]:
            found.append(self.arrive_there)
        if self.lines[False]:
            found.append(self.arrive_here)
        return found

    def arrive_there(self) -> None:
        for number, message in self.there.receive(self.lines[True].popleft()):
            self.execute(number, message)

    def arrive_here(self) -> None:
        for _, (about, value) in self.here.receive(self.lines[False].popleft()):
            self.pending.pop(about)(value)


class Model:
    """Me, alice and bob.

    Args:
        pin_link: Whether who sends a pointer keeps its reference until the owner lists the receiver.
        pin_fetch: Whether who fetches a pointer keeps the giver's entry until the owner lists the fetcher.
    """

    def __init__(self, seed: int, *, pin_link: bool = True, pin_fetch: bool = True) -> None:
        self.random = random.Random(seed)
        self.pin_link, self.pin_fetch = pin_link, pin_fetch
        self.ids = itertools.count(1)
        self.at_bob: dict[int, str] = {}
        self.at_alice: dict[int, int] = {}
        self.bobs_holders, self.alices_holders = Holders(), Holders()
        self.me_bob = Client(lambda number, message: self.bob(1, self.me_bob, number, message))
        self.alice_bob = Client(lambda number, message: self.bob(2, self.alice_bob, number, message))
        self.me_alice = Client(self.alice)
        self.pointers: list[int] = []  # my pointers to objects of bob, of which bob has heard
        self.entries: list[int] = []  # my pointers to pointers of alice
        self.fetched = 0

    # The parties.

    def bob(self, holder: int, session: Client, number: int, message: list[Any]) -> None:
        match message:
            case ["PUT", object_id]:
                self.at_bob[object_id] = "tensor"
                self.bobs_holders.create(holder, object_id)
            case ["CLAIM", object_id]:
                if object_id not in self.at_bob:
                    raise Freed(f"object {object_id} was freed before {holder} became a holder")
                self.bobs_holders.claim(holder, object_id)
                session.there.submit([number, True])
            case ["USE", object_id]:
                if object_id not in self.bobs_holders.held(holder):
                    raise Freed(f"object {object_id} is used by {holder}, who does not hold it")
            case ["RELEASE", object_id]:
                if self.bobs_holders.release(holder, object_id):
                    del self.at_bob[object_id]
            case ["SYNC"]:
                session.there.submit([number, True])

    def alice(self, number: int, message: list[Any]) -> None:
        answer = self.me_alice.there.submit
        match message:
            case ["LINK", entry, target]:
                self.at_alice[entry] = self.alice_bob.refer(target)
                self.alices_holders.create(1, entry)
                self.alice_bob.ask(["CLAIM", target], lambda _: answer([number, True]))
            case ["FETCH", entry]:
                target = self.alice_bob.refer(self.at_alice[entry])

                def synchronized(_: Any) -> None:
                    self.alice_bob.drop(target)
                    answer([number, target])

                self.alice_bob.ask(["SYNC"], synchronized)
            case ["USE", entry]:
                self.alice_bob.here.submit(["USE", self.at_alice[entry]])
            case ["RELEASE", entry]:
                if self.alices_holders.release(1, entry):
                    self.alice_bob.drop(self.at_alice.pop(entry))

    # What I may do.

    def send(self) -> None:
        object_id = next(self.ids)
        self.me_bob.here.submit(["PUT", object_id])
        self.me_bob.refer(object_id)
        # A pointer leaves only when its target is known to exist.
        self.me_bob.ask(["SYNC"], lambda _: self.pointers.append(object_id))

    def send_pointer(self) -> None:
        target = self.random.choice(self.pointers)
        entry = self.me_alice.refer(next(self.ids))
        if self.pin_link:
            self.me_bob.refer(target)
            self.me_alice.ask(["LINK", entry, target], lambda _: self.me_bob.drop(target))
        else:
            self.me_alice.ask(["LINK", entry, target], lambda _: None)
        self.entries.append(entry)

    def fetch_pointer(self) -> None:
        entry = self.entries.pop(self.random.randrange(len(self.entries)))

        def came(target: int) -> None:
            self.fetched += 1
            self.pointers.append(self.me_bob.refer(target))
            if self.pin_fetch:
                self.me_bob.ask(["CLAIM", target], lambda _: self.me_alice.drop(entry))
            else:
                self.me_bob.ask(["CLAIM", target], lambda _: None)
                self.me_alice.drop(entry)

        self.me_alice.ask(["FETCH", entry], came)

    def use(self) -> None:
        if self.pointers:
            self.me_bob.here.submit(["USE", self.random.choice(self.pointers)])
        if self.entries:
            self.me_alice.here.submit(["USE", self.random.choice(self.entries)])

    def drop(self) -> None:
        if self.pointers and self.random.random() < 0.6:
            self.me_bob.drop(self.pointers.pop(self.random.randrange(len(self.pointers))))
        elif self.entries:
            self.me_alice.drop(self.entries.pop(self.random.randrange(len(self.entries))))

    # The course of things.

    def step(self, *, quiet: bool = False) -> bool:
        wires = [step for link in (self.me_alice, self.me_bob, self.alice_bob) for step in link.steps()]
        mine: list[Callable[[], None]] = []
        if not quiet:
            mine = [self.send, self.drop, self.use]
            mine += [self.send_pointer] * 3 if self.pointers else []
            mine += [self.fetch_pointer] * 3 if self.entries else []
        if not wires and not mine:
            return False
        self.random.choice([*wires * 2, *mine])()
        # Whoever is listed, and has not given up, finds the object.
        for held in self.bobs_holders._held.values():
            assert held <= set(self.at_bob)
        return True

    def run(self, steps: int = 150) -> None:
        for _ in range(steps):
            self.step()
        while self.pointers or self.entries or self.step(quiet=True):
            while self.pointers or self.entries:
                self.drop()
        assert self.at_bob == {} and self.at_alice == {}, "everything was given up, and something is still there"
        for link in (self.me_alice, self.me_bob, self.alice_bob):
            assert not link.pending and not link.counts
        assert not any(self.bobs_holders._held.values()) and not self.bobs_holders._shared
        assert not any(self.alices_holders._held.values())


def test_no_interleaving_frees_what_is_held_or_keeps_what_is_not() -> None:
    fetched = 0
    for seed in range(400):
        model = Model(seed)
        model.run()
        fetched += model.fetched
    assert fetched > 400, "the runs hardly handed anything over"


@pytest.mark.parametrize("pin", ["pin_link", "pin_fetch"])
def test_without_the_pin_an_object_is_freed_in_use(pin: str) -> None:
    def all_runs() -> None:
        for seed in range(400):
            Model(seed, **{pin: False}).run()

    with pytest.raises(Freed):
        all_runs()


# The real parties.

names = itertools.count()


@pytest.mark.parametrize("seed", range(6))
def test_pointers_change_hands_over_late_links(seed: int) -> None:
    chance = random.Random(seed)
    with late_links(seed):
        n = next(names)
        workers = [VirtualWorker(id=f"{name}-late-{n}", transport="late") for name in ("bob", "alice", "carol")]
        held: list[tuple[Any, float]] = []

        def home(pointer: Any) -> torch.Tensor:
            while isinstance(pointer, PointerTensor):
                pointer = pointer.get()
            tensor: torch.Tensor = pointer
            return tensor

        for _ in range(60):
            call = chance.choice(["send", "send", "give", "give", "fetch", "add", "move", "drop"])
            if call == "send" or not held:
                value = float(chance.randrange(100))
                x: Any = torch.full((2,), value)
                held.append((x.send(chance.choice(workers)), value))
                continue
            pointer, value = held.pop(chance.randrange(len(held)))
            depth = len(pointer._route.workers)
            if call == "give" and depth < 4:
                held.append((pointer.send(chance.choice(workers)), value))
                if chance.random() < 0.5:
                    held.append((pointer, value))
            elif call == "fetch" and depth > 1:
                held.append((pointer.get(), value))
            elif call == "move" and depth == 1:
                held.append((pointer.move(chance.choice(workers)), value))
            elif call == "add":
                held.append((pointer + 1, value + 1))
                held.append((pointer, value))
            elif call != "drop":
                assert home(pointer).tolist() == [value, value]
            del pointer
        while held:
            pointer, value = held.pop()
            assert home(pointer).tolist() == [value, value]
        del pointer
        gc.collect()
        assert [len(worker._objects) for worker in workers] == [0, 0, 0]
        for worker in workers:
            check_books(worker._worker)
            check_idle(worker._worker)
            assert not worker._worker.store
        for worker in workers:
            worker.close()
