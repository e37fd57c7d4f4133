"""L12: torch on the other side is torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farpoint import PointerTensor
from farpoint.testing.laws.network import Law, Network, home, look, numbers, raised
from farpoint.testing.transport import eventually

F: Any = torch.nn.functional
CHAINS = pytest.mark.parametrize("chain", ["b", "ab"])

VIEWS: dict[str, Callable[[Any], Any]] = {
    "row": lambda x: x[1],
    "column": lambda x: x[:, 2],
    "element": lambda x: x[1, 2],
    "slice": lambda x: x[1:, ::2],
    "t": lambda x: x.t(),
    "permute": lambda x: x.permute(1, 0),
    "view": lambda x: x.view(2, 6),
    "flatten": lambda x: x.flatten(),
    "unsqueeze": lambda x: x[:, None],
    "expand": lambda x: x[:1].expand(1, 4),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1), 1),
    "view of a view": lambda x: x.t()[1:].t()[0],
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "real": lambda x: torch.view_as_complex(x.view(3, 2, 2)).real,
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "unbind": lambda x: x.unbind()[2],
    "split": lambda x: x.split([1, 2])[1],
    "contiguous": lambda x: x.contiguous(),
    "to the same dtype": lambda x: x.to(torch.float32),
    "reshape": lambda x: x.reshape(12),
    "dtype": lambda x: x.view(torch.int32),
}

IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "add_": lambda x: x.add_(2),
    "mul_ by itself": lambda x: x.mul_(x),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(3),
    "clamp_": lambda x: x.clamp_(2, 7),
    "copy_": lambda x: x.copy_(x.flip(0)),
    "cumsum_": lambda x: x.cumsum_(1),
    "index_fill_": lambda x: x.index_fill_(0, (x[:1, 0] * 0).long(), 9.0),
    "masked_fill_": lambda x: x.masked_fill_(x > 4, 0.0),
    "scatter_": lambda x: x.scatter_(1, (x * 0).long(), 5.0),
    "relu_": lambda x: x.sub_(5).relu_(),
    "neg_": lambda x: x.neg_(),
    "triu_": lambda x: x.triu_(),
    "tanh_": lambda x: x.tanh_(),
    "addmm_": lambda x: x.addmm_(x, x.t() @ x),
    "lerp_": lambda x: x.lerp_(x + 1, 0.5),
    "logical_not_": lambda x: x.logical_not_(),
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(1),
    "squeeze_": lambda x: x.unsqueeze_(0).squeeze_(0),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "as_strided_": lambda x: x.as_strided_((2, 2), (1, 4), 1),
    "detach_": lambda x: x.detach_(),
    "requires_grad_": lambda x: x.requires_grad_(),
}

WRITES: dict[str, Callable[[Any], None]] = {
    "element": lambda x: x.__setitem__((1, 2), 7),
    "row": lambda x: x.__setitem__(1, 7),
    "column": lambda x: x.__setitem__((slice(None), 1), x[:, 0]),
    "mask": lambda x: x.__setitem__(x > 4, 0),
    "indices": lambda x: x.__setitem__((x[0] * 0).long(), 7),
    "ellipsis": lambda x: x.__setitem__(..., 7),
    "0-dim": lambda x: x.__setitem__(0, x[2, 3]),
    "local 0-dim": lambda x: x.__setitem__(0, torch.tensor(9.0)),
    "broadcast": lambda x: x.__setitem__(slice(0, 2), x[2]),
    "augmented row": lambda x: x[1].__iadd__(5),
    "data": lambda x: x.data.__setitem__(0, 7),
}

MANY: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(descending=True),
    "max": lambda x: x.max(dim=1),
    "split": lambda x: x.split([1, 3], dim=1),
    "unbind": lambda x: x.unbind(),
    "chunk": lambda x: x.chunk(3),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "svd": lambda x: torch.linalg.svd(x),
    "qr": lambda x: torch.linalg.qr(x),
    "var_mean": lambda x: torch.var_mean(x, dim=0),
    "aminmax": lambda x: x.aminmax(),
    "frexp": lambda x: x.frexp(),
    "nonzero": lambda x: x.nonzero(as_tuple=True),
    "unique": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "histogram": lambda x: x.histogram(4),
    "max_pool": lambda x: F.max_pool2d(x[None], 2, return_indices=True),
}

SAME: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x.contiguous(),
    "to the same dtype": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "to the same device": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "type_as itself": lambda x: x.type_as(x),
    "expand_as itself": lambda x: x.expand_as(x),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
    "Dropout in eval mode": lambda x: torch.nn.Dropout().eval()(x),
    "Identity": lambda x: torch.nn.Identity()(x),
    "requires_grad_": lambda x: x.requires_grad_(False),
    "resolve_conj": lambda x: x.resolve_conj(),
    "resolve_neg": lambda x: x.resolve_neg(),
    "positive": lambda x: +x,
    "real": lambda x: x.real,
    "view": lambda x: x.view(3, 4),
    "reshape": lambda x: x.reshape(3, 4),
    "squeeze": lambda x: x.squeeze(),
    "as_tensor": torch.as_tensor,
    "to_dense": lambda x: x.to_dense(),
    "repeat_interleave": lambda x: x.repeat_interleave(1, dim=0),
    "atleast_1d": torch.atleast_1d,
    "ravel": lambda x: x.view(12).ravel().view(3, 4),
}


def matrix() -> Any:
    """Return a tensor of 3 x 4."""
    return torch.arange(12.0).view(3, 4).clone()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two tensors are the same to the bit, not-a-numbers included."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class TestL12TorchIsTorch(Law):
    """L12: in-place operations and views alias on the worker as they do here, on every store."""

    @CHAINS
    @pytest.mark.parametrize("view", VIEWS)
    def test_views_alias(self, network: Network, view: str, chain: str) -> None:
        x = matrix()
        p = network.send(x, chain)
        a, b = VIEWS[view](x), VIEWS[view](p)
        assert b.shape == a.shape and b.stride() == a.stride() and b.dtype is a.dtype
        assert b.storage_offset() == a.storage_offset() and b.is_contiguous() == a.is_contiguous()
        for t, v in ((x, a), (p, b)):
            v.add_(1)
            t.mul_(2)
            v.sub_(3)
        same(look(p), x)
        same(look(b), a)
        del p, t, v
        b.add_(1)
        same(look(b), a.add_(1))
        del b
        assert network.sizes() == [0, 0, 0]

    @CHAINS
    @pytest.mark.parametrize("operation", IN_PLACE)
    def test_in_place_operations(self, network: Network, operation: str, chain: str) -> None:
        x = matrix()
        p = network.send(x, chain)
        row, there = x[1], p[1]
        before = network.sizes()
        a, b = IN_PLACE[operation](x), IN_PLACE[operation](p)
        assert a is x and b is p
        assert p.shape == x.shape and p.stride() == x.stride() and p.requires_grad is x.requires_grad
        assert network.sizes() == before
        same(look(p), x)
        same(look(there), row)
        with torch.no_grad():
            same(home(p + 1), x + 1)
            x.mul_(2)
            p.mul_(2)
        same(home(there), row)
        same(home(p), x)

    @CHAINS
    @pytest.mark.parametrize("write", WRITES)
    def test_writes(self, network: Network, write: str, chain: str) -> None:
        x = matrix()
        p = network.send(x, chain)
        before = network.sizes()
        WRITES[write](x)
        WRITES[write](p)
        assert network.sizes() == before
        assert torch.equal(home(p), x)

    @CHAINS
    def test_augmented_assignment(self, network: Network, chain: str) -> None:
        x = matrix()
        p = network.send(x, chain)
        before = p, x
        for t in (x, p):
            t += 1
            t -= t[0].clone()
            t *= 3
            t /= 2
            t //= 1
            t %= 5
            t **= 2
            t[0] += 1
            t[1:, 1] -= t[0, 0]
        del t
        assert before[0] is p and before[1] is x
        assert torch.equal(home(p), x)

    @CHAINS
    @pytest.mark.parametrize("call", MANY)
    def test_n_outputs_are_n_pointers(self, network: Network, call: str, chain: str) -> None:
        x = torch.tensor([[3.0, 1, 2, 9], [8, 7, 0, 5], [4, 6, 11, 10]])
        p = network.send(x, chain)
        here, there = MANY[call](x), MANY[call](p)
        assert type(there) is type(here) and len(there) == len(here)
        if call not in {"meshgrid", "nonzero"}:  # views of an intermediate result, which torch keeps for them
            eventually(lambda: sum(network.sizes()) == len(chain) * (1 + len(here)))
        for one, other in zip(there, here, strict=True):
            assert type(one) is PointerTensor and one.shape == other.shape and one.dtype is other.dtype
            torch.testing.assert_close(home(one), other)

    def test_names_of_outputs(self, network: Network) -> None:
        found: Any = network.send(numbers(), "b").topk(2)
        assert torch.equal(found.values.get(), torch.tensor([5.0, 4.0])) and torch.equal(found.indices.get(), torch.tensor([4, 3]))

    @CHAINS
    def test_out(self, network: Network, chain: str) -> None:
        p, q = network.send(numbers(), chain), network.send(torch.zeros(5), chain)
        view = q[1:3]
        before = network.sizes()
        assert torch.add(p, 1, out=q) is q
        assert torch.mul(q, p, out=q) is q
        expected = (numbers() + 1) * numbers()
        assert torch.equal(look(q), expected) and torch.equal(look(view), expected[1:3])
        assert torch.cat([p[:2], p[2:]], out=q) is q
        assert torch.equal(look(q), numbers()) and torch.equal(look(view), numbers()[1:3])
        assert torch.add(p[:2], 1, out=view) is view
        expected = numbers()
        expected[1:3] = numbers()[:2] + 1
        assert torch.equal(look(q), expected)
        assert network.sizes() == before

    def test_several_outs(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        values, indices = p.new_zeros(2), p.new_zeros(2, dtype=torch.int64)
        found = torch.topk(p, 2, out=(values, indices))
        assert found[0] is values and found[1] is indices
        assert torch.equal(home(values), torch.tensor([5.0, 4.0])) and torch.equal(home(indices), torch.tensor([4, 3]))

    @CHAINS
    @pytest.mark.parametrize("call", SAME)
    def test_what_returns_its_argument_leaves_it_valid(self, network: Network, call: str, chain: str) -> None:
        x = matrix()
        p = network.send(x, chain)
        a, b = SAME[call](x), SAME[call](p)
        assert (b is p) is (a is x)
        a.add_(1)
        b.add_(1)
        same(look(p), x)
        same(home(p + 1), x + 1)
        del b
        same(home(p), x)

    @CHAINS
    def test_metadata_in_place_is_seen_by_what_follows(self, network: Network, chain: str) -> None:
        x = torch.zeros(2, 3)
        p = network.send(x, chain)
        for t in (x, p):
            t.t_()
            t[2, 1] = 7
            t.unsqueeze_(0)
            t[0].add_(torch.tensor(1.0))
            t.squeeze_()
            t.transpose_(0, 1).mul_(2)
            t.unsqueeze_(-1).unsqueeze_(0)
        assert p.shape == x.shape == (1, 2, 3, 1) and p.stride() == x.stride() and p.ndim == 4 and len(p) == 1
        assert torch.equal(home(p + 1), x + 1) and torch.equal(home(p.sum(dim=2)), x.sum(dim=2))
        del t
        assert torch.equal(home(p), x)

    @pytest.mark.parametrize("call", ["resize_", "resize_as_", "set_"])
    def test_what_is_not_done_in_place_is_refused(self, network: Network, call: str) -> None:
        """Another worker's memory is not resized; either it works as here, or nothing has happened."""
        p = network.send(numbers(), "b")
        arguments = {"resize_": (3,), "resize_as_": (p[:3],), "set_": (p[:3],)}[call]
        try:
            getattr(p, call)(*arguments)
        except RuntimeError as error:
            raise AssertionError("refused, but not as a refusal") from error
        except PermissionError:
            assert p.shape == (5,) and torch.equal(p.get(), numbers())
        else:
            assert p.shape == (3,) and torch.equal(p.get(), numbers()[:3])

    def test_layouts_survive(self, network: Network) -> None:
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        p = network.send(torch.randn(2, 3, 4, 5), "b").to(memory_format=torch.channels_last)
        assert p.stride() == x.stride() and p.is_contiguous(memory_format=torch.channels_last)
        assert (p + 1).stride() == (x + 1).stride() and p.get().stride() == x.stride()

    def test_conj_and_neg_bits_survive(self, network: Network) -> None:
        z = torch.tensor([1 + 2j, 3 - 4j])
        p = network.send(z, "b")
        calls: list[Callable[[Any], Any]] = [
            lambda t: t.conj(),
            lambda t: t.conj().imag,
            lambda t: torch.view_as_real(t.conj().resolve_conj()),
            lambda t: torch.fft.hfft(t.conj()),
            lambda t: t.conj() * t,
            lambda t: t.conj().t().conj() + 1,
            lambda t: t.conj().imag.neg().add_(1),
        ]
        for call in calls:
            here, there = call(z), call(p)
            assert there.is_conj() == here.is_conj() and there.is_neg() == here.is_neg()
            assert torch.equal(there.get(), here.clone())

    def test_chance_is_the_workers(self, network: Network) -> None:
        """Random numbers are drawn there, each time anew, and of the right kind."""
        p = network.send(torch.zeros(1000), "b")
        one, other = (home(torch.rand_like(p)) for _ in range(2))
        assert not torch.equal(one, other) and float(one.min()) >= 0
        assert set(home(F.dropout(p + 1, 0.5)).tolist()) == {0.0, 2.0}
        assert torch.equal(p.normal_().sign().abs().get(), torch.ones(1000))

    def test_a_module_over_there(self, network: Network) -> None:
        """A small network gives what it gives here, with every parameter a pointer."""
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        x = torch.randn(3, 4)
        for chain in ("b", "ab"):
            there = {name: network.send(value.detach(), chain) for name, value in model.named_parameters()}
            found = torch.func.functional_call(model, there, (network.send(x, chain),))
            torch.testing.assert_close(home(found), model(x).detach())

    def test_errors_of_aliasing_are_torchs(self, network: Network) -> None:
        x, p = numbers(), network.send(numbers(), "b")
        for call in (lambda t: t[:1].expand(5).add_(t), lambda t: torch.add(t, t, out=t[:1].expand(5))):
            here, there = raised(lambda call=call: call(x)), raised(lambda call=call: look(call(p)))  # type: ignore[misc]
            assert str(here)[:60] in str(there)
        assert torch.equal(p.get(), numbers())
