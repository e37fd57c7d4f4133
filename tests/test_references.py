"""L3 and L6 as a state machine: whatever is done in whatever order, values are right and every store ends empty."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

import farpoint
from farpoint import PointerTensor, VirtualWorker

farpoint.TorchHook(torch)
numbers = itertools.count()
WORKERS = st.integers(0, 2)
MAX_HOPS = 4


class Held:
    """A pointer beside the value and the chain that it must have."""

    def __init__(self, pointer: Any, cell: list[torch.Tensor], chain: tuple[int, ...]) -> None:
        self.pointer = pointer
        self.cell = cell
        self.chain = chain


class References(RuleBasedStateMachine):
    held = Bundle("held")

    @initialize()
    def start(self) -> None:
        n = next(numbers)
        self.workers = [VirtualWorker(id=f"{name}-{n}") for name in ("bob", "alice", "charlie")]
        self.live: list[Held] = []

    def keep(self, pointer: Any, cell: list[torch.Tensor], chain: tuple[int, ...]) -> Any:
        if not isinstance(pointer, PointerTensor):
            assert torch.equal(pointer, cell[0])
            return multiple()
        held = Held(pointer, cell, chain)
        self.live.append(held)
        return held

    def take(self, h: Held) -> Any:
        # Hypothesis keeps what was once in a bundle: it must not keep the pointer.
        self.live.remove(h)
        pointer, h.pointer = h.pointer, None
        return pointer

    @rule(target=held, worker=WORKERS, value=st.integers(-5, 5))
    def send(self, worker: int, value: int) -> Any:
        x: Any = torch.full((2,), float(value))
        return self.keep(x.send(self.workers[worker]), [x.clone()], (worker,))

    @rule(target=held, h=held, worker=WORKERS)
    def send_pointer(self, h: Held, worker: int) -> Any:
        if len(h.chain) >= MAX_HOPS:
            return multiple()
        return self.keep(h.pointer.send(self.workers[worker]), h.cell, (worker, *h.chain))

    @rule(target=held, h=held)
    def operate(self, h: Held) -> Any:
        return self.keep(h.pointer + h.pointer, [h.cell[0] + h.cell[0]], h.chain)

    @rule(h=held)
    def operate_in_place(self, h: Held) -> None:
        h.pointer.add_(1)
        h.cell[0] += 1

    @rule(target=held, h=consumes(held))
    def get(self, h: Held) -> Any:
        return self.keep(self.take(h).get(), h.cell, h.chain[1:])

    @rule(h=held)
    def look(self, h: Held) -> None:
        value = h.pointer.get(keep=True)
        while isinstance(value, PointerTensor):
            value = value.get(keep=True)
        assert torch.equal(value, h.cell[0])

    @rule(target=held, h=consumes(held), worker=WORKERS)
    def move(self, h: Held, worker: int) -> Any:
        if len(h.chain) > 1 or sum(other.cell is h.cell for other in self.live) > 1:
            return h  # who shares the cell would be left behind with a value of its own
        return self.keep(self.take(h).move(self.workers[worker]), h.cell, (worker,))

    @rule(h=consumes(held))
    def delete(self, h: Held) -> None:
        self.take(h)

    def teardown(self) -> None:
        if not hasattr(self, "workers"):
            return
        for h in self.live:
            del h.pointer
        self.live.clear()
        gc.collect()
        assert [len(worker._objects) for worker in self.workers] == [0, 0, 0]
        for worker in self.workers:
            worker.close()


TestL3StateMachine = References.TestCase
TestL3StateMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
