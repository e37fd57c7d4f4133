"""L3, L6 and L12 as a state machine: whatever is done in whatever order, values and stores are those of a model."""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    multiple,
    rule,
    run_state_machine_as_test,
)

from farpoint import PointerTensor
from farpoint.errors import FarpointError, NotColocatedError, PointerSpentError
from farpoint.testing.laws.network import Law, Network, look, raised
from farpoint.testing.transport import eventually

WORKERS = st.integers(0, 2)
MAX_HOPS = 4
EXAMPLES = 60
STEPS = 30


class Entry:
    """An object of a worker, as the model has it: a tensor, or a pointer to another object."""

    def __init__(self, worker: int, value: torch.Tensor | Entry) -> None:
        self.worker = worker
        self.value = value


class Held:
    """A pointer beside the object that it points at.

    Attributes:
        pointer: The pointer, None once this machine has let go of it.
        entry: The object, None once the pointer is spent.
        bases: Pointers that torch keeps as long as this one lives, because it is a view of theirs.
    """

    def __init__(self, pointer: Any, entry: Entry, bases: tuple[Held, ...] = ()) -> None:
        self.pointer = pointer
        self.entry: Entry | None = entry
        self.bases = bases

    def path(self) -> list[Entry]:
        """Return the objects from the first hop to the data."""
        assert self.entry is not None
        found = [self.entry]
        while isinstance(found[-1].value, Entry):
            found.append(found[-1].value)
        return found

    def cell(self) -> torch.Tensor:
        """Return the data."""
        value = self.path()[-1].value
        assert isinstance(value, torch.Tensor)
        return value


def chained(workers: Iterable[int], cell: torch.Tensor) -> Entry:
    """Return the first of new objects that lead over these workers to a tensor."""
    head: torch.Tensor | Entry = cell
    for worker in reversed(list(workers)):
        head = Entry(worker, head)
    assert isinstance(head, Entry)
    return head


