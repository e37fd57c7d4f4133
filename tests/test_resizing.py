"""`resize_`: what an object becomes, who sees it, and what a peer may not make of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farpoint
from farpoint import QuotaError, RemoteWorker
from farpoint.errors import ExecutorCrashedError, FarpointError, ProtocolError
from farpoint.isolation import memory
from farpoint.isolation.memory import SMALL
from farpoint.isolation.processes import zygote
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.protocol.messages import Kind
from farpoint.worker import Worker
from wire import RawClient, check_books, error_of

farpoint.TorchHook(torch)
numbers = itertools.count()
RESIZE = "aten::resize_.default"


class Place(RemoteWorker):
    """A worker of this process, and this process's way to it."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, isolate: bool = False) -> None:
        name = f"resizing-{next(numbers)}"
        self.worker = Worker(name, f"virtual://{name}", ["msgpack"], limits=limits, isolate=isolate)
        super().__init__(name, self.worker.url)

    def close(self) -> None:
        super().close()
        check_books(self.worker)
        self.worker.close()


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    """Keep one zygote for all tests: each would wait for torch to be imported."""
    zygote.enter()
    yield
    zygote.leave()


@pytest.fixture
def make() -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def place(isolate: bool = False, **limits: Any) -> Place:
        made.append(Place(Limits(**limits), isolate))
        return made[-1]

    yield place
    for one in made:
        one.close()


@pytest.fixture(params=[False, True], ids=["inside", "isolated"])
def bob(request: pytest.FixtureRequest, make: Callable[..., Place]) -> Place:
    return make(request.param)


def tensor(x: torch.Tensor) -> Any:
    """Return a tensor as something that has `send`."""
    return x


