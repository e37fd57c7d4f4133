"""L4 and L5: what `get` does, and what an operation does on a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.errors import PointerSpentError
from farpoint.testing.laws.network import Law, Network, as_user, home, look, numbers, raised
from farpoint.testing.transport import eventually

USES: dict[str, Callable[[Any, Any, Network], Any]] = {
    "repr": lambda p, q, n: repr(p),
    "str": lambda p, q, n: str(p),
    "format": lambda p, q, n: f"{p}",
    "print in a list": lambda p, q, n: str([p]),
    "shape": lambda p, q, n: p.shape,
    "dtype": lambda p, q, n: p.dtype,
    "ndim": lambda p, q, n: p.ndim,
    "numel": lambda p, q, n: p.numel(),
    "stride": lambda p, q, n: p.stride(),
    "len": lambda p, q, n: len(p),
    "requires_grad": lambda p, q, n: p.requires_grad,
    "is_leaf": lambda p, q, n: p.is_leaf,
    "grad": lambda p, q, n: p.grad,
    "id_at_location": lambda p, q, n: p.id_at_location,
    "add": lambda p, q, n: p + 1,
    "radd": lambda p, q, n: 1 + p,
    "first of two": lambda p, q, n: p * q,
    "second of two": lambda p, q, n: q * p,
    "by name": lambda p, q, n: torch.add(q, other=p),
    "in a list": lambda p, q, n: torch.cat([q, p]),
    "with itself": lambda p, q, n: torch.stack([p, p]),
    "out": lambda p, q, n: torch.add(q, q, out=p),
    "comparison": lambda p, q, n: p == q,
    "comparison with a number": lambda p, q, n: p == 1,
    "index": lambda p, q, n: p[0],
    "as an index": lambda p, q, n: q[p],
    "write": lambda p, q, n: p.__setitem__(0, 1),
    "in place": lambda p, q, n: p.add_(1),
    "with a local tensor": lambda p, q, n: p + numbers(),
    "iteration": lambda p, q, n: list(p),
    "bool": lambda p, q, n: bool(p),
    "item": lambda p, q, n: p[0].item(),
    "detach": lambda p, q, n: p.detach(),
    "clone": lambda p, q, n: p.clone(),
    "get": lambda p, q, n: p.get(),
    "get, keep": lambda p, q, n: p.get(keep=True),
    "send": lambda p, q, n: p.send(n.alice),
    "move": lambda p, q, n: p.move(n.alice),
    "move to where it was": lambda p, q, n: p.move(n.bob),
    "remote_get": lambda p, q, n: p.remote_get(),
    "remote_send": lambda p, q, n: p.remote_send(n.alice),
    "free": lambda p, q, n: p.free(),
    "tag": lambda p, q, n: p.tag("#x"),
    "describe": lambda p, q, n: p.describe("x"),
}

SPENDERS = {
    "get": "p.get()",
    "move": "p.move(n.alice)",
    "free": "p.free()",
    "remote_get": "p.remote_get()",
    "remote_send": "p.remote_send(n.alice)",
}


class TestL4GetConsumes(Law):
    """L4: `get` brings the object here and gives the reference up."""

    def test_a_sole_holder_leaves_nothing_behind(self, network: Network) -> None:
        for chain in ("b", "ab", "cab", "bab"):
            p = network.send(numbers(), chain)
            assert torch.equal(home(p), numbers())
            assert network.sizes() == [0, 0, 0]
            assert isinstance(raised(lambda p=p: p + 1), PointerSpentError)  # type: ignore[misc]

    @pytest.mark.parametrize("use", USES)
    def test_every_use_of_a_spent_pointer_raises(self, network: Network, use: str) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "b")
        p.get()
        error = raised(lambda: USES[use](p, q, network))
        assert isinstance(error, PointerSpentError), repr(error)
        assert "get()" in str(error) and network.bob.id in str(error)
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(q.get(), numbers())

    @pytest.mark.parametrize("how", SPENDERS)
    def test_it_says_where_it_was_spent(self, network: Network, how: str) -> None:
        for chain in ("b", "ab"):
            names = as_user(f"# a comment\nkept = {SPENDERS[how]}", p=network.send(numbers(), chain), n=network)
            error = raised(lambda names=names: names["p"] + 1)  # type: ignore[misc]
            assert isinstance(error, PointerSpentError)
            said = "get" if (how, chain) == ("remote_get", "b") else how
            assert (error.how, error.where) == (said, "user.py:2") and f"{said}() at user.py:2" in str(error)

    def test_keep_copies(self, network: Network) -> None:
        for chain in ("b", "ab"):
            p = network.send(numbers(), chain)
            before = network.sizes()
            back = look(p)
            back.zero_()
            assert torch.equal(home(p + 1), numbers() + 1) and torch.equal(look(p), numbers())
            assert network.sizes() == before

    def test_keeping_a_pointer_counts_one_holder_more(self, network: Network) -> None:
        pp = network.send(numbers(), "ab")
        p = pp.get(keep=True)
        assert isinstance(p, PointerTensor) and p.location is network.bob
        assert network.sizes() == [1, 1, 0]
        del pp
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(p.get(), numbers())

    @pytest.mark.parametrize("chain", ["ab", "cab", "bab", "bb", "acab"])
    def test_only_the_first_hop_is_taken(self, network: Network, chain: str) -> None:
        p = network.send(numbers(), chain)
        q = p.get()
        assert isinstance(q, PointerTensor) and q.location is network[chain[1]][0]
        assert network.sizes() == [chain[1:].count(letter) for letter in "bac"]
        assert torch.equal(home(q), numbers())

    def test_another_holder_keeps_the_object(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        pp, view = p.send(network.alice), p[1:]
        back = p.get()
        back.zero_()
        assert torch.equal(home(pp), numbers()) and torch.equal(view.get(), numbers()[1:])
        assert network.sizes() == [0, 0, 0]

    def test_what_is_here_is_returned_as_it_is(self, network: Network) -> None:
        x: Any = numbers()
        assert x.get() is x and x.get(keep=True) is x

    def test_results_and_views_come_home(self, network: Network) -> None:
        x = torch.arange(6.0).view(2, 3)
        p = network.send(x, "b")
        calls: list[Callable[[Any], Any]] = [
            lambda t: t.t(),
            lambda t: t[:, 1],
            lambda t: t[:, ::2],
            lambda t: t.expand(2, 2, 3),
            lambda t: t.sum(),
            lambda t: t > 2,
            lambda t: torch.complex(t, t).conj(),
            lambda t: t[2:],
            lambda t: torch.fft.fft(t).conj().imag,
        ]
        for call in calls:
            assert torch.equal(call(p).get(), call(x).clone())
        assert network.sizes() == [1, 0, 0]


class TestL5OperationsFollowTheChain(Law):
    """L5: an operation on a chain of n hops adds one object on each of its n workers."""

    @pytest.mark.parametrize("chain", ["b", "ab", "cab", "bb", "bab", "abab", "cbab"])
    def test_one_object_a_worker(self, network: Network, chain: str) -> None:
        once = [chain.count(letter) for letter in "bac"]
        p = network.send(numbers(), chain)
        assert network.sizes() == once
        y = p + p
        assert network.sizes() == [2 * n for n in once]
        z = y * p - 1
        assert network.sizes() == [3 * n for n in once]  # the product is nobody's any more
        assert torch.equal(home(z), numbers() * 2 * numbers() - 1) and torch.equal(home(y), numbers() * 2)
        assert network.sizes() == once

    @pytest.mark.parametrize("chain", ["b", "ab", "cab", "bab"])
    def test_every_kind_of_operation(self, network: Network, chain: str) -> None:
        x = torch.arange(12.0).view(3, 4)
        p = network.send(x, chain)
        hops = len(chain)
        calls: list[tuple[Callable[[Any], Any], int]] = [
            (lambda t: t.topk(2), 2),
            (lambda t: t.split([1, 3], dim=1), 2),
            (lambda t: t.unbind(), 3),
            (lambda t: [t.t()], 1),
            (lambda t: [t.masked_select(t > 4)], 1),
            (lambda t: [torch.nonzero(t)], 1),
            (lambda t: [torch.stack([t, t, t])], 1),
            (lambda t: [t * torch.tensor(2.0)], 1),
            (lambda t: [t @ t.t()], 1),
            (lambda t: torch.unique(t, return_inverse=True, return_counts=True), 3),
            (lambda t: [t.clone().add_(1)], 1),
        ]
        for call, results in calls:
            here, there = call(x), call(p)
            eventually(lambda n=hops * (1 + results): sum(network.sizes()) == n)  # type: ignore[misc]
            for one, other in zip(there, here, strict=True):
                assert torch.equal(home(one), other)
            del there, one
            eventually(lambda: sum(network.sizes()) == hops)

    def test_chains_that_were_made_apart_meet(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        one, other = p.send(network.alice), network.send(numbers() + 1, "ab")
        assert torch.equal(home(one * other), numbers() * (numbers() + 1))
        grown = network.send(numbers(), "a").remote_send(network.bob)
        assert torch.equal(home(one + grown), numbers() * 2)
        shrunk = network.send(numbers(), "acb").remote_get().move(network.bob)
        assert torch.equal(home(one + shrunk), numbers() * 2)
        fetched = network.send(numbers(), "cab").get()
        assert torch.equal(home(one - fetched), numbers() * 0)
