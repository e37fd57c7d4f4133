"""Modules and optimizers: a training loop that goes from worker to worker gives what the same loop gives here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import farpoint
from farpoint.testing.laws.network import Law, Network, home

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "ASGD": torch.optim.ASGD,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "LBFGS": torch.optim.LBFGS,
    "Muon": lambda p: torch.optim.Muon([each for each in p if each.ndim == 2]),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
}


def model() -> nn.Sequential:
    """Return a model with parameters and buffers, always the same."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def batch(number: int) -> tuple[Any, Any]:
    """Return what is learnt in one step."""
    chance = torch.Generator().manual_seed(number)
    return torch.randn(6, 4, generator=chance), torch.randint(0, 2, (6,), generator=chance)


def train(
    trained: nn.Module, optimizer: torch.optim.Optimizer, where: Callable[[int], Any], steps: int = 4, scheduler: Any = None
) -> None:
    """Train a model, each step where it says; None is here."""
    for number in range(steps):
        x, y = batch(number)
        worker = where(number)
        if worker is not None:
            trained.move(worker)  # type: ignore[operator]  # the hook's
            x, y = x.send(worker), y.send(worker)

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(trained(x), y)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        else:
            closure()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


class TestModules(Law):
    """A module computes where its parameters are, and an optimizer follows them."""

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_from_worker_to_worker(self, network: Network, name: str) -> None:
        here, there = model(), model()
        optimizers = [OPTIMIZERS[name](trained.parameters()) for trained in (here, there)]
        train(here, optimizers[0], lambda _: None)
        identities = [id(parameter) for parameter in there.parameters()]
        with farpoint.allow_scalars():
            train(there, optimizers[1], lambda number: (network.bob, network.alice)[number % 2])
        there.get()  # type: ignore[operator]  # the hook's
        assert [id(parameter) for parameter in there.parameters()] == identities
        for expected, found in zip(here.state_dict().values(), there.state_dict().values(), strict=True):
            assert type(found) is torch.Tensor and torch.equal(found, expected)
        # At home it goes on as if it had never been away.
        train(here, optimizers[0], lambda _: None)
        train(there, optimizers[1], lambda _: None)
        assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))
        del optimizers, here, there, expected, found
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_schedulers(self, network: Network, name: str) -> None:
        results = []
        for worker in (None, network.bob):
            trained = model()
            optimizer = OPTIMIZERS["SGD"](trained.parameters())
            train(trained, optimizer, lambda _, worker=worker: worker, scheduler=SCHEDULERS[name](optimizer))  # type: ignore[misc]
            trained.move("me")  # type: ignore[operator]  # the hook's
            results.append(trained.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(result.values() for result in results), strict=True))

    def test_a_chain(self, network: Network) -> None:
        there, here = model().eval(), model().eval()
        x, _ = batch(0)
        assert there.send(network.bob).send(network.alice) is there  # type: ignore[operator]  # the hook's
        assert torch.equal(home(there(network.send(x, "ab"))).detach(), here(x).detach())
        there.move(network.charlie)
        assert network.sizes()[0] == 0
        there.get().get()
        assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))
        assert network.sizes() == [0, 0, 0]

    def test_copies(self, network: Network) -> None:
        there: Any = model().send(network.bob)  # type: ignore[operator]  # the hook's
        (there(batch(0)[0].send(network.bob)) ** 2).sum().backward()
        twin = copy.deepcopy(there)
        count = network.sizes()[0]
        with torch.no_grad():
            for parameter in twin.parameters():
                assert parameter.grad is None  # as torch's copies
                parameter.zero_()
        assert network.sizes()[0] == count
        there.get()
        twin.get()
        assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in twin.parameters())
        assert all(parameter.count_nonzero() == 0 for parameter in twin.parameters())
        assert any(parameter.grad.count_nonzero() for parameter in there.parameters())
        assert all(torch.equal(a, b) for a, b in zip(there.parameters(), model().parameters(), strict=True))
