"""L3: references, not names."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.errors import FarpointError, PointerSpentError
from farpoint.testing.laws.network import Law, Network, home, in_threads, look, numbers, raised

STATM = Path("/proc/self/statm")

HOLDERS: dict[str, Callable[[Any, Network], Any]] = {
    "the pointer": lambda p, n: p,
    "sent": lambda p, n: p.send(n.alice),
    "sent twice": lambda p, n: p.send(n.alice),
    "sent on": lambda p, n: p.send(n.charlie).send(n.alice),
    "found": lambda p, n: n.bob.search("#it")[0],
    "clone": lambda p, n: p.clone(),
    "view": lambda p, n: p[1:3],
    "view of a view": lambda p, n: p[1:3][:1],
    "detached": lambda p, n: p.detach(),
    "result": lambda p, n: p + 1,
    "fetched pointer": lambda p, n: p.send(n.charlie).get(),
}


class TestL3References(Law):
    """L3: an object lives exactly as long as somebody holds a reference to it."""

    def test_ten_thousand_rebindings_leave_one_object(self, network: Network) -> None:
        x = network.send(torch.zeros(4), "b")
        for _ in range(10_000):
            x = x + 1
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(x.get(keep=True), torch.full((4,), 10_000.0))
        del x
        assert network.sizes() == [0, 0, 0]

    def test_rebindings_of_a_chain_leave_one_object_a_worker(self, network: Network) -> None:
        x = network.send(torch.zeros(4), "cab")
        for _ in range(1_000):
            x = x + 1
        assert network.sizes() == [1, 1, 1]
        assert torch.equal(look(x), torch.full((4,), 1_000.0))
        del x
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.skipif(not STATM.exists(), reason="how much memory a process uses is read from /proc")
    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_the_memory_of_results_is_given_back(self, network: Network, chain: str) -> None:
        """Results of 200 MiB in all leave nothing in this process."""

        def resident() -> int:
            return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        x = network.send(torch.zeros(2**16), chain)
        before = 0
        for step in range(900):
            if step == 100:
                network.sizes()
                before = resident()
            x = x + 1
        network.sizes()
        assert resident() - before < 64 * 2**20
        assert torch.equal(look(x)[:2], torch.full((2,), 900.0))

    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_operations_leave_no_memory_behind(self, network: Network, chain: str) -> None:
        """What this process allocates in Python for an operation is free when its result is gone."""
        x = network.send(torch.zeros(4), chain)

        def work(times: int) -> int:
            y = x
            for _ in range(times):
                y = y + 1
                y.add_(2)
            del y
            network.sizes()
            return sys.getallocatedblocks()

        work(5_000)  # bounded queues and caches are full then
        before = work(10)
        assert work(3_000) - before < 1_000

    def test_leaving_a_scope_gives_up(self, network: Network) -> None:
        def work() -> Any:
            p = network.send(numbers(), "b")
            q, others = p + 1, [p * 2, {"k": p - 1}]
            assert network.sizes() == [len(others) + 2, 0, 0]
            return q

        kept = work()
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(kept.get(), numbers() + 1)
        assert network.sizes() == [0, 0, 0]

    def test_cycles_are_given_up_when_they_are_collected(self, network: Network) -> None:
        ring: list[Any] = [network.send(numbers(), "ab")]
        ring.append(ring)
        ring[0].keeps = ring
        assert network.sizes() == [1, 1, 0]
        del ring
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("chain", ["b", "ab", "cab", "bab"])
    def test_a_chain_is_given_up_hop_by_hop(self, network: Network, chain: str) -> None:
        p = network.send(numbers(), chain)
        q = p.clone()
        once = [chain.count(worker) for worker in "bac"]
        assert network.sizes() == [2 * n for n in once]
        del p
        assert network.sizes() == once
        assert torch.equal(look(q), numbers())
        del q
        assert network.sizes() == [0, 0, 0]

    def test_free_gives_up_now(self, network: Network) -> None:
        for chain in ("b", "ab"):
            p = network.send(numbers(), chain)
            q = p.clone()
            p.free()
            assert network.sizes() == [1, int(chain == "ab"), 0]
            assert isinstance(raised(p.free), PointerSpentError)
            assert torch.equal(home(q), numbers())
            assert network.sizes() == [0, 0, 0]

    def test_with_gives_up_at_the_end(self, network: Network) -> None:
        with network.send(numbers(), "ab") as p, p + 1 as q:
            assert network.sizes() == [2, 2, 0]
            assert isinstance(q, PointerTensor)
        assert network.sizes() == [0, 0, 0]
        for spent in (p, q):
            assert isinstance(raised(lambda spent=spent: spent + 1), PointerSpentError)  # type: ignore[misc]

    def test_with_gives_up_after_an_error(self, network: Network) -> None:
        with pytest.raises(ZeroDivisionError), network.send(numbers(), "b") as p:  # noqa: PT012  # the body is the point
            kept = p + 1
            raise ZeroDivisionError
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(kept.get(), numbers() + 1)

    def test_with_allows_that_it_is_spent_inside(self, network: Network) -> None:
        with network.send(numbers(), "b") as p:
            back = p.get()
        assert torch.equal(back, numbers()) and network.sizes() == [0, 0, 0]

    def test_exceptions_give_up(self, network: Network) -> None:
        def work() -> None:
            p = network.send(numbers(), "ab")
            q = p * 2
            assert q is not p
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as kept:
            work()
        assert network.sizes() == [2, 2, 0]  # the traceback still holds them
        del kept
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_failed_calls_give_up(self, network: Network, chain: str) -> None:
        """Also operations that fail over there, and what was computed from them."""
        p = network.send(torch.zeros(2, 2), chain)

        def fail(p: Any) -> None:
            bad = p[(p[0] + 7).long()]
            worse = [bad + 1, bad @ p, torch.stack([bad, p])]
            assert isinstance(raised(lambda: home(worse[0])), FarpointError)
            raised(lambda: p @ p[:1])
            raised(lambda: p.view(7))
            raised(lambda: torch.cat([p, "x"]))  # type: ignore[list-item]

        for _ in range(5):
            fail(p)
        assert network.sizes() == [1, int(chain == "ab"), 0]
        del p
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("holders", [*itertools.combinations(HOLDERS, 2), tuple(HOLDERS)], ids=" and ".join)
    def test_any_order_of_deletion(self, network: Network, holders: tuple[str, ...]) -> None:
        for order in (holders, holders[::-1], holders[1:] + holders[:1]):
            p = network.send(numbers(), "b")
            p.tag("#it")
            held = {name: HOLDERS[name](p, network) for name in holders}
            values = {name: look(pointer) for name, pointer in held.items()}
            del p
            for name in order:
                for other, pointer in held.items():
                    assert torch.equal(look(pointer), values[other])
                pointer = None  # the loop's name holds the last one
                del held[name]
            assert network.sizes() == [0, 0, 0]

    def test_double_sends_and_searches_hold_one_reference_each(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        p.tag("#it")
        held = [p, *(p.send(network.alice) for _ in range(5)), *(network.bob.search("#it")[0] for _ in range(5))]
        del p
        assert network.sizes() == [1, 5, 0]
        while held:
            assert torch.equal(look(held[-1]), numbers())
            held.pop(0)
            assert network.sizes() == [int(bool(held)), sum(each.location is network.alice for each in held), 0]

    def test_a_search_that_nobody_keeps_holds_nothing(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        p.tag("#it")
        for _ in range(20):
            assert len(network.bob.search("#it")) == 1
        del p
        assert network.sizes() == [0, 0, 0]
        assert network.bob.search("#it") == []

    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_threads_may_delete(self, network: Network, chain: str) -> None:
        kept = network.send(numbers(), chain)
        piles: list[list[Any]] = [[kept + n for n in range(200)] for _ in range(4)]

        def delete(pile: list[Any]) -> None:
            while pile:
                pile.pop()

        def use(pointer: Any) -> None:
            for _ in range(50):
                assert torch.equal(look(pointer), numbers())

        in_threads([*(partial(delete, pile) for pile in piles), partial(use, kept)])
        assert network.sizes() == [1, int(chain == "ab"), 0]
        del kept
        assert network.sizes() == [0, 0, 0]

    def test_pointers_may_be_deleted_when_the_worker_is_gone(self, network: Network) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "ab")
        assert network.sizes() == [2, 1, 0]
        network.bob.close()
        assert isinstance(raised(p.get), FarpointError)
        p.free()
        del p, q
        gc.collect()
        assert len(network.alice) == 0
