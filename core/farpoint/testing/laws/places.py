"""L8 and L10: operands live together or not at all, and no value leaves by accident."""

from __future__ import annotations

import math
import operator
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from farpoint import PointerTensor
from farpoint.errors import NotColocatedError, ValueNotHereError
from farpoint.testing.laws.network import Law, Network, home, numbers, raised

F: Any = torch.nn.functional

POSITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "operator": lambda p, q: p + q,
    "operator, the other way": lambda p, q: q + p,
    "comparison": lambda p, q: p == q,
    "inequality": lambda p, q: p != q,
    "matmul": lambda p, q: p @ q,
    "augmented": lambda p, q: p.__iadd__(q),
    "method": lambda p, q: p.add(q),
    "method, the other way": lambda p, q: q.mul(p),
    "in place": lambda p, q: p.add_(q),
    "copy_": lambda p, q: p.copy_(q),
    "function": lambda p, q: torch.mul(p, q),
    "by name": lambda p, q: torch.add(p, other=q),
    "by name, the other way": lambda p, q: torch.add(other=p, input=q),
    "out": lambda p, q: torch.add(p, p, out=q),
    "outs": lambda p, q: torch.topk(p, 2, out=(q[:2], q[:2].long())),
    "list": lambda p, q: torch.cat([p, q]),
    "list, the other way": lambda p, q: torch.cat([q, p]),
    "end of a long list": lambda p, q: torch.stack([p] * 50 + [q]),
    "tuple": lambda p, q: torch.stack((p, q)),
    "list by name": lambda p, q: torch.cat(tensors=[p, q]),
    "two lists": lambda p, q: torch._foreach_mul([p, p], [p, q]),
    "in place in a list": lambda p, q: torch._foreach_add_([p, q], 1),
    "index": lambda p, q: p[q.long() - 1],
    "mask": lambda p, q: p[q > 2],
    "one of two indices": lambda p, q: p[None][p[:1].long() - 1, q[:1].long() - 1],
    "write": lambda p, q: p.__setitem__(slice(None), q),
    "write at": lambda p, q: p.__setitem__(q.long() - 1, 1),
    "write, 0-dim": lambda p, q: p.__setitem__(0, q.sum()) if isinstance(q, PointerTensor) else p.__setitem__(0, q),
    "condition": lambda p, q: torch.where(p > 2, q, q),
    "branch": lambda p, q: torch.where(p > 2, p, q),
    "third argument": lambda p, q: torch.addcmul(p, p, q),
    "bias": lambda p, q: F.linear(p, p[None], q[:1]),
    "weight": lambda p, q: F.linear(p, q[None]),
    "loss": lambda p, q: F.mse_loss(p, q),
    "einsum": lambda p, q: torch.einsum("i,i->", p, q),
    "grad": lambda p, q: setattr(p, "grad", q),
    "data": lambda p, q: setattr(p, "data", q),
    "backward": lambda p, q: (p.detach().requires_grad_() * 2).backward(q),
    "overload": lambda p, q: torch.ops.aten.add.Tensor(p, q),
    "to": lambda p, q: p.to(q),
    "clamp": lambda p, q: p.clamp(min=q),
    "autograd.Function": lambda p, q: _product(p, q),
}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Any, b: Any) -> Any:
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad


_product: Any = _Product.apply


