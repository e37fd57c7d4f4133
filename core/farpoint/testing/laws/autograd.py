"""L13: autograd is torch's, also where a graph crosses workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.testing.laws.network import Law, Network, home, look, raised

F: Any = torch.nn.functional
CHAINS = pytest.mark.parametrize("chain", ["b", "ab"])


def weights() -> Any:
    """Return a leaf that requires a gradient."""
    return (torch.tensor([[3.0, 1, 2, 9], [8, 7, 0.5, 5], [4, 6, 11, 10]]) / 5).requires_grad_()


LOSSES: dict[str, Callable[[Any], Any]] = {
    "square": lambda x: (x * x).sum(),
    "matmul": lambda x: (x @ x.t()).pow(2).sum(),
    "softmax": lambda x: F.log_softmax(x, 1)[0].sum(),
    "cross entropy": lambda x: F.cross_entropy(x, (x.detach() * 0).long()[:, 0]),
    "slices": lambda x: x[0, 1:].sum().exp() + x[1:, ::2].pow(2).sum(),
    "mask": lambda x: x[x.detach() > 1].pow(2).sum(),
    "in place": lambda x: (x * 2).add_(1).mul_(x).sum(),
    "a view in place": lambda x: _after(x * 1, lambda y: y[0].mul_(5)).pow(2).sum(),
    "written": lambda x: _after(x * 2, lambda y: y.__setitem__((slice(None), 0), 7.0)).pow(2).sum(),
    "cat": lambda x: torch.cat([x, x * 2]).pow(2).sum(),
    "where": lambda x: torch.where(x.detach() > 1, x, x * x).sum(),
    "conv": lambda x: F.conv2d(x[None, None], x[None, None, :2, :2]).sum(),
    "norms": lambda x: F.layer_norm(x, (4,)).pow(3).sum() + x.norm(),
    "max": lambda x: x.max(dim=1).values.pow(2).sum(),
    "topk": lambda x: x.topk(2).values.pow(2).sum(),
    "cumsum": lambda x: x.cumsum(0).pow(2).sum(),
    "expand": lambda x: (x[:1].expand(4, -1) * 2).sum(),
    "std": lambda x: x.std(),
    "fft": lambda x: torch.fft.fft(x).abs().sum(),
    "complex": lambda x: torch.complex(x, x * 2).conj().abs().sum(),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x).sum(),
    "gelu": lambda x: F.gelu(x).sum(),
    "embedding": lambda x: F.embedding((x.detach() * 0).long()[0], x).sum(),
    "dropout": lambda x: F.dropout(x, 0.0).sum(),
    "inverse": lambda x: torch.linalg.inv(x @ x.t() + x.new_ones(3).diag()).sum(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]).sum(),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(lambda a: a.sin().sum(), x, use_reentrant=False),
    "0-dim local": lambda x: (x * torch.tensor(2.5)).sum() / 3,
    "autograd.Function": lambda x: _square(x).sum(),
}


def _after(x: Any, change: Callable[[Any], object]) -> Any:
    change(x)
    return x


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * 2 * x


_square: Any = _Square.apply


class TestL13Autograd(Law):
    """L13: backward, `.grad`, hooks and `torch.func` work on pointers: the tape is the client's own."""

    @CHAINS
    @pytest.mark.parametrize("loss", LOSSES)
    def test_backward(self, network: Network, loss: str, chain: str) -> None:
        x = weights()
        LOSSES[loss](x).backward()
        p = network.send(weights(), chain)
        assert p.grad is None
        LOSSES[loss](p).backward()
        assert isinstance(p.grad, PointerTensor) and p.grad.shape == p.shape and p.grad.location is p.location
        torch.testing.assert_close(look(p.grad), x.grad)
        torch.testing.assert_close(look(p).detach(), x.detach(), rtol=0, atol=0)
        once = [chain.count(letter) for letter in "bac"]
        assert network.sizes() == [2 * n for n in once]
        p.grad = None
        assert network.sizes() == once

    @CHAINS
    def test_gradients_add_up_until_they_are_cleared(self, network: Network, chain: str) -> None:
        p = network.send(weights(), chain)
        (p * p).sum().backward()
        (p * p).sum().backward()
        torch.testing.assert_close(look(p.grad), 4 * weights().detach())
        p.grad.zero_()
        assert torch.equal(look(p.grad), torch.zeros(3, 4))
        p.grad = p.detach() * 3
        torch.testing.assert_close(look(p.grad), 3 * weights().detach())

    @CHAINS
    def test_autograd_grad_and_double_backward(self, network: Network, chain: str) -> None:
        p, x = network.send(weights(), chain), weights()
        (first,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
        (second,) = torch.autograd.grad((first * first).sum(), p)
        torch.testing.assert_close(home(first.detach()), 3 * x.detach() ** 2)
        torch.testing.assert_close(home(second), 36 * x.detach() ** 3)
        assert p.grad is None

    def test_a_gradient_may_be_given(self, network: Network) -> None:
        p = network.send(weights(), "b")
        (p * 2).backward(p.detach())
        torch.testing.assert_close(p.grad.get(), 2 * weights().detach())

    def test_hooks(self, network: Network) -> None:
        p = network.send(weights(), "b")
        seen: list[Any] = []
        y = p * p
        y.retain_grad()

        def double(grad: Any) -> Any:
            seen.append(type(grad))
            return grad * 2

        p.register_hook(double)
        p.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf is p))
        y.sum().backward()
        assert seen == [PointerTensor, True]
        torch.testing.assert_close(p.grad.get(), 4 * weights().detach())
        assert torch.equal(y.grad.get(), torch.ones(3, 4))

    def test_torch_func(self, network: Network) -> None:
        x = torch.tensor([1.0, 2, 3])
        p = network.send(x, "b")
        calls: list[Callable[[Any], Any]] = [
            torch.func.grad(lambda a: (a**3).sum()),
            torch.func.jacrev(lambda a: a**2),
            torch.func.vmap(torch.func.grad(lambda a: a**3)),
            torch.func.vmap(torch.func.grad(torch.func.grad(lambda a: a**4))),
            lambda a: torch.func.vjp(lambda b: b**3, a)[1](a)[0],
            lambda a: torch.func.grad_and_value(lambda b: (b * b).sum())(a)[1],
        ]
        for call in calls:
            torch.testing.assert_close(call(p).get(), call(x))

    def test_what_is_recorded(self, network: Network) -> None:
        p = network.send(weights(), "b")
        y = p * 2
        assert y.requires_grad and not y.is_leaf and y.grad_fn is not None and not y.detach().requires_grad
        with torch.no_grad():
            assert not (p * 2).requires_grad
        with torch.inference_mode():
            assert torch.equal((p * 2).get(), weights().detach() * 2)
        assert not network.send(weights().detach(), "b").requires_grad

    def test_mistakes_are_torchs(self, network: Network) -> None:
        calls: list[Callable[[Any], Any]] = [
            lambda x: x.add_(1),
            lambda x: _twice((x * x).sum()),
            lambda x: (x * x).backward(),
            lambda x: x.detach().sum().backward(),
            _changed_in_between,
        ]
        for call in calls:
            here = raised(lambda call=call: call(weights()))  # type: ignore[misc]
            there = raised(lambda call=call: call(network.send(weights(), "b")))  # type: ignore[misc]
            assert type(there) is type(here) and str(there)[:80] == str(here)[:80]

    def test_a_graph_holds_what_it_saved_and_no_longer(self, network: Network) -> None:
        p = network.send(weights(), "b")
        loss = (p * p).sin().sum()
        assert network.sizes()[0] > 2
        loss.backward()
        del loss
        assert network.sizes() == [2, 0, 0]
        loss = (p * p).sin().sum()
        del loss
        assert network.sizes() == [2, 0, 0]
        del p
        assert network.sizes() == [0, 0, 0]

    @CHAINS
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
            lambda p: torch.optim.Adam([p], lr=0.1),
            lambda p: torch.optim.AdamW([p], lr=0.1, amsgrad=True),
            lambda p: torch.optim.RMSprop([p], lr=0.1),
        ],
        ids=["SGD", "Adam", "AdamW", "RMSprop"],
    )
    def test_optimizers(self, network: Network, make: Callable[[Any], Any], chain: str) -> None:
        x, p = weights(), network.send(weights(), chain)
        for parameter in (x, p):
            optimizer = make(parameter)
            for _ in range(4):
                optimizer.zero_grad()
                (parameter * parameter).sum().backward()
                optimizer.step()
        torch.testing.assert_close(look(p).detach(), x.detach())
        del optimizer, p, parameter
        assert network.sizes() == [0, 0, 0]


