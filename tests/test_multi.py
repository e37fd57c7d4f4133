"""Multi-pointers: what is done with one is done on each of its workers."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import farpoint
from farpoint import (
    MultiPointer,
    NotColocatedError,
    PointerError,
    PointerSpentError,
    PointerTensor,
    ValueNotHereError,
    VirtualWorker,
    WorkerNotFoundError,
)

farpoint.TorchHook(torch)


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="bob") as made:
        yield made


@pytest.fixture
def alice() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="alice") as made:
        yield made


@pytest.fixture
def x() -> Any:
    return torch.arange(1.0, 5.0)


@pytest.fixture
def m(x: Any, bob: VirtualWorker, alice: VirtualWorker) -> Any:
    return x.send(bob, alice)


@pytest.fixture
def shards(bob: VirtualWorker, alice: VirtualWorker) -> Any:
    """Return one with other values, and shapes, on each worker."""
    return MultiPointer([farpoint.send(torch.arange(3.0), bob), farpoint.send(torch.arange(5.0, 10.0), alice)])


def same(found: Any, expected: Any) -> bool:
    """Return whether both members are what is expected."""
    assert type(found) is MultiPointer
    return all(torch.equal(value, expected) and value.dtype == expected.dtype for value in found.get(keep=True))


CALLS: dict[str, Any] = {
    "function": lambda a: torch.exp(a),
    "function of two": lambda a: torch.maximum(a, a.flip(0)),
    "keywords": lambda a: torch.sum(input=a, dim=0, keepdim=True),
    "a list": lambda a: torch.stack([a, a + 1], dim=1),
    "functional": lambda a: functional.softmax(a, dim=0),
    "method": lambda a: a.reshape(2, 2).mean(dim=0),
    "property": lambda a: a.reshape(2, 2).mT,
    "number": lambda a: a * 2 + 1,
    "number first": lambda a: 1 - 2 / a**2,
    "local number": lambda a: torch.tensor(2.0) * a - torch.tensor(1.0),
    "matmul": lambda a: a.reshape(2, 2) @ a.reshape(2, 2),
    "negative": lambda a: -a,
    "comparison": lambda a: (a >= 2) & ~(a == 3),
    "index": lambda a: a[1:3],
    "mask": lambda a: a[a > 2],
    "rows": lambda a: torch.cat([row[None] for row in a][::-1]),
}


class TestOperations:
    @pytest.mark.parametrize("name", CALLS)
    def test_both_get_the_result_of_one(self, m: Any, x: Any, name: str) -> None:
        assert same(CALLS[name](m), CALLS[name](x))

    def test_several_results(self, m: Any, x: Any) -> None:
        found, expected = m.max(dim=0), x.max(dim=0)
        assert type(found) is type(expected)
        assert same(found.values, expected.values) and same(found.indices, expected.indices)
        assert all(same(*pair) for pair in zip(m.split(2), x.split(2), strict=True))

    @pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"])
    def test_in_place_operators_give_the_same_object(self, m: Any, x: Any, name: str) -> None:
        before, members = m, m.pointers
        m = getattr(operator, f"i{name}")(m, 2)
        assert m is before and m.pointers == members and same(m, getattr(operator, name)(x, 2))

    def test_in_place_methods_and_items(self, m: Any, x: Any) -> None:
        assert m.mul_(3) is m
        m[0] = 7
        m[1:2] = m[3:]
        assert same(m, torch.tensor([7.0, 12.0, 9.0, 12.0]))
        assert same(m.copy_(x), x)

    def test_each_member_has_its_own_values(self, shards: Any) -> None:
        assert [value.item() for value in (shards * 2).sum().get()] == [6, 70]

    def test_everything_is_freed(self, m: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        y = torch.stack([m, m]).sum() + 1
        del y
        gc.collect()
        assert [len(bob), len(alice)] == [1, 1]


class TestPlaces:
    def test_what_does_not_match_is_refused_before_anything_is_done(self, m: Any, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        others: list[Any] = [x, x.send(bob), x.send(alice, bob), x.send(bob, alice, bob)]
        for other in others:
            for call in (m.add_, lambda a: a + m, lambda a: torch.stack([m, a]), lambda a: m.mul(other=a)):
                with pytest.raises(NotColocatedError, match=r"bob, alice.*(x\.send\(bob, alice\)|\.pointers)"):
                    call(other)
        assert same(m, x)

    def test_other_ways_are_other_places(self, m: Any, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        chains = x.send(bob).send(alice, bob)
        with pytest.raises(NotColocatedError, match="alice -> bob"):
            m + chains
        assert [p.get().tolist() for p in (chains + chains).get()] == [[2, 4, 6, 8]] * 2

    def test_a_worker_that_is_not_known(self, x: Any, bob: VirtualWorker) -> None:
        with pytest.raises(WorkerNotFoundError):
            x.send(bob, "nobody")
        assert len(bob) == 0

    def test_it_is_made_of_pointers(self, x: Any) -> None:
        for wrong in ([], [x]):
            with pytest.raises(PointerError):
                MultiPointer(wrong)


class TestValues:
    def test_get(self, m: Any, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        assert all(torch.equal(value, x) for value in m.get(keep=True)) and [len(bob), len(alice)] == [1, 1]
        assert all(torch.equal(value, x) for value in m.get()) and [len(bob), len(alice)] == [0, 0]
        for use in (repr, lambda p: p + 1, lambda p: p.get(), lambda p: p.shape):
            with pytest.raises(PointerSpentError, match=r"get\(\)"):
                use(m)

    def test_sum(self, m: Any, x: Any, shards: Any) -> None:
        assert torch.equal(m.get(keep=True, sum_results=True), 2 * x)
        assert torch.equal(m.get(sum_results=True), 2 * x)
        with pytest.raises(PointerError, match=r"\(3,\) on bob, \(5,\) on alice"):
            shards.get(sum_results=True)
        assert shards.sum().get(sum_results=True) == 38

    def test_nothing_leaves_by_accident(self, m: Any) -> None:
        calls: list[Any] = [bool, int, float, complex, np.asarray, operator.index, lambda p: p.item(), lambda p: f"{p:.2f}"]
        calls += [lambda p: p.tolist(), lambda p: 1.0 in p, lambda p: torch.equal(p, p), pickle.dumps]
        for call in calls:
            with pytest.raises(ValueNotHereError):
                call(m)

    def test_metadata(self, m: Any, shards: Any) -> None:
        assert m.shape == (4,) and len(m) == 4 and m.dtype == torch.float32 and m.dim() == 1 and not m.requires_grad
        for ask in (lambda p: p.shape, len, lambda p: p.numel(), lambda p: p.split(2)):
            with pytest.raises(PointerError, match="on alice"):
                ask(shards)

    def test_what_is_no_attribute(self, m: Any, bob: VirtualWorker) -> None:
        for wrong in (lambda: m.nonsense, lambda: m.move(bob), lambda: setattr(m, "nonsense", 1), lambda: setattr(m, "pointers", ())):
            with pytest.raises(AttributeError, match=r"\.pointers"):
                wrong()

    def test_repr_and_copies(self, m: Any, x: Any) -> None:
        assert "bob:" in repr(m) and "alice:" in repr(m) and hash(m) == hash(m)
        deep, shallow = copy.deepcopy(m), copy.copy(m)
        m.zero_()
        assert same(deep, x) and same(shallow, 0 * x)


class TestGradients:
    def test_gradients_stay_where_they_are(self, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        w = x.requires_grad_().send(bob, alice)
        assert w.grad is None and w.requires_grad
        (w**2).sum().backward()
        assert same(w.grad, 2 * x.detach())
        for value in w.get():
            assert value.is_leaf and torch.equal(value.grad, 2 * x.detach())
        assert [len(bob), len(alice)] == [0, 0]

    def test_attributes_are_set_on_each(self, m: Any) -> None:
        m.requires_grad = True
        m.sum().backward()
        m.grad = None
        assert all(pointer.requires_grad and pointer.grad is None for pointer in m.pointers)

    def test_they_come_back_to_a_graph_that_the_members_share(self, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        x.requires_grad_()
        p = (x * x).send(bob, alice, requires_grad=True)
        (p * 3).sum().backward()
        assert torch.equal(x.grad, 12 * x.detach())

    def test_through_get(self, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        x.requires_grad_()
        p = x.send(bob, alice, requires_grad=True)
        (p * p).get(sum_results=True).sum().backward()
        assert torch.equal(x.grad, 4 * x.detach())

    def test_a_gradient_is_given(self, x: Any, bob: VirtualWorker, alice: VirtualWorker) -> None:
        w = x.requires_grad_().send(bob, alice)
        with pytest.raises(PointerError):
            (2 * w).backward(torch.tensor(1.0))
        (2 * w).backward(torch.ones_like(w) * 3)
        assert same(w.grad, torch.full((4,), 6.0))


def test_one_worker_gives_a_pointer(x: Any, bob: VirtualWorker) -> None:
    assert type(x.send(bob)) is type(farpoint.send(x, worker=bob)) is type(x.send(worker="bob")) is PointerTensor
