"""What one client may make a worker keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import farpoint
from farpoint import QuotaError, RemoteWorker
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.worker import Worker
from wire import (
    SPEC,
    RawClient,
    RawWorker,
    check_books,
    error_of,
    new_worker,
    stocked,
    traceback_of,
)

numbers = itertools.count()


@pytest.fixture
def bob() -> Iterator[Worker]:
    worker = new_worker(limits=Limits(bad_requests=10**9))
    yield worker
    check_books(worker)
    worker.close()


@pytest.fixture(params=["msgpack", "torch"])
def mallory(request: pytest.FixtureRequest, bob: Worker) -> RawClient:
    return stocked(RawClient(bob.url, request.param))


class TestQuotas:
    @pytest.fixture
    def small(self) -> Iterator[Worker]:
        limits = Limits(objects=8, bytes=64_000, transfers=2, template_items=40, templates=16, failures=4)
        worker = new_worker(limits=limits)
        yield worker
        check_books(worker)
        worker.close()

    def test_objects(self, small: Worker) -> None:
        mallory, honest = stocked(RawClient(small.url)), RawClient(small.url)
        mallory.say(*[[int(Kind.PUT), 10 + n, torch.ones(1), False, [], ""] for n in range(6)])
        honest.say([int(Kind.PUT), 100, torch.ones(1), False, [], ""])
        for message in (
            [int(Kind.PUT), 20, torch.ones(1), False, [], ""],
            [int(Kind.RUN), 0, [1, 2], [21]],
            [int(Kind.ASK), 0, [1, 2], [22]],
            [int(Kind.LINK), 23, "nobody", "virtual://nobody", 5, SPEC, [], "", ""],
            [int(Kind.CLAIM), 100, ""],
            [int(Kind.MOVE), 1, 0, small.id, small.url, 24, mallory.holder, False, ""],
        ):
            error, text = mallory.error(message)
            assert error == "QuotaError" and "objects=8" in text and "Give up" in text
        assert len(small.store) == 9 and not small.poisoned
        mallory.say([int(Kind.RUN), 0, [1, 2], [0]])
        mallory.say([int(Kind.RELEASE), [10]], [int(Kind.RUN), 0, [1, 2], [25]])
        assert 25 in small.store
        assert honest.ask([int(Kind.FETCH), 100])[0] == "tensor"

    def test_bytes(self, small: Worker) -> None:
        mallory = stocked(RawClient(small.url))
        mallory.say([int(Kind.PUT), 30, torch.ones(4_100), False, [], ""])
        mallory.say([int(Kind.RUN), 0, [30, 30], [31]])
        mallory.say([int(Kind.RUN), 0, [31, 31], [32]])
        assert {30, 31, 32} <= set(small.store)
        for message in (
            [int(Kind.PUT), 33, torch.ones(4_500), False, [], ""],
            [int(Kind.RUN), 0, [30, 32], [34]],
        ):
            mallory.say([int(Kind.PUT), 40, torch.ones(50), False, [], ""], [int(Kind.RELEASE), [40]])
            error, text = mallory.error(message)
            assert error == "QuotaError" and "bytes=64000" in text
        assert not {33, 34} & set(small.store)
        mallory.say([int(Kind.RELEASE), [31]], [int(Kind.RUN), 0, [32, 32], [35]])
        assert mallory.ask([int(Kind.FETCH), 35])[1].tolist() == [8.0] * 4_100

    def test_views_and_what_was_freed_cost_nothing(self, small: Worker) -> None:
        mallory = RawClient(small.url)
        mallory.say(
            [int(Kind.DEFINE), 0, "aten::view.default", [["t"], ["l", ["c", 10], ["c", 500]]], {}],
            [int(Kind.DEFINE), 1, "aten::add.Tensor", [["t"], ["t"]], {}],
            [int(Kind.DEFINE), 2, "aten::expand.default", [["t"], ["l", ["c", 1000000], ["c", 10], ["c", 500]]], {}],
            [int(Kind.PUT), 1, torch.ones(5_000), False, [], ""],
        )
        for _ in range(100):
            mallory.say([int(Kind.RUN), 0, [1], [2]], [int(Kind.RUN), 2, [2], [3]], [int(Kind.RELEASE), [2, 3]])
            mallory.say([int(Kind.RUN), 1, [1, 1], [4]], [int(Kind.RELEASE), [4]])
        assert not mallory.answers, "never more than 40 of 64 kB were in use"

    def test_what_is_expanded_counts_in_full_when_it_leaves(self, bob: Worker, mallory: RawClient) -> None:
        sizes = ["l", ["c", 2**38], ["c", 2]]
        mallory.say([int(Kind.DEFINE), 2, "aten::expand.default", [["t"], sizes], {}], [int(Kind.RUN), 2, [1], [40]])
        for message in ([int(Kind.FETCH), 40], [int(Kind.MOVE), 40, 0, "x", "virtual://x", 50, 51, False, ""]):
            error, text = mallory.error(message)
            assert error == "LimitError" and "Limits(message_bytes=...)" in text

    def test_answers_that_were_not_acknowledged(self, small: Worker) -> None:
        mallory = RawClient(small.url)
        mallory.acknowledges = False
        mallory.say([int(Kind.PUT), 1, torch.ones(5_000), False, [], ""])
        sent = mallory.say(*[[int(Kind.FETCH), 1]] * 5)
        kinds = [mallory.answers[number][0] for number in sent]
        assert kinds == [Kind.ANSWER] * 3 + [Kind.FAILURE] * 2
        assert "wait for an acknowledgement" in mallory.answers[sent[-1]][1]["text"]
        mallory.acknowledges = True
        mallory.say([int(Kind.SYNC), [], []])
        assert mallory.ask([int(Kind.FETCH), 1])[0] == "tensor"

    def test_templates(self, small: Worker) -> None:
        mallory = RawClient(small.url)
        (guest,) = small.guests.values()
        add = ["aten::add.Tensor", [["t"], ["t"]], {}]
        assert mallory.error([int(Kind.DEFINE), 16, *add])[0] == "MalformedMessageError"
        for slot in range(4):
            mallory.say([int(Kind.DEFINE), slot, *add])
        error, text = mallory.error([int(Kind.DEFINE), 9, "aten::cat.default", [["l", *[["t"]] * 30]], {}])
        assert error == "LimitError" and "template_items" in text
        for slot in range(4):
            mallory.say([int(Kind.DEFINE), slot, *add])
        assert len(guest.templates) == 4 and guest.template_items <= 40

    def test_a_template_that_was_refused_says_why_when_it_is_used(self, bob: Worker, mallory: RawClient) -> None:
        for slot, operation in ((5, "aten::from_file.default"), (0, "os.system")):
            (first,) = mallory.say([int(Kind.DEFINE), slot, operation, [], {}])
            (second,) = mallory.say([int(Kind.RUN), slot, [], [60 + slot]])
            one, two = mallory.answers[first][1], mallory.answers[second][1]
            assert error_of(one) == "OperationNotAllowedError" and two["uid"] == one["uid"]
        mallory.say([int(Kind.DEFINE), 5, "aten::add.Tensor", [["t"], ["t"]], {}], [int(Kind.RUN), 5, [1, 2], [70]])
        assert 70 in bob.store
        assert next(iter(bob.guests.values())).bad == 0

    def test_errors_that_are_kept(self, small: Worker) -> None:
        mallory = stocked(RawClient(small.url))
        mallory.say([int(Kind.DEFINE), 1, "aten::mm.default", [["t"], ["t"]], {}])
        for n in range(30):
            mallory.say([int(Kind.RUN), 1, [1, 2], [100 + n]])
        assert len(small.poisoned) == 6, "a result that carries an error is an object"
        assert [bool(traceback_of(failure)) for failure in small.poisoned.values()] == [True] * 4 + [False] * 2

    def test_moves(self, small: Worker) -> None:
        mallory = stocked(RawClient(small.url))
        silent = RawWorker(f"silent-{next(numbers)}")
        move = [int(Kind.MOVE), 1, 0, silent.name, silent.url]
        mallory.say([*move, 50, 9, False, ""], [*move, 51, 9, False, ""])
        error, text = mallory.error([*move, 52, 9, False, ""])
        assert error == "QuotaError" and "transfers=2" in text
        silent.close()




def test_what_was_given_up_makes_room_for_what_follows() -> None:
    farpoint.TorchHook(torch)
    name = f"small-{next(numbers)}"
    worker = Worker(name, f"virtual://{name}", ["msgpack"], limits=Limits(objects=2))
    handle = RemoteWorker(name, worker.url)
    x: Any = torch.ones(2)
    p, q = x.send(handle), x.send(handle)
    del p
    assert x.send(handle).get().tolist() == [1.0, 1.0]
    third = x.send(handle)
    with pytest.raises(QuotaError, match="objects=2"):
        x.send(handle).get()
    del q, third
    handle.close()
    worker.close()
