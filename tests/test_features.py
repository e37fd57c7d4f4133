"""What a user does with workers besides computing: tags, search, listing, clearing, closing, replacing."""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import farpoint
from farpoint import PointerTensor, RemoteWorker, VirtualWorker
from farpoint.catalogue import annotate, note_of
from farpoint.channel import Lane
from farpoint.errors import (
    InvalidNameError,
    LimitError,
    NotColocatedError,
    ObjectNotFoundError,
    PointerSpentError,
    ProtocolError,
    RemoteExecutionError,
    UnseenErrorWarning,
    WorkerLostError,
)
from farpoint.listing import PAGE, ListedPointer, ListedTensor
from farpoint.protocol.messages import Kind
from farpoint.remote import preferred_serializers
from farpoint.serializer import Frame
from farpoint.store import Annotation

farpoint.TorchHook(torch)
numbers = itertools.count()
REFUSALS = (InvalidNameError, ProtocolError, LimitError)


class Net:
    """Two workers, and one that this process knows only as it would know one on another machine."""

    def __init__(self, serializer: str) -> None:
        n = next(numbers)
        self.bob = VirtualWorker(id=f"bob.{n}", serializer=serializer)
        self.alice = VirtualWorker(id=f"alice.{n}", serializer=serializer)

    def sizes(self) -> list[int]:
        gc.collect()
        return [len(self.bob), len(self.alice)]


