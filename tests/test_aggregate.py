"""What several workers have is brought together: `gather` here, `average` on a worker that all trust."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import farpoint
from farpoint import (
    GetNotPermittedError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PointerError,
    PointerSpentError,
    PointerTensor,
    VirtualWorker,
    WorkerNotFoundError,
)
from farpoint.answers import Answers
from farpoint.plugins import hookimpl, plugins
from farpoint.protocol.messages import Kind

farpoint.TorchHook(torch)


class Policy:
    """Writes down what the workers are asked, and refuses some of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.refused: set[tuple[str, str]] = set()

    @hookimpl
    def farpoint_authorize(self, action: str, subject: str, object: int | str, worker: str) -> str | None:
        self.asked.append((action, subject, worker))
        return "no" if (action, worker) in self.refused else None


@attrs.define
class Net:
    """Three workers, and the policy of all."""

    bob: Any
    alice: Any
    secure: Any
    policy: Policy

    def sizes(self) -> list[int]:
        gc.collect()
        return [len(self.bob), len(self.alice), len(self.secure)]

    def fetched(self) -> list[str]:
        """Return the workers of which values were fetched, by anybody."""
        return [worker for action, _, worker in self.policy.asked if action == "get"]


@pytest.fixture
def net() -> Iterator[Net]:
    policy = Policy()
    plugins.register(policy)
    try:
        with VirtualWorker(id="bob") as bob, VirtualWorker(id="alice") as alice, VirtualWorker(id="secure") as secure:
            yield Net(bob, alice, secure, policy)
    finally:
        plugins.unregister(policy)


def data(start: float = 1.0) -> Any:
    return torch.arange(float(start), start + 4)


