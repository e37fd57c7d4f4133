"""Plans: one message for each step and worker, the same numbers as without, and a clear refusal of what cannot be one."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import farpoint
from farpoint import PlanError, VirtualWorker
from farpoint.answers import Reply
from farpoint.limits import Limits
from farpoint.macro import apart, pack, step_number
from farpoint.peer import RUN, SYNC, Peer
from farpoint.protocol.messages import Kind
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
        (number,) = mallory.say([RUNPLAN, 0, pack([1, 101, 3, 4]), [5], b""])
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
