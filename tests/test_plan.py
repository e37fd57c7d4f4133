"""Plans: one message for each step and worker, the same numbers as without, and a clear refusal of what cannot be one."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import farpoint
from farpoint import PlanError, VirtualWorker
from farpoint.answers import Reply
from farpoint.channel import BATCH
from farpoint.limits import Limits
from farpoint.macro import apart, pack, step_number
from farpoint.peer import RUN, SYNC, Peer
from farpoint.protocol.messages import Kind
from farpoint.submission import send_plan
from farpoint.terms import read_terms
from farpoint.worker import Worker
from wire import RawClient, check_books, new_worker, stocked

farpoint.TorchHook(torch)
F: Any = nn.functional
STEPS = 20
PLAN, RUNPLAN, RELEASE = int(Kind.PLAN), int(Kind.RUNPLAN), int(Kind.RELEASE)


class Layer(nn.Module):
    """A layer of a transformer, between an embedding and a classifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.layer(self.words(x)).mean(1))
        return out


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(3)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)), torch.randn(12, 4, generator=chance())),
    "CNN": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
        torch.randn(12, 1, 8, 8, generator=chance()),
    ),
    "Transformer": (Layer, torch.randint(0, 11, (12, 5), generator=chance())),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
LABELS = torch.randint(0, 3, (12,), generator=chance())


class Traffic:
    """What this process tells its workers, by kind, and how often it waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[int] = []
        self.waits = 0
        wait = Peer.wait

        def waited(peer: Peer, reply: Reply, *args: Any) -> Any:
            self.waits += reply.asked[0] != SYNC  # that one is for the window, every 2,048 commands
            return wait(peer, reply, *args)

        monkeypatch.setattr(Peer, "wait", waited)
        self._monkeypatch = monkeypatch

    def watch(self, *workers: VirtualWorker) -> None:
        for worker in workers:
            session = worker.peer.channel.session
            submit = session.submit

            def submitted(message: list[Any], submit: Callable[[list[Any]], int] = submit) -> int:
                if message[0] != SYNC:
                    self.told.append(message[0])
                elif self.told[-1:] == [RELEASE]:  # the window's, every 2,048 commands
                    self.told.pop()
                return submit(message)

            self._monkeypatch.setattr(session, "submit", submitted)

    def of(self, call: Callable[[], Any]) -> tuple[Any, list[int], int]:
        """Return what a call returns, the kinds of messages that it sent, and how often it waited."""
        self.told.clear()
        self.waits = 0
        result = call()
        return result, list(self.told), self.waits


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="bob") as made:
        yield made


@pytest.fixture
def alice() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="alice") as made:
        yield made


def send(x: Any, *workers: Any) -> Any:
    for worker in workers:
        x = x.send(worker)
    return x


def user(source: str, **names: Any) -> dict[str, Any]:
    """Run lines as those of a user's file, and return its names."""
    linecache.cache["user.py"] = (len(source), None, source.splitlines(keepends=True), "user.py")
    exec(compile(source, "user.py", "exec"), names)  # noqa: S102  # the source is a test's own
    return names


class TestTraining:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("name", MODELS)
    def test_steps_are_one_message_and_what_they_are_here(self, bob: VirtualWorker, traffic: Traffic, name: str, optimizer: str) -> None:
        make, x = MODELS[name]
        torch.manual_seed(1)
        models: list[Any] = [make()]
        models += [copy.deepcopy(models[0]) for _ in range(2)]
        curves: list[list[Any]] = []
        for way, model in zip(("here", "fresh", "plan"), models, strict=True):
            if way != "here":
                model.send(bob)
            x_, y_ = (x, LABELS) if way == "here" else (send(x, bob), send(LABELS, bob))
            optim = OPTIMIZERS[optimizer](model.parameters())

            def train(x: Any, y: Any, model: Any = model, optim: Any = optim) -> Any:
                optim.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optim.step()
                return loss

            step: Any = train
            if way == "plan":
                step = farpoint.plan(train)
                traffic.watch(bob)
            losses, told, waits = [], [], 0
            for _ in range(STEPS):
                loss, kinds, waited = traffic.of(functools.partial(step, x_, y_))
                losses.append(loss)
                told.append(kinds)
                waits += waited
            curves.append([loss.detach().get() if way != "here" else loss.detach() for loss in losses])
            if way == "plan":
                assert told[3:] == [[RUNPLAN]] * (STEPS - 3) and PLAN in told[2] and not waits
                assert step.replays == STEPS - 2
        for model in models[1:]:
            model.get()
            assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), model.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*curves, strict=True))
        del loss, losses, step, train, optim, x_, y_, models, model
        gc.collect()
        assert len(bob) == 0


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(bob: Any, way: Callable[[Any], Any], build: Callable[[Any], Callable[[Any, Any], Any]], calls: int = 12) -> list[torch.Tensor]:
    """Train a model on bob by calls of a function, and return what it has become."""
    model: Any = mlp().send(bob)  # type: ignore[operator]  # the hook's
    x, y = send(torch.randn(12, 4, generator=chance()), bob), send(LABELS, bob)
    step = way(build(model))
    for _ in range(calls):
        step(x, y)
    model.get()
    return list(model.state_dict().values())