class TestWhatItBecomes:
    """L12: what local torch makes of it, but for memory that local torch leaves as it finds it."""

    @pytest.mark.parametrize("size", [(3,), (0,), (), (6,), (2, 3), (3, 4), (4, 0, 5), (SMALL,)], ids=str)
    def test_of_a_vector(self, bob: Place, size: tuple[int, ...]) -> None:
        x = torch.arange(1.0, 7.0)
        p, count = tensor(x).send(bob), torch.Size(size).numel()
        assert p.resize_(size) is p
        assert p.shape == size and p.stride() == x.clone().resize_(size).stride()
        expected = torch.cat([x, torch.zeros(count)])[:count].view(size)
        assert torch.equal(p.get(keep=True), expected) and torch.equal((p * 2).get(), expected * 2)

    def test_strides(self, bob: Place) -> None:
        base = torch.arange(24.0).view(4, 6)
        cases: list[tuple[Callable[[Any], Any], tuple[int, ...]]] = [
            (lambda x: x.t(), (6, 4)),  # of the same shape it stays as it is
            (lambda x: x.t(), (4, 6)),
            (lambda x: x[1:3, ::2], (2, 2)),
            (lambda x: x[1:3, ::2], (5, 3)),
            (lambda x: x[:1].expand(4, 6), (2, 3)),
        ]
        for cut, size in cases:
            p, x = cut(tensor(base).send(bob)), cut(base.clone())
            p.resize_(size)
            x.resize_(size)
            assert p.stride() == x.stride() and p.storage_offset() == x.storage_offset() and torch.equal(p.get(), x)

    def test_memory_formats(self, bob: Place) -> None:
        for shape, form in (((1, 2, 3, 4), torch.channels_last), ((1, 2, 3, 2, 2), torch.channels_last_3d)):
            p, x = tensor(torch.ones(30)).send(bob), torch.ones(30)
            p.resize_(shape, memory_format=form)
            x.resize_(shape, memory_format=form)
            assert p.stride() == x.stride() and torch.equal(p.get(), x)
        with pytest.raises(RuntimeError, match="rank 4"):
            tensor(torch.ones(30)).send(bob).resize_(3, memory_format=torch.channels_last)

    def test_as_another(self, bob: Place) -> None:
        p = tensor(torch.arange(8.0)).send(bob)
        model = tensor(torch.ones(1, 2, 2, 2)).send(bob).contiguous(memory_format=torch.channels_last)
        resize_as: Any = torch.Tensor.resize_as_
        assert resize_as(p, model) is p and p.stride() == (8, 4, 2, 1)
        p.resize_(8).resize_as_(model, memory_format=torch.preserve_format)
        assert p.stride() == model.stride() and torch.equal(p.get(), torch.arange(8.0).as_strided((1, 2, 2, 2), (8, 1, 4, 2)))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.complex64, torch.float64])
    def test_dtypes(self, bob: Place, dtype: torch.dtype) -> None:
        x = torch.ones(3, dtype=dtype)
        found = tensor(x).send(bob).resize_(5).get()
        assert found.dtype is dtype and torch.equal(found, torch.cat([x, torch.zeros(2, dtype=dtype)]))

    def test_what_begins_within_its_memory(self, bob: Place) -> None:
        p = tensor(torch.ones(4)).send(bob) + 0  # made by torch, which would let its memory grow
        tail = p[3:]
        assert tail.resize_(2, 3).get(keep=True).tolist() == [[1, 0, 0], [0, 0, 0]]
        assert {value.untyped_storage().nbytes() for value in bob.worker.store.values()} == {36}

    def test_conj_and_neg_bits(self, bob: Place) -> None:
        z = torch.tensor([1 + 2j, 3 - 4j])
        p = tensor(z).send(bob).conj()
        p.resize_(3)
        assert p.is_conj() and torch.equal(p.get(), torch.tensor([1 - 2j, 3 + 4j, 0]))
        q = tensor(z).send(bob).conj().imag
        assert q.is_neg() and torch.equal(q.resize_(1).get(), torch.tensor([-2.0]))

    def test_what_requires_a_gradient_is_not_resized(self, bob: Place) -> None:
        p = tensor(torch.ones(3, requires_grad=True)).send(bob)
        with pytest.raises(RuntimeError) as there:
            p.resize_(2)
        with pytest.raises(RuntimeError) as here:
            torch.ones(3, requires_grad=True).resize_(2)
        assert str(there.value) == str(here.value) and p.shape == (3,)

    def test_what_grows_again_and_again(self, bob: Place) -> None:
        p, x = tensor(torch.ones(1)).send(bob), torch.ones(1)
        for n in (2, 3, 9, SMALL, SMALL + 5, 2 * SMALL):
            p.resize_(n).add_(1)
            x = torch.cat([x, torch.zeros(n - len(x))]) + 1
        assert torch.equal(p.get(), x)

    def test_errors_of_torch(self, bob: Place) -> None:
        p = tensor(torch.ones(3)).send(bob)
        for size in (-1, (2, -3)):
            with pytest.raises(RuntimeError):
                p.resize_(size)
        with pytest.raises(ProtocolError, match="33 dimensions"):
            p.resize_([1] * 33)
        assert p.shape == (3,) and torch.equal(p.get(), torch.ones(3))