class TestL8TogetherOrNotAtAll(Law):
    """L8: operands of one operation share one path and one data worker."""

    @pytest.mark.parametrize("position", POSITIONS)
    def test_another_worker(self, network: Network, position: str) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "a")
        self._refused(network, position, p, q, [network.bob.id, network.alice.id])

    @pytest.mark.parametrize("position", POSITIONS)
    def test_another_way_to_the_same_worker(self, network: Network, position: str) -> None:
        p = network.send(numbers(), "b")
        self._refused(network, position, p, p.send(network.alice), [network.alice.id, network.bob.id])
        self._refused(network, position, network.send(numbers(), "ab"), network.send(numbers(), "cb"), [network.charlie.id])

    @pytest.mark.parametrize("position", [position for position in POSITIONS if position != "copy_"])
    def test_a_local_tensor(self, network: Network, position: str) -> None:
        for chain in ("b", "ab"):
            p, x = network.send(numbers(), chain), numbers()
            self._refused(network, position, p, x, [network.bob.id, "local"])
            assert torch.equal(x, numbers()) and x.grad is None

    @pytest.mark.parametrize("chain", ["b", "ab", "cab"])
    def test_a_copy_of_a_local_tensor_is_sent(self, network: Network, chain: str) -> None:
        """`copy_` writes what lies on another device, in torch too: it is how `load_state_dict` fills a model there."""
        p, x = network.send(numbers(), chain), numbers() * 2
        before = network.sizes()
        assert p.copy_(x) is p
        assert network.sizes() == before
        assert torch.equal(home(p), x) and torch.equal(x, numbers() * 2)

    def _refused(self, network: Network, position: str, p: Any, q: Any, places: list[str]) -> None:
        before = network.sizes()
        error = raised(lambda: POSITIONS[position](p, q))
        assert isinstance(error, NotColocatedError), repr(error)
        assert isinstance(error, RuntimeError) and all(place in str(error) for place in places) and error.fix in str(error)
        del error
        assert network.sizes() == before
        for x in (p, q):
            kept = x
            while isinstance(kept, PointerTensor):
                kept = kept.get(keep=True)
            assert torch.equal(kept, numbers())

    def test_the_call_that_is_named_helps(self, network: Network) -> None:
        p, q, x = network.send(numbers(), "b"), network.send(numbers(), "a"), numbers()
        error = raised(lambda: p + q)
        assert isinstance(error, NotColocatedError) and f"q.move({network.bob.id})" in error.fix
        assert torch.equal((p + q.move(network.bob.id)).get(), numbers() * 2)
        error = raised(lambda: p + x)
        assert isinstance(error, NotColocatedError) and f"x.send({network.bob.id})" in error.fix
        assert torch.equal((p + x.send(network.bob.id)).get(), numbers() * 2)
        pp = network.send(numbers(), "ab")
        error = raised(lambda: pp + x)
        assert isinstance(error, NotColocatedError) and f"x.send({network.bob.id}).send({network.alice.id})" in error.fix
        assert torch.equal(home(pp + x.send(network.bob.id).send(network.alice.id)), numbers() * 2)
        error = raised(lambda: p + pp)
        assert isinstance(error, NotColocatedError) and "get() shortens the longer one" in error.fix
        assert torch.equal((p + pp.get()).get(), numbers() * 2)

    @pytest.mark.parametrize("chain", ["b", "ab", "cab"])
    def test_numbers_travel_along(self, network: Network, chain: str) -> None:
        x = numbers()
        p = network.send(x, chain)
        for number in (2, -3, 0.5, True, 1 + 2j, float("inf"), 2**62, np.float32(2.5), np.float64(0.1), np.int64(7), np.bool_(1)):
            for call in (operator.mul, operator.eq, lambda a, n: n + a):
                assert torch.equal(home(call(p, number)), call(x, number)), number
        assert torch.equal(home(torch.full_like(p, 3.5)), torch.full_like(x, 3.5))
        assert torch.equal(home(p.clamp(2, 4).add(1, alpha=2)), x.clamp(2, 4).add(1, alpha=2))

    @pytest.mark.parametrize("chain", ["b", "ab", "cab"])
    def test_0_dim_local_tensors_travel_along(self, network: Network, chain: str) -> None:
        x = numbers()
        p = network.send(x, chain)
        for y in (
            torch.tensor(2.0),
            torch.tensor(2),
            torch.tensor(True),
            torch.tensor(2.0, dtype=torch.float64),
            torch.tensor(2.0, dtype=torch.bfloat16),
            torch.tensor(1 + 2j),
            torch.arange(3.0)[1],
            torch.ones(3).sum(),
        ):
            assert home(p * y).dtype is (x * y).dtype
            assert torch.equal(home(p * y), x * y) and torch.equal(home(y + p), y + x)
        one = torch.tensor(1.0)
        assert torch.equal(home(torch.where(p > 2, p, one)), torch.where(x > 2, x, one))
        assert torch.equal(home(torch.stack([p[0], one, p[1]])), torch.tensor([1.0, 1.0, 2.0]))
        assert torch.equal(home(p[torch.tensor(2)]), x[2])
        later = p * one
        one.fill_(100)
        assert torch.equal(home(later), x)

    def test_a_0_dim_local_tensor_is_not_written_to(self, network: Network) -> None:
        p, x = network.send(numbers(), "b"), torch.tensor(0.0)
        calls: list[Callable[[], Any]] = [
            lambda: torch.sum(p, 0, out=x),
            lambda: x.copy_(p[0]),
            lambda: x.add_(p[0]),
            lambda: x.fill_(p[0]),
            lambda: torch._foreach_add_([x], [p[0]]),
        ]
        for call in calls:
            assert isinstance(raised(call), NotColocatedError) and x.item() == 0