def sgd(model: Any) -> Callable[[Any, Any], Any]:
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        optim.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optim.step()
        return loss

    return step


def scheduled(model: Any) -> Callable[[Any, Any], Any]:
    optim = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optim, 0.2, total_steps=30)

    def step(x: Any, y: Any) -> None:
        optim.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        optim.step()
        scheduler.step()

    return step


def accumulated(model: Any) -> Callable[[Any, Any], Any]:
    """Four micro-batches to a step; the Python counter decides."""
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    count = [0]

    def step(x: Any, y: Any) -> None:
        start = count[0] % 4 * 3
        loss = F.cross_entropy(model(x[start : start + 3]), y[start : start + 3])
        loss.backward()
        count[0] += 1
        if count[0] % 4 == 0:
            optim.step()
            optim.zero_grad()

    return step


def dropped(model: Any) -> Callable[[Any, Any], Any]:
    model.insert(1, nn.Dropout(0.5))
    farpoint.manual_seed(7)
    return sgd(model)


class TestLoops:
    """Training loops as people write them."""

    @pytest.mark.parametrize("verify", [False, True, 3])
    @pytest.mark.parametrize("build", [sgd, scheduled, accumulated, dropped])
    def test_a_plan_does_what_a_fresh_run_does(self, bob: VirtualWorker, build: Any, verify: Any) -> None:
        made: list[Any] = []

        def way(step: Any) -> Any:
            made.append(farpoint.plan(verify=verify)(step))
            return made[0]

        plain, planned = trained(bob, lambda step: step, build), trained(bob, way, build)
        assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
        assert made[0].replays >= 4
        del way
        made.clear()
        gc.collect()
        assert len(bob) == 0

    @pytest.mark.parametrize("verify", [False, True, 5])
    @pytest.mark.parametrize("build", [sgd, dropped])
    def test_a_frozen_one_too(self, bob: VirtualWorker, build: Any, verify: Any) -> None:
        made: list[Any] = []

        def way(step: Any) -> Any:
            made.append(farpoint.plan(frozen=True, verify=verify)(step))
            return made[0]

        plain, planned = trained(bob, lambda step: step, build), trained(bob, way, build)
        assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
        assert made[0].runs == {False: 3, True: 12, 5: 5}[verify] and made[0].replays == 10
        made.clear()
        gc.collect()
        assert len(bob) == 0


