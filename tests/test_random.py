"""Random numbers on workers: those of local torch for the same seed, from a generator that is the worker's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

import farpoint
from farpoint import VirtualWorker
from farpoint.generator import _way, check_seed, draw
from farpoint.operations import lookup, names
from test_isolation import Place, ready

__all__ = ["ready"]  # keeps one zygote for all tests

Draw = Callable[[Any], Any]
rand_like: Draw = torch.rand_like
randn_like: Draw = torch.randn_like
def attend(x: Any) -> Any:
    return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


DRAWS: dict[str, Draw] = {
    "dropout": functional.dropout,
    "dropout2d": lambda x: functional.dropout2d(x.view(1, 3, 4, 1)),
    "alpha_dropout": lambda x: functional.alpha_dropout(x, 0.5, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "attention": lambda x: attend(x.view(1, 1, 3, 4)),
    "gumbel_softmax": functional.gumbel_softmax,
    "rrelu": lambda x: functional.rrelu(-x, training=True),
    "rrelu_": lambda x: functional.rrelu_(-x, training=True),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 10),
    "randint_like with a low": lambda x: torch.randint_like(x, 3, 10),
    "bernoulli": torch.bernoulli,
    "bernoulli of a number": lambda x: x.bernoulli(0.3),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda x: torch.zeros_like(x).bernoulli_(x),
    "multinomial": lambda x: torch.multinomial(x, 2),
    "multinomial again and again": lambda x: torch.multinomial(x, 20, replacement=True),
    "normal": lambda x: torch.normal(x, x),
    "normal of a mean": lambda x: torch.normal(x, 2.0),
    "normal of a deviation": lambda x: torch.normal(1.0, x),
    "normal_": lambda x: x.clone().normal_(),
    "uniform_": lambda x: x.clone().uniform_(-1, 1),
    "random_": lambda x: x.clone().random_(),
    "random_ to": lambda x: x.clone().random_(7),
    "random_ from": lambda x: x.clone().random_(-7, 7),
    "exponential_": lambda x: x.clone().exponential_(),
    "geometric_": lambda x: x.clone().geometric_(0.2),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "poisson": lambda x: torch.poisson(x * 9),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), x),
    "gamma": torch._standard_gamma,
    "dirichlet": torch._sample_dirichlet,
    "out": lambda x: torch.bernoulli(x, out=torch.empty_like(x)),
    "many": lambda x: torch.randn_like(x.expand(50, 3, 4)),
}
X = torch.rand(3, 4, generator=torch.Generator().manual_seed(7))


def tensor(x: torch.Tensor) -> Any:
    """Return a tensor as something that has `send`."""
    return x


def local(seed: int, *draws: Draw) -> list[torch.Tensor]:
    """Return what torch draws here, and leave its generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [draws[0](X.clone()), *(draw(X.clone()) for draw in draws[1:])]


def same(found: list[Any], expected: list[torch.Tensor]) -> bool:
    return [x.get().tolist() for x in found] == [x.tolist() for x in expected]


@pytest.fixture(scope="module")
def isolated() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


@pytest.mark.parametrize("name", DRAWS)
def test_a_worker_draws_what_torch_draws(name: str, bob: VirtualWorker, alice: VirtualWorker, isolated: Place) -> None:
    expected = local(5, DRAWS[name], DRAWS[name])
    assert expected[0].tolist() != expected[1].tolist()
    untouched = torch.get_rng_state()
    direct = tensor(X).send(bob)
    pointers = {"a worker": (bob, direct), "a chain": (bob, direct.send(alice)), "an isolated worker": (isolated, tensor(X).send(isolated))}
    for where, (worker, p) in pointers.items():
        worker.manual_seed(5)
        found = [DRAWS[name](p), DRAWS[name](p)]
        ends = [q.get() for q in found] if where == "a chain" else found
        assert same(ends, expected), where
    assert torch.equal(torch.get_rng_state(), untouched)


def test_every_operation_that_draws_takes_the_generator() -> None:
    random = [lookup(name) for name in names() if lookup(name).random]
    # Of attention on a CPU there is no dropout: with one, torch takes another way.
    without = {"aten::native_dropout.default", "aten::_scaled_dot_product_flash_attention_for_cpu.default"}
    assert {operation.name for operation in random if _way(operation.overload) is None} == without
    assert len(random) > 40


def test_a_generator_by_position_is_replaced() -> None:
    operation = lookup("aten::poisson.default")
    drawn = [
        draw(operation, [X * 9, *given], kwargs, torch.Generator().manual_seed(3)).tolist()
        for given, kwargs in (([], {}), ([None], {}), ([], {"generator": None}))
    ]
    assert drawn == [torch.poisson(X * 9, torch.Generator().manual_seed(3)).tolist()] * 3