class TestWhoSeesIt:
    @pytest.mark.parametrize("n", [4, SMALL])
    def test_views_share_the_memory_before_and_after(self, bob: Place, n: int) -> None:
        p = tensor(torch.zeros(n)).send(bob)
        head, turned, other = p[:2], p.view(2, -1).t(), p.detach()
        p.resize_(2 * n)
        late = p[:3]
        head.fill_(1)
        p[-1].fill_(5)
        late.mul_(3)
        x = torch.zeros(n)
        x[:2] = 3
        assert torch.equal(other.get(keep=True), x) and torch.equal(turned.get(keep=True), x.view(2, -1).t())
        assert p.get(keep=True)[-1] == 5 and p.get(keep=True).sum() == 11
        storages = {value.untyped_storage()._cdata for value in bob.worker.store.values()}
        assert len(storages) == 1 and bob.worker.store.nbytes == 2 * n * 4
        file = memory.file_of(bob.worker.store[p.id_at_location].untyped_storage())
        assert (file is not None) == (bob.worker.isolation is not None and n == SMALL)

    def test_other_sessions_see_it_too(self, bob: Place) -> None:
        p = tensor(torch.ones(3)).send(bob).tag("#shared")
        bob.synchronize()
        other = RawClient(bob.worker.url)
        other.say([int(Kind.CLAIM), p.id_at_location, ""])
        other.say([int(Kind.DEFINE), 0, "aten::view.default", [["t"], ["l", ["c", 3]]], {}], [int(Kind.RUN), 0, [p.id_at_location], [7]])
        p.resize_(4).add_(1)
        bob.synchronize()
        assert other.ask([int(Kind.FETCH), 7])[1].tolist() == [2.0] * 3
        other.say([int(Kind.RELEASE), [7, p.id_at_location]])

    def test_along_a_chain(self, bob: Place) -> None:
        alice = farpoint.VirtualWorker(id=f"resizing-alice-{next(numbers)}")
        pp = tensor(torch.arange(3.0)).send(bob).send(alice)
        view = pp[1:]
        pp.resize_(2, 2)
        pp.add_(1)
        assert pp.get(keep=True).get(keep=True).tolist() == [[1, 2], [3, 1]] and view.get().get().tolist() == [2, 3]
        with pytest.raises(QuotaError):
            pp.resize_(2**31)
        assert pp.shape == (2, 2) and pp.get().get().tolist() == [[1, 2], [3, 1]]
        alice.close()

    def test_it_moves_as_it_is(self, bob: Place) -> None:
        p = tensor(torch.arange(3.0)).send(bob)
        alice = farpoint.VirtualWorker(id=f"resizing-alice-{next(numbers)}")
        p.resize_(4)
        q = p.move(alice)
        assert q.shape == (4,) and q.get().tolist() == [0, 1, 2, 0]
        alice.close()


class TestQuota:
    def test_growth_is_charged_before_it_happens(self, make: Callable[..., Place]) -> None:
        for isolate in (False, True):
            bob = make(isolate, bytes=64_000)
            p, q = tensor(torch.ones(4_000)).send(bob), tensor(torch.ones(4_000)).send(bob)
            p.resize_(11_000)
            with pytest.raises(QuotaError, match="bytes=64000"):
                p.resize_(13_000)
            assert p.shape == (11_000,) and p.get(keep=True).sum() == 4_000 and bob.worker.store.nbytes == 60_000
            q.resize_(1)
            with pytest.raises(QuotaError):  # its memory is as large as before
                p.resize_(13_000)
            del q
            p.resize_(13_000)
            assert bob.worker.store.nbytes == 52_000

    def test_what_grows_and_is_given_up_leaves_room(self, make: Callable[..., Place]) -> None:
        bob = make(bytes=64_000)
        for _ in range(20):
            p = tensor(torch.ones(10)).send(bob)
            p.resize_(12_000)
            p.resize_(3)
        assert p.get().sum() == 3


@pytest.fixture
def mallory(bob: Place) -> Iterator[RawClient]:
    client = RawClient(bob.worker.url)
    yield client
    client.close()


def resize_to(client: RawClient, size: list[int], operand: Any = 1, results: tuple[int, ...] = (0,), **kwargs: Any) -> Any:
    client.say([int(Kind.DEFINE), 9, RESIZE, [["t"], ["l", *(["c", n] for n in size)]], kwargs])
    (number,) = client.say([int(Kind.RUN), 9, [operand], list(results)])
    return client.answers.pop(number, None)


