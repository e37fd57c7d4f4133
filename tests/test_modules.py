"""What one does with modules beside training: states, copies, sharing, clipping, parametrizations, and the permission to read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import farpoint
from farpoint import (
    FarpointError,
    GetNotPermittedError,
    NotColocatedError,
    PointerTensor,
    ValueNotHereError,
    VirtualWorker,
)
from farpoint.plugins import hookimpl, plugins

farpoint.TorchHook(torch)


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="bob") as made:
        yield made


@pytest.fixture
def alice() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="alice") as made:
        yield made


def twins(module: nn.Module) -> tuple[Any, Any]:
    return module, copy.deepcopy(module)


def same(found: Any, expected: Any) -> bool:
    assert isinstance(found, PointerTensor)
    return torch.equal(farpoint.get(found.detach()), expected.detach())


def gradients_same(there: nn.Module, here: nn.Module) -> bool:
    return all(same(a.grad, b.grad) for a, b in zip(there.parameters(), here.parameters(), strict=True))


class TestStates:
    def test_a_local_state_is_loaded(self, bob: VirtualWorker) -> None:
        there, here = twins(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        state = {name: value + 1 for name, value in here.state_dict().items()}
        there.send(bob).load_state_dict(state)
        assert all(same(found, state[name]) for name, found in there.state_dict().items())
        assert all(type(value) is torch.Tensor for value in there.get().state_dict().values())

    def test_a_state_of_the_same_worker_is_loaded(self, bob: VirtualWorker) -> None:
        there, other = nn.Linear(3, 4).send(bob), nn.Linear(3, 4).send(bob)  # type: ignore[operator]  # the hook's
        there.load_state_dict(other.state_dict())
        assert same(there.weight, other.weight.get(keep=True))

    def test_a_remote_state_does_not_come_by_itself(self, bob: VirtualWorker) -> None:
        there, here = twins(nn.Linear(3, 4))
        there.send(bob)
        with pytest.raises((NotColocatedError, RuntimeError), match="bob"):
            here.load_state_dict(there.state_dict())

    def test_copying_into_a_pointer_stays_in_the_graph(self, bob: VirtualWorker) -> None:
        x = torch.ones(3, requires_grad=True)
        p: Any = torch.zeros(3).send(bob)  # type: ignore[attr-defined]  # the hook's
        assert p.copy_(x * 2) is p
        (p * 3).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 6.0))  # type: ignore[arg-type]  # there is one


class TestIdentities:
    def test_what_is_shared_stays_shared(self, bob: VirtualWorker) -> None:
        tied: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        tied.send(bob)
        assert tied[1].weight is tied[0].weight and len(bob) == 3
        tied.get()
        assert tied[1].weight is tied[0].weight and type(tied[0].weight) is nn.Parameter and len(bob) == 0

    def test_a_graph_of_before_goes_on_with_what_was(self, bob: VirtualWorker) -> None:
        there: Any = nn.Linear(3, 2)
        weight = there.weight
        loss = (there(torch.ones(1, 3)) ** 2).sum()
        there.send(bob)
        loss.backward()
        assert there.weight is weight and weight.grad is None
        loss = (there(torch.ones(1, 3).send(bob)) ** 2).sum()  # type: ignore[attr-defined]  # the hook's
        loss.backward()
        there.get()
        assert there.weight is weight and weight.grad is not None and weight.is_leaf and weight.requires_grad

    def test_what_is_frozen_stays_frozen(self, bob: VirtualWorker) -> None:
        there: Any = nn.Linear(3, 2)
        there.bias.requires_grad_(False)
        there.send(bob)
        assert there.weight.requires_grad and not there.bias.requires_grad and isinstance(there.bias, nn.Parameter)
        there.get()
        assert there.weight.requires_grad and not there.bias.requires_grad

    def test_a_call_that_fails_changes_nothing(self, bob: VirtualWorker) -> None:
        there: Any = nn.Linear(3, 2)
        there.register_buffer("sparse", torch.eye(3).to_sparse())
        before = list(there.parameters())
        with pytest.raises(FarpointError):
            there.send(bob)
        assert all(a is b and type(a) is nn.Parameter for a, b in zip(there.parameters(), before, strict=True)) and len(bob) == 0

    def test_a_get_that_is_refused_changes_nothing(self, bob: VirtualWorker) -> None:
        class Stingy:
            @hookimpl
            def farpoint_authorize(self, action: str, object: int) -> str | None:  # the hook's
                return "not this one" if action == "get" and object == last else None

        there: Any = nn.Linear(3, 2).send(bob)  # type: ignore[operator]  # the hook's
        last = there.bias.id_at_location
        policy = Stingy()
        plugins.register(policy)
        try:
            with pytest.raises(GetNotPermittedError, match="not this one"):
                there.get()
        finally:
            plugins.unregister(policy)
        assert isinstance(there.weight, PointerTensor) and len(bob) == 2
        assert there.get().weight.shape == (2, 3)

    def test_a_module_that_has_nothing_yet(self, bob: VirtualWorker) -> None:
        with pytest.raises(FarpointError, match="call LazyLinear once, then send it"):
            nn.LazyLinear(3).send(bob)  # type: ignore[operator]  # the hook's

    def test_a_leaf_is_copied_deeply_and_nothing_else(self, bob: VirtualWorker) -> None:
        p: Any = torch.ones(3, requires_grad=True).send(bob)  # type: ignore[attr-defined]  # the hook's
        twice = copy.deepcopy([p, p])
        assert twice[0] is twice[1] is not p and twice[0].requires_grad and len(bob) == 2
        with pytest.raises(RuntimeError, match=r"p\.detach\(\)"):
            copy.deepcopy(p * 2)


class TestTools:
    def test_clipping(self, bob: VirtualWorker) -> None:
        there, here = twins(nn.Linear(3, 2))
        there.send(bob)
        x = torch.arange(6.0).reshape(2, 3)
        (there(x.send(bob)) ** 2).sum().backward()  # type: ignore[attr-defined]  # the hook's
        (here(x) ** 2).sum().backward()
        assert same(nn.utils.clip_grad_norm_(there.parameters(), 0.1), nn.utils.clip_grad_norm_(here.parameters(), 0.1))
        assert gradients_same(there, here)
        nn.utils.clip_grad_value_(there.parameters(), 0.01)
        nn.utils.clip_grad_value_(here.parameters(), 0.01)
        assert gradients_same(there, here)

    def test_functional_call(self, bob: VirtualWorker) -> None:
        there, here = twins(nn.Linear(3, 2))
        there.send(bob)
        results = [
            torch.func.functional_call(module, {name: value * 2 for name, value in module.named_parameters()}, (x,))
            for module, x in ((there, torch.ones(1, 3).send(bob)), (here, torch.ones(1, 3)))  # type: ignore[attr-defined]  # the hook's
        ]
        assert same(*results)

    @pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
    def test_parametrizations(self, bob: VirtualWorker, wrap: Any) -> None:
        there, here = twins(wrap(nn.Linear(3, 2)))
        there.send(bob)
        results = [there(torch.ones(4, 3).send(bob)), here(torch.ones(4, 3))]  # type: ignore[attr-defined]  # the hook's
        for result in results:
            result.sum().backward()
        assert same(*results) and gradients_same(there, here)

    def test_conversions(self, bob: VirtualWorker) -> None:
        there: Any = nn.Linear(3, 2).send(bob)  # type: ignore[operator]  # the hook's
        there.double()
        other: Any = torch.zeros(2, 3, dtype=torch.float64).send(bob)  # type: ignore[attr-defined]  # the hook's
        for wrong in (torch.zeros(2, 3), 1):
            with pytest.raises((FarpointError, TypeError)):
                there.weight.data = wrong
        there.weight.data = other
        other.add_(1)
        assert torch.equal(there.weight.detach().get(), torch.ones(2, 3, dtype=torch.float64))
        assert there.weight.dtype == torch.float64 and isinstance(there.weight, PointerTensor) and there.get().weight.dtype == torch.float64


class TestScalars:
    def test_numbers_are_read_where_it_is_allowed(self, bob: VirtualWorker) -> None:
        p: Any = torch.tensor([2.5]).send(bob)  # type: ignore[attr-defined]  # the hook's
        calls: list[Any] = [float, int, bool, lambda q: q.item(), lambda q: f"{q.sum():.2f}", lambda q: torch.is_nonzero(q)]
        for call in calls:
            with pytest.raises(ValueNotHereError, match="allow_scalars"):
                call(p)
            with farpoint.allow_scalars():
                assert call(p) == call(torch.tensor([2.5]))
                with farpoint.allow_scalars(False), pytest.raises(ValueNotHereError):
                    call(p)
        assert len(bob) == 1

    def test_nothing_else_is(self, bob: VirtualWorker) -> None:
        p: Any = torch.ones(2).send(bob)  # type: ignore[attr-defined]  # the hook's
        with farpoint.allow_scalars():
            for call in (bool, lambda q: q.tolist(), lambda q: q.numpy(), lambda q: torch.equal(q, q), lambda q: 1.0 in q):
                with pytest.raises(ValueNotHereError):
                    call(p)
