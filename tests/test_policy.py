"""The policies of a worker: what is refused has not happened, and whoever asked for it is told."""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farpoint
from farpoint import PointerTensor, VirtualWorker
from farpoint.catalogue import note_of
from farpoint.errors import (
    FarpointError,
    GetNotPermittedError,
    PermissionDeniedError,
    TransportError,
    UnseenErrorWarning,
)
from farpoint.listing import fetch_listing
from farpoint.plugins import PluginManager, hookimpl, plugins
from farpoint.plugins.hookspecs import ACTIONS
from farpoint.testing.transport import eventually
from farpoint.worker import Worker

farpoint.TorchHook(torch)
numbers = itertools.count()

Asked = tuple[str, str, Any, str]


class Policy:
    """Asks a function, and writes down what it was asked."""

    def __init__(self, decide: Callable[[Asked], Any] = lambda asked: None) -> None:
        self.asked: list[Asked] = []
        self.decide = decide

    @hookimpl
    def farpoint_authorize(self, action: str, subject: str, object: int | str, worker: str) -> Any:
        asked = (action, subject, object, worker)
        self.asked.append(asked)
        return self.decide(asked)


class Net:
    """Two workers, and what their policies are."""

    def __init__(self) -> None:
        n = next(numbers)
        self.bob, self.alice = VirtualWorker(id=f"bob-{n}"), VirtualWorker(id=f"alice-{n}")
        self.policies: list[Policy] = []

    def enforce(self, decide: Callable[[Asked], Any] = lambda asked: None) -> Policy:
        policy = Policy(decide)
        plugins.register(policy)
        self.policies.append(policy)
        return policy

    def refuse(self, *actions: str, worker: VirtualWorker | None = None) -> Policy:
        """Refuse these actions, on one worker or on both."""
        where = [w.id for w in ([worker] if worker else [self.bob, self.alice])]
        return self.enforce(lambda asked: f"no {asked[0]}, please" if asked[0] in actions and asked[3] in where else None)

    def lift(self) -> None:
        while self.policies:
            plugins.unregister(self.policies.pop())

    def sizes(self) -> list[int]:
        gc.collect()
        return [len(self.bob._objects), len(self.alice._objects)]


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.lift()
    net.bob.close()
    net.alice.close()


def data() -> Any:
    return torch.arange(1.0, 6.0)


def home(tensor: Any) -> torch.Tensor:
    while isinstance(tensor, PointerTensor):
        tensor = tensor.get()
    return tensor  # type: ignore[no-any-return]