class TestHostile:
    @pytest.mark.parametrize(
        "size", [[-1], [2, -2], [2**40], [2**39, 1], [2**40, 2**18], [2**40, 2**20], [2**40, 2**22], [2**31, 2**31], [2**62], [2**63 - 1], [2**63], [2**40] * 4]
    )
    def test_sizes_beyond_all_reason(self, bob: Place, mallory: RawClient, size: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        mallory.say([int(Kind.PUT), 1, torch.ones(3), False, [], ""])
        for module in ("farpoint.resizing", "farpoint.isolation.memory"):
            monkeypatch.setattr(f"{module}.grow", None)  # nothing may be allocated
        answer = resize_to(mallory, size)
        assert answer[0] == Kind.FAILURE
        assert error_of(answer[1]) in ("QuotaError", "ProtocolError", "RuntimeError") and "NoneType" not in answer[1]["text"]
        assert mallory.ask([int(Kind.FETCH), 1])[1].tolist() == [1.0] * 3 and bob.worker.store.nbytes == 12

    def test_strides_that_overflow(self, bob: Place, mallory: RawClient) -> None:
        mallory.say([int(Kind.PUT), 1, torch.ones(3), False, [], ""])
        assert error_of(resize_to(mallory, [2**40, 0, 2**22])[1]) == "ProtocolError"
        assert error_of(resize_to(mallory, [1] * 33)[1]) == "ProtocolError"
        assert resize_to(mallory, [2**36, 0, 2**21], memory_format=["c", None]) is None
        assert bob.worker.store[1].stride() == (2**21, 2**21, 1) and bob.worker.store.nbytes == 12
        assert resize_to(mallory, [3]) is None
        assert mallory.ask([int(Kind.FETCH), 1])[1].tolist() == [1.0] * 3

    def test_what_is_not_held_or_no_object(self, bob: Place, mallory: RawClient) -> None:
        honest = RawClient(bob.worker.url)
        honest.say([int(Kind.PUT), 100, torch.ones(3), False, [], ""])
        mallory.say([int(Kind.PUT), 1, torch.ones(3), False, [], ""])
        assert error_of(resize_to(mallory, [9], 100)[1]) == "ObjectNotFoundError"
        assert error_of(resize_to(mallory, [9], 77)[1]) == "ObjectNotFoundError"
        for operand in (torch.ones(3), 1.5, None, "1"):
            assert error_of(resize_to(mallory, [9], operand)[1]) == "MalformedMessageError"
        mallory.say([int(Kind.DEFINE), 8, "aten::resize_as_.default", [["t"], ["t"]], {}])
        assert error_of(mallory.ask([int(Kind.RUN), 8, [1, 100], [0]])) == "ObjectNotFoundError"
        assert bob.worker.store[100].shape == (3,) and bob.worker.store[1].shape == (3,)
        honest.close()

    def test_named_operands(self, bob: Place, mallory: RawClient) -> None:
        mallory.say([int(Kind.PUT), 1, torch.ones(3), False, [], ""], [int(Kind.PUT), 2, torch.ones(5), False, [], ""])
        mallory.say([int(Kind.DEFINE), 8, "aten::resize_as_.default", [], {"the_template": ["t"], "self": ["t"]}])
        mallory.say([int(Kind.RUN), 8, [2, 1], [0]])
        assert mallory.ask([int(Kind.FETCH), 1])[1].tolist() == [1, 1, 1, 0, 0] and bob.worker.store[2].shape == (5,)
        mallory.say([int(Kind.RUN), 8, [1, 1], [0]])
        assert bob.worker.store[1].shape == (5,)

    def test_its_result_under_an_id(self, bob: Place, mallory: RawClient) -> None:
        mallory.say([int(Kind.PUT), 1, torch.ones(3), False, [], ""])
        assert resize_to(mallory, [4], 1, (5,)) is None
        assert mallory.ask([int(Kind.FETCH), 5])[1].tolist() == [1, 1, 1, 0] == mallory.ask([int(Kind.FETCH), 1])[1].tolist()

    def test_views_and_what_is_expanded(self, bob: Place, mallory: RawClient) -> None:
        mallory.say(
            [int(Kind.PUT), 1, torch.ones(4), False, [], ""],
            [int(Kind.DEFINE), 0, "aten::expand.default", [["t"], ["l", ["c", 2**36], ["c", 4]]], {}],
            [int(Kind.DEFINE), 1, "aten::slice.Tensor", [["t"], ["c", 0], ["c", 3], ["c", 4]], {}],
            [int(Kind.RUN), 0, [1], [2]],
            [int(Kind.RUN), 1, [1], [3]],
        )
        assert resize_to(mallory, [2**36, 4], 2) is None  # the same shape: it stays expanded
        assert error_of(resize_to(mallory, [2**36 + 1, 4], 2)[1]) == "QuotaError"
        assert resize_to(mallory, [3, 4], 2) is None and resize_to(mallory, [2, 3], 3) is None
        assert mallory.ask([int(Kind.FETCH), 2])[1].tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
        assert mallory.ask([int(Kind.FETCH), 3])[1].tolist() == [[1.0, 0, 0], [0, 0, 0]]
        assert bob.worker.store.nbytes == 48

    def test_while_it_is_read(self, bob: Place, mallory: RawClient) -> None:
        mallory.say([int(Kind.PUT), 1, torch.ones(8), False, [], ""])
        assert mallory.ask([int(Kind.READ), 1, 0, 16]).numel() == 16
        assert resize_to(mallory, [2]) is None
        assert error_of(mallory.ask([int(Kind.READ), 1, 16, 16])) == "MalformedMessageError"
        assert resize_to(mallory, [16]) is None
        rest = mallory.ask([int(Kind.READ), 1, 16, 48])
        assert rest.view(torch.float32).tolist() == [1.0] * 4 + [0.0] * 8


class TestWithoutTorch:
    def test_a_store_that_refuses_changes_nothing(self, make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
        bob = make()
        p = tensor(torch.zeros(4)).send(bob)
        views = [p[:2], p[2:]]
        bob.synchronize()
        store = type(bob.worker.store)
        calls = itertools.count()

        class Full(store):  # type: ignore[misc, valid-type]
            def __setitem__(self, object_id: int, value: Any) -> None:
                if next(calls) == 1:
                    raise OSError("no space left on device")
                super().__setitem__(object_id, value)

        monkeypatch.setattr(bob.worker.store, "__class__", Full)
        with pytest.raises(FarpointError, match="no space"):
            p.resize_(8)
        monkeypatch.undo()
        p.fill_(1)
        assert p.shape == (4,) and [view.get().tolist() for view in views] == [[1, 1], [1, 1]]

    def test_operands_of_another_session_that_are_resized_meanwhile(self, make: Callable[..., Place]) -> None:
        bob = make(True)
        p = tensor(torch.ones(3)).send(bob)
        bob.synchronize()
        other = RawClient(bob.worker.url)
        other.say([int(Kind.CLAIM), p.id_at_location, ""])
        executor: Any = bob.worker.guests[other.holder].executor
        exchange = executor._exchange

        def meanwhile(*args: Any) -> None:
            exchange(*args)
            p.resize_(5)

        executor._exchange = meanwhile
        other.say([int(Kind.DEFINE), 0, "aten::add_.Scalar", [["t"], ["c", 1]], {}])
        failed = other.ask([int(Kind.RUN), 0, [p.id_at_location], [0]])
        assert error_of(failed) == ExecutorCrashedError.__name__ and "resized" in failed["text"]
        del executor._exchange
        assert p.get(keep=True).tolist() == [1, 1, 1, 0, 0]
        other.say([int(Kind.RUN), 0, [p.id_at_location], [0]])
        assert p.get(keep=True).tolist() == [2, 2, 2, 1, 1]
        other.say([int(Kind.RELEASE), [p.id_at_location]])
        other.close()

    def test_without_room_for_files(self, make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
        bob = make(True)
        monkeypatch.setattr(memory, "room", lambda: False)
        p = tensor(torch.ones(3)).send(bob)
        p.resize_(SMALL)
        assert (p + p).get().sum() == 6
        assert memory.file_of(bob.worker.store[p.id_at_location].untyped_storage()) is None
