"""L1: send copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.tensors import DTYPES
from farpoint.testing.laws.network import Law, Network, home, look, numbers
from farpoint.testing.trees import LAYOUTS, assert_same, sample

CHANGES: dict[str, Callable[[Any], object]] = {
    "add_": lambda x: x.add_(1),
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(torch.full_like(x, 9)),
    "index": lambda x: x.__setitem__(0, 9),
    "view": lambda x: x.view(-1)[:1].fill_(9),
    "data": lambda x: x.data.mul_(3),
    "out": lambda x: torch.add(x, 1, out=x),
    "storage": lambda x: x.untyped_storage().fill_(1),
    "set_": lambda x: x.set_(torch.ones_like(x)),
    "resize_": lambda x: x.resize_(1).fill_(9),
}


class TestL1SendCopies(Law):
    """L1: a worker holds a snapshot of what was sent, and `x` stays usable."""

    @pytest.mark.filterwarnings("ignore:ComplexHalf support")
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)], ids=str)
    def test_every_dtype_travels(self, network: Network, dtype: str, shape: tuple[int, ...]) -> None:
        x = sample(dtype, shape)
        p = network.send(x, "b")
        assert p.dtype is x.dtype and p.shape == x.shape and p.layout is x.layout
        assert_same(p.get(), x)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_views_travel_as_what_they_show(self, network: Network, layout: str) -> None:
        x = LAYOUTS[layout](sample("float32", (2, 3, 4)))
        for chain in ("b", "ab"):
            p = network.send(x, chain)
            back = home(p)
            assert back.shape == x.shape and torch.equal(back, x)

    @pytest.mark.parametrize("bit", ["conj", "neg", "both"])
    def test_conjugated_and_negated_views_travel_as_values(self, network: Network, bit: str) -> None:
        z = torch.tensor([1 + 2j, 3 - 4j])
        x = {"conj": z.conj(), "neg": z.conj().imag, "both": torch._neg_view(z.conj())}[bit]
        p = network.send(x, "b")
        assert torch.equal(home(p + p), x + x) and torch.equal(p.get(), x.clone())

    @pytest.mark.parametrize("size", [5, 1_000_000])
    @pytest.mark.parametrize("change", CHANGES)
    def test_later_changes_are_not_seen(self, network: Network, change: str, size: int) -> None:
        x = torch.ones(size)
        p = network.send(x, "b")
        CHANGES[change](x)
        assert torch.equal(p.get(), torch.ones(size))

    def test_changes_over_there_are_not_seen_here(self, network: Network) -> None:
        x, y = numbers(), torch.ones(1_000_000)
        network.send(x, "b").add_(1)
        network.send(y, "b").add_(1)
        network.bob.synchronize()
        assert torch.equal(x, numbers()) and torch.equal(y, torch.ones(1_000_000))

    def test_what_was_fetched_is_a_copy(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        first = p.get(keep=True)
        p.add_(1)
        first.zero_()
        assert torch.equal(p.get(), numbers() + 1) and torch.equal(first, torch.zeros(5))

    def test_requires_grad_travels(self, network: Network) -> None:
        leaf = numbers().requires_grad_()
        cases: list[tuple[Any, bool]] = [
            (numbers(), False),
            (leaf, True),
            (leaf * 2, True),
            (leaf.detach(), False),
            (torch.nn.Parameter(numbers()), True),
            (torch.nn.Parameter(numbers(), requires_grad=False), False),
        ]
        for x, wants in cases:
            p = network.send(x, "b")
            assert p.requires_grad is wants and p.is_leaf and p.grad is None
            back = p.get()
            assert back.requires_grad is wants and back.is_leaf and torch.equal(back, x)

    def test_requires_grad_may_be_chosen(self, network: Network) -> None:
        assert numbers().send(network.bob, requires_grad=True).requires_grad
        assert not numbers().requires_grad_().send(network.bob, requires_grad=False).requires_grad

    def test_a_gradient_travels_along(self, network: Network) -> None:
        x = numbers().requires_grad_()
        (x * x).sum().backward()
        p = network.send(x, "b")
        assert isinstance(p.grad, PointerTensor) and x.grad is not None
        x.grad.zero_()
        assert torch.equal(look(p.grad), numbers() * 2)
        back = p.get()
        assert type(back.grad) is torch.Tensor and torch.equal(back.grad, numbers() * 2)
        del p
        assert network.sizes() == [0, 0, 0]

    def test_tags_and_descriptions_travel(self, network: Network) -> None:
        x: Any = numbers()
        x.tag("#one", "#two")
        x.describe("five numbers")
        p = network.send(x, "b")
        for wanted in (["#one"], ["#two", "#one"], ["numbers"], ["five", "#two"]):
            (found,) = network.bob.search(*wanted)
            assert torch.equal(found.get(), numbers())
        assert network.bob.search("#one", "#three") == [] and network.alice.search("#one") == []
        moved = p.move(network.alice)
        assert network.bob.search("#one") == [] and len(network.alice.search("#one", "#two", "numbers")) == 1
        back = moved.get()
        kept = network.send(back, "c")
        assert len(network.charlie.search("#one", "#two", "five")) == 1
        del kept, moved, back
        assert network.sizes() == [0, 0, 0]

    def test_tags_are_a_copy_too(self, network: Network) -> None:
        x: Any = numbers()
        x.tag("#before")
        p = network.send(x, "b")
        x.tag("#after")
        assert len(network.bob.search("#before")) == 1 and network.bob.search("#after") == []
        p.tag("#there")
        assert len(network.bob.search("#there")) == 1 and network.bob.search("#before") == []
        q = network.send(x, "b")
        assert len(network.bob.search("#after")) == 1
        del p, q

    def test_sent_twice_is_two_objects(self, network: Network) -> None:
        x = numbers()
        p, q, r = network.send(x, "b"), network.send(x, "b"), network.send(x, "a")
        assert network.sizes() == [2, 1, 0]
        p.add_(1)
        assert torch.equal(q.get(), numbers()) and torch.equal(r.get(), numbers()) and torch.equal(p.get(), numbers() + 1)

    def test_a_worker_may_be_named(self, network: Network) -> None:
        x: Any = numbers()
        p = x.send(network.bob.id)
        assert p.location is network.bob and torch.equal(p.get(), numbers())

    def test_a_pointer_is_copied_not_what_it_points_at(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        pp, qq = p.send(network.alice), p.send(network.alice)
        assert network.sizes() == [1, 2, 0]
        p.add_(1)
        pp.mul_(2)
        for x in (p, pp, qq):
            assert torch.equal(look(x), (numbers() + 1) * 2)

    @pytest.mark.parametrize("first", [True, False])
    def test_either_pointer_outlives_the_other(self, network: Network, first: bool) -> None:
        p = network.send(numbers(), "b")
        pp = p.send(network.alice)
        if first:
            del p
            assert network.sizes() == [1, 1, 0]
            assert torch.equal(home(pp), numbers())
        else:
            del pp
            assert network.sizes() == [1, 0, 0]
            assert torch.equal(p.get(), numbers())
        assert network.sizes() == [0, 0, 0]
