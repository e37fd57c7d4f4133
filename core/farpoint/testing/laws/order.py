"""L11: program order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from farpoint.testing.laws.network import Law, Network, home, in_threads, look, numbers


class TestL11ProgramOrder(Law):
    """L11: what one client issues takes effect in program order on every worker that it touches."""

    def test_two_ways_to_one_object(self, network: Network) -> None:
        p = network.send(torch.zeros(3), "b")
        pp = p.send(network.alice)
        for _ in range(20):
            p.add_(1)
            pp.mul_(2)
        expected = torch.zeros(3)
        for _ in range(20):
            expected.add_(1).mul_(2)
        assert torch.equal(look(pp), expected) and torch.equal(p.get(), expected)

    def test_many_ways_to_one_object(self, network: Network) -> None:
        """Directly and by way of every other worker, in a shuffled order of operations that do not commute."""
        p = network.send(torch.zeros(3, dtype=torch.int64), "b")
        ways = [p, p.send(network.alice), p.send(network.charlie), p.send(network.alice).send(network.charlie)]
        ways += [p.send(network.charlie).send(network.alice), p.send(network.bob), p.view(3), p.detach()]
        chance = random.Random(3)  # noqa: S311  # not a secret
        expected = 0
        for _ in range(150):
            way, number = chance.choice(ways), chance.randrange(5)
            if chance.random() < 0.5:
                way.add_(number)
                expected += number
            else:
                way.mul_(-1).add_(1)
                expected = 1 - expected
            if chance.random() < 0.1:
                assert look(chance.choice(ways)).tolist() == [expected] * 3
        for way in ways:
            assert look(way).tolist() == [expected] * 3

    @pytest.mark.parametrize("chain", ["b", "ab", "cab", "bab"])
    def test_a_long_program(self, network: Network, chain: str) -> None:
        """More operations than one message carries; each depends on the one before."""
        x = torch.zeros(2, dtype=torch.int64)
        p = network.send(x, chain)
        for number in range(700):
            p.mul_(3).add_(number).remainder_(1009)
            x.mul_(3).add_(number).remainder_(1009)
        assert torch.equal(home(p), x)

    def test_what_is_fetched_is_of_that_moment(self, network: Network) -> None:
        for chain in ("b", "ab"):
            p = network.send(torch.zeros(1000), chain)
            seen = []
            for _ in range(20):
                p.add_(1)
                seen.append(look(p))
                p.mul_(2)
            expected = torch.zeros(1000)
            for found in seen:
                assert torch.equal(found, expected.add_(1))
                expected.mul_(2)

    def test_what_is_sent_is_of_that_moment(self, network: Network) -> None:
        """A tensor that is sent again and again while it changes, of any size, on several ways."""
        for size in (3, 300_000):
            x = torch.zeros(size)
            sent = []
            for step in range(12):
                x.add_(1)
                sent.append(network.send(x, ("b", "ab", "cb")[step % 3]))
                sent[-1].add_(step)
            for step, p in enumerate(sent):
                assert torch.equal(home(p), torch.full((size,), 2.0 * step + 1))

    def test_moves_stand_in_the_order(self, network: Network) -> None:
        """What was issued before a move happens to what is moved; what is issued later, at its new place."""
        p = network.send(torch.zeros(3), "b")
        left = p[:2]
        expected = torch.zeros(3)
        for step in range(12):
            p.add_(1)
            p = p.move(network["acb"[step % 3]][0])
            p.mul_(2)
            expected.add_(1).mul_(2)
        assert torch.equal(p.get(), expected)
        assert torch.equal(left.get(), torch.ones(2))

    def test_moves_of_chains_stand_in_the_order(self, network: Network) -> None:
        p = network.send(torch.zeros(3), "ab")
        expected = torch.zeros(3)
        for step in range(12):
            p.add_(1)
            p = self._go(p, step, network)
            p.mul_(2)
            expected.add_(1).mul_(2)
        assert torch.equal(home(p), expected)
        assert network.sizes() == [0, 0, 0]

    def _go(self, p: Any, step: int, network: Network) -> Any:
        match step % 4:
            case 0:
                return p.move(network.charlie)
            case 1:
                return p.remote_send(network.bob)
            case 2:
                return p.remote_get()
            case _:
                return p.move(network.bob)

    def test_hand_overs_stand_in_the_order(self, network: Network) -> None:
        """A pointer that was made just now, and its result, are there when somebody else is sent to them."""
        for step in range(20):
            p = network.send(numbers(), "b") * step
            pp = p.send(network.alice)
            q = pp + 1
            ppp = q.send(network.charlie)
            del p, pp, q
            assert torch.equal(home(ppp + 1), numbers() * step + 2)
            del ppp
        assert network.sizes() == [0, 0, 0]

    def test_releases_never_overtake(self, network: Network) -> None:
        """An object that is given up and handed over at once is there as long as somebody holds it."""
        for _ in range(30):
            p = network.send(numbers(), "b")
            q = network.send(torch.zeros(5), "b")
            held = [p.send(network.alice), p.send(network.charlie), p + 1]
            del p
            held.pop(0)
            again = held[0].get(keep=True)
            held.pop(0)
            q.copy_(again)
            del again
            assert torch.equal(q.get(), numbers())
        del held
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("chains", [("b",), ("b", "ab", "cb", "cab")], ids=["one way", "four ways"])
    def test_each_thread_has_its_order(self, network: Network, chains: tuple[str, ...]) -> None:
        ends: dict[int, tuple[Any, torch.Tensor]] = {}

        def work(lane: int) -> None:
            x = torch.full((3,), lane)
            p = network.send(x, chains[lane % len(chains)])
            for number in range(60):
                p.mul_(3).add_(number)
                x.mul_(3).add_(number)
                p, x = p.remainder(1009), x.remainder(1009)
                if number % 20 == lane:
                    assert torch.equal(look(p), x)
            ends[lane] = (p, x)

        in_threads([lambda lane=lane: work(lane) for lane in range(4)])  # type: ignore[misc]
        for p, x in ends.values():
            assert torch.equal(home(p), x)
        ends.clear()
        del p
        assert network.sizes() == [0, 0, 0]

    def test_threads_lose_and_repeat_nothing(self, network: Network) -> None:
        for chain in ("b", "ab"):
            p = network.send(torch.zeros(3, dtype=torch.int64), chain)
            ways = [p, p.detach(), p.view(3), p]

            def work(way: Any) -> None:
                for _ in range(100):
                    way.add_(1)

            in_threads([lambda way=way: work(way) for way in ways])  # type: ignore[misc]
            assert home(p).tolist() == [400] * 3

    def test_threads_may_move_and_fetch(self, network: Network) -> None:
        """Each its own tensor, round all the workers, in opposite directions."""

        def work(lane: int) -> None:
            p = network.send(torch.full((3,), lane), "b")
            for step in range(15):
                p = p.move(network["abc"[(step * (1 if lane % 2 else -1)) % 3]][0])
                p.add_(1)
            assert home(p).tolist() == [lane + 15] * 3

        in_threads([lambda lane=lane: work(lane) for lane in range(3)])  # type: ignore[misc]
        assert network.sizes() == [0, 0, 0]

    def test_synchronize_waits_for_everything(self, network: Network) -> None:
        p = network.send(torch.zeros(3), "cab")
        for _ in range(300):
            p.add_(1)
        network.charlie.synchronize()
        assert network.sizes() == [1, 1, 1]
        assert torch.equal(home(p), torch.full((3,), 300.0))