def test_workers_do_not_disturb_each_other(bob: VirtualWorker, alice: VirtualWorker) -> None:
    p, q = tensor(X).send(bob), tensor(X).send(alice)
    bob.manual_seed(1)
    alice.manual_seed(2)
    found = []
    for _ in range(3):
        found += [(rand_like(p), torch.native_dropout(q, 0.5, True)[0])]
        torch.rand(3)
    assert same([one for one, _ in found], local(1, *[rand_like] * 3))
    assert same([other for _, other in found], local(2, *[DRAWS["native_dropout"]] * 3))


def test_nobody_foresees_what_nobody_seeded(isolated: Place) -> None:
    drawn = []
    for name in ("bob", "bob", "alice"):
        with VirtualWorker(id=name) as worker:
            drawn.append(rand_like(tensor(X).send(worker)).get().tolist())
    with VirtualWorker(id="carol") as carol:  # another session with the isolated worker
        drawn.append(rand_like(tensor(X).send(isolated).send(carol)).get().get().tolist())
    drawn += [local(seed, rand_like)[0].tolist() for seed in (0, torch.default_generator.initial_seed(), torch.Generator().initial_seed())]
    assert len({str(values) for values in drawn}) == len(drawn)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**63, 2**64 - 1, -1, -(2**63)])
@pytest.mark.parametrize("serializer", ["msgpack", "torch"])
def test_seeds_are_those_of_torch(seed: int, serializer: str) -> None:
    with VirtualWorker(id="bob", serializer=serializer) as bob:
        assert bob.manual_seed(seed) is bob
        assert same([randn_like(tensor(X).send(bob))], local(seed, randn_like))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, pytest.param(10**5000, id="huge"), 1.0, True, "1", None, "x" * 500, pytest.param(torch.tensor(1), id="a tensor")])
def test_what_is_no_seed_is_refused(seed: Any, bob: VirtualWorker) -> None:
    before = torch.get_rng_state()
    for refused in (bob.manual_seed, farpoint.manual_seed, check_seed):
        with pytest.raises(ValueError, match=r"a seed is an int from -2\*\*63 to 2\*\*64 - 1"):
            refused(seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_takes_effect_in_program_order(bob: VirtualWorker, alice: VirtualWorker) -> None:
    p = tensor(X).send(bob)
    pp = p.send(alice)
    bob.manual_seed(1)
    before = rand_like(pp)
    bob.manual_seed(2)
    after = rand_like(pp)
    assert same([before.get()], local(1, rand_like))
    assert same([after.get()], local(2, rand_like))


def test_all_at_once(bob: VirtualWorker, alice: VirtualWorker) -> None:
    pointers = [tensor(X).send(bob), tensor(X).send(alice)]
    VirtualWorker(id="gone").close()
    with torch.random.fork_rng(devices=[]):
        assert farpoint.manual_seed(-3) is torch.default_generator
        expected = local(-3, randn_like)
        assert torch.equal(randn_like(X), expected[0])
        for p in pointers:
            assert same([randn_like(p)], expected)


def test_a_failed_draw_raises_and_the_next_one_works(bob: VirtualWorker) -> None:
    p = tensor(X).send(bob)
    before = torch.get_rng_state()
    bad: Any = torch.multinomial(p, 20)
    with pytest.raises(farpoint.RemoteExecutionError, match="cannot sample"):
        bad.get()
    bob.manual_seed(1)
    assert same([rand_like(p)], local(1, rand_like))
    assert torch.equal(torch.get_rng_state(), before)


class TestIsolated:
    """Operations in other processes."""

    def test_each_session_has_a_generator(self, isolated: Place, alice: VirtualWorker) -> None:
        p = tensor(X).send(isolated)
        pp = p.send(alice)
        isolated.manual_seed(1)
        found = []
        for _ in range(3):
            found.append(rand_like(p))
            rand_like(pp)  # of alice's session
        assert same(found, local(1, *[rand_like] * 3))

    def test_a_process_may_end_in_between(self, isolated: Place) -> None:
        p = tensor(X).send(isolated)
        isolated.manual_seed(1)
        one = rand_like(p)
        isolated.synchronize()
        isolated.executor.rest()
        assert same([one, rand_like(p)], local(1, *[rand_like] * 2))

    def test_an_operation_that_draws_nothing_leaves_it(self, isolated: Place) -> None:
        p = tensor(X).send(isolated)
        isolated.manual_seed(1)
        one = rand_like(p)
        p + p
        assert same([one, rand_like(p)], local(1, *[rand_like] * 2))


def test_a_model_trains_as_it_does_here(bob: VirtualWorker) -> None:
    def train(place: Callable[[torch.Tensor], Any]) -> list[Any]:
        weight = place(torch.ones(4, 2) / 4).detach().requires_grad_()
        step = torch.optim.SGD([weight], lr=0.1)
        data = place(X)
        for _ in range(5):
            step.zero_grad()
            loss = functional.dropout(data @ weight, 0.5).sub(1).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            step.step()
        return [weight.detach()]

    with torch.random.fork_rng(devices=[]):
        farpoint.manual_seed(11)
        expected = train(torch.clone)
        assert same(train(lambda x: tensor(x).send(bob)), expected)