class TestFrozen:
    @pytest.fixture
    def setting(self, bob: VirtualWorker) -> tuple[Any, ...]:
        """Return a model, its optimizer, data, and the frozen plan of a step that is replayed already."""
        model: Any = mlp().send(bob)  # type: ignore[operator]  # the hook's
        optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x: Any, y: Any) -> Any:
            optim.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optim.step()
            return loss

        frozen = farpoint.plan(frozen=True)(step)
        x, y = send(torch.randn(12, 4, generator=chance()), bob), send(LABELS, bob)
        for _ in range(5):
            frozen(x, y)
        assert (frozen.runs, frozen.replays) == (3, 3)
        return model, optim, x, y, frozen

    @staticmethod
    def twin(setting: Any) -> tuple[Any, Any, Callable[[], None]]:
        """Return a model and an optimizer here that are what those there are, and a step of them."""
        model, optim, x, y, _ = setting
        here: Any = mlp()
        for own, other in zip(here.parameters(), model.parameters(), strict=True):
            own.data.copy_(other.detach().get(keep=True))
            own.grad = other.grad.get(keep=True)
        optim_here = torch.optim.SGD(here.parameters(), lr=0.1, momentum=0.9)
        for own, other in zip(here.parameters(), model.parameters(), strict=True):
            optim_here.state[own]["momentum_buffer"] = optim.state[other]["momentum_buffer"].get(keep=True)
        x_here, y_here = x.get(keep=True), y.get(keep=True)

        def step() -> None:
            optim_here.zero_grad()
            F.cross_entropy(here(x_here), y_here).backward()
            optim_here.step()

        return here, optim_here, step

    @staticmethod
    def equal(model: Any, here: Any) -> bool:
        grads = all(torch.equal(a.grad.get(keep=True), b.grad) for a, b in zip(model.parameters(), here.parameters(), strict=True))
        return grads and all(torch.equal(a.detach().get(keep=True), b) for a, b in zip(model.parameters(), here.parameters(), strict=True))

    def test_what_it_leaves_is_the_latest(self, setting: Any) -> None:
        model, optim, x, y, frozen = setting
        here, optim_here, step = self.twin(setting)
        grads = [id(p.grad) for p in model.parameters()]
        for _ in range(3):
            loss = frozen(x, y)
            step()
            assert self.equal(model, here)
        assert grads == [id(p.grad) for p in model.parameters()] and frozen.runs == 3
        assert loss.grad_fn is None and not loss.requires_grad
        # What is done with it by hand goes on from there.
        optim.step()
        optim_here.step()
        assert self.equal(model, here)
        frozen(x, y)
        step()
        assert self.equal(model, here) and frozen.runs == 3

    def test_what_is_given_up_is_recorded_anew(self, bob: VirtualWorker, setting: Any) -> None:
        model, optim, x, y, frozen = setting
        here, _, step = self.twin(setting)
        optim.zero_grad()
        frozen(x, y)
        step()
        assert self.equal(model, here) and frozen.runs == 4, "a gradient that was None is made by a run"
        model.get()
        model.send(bob)
        for _ in range(4):
            frozen(x, y)
            step()
            assert self.equal(model, here)
        assert frozen.runs > 4 and frozen.replays > 3

    def test_another_shape_is_another_recording(self, setting: Any) -> None:
        model, _, x, y, frozen = setting
        kept = [p.grad for p in model.parameters()]
        for _ in range(4):
            frozen(x[:6], y[:6])
        assert frozen.runs == 5, "and two are enough to replay it"
        here, _, step = self.twin(setting)
        frozen(x, y)
        step()
        assert self.equal(model, here), "what the other recording has left is not what this one would find"
        frozen(x, y)
        step()
        assert self.equal(model, here) and frozen.runs == 6
        del kept

    def test_what_is_spent_is_looked_for_again(self, bob: VirtualWorker) -> None:
        names = user("def f(p):\n    return p * w\n", w=send(torch.full((2,), 3.0), bob))
        frozen = farpoint.plan(frozen=True)(names["f"])
        p = send(torch.ones(2), bob)
        for _ in range(3):
            frozen(p)
        names["w"] = send(names["w"].get() + 1, bob)
        for _ in range(3):
            assert frozen(p).get().tolist() == [4, 4]
        assert frozen.runs == 4

    def test_one_tensor_for_two_arguments_is_another_call(self, bob: VirtualWorker) -> None:
        frozen = farpoint.plan(frozen=True)(lambda a, b: a.mul_(2) + b)
        p, q = send(torch.ones(2), bob), send(torch.ones(2), bob)
        assert [frozen(p, q).get()[0].item() for _ in range(3)] == [3, 5, 9]
        assert [frozen(q, q).get()[0].item() for _ in range(3)] == [4, 8, 16]
        assert frozen.runs == 4

    def test_garbage_is_nothing_that_is_left(self, bob: VirtualWorker) -> None:
        def f(p: Any) -> Any:
            ring: list[Any] = [p + 1]
            ring.append(ring)
            return p * 2

        frozen = farpoint.plan(frozen=True)(f)
        p = send(torch.ones(2), bob)
        gc.disable()
        try:
            for _ in range(2):
                frozen(p)
        finally:
            gc.enable()
        gc.collect()
        for _ in range(3):
            frozen(p)
        assert frozen.runs == 2 and len(bob) == 1

    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_worker_that_does_something_else_is_found_by_verify(
        self, bob: VirtualWorker, frozen: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = user("def f(p):\n    p.add_(1)\n    return (p * 0.5).sum()\n")
        f = farpoint.plan(frozen=frozen, verify=True)(names["f"])
        p = send(torch.zeros(2), bob)
        for _ in range(3):
            f(p)

        def wrong(peer: Any, registration: Any, stream: Any, ids: Any, values: list[Any], given_up: Any, *, fresh: bool) -> None:
            send_plan(peer, registration, stream, ids, [*values[:-1], 0.25], given_up, fresh=fresh)

        monkeypatch.setattr("farpoint.verification.send_plan", wrong)
        with pytest.raises(PlanError, match=r"gives another result of aten::sum\.default as a plan than one by one") as caught:
            f(p)
        assert caught.value.where == "user.py:3"
        caught.value.__traceback__ = None
        assert p.get(keep=True).tolist() == [4, 4], "the call has taken effect, once"

    def test_results_are_new_each_time(self, setting: Any) -> None:
        *_, x, y, frozen = setting
        losses = [frozen(x, y) for _ in range(3)]
        values = [loss.get().item() for loss in losses]
        assert len(set(values)) == 3 and values == sorted(values, reverse=True)

    def test_a_changed_number_is_found_by_verify(self, setting: Any) -> None:
        model, optim, x, y, frozen = setting
        here, optim_here, step = self.twin(setting)
        optim_here.param_groups[0]["lr"] = optim.param_groups[0]["lr"] = 0.05
        frozen.verify = True
        with pytest.raises(PlanError, match=r"does something else now: the number -0\.1 the one time and -0\.05 the other") as caught:
            frozen(x, y)
        assert caught.value.where.startswith(__file__)
        caught.value.__traceback__ = None
        step()
        assert self.equal(model, here), "the call has taken effect as the function says"
        frozen(x, y)
        step()
        assert self.equal(model, here)

    def test_a_number_that_changes_each_time_is_refused_with_its_line(self, bob: VirtualWorker) -> None:
        names = user("n = 0.5\ndef f(p):\n    global n\n    n = n + 1\n    return p * n\n")
        frozen = farpoint.plan(frozen=True)(names["f"])
        p = send(torch.ones(2), bob)
        found = [frozen(p).get()[0].item() for _ in range(9)]
        assert found == [n + 1.5 for n in range(9)], "until then it is run, and right"
        with pytest.raises(PlanError, match=r"in each of its last 8 calls.* the number 8\.5 the one time and 9\.5 the other") as caught:
            frozen(p)
        assert caught.value.where == "user.py:5" and names["n"] == 9.5

    def test_it_holds_what_it_uses_until_it_dies(self, bob: VirtualWorker) -> None:
        names = user("def f(p):\n    return p * w\n", w=send(torch.full((2,), 3.0), bob))
        frozen = farpoint.plan(frozen=True)(names["f"])
        p = send(torch.ones(2), bob)
        for _ in range(3):
            frozen(p)
        del names["w"]
        assert frozen(p).get().tolist() == [3, 3] and frozen.runs == 2
        assert len(bob) == 2
        del frozen, names
        gc.collect()
        assert len(bob) == 1

    def test_a_state_that_is_replaced_by_each_call(self, bob: VirtualWorker) -> None:
        state = {"mean": send(torch.zeros(2), bob)}

        @farpoint.plan(frozen=True)
        def update(p: Any) -> None:
            state["mean"] = state["mean"] * 0.5 + p

        for n in range(1, 9):
            update(send(torch.full((2,), float(n)), bob))
            expected = sum(k * 0.5 ** (n - k) for k in range(1, n + 1))
            assert state["mean"].get(keep=True).tolist() == [expected] * 2
        assert update.runs < 6
        assert len(bob) == 1

    def test_autograd_notices_what_a_replay_writes(self, setting: Any) -> None:
        model, _, x, y, frozen = setting
        loss = F.cross_entropy(model(x), y)
        frozen(x, y)
        assert frozen.runs == 3
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestCalls:
    def test_a_failure_names_the_line_in_the_function(self, bob: VirtualWorker) -> None:
        for frozen in (False, True):
            names = user("import torch\ndef f(p):\n    a = p + 1\n    b = torch.linalg.inv(a)\n    return b * 2\n")
            f = farpoint.plan(frozen=frozen)(names["f"])
            good, bad = send(torch.eye(2), bob), send(torch.zeros(2, 2), bob)
            for _ in range(4):
                f(good)
            assert f.replays > 1
            result = f(bad)
            with pytest.raises(farpoint.RemoteExecutionError, match="singular") as caught:
                result.get()
            assert caught.value.line == "user.py:4"
            caught.value.__traceback__ = None
            assert torch.equal(f(good).get(), torch.linalg.inv(torch.eye(2) + 1) * 2)
            del result

    def test_an_error_of_the_function(self, bob: VirtualWorker) -> None:
        done = []

        @farpoint.plan
        def f(p: Any, fail: bool) -> Any:
            done.append(p.add_(1))
            if fail:
                raise ValueError("no")
            return p * 2

        p = send(torch.zeros(2), bob)
        for n in range(8):
            if n % 3 == 2:
                with pytest.raises(ValueError, match="no"):
                    f(p, True)
            else:
                assert f(p, False).get()[0].item() == 2 * (n + 1)
        assert f.replays == 5

    def test_methods_nesting_and_names(self, bob: VirtualWorker) -> None:
        class Net:
            def __init__(self, w: Any) -> None:
                self.w = w

            @farpoint.plan
            def double(self, p: Any) -> Any:
                """Twice."""
                return p * self.w

            @farpoint.plan
            def four(self, p: Any) -> Any:
                return self.double(self.double(p))

        net, other = Net(send(torch.tensor(2.0), bob)), Net(send(torch.tensor(3.0), bob))
        p = send(torch.ones(2), bob)
        for _ in range(4):
            assert net.four(p).get()[0] == 4 and other.four(p).get()[0] == 9
        assert Net.four.replays == 7 and Net.double.calls == 0
        assert Net.double.__name__ == "double" and Net.double.__doc__ == "Twice."
        assert "7 of 8 calls were one message" in repr(Net.four)

    def test_blocking_calls_are_no_plans(self, bob: VirtualWorker) -> None:
        f = farpoint.plan(lambda p: p + 1)
        p = send(torch.ones(2), bob)
        with farpoint.blocking():
            for _ in range(4):
                assert f(p).get().tolist() == [2, 2]
        assert f.calls == 0

    def test_what_never_repeats_is_refused(self, bob: VirtualWorker) -> None:
        names = user("n = 0\ndef f(p):\n    global n\n    n += 1\n    return p[:n] + 1\n")
        f = farpoint.plan(names["f"])
        p = send(torch.ones(20), bob)
        for _ in range(9):
            f(p)
        with pytest.raises(PlanError, match=r"in each of its last 8 calls.* with other constants") as caught:
            f(p)
        assert caught.value.where == "user.py:5" and names["n"] == 9
        assert f(p).shape == (10,), "who insists may go on"

    def test_two_ways_to_one_worker_are_refused(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        p = send(torch.ones(2), bob)
        pp = send(p, alice)

        @farpoint.plan
        def f() -> Any:
            pp.add_(1)
            return p * 2

        with pytest.raises(PlanError, match="reaches one worker by two ways"):
            f()
        assert p.get(keep=True).tolist() == [2, 2]

        for frozen in (False, True):
            p.zero_()
            g = farpoint.plan(frozen=frozen)(lambda: p.add_(1))
            for _ in range(4):  # each by the other way than the call before
                pp.mul_(2)
                g()
            assert p.get(keep=True).tolist() == [15, 15] and g.replays == 3

    def test_another_thread_sends_meanwhile(self, bob: VirtualWorker) -> None:
        outer = send(torch.ones(2), bob)

        @farpoint.plan
        def f(p: Any) -> Any:
            nonlocal outer
            old, outer = outer, p * 2
            q = old + p
            del old
            thread = threading.Thread(target=bob.flush)
            thread.start()
            thread.join()
            return q * outer

        p = send(torch.ones(2), bob)
        results = [f(p).get().tolist() for _ in range(5)]
        assert results == [[4, 4], *([[6, 6]] * 4)] and f.replays == 4
        assert len(bob) == 2

    def test_a_long_plan_goes_on_along_a_chain_in_packets_that_are_taken(
        self, bob: VirtualWorker, alice: VirtualWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @farpoint.plan
        def f(p: Any) -> None:
            for _ in range(1500):
                p.add_(1)

        pp = send(torch.zeros(2), bob, alice)
        for _ in range(3):
            f(pp)
        (peer,) = alice._worker.peers.values()
        pack_all, sizes = peer.channel.session.pack, []

        def packed(most: int | None = None) -> list[Any] | None:
            packet = pack_all(most)
            sizes.append(len(packet[3]) if packet is not None else 0)
            return packet

        monkeypatch.setattr(peer.channel.session, "pack", packed)
        asked: list[int] = []
        ask = Peer.ask

        def asks(peer: Peer, message: list[Any], *rest: Any, **named: Any) -> Reply:
            asked.append(message[0])
            return ask(peer, message, *rest, **named)

        monkeypatch.setattr(Peer, "ask", asks)
        for _ in range(5):
            f(pp)
        assert asked.count(SYNC) >= 2, "7,500 commands are under way, not 5"
        assert f.replays == 7 and max(sizes) == 2 * BATCH and sum(sizes) >= 7500
        assert pp.get().get().tolist() == [12_000, 12_000]

    def test_a_worker_of_before_gets_no_plans(self) -> None:
        terms = read_terms({"limits": {"templates": 5}}, "", Limits())
        assert terms.limits.plans == 0 and terms.limits.templates == 5
        assert read_terms({"limits": {"plans": 7}}, "", Limits()).limits.plans == 7
        assert read_terms({"limits": {"plans": -1}}, "", Limits()).limits.plans == Limits().plans

    def test_more_templates_than_slots(self, bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bob.peer, "limits", attrs.evolve(bob.peer.limits, templates=2))
        p = send(torch.arange(6.0), bob)
        f = farpoint.plan(lambda q: q.abs().sqrt())
        for _ in range(5):
            assert torch.equal(f(p).get(), torch.arange(6.0).sqrt())
            kept = [p.exp(), p.abs(), p.sin()]  # abs has the older one of the two slots then, and sqrt none
        assert f.replays == 4
        del kept

    def test_too_many_commands(self, bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bob.peer, "limits", attrs.evolve(bob.peer.limits, plan_commands=3))
        names = user("def f(p, n):\n    for _ in range(n):\n        p.add_(1)\n    return p\n")
        f = farpoint.plan(names["f"])
        p = send(torch.zeros(2), bob)
        for _ in range(3):
            f(p, 3)
        with pytest.raises(PlanError, match="issues more than 3 commands to bob") as caught:
            f(p, 4)
        assert caught.value.where == "user.py:3" and f.replays == 2 and p.get().tolist() == [12, 12]

    def test_a_worker_takes_only_so_many_plans(self, bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bob.peer, "limits", attrs.evolve(bob.peer.limits, plans=2))
        p = send(torch.ones(2), bob)
        plans: list[Any] = [farpoint.plan(lambda q, n=n: q + n) for n in range(3)]
        plans = [farpoint.plan(f) for f in (lambda q: q + 1, lambda q: q * 2, lambda q: q - 1)]
        for f in plans:
            for _ in range(3):
                f(p)
        assert [f.replays for f in plans] == [2, 2, 0], "then one by one"
        (guest,) = bob._worker.guests.values()
        assert set(guest.macros) == {0, 1}
        del f
        del plans[0]
        gc.collect()
        bob.synchronize()
        assert set(guest.macros) == {1}, "who is gone makes room"
        plans[1](p)
        assert plans[1].replays == 1

    def test_a_new_life_of_the_worker(self, bob: VirtualWorker) -> None:
        for frozen in (False, True):
            names: dict[str, Any] = {"model": mlp().send(bob)}  # type: ignore[operator]  # the hook's
            f = farpoint.plan(frozen=frozen)(lambda p, names=names: names["model"](p))
            p = send(torch.ones(2, 4), bob)
            expected = [f(p).detach().get() for _ in range(4)]
            with pytest.warns(UserWarning, match="replaced"):
                bob = VirtualWorker(id="bob")
            with pytest.raises(farpoint.WorkerLostError) as caught:
                f(p)
            assert any(entry.name == "<lambda>" for entry in caught.traceback), "on the line that issues the first command"
            caught.value.__traceback__ = None
            names["model"] = mlp().send(bob)  # type: ignore[operator]  # the hook's
            p = send(torch.ones(2, 4), bob)
            assert all(torch.equal(f(p).detach().get(), expected[0]) for _ in range(4))
            assert f.replays > 3
        bob.close()


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("if (p > 0).all(): p = p + 1", "needs a value"),
            ("float(p.sum())", "needs a value"),
            ("with farpoint.allow_scalars(): float(p.sum())", "reads a value"),
            ("p[p > 0]", "needs a shape that depends on data"),
            ("p.get(keep=True)", "reads a value"),
            ("torch.ones(2).send(bob)", "sends a tensor"),
            ("p.send(alice)", "waits"),
            ("p.move(alice)", "moves data"),
            ("bob.synchronize()", "waits"),
            ("bob.search('#x')", "asks or tells"),
        ],
    )
    def test_what_cannot_be_a_part(self, bob: VirtualWorker, alice: VirtualWorker, line: str, reason: str) -> None:
        names = user(
            f"def f(p):\n    global q\n    q = p * 2\n    {line}\n    return p + 1\n", farpoint=farpoint, torch=torch, bob=bob, alice=alice
        )
        f = farpoint.plan(names["f"])
        p = send(torch.ones(2), bob)
        for _ in range(3):
            with pytest.raises(PlanError, match=reason) as caught:
                f(p)
            assert caught.value.where == "user.py:4" and caught.value.plan == "f"
            assert names["q"].get(keep=True).tolist() == [2, 2], "what came before has taken effect"
        assert p.get(keep=True).tolist() == [1, 1] and f.replays == 0
        caught.value.__traceback__ = None


class TestMessages:
    """What a worker does with messages that no client of ours sends."""

    @pytest.fixture
    def worker(self) -> Iterator[Worker]:
        made = new_worker(limits=Limits(bad_requests=10**9, plans=3, plan_commands=4, template_items=60))
        yield made
        check_books(made)
        made.close()

    @pytest.fixture(params=["msgpack", "torch"])
    def mallory(self, request: pytest.FixtureRequest, worker: Worker) -> RawClient:
        client = stocked(RawClient(worker.url, request.param))
        client.say([int(Kind.DEFINE), 1, "aten::add.Tensor", [["t"], ["s"]], {}], [PLAN, 0, [[0, [0, 1], [2]], [1, [2, -1], [3]]]])
        return client

    def test_a_plan(self, worker: Worker, mallory: RawClient) -> None:
        mallory.say([RUNPLAN, 0, pack([1, 2, 3, 4]), [5], pack([3, 1])])
        assert mallory.ask([int(Kind.FETCH), 4])[1].tolist() == [7, 7]
        assert set(worker.store) == {2, 4}

    @pytest.mark.parametrize(
        ("message", "error", "text"),
        [
            ([RUNPLAN, 1, pack([1, 2, 3, 4]), [5], b""], "MalformedMessageError", "plan must be one that was registered"),
            ([RUNPLAN, 0, pack([1, 2, 3]), [5], b""], "MalformedMessageError", "ids must be 4 different ones"),
            ([RUNPLAN, 0, pack([1, 1, 3, 4]), [5], b""], "MalformedMessageError", "ids must be 4 different ones"),
            ([RUNPLAN, 0, pack([1, 2, 3, 0]), [5], b""], "MalformedMessageError", "ids must be ids"),
            ([RUNPLAN, 0, pack([1, 2, 3, 2**63]), [5], b""], "MalformedMessageError", "ids must be ids"),
            ([RUNPLAN, 0, pack([1, 2, 3, 4])[:-1], [5], b""], "MalformedMessageError", "ids must be bytes, 8 for each id"),
            ([RUNPLAN, 0, pack([1, 2, 3, 4]), [], b""], "MalformedMessageError", "values must be 1 of them"),
            ([RUNPLAN, 0, pack([1, 2, 3, 4]), [5, 6], b""], "MalformedMessageError", "values must be 1 of them"),
            ([RUNPLAN, 0, pack([1, 2, 3, 4]), ["x"], b""], "MalformedMessageError", r"values\[0\] must be"),
            ([RUNPLAN, 0, pack([1, 2, 3, 4]), [5], pack([0])], "MalformedMessageError", "released must be ids"),
            ([PLAN, 3, [[0, [0, 1], [2]]]], "MalformedMessageError", "plan must be below 3"),
            ([PLAN, 1, [[5, [0, 1], [2]]]], "MalformedMessageError", "slot must be one that was defined"),
            ([PLAN, 1, [[0, [0, 1], [2, 2]]]], "MalformedMessageError", "results must be places, each at most once"),
            ([PLAN, 1, [[0, [0, -2], [2]]]], "MalformedMessageError", "a list of a slot, operands and results"),
            ([PLAN, 1, [[0, [0, True], [2]]]], "MalformedMessageError", "a list of a slot, operands and results"),
            ([PLAN, 1, [[0, [0, 1], [2]]] * 5], "LimitError", "plan_commands"),
            ([PLAN, 1, [[0, list(range(60)), [2]]]], "LimitError", "template_items"),
        ],
    )
    def test_what_is_none(self, worker: Worker, mallory: RawClient, message: Any, error: str, text: str) -> None:
        assert mallory.error(message)[0] == error
        assert re.search(text, mallory.error(message)[1])
        assert set(worker.store) == {1, 2} and not worker.poisoned
        mallory.say([RUNPLAN, 0, pack([1, 2, 3, 4]), [5], b""])
        assert set(worker.store) == {1, 2, 3, 4}, "the plan that was there is there"
        assert not mallory.over

    def test_what_fails_poisons_its_own_results_and_says_which(self, worker: Worker, mallory: RawClient) -> None:
        other = stocked(RawClient(worker.url), 101, 102)
        guest = worker.guests[mallory.holder]
        said = guest.channel.session.submitted
        (number,) = mallory.say([RUNPLAN, 0, pack([1, 101, 3, 4]), [5], b""])
        assert guest.channel.session.submitted == said + 1, "what follows from it is not told again"
        failure = mallory.answers[number][1]
        assert failure["kind"] == "ObjectNotFoundError" and failure["step"] == 1 and not failure["orphan"]
        assert set(worker.poisoned) == {3, 4} and worker.poisoned[3]["uid"] == worker.poisoned[4]["uid"]
        (number,) = mallory.say([RUNPLAN, 0, pack([1, 2, 3, 5]), [5], pack([3, 4])])
        assert mallory.answers[number][1]["step"] == 1, "an id that is taken"
        assert set(worker.store) == {1, 2, 101, 102} and set(worker.poisoned) == {5}, "what is given up may carry an error"
        assert other.ask([int(Kind.FETCH), 101])[0] == "tensor"

    def test_a_template_that_is_defined_anew_is_not_that_of_the_plan(self, worker: Worker, mallory: RawClient) -> None:
        mallory.say([int(Kind.DEFINE), 0, "aten::mul.Tensor", [["t"], ["t"]], {}], [RUNPLAN, 0, pack([1, 2, 3, 4]), [5], b""])
        assert mallory.ask([int(Kind.FETCH), 3])[1].tolist() == [2, 2]

    def test_a_refused_template_says_why(self, worker: Worker, mallory: RawClient) -> None:
        mallory.say([int(Kind.DEFINE), 2, "aten::from_file.default", [], {}], [PLAN, 2, [[2, [], [0]], [0, [1, 2], [3]]]])
        (number,) = mallory.say([RUNPLAN, 2, pack([9, 1, 2, 10]), [], b""])
        assert mallory.answers[number][1]["kind"] == "OperationNotAllowedError"
        assert set(worker.poisoned) == {9} and 10 in worker.store, "the others go on"

    def test_a_forgotten_plan(self, worker: Worker, mallory: RawClient) -> None:
        mallory.say([PLAN, 0, []])
        assert mallory.error([RUNPLAN, 0, pack([1, 2, 3, 4]), [5], b""])[0] == "MalformedMessageError"

    def test_steps_have_numbers(self) -> None:
        assert apart(7) == (7, 0) and apart(step_number(2**63 - 1, 8192)) == (2**63 - 1, 8192)
        assert RUN != RUNPLAN
