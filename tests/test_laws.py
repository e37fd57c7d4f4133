"""The laws of the project, each a class, on every combination of transport, serializer and store."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import farpoint
from farpoint import PointerTensor, VirtualWorker
from farpoint.errors import (
    FarpointError,
    NotColocatedError,
    PointerSpentError,
    RemoteExecutionError,
    ValueNotHereError,
    WorkerNotFoundError,
)

farpoint.TorchHook(torch)
numbers = itertools.count()


class Net:
    """Three workers of one combination."""

    def __init__(self, serializer: str, store: str) -> None:
        n = next(numbers)
        self.bob, self.alice, self.charlie = (
            VirtualWorker(id=f"{name}{n}", serializer=serializer, store=store) for name in ("bob", "alice", "charlie")
        )

    @property
    def all(self) -> list[VirtualWorker]:
        return [self.bob, self.alice, self.charlie]

    def sizes(self) -> list[int]:
        gc.collect()
        return [len(worker._objects) for worker in self.all]

    def chain(self, x: Any, *workers: Any) -> Any:
        for worker in workers:
            x = x.send(worker)
        return x


@pytest.fixture(params=["msgpack", "torch"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    net = Net(request.param, "memory")
    yield net
    for worker in net.all:
        worker.close()


def data() -> Any:
    return torch.arange(1.0, 6.0)


class TestL1SendCopies:
    def test_later_changes_are_not_seen(self, net: Net) -> None:
        for n in (5, 1_000_000):
            x = torch.ones(n)
            p = net.chain(x, net.bob)
            x.add_(1)
            assert torch.equal(p.get(), torch.ones(n))

    def test_what_a_copy_is(self, net: Net) -> None:
        x = data().requires_grad_()
        x.grad = torch.ones(5)
        p = net.chain(x, net.bob)
        assert p.requires_grad and isinstance(p.grad, PointerTensor)
        back = p.get()
        assert back.requires_grad and torch.equal(back.grad, torch.ones(5)) and torch.equal(back, x)

    def test_a_pointer_is_copied_too(self, net: Net) -> None:
        p = net.chain(data(), net.bob)
        pp = p.send(net.alice)
        assert torch.equal(p.get(keep=True), data()) and torch.equal(pp.get().get(keep=True), data())
        del p, pp
        assert net.sizes() == [0, 0, 0]


class TestL2PointerIsTensor:
    def test_metadata_is_local(self, net: Net) -> None:
        p = net.chain(torch.ones(2, 3).t(), net.bob)
        assert isinstance(p, torch.Tensor) and p.shape == (3, 2) and p.dtype == torch.float32
        assert p.ndim == 2 and p.numel() == 6 and p.stride() == (2, 1) and p.is_leaf

    def test_nested_arguments_run_there(self, net: Net) -> None:
        x = data()
        p, q = net.chain(x, net.bob), net.chain(x + 1, net.bob)
        functions: list[Any] = [
            lambda a, b: torch.cat([a, b]),
            lambda a, b: torch.stack((a, b), dim=1),
            lambda a, b: torch.where(a > 2, a, b),
            lambda a, b: torch.einsum("i,j->ij", a, b),
            lambda a, b: a[1:3] * b[[0, 1]],
            lambda a, b: torch.addcmul(a, b, b, value=0.5),
            lambda a, b: a.masked_select(b > 3),
            lambda a, b: torch.nonzero(a > 2),
        ]
        for f in functions:
            assert torch.equal(f(p, q).get(), f(x, x + 1))


class TestL3References:
    def test_ten_thousand_rebindings_leave_one_object(self, net: Net) -> None:
        x = net.chain(torch.zeros(4), net.bob)
        for _ in range(10_000):
            x = x + 1
        assert net.sizes()[0] == 1
        assert torch.equal(x.get(keep=True), torch.full((4,), 10_000.0))
        del x
        assert net.sizes() == [0, 0, 0]

    def test_free_and_with(self, net: Net) -> None:
        with net.chain(data(), net.bob) as p:
            assert net.sizes()[0] == 1
        with pytest.raises(PointerSpentError):
            p + 1
        net.chain(data(), net.bob).free()
        assert net.sizes() == [0, 0, 0]

    def test_a_chain_is_given_up_hop_by_hop(self, net: Net) -> None:
        ppp = net.chain(data(), net.bob, net.alice, net.charlie)
        q = ppp.clone()
        assert net.sizes() == [2, 2, 2]
        del ppp, q
        assert net.sizes() == [0, 0, 0]


class TestL4GetConsumes:
    def test_a_spent_pointer_says_where(self, net: Net) -> None:
        p = net.chain(data(), net.bob)
        p.get()
        for use in (lambda: repr(p), lambda: p + 1, lambda: p.shape, lambda: p.get(), lambda: p.send(net.alice)):
            with pytest.raises(PointerSpentError, match=r"get\(\) at .*test_laws.py"):
                use()
        assert net.sizes() == [0, 0, 0]

    def test_only_one_hop_moves(self, net: Net) -> None:
        q = net.chain(data(), net.bob, net.alice, net.charlie).get()
        assert isinstance(q, PointerTensor) and q.location is net.alice
        assert net.sizes() == [1, 1, 0]


class TestL5OperationsFollowTheChain:
    @pytest.mark.parametrize("hops", [1, 2, 3])
    def test_one_object_a_worker(self, net: Net, hops: int) -> None:
        p = net.chain(data(), *net.all[:hops])
        before = net.sizes()
        y = p + p
        assert net.sizes() == [n + (i < hops) for i, n in enumerate(before)]
        for _ in range(hops):
            y = y.get()
        assert torch.equal(y, data() * 2)


class TestL6TheDataEnd:
    def home(self, p: Any) -> Any:
        while isinstance(p, PointerTensor):
            p = p.get()
        return p

    @pytest.mark.parametrize(
        ("chain", "call", "to", "sizes"),
        [
            ("b", "move", "a", [0, 1, 0]),
            ("b", "move", "b", [1, 0, 0]),
            ("b", "move", "me", [0, 0, 0]),
            ("ba", "move", "c", [0, 1, 1]),
            ("ba", "move", "b", [1, 1, 0]),
            ("ba", "move", "a", [0, 1, 0]),
            ("ba", "remote_get", "", [0, 1, 0]),
            ("ba", "move", "me", [0, 0, 0]),
            ("b", "remote_send", "a", [1, 1, 0]),
            ("ba", "remote_send", "c", [1, 1, 1]),
            ("ba", "remote_send", "a", [1, 2, 0]),
            ("ba", "get", "", [1, 0, 0]),
            ("bac", "move", "a", [0, 1, 1]),
            ("bac", "move", "c", [0, 1, 2]),
            ("bac", "move", "b", [1, 1, 1]),
            ("bac", "move", "me", [0, 0, 0]),
            ("bac", "remote_get", "", [0, 1, 1]),
            ("bac", "get", "", [1, 1, 0]),
        ],
    )
    def test_row(self, net: Net, chain: str, call: str, to: str, sizes: list[int]) -> None:
        names = dict(zip("bac", net.all, strict=True)) | {"me": "me"}
        p = net.chain(data(), *(names[c] for c in chain))
        q = getattr(p, call)(*([names[to]] if to else []))
        if q is not p:
            with pytest.raises(PointerSpentError):
                p + 1
        del p
        assert net.sizes() == sizes
        if isinstance(q, PointerTensor):
            z = self.home(q + 1)
            assert torch.equal(z, data() + 1)
        assert torch.equal(self.home(q), data())
        del q
        assert net.sizes() == [0, 0, 0]

    def test_another_holder_keeps_its_object(self, net: Net) -> None:
        p = net.chain(data(), net.bob)
        pp = p.send(net.charlie)
        moved = p.move(net.alice)
        assert net.sizes() == [1, 1, 1]
        assert torch.equal(pp.get().get(), data()) and torch.equal(moved.get(), data())


class TestL7NothingIsLost:
    def test_failed_calls_change_nothing(self, net: Net) -> None:
        p = net.chain(data(), net.bob)
        q = net.chain(data(), net.alice)
        before = net.sizes()
        calls: list[Any] = [
            lambda: p + q,
            lambda: p @ torch.ones(3),
            lambda: p.move("nobody"),
            lambda: p.view(7),
            lambda: p.add(),
        ]
        for call in calls:
            with pytest.raises(Exception):  # noqa: B017, PT011  # which one is the business of other tests
                call()
        assert net.sizes() == before
        assert torch.equal(p.get(), data())


class TestL8TogetherOrNotAtAll:
    def test_elsewhere_is_refused_in_every_position(self, net: Net) -> None:
        p, q, x = net.chain(data(), net.bob), net.chain(data(), net.alice), data()
        for call in (
            lambda: p + q,
            lambda: q.add(p),
            lambda: torch.cat([p, q]),
            lambda: torch.add(p, other=q),
            lambda: torch.add(p, p, out=q),
            lambda: p + x,
            lambda: x + p,
            lambda: torch.stack([x, p]),
            lambda: torch.mm(input=p[None], mat2=x[:, None]),
        ):
            with pytest.raises(NotColocatedError):
                call()

    def test_numbers_and_0_dim_tensors_travel(self, net: Net) -> None:
        for p in (net.chain(data(), net.bob), net.chain(data(), net.bob, net.alice)):
            y = p * torch.tensor(2.0) + 1
            while isinstance(y, PointerTensor):
                y = y.get()
            assert torch.equal(y, data() * 2 + 1)


class TestL9ErrorsHappenWhereYouMadeThem:
    def test_shapes_and_dtypes_in_torchs_words(self, net: Net) -> None:
        x = torch.ones(2, 3)
        p = net.chain(x, net.bob)
        functions: list[Any] = [
            lambda a: a @ a,
            lambda a: a + a[:, :2],
            lambda a: a.view(5),
            lambda a: a[7],
            lambda a: a.bitwise_not(),
        ]
        for f in functions:
            with pytest.raises(Exception) as local:  # noqa: PT011  # torch's own, whatever it is
                f(x)
            with pytest.raises(type(local.value)) as remote:
                f(p)
            assert str(remote.value) == str(local.value)

    def test_a_late_error_names_the_line_and_poisons(self, net: Net) -> None:
        p = net.chain(torch.zeros(2, 2), net.bob)
        bad = torch.linalg.inv(p)
        worse = bad + 1
        with pytest.raises(RemoteExecutionError, match=r"test_laws\.py:\d+: aten::.* failed on bob") as first:
            worse.get()
        assert "singular" in str(first.value)

    def test_no_error_of_ours_is_a_type_error(self) -> None:
        def below(kind: Any) -> Iterator[Any]:
            yield kind
            for child in kind.__subclasses__():
                yield from below(child)

        assert not [kind for kind in below(FarpointError) if issubclass(kind, TypeError)]

    def test_comparison_is_never_quietly_false(self, net: Net) -> None:
        p = net.chain(data(), net.bob)
        assert torch.equal((p == 1).get(), data() == 1) and torch.equal((1 + p).get(), data() + 1)
        with pytest.raises(NotColocatedError):
            assert p == net.chain(data(), net.alice)

    def test_unknown_worker(self, net: Net) -> None:
        with pytest.raises(WorkerNotFoundError, match="nobody"):
            data().send("nobody")


class TestL10NothingLeavesByAccident:
    def test_values(self, net: Net) -> None:
        p = net.chain(torch.tensor(1.5), net.bob)
        for call in (
            lambda: bool(p),
            lambda: float(p),
            lambda: int(p),
            lambda: p.item(),
            lambda: p.numpy(),
            lambda: p.tolist(),
            lambda: f"{p:.2f}",
            lambda: np.asarray(p),
            lambda: p.__dlpack__(),
            lambda: torch.equal(p, p),
            lambda: torch.allclose(p, p),
        ):
            with pytest.raises(ValueNotHereError, match=r"p\.get\(\)"):
                call()


class TestL11ProgramOrder:
    def test_two_ways_to_one_object(self, net: Net) -> None:
        p = net.chain(torch.zeros(3), net.bob)
        pp = p.send(net.alice)
        for _ in range(20):
            p.add_(1)
            pp.mul_(2)
        expected = torch.zeros(3)
        for _ in range(20):
            expected.add_(1).mul_(2)
        assert torch.equal(p.get(), expected)


class TestL12TorchIsTorch:
    def test_views_alias(self, net: Net) -> None:
        for hops in (1, 2):
            p = net.chain(torch.zeros(2, 3), *net.all[:hops])
            view: Any = p[0]
            view.add_(1)
            p[1, 2] = 7
            p.t_()
            assert p.shape == (3, 2)
            while isinstance(p, PointerTensor):
                p = p.get()
            assert torch.equal(p, torch.tensor([[1.0, 0], [1, 0], [1, 7]]))

    def test_in_place_and_out_return_the_same_object(self, net: Net) -> None:
        p, q = net.chain(data(), net.bob), net.chain(data(), net.bob)
        assert p.add_(1) is p
        assert id(torch.add(p, p, out=q)) == id(q)
        assert torch.equal(q.get(), (data() + 1) * 2)

    def test_many_outputs(self, net: Net) -> None:
        values, indices = net.chain(data(), net.bob).topk(2)
        assert torch.equal(values.get(), torch.tensor([5.0, 4.0])) and torch.equal(indices.get(), torch.tensor([4, 3]))


class TestL13Autograd:
    def test_backward(self, net: Net) -> None:
        x = data().requires_grad_()
        (x * x).sum().backward()
        for hops in (1, 2):
            p = net.chain(data().requires_grad_(), *net.all[:hops])
            (p * p).sum().backward()
            grad = p.grad
            while isinstance(grad, PointerTensor):
                grad = grad.get()
            assert torch.equal(grad, x.grad)
