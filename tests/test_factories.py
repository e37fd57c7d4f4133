"""Tensors that begin on a worker: `with farpoint.on(bob)`, and the first states of recurrent layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader, TensorDataset

import farpoint
from farpoint import (
    PointerError,
    PointerTensor,
    QuotaError,
    VirtualWorker,
    WorkerLostError,
    WorkerNotFoundError,
    on,
)
from farpoint.factories import _HERE, _THERE
from farpoint.forecast import forecast
from farpoint.limits import Limits
from farpoint.operations import lookup, names
from farpoint.protocol.messages import Kind
from farpoint.remote import RemoteWorker
from farpoint.surroundings import without_onednn
from farpoint.template import Template
from farpoint.worker import Worker
from test_isolation import Place, ready
from wire import RawClient

__all__ = ["ready"]  # keeps one zygote for all tests

FACTORIES: dict[str, Callable[[], Any]] = {
    "arange": lambda: torch.arange(5),
    "arange of floats": lambda: torch.arange(1, 2, 0.25),
    "as_tensor": lambda: torch.as_tensor([1, 2]),
    "asarray": lambda: torch.asarray([1, 2]),
    "bartlett_window": lambda: torch.bartlett_window(5),
    "blackman_window": lambda: torch.blackman_window(5),
    "empty": lambda: torch.empty(3).fill_(2),
    "empty in another format": lambda: torch.empty(1, 2, 3, 3, memory_format=torch.channels_last).zero_(),
    "empty_permuted": lambda: torch.empty_permuted((2, 3), (1, 0)).zero_(),
    "empty_strided": lambda: torch.empty_strided((2, 3), (1, 2)).zero_(),
    "eye": lambda: torch.eye(3),
    "eye that is not square": lambda: torch.eye(3, 4, dtype=torch.float64),
    "fftfreq": lambda: torch.fft.fftfreq(5),
    "full": lambda: torch.full((2,), 7),
    "full of floats": lambda: torch.full((2, 1), 7.5, requires_grad=True),
    "full of complex": lambda: torch.full((2,), 1 + 2j),
    "hamming_window": lambda: torch.hamming_window(5, False),
    "hann_window": lambda: torch.hann_window(5),
    "kaiser_window": lambda: torch.kaiser_window(5),
    "linspace": lambda: torch.linspace(0, 1, 5),
    "logspace": lambda: torch.logspace(0, 1, 5),
    "normal": lambda: torch.normal(1.0, 2.0, (3,)),
    "ones": lambda: torch.ones(2, 3, dtype=torch.int32),
    "rand": lambda: torch.rand((2, 2)),
    "randint": lambda: torch.randint(10, (3,)),
    "randint with a low": lambda: torch.randint(3, 10, (3,)),
    "randn": lambda: torch.randn(3, 2, device="cpu"),
    "randn that requires a gradient": lambda: torch.randn(3, requires_grad=True),
    "randperm": lambda: torch.randperm(10),
    "rfftfreq": lambda: torch.fft.rfftfreq(5),
    "scalar_tensor": lambda: torch.scalar_tensor(3.5),
    "tensor": lambda: torch.tensor([1.0, 2.0], requires_grad=True),
    "tensor of one number": lambda: torch.tensor(5),
    "tril_indices": lambda: torch.tril_indices(3, 3),
    "triu_indices": lambda: torch.triu_indices(3, 3, 1),
    "zeros": lambda: torch.zeros((), dtype=torch.complex64),
}


@pytest.fixture(scope="module")
def isolated() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def place_of(x: Any) -> str:
    return str(x.location.id) if isinstance(x, PointerTensor) else "here"


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("serializer", ["msgpack", "torch", "isolated"])
def test_factories_make_there_what_they_make_here(name: str, serializer: str, isolated: Place) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = FACTORIES[name]()
    untouched = torch.get_rng_state()
    bob: RemoteWorker = isolated if serializer == "isolated" else VirtualWorker(id="bob", serializer=serializer)
    bob.manual_seed(3)
    with on(bob):
        made = FACTORIES[name]()
    assert type(made) is PointerTensor and made.location is bob and made.is_leaf
    facts = (made.shape, made.stride(), made.dtype, made.requires_grad)
    assert facts == (expected.shape, expected.stride(), expected.dtype, expected.requires_grad)
    found = made.get()
    assert found.tolist() == expected.tolist() and found.stride() == expected.stride() and found.dtype == expected.dtype
    assert torch.equal(torch.get_rng_state(), untouched)
    if bob is not isolated:
        bob.close()


def test_every_factory_of_torch_is_known() -> None:
    # What makes tensors of kinds that do not travel follows the context of a device, and not this one. `range` is deprecated, and
    # tells no mode that it is called.
    strange = {torch.range} | {f for f in _device_constructors() if "sparse" in f.__name__ or "nested" in f.__name__ or "quantized" in f.__name__}
    assert (_device_constructors() - strange) | {torch.normal} == _THERE | _HERE


def test_places_nest_and_end(bob: VirtualWorker, alice: VirtualWorker) -> None:
    place = on(bob)
    places = []
    with place:
        places.append(torch.zeros(1))
        with on("alice"):
            places.append(torch.tensor([1]))
            with place, on(farpoint.me()):
                places.append(torch.rand(1))
            places.append(torch.ones(1))
            with suppress(KeyError), place:
                places.append(torch.eye(1))
                raise KeyError
            with on("me"):
                places.append(torch.tensor([2]))
        places.append(torch.empty(1))
    places.append(torch.empty(1))
    assert [place_of(x) for x in places] == ["bob", "alice", "here", "alice", "bob", "here", "bob", "here"]
    assert torch._C._len_torch_function_stack() == 0


def test_it_is_about_one_thread(bob: VirtualWorker) -> None:
    made = []
    with on(bob):
        thread = threading.Thread(target=lambda: made.append(torch.zeros(1)))
        thread.start()
        thread.join()
    assert place_of(made[0]) == "here"


def test_what_follows_a_tensor_or_names_its_place_is_there(bob: VirtualWorker) -> None:
    local, out = torch.ones(2), torch.empty(2)
    p: Any = farpoint.send(local, bob)
    with on(bob):
        here = [torch.zeros_like(local), local.new_ones(2), torch.empty(2, device="meta"), torch.ones(2, out=out), local + 1]
        there = [torch.zeros_like(p), p.new_ones(2), p + 1, p + torch.ones(2), torch.as_tensor(p), torch.normal(p, 1.0)]
        assert place_of(torch.normal(local, 1.0)) == "here"
        assert torch.as_tensor(p) is p
    assert [place_of(x) for x in here] == ["here"] * 5 and here[3] is out
    assert [place_of(x) for x in there] == ["bob"] * 6


def test_a_context_of_torch_inside_is_obeyed(bob: VirtualWorker) -> None:
    with on(bob), torch.device("meta"):
        assert torch.zeros(1).device.type == "meta"
    with torch.device("meta"), on(bob):
        assert place_of(torch.zeros(1)) == "bob"


def test_what_farpoint_makes_for_itself_is_here(bob: VirtualWorker, alice: VirtualWorker) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for context in (on(bob), torch.device("meta")):
        p: Any = farpoint.send(x, bob)
        with context:
            empty = farpoint.send(x[:0], bob)
            q: Any = farpoint.send(p * 2 + 1, alice)
            assert q.get().get().tolist() == (x * 2 + 1).tolist()
            assert farpoint.get(empty).shape == (0, 3) and farpoint.get(p.bool()).dtype is torch.bool
            assert torch.nonzero(p).shape == (5, 2)
            assert farpoint.get(p.t()).device.type == "cpu" and farpoint.get(farpoint.move(p, alice)).tolist() == x.tolist()


def test_a_model_begins_and_trains_there(bob: VirtualWorker) -> None:
    def train() -> list[Any]:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        step = torch.optim.Adam(model.parameters())
        for _ in range(3):
            step.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            step.step()
        return [*model.parameters(), *model.buffers()]

    with torch.random.fork_rng(devices=[]):
        farpoint.manual_seed(4)
        expected = train()
        with on(bob):
            found = train()
    assert {place_of(x) for x in found} == {"bob"}
    assert [x.detach().get().tolist() for x in found] == [x.tolist() for x in expected]


def test_loaders_keep_their_numbers_here(bob: VirtualWorker) -> None:
    with on(bob):
        batches = list(DataLoader(TensorDataset(torch.arange(6)), batch_size=3, shuffle=True))
    assert sorted(i for (batch,) in batches for i in farpoint.get(batch).tolist()) == list(range(6))


def test_clear_errors(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.ones(1), bob)
    with pytest.raises(WorkerNotFoundError):
        on("nobody")
    wrong: Any
    for wrong in (p, 3, None):
        with pytest.raises(PointerError, match="takes a worker or its name, and this is a"):
            on(wrong)
    with on(bob):
        with pytest.raises(PointerError, match=r"draws from a random generator of its own.*bob\.manual_seed\(seed\)"):
            torch.randn(3, generator=torch.Generator())
        with pytest.raises(RuntimeError, match=r"(?i)negative"):
            torch.zeros(-1)
        bob.close()
        with pytest.raises(WorkerLostError):
            torch.zeros(1)


class TestRoom:
    """Nothing is made that there is no room for."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.empty(2**40),
            lambda: torch.zeros(2**20, 2**20),
            lambda: torch.empty_strided((2,), (2**39,)),
            lambda: torch.eye(2**40),
            lambda: torch.tril_indices(2**40, 2**40),
            lambda: torch.arange(2**39),
            lambda: torch.randperm(2**36),
            lambda: torch.hann_window(2**36),
            lambda: torch.full((2**36,), 1j),
        ],
    )
    def test_what_is_too_large_is_not_made(self, make: Callable[[], Any], bob: VirtualWorker) -> None:
        with on(bob), pytest.raises(QuotaError):
            farpoint.get(make())
        assert len(bob) == 0

    def test_it_is_charged_before_it_runs(self) -> None:
        worker = Worker("small", "virtual://small", ["msgpack"], limits=Limits(bytes=4096))
        client = RawClient(worker.url)
        ran: list[Any] = []
        guest = worker.guests[client.holder]
        guest.executor = _Watched(guest.executor, ran)
        client.say([int(Kind.DEFINE), 0, "aten::zeros.default", [["l", ["c", 1025]]], {}])
        (number,) = client.say([int(Kind.RUN), 0, [], [3]])
        assert client.answers[number][1]["kind"] == "QuotaError" and not ran
        client.say([int(Kind.DEFINE), 0, "aten::zeros.default", [["l", ["c", 1000]]], {}])
        client.say([int(Kind.RUN), 0, [], [4]])
        assert ran and client.ask([int(Kind.FETCH), 4])[1].shape == (1000,)
        client.close()
        worker.close()

    def test_every_operation_without_operands_is_foreseen(self) -> None:
        without = [lookup(n) for n in names() if not any("Tensor" in str(a.type) for a in lookup(n).overload._schema.arguments)]
        assert len(without) > 35
        assert all(any(a.name == "device" for a in operation.overload._schema.arguments) for operation in without)

    def test_how_large_they_will_be(self) -> None:
        shapes: list[tuple[Any, ...]] = [
            ("aten::eye.m", [["c", 3], ["c", 5]], {"dtype": ["dtype", "int16"]}, 30),
            ("aten::full.default", [["l", ["c", 4]], ["s"]], {}, 16),
            ("aten::arange.start_step", [["c", 0], ["c", 10], ["c", 3]], {}, 32),
            ("aten::tril_indices.default", [["c", 3], ["c", 3]], {}, 96),
            ("aten::empty_strided.default", [["l", ["c", 2]], ["l", ["c", 10]]], {}, 44),
            ("aten::zeros.default", [["l", ["c", 2**40], ["c", 2**40]]], {}, 2**80),
            ("aten::add.Tensor", [["c", 1], ["c", 2]], {}, 0),
        ]
        for name, args, kwargs, nbytes in shapes:
            template = Template.from_wire(name, args, kwargs) if nbytes < 2**62 else Template(lookup(name), args, kwargs)
            assert [forecast(template, [1.5] * template.size) for _ in range(2)] == [nbytes] * 2, name

    def test_nobody_who_was_introduced_makes_any(self) -> None:
        worker = Worker("strict", "virtual://strict", ["msgpack"])
        client = RawClient(worker.url)
        worker.guests[client.holder].introduced = True
        client.say([int(Kind.DEFINE), 0, "aten::zeros.default", [["l", ["c", 1]]], {}])
        (number,) = client.say([int(Kind.RUN), 0, [], [3]])
        assert client.answers[number][1]["kind"] == "PermissionDeniedError" and not worker.store
        client.close()
        worker.close()