class TestGather:
    def test_values_come_in_order(self, net: Net) -> None:
        here = data(9)
        given = [data(2).send(net.alice), data(1).send(net.bob), here, data(3).send(net.bob).send(net.alice)]
        kept = farpoint.gather(given, keep=True)
        found = farpoint.gather(given)
        for values in (kept, found):
            assert [value[0].item() for value in values] == [2, 1, 9, 3] and values[2] is here
        assert net.sizes() == [0, 0, 0]
        with pytest.raises(PointerSpentError, match="test_aggregate"):
            given[0].get()

    def test_all_are_asked_before_one_is_waited_for(self, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        given = [data().send(worker) for worker in (net.bob, net.alice, net.secure, net.bob)]
        events: list[str] = []
        ask, value = type(net.bob.peer).ask, Answers.value

        def asked(peer: Any, message: list[Any], *args: Any, **kwargs: Any) -> Any:
            events.append(f"ask {peer.name}" if message[0] == Kind.FETCH else "ask other")
            return ask(peer, message, *args, **kwargs)

        def waited(answers: Any, reply: Any) -> Any:
            events.append("wait")
            return value(answers, reply)

        monkeypatch.setattr(type(net.bob.peer), "ask", asked)
        monkeypatch.setattr(Answers, "value", waited)
        farpoint.gather(given)
        assert events == ["ask bob", "ask alice", "ask secure", "ask bob", *["wait"] * 4]

    def test_if_one_fails_all_stay(self, net: Net) -> None:
        given = [data().send(net.bob), data().send(net.alice)]
        net.policy.refused.add(("get", "alice"))
        with pytest.raises(GetNotPermittedError):
            farpoint.gather(given)
        net.policy.refused.clear()
        assert net.sizes() == [1, 1, 0] and all(torch.equal(value, data()) for value in farpoint.gather(given))

    def test_the_same_one_twice(self, net: Net) -> None:
        p = data().send(net.bob)
        assert [value.tolist() for value in farpoint.gather([p, p])] == [data().tolist()] * 2 and net.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("keep", [False, True])
    def test_leaves_and_graphs_are_those_of_get(self, net: Net, keep: bool) -> None:
        leaf = data().requires_grad_().send(net.bob)
        (leaf * leaf).sum().backward()
        found, results = farpoint.gather([leaf, leaf * 3], keep=keep)
        assert found.is_leaf is not keep and not results.is_leaf
        if not keep:
            assert found.grad is not None and torch.equal(found.grad, 2 * data())
            assert net.sizes() == [0, 0, 0]

    def test_gradients_go_back(self, net: Net) -> None:
        leaf = data().requires_grad_().send(net.bob)
        value: Any = farpoint.gather([leaf * 3])[0]
        value.sum().backward()
        assert torch.equal(leaf.grad.get(), torch.full((4,), 3.0))


class TestAverageOfTensors:
    def test_only_the_average_is_left(self, net: Net) -> None:
        p, q = data(1).requires_grad_().send(net.bob), data(4).send(net.alice)
        found = farpoint.average([p, q], on=net.secure)
        assert isinstance(found, PointerTensor) and found.location is net.secure and not found.requires_grad
        assert net.sizes() == [1, 1, 1] and net.fetched() == []
        assert torch.equal(found.get(), (data(1) + data(4)) / 2) and torch.equal(p.get().detach(), data(1)) and torch.equal(q.get(), data(4))

    def test_whatever_the_way(self, net: Net) -> None:
        there, chain = data(1).send(net.secure), data(2).send(net.bob).send(net.alice)
        found = farpoint.average([there, chain, data(6)], on="secure")
        found.add_(100)
        assert torch.equal(found.get(), data(3) + 100)
        assert torch.equal(there.get(), data(1)) and torch.equal(chain.get().get(), data(2)) and net.sizes() == [0, 0, 0]

    def test_one_is_its_own_average(self, net: Net) -> None:
        p = data().send(net.secure)
        farpoint.average([p], on=net.secure).zero_()
        assert torch.equal(p.get(), data())

    def test_numbers_are_divided_as_torch_does(self, net: Net) -> None:
        p, q = torch.tensor([1, 2]).send(net.bob), torch.tensor([2, 2]).send(net.alice)  # type: ignore[attr-defined]  # the hook's
        assert farpoint.average([p, q], on=net.secure).get().tolist() == [1.5, 2]

    def test_nobody_needs_the_right_to_read(self, net: Net) -> None:
        net.policy.refused |= {("get", "bob"), ("get", "alice")}
        p, q = data(1).send(net.bob), data(3).send(net.alice)
        assert torch.equal(farpoint.average([p, q], on=net.secure).get(), data(2))
        with pytest.raises(GetNotPermittedError):
            p.get()

    def test_what_fails_leaves_nothing(self, net: Net) -> None:
        p, q = data(1).send(net.bob), data(3).send(net.alice)
        net.policy.refused.add(("move", "alice"))
        with pytest.raises(PermissionDeniedError):
            farpoint.average([p, q], on=net.secure)
        assert net.sizes() == [1, 1, 0]

    def test_what_is_not_alike_is_refused_before_anything_is_sent(self, net: Net) -> None:
        p = data().send(net.bob)
        wrong: list[Any] = [[], [p, data()[:1].send(net.alice)], [p, data().double().send(net.alice)], [p, 1], [p, nn.Linear(1, 1)]]
        for items in wrong:
            with pytest.raises(PointerError, match=r"farpoint\.average\(\)"):
                farpoint.average(items, on=net.secure)
        with pytest.raises(WorkerNotFoundError):
            farpoint.average([p], on="me")
        assert ("move", "me", "bob") not in net.policy.asked


class Tied(nn.Module):
    """Has what modules have: shared parameters, frozen ones, buffers of several dtypes, weights of an RNN, a parameter of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GRU(4, 2)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.wide = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.register_buffer("mask", torch.rand(4) > 0.5, persistent=False)

    def forward(self, x: Any) -> Any:
        return self.rnn(self.second(self.norm(self.first(x))), x.new_zeros(1, 2))[0] * self.wide.float()


class TestAverageOfModules:
    def modules(self, *workers: Any) -> tuple[list[Any], list[Any]]:
        """Return modules of which each has run another time, and copies of them that are here."""
        here = []
        for times in range(len(workers)):
            module: Any = Tied()
            for _ in range(times + 1):
                module(torch.randn(3, 4))
            here.append(module)
        there = [copy.deepcopy(module) for module in here]
        for module, worker in zip(there, workers, strict=True):
            if worker is not None:
                module.send(worker)
        return there, here

    def test_it_is_a_module_with_the_means(self, net: Net) -> None:
        there, here = self.modules(net.bob, net.alice)
        before = net.sizes()
        found = farpoint.average(there, on=net.secure)
        assert type(found) is Tied and found.second.weight is found.first.weight and not found.first.bias.requires_grad
        assert all(isinstance(p, nn.Parameter) and isinstance(p, PointerTensor) and p.location is net.secure for p in found.parameters())
        assert net.fetched() == [] and net.sizes() == [*before[:2], len([*found.parameters(), *found.buffers()])]
        x = torch.randn(3, 4)
        assert isinstance(found(x.send(net.secure)), PointerTensor)  # type: ignore[attr-defined]  # the hook's
        found = farpoint.average(there, on=net.secure).get()
        assert net.sizes() == [*before[:2], 0]
        states = [module.state_dict() for module in here]
        for name, value in found.state_dict().items():
            values = [state[name] for state in states]
            mean = (values[0] + values[1]) / 2 if value.is_floating_point() else torch.maximum(*values)
            assert torch.equal(value, mean) and value.dtype == mean.dtype, name
        assert found.norm.num_batches_tracked == 2 and torch.equal(found.mask, here[0].mask | here[1].mask)
        assert torch.equal(found.eval()(x), found.eval()(x))
        for module, original in zip(there, here, strict=True):
            assert all(torch.equal(*pair) for pair in zip(module.get().parameters(), original.parameters(), strict=True))

    def test_wherever_they_are(self, net: Net) -> None:
        there, here = self.modules(net.secure, None, net.bob)
        there[2].norm.move(net.alice)
        found = farpoint.average(there, on=net.secure).get()
        with torch.no_grad():
            for name in ("first.weight", "norm.weight", "wide", "rnn.bias_ih_l0"):
                values = [module.get_parameter(name) for module in here]
                assert torch.equal(found.get_parameter(name), (values[0] + values[1] + values[2]) / 3)

    def test_messages_do_not_grow_with_the_parameters(self, net: Net) -> None:
        moves = []
        for depth in (1, 5):
            given = [nn.Sequential(*[nn.Linear(2, 2) for _ in range(depth)]).send(worker) for worker in (net.bob, net.alice)]  # type: ignore[operator]  # the hook's
            net.policy.asked.clear()
            farpoint.average(given, on=net.secure)
            moves.append([asked for asked in net.policy.asked if asked[0] == "move" and asked[1] == "me"])
        assert moves[0] == moves[1] and ("move", "me", "bob") in moves[0]

    def test_what_is_not_alike_is_refused(self, net: Net) -> None:
        one: Any = nn.Linear(2, 2).send(net.bob)  # type: ignore[operator]  # the hook's
        for other in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Linear(2, 2).double()):
            with pytest.raises(PointerError, match="module 1"):
                farpoint.average([one, other], on=net.secure)

    def test_of_an_object_that_is_gone(self, net: Net) -> None:
        there, _ = self.modules(net.bob, net.alice)
        net.alice.clear_objects()
        with pytest.raises(ObjectNotFoundError):
            farpoint.average(there, on=net.secure)
        assert net.sizes()[2] == 0