class References(RuleBasedStateMachine):
    """Three workers, and everything that gives, keeps, moves and gives up references.

    Args:
        make: Returns the handle of a new worker of this name.
    """

    held = Bundle("held")

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.network = Network(make)
        self.live: list[Held] = []
        self.tags = count()

    # What the rules are made of.

    def keep(self, pointer: Any, entry: Entry, bases: tuple[Held, ...] = ()) -> Held:
        assert type(pointer) is PointerTensor
        self.live.append(Held(pointer, entry, bases))
        return self.live[-1]

    def take(self, h: Held) -> Any:
        # Hypothesis keeps what was once in a bundle: it must not keep the pointer.
        self.live.remove(h)
        pointer, h.pointer = h.pointer, None
        return pointer

    def spent(self, h: Held, pointer: Any) -> None:
        assert isinstance(raised(lambda: pointer + 1), PointerSpentError)
        h.entry = None

    def carried(self, end: Entry, worker: int) -> torch.Tensor:
        """Return the data at the end of a chain as a worker gets it: a copy, unless it is there already."""
        assert isinstance(end.value, torch.Tensor)
        return end.value if end.worker == worker else end.value.clone()

    def alone(self, h: Held, entry: Entry) -> bool:
        """Say whether no other pointer leads through an object."""
        others = [other for other in self.known() if other is not h and other.entry is not None]
        return not any(entry in other.path() for other in others)

    def known(self) -> Iterator[Held]:
        """Yield every pointer that exists."""
        pending = list(self.live)
        seen = set()
        while pending:
            found = pending.pop()
            if id(found) not in seen:
                seen.add(id(found))
                yield found
                pending.extend(found.bases)

    # Making pointers.

    @rule(target=held, worker=WORKERS, value=st.integers(-5, 5))
    def send(self, worker: int, value: int) -> Held:
        x: Any = torch.full((2,), value)
        p = x.send(self.network.all[worker])
        return self.keep(p, Entry(worker, x))

    @rule(target=held, h=held, worker=WORKERS)
    def send_pointer(self, h: Held, worker: int) -> Any:
        if len(h.path()) >= MAX_HOPS:
            return multiple()
        assert h.entry is not None
        return self.keep(h.pointer.send(self.network.all[worker]), Entry(worker, h.entry))

    @rule(target=held, h=held, g=held)
    def add(self, h: Held, g: Held) -> Any:
        way, other = ([entry.worker for entry in each.path()] for each in (h, g))
        if way != other:
            assert isinstance(raised(lambda: h.pointer + g.pointer), NotColocatedError)
            return multiple()
        return self.keep(h.pointer + g.pointer, chained(way, h.cell() + g.cell()))

    @rule(target=held, h=held)
    def clone(self, h: Held) -> Held:
        return self.keep(h.pointer.clone(), chained([entry.worker for entry in h.path()], h.cell().clone()))

    @rule(target=held, h=held)
    def view(self, h: Held) -> Held:
        cell = h.cell().view(2)
        return self.keep(h.pointer.view(2), chained([entry.worker for entry in h.path()], cell), (h, *h.bases))

    @rule(target=held, h=held)
    def search(self, h: Held) -> Any:
        if len(h.path()) > 1:
            return multiple()
        tag = f"#{next(self.tags)}"
        h.pointer.tag(tag)
        assert h.entry is not None
        (found,) = self.network.all[h.entry.worker].search(tag)
        return self.keep(found, h.entry)

    # Using them.

    @rule(h=held)
    def in_place(self, h: Held) -> None:
        h.pointer.add_(1)
        h.cell().add_(1)

    @rule(h=held, g=held)
    def copy(self, h: Held, g: Held) -> None:
        if [entry.worker for entry in h.path()] == [entry.worker for entry in g.path()]:
            h.pointer.copy_(g.pointer)
            h.cell().copy_(g.cell())

    @rule(h=held)
    def fetch(self, h: Held) -> None:
        assert torch.equal(look(h.pointer), h.cell())

    @rule(target=held, h=consumes(held), worker=WORKERS)
    def move(self, h: Held, worker: int) -> Any:
        *way, end = h.path()
        if end.worker == worker:
            assert h.pointer.move(self.network.all[worker]) is h.pointer
            return h
        # Others that lead through the pointer before the data would go along, and not know it.
        if way and not self.alone(h, way[-1]):
            return h
        pointer = self.take(h)
        moved = pointer.move(self.network.all[worker])
        self.spent(h, pointer)
        data = self.carried(end, worker)
        if not way:
            return self.keep(moved, Entry(worker, data))
        way[-1].value = data if way[-1].worker == worker else Entry(worker, data)
        return self.keep(moved, way[0])

    @rule(target=held, h=consumes(held))
    def remote_get(self, h: Held) -> Any:
        *way, end = h.path()
        if not way or not self.alone(h, way[-1]):
            return h
        pointer = self.take(h)
        shorter = pointer.remote_get()
        self.spent(h, pointer)
        way[-1].value = self.carried(end, way[-1].worker)
        return self.keep(shorter, way[0])

    @rule(target=held, h=consumes(held), worker=WORKERS)
    def remote_send(self, h: Held, worker: int) -> Any:
        path = h.path()
        if len(path) >= MAX_HOPS or not self.alone(h, path[-1]):
            return h
        pointer = self.take(h)
        longer = pointer.remote_send(self.network.all[worker])
        self.spent(h, pointer)
        path[-1].value = Entry(worker, self.carried(path[-1], worker))
        return self.keep(longer, path[0])

    # Giving them up.

    @rule(target=held, h=consumes(held))
    def get(self, h: Held) -> Any:
        path, cell = h.path(), h.cell()
        pointer = self.take(h)
        back = pointer.get()
        self.spent(h, pointer)
        if len(path) > 1:
            return self.keep(back, path[1])
        assert torch.equal(back, cell)
        return multiple()

    @rule(h=consumes(held))
    def free(self, h: Held) -> None:
        pointer = self.take(h)
        pointer.free()
        self.spent(h, pointer)

    @rule(h=consumes(held))
    def delete(self, h: Held) -> None:
        self.take(h)

    @rule(h=consumes(held), g=consumes(held))
    def delete_in_threads(self, h: Held, g: Held) -> None:
        piles = [[self.take(each)] for each in {id(h): h, id(g): g}.values()]
        threads = [threading.Thread(target=pile.clear) for pile in piles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # Failing.

    @rule(h=held)
    def fail_here(self, h: Held) -> None:
        raised(lambda: h.pointer + h.pointer.new_zeros(3))
        raised(lambda: h.pointer.move("nobody"))
        raised(lambda: h.pointer.add_(torch.zeros(2)))

    @rule(h=held)
    def fail_there(self, h: Held) -> None:
        bad = h.pointer[h.pointer * 0 + 9] + 1
        assert isinstance(raised(lambda: look(bad)), FarpointError)

    # What must hold.

    @rule()
    def count_objects(self) -> None:
        least, most = self.counts(self.live), self.counts(self.known())
        eventually(lambda: all(map(operator.le, least, sizes := self.network.sizes())) and all(map(operator.le, sizes, most)))

    def counts(self, pointers: Iterable[Held]) -> list[int]:
        """Return how many objects each worker stores for these pointers."""
        entries = {entry for each in pointers if each.entry is not None for entry in each.path()}
        numbers = Counter(entry.worker for entry in entries)
        return [numbers[worker] for worker in range(3)]

    def teardown(self) -> None:
        try:
            self.count_objects()
            for h in self.live:
                assert torch.equal(look(h.pointer), h.cell())
                h.pointer = None
            self.live.clear()
            assert self.network.sizes() == [0, 0, 0]
        finally:
            self.network.close()


class TestL3StateMachine(Law):
    """L3: chance histories of references, against a model.

    A normal run tries the same few each time; `--farpoint-examples N` tries N others.
    """

    def test_references(self, farpoint_workers: Callable[[str], Any], farpoint_examples: int | None) -> None:
        run_state_machine_as_test(
            partial(References, farpoint_workers),  # type: ignore[arg-type]  # what is called without arguments will do
            settings=settings(
                max_examples=farpoint_examples or EXAMPLES,
                stateful_step_count=STEPS,
                derandomize=farpoint_examples is None,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=set(Phase) - {Phase.explain},
            ),
        )