def _if(p: Any) -> int:
    return 1 if p else 2


VALUES: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "if": _if,
    "not": operator.not_,
    "and": lambda p: p and 1,
    "any": lambda p: any([p, p]),
    "between": lambda p: 0 < p < 2,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "as a list's index": lambda p: [1, 2][p],
    "as a slice's end": lambda p: [1, 2][:p],
    "range": range,
    "hex": hex,
    "math": math.sqrt,
    "floor": math.floor,
    "item": lambda p: p.item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.numpy(),
    "numpy, force": lambda p: p.numpy(force=True),
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np.array of a list": lambda p: np.array([p, p]),
    "np.float64": np.float64,
    "np.add": lambda p: np.add(1, p),
    "np.isnan": np.isnan,
    "__array__": lambda p: p.__array__(),
    "__dlpack__": lambda p: p.__dlpack__(),
    "np.from_dlpack": np.from_dlpack,
    "f-string": lambda p: f"{p}",
    "f-string, precision": lambda p: f"{p:.2f}",
    "format": "{:>8}".format,
    "%d": lambda p: "%d" % p,  # noqa: UP031  # the point
    "%f": lambda p: "%f" % p,  # noqa: UP031  # the point
    "equal": lambda p: torch.equal(p, p),
    "equal, method": lambda p: p.equal(p),
    "equal, local": lambda p: torch.equal(torch.tensor(1), p),
    "allclose": lambda p: torch.allclose(p.float(), p.float()),
    "allclose, method": lambda p: p.float().allclose(p.float()),
    "is_nonzero": torch.is_nonzero,
    "is_nonzero, method": lambda p: p.is_nonzero(),
    "contains": lambda p: 3 in p[None],
    "max of two": lambda p: max(p, p + 1),
    "sorted": lambda p: sorted([p, p + 1]),
    "tensor of a list": lambda p: torch.tensor([p, p]),
    "size": torch.zeros,
    "fill value": lambda p: torch.full((2,), p),
    "arange": torch.arange,
    "slice of a pointer": lambda p: p[None][:p],
    "dim": lambda p: p[None].sum(dim=p - 1),
    "alpha": lambda p: p.add(1, alpha=p),
    "struct": lambda p: struct.pack("q", p),
    "pickle": pickle.dumps,
    "data_ptr": lambda p: p.data_ptr(),
    "storage": lambda p: p.untyped_storage(),
    "share_memory_": lambda p: p.share_memory_(),
}


class TestL10NothingLeavesByAccident(Law):
    """L10: what needs the value of a pointer raises, and names the fix."""

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy says that of torch's own tensors, too
    @pytest.mark.parametrize("way", VALUES)
    def test_values_stay(self, network: Network, way: str) -> None:
        for chain in ("b", "ab"):
            p = network.send(torch.tensor(1), chain)
            before = network.sizes()
            error = raised(lambda p=p: VALUES[way](p))  # type: ignore[misc]
            assert isinstance(error, ValueNotHereError), repr(error)
            assert isinstance(error, RuntimeError) and "p.get()" in str(error) and network.bob.id in str(error)
            assert "p.get(keep=True)" in str(error) and error.worker == network.bob.id
            del error
            assert network.sizes() == before
            assert torch.equal(home(p), torch.tensor(1))

    @pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.complex64, torch.bfloat16])
    def test_of_every_kind(self, network: Network, kind: torch.dtype) -> None:
        p = network.send(torch.ones((), dtype=kind), "b")
        for way in ("bool", "int", "float", "complex", "item", "tolist", "np.asarray", "f-string", "equal"):
            assert isinstance(raised(lambda way=way: VALUES[way](p)), ValueNotHereError)  # type: ignore[misc]

    def test_printing_shows_no_value(self, network: Network) -> None:
        p = network.send(torch.tensor([123456.0, 654321.0]), "b")
        for text in (repr(p), str(p), str([p]), f"{p!r}", f"{p!s}", "%s" % p, repr({"p": p})):  # noqa: UP031  # the point
            assert "PointerTensor" in text and "23456" not in text.replace(str(p.id_at_location), "").replace(str(p.id), "")
