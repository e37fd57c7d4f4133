"""L6 and L7: where the data goes, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.errors import (
    NotColocatedError,
    OperationNotAllowedError,
    PointerSpentError,
    WorkerNotFoundError,
)
from farpoint.testing.laws.network import Law, Network, home, look, numbers, raised

# The table of L6. A chain is written from the head to the data: `ab` is me -> alice -> bob, `` is the tensor itself.
ROWS = [
    ("b", "move", "a", "a"),
    ("b", "move", "b", "b"),
    ("b", "move", "me", ""),
    ("ab", "move", "c", "ac"),
    ("ab", "move", "b", "ab"),
    ("ab", "move", "a", "a"),
    ("ab", "remote_get", "", "a"),
    ("ab", "move", "me", ""),
    ("b", "remote_send", "a", "ba"),
    ("ab", "get", "", "b"),
    ("cab", "move", "b", "cab"),
    ("cab", "move", "a", "ca"),
    ("cab", "move", "c", "cac"),
    ("cab", "move", "me", ""),
    ("cab", "remote_get", "", "ca"),
    ("cab", "remote_send", "a", "caba"),
    ("cab", "get", "", "ab"),
    ("b", "remote_get", "", ""),
    ("b", "get", "", ""),
]

CHAINS = ["b", "ab", "bb", "cab", "bab", "abb", "aab", "bbb", "cbab", "abab", "baab"]
CALLS = [
    *(("move", to) for to in ("a", "b", "c", "me")),
    *(("remote_send", to) for to in "abc"),
    ("remote_get", ""),
    ("get", ""),
]


def after(chain: str, call: str, to: str) -> str:
    """Return the chain that a call leaves: the rule behind the table."""
    if call == "get":
        return chain[1:]
    if call == "remote_get":
        return chain[:-1]
    if call == "remote_send":
        return chain + to
    if to == "me":
        return ""
    if chain[-1] == to:
        return chain
    if chain[-2:-1] == to:
        return chain[:-1]
    return chain[:-1] + to


def do(pointer: Any, call: str, to: str, network: Network) -> Any:
    """Call a method of a pointer with the worker of this letter."""
    if not to:
        return getattr(pointer, call)()
    return getattr(pointer, call)("me" if to == "me" else network[to][0])


def stations(x: Any) -> str:
    """Return the chain that a pointer really is, by following it."""
    found = ""
    while isinstance(x, PointerTensor):
        found += x.location.id[0]
        x = x.get(keep=True)
    return found


class TestL6TheDataEnd(Law):
    """L6: `move`, `remote_get` and `remote_send` act on the data end of a chain."""

    def test_the_rule_is_the_table(self) -> None:
        assert [after(chain, call, to) for chain, call, to, _ in ROWS] == [row[-1] for row in ROWS]

    @pytest.mark.parametrize(("call", "to"), CALLS)
    @pytest.mark.parametrize("chain", CHAINS)
    def test_row(self, network: Network, chain: str, call: str, to: str) -> None:
        p = network.send(numbers(), chain)
        q = do(p, call, to, network)
        left = after(chain, call, to)
        if (call, to) == ("move", chain[-1]):
            assert q is p
        else:
            assert isinstance(raised(lambda p=p: p + 1), PointerSpentError)  # type: ignore[misc]
        del p
        assert network.sizes() == [left.count(letter) for letter in "bac"]
        assert stations(q) == left
        assert torch.equal(home(q + 1), numbers() + 1)
        assert torch.equal(home(q), numbers())
        del q
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize(("call", "to"), CALLS)
    @pytest.mark.parametrize("chain", ["b", "ab", "cab", "bab"])
    def test_other_holders_keep_their_objects(self, network: Network, chain: str, call: str, to: str) -> None:
        """Somebody else holds the data, a view of it, and every pointer on the way."""
        x: Any = numbers()
        held = []
        for worker in reversed(network[chain]):
            x = x.send(worker)
            held.append(x)
        held.insert(0, held[0].detach())
        view = held[0][1:]
        p = held.pop()
        q = do(p, call, to, network)
        for x in [*held, q]:
            assert torch.equal(look(x), numbers())
        if call in {"move", "remote_get"} and q is not p:
            # What has moved is another object now: the one at the old place is its holders' own.
            view.add_(1)
            assert torch.equal(look(q), numbers())
            assert torch.equal(look(held[0])[1:], numbers()[1:] + 1)
        assert torch.equal(look(view)[2:], look(held[0])[3:])
        del p, q, x, view
        held.clear()
        assert network.sizes() == [0, 0, 0]

    def test_a_tensor_that_is_here_is_sent(self, network: Network) -> None:
        x: Any = numbers()
        p = x.move(network.bob)
        assert isinstance(p, PointerTensor) and torch.equal(p.get(), x) and torch.equal(x, numbers())

    def test_workers_may_be_named(self, network: Network) -> None:
        p = network.send(numbers(), "b").move(network.alice.id)
        assert stations(p) == "a"
        pp = p.remote_send(network.charlie.id)
        assert stations(pp) == "ac"
        assert torch.equal(home(pp), numbers())

    def test_what_a_pointer_knows_moves_along(self, network: Network) -> None:
        x: Any = torch.arange(6.0).view(2, 3).requires_grad_()
        x.tag("#it")
        x.grad = torch.ones(2, 3)
        p = x.send(network.bob).move(network.alice)
        assert p.shape == (2, 3) and p.requires_grad and torch.equal(look(p.grad), torch.ones(2, 3))
        assert len(network.alice.search("#it")) == 1 and network.bob.search("#it") == []
        assert p.grad.location is network.alice
        del p
        assert network.sizes() == [0, 0, 0]

    def test_views_move_as_what_they_show(self, network: Network) -> None:
        x = torch.arange(12.0).view(3, 4)
        p = network.send(x, "b")
        views: list[Any] = [p.t(), p[1:, ::2], p[0].expand(2, 4), p > 3, p.sum(), p[3:], torch.complex(p, p).conj()]
        for view in views:
            here = view.get(keep=True)
            moved = view.move(network.alice)
            assert torch.equal(home(torch.logical_not(moved)), torch.logical_not(here))
            assert torch.equal(moved.get(), here)
        assert torch.equal(p.get(), x)

    @pytest.mark.parametrize("chain", ["b", "cb"])
    def test_a_long_journey(self, network: Network, chain: str) -> None:
        """There and back many times, with changes on the way."""
        p = network.send(numbers(), chain)
        for step in range(30):
            p = p.move(network["abc"[step % 3]][0])
            p.add_(1)
        assert torch.equal(home(p), numbers() + 30)
        assert network.sizes() == [0, 0, 0]


FAILURES: dict[str, Callable[[Any, Any, Network], Any]] = {
    "another worker": lambda p, q, n: p + q,
    "another worker, in place": lambda p, q, n: p.add_(q),
    "another worker, out": lambda p, q, n: torch.add(p, p, out=q),
    "another worker, in a list": lambda p, q, n: torch.cat([p, p, q]),
    "another worker, index": lambda p, q, n: p[q.long()],
    "another way": lambda p, q, n: p + p.send(n.alice),
    "local tensor": lambda p, q, n: p * numbers(),
    "local tensor, in place": lambda p, q, n: p.mul_(numbers()),
    "shape": lambda p, q, n: p + p[:2],
    "shape, in place": lambda p, q, n: p.add_(p[:2]),
    "shape, view": lambda p, q, n: p.view(7),
    "shape, matmul": lambda p, q, n: p[None] @ p[None],
    "index": lambda p, q, n: p[9],
    "index, write": lambda p, q, n: p.__setitem__(9, 1),
    "dim": lambda p, q, n: p.sum(dim=4),
    "unsqueeze_": lambda p, q, n: p.unsqueeze_(9),
    "t_": lambda p, q, n: p.transpose_(0, 3),
    "resize_": lambda p, q, n: p.resize_(-4),
    "dtype": lambda p, q, n: p.bitwise_and(p),
    "dtype, in place": lambda p, q, n: p.bitwise_not_(),
    "dtype, index": lambda p, q, n: p[p],
    "forbidden": lambda p, q, n: p.to_sparse(),
    "forbidden, in place": lambda p, q, n: p.set_(),
    "too few arguments": lambda p, q, n: p.add(),
    "too many arguments": lambda p, q, n: p.add(1, 2, 3, 4),
    "wrong keyword": lambda p, q, n: p.sum(dimension=1),
    "wrong type": lambda p, q, n: p.add("text"),
    "wrong type in a list": lambda p, q, n: torch.cat([p, "text"]),  # type: ignore[list-item]
    "value": lambda p, q, n: p.item(),
    "move to nobody": lambda p, q, n: p.move("nobody"),
    "send to nobody": lambda p, q, n: p.send("nobody"),
    "remote_send to nobody": lambda p, q, n: p.remote_send("nobody"),
    "bad tag": lambda p, q, n: p.tag("no tag"),
    "values over there": lambda p, q, n: home(torch.linalg.inv(torch.outer(p, p) * 0)),
    "values over there, index": lambda p, q, n: home(p[(p * 9).long()]),
    "values over there, in place": lambda p, q, n: (p.index_fill_(0, (p * 9).long(), 0.0), n.bob.synchronize()),
}


class TestL7NothingIsLost(Law):
    """L7: a failed call frees nothing and changes nothing."""

    @pytest.mark.parametrize("call", FAILURES)
    def test_a_failed_call_changes_nothing(self, network: Network, call: str) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "a")
        raised(lambda: FAILURES[call](p, q, network))
        assert network.sizes() == [1, 1, 0]
        assert p.shape == (5,) and p.stride() == (1,) and p.dtype is torch.float32 and p.location is network.bob
        assert torch.equal(home(p + 1), numbers() + 1)
        assert torch.equal(p.get(), numbers()) and torch.equal(q.get(), numbers())
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("call", FAILURES)
    def test_nor_on_a_chain(self, network: Network, call: str) -> None:
        p, q = network.send(numbers(), "cb"), network.send(numbers(), "ca")
        raised(lambda: FAILURES[call](p, q, network))
        assert network.sizes() == [1, 1, 2]
        assert p.shape == (5,) and p.stride() == (1,) and p.dtype is torch.float32 and p.location is network.charlie
        assert torch.equal(home(p + 1), numbers() + 1)
        assert torch.equal(home(p), numbers()) and torch.equal(home(q), numbers())
        assert network.sizes() == [0, 0, 0]

    @pytest.mark.parametrize("chain", ["b", "cb"])
    @pytest.mark.parametrize("call", ["move", "remote_send"])
    def test_a_move_to_somebody_who_is_gone(self, network: Network, chain: str, call: str) -> None:
        p = network.send(numbers(), chain)
        network.end(network.alice)
        raised(lambda: do(p, call, "a", network))
        assert len(network.bob) == 1
        assert torch.equal(home(p + 1), numbers() + 1) and torch.equal(home(p), numbers())

    def test_errors_are_of_their_kinds(self, network: Network) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "a")
        kinds = {
            "another worker": NotColocatedError,
            "local tensor": NotColocatedError,
            "forbidden": OperationNotAllowedError,
            "move to nobody": WorkerNotFoundError,
            "send to nobody": WorkerNotFoundError,
            "remote_send to nobody": WorkerNotFoundError,
        }
        for call, kind in kinds.items():
            assert type(raised(lambda call=call: FAILURES[call](p, q, network))) is kind  # type: ignore[misc]
