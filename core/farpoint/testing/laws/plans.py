"""Plans: a function whose calls are one message each does what it does without, on one worker, along a chain and on several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import farpoint
from farpoint.protocol.messages import Kind
from farpoint.testing.laws.modules import OPTIMIZERS, batch, model
from farpoint.testing.laws.network import Law, Network, as_user, home, look, raised


def told(worker: Any, call: Callable[[], object]) -> list[int]:
    """Return the kinds of the messages that a call sends to a worker."""
    session = worker.peer.channel.session
    kinds: list[int] = []
    submit = session.submit

    def submitted(message: list[Any]) -> int:
        kinds.append(message[0])
        number: int = submit(message)
        return number

    session.submit = submitted
    try:
        call()
    finally:
        del session.submit
    return [kind for kind in kinds if kind not in (Kind.SYNC, Kind.RELEASE)]


class TestPlans(Law):
    """A plan is one message to each worker, and nothing else is different."""

    @pytest.mark.parametrize(("name", "frozen"), [("SGD", False), ("SGD", True), ("Adam", False), ("RMSprop", True)])
    def test_training(self, network: Network, name: str, frozen: bool) -> None:
        here, there = model(), model()
        there.send(network.bob)  # type: ignore[operator]  # the hook's
        x, y = batch(0)
        data = (network.send(x, "b"), network.send(y, "b"))
        steps = []
        for trained in (here, there):
            optimizer = OPTIMIZERS[name](trained.parameters())

            def step(x: Any, y: Any, trained: Any = trained, optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(trained(x), y)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                return loss

            steps.append(step)
        planned: Any = farpoint.plan(frozen=frozen)(steps[1])
        for number in range(10):
            expected = steps[0](x, y)
            if number > 3:
                assert told(network.bob, partial(planned, *data)) == [Kind.RUNPLAN]
            else:
                assert torch.equal(planned(*data).detach().get(), expected.detach())
        assert planned.replays == 8 and planned.runs == (3 if frozen else 10)
        there.get()  # type: ignore[operator]  # the hook's
        assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))
        del planned, data, steps, step, trained, optimizer, there
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_chain(self, network: Network, frozen: bool) -> None:
        x = torch.arange(1.0, 6.0)
        pp = network.send(x, "cab")
        count = farpoint.plan(frozen=frozen)(lambda p: (p.add_(1) * 2).sum())
        for number in range(1, 8):
            assert look(count(pp)) == ((x + number) * 2).sum()
        assert count.replays == 6
        assert network.sizes() == [1, 1, 1]
        assert torch.equal(home(pp), x + 7)
        del count
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("frozen", [False, True])
    def test_several_workers(self, network: Network, frozen: bool) -> None:
        p, q = network.send(torch.ones(3), "a"), network.send(torch.ones(3), "b")

        @farpoint.plan(frozen=frozen)
        def both(p: Any, q: Any) -> dict[str, Any]:
            return {"a": (p.mul_(2), p + 1), "b": [q - 1, None, "c"]}

        for number in range(1, 6):
            result = both(p, q)
            assert result["a"][0] is p and look(result["a"][1]).tolist() == [2**number + 1] * 3
            assert look(result["b"][0]).tolist() == [0] * 3 and result["b"][1:] == [None, "c"]
        for worker in network["ab"]:
            assert told(worker, partial(both, p, q)) == [Kind.RUNPLAN]
        del p, q, result, both
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_what_fails_names_its_line_and_poisons_what_follows(self, network: Network, chain: str) -> None:
        names = as_user("def f(p, i):\n    a = p + 1\n    b = a.gather(0, i)\n    return b * 2, a * 3\n")
        f = farpoint.plan(names["f"])
        p, good, bad = (network.send(tensor, chain) for tensor in (torch.zeros(2), torch.tensor([1]), torch.tensor([7])))
        for _ in range(3):
            f(p, good)
        results = f(p, bad)
        assert f.replays == 3
        assert look(results[1]).tolist() == [3, 3], "the others go on"
        error: Any = raised(partial(look, results[0]))
        assert isinstance(error, farpoint.RemoteExecutionError) and error.line == "user.py:3" and "gather" in error.operation
        assert look(f(p, good)[0]).tolist() == [2]
        del f, p, good, bad, results, names
        assert network.sizes() == [0, 0, 0]

    def test_a_branch_on_data_is_refused_with_its_line(self, network: Network) -> None:
        names = as_user("def f(p):\n    p.add_(1)\n    if (p > 0).all():\n        p.mul_(2)\n")
        p = network.send(torch.ones(2), "b")
        error: Any = raised(lambda: farpoint.plan(names["f"])(p))
        assert isinstance(error, farpoint.PlanError) and error.where == "user.py:3"
        assert home(p).tolist() == [2, 2]

    def test_a_worker_checks_a_plan_on_copies(self, network: Network) -> None:
        p = network.send(torch.ones(3), "b")
        f = farpoint.plan(lambda q: (q.mul_(3), q * 0.1))
        f.verify = True
        for number in range(1, 5):
            q, r = f(p)
            assert q is p and torch.equal(look(r), torch.full((3,), 3.0**number) * 0.1)
        assert f.replays == 3
        del p, q, r, f
        assert network.sizes() == [0, 0, 0]