@pytest.fixture(params=["msgpack", "torch"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    net = Net(request.param)
    yield net
    net.bob.close()
    net.alice.close()


def data() -> Any:
    return torch.arange(1.0, 6.0)


def home(tensor: Any) -> torch.Tensor:
    while isinstance(tensor, PointerTensor):
        tensor = tensor.get()
    return tensor  # type: ignore[no-any-return]


def refused_there(worker: VirtualWorker, message: list[Any]) -> Any:
    """Issue a command past all checks of the client, and return the error of the worker, None if it took the command."""
    reply = worker.peer.ask(message)
    worker.peer.request([int(Kind.SYNC), [], []])
    return None if reply.error is None else worker.peer.answers.error(reply.error)


class TestTags:
    def test_they_survive_every_journey(self, net: Net) -> None:
        x = data().tag("#x", "#train").describe("five numbers")
        expected = note_of(x)
        assert expected.tags == {"#x", "#train"} and expected.description == "five numbers"
        p = x.send(net.bob)
        assert note_of(p) == expected and note_of(p.get(keep=True)) == expected
        q = p.move(net.alice)
        assert note_of(q) == expected and [note_of(f) for f in net.alice.search("#x", "#train")] == [expected]
        assert net.bob.search("#x") == []
        qq = q.send(net.bob)
        assert len(net.bob.search("#x")) == 1
        r = qq.get()
        assert note_of(r) == expected and note_of(r.get()) == expected

    def test_they_survive_moves_beyond_the_first_hop(self, net: Net) -> None:
        x = data().tag("#x")
        pp = x.send(net.bob).send(net.alice)
        longer = pp.remote_send(net.alice)
        shorter = longer.remote_get().remote_get()
        assert note_of(shorter).tags == {"#x"}
        assert torch.equal(home(shorter), data())

    def test_an_object_on_a_worker_is_tagged_and_described(self, net: Net) -> None:
        p = data().send(net.bob)
        assert p.tag("#late") is p and p.describe("added later") is p
        assert [note_of(f).description for f in net.bob.search("#late")] == ["added later"]
        p.tag("#other")
        assert net.bob.search("#late") == []
        [found] = net.bob.search("#other")
        found.describe("by somebody else")
        p.tag("#third")
        assert [note_of(f).description for f in net.bob.search("#third")] == ["by somebody else"]
        assert note_of(p.get()).description == "by somebody else"

    def test_results_of_operations_have_none(self, net: Net) -> None:
        p = data().tag("#x").send(net.bob)
        q = p + 1
        assert note_of(q).tags == frozenset() and len(net.bob.search("#x")) == 1

    def test_a_spent_pointer_is_not_tagged(self, net: Net) -> None:
        p = data().send(net.bob)
        p.get()
        with pytest.raises(PointerSpentError):
            p.tag("#x")

    @pytest.mark.parametrize("tag", ["x", "xy", "", "#", "#a b", "#é", "#" + 64 * "x", "#a\n"])
    def test_what_is_no_tag_is_refused_here(self, net: Net, tag: str) -> None:
        p = data().send(net.bob)
        for x in (data(), p):
            with pytest.raises(InvalidNameError, match="cannot be a tag: use a # and then 1 to 63") as caught:
                x.tag(tag)
            assert caught.value.name == tag and note_of(x).tags == frozenset()

    def test_the_longest_tag_and_the_most_tags(self, net: Net) -> None:
        tags = [f"#{n:02}.{60 * 'x'}" for n in range(16)]
        assert {len(tag) for tag in tags} == {64}
        p = data().tag(*tags).send(net.bob)
        assert note_of(p.get()).tags == set(tags)
        with pytest.raises(InvalidNameError, match="at most 16 tags"):
            data().tag(*tags, "#more")

    def test_a_text_is_not_a_list_of_tags(self) -> None:
        with pytest.raises(InvalidNameError, match=r"\['#x', '#train'\]"):
            annotate(data(), tags="#x")

    def test_the_longest_description(self, net: Net) -> None:
        longest = 1024 * "é"
        assert note_of(data().describe(longest).send(net.bob).get()).description == longest
        with pytest.raises(InvalidNameError, match="at most 1024 characters"):
            data().describe(longest + "é")

    def test_a_packet_of_the_longest_descriptions(self, net: Net) -> None:
        longest = 1024 * "\U0001f600"
        pointers = [data().describe(longest).send(net.bob) for _ in range(130)]
        assert note_of(pointers[-1].get(keep=True)).description == longest
        assert len(net.bob._objects) == 130

    def test_a_text_that_no_bytes_can_hold(self, net: Net) -> None:
        p = data().send(net.bob)
        with pytest.raises(InvalidNameError, match="surrogate"):
            p.describe("half \ud800")
        assert torch.equal(p.get(), data())

    @pytest.mark.parametrize(
        ("tags", "description"),
        [(["x"], ""), ([f"#{n}" for n in range(17)], ""), (["#a b"], ""), ("#x", ""), (7, ""), ([7], ""), ([], 1025 * "x"), ([], 7)],
    )
    def test_the_worker_checks_what_arrives(self, net: Net, tags: Any, description: Any) -> None:
        p = data().tag("#good").send(net.bob)
        before = net.bob.search("#good")
        error = refused_there(net.bob, [int(Kind.PUT), net.bob.peer.references.new_id(), torch.ones(2), False, tags, description])
        assert isinstance(error, REFUSALS) and error.origin == net.bob.id
        link = [int(Kind.LINK), net.alice.peer.references.new_id(), net.bob.id, net.bob.url, p.id_at_location, p._spec.to_wire()]
        assert isinstance(refused_there(net.alice, [*link, tags, description, ""]), REFUSALS)
        assert isinstance(refused_there(net.bob, [int(Kind.TAG), p.id_at_location, tags, description]), REFUSALS)
        assert len(before) == 1 and net.sizes() == [1, 0]
        assert [note_of(f).tags for f in net.bob.search("#good")] == [{"#good"}]

    def test_a_worker_checks_the_tags_of_what_moves_in(self, net: Net) -> None:
        p = data().send(net.bob)
        net.bob.synchronize()
        net.bob._worker.store.annotate(p.id_at_location, Annotation(frozenset({"plain"})))
        with pytest.raises(farpoint.TransportError, match="'plain' cannot be a tag"):
            p.move(net.alice)
        assert net.sizes() == [1, 0] and (p + 1)._route is p._route


class TestSearch:
    def test_by_all_tags_and_all_words(self, net: Net) -> None:
        a = data().tag("#mnist", "#train").describe("Hand-written digits, 28x28.").send(net.bob)
        b = (data() + 1).tag("#mnist", "#test").describe("more digits").send(net.bob)
        ids = {a.id_at_location: "a", b.id_at_location: "b"}
        for query, expected in (
            (["#mnist"], "ab"),
            (["#mnist", "#train"], "a"),
            (["digits"], "ab"),
            (["DIGITS", "#test"], "b"),
            (["hand-written"], "a"),
            (["written digits"], "a"),
            (["28x28"], "a"),
            (["digit"], ""),
            (["#mnis"], ""),
            (["mnist"], ""),
            (["#mnist", "fashion"], ""),
        ):
            assert sorted(ids[found.id_at_location] for found in net.bob.search(*query)) == list(expected), query

    def test_results_are_references(self, net: Net) -> None:
        p = data().tag("#x").send(net.bob)
        found, again = net.bob.search("#x"), net.bob.search("#x")
        assert torch.equal((found[0] + again[0] + p).get(), data() * 3)
        del p
        assert net.sizes() == [1, 0]
        del found
        assert net.sizes() == [1, 0] and torch.equal(again[0].get(keep=True), data())
        del again
        assert net.sizes() == [0, 0]

    def test_what_only_another_worker_holds_is_found(self, net: Net) -> None:
        p = data().tag("#x").send(net.bob)
        pp = p.send(net.alice)
        del p
        net.sizes()
        [found] = net.bob.search("#x")
        del pp
        assert net.sizes() == [1, 0] and torch.equal(found.get(), data())

    def test_what_is_found_knows_its_tensor(self, net: Net) -> None:
        x = torch.ones(2, 3, dtype=torch.float64).t().requires_grad_().tag("#x")  # type: ignore[attr-defined]  # the hook's
        kept = x.send(net.bob)
        [p] = net.bob.search("#x")
        assert p.shape == (3, 2) and p.dtype == torch.float64 and p.requires_grad and p.is_leaf
        (p * 2).sum().backward()  # type: ignore[no-untyped-call]  # torch's
        assert isinstance(p.grad, PointerTensor) and torch.equal(home(p.grad), torch.full((3, 2), 2.0, dtype=torch.float64))
        assert kept.grad is None

    def test_a_chain_is_found_with_its_way(self, net: Net) -> None:
        pp = data().tag("#x").send(net.bob).send(net.alice)
        [found] = net.alice.search("#x")
        assert found._route is pp._route
        pp.tag("#ours").describe("what alice has")
        [again] = net.alice.search("alice")
        assert note_of(again) == Annotation(frozenset({"#ours"}), "what alice has"), "not what is written at the data end"
        assert torch.equal(home(found + pp), data() * 2)
        del again
        moved = found.move(net.alice)
        assert net.sizes() == [0, 1] and torch.equal(home(moved), data())
        del found, pp, moved
        assert net.sizes() == [0, 0]

    def test_what_is_freed_meanwhile_is_left_out(self, net: Net) -> None:
        p: Any = data().tag("#x").send(net.bob)
        q = data().tag("#x").send(net.bob)
        peer = net.bob.peer
        request = peer.request

        def release_then_answer(message: list[Any]) -> Any:
            nonlocal p
            answer = request(message)
            if message[0] == Kind.SEARCH:
                p = None
                gc.collect()
                peer.flush()
            return answer

        peer.request = release_then_answer  # type: ignore[method-assign]
        assert [found.id_at_location for found in net.bob.search("#x")] == [q.id_at_location]
        assert all(looked_at for _, looked_at in farpoint.me().failures.values())

    def test_a_chain_whose_data_is_lost_is_left_out(self, net: Net) -> None:
        with VirtualWorkerFor("gone") as gone:
            kept = [data().tag("#x").send(gone).send(net.alice), data().tag("#x").send(net.alice)]
            assert len(net.alice.search("#x")) == 2
        [found] = net.alice.search("#x")
        assert found.id_at_location == kept[1].id_at_location

    @pytest.mark.parametrize("query", [[], ["!?"], ["#"], ["# x"], [65 * "x"], [" ".join(map(str, range(17)))], [7]])
    def test_a_search_for_nothing_or_too_much_is_refused(self, net: Net, query: list[Any]) -> None:
        with pytest.raises(InvalidNameError) as caught:
            net.bob.search(*query)
        assert caught.value.origin == "", "it is refused here, before anything is sent"
        assert isinstance(refused_there(net.bob, [int(Kind.SEARCH), query]), REFUSALS)

    @pytest.mark.parametrize(
        "answer",
        [
            None,
            7,
            [],
            [[[2], [1], 0, "float32", False, False], [], False, [], ""],
            [[[2], [1], 0, "float32", False, False], ["bob"] * 9, False, [], ""],
            [[[2], [1], 0, "float32", False, False], ["bob", "no name"], False, [], ""],
            [[[2], [1], 0, "float32", False, False], ["bob"], False, ["no tag"], ""],
            [[[2], [1], 0, "float31", False, False], ["bob"], False, [], ""],
        ],
    )
    def test_a_worker_that_answers_nonsense(self, net: Net, answer: Any) -> None:
        kept = data().tag("#x").send(net.bob)
        net.bob._worker._commands[int(Kind.LOCATE)] = lambda guest, number, _: guest.answer(number, answer)
        with pytest.raises((ProtocolError, InvalidNameError)):
            net.bob.search("#x")
        # Whether or not the nonsense cost the link, no other error comes of it.
        with contextlib.suppress(ProtocolError):
            assert torch.equal(kept.get(), data())


class VirtualWorkerFor:
    """A worker for one block."""

    def __init__(self, name: str) -> None:
        self.worker = VirtualWorker(id=f"{name}.{next(numbers)}")

    def __enter__(self) -> VirtualWorker:
        return self.worker

    def __exit__(self, *_: object) -> None:
        self.worker.close()


class TestListing:
    def remote(self, worker: VirtualWorker) -> RemoteWorker:
        """Return the worker as one outside this process: what it stores is asked for."""
        remote = object.__new__(RemoteWorker)
        remote.id, remote.url, remote.peer = worker.id, worker.url, worker.peer
        return remote

    def test_a_worker_elsewhere_lists_what_it_stores_without_values(self, net: Net) -> None:
        x = torch.tensor([[1.5, 2.5]], requires_grad=True).tag("#x").describe("two numbers")  # type: ignore[attr-defined]
        p = x.send(net.bob)
        pp = p.send(net.alice)
        bob, alice = self.remote(net.bob), self.remote(net.alice)
        assert len(bob) == len(alice) == 1
        listed = bob._objects[p.id_at_location]
        assert isinstance(listed, ListedTensor) and listed.note == Annotation(frozenset({"#x"}), "two numbers", True)
        assert repr(bob._objects) == (
            f"{{{p.id_at_location}: tensor(..., size=(1, 2), dtype=torch.float32, requires_grad=True, tags=['#x'])}}"
        )
        pointer = alice._objects[pp.id_at_location]
        assert isinstance(pointer, ListedPointer) and pointer.spec is p._spec
        assert repr(alice._objects) == repr(net.alice._objects)
        assert (pointer.worker, pointer.target) == (net.bob.id, p.id_at_location)

    def test_a_virtual_worker_shows_the_tensors(self, net: Net) -> None:
        p = torch.tensor([1, 2]).send(net.bob)  # type: ignore[attr-defined]  # the hook's
        assert repr(net.bob._objects) == f"{{{p.id_at_location}: tensor([1, 2])}}" and bool(net.alice)

    def test_a_store_of_many_pages(self, net: Net) -> None:
        kept = [torch.tensor(n).send(net.bob) for n in range(2 * PAGE)]  # type: ignore[attr-defined]  # the hook's
        listed = self.remote(net.bob)._objects
        assert list(listed) == sorted(p.id_at_location for p in kept)
        kept.pop()
        assert len(self.remote(net.bob)) == 2 * PAGE - 1

    def test_a_page_of_the_longest_entries_fits_a_control_frame(self, net: Net) -> None:
        tags = [f"#{n:02}.{60 * 'x'}" for n in range(16)]
        x = torch.ones([1] * 32).tag(*tags).describe(1024 * "\N{SNOWMAN}")  # type: ignore[attr-defined]  # the hook's
        kept = [x.send(net.bob) for _ in range(PAGE)]
        assert len(self.remote(net.bob)) == len(kept)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_what_cannot_travel_is_listed_without_metadata(self, net: Net) -> None:
        net.bob._worker.store[5] = torch.eye(2).to_sparse()
        net.bob._worker.store[6] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        assert repr(self.remote(net.bob)._objects) == "{5: tensor(...), 6: tensor(...)}"

    @pytest.mark.parametrize(
        "answer",
        [
            7,
            [7],
            [[1, 2]],
            [[1, "window", None, False, [], "", "", 0]],
            [["1", "tensor", None, False, [], "", "", 0]],
            [[1, "tensor", None, False, ["no tag"], "", "", 0]],
            [[1, "pointer", None, False, [], "", "no name", 0]],
            [[1, "tensor", None, False, [], "", "", 0]] * 2,
        ],
    )
    def test_a_worker_that_lists_nonsense(self, net: Net, answer: Any) -> None:
        net.bob._worker._commands[int(Kind.LIST)] = lambda guest, number, _: guest.answer(number, answer)
        with pytest.raises((ProtocolError, InvalidNameError)):
            len(self.remote(net.bob))

    def test_a_listing_that_goes_on_after_nonsense(self, net: Net) -> None:
        assert isinstance(refused_there(net.bob, [int(Kind.LIST), "x"]), ProtocolError)


class TestWorkers:
    def test_no_hook_is_needed(self) -> None:
        with VirtualWorkerFor("alone") as worker:
            assert torch.equal(farpoint.send(data(), worker).get(), data())

    @pytest.mark.parametrize("name", ["", "a b", "é", 65 * "x", "bob\n", 7])
    def test_what_is_no_id_is_refused(self, name: Any) -> None:
        with pytest.raises(InvalidNameError, match="cannot be a worker id"):
            VirtualWorker(id=name)
        with pytest.raises(InvalidNameError, match="cannot be a worker id"):
            RemoteWorker(name, "virtual://x")

    def test_a_worker_checks_the_ids_that_arrive(self, net: Net) -> None:
        p = data().send(net.bob)
        message = [int(Kind.LINK), net.alice.peer.references.new_id(), "no name", net.bob.url, p.id_at_location, p._spec.to_wire(), [], "", ""]
        assert isinstance(refused_there(net.alice, message), REFUSALS)
        farpoint.me().id = "no name"
        try:
            with pytest.raises(ProtocolError, match="'no name'"), VirtualWorkerFor("fresh"):
                pass
        finally:
            farpoint.me().id = "me"

    def test_each_session_offers_what_its_worker_was_made_with(self) -> None:
        n = next(numbers)
        bob = VirtualWorker(id=f"bob-{n}", serializer="msgpack")
        assert farpoint.me().serializers == preferred_serializers()
        alice = VirtualWorker(id=f"alice-{n}", serializer="torch")
        assert farpoint.me().serializers == preferred_serializers()
        pp = data().send(bob).send(alice)
        qq = data().send(alice).send(bob)
        assert torch.equal(home(pp + pp), data() * 2) and torch.equal(home(qq + qq), data() * 2)
        spoken = {
            (peer.owner.id, peer.name): peer.channel.serializer.name
            for worker in (farpoint.me(), bob._worker, alice._worker)
            for peer in worker.peers.values()
            if peer.name in (bob.id, alice.id)
        }
        assert spoken == {
            ("me", bob.id): "msgpack",
            ("me", alice.id): "torch",
            (bob.id, alice.id): "msgpack",
            (alice.id, bob.id): "torch",
        }
        moved = data().send(bob).move(alice)
        assert torch.equal(moved.get(), data())
        bob.close()
        alice.close()

    def test_clear_objects(self, net: Net) -> None:
        p, q = data().send(net.bob), data().send(net.bob).send(net.alice)
        assert net.bob.clear_objects() is net.bob
        assert net.sizes() == [0, 1]
        with pytest.raises(ObjectNotFoundError, match="clear_objects") as caught:
            p.get()
        assert caught.value.object_id == p.id_at_location and caught.value.worker == net.bob.id
        with pytest.raises(ObjectNotFoundError, match="freed before you became a holder"):
            q.get()
        assert net.sizes() == [0, 1] and q.shape == (5,)
        assert net.alice.clear_objects() is net.alice
        r = data().send(net.bob)
        del p, q
        assert net.sizes() == [1, 0] and torch.equal(r.get(), data())

    def test_clear_comes_after_what_was_issued_by_another_way(self, net: Net) -> None:
        p = data().send(net.bob)
        pp = p.send(net.alice)
        for _ in range(3):
            pp.add_(1)
        net.bob.clear_objects()
        net.alice.synchronize()
        net.bob.synchronize()
        assert net.sizes() == [0, 1]

    def test_synchronize_raises_the_first_error_of_this_worker_once(self, net: Net) -> None:
        p, index = data().send(net.bob), torch.tensor([7]).send(net.bob)  # type: ignore[attr-defined]  # the hook's
        bad = p[index]
        worse = bad + 1
        net.alice.synchronize()
        with pytest.raises(RemoteExecutionError, match=r"test_features\.py:\d+: .*out of bounds"):
            net.bob.synchronize()
        net.bob.synchronize()
        with pytest.raises(RemoteExecutionError, match="out of bounds"):
            worse.get()

    def test_close(self, net: Net) -> None:
        worker = VirtualWorker(id=f"short-{next(numbers)}")
        p, pp = data().send(worker), data().send(worker).send(net.alice)
        worker.close()
        worker.close()
        uses: list[Any] = [
            *(lambda: p + 1, lambda: p.get(), lambda: p.move(net.bob), lambda: p.send(net.bob), lambda: p.tag("#x")),
            *(lambda: data().send(worker), lambda: worker.search("#x"), worker.clear_objects, worker.synchronize),
        ]
        for use in uses:
            with pytest.raises(WorkerLostError, match=r"closed at .*test_features\.py:\d+\. .*connect again") as caught:
                use()
            assert caught.value.worker == worker.id
        with pytest.raises(WorkerLostError):
            home(pp)
        assert f"{worker.id}:" in repr(p)
        with pytest.raises(farpoint.WorkerNotFoundError):
            data().send(worker.id)

    def test_a_worker_is_replaced_by_name(self, net: Net) -> None:
        name = f"twice-{next(numbers)}"
        old = VirtualWorker(id=name)
        p, pp = data().send(old), data().send(old).send(net.alice)
        with pytest.warns(UserWarning, match=f"worker '{name}' exists and is replaced") as caught:
            new = VirtualWorker(id=name)
        assert caught[0].filename == __file__
        q = data().send(name)
        assert q.location is new and len(new) == 1
        for use in (lambda: p + 1, lambda: p + q, lambda: q + p, lambda: torch.cat([q, p]), lambda: p.move(new), p.get):
            with pytest.raises(WorkerLostError, match=r"replaced at .*test_features\.py"):
                use()
        with pytest.raises(WorkerLostError, match=name):
            home(pp + pp)
        old.close()
        assert torch.equal(q.get(), data())
        new.close()

    def test_a_worker_is_not_replaced_by_one_that_cannot_be(self, net: Net) -> None:
        p = data().send(net.bob)
        with pytest.raises(farpoint.PluginError, match="morse"):
            VirtualWorker(id=net.bob.id, serializer="morse")
        assert torch.equal(p.get(), data())

    def test_pointers_that_do_not_meet_are_told_apart_from_lost_ones(self, net: Net) -> None:
        with pytest.raises(NotColocatedError):
            data().send(net.bob) + data().send(net.alice)

    def test_a_local_tensor_moves(self, net: Net) -> None:
        x = data()
        assert x.move("me") is x and x.move(farpoint.me()) is x and torch.equal(x.move(net.bob).get(), x)

    def test_thousands_of_commands_without_a_wait(self, net: Net) -> None:
        pointers = [torch.tensor(n).send(net.bob) for n in range(4500)]  # type: ignore[attr-defined]  # the hook's
        for p in pointers:
            p.describe(50 * "long ")
        twice = [p.send(net.alice) for p in pointers[:300]]
        assert pointers[-1].get() == 4499 and home(twice[-1]) == 299


class TestPointerIds:
    def test_they_are_unique_and_stable(self, net: Net) -> None:
        seen = set()
        for n in range(100):
            p = data().send(net.bob)
            assert p.id == p.id and f":{p.id} -> {net.bob.id}:{p.id_at_location}]" in repr(p)
            seen.add(p.id)
            assert len(seen) == n + 1, "the memory of a pointer is used again, its id is not"
        p.get()
        assert p.id in seen

    def test_they_are_drawn_when_asked_for(self, net: Net) -> None:
        p, q = data().send(net.bob), data().send(net.bob)
        assert q.id < p.id


class TestUnseenErrors:
    def singular(self, worker: Any) -> Any:
        return torch.linalg.inv(torch.zeros(2, 2).send(worker))  # type: ignore[attr-defined]  # the hook's

    def test_close_warns_of_them_once(self, net: Net) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        kept = [self.singular(worker), self.singular(worker), self.singular(net.bob)]
        kept.append(kept[0] + 1)
        with pytest.warns(UnseenErrorWarning) as caught:
            worker.close()
        [warning] = caught
        text = str(warning.message)
        assert text.startswith("nobody looked at 2 errors; get() a result") and text.count("singular") == 2
        assert text.count("test_features.py:") == 2 and warning.filename == __file__
        worker.close()
        with pytest.raises(RemoteExecutionError, match="singular"):
            net.bob.synchronize()

    def test_close_waits_for_what_a_worker_has_still_to_say(self) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        peer, on_the_way = worker.peer, list[tuple[Lane, list[bytes]]]()
        receive, wait = peer.channel.received, peer.wait

        def arrive_when_waited_for(reply: Any, seconds: float | None = None) -> Any:
            peer.flush()
            while on_the_way:
                receive(*on_the_way.pop(0))
            return wait(reply, seconds)

        def come_later(lane: Lane, frames: Sequence[Frame]) -> None:
            on_the_way.append((lane, [bytes(frame) for frame in frames]))

        peer.channel.received = come_later  # type: ignore[method-assign]
        peer.wait = arrive_when_waited_for  # type: ignore[method-assign]
        self.singular(worker)
        worker.flush()
        with pytest.warns(UnseenErrorWarning, match="singular"):
            worker.close()

    def test_errors_at_the_end_of_a_chain_belong_to_its_worker(self, net: Net) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        pp = torch.linalg.inv(torch.zeros(2, 2).send(worker).send(net.alice))  # type: ignore[attr-defined]  # the hook's
        net.alice.synchronize()
        with pytest.warns(UnseenErrorWarning, match=f"failed on {worker.id}"):
            worker.close()
        assert isinstance(pp, PointerTensor)

    def test_what_was_looked_at_is_not_reported(self) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        bad = self.singular(worker)
        with pytest.raises(RemoteExecutionError):
            bad.get()
        worker.close()

    def test_many_are_counted(self) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        kept = [self.singular(worker) for _ in range(13)]
        with pytest.warns(UnseenErrorWarning, match="13 errors") as caught:
            worker.close()
        text = str(caught[0].message)
        assert text.count("singular") == 10 and text.endswith("and 3 more") and len(kept) == 13

    def test_where_warnings_are_errors_the_worker_is_closed_all_the_same(self) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        kept = self.singular(worker)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnseenErrorWarning):
                worker.close()
        with pytest.raises(WorkerLostError):
            kept + 1
        VirtualWorker(id=worker.id).close()

    def test_the_end_of_the_process_warns_of_the_rest(self) -> None:
        script = """
            import warnings, torch, farpoint
            farpoint.TorchHook(torch)
            bob, alice = farpoint.VirtualWorker(id="bob"), farpoint.VirtualWorker(id="alice")
            kept = [torch.linalg.inv(torch.zeros(2, 2).send(worker)) for worker in (bob, alice)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bob.close()
            print(len(caught))
        """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
        assert run.stdout == "1\n"
        assert run.stderr.count("UnseenErrorWarning: nobody looked at an error") == 1
        assert "failed on alice" in run.stderr and "failed on bob" not in run.stderr

    def test_an_error_without_a_text_is_reported_too(self) -> None:
        worker = VirtualWorker(id=f"w-{next(numbers)}")
        error = farpoint.FarpointError("")
        error.origin = worker.id
        farpoint.me().failures[-1] = (error, False)
        with pytest.warns(UnseenErrorWarning, match="nobody looked at an error"):
            worker.close()

    @pytest.mark.parametrize("way", ["a result", "no result", "synchronize"])
    def test_an_error_that_was_raised_keeps_nothing_alive(self, net: Net, way: str) -> None:
        """What farpoint remembers of an error must not have the frames in which it was raised."""

        def fail() -> None:
            p, index = data().send(net.bob), torch.tensor([7]).send(net.bob)  # type: ignore[attr-defined]  # the hook's
            bad = self.singular(net.bob) if way == "no result" else p[index]
            if way == "synchronize":
                net.bob.synchronize()
            bad.get()

        with pytest.raises(RemoteExecutionError):
            fail()
        assert net.sizes() == [0, 0]