def _twice(loss: Any) -> None:
    loss.backward()
    loss.backward()


def _changed_in_between(x: Any) -> None:
    y = x * 1
    loss = (y * y).sum()
    y.add_(1)
    loss.backward()


class TestL13AcrossWorkers(Law):
    """L13: what changes hands stays in its graph."""

    def test_a_graph_that_goes_around(self, network: Network) -> None:
        x, y = weights(), weights()
        (((y * 2).sin() * y).exp() + y).pow(2).sum().backward()
        p = x.send(network.bob, requires_grad=True)
        assert not p.is_leaf and p.requires_grad
        here = (((p * 2).move(network.alice).sin().move(network.bob) * p).get().exp() + x).send(network.charlie, requires_grad=True)
        here.pow(2).get().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        del p, here
        assert network.sizes() == [0, 0, 0]

    @CHAINS
    def test_get(self, network: Network, chain: str) -> None:
        p = network.send(weights(), chain)
        there = p * 3
        for _ in chain:
            there = there.get()
        assert there.requires_grad and not there.is_leaf
        (there * there).sum().backward()
        torch.testing.assert_close(look(p.grad), 18 * weights().detach())

    def test_a_copy_of_a_leaf(self, network: Network) -> None:
        p = network.send(weights(), "b")
        here: Any = p.get(keep=True)
        (here * here).sum().backward()
        torch.testing.assert_close(look(p.grad), 2 * weights().detach())
        leaf = p.get()
        assert leaf.is_leaf and leaf.requires_grad and torch.equal(leaf.grad, 2 * weights().detach())

    def test_double_backward(self, network: Network) -> None:
        x = weights()
        p = x.send(network.bob, requires_grad=True)
        y: Any = (p**2).move(network.alice) * 2
        (first,) = torch.autograd.grad(y.get().pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        torch.testing.assert_close(first.detach(), 16 * x.detach() ** 3)
        torch.testing.assert_close(second, 6 * 256 * x.detach() ** 5)

    @pytest.mark.parametrize(
        ("chain", "call"),
        [
            ("ab", lambda net, p: p.move(net.charlie)),
            ("ab", lambda net, p: p.move(net.alice)),
            ("ab", lambda net, p: p.remote_get()),
            ("ab", lambda net, p: p.remote_send(net.charlie)),
            ("b", lambda net, p: p.remote_send(net.alice)),
            ("b", lambda net, p: p.remote_get()),
            ("cab", lambda net, p: p.move("me")),
        ],
    )
    def test_every_way_and_back(self, network: Network, chain: str, call: Callable[[Network, Any], Any]) -> None:
        p = network.send(weights(), chain)
        sizes = network.sizes()
        y = call(network, p * p) * 3
        assert y.requires_grad and not y.is_leaf
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        torch.testing.assert_close(look(p.grad), 12 * weights().detach())
        del y
        assert network.sizes() == [2 * size for size in sizes]

    def test_a_gradient_that_others_have_too(self, network: Network) -> None:
        seen: list[Any] = []
        x = weights()
        p = x.send(network.bob, requires_grad=True)
        p.register_hook(seen.append)
        z: Any = p.move(network.alice)
        z.register_hook(seen.append)
        z.get().sum().backward()
        assert [len(grad._route.workers) for grad in seen] == [1, 1] and torch.equal(x.grad, torch.ones(3, 4))
        assert all(torch.equal(look(grad), torch.ones(3, 4)) for grad in seen)

    def test_what_is_sent_anew_is_a_leaf(self, network: Network) -> None:
        x = weights()
        for p in ((x * 2).send(network.bob), x.send(network.bob)):
            assert p.is_leaf and p.requires_grad
            (p * p).sum().backward()
            assert p.grad is not None and x.grad is None
        with torch.no_grad():
            assert x.send(network.bob, requires_grad=True).is_leaf