class _Watched:
    """An executor that writes down what it has run."""

    def __init__(self, inner: Any, ran: list[Any]) -> None:
        self.inner = inner
        self.ran = ran

    def execute(self, template: Any, values: list[Any]) -> Any:
        self.ran.append(template)
        return self.inner.execute(template, values)

    def seed(self, seed: int) -> None:
        self.inner.seed(seed)

    def rest(self) -> None:
        self.inner.rest()

    def close(self) -> None:
        self.inner.close()


def sent(layer: nn.RNNBase, *workers: VirtualWorker) -> Any:
    """Return a copy of a layer whose weights are at the end of a chain."""
    away = copy.deepcopy(layer)
    for name, weight in layer.named_parameters():
        p: Any = weight.detach()
        for worker in workers:
            p = farpoint.send(p, worker)
        setattr(away, name, nn.Parameter(p))
    return away


class TestRecurrent:
    """`nn.LSTM` and its like begin with zeros that they make themselves."""

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}])
    @pytest.mark.parametrize("how", ["as it is", "on", "chain"])
    def test_they_work_as_they_are(
        self, kind: Any, options: dict[str, Any], how: str, bob: VirtualWorker, alice: VirtualWorker
    ) -> None:
        workers = (bob, alice) if how == "chain" else (bob,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer, x = kind(3, 4, **options), torch.randn(5, 2, 3)
            p: Any = x
            for worker in workers:
                p = farpoint.send(p, worker)
            away = sent(layer, *workers)
            farpoint.manual_seed(1)
            enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)  # its formula is near, and not the same
            expected, state = layer(x)
            expected.square().sum().backward()
            torch._C._set_mkldnn_enabled(enabled)
            bob.manual_seed(1)
            if how == "on":
                with on(bob):
                    found, far = away(p)
            else:
                found, far = away(p)
            found.square().sum().backward()
        assert torch._C._get_mkldnn_enabled() == enabled

        def home(value: Any) -> list[float]:
            while isinstance(value, PointerTensor):
                value = value.get()
            return list(value.tolist())

        assert home(found.detach()) == expected.tolist()
        assert home((far[0] if isinstance(far, tuple) else far).detach()) == (state[0] if isinstance(state, tuple) else state).tolist()
        for near, weight in zip(layer.parameters(), away.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(home(weight.grad)), near.grad)

    def test_a_state_of_the_users_must_be_there(self, bob: VirtualWorker) -> None:
        layer = nn.GRU(3, 4)
        away, p = sent(layer, bob), farpoint.send(torch.ones(5, 2, 3), bob)
        state = torch.ones(1, 2, 4)
        with pytest.raises(farpoint.NotColocatedError, match=r"x\.send\(bob\)"):
            away(p, state)
        expected = layer(torch.ones(5, 2, 3), state)[0]
        assert away(p, farpoint.send(state, bob))[0].detach().get().tolist() == expected.tolist()

    def test_the_switch_is_put_back_by_the_last(self, bob: VirtualWorker) -> None:
        enabled = torch._C._get_mkldnn_enabled()
        first, second = without_onednn(), without_onednn()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not torch._C._get_mkldnn_enabled()
        second.__exit__(None, None, None)
        assert torch._C._get_mkldnn_enabled() == enabled
