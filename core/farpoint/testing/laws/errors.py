"""L9: errors happen where you made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farpoint.testing  # noqa: F401  # whatever has errors of its own is imported now
from farpoint import PointerTensor
from farpoint.errors import FarpointError, NotColocatedError, RemoteExecutionError, WorkerNotFoundError
from farpoint.plugins import plugins
from farpoint.testing.laws.network import Law, Network, as_user, home, look, numbers, raised

WRONG = """
x @ x
x.mm(x)
x + x[:, :2]
x.add_(x[:, :2])
x.view(5)
x.reshape(4)
x[7]
x[0, 0, 0]
x["a"]
x[:, 9]
x.bitwise_not()
~x
x << 1
x & x
x.sum(dim=5)
torch.cat([x, x[:1, :1]])
torch.cat([])
torch.cat([x, "text"])
torch.stack([x, x[0]])
x.expand(7)
x.permute(0)
x.transpose(0, 5)
x.squeeze(4)
x.unsqueeze(9)
x.unsqueeze_(9)
x.transpose_(0, 9)
x.unfold(0, 9, 1)
x.select(0, 9)
x.narrow(0, 1, 9)
x.gather(0, x)
x.scatter(0, x, 1.0)
x.masked_fill(x, 0)
torch.where(x, x, x)
torch.einsum("ij,ij->k", x, x)
torch.einsum("ij,jk->ik", x, x)
torch.linalg.inv(x)
torch.linalg.cholesky(x)
torch.linalg.solve(x, x)
x.long().softmax(0)
x.long().mean()
x.long().sqrt_()
x.long().div_(2)
x.long().add_(1.5)
x.bool() - x.bool()
-x.bool()
x.to(torch.float8_e4m3fn) + 1
F.linear(x, x[:, :2])
F.conv2d(x, x)
F.conv2d(x[None, None], x[None, None], stride=0)
F.max_pool2d(x[None, None], 9)
F.nll_loss(x, x)
F.cross_entropy(x, x[0].long())
F.embedding(x, x)
F.layer_norm(x, (7,))
F.group_norm(x, 2)
F.one_hot(x)
F.interpolate(x, size=3)
F.pad(x, (1,))
F.dropout(x, 2.0)
torch.add(x.long(), x.long(), alpha=1.5)
torch.clamp(x)
x.topk(9)
x.kthvalue(9)
x.cumsum(dim=3)
x.quantile(2.0)
x.chunk(0)
x.split(-1)
x.split([1, 5])
x.flip(5)
x.rot90(1, (0, 0))
x.fill_(x)
x.type("nonsense")
x.to("nonsense")
x.add()
x.add(1, 2, 3, 4)
x.add("text")
x.sum(dimension=1)
x + "text"
x + None
x @ 3
3 @ x
x ** "a"
x.index_add(0, x, x)
x.sum().backward()
x.backward()
x.clone().requires_grad_().add_(1)
x.long().requires_grad_()
torch.polar(x, x.long())
torch.view_as_complex(x)
torch.view_as_real(x)
torch.fft.fft(x, n=0)
torch.bmm(x, x)
torch.addmm(x, x, x)
torch.outer(x, x)
torch.dot(x, x)
torch.tensordot(x, x, dims=3)
torch.normal(x, -1.0)
torch.add(x, x, out=x.long())
torch.vstack([x, x[:, :1]])
torch.broadcast_to(x, (1,))
torch.combinations(x)
torch.triu(x[0])
torch.diag(x[None])
torch.autograd.grad(x.sum(), x)
x.nonsense()
x == x[:, :2]
x != x[:, :2]
x < x[:, :2]
2 ** x[:, :2] ** x
"""

COMPARISONS: dict[str, Callable[[Any], Any]] = {
    "p == 1": lambda x: x == 1,
    "1 == p": lambda x: 1 == x,  # noqa: SIM300  # the point
    "p != 1": lambda x: x != 1,
    "p == 2.5": lambda x: x == 2.5,
    "p == True": lambda x: x == True,  # noqa: E712  # the point
    "p == 0-dim": lambda x: x == torch.tensor(3),
    "0-dim == p": lambda x: torch.tensor(3) == x,
    "p == p": lambda x: x == x,  # noqa: PLR0124  # the point
    "p == row": lambda x: x == x[:1],
    "p < 3": lambda x: x < 3,
    "3 <= p": lambda x: 3 <= x,  # noqa: SIM300  # the point
    "1 + p": lambda x: 1 + x,
    "1 - p": lambda x: 1 - x,
    "2 / p": lambda x: 2 / x,
    "2 // p": lambda x: 2 // x,
    "2 % p": lambda x: 2 % x,
    "2 ** p": lambda x: 2**x,
    "p @ p": lambda x: x @ x,
    "p == text": lambda x: x == "text",
    "p == None": lambda x: x == None,  # noqa: E711  # the point
    "p == list": lambda x: x == [],
}


def kinds(kind: type[Exception]) -> Iterator[type[Exception]]:
    """Yield a class and everything below it."""
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


class TestL9ErrorsHappenWhereYouMadeThem(Law):
    """L9: an error is raised on the line that caused it, or by whatever looks at the result."""

    @pytest.mark.filterwarnings("ignore")  # what torch says to odd calls
    @pytest.mark.parametrize("line", WRONG.strip().splitlines())
    def test_what_torch_refuses_is_refused_at_once_in_its_words(self, network: Network, line: str) -> None:
        def call(x: Any) -> Exception:
            known = {"torch": torch, "F": torch.nn.functional, "x": x}
            return raised(lambda: eval(line, known))  # noqa: S307  # from the table above

        here = call(torch.arange(6.0).view(2, 3))
        for chain in ("b", "ab"):
            p = network.send(torch.arange(6.0).view(2, 3), chain)
            there = call(p)
            assert type(there) is type(here)
            assert str(there).replace("PointerTensor", "Tensor") == str(here)
            assert torch.equal(home(p), torch.arange(6.0).view(2, 3))

    @pytest.mark.parametrize("chain", ["b", "ab", "cab"])
    def test_an_error_of_the_worker_is_the_first_of_all_that_follows(self, network: Network, chain: str) -> None:
        names = as_user(
            "# Values, not shapes: only the worker can see that they are wrong.\n"
            "bad = p[i]\n"
            "worse = bad + 1\n"
            "worst = torch.stack([worse, bad])[0] @ p\n"
            "values, indices = worst.topk(2)\n",
            torch=torch,
            p=network.send(torch.ones(2, 2), chain),
            i=network.send(torch.tensor([7]), chain),
        )
        end = network[chain[-1]][0].id
        for name in ("indices", "worst", "bad", "worse", "values", "bad"):
            error = raised(lambda name=name: look(names[name]))  # type: ignore[misc]
            assert isinstance(error, RemoteExecutionError), repr(error)
            assert (error.worker, error.line) == (end, "user.py:2") and error.operation.startswith("aten::index.")
            assert error.error == "IndexError" and "index 7 is out of bounds" in error.text
            for part in (end, "user.py:2", "aten::index.", "IndexError", "index 7 is out of bounds"):
                assert part in str(error)
        assert torch.equal(look(names["p"]), torch.ones(2, 2))
        names.clear()
        del error
        assert network.sizes() == [0, 0, 0]

    def test_whatever_touches_it_raises(self, network: Network) -> None:
        touches: list[Callable[[Any], Any]] = [
            lambda bad: bad.get(),
            lambda bad: bad.get(keep=True),
            lambda bad: home(bad.send(network.alice)),
            lambda bad: home(bad.move(network.alice)),
            lambda bad: home(bad.remote_send(network.alice)),
            lambda bad: home(bad.t()),
            lambda bad: home(bad[0]),
            lambda bad: home(bad.sum() * 0),
            lambda bad: home(torch.nonzero(bad)),
            lambda bad: home(bad.add_(1)),
            lambda bad: home(torch.zeros_like(bad)),
        ]
        for touch in touches:
            bad = self._bad(network)
            error = raised(lambda: touch(bad))  # noqa: B023  # called at once
            assert isinstance(error, RemoteExecutionError) and "out of bounds" in str(error), repr(error)

    def _bad(self, network: Network) -> Any:
        p, i = network.send(torch.ones(2, 2), "b"), network.send(torch.tensor([7, 7]), "b")
        return p[i]

    @pytest.mark.parametrize("chain", ["b", "ab"])
    def test_an_error_in_place_is_raised_once_and_leaves_the_value(self, network: Network, chain: str) -> None:
        p = network.send(numbers(), chain)
        names = as_user("\np.index_fill_(0, i, 0.0)\n", p=p, i=(p * 9).long())
        error = raised(network.bob.synchronize)
        assert isinstance(error, FarpointError) and "user.py:2" in str(error) and "out of" in str(error)
        network.bob.synchronize()
        assert torch.equal(home(p), numbers())
        names.clear()

    def test_poison_does_not_spread_into_what_was_there(self, network: Network) -> None:
        kept, bad = network.send(torch.ones(2, 2), "b"), self._bad(network)
        kept.add_(bad)
        kept.copy_(bad)
        torch.add(bad, 1, out=kept)
        assert "out of bounds" in str(raised(network.bob.synchronize))
        assert torch.equal(kept.get(), torch.ones(2, 2))

    def test_the_others_work_on(self, network: Network) -> None:
        bad, p = self._bad(network), network.send(numbers(), "b")
        assert torch.equal((p + 1).get(), numbers() + 1) and torch.equal(p.get(), numbers())
        assert "out of bounds" in str(raised(bad.get))

    def test_no_error_of_ours_is_a_type_error(self) -> None:
        plugins.transports()
        ours = list(kinds(FarpointError))
        assert len(ours) > 20
        assert [kind for kind in ours if issubclass(kind, TypeError)] == []

    @pytest.mark.parametrize("chain", ["b", "ab"])
    @pytest.mark.parametrize("comparison", COMPARISONS)
    def test_comparisons_and_numbers_first(self, network: Network, comparison: str, chain: str) -> None:
        here, there = (COMPARISONS[comparison](x) for x in (numbers(), network.send(numbers(), chain)))
        if isinstance(here, torch.Tensor):
            assert isinstance(there, PointerTensor) and torch.equal(home(there), here)
        else:
            assert type(there) is bool and there is here

    def test_comparison_is_never_quietly_false(self, network: Network) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "a")
        calls: list[Callable[[], Any]] = [
            lambda: p == q,
            lambda: p != q,
            lambda: p == numbers(),
            lambda: numbers() == p,
            lambda: p @ q,
            lambda: p + q,
            lambda: q in [p, p],
        ]
        for call in calls:
            assert isinstance(raised(call), NotColocatedError)

    def test_an_unknown_worker_is_named_with_those_that_exist(self, network: Network) -> None:
        x: Any = numbers()
        p = network.send(x, "b")
        for call in (lambda: x.send("nobody"), lambda: p.send("nobody"), lambda: p.move("nobody"), lambda: p.remote_send("nobody")):
            error = raised(call)
            assert isinstance(error, WorkerNotFoundError) and isinstance(error, LookupError) and "'nobody'" in str(error)
            assert network.bob.id in str(error) and network.charlie.id in str(error)
