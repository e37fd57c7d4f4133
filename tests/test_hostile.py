"""Clients that lie: whatever they send, the answer is one clear error or a closed link, and nobody else notices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farpoint
from farpoint.limits import Limits
from farpoint.protocol.messages import Kind
from farpoint.references import unguessable_ids
from farpoint.worker import Worker
from wire import (
    SPEC,
    RawClient,
    RawWorker,
    check_books,
    check_idle,
    error_of,
    kind_error,
    new_worker,
    stocked,
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


class TestLinks:
    def test_an_unknown_kind_is_unimplemented_and_not_fatal(self, bob: Worker, mallory: RawClient) -> None:
        for kind in (0, 22, 63, int(Kind.ANSWER), int(Kind.FAILURE), 66, -1, 2**63, 2**64 - 1):
            error, text = mallory.error([kind, 1, 2])
            assert error == "ProtocolError" and "unimplemented" in text
        assert not mallory.over and next(iter(bob.guests.values())).bad == 0

    @pytest.mark.parametrize("message", [None, 5, "x", [], {}, [[]], ["RUN"], [True], [1.0], [None, 1], {"kind": 1}])
    def test_what_is_no_message_is_answered(self, mallory: RawClient, message: Any) -> None:
        error, text = mallory.error(message)
        assert error == "MalformedMessageError" and "a list that begins with its kind" in text
        assert not mallory.over

    def test_ten_malformed_messages_close_the_link(self) -> None:
        bob = new_worker()
        mallory, honest = stocked(RawClient(bob.url)), stocked(RawClient(bob.url), 101, 102)
        for n in range(9):
            assert mallory.error([int(Kind.FETCH), -n])[0] == "MalformedMessageError"
        mallory.say(*[[int(Kind.FETCH), 3]] * 50, [99], [int(Kind.DEFINE), 1, "aten::from_file.default", [], {}])
        assert not mallory.over, "what is well-formed is no reason"
        (number,) = mallory.say([int(Kind.FETCH), "x"])
        assert mallory.over
        assert error_of(mallory.answers[number][1]) == "MalformedMessageError", "the last one is answered, too"
        assert mallory.answers[0][1]["text"].startswith("10 malformed messages came over this link")
        assert honest.ask([int(Kind.FETCH), 101])[0] == "tensor"
        assert set(bob.store) == {101, 102} and set(bob.guests) == {honest.holder}
        check_books(bob)
        bob.close()

    @pytest.mark.parametrize(
        "frames",
        [[b""], [b"\x93\x01"], [b"x" * 5000], [b"\xc1"], [b"\x90", b"tensor"], [b"\x94\xa0\x01\x00\x90"], [b"[1,2]"], [b"\x80" * 64]],
    )
    def test_bytes_that_are_no_packet_close_the_link_with_a_reason(
        self, bob: Worker, mallory: RawClient, frames: list[bytes]
    ) -> None:
        honest = stocked(RawClient(bob.url), 101, 102)
        mallory.write(frames)
        assert mallory.over
        failure = mallory.answers[0][1]
        assert kind_error(error_of(failure)) and failure["text"]
        assert honest.ask([int(Kind.FETCH), 101])[0] == "tensor"
        assert set(bob.guests) == {honest.holder}

    def test_what_was_good_before_the_bad_takes_effect(self, bob: Worker) -> None:
        mallory = stocked(RawClient(bob.url))
        (session,) = (guest.channel.session for guest in bob.guests.values())
        packet = mallory.serializer.encode([bob.incarnation, session.taken + 2, 0, [[int(Kind.FETCH), 1]]])
        mallory.write(packet)
        assert mallory.over and "message 4 is next, and a packet begins with 5" in mallory.answers[0][1]["text"]

    @pytest.mark.parametrize(
        "greeting",
        [
            {"farpoint": 2},
            {"farpoint": "1"},
            {"farpoint": None},
            {"client": ""},
            {"client": "x" * 65},
            {"client": "a b"},
            {"client": 5},
            {"client": ["me"]},
            {"url": None},
            {"url": "x" * 2000},
            {"url": "\ud800"},
            {"session": 0},
            {"session": -1},
            {"session": 2**63},
            {"session": "5"},
            {"session": True},
            {"session": 1.0},
            {"incarnation": ""},
            {"incarnation": "zz" * 16},
            {"incarnation": "00"},
            {"incarnation": 5},
            {"serializers": "msgpack"},
            {"serializers": []},
            {"serializers": ["pickle"]},
            {"serializers": [["msgpack"]]},
            {"serializers": {"msgpack": 1}},
            {"serializers": ["x"] * 100},
            {"serializers": [], "taken": 0},
            {"secret": "\ud800"},
            {"secret": 5},
            {"introduction": []},
            {"introduction": "\ud800"},
            {"taken": []},
            {"taken": -1},
            {"taken": True},
        ],
        ids=lambda greeting: f"{greeting}"[:30],
    )
    def test_a_greeting_that_is_none_is_refused(self, bob: Worker, greeting: dict[str, Any]) -> None:
        mallory = RawClient(bob.url, **greeting)
        assert list(mallory.welcome) == ["refused"] and len(mallory.welcome["refused"]) < 500
        assert mallory.over and not bob.guests

    @pytest.mark.parametrize(
        "text",
        [
            *(b"", b"\xff", b"1", b"true", b"5", b"[]", b"null", b'"hello"', b"[" * 60_000, b"{" * 100, b"{}" + b" " * 10**6),
            b'{"farpoint": 1, "session": ' + b"1" * 5000 + b"}",
        ],
        ids=lambda text: f"{text[:20]!r}",
    )
    def test_text_that_is_no_greeting_is_refused(self, bob: Worker, text: bytes) -> None:
        mallory = RawClient.__new__(RawClient)
        mallory.welcome, mallory.over, mallory.session = {}, False, None
        link = farpoint.plugins.plugins.transport(bob.url).connect(bob.url, mallory)
        link.write([text])
        assert list(mallory.welcome) == ["refused"] and len(mallory.welcome["refused"]) < 500
        assert mallory.over and not bob.guests

    def test_a_session_cannot_be_taken_over(self, bob: Worker) -> None:
        honest = stocked(RawClient(bob.url))
        mallory = RawClient(bob.url, session=honest.holder)
        assert mallory.welcome == {"refused": "this session is in use"} and mallory.over
        assert honest.ask([int(Kind.FETCH), 1])[0] == "tensor"

    def test_there_are_only_so_many_links(self) -> None:
        bob = new_worker(limits=Limits(links=3))
        clients = [RawClient(bob.url) for _ in range(5)]
        assert ["refused" in client.welcome for client in clients] == [False, False, False, True, True]
        clients[0].close()
        assert "refused" not in RawClient(bob.url).welcome
        honest = clients[1]
        for n in range(5):
            error, text = honest.error([int(Kind.LINK), n + 1, f"nobody-{n}", f"virtual://nobody-{n}", 5, SPEC, [], "", ""])
            assert error == "NobodyListensError", text
        bob.close()

    def test_an_answer_that_is_never_acknowledged_is_not_kept_for_ever(self) -> None:
        bob = new_worker(limits=Limits(commands_in_flight=20))
        mallory = stocked(RawClient(bob.url))
        mallory.acknowledges = False
        (guest,) = bob.guests.values()
        for _ in range(100):
            mallory.say([int(Kind.SYNC), [], []])
            assert sum(len(packet[3]) for packet in guest.channel.session._packed) <= 41
        assert mallory.over and "not acknowledged" in mallory.answers[0][1]["text"]
        assert not bob.store
        bob.close()


class TestWhatIsOthers:
    """A session sees what it holds, and nothing else."""

    def test_an_object_that_one_does_not_hold_does_not_exist(self, bob: Worker, mallory: RawClient) -> None:
        honest = RawClient(bob.url)
        honest.say([int(Kind.PUT), 100, torch.full((2,), 5.0), False, ["#secret"], ""])
        mallory.say([int(Kind.DEFINE), 3, "aten::neg_.default", [["t"]], {}])
        uses: list[Callable[[int], list[Any]]] = [
            lambda i: [int(Kind.FETCH), i],
            lambda i: [int(Kind.DESCRIBE), [1, i]],
            lambda i: [int(Kind.RUN), 0, [1, i], [200 + i]],
            lambda i: [int(Kind.ASK), 0, [i, 1], [300 + i]],
            lambda i: [int(Kind.RUN), 3, [i], [0]],
            lambda i: [int(Kind.TAG), i, ["#mine"], ""],
            lambda i: [int(Kind.MOVE), i, 0, "x", "virtual://x", 5, 6, False, ""],
        ]
        for use in uses:
            taken, missing = mallory.error(use(100)), mallory.error(use(101))
            assert taken[0] == "ObjectNotFoundError"
            assert taken[1].replace("100", "101") == missing[1], "whether it exists is not told"
        mallory.say([int(Kind.RELEASE), [100]])
        fetched = honest.ask([int(Kind.FETCH), 100])
        assert fetched[1].tolist() == [5, 5] and fetched[3] == ["#secret"]

    def test_an_id_that_is_taken_is_never_overwritten(self, bob: Worker, mallory: RawClient) -> None:
        honest = RawClient(bob.url)
        honest.say([int(Kind.PUT), 100, torch.full((2,), 5.0), False, [], ""])
        honest.say([int(Kind.RUN), 9, [], [101]])  # fails: 101 carries the error
        assert 101 in bob.poisoned
        for taken in (1, 100, 101):
            messages: list[list[Any]] = [
                [int(Kind.PUT), taken, torch.zeros(2), False, [], ""],
                [int(Kind.RUN), 0, [1, 2], [taken]],
                [int(Kind.RUN), 0, [1, 2], [30, taken]],
                [int(Kind.RUN), 7, [1, 2], [taken]],
                [int(Kind.LINK), taken, "nobody", "virtual://nobody", 5, SPEC, [], "", ""],
                [int(Kind.MOVE), 1, 0, bob.id, bob.url, taken, mallory.holder, False, ""],
            ]
            for message in messages:
                assert mallory.error(message)[0] == "MalformedMessageError"
                check_books(bob)
        mallory.close()
        assert set(bob.store) == {100} and set(bob.poisoned) == {101}

    def test_the_error_of_another_is_not_read(self, bob: Worker, mallory: RawClient) -> None:
        honest = RawClient(bob.url)
        honest.say([int(Kind.RUN), 9, [], [101]])
        assert mallory.error([int(Kind.FETCH), 101])[0] == "ObjectNotFoundError"

    def test_ids_tell_nothing_about_each_other(self) -> None:
        ids = unguessable_ids()
        assert len(set(ids)) == len(ids) and all(0 < i < 2**63 for i in ids)
        steps = {b - a for a, b in itertools.pairwise(ids)}
        assert len(steps) == len(ids) - 1

    def test_nobody_is_given_what_he_does_not_expect(self, bob: Worker, mallory: RawClient) -> None:
        for holder in (0, 12345):
            error, text = mallory.error([int(Kind.MOVE), 1, 0, bob.id, bob.url, 50, holder, False, ""])
            assert error == "StaleIncarnationError" and "no session here" in text

    def test_who_is_gone_holds_nothing(self, bob: Worker) -> None:
        mallory = stocked(RawClient(bob.url))
        (guest,) = bob.guests.values()
        mallory.close()
        bob.execute(guest, 9, [int(Kind.PUT), 50, torch.ones(1), False, [], ""])
        assert not bob.store and not bob.holders._held and not bob.guests


class TestTransfers:
    """TRANSFER messages of a worker that lies."""

    @pytest.fixture
    def eve(self, bob: Worker) -> Iterator[RawClient]:
        place = RawWorker(f"eve-{next(numbers)}")
        eve = stocked(RawClient(bob.url, poses_as=place))
        yield eve
        place.close()

    def push(self, transfer: int, new_id: int, holder: int, *payload: Any) -> list[Any]:
        fields = [transfer, transfer, 1, new_id, holder, False, None, None]
        return [int(Kind.TRANSFER), "Push", fields, [*payload] or [torch.ones(2), False, [], "", ""]]

    @pytest.mark.parametrize(
        "fields",
        [[], [None], ["x"], [-1], [2**64 - 1, 1, 1, 1], [True], [1.5], [[]], [["x", "zz"]], [["x", "f" * 33]], [["x"]], [["y", "ff"]], [{}]],
    )
    def test_fields(self, eve: RawClient, fields: list[Any]) -> None:
        for name in ("Commit", "Prepared", "Refused", "Abort", "Inquire", "Released", "Push", "Probe"):
            error, text = eve.error([int(Kind.TRANSFER), name, fields, None])
            assert error == "MalformedMessageError" and text.startswith(f"TRANSFER {name}: "), (name, text)

    def test_names(self, eve: RawClient) -> None:
        for name in ("", "push", "Transfers", "__class__", "TransferMessage", "Stage", "Drop"):
            error, text = eve.error([int(Kind.TRANSFER), name, [1], None])
            assert error == "MalformedMessageError" and "TRANSFER: name must be one of Push" in text

    def test_payloads(self, bob: Worker, eve: RawClient) -> None:
        push = self.push(1, 50, eve.holder)
        assert eve.error([*push[:3], []])[0] == "MalformedMessageError"
        payloads: list[list[Any]] = [[1, 2, 3, 4, 5], [torch.ones(1), 1, [], "", ""], [torch.ones(1), True, ["a b"], "", ""], [None, False, [], "", ""]]
        for n, payload in enumerate(payloads):
            (number,) = eve.say([*self.push(20 + n, 50, eve.holder)[:3], payload])
            assert number not in eve.answers, "whoever began the move is told by the state machine"
        for holder, new_id in ((eve.holder, 1), (0, 51), (12345, 52)):
            (number,) = eve.say(self.push(new_id + 100, new_id, holder))
            assert number not in eve.answers, "the state machine refuses, the message is in order"
        assert not bob.movers._staged and set(bob.store) == {1, 2}

    def test_an_id_that_is_taken_meanwhile(self, bob: Worker, eve: RawClient) -> None:
        eve.say(self.push(7, 50, eve.holder), self.push(8, 50, eve.holder))
        assert [staged.new_id for staged, _ in bob.movers._staged.values()] == [50]
        eve.say([int(Kind.PUT), 50, torch.zeros(1), False, [], ""], [int(Kind.TRANSFER), "Commit", [7], None])
        assert not bob.movers._staged
        assert eve.ask([int(Kind.FETCH), 50])[1].tolist() == [0]

    def test_who_shall_hold_it_leaves_meanwhile(self, bob: Worker, eve: RawClient) -> None:
        honest = RawClient(bob.url)
        eve.say(self.push(7, 50, honest.holder))
        honest.close()
        eve.say([int(Kind.TRANSFER), "Commit", [7], None])
        assert not bob.movers._staged and set(bob.store) == {1, 2}

    def test_what_is_staged_counts(self) -> None:
        bob = new_worker(limits=Limits(bytes=64_000))
        place = RawWorker(f"eve-{next(numbers)}")
        eve = RawClient(bob.url, poses_as=place)
        for n in range(1, 21):
            eve.say(self.push(n, 50 + n, eve.holder, torch.ones(2_000), False, [], "", ""))
        assert len(bob.movers._staged) == 8
        bob.close()
        place.close()

    def test_a_worker_that_claims_to_have_moved_what_never_came(self, bob: Worker, mallory: RawClient) -> None:
        liar = RawWorker(f"liar-{next(numbers)}", lambda number, message: [[int(Kind.ANSWER), number, True]])
        mallory.say([int(Kind.LINK), 50, liar.name, liar.url, 5, SPEC, [], "", ""])
        error, text = mallory.error([int(Kind.MOVE), 50, 1, bob.id, bob.url, 0, 0, False, ""])
        assert error == "ProtocolError" and "nothing has come" in text
        check_idle(bob)
        liar.close()