class TestDenial:
    """Each action: a clear error at the caller, and nothing has happened."""

    def check(self, caught: Any, worker: VirtualWorker, action: str) -> None:
        error = caught.value
        assert (error.worker, error.action, error.reason) == (worker.id, action, f"no {action}, please")
        assert f"{worker.id} does not permit {action}: no {action}, please. Nothing has happened there." in str(error)
        assert error.origin == worker.id

    def test_get(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("get")
        for keep in (True, False):
            with pytest.raises(GetNotPermittedError) as caught:
                p.get(keep=keep)
            self.check(caught, net.bob, "get")
        assert net.sizes() == [1, 0]
        net.lift()
        assert torch.equal(p.get(), data())

    def test_get_of_a_pointer(self, net: Net) -> None:
        pp = data().send(net.bob).send(net.alice)
        net.refuse("get", worker=net.alice)
        with pytest.raises(GetNotPermittedError) as caught:
            pp.get()
        self.check(caught, net.alice, "get")
        assert net.sizes() == [1, 1]
        net.lift()
        assert torch.equal(home(pp), data())

    @pytest.mark.parametrize("where", ["bob", "alice"])
    def test_move_is_asked_of_every_worker_of_the_chain(self, net: Net, where: str) -> None:
        worker: VirtualWorker = getattr(net, where)
        pp = data().send(net.bob).send(net.alice)
        net.refuse("move", worker=worker)
        with pytest.raises(PermissionDeniedError) as caught:
            pp.move(net.alice)
        self.check(caught, worker, "move")
        assert net.sizes() == [1, 1]
        net.lift()
        assert torch.equal(home(pp.move(net.alice)), data())

    def test_a_move_into_a_worker_that_takes_nothing(self, net: Net) -> None:
        p = data().tag("#x").send(net.bob)
        policy = net.refuse("put", worker=net.alice)
        with pytest.raises(TransportError, match=f"{net.alice.id} does not permit put: no put, please"):
            p.move(net.alice)
        assert net.sizes() == [1, 0] and len(net.bob.search("#x")) == 1
        [put] = [asked for asked in policy.asked if asked[0] == "put" and asked[3] == net.alice.id]
        assert put[1] == net.bob.id and put[2] > 0, "the one who brings it asks, about the new object"
        net.lift()
        assert torch.equal(home(p.move(net.alice)), data())

    @pytest.mark.parametrize("transport", ["virtual", "tcp", "websocket"])
    def test_dial(self, net: Net, transport: str) -> None:
        """Whoever names an address is refused, before anything is dialled, and what it was for has not happened."""
        here, there, away = (Worker(f"{stem}-{next(numbers)}", plugins.local_url(transport, "w"), ["msgpack"]) for stem in ("here", "there", "away"))
        bob, alice, charlie = handles = [farpoint.connect(worker.url) for worker in (here, there, away)]
        policy = net.enforce(lambda asked: f"no {asked[0]}, please" if asked[0] == "dial" and asked[3] == here.id else None)
        p, q = data().send(bob), data().send(alice)
        calls: list[tuple[Callable[[], Any], Worker]] = [
            (lambda: p.move(alice), there),
            (lambda: home(q.send(bob)), there),
            (lambda: p.send(charlie).move(alice), there),  # charlie has to dial here, which is permitted
            (lambda: p.remote_send(charlie), away),
        ]
        for call, named in calls:
            policy.asked.clear()
            with pytest.raises(PermissionDeniedError) as caught:
                call()
            error = caught.value
            assert (error.worker, error.action, error.reason) == (here.id, "dial", "no dial, please")
            [(_, _, about, _)] = [asked for asked in policy.asked if asked[0] == "dial" and asked[3] == here.id]
            assert about == named.url
            assert not here.peers
        gc.collect()
        assert (len(bob), len(alice), len(charlie)) == (1, 1, 0)
        assert all(torch.equal(kept.get(keep=True), data()) for kept in (p, q))
        net.lift()
        assert torch.equal(home(p.move(alice)), data()) and torch.equal(home(q.send(bob)), data())
        for handle in handles:
            handle.close()
        for worker in (here, there, away):
            worker.close()

    def test_dial_by_who_is_to_receive(self, net: Net) -> None:
        here, there = (Worker(f"{stem}-{next(numbers)}", plugins.local_url("tcp", "w"), ["msgpack"]) for stem in ("here", "there"))
        bob, alice = farpoint.connect(here.url), farpoint.connect(there.url)
        policy = net.enforce(lambda asked: "no" if asked[0] == "dial" and asked[3] == there.id else None)
        p = data().send(bob)
        with pytest.raises(TransportError, match=f"is where it was: {there.id}: {there.id} does not permit dial: no"):
            p.move(alice)
        assert ("dial", "me", there.url, here.id) in policy.asked and ("dial", here.id, here.url, there.id) in policy.asked
        assert not there.peers and (len(bob), len(alice)) == (1, 0)
        eventually(lambda: not here.movers._states.open_peers())  # nobody asks again for ever
        net.lift()
        assert torch.equal(home(p.move(alice)), data())
        for end in (bob, alice, here, there):
            end.close()

    def test_who_is_connected_already_is_not_dialled(self, net: Net) -> None:
        p = data().send(net.bob).move(net.alice)
        policy = net.refuse("dial")
        assert torch.equal(home(p.move(net.bob).send(net.alice)), data())
        assert not [asked for asked in policy.asked if asked[0] == "dial"]

    def test_search(self, net: Net) -> None:
        kept = data().tag("#x").send(net.bob)
        net.refuse("search")
        with pytest.raises(PermissionDeniedError) as caught:
            net.bob.search("#x")
        self.check(caught, net.bob, "search")
        assert torch.equal(kept.get(), data()) and net.sizes() == [0, 0]

    def test_list(self, net: Net) -> None:
        net.refuse("list")
        with pytest.raises(PermissionDeniedError) as caught:
            fetch_listing(net.bob.peer)
        self.check(caught, net.bob, "list")

    def test_clear(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("clear")
        with pytest.raises(PermissionDeniedError) as caught:
            net.bob.clear_objects()
        self.check(caught, net.bob, "clear")
        assert net.sizes() == [1, 0] and torch.equal(p.get(), data())

    def test_send(self, net: Net) -> None:
        net.refuse("put")
        p = data().send(net.bob)
        q = p + 1
        assert net.sizes() == [0, 0]
        for use in (p.get, q.get, lambda: p.move(net.alice), lambda: home(p.send(net.alice))):
            with pytest.raises(PermissionDeniedError, match=r"test_policy\.py:\d+: bob") as caught:
                use()
            self.check(caught, net.bob, "put")

    def test_send_of_a_pointer(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("link")
        pp = p.send(net.alice)
        with pytest.raises(PermissionDeniedError) as caught:
            pp.get()
        self.check(caught, net.alice, "link")
        assert net.sizes() == [1, 0]
        assert torch.equal(p.get(), data()) and net.sizes() == [0, 0]

    def test_an_operation_poisons_its_results(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("aten::mul.Tensor")
        assert torch.equal((p + p).get(), data() * 2)
        q = p * p
        r = q + 1
        with pytest.raises(PermissionDeniedError, match=r"test_policy\.py:\d+: bob") as caught:
            r.get()
        self.check(caught, net.bob, "aten::mul.Tensor")
        assert net.sizes() == [1, 0]

    def test_an_operation_in_place_changes_nothing(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("aten::add_.Tensor")
        p.add_(1)
        with pytest.raises(PermissionDeniedError) as caught:
            p.get()
        self.check(caught, net.bob, "aten::add_.Tensor")
        assert torch.equal(p.get(), data())

    def test_an_operation_whose_result_is_asked_for(self, net: Net) -> None:
        p = data().send(net.bob)
        net.refuse("aten::nonzero")
        net.refuse("aten::nonzero.default")
        with pytest.raises(PermissionDeniedError):
            torch.nonzero(p)
        assert net.sizes() == [1, 0]

    def test_an_operation_at_the_end_of_a_chain(self, net: Net) -> None:
        pp = data().send(net.bob).send(net.alice)
        policy = net.refuse("aten::add.Tensor", worker=net.bob)
        q = pp + pp
        with pytest.raises(PermissionDeniedError) as caught:
            home(q)
        self.check(caught, net.bob, "aten::add.Tensor")
        asked = [(subject, worker) for action, subject, _, worker in policy.asked if action == "aten::add.Tensor"]
        assert asked == [("me", net.alice.id), (net.alice.id, net.bob.id)]

    def test_tag_and_describe(self, net: Net) -> None:
        p = data().tag("#x").send(net.bob)
        net.refuse("tag")
        p.tag("#y")
        with pytest.raises(PermissionDeniedError, match=r"test_policy\.py:\d+: bob") as caught:
            net.bob.synchronize()
        self.check(caught, net.bob, "tag")
        p.describe("anything")
        with pytest.raises(PermissionDeniedError):
            net.bob.synchronize()
        assert [note_of(found).description for found in net.bob.search("#x")] == [""] and net.bob.search("#y") == []

    def test_a_refusal_that_nobody_saw_is_reported(self, net: Net) -> None:
        net.refuse("tag")
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        net.enforce(lambda asked: "no" if asked[0] == "tag" else None)
        data().send(worker).tag("#x")
        with pytest.warns(UnseenErrorWarning, match="does not permit tag: no"):
            worker.close()


class TestQuestions:
    def test_the_list_of_actions_is_complete(self, net: Net) -> None:
        """A session with everything in it asks for each action, for operators, and for nothing else."""
        policy = net.enforce()
        p = data().tag("#x").send(net.bob)
        pp: Any = p.send(net.alice)
        p.tag("#y").describe("words")
        found: Any
        [found] = net.bob.search("words")
        fetch_listing(net.bob.peer)
        x = home((found + 1).move(net.alice).remote_send(net.bob).remote_get())
        torch.nonzero(pp)
        pp.clone().move(net.alice)
        net.bob.synchronize()
        net.bob.clear_objects()
        assert torch.equal(x, data() + 1)
        asked = {action for action, *_ in policy.asked}
        assert {action for action in asked if "::" not in action} == set(ACTIONS)
        assert {"aten::add.Tensor", "aten::nonzero.default", "aten::clone.default"} <= asked

    def test_who_asks_for_what(self, net: Net) -> None:
        policy = net.enforce()
        p = data().send(net.bob)
        p.get(keep=True)
        p.tag("#x")
        net.bob.search("#x")
        q = p + p
        net.bob.synchronize()
        first, result = p.id_at_location, q.id_at_location
        assert result != first
        assert policy.asked == [
            ("put", "me", first, net.bob.id),
            ("get", "me", first, net.bob.id),
            ("tag", "me", first, net.bob.id),
            ("search", "me", 0, net.bob.id),
            ("aten::add.Tensor", "me", first, net.bob.id),
        ]

    def test_the_documentation_lists_every_action(self) -> None:
        page = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| .+ \|$", page.partition("## Policies")[2], re.MULTILINE)
        assert dict(rows) == ACTIONS


class TestSeveralPolicies:
    @pytest.mark.parametrize("order", [(True, "no"), ("no", True), (None, "no"), ("no", None), (True, False)])
    def test_one_refusal_is_enough_in_any_order(self, net: Net, order: tuple[Any, Any]) -> None:
        p = data().send(net.bob)
        net.bob.synchronize()
        for answer in order:
            net.enforce(lambda _, answer=answer: answer)  # type: ignore[misc]
        with pytest.raises(GetNotPermittedError) as caught:
            p.get()
        assert caught.value.reason in ("no", "its policy refuses it")

    @pytest.mark.parametrize("answers", [(), (None,), (True,), (None, True), (True, True)])
    def test_without_a_refusal_it_is_permitted(self, net: Net, answers: tuple[Any, ...]) -> None:
        for answer in answers:
            net.enforce(lambda _, answer=answer: answer)  # type: ignore[misc]
        assert torch.equal(data().send(net.bob).get(), data())

    @pytest.mark.parametrize("answer", [False, "", 0, 1, [], object()])
    def test_what_is_neither_true_nor_none_refuses(self, net: Net, answer: Any) -> None:
        p = data().send(net.bob)
        net.bob.synchronize()
        net.enforce(lambda _: answer)
        with pytest.raises(GetNotPermittedError) as caught:
            p.get()
        assert caught.value.reason == "its policy refuses it"

    def test_a_policy_that_raises_refuses_and_its_reasons_stay(
        self, net: Net, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(asked: Asked) -> None:
            raise ValueError("the secret reason")

        p = data().send(net.bob)
        net.bob.synchronize()
        net.enforce(fail)
        net.enforce(lambda _: True)
        with caplog.at_level(logging.ERROR), pytest.raises(GetNotPermittedError) as caught:
            p.get()
        assert caught.value.reason == "its policy failed, which is a refusal"
        assert "secret" not in str(caught.value) and "secret" in caplog.text
        assert f"me may get on {net.bob.id}" in caplog.text
        with pytest.raises(FarpointError, match="which is a refusal"):
            home(p + 1)

    def test_a_policy_is_asked_from_when_it_is_registered_until_it_is_not(self, net: Net) -> None:
        p = data().send(net.bob)
        net.bob.synchronize()
        assert not plugins.has_policy
        policy = net.refuse("get")
        assert plugins.has_policy
        with pytest.raises(GetNotPermittedError):
            p.get()
        net.lift()
        assert not plugins.has_policy and torch.equal(p.get(), data()) and len(policy.asked) == 1

    def test_a_policy_may_leave_arguments_out(self) -> None:
        class Short:
            @hookimpl
            def farpoint_authorize(self, action: str) -> bool:
                return action == "put"

        manager = PluginManager(discover=False)
        manager.register(Short())
        assert manager.authorize("put", "me", 1, "bob") is None
        assert manager.authorize("get", "me", 1, "bob") == "its policy refuses it"
