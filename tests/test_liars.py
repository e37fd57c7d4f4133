"""Workers that lie: what they say is one error where somebody waits for it, and costs only their own link."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import pytest
import torch

import farpoint
from farpoint import RemoteWorker
from farpoint.errors import FarpointError, ProtocolError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.protocol.messages import Kind
from wire import (
    RawWorker,
    new_worker,
    odd_values,
)

numbers = itertools.count()


class TestWorkersThatLie:
    """What a hostile worker says gives one error where somebody waits for it, and costs only its own link."""

    @pytest.fixture(autouse=True)
    def msgpack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Offer msgpack, whatever other tests have made this process offer: the liars here write nothing else."""
        monkeypatch.setattr(farpoint.me(), "serializers", ["msgpack"])

    @pytest.fixture
    def honest(self) -> Iterator[Any]:
        worker = new_worker("honest")
        handle = RemoteWorker(worker.id, worker.url)
        pointer: Any = farpoint.send(torch.full((2,), 3.0), handle)
        yield pointer
        assert (pointer + pointer).get().tolist() == [6, 6], "the link to another worker has suffered"
        handle.close()
        worker.close()

    def connect(self, answer: Any, **welcome: Any) -> tuple[RawWorker, RemoteWorker]:
        liar = RawWorker(f"liar-{next(numbers)}", answer, welcome)
        return liar, RemoteWorker(liar.name, liar.url)

    @pytest.mark.parametrize(
        "welcome",
        [
            b"",
            b"{",
            b"5",
            b"[]",
            b"\xff\xfe",
            b"[" * 60_000,
            b'{"worker": 1' + b"1" * 5000 + b"}",
            {"worker": "somebody-else"},
            {"worker": ""},
            {"worker": 5},
            {"worker": None},
            {"incarnation": "x"},
            {"incarnation": "0" * 64},
            {"incarnation": None},
            {"serializer": "torch"},
            {"serializer": "pickle"},
            {"serializer": ["msgpack"]},
            {"serializer": None},
            {"refused": "go away"},
            {"refused": "x" * 10**6},
        ],
        ids=lambda welcome: f"{welcome!r}"[:40],
    )
    def test_welcome(self, welcome: Any, honest: Any) -> None:
        liar = RawWorker(f"liar-{next(numbers)}", welcome=welcome)
        with pytest.raises(ProtocolError) as raised:
            RemoteWorker(liar.name, liar.url)
        assert len(str(raised.value)) < 700 and liar.name in str(raised.value)
        assert liar.over == 1, "the link is left open"
        liar.close()

    @pytest.mark.parametrize("limits", [None, 5, [], {"commands_in_flight": 0}, {"templates": -1}, {"templates": "x"}, {"new": []}])
    def test_limits_that_are_none_change_nothing(self, limits: Any, honest: Any) -> None:
        liar, handle = self.connect(lambda number, message: [], limits=limits)
        assert handle.peer.limits == attrs.evolve(DEFAULT_LIMITS, plans=0)  # who does not tell knows of none
        handle.close()
        liar.close()

    def test_a_link_that_ends_before_the_welcome(self, honest: Any) -> None:
        liar = RawWorker(f"liar-{next(numbers)}", hangs_up=True)
        with pytest.raises(FarpointError, match="closed"):
            RemoteWorker(liar.name, liar.url)
        liar.close()

    CALLS: ClassVar[dict[str, Any]] = {
        "get": lambda handle, p: p.get(),
        "get, keep": lambda handle, p: p.get(keep=True),
        "get, chain": lambda handle, p: p.send(handle).get(),
        "nonzero": lambda handle, p: torch.nonzero(p),
        "unique": lambda handle, p: p.unique(return_counts=True),
        "search": lambda handle, p: handle.search("#x"),
        "clear": lambda handle, p: handle.clear_objects(),
        "synchronize": lambda handle, p: p._route.synchronize(),
        "move": lambda handle, p: p.remote_send(handle),
        "describe": lambda handle, p: handle.peer.request([int(Kind.DESCRIBE), [1, 2]]),
    }

    @staticmethod
    def contents() -> list[Any]:
        good = [[2], [1], 0, "float32", False, False]
        return [
            *odd_values(),
            *([good] * n for n in (0, 1, 2, 3)),
            *([[*good[:i], value, *good[i + 1 :]]] for i in range(6) for value in (None, -1, 2**41, [2**40] * 4, "float33", [[2]], 1.5)),
            [[[1] * 33, [1] * 33, 0, "float32", False, False]],
            [[[2**40, 2**40], [1, 1], 0, "float32", False, False]],
            [[[2], [1], 0, "float32", True, False]],
            ["tensor", torch.ones(2), False, [], ""],
            ["tensor", torch.ones(2, dtype=torch.int64), False, [], ""],
            ["tensor", torch.ones(3), False, ["a b"], ""],
            ["tensor", [1, 2], False, [], ""],
            ["tensor", torch.ones(2), False, []],
            ["tensor", torch.ones(2), 0, [], ""],
            ["tensor", torch.ones(2), False, [], 5],
            ["pointer", "x", "virtual://x", 5, False, [], ""],
            ["pointer", "x", "nowhere", 5, False, [], ""],
            ["pointer", "x", "", 0, False, [], ""],
            ["pointer", "x", "", "5", False, [], ""],
            ["pointer", ["x"], "", 5, False, [], ""],
            ["pointer", "x", None, 5, False, [], ""],
        ]

    @pytest.mark.parametrize("call", CALLS, ids=lambda call: call)
    def test_answers(self, call: str, honest: Any) -> None:
        refused = 0
        for content in self.contents():
            def answer(number: int, message: list[Any], content: Any = content) -> list[Any]:
                if message[0] == Kind.SYNC and call != "synchronize":
                    return [[int(Kind.ANSWER), number, True]]
                return [[int(Kind.ANSWER), number, content]]

            liar, handle = self.connect(answer)
            pointer: Any = farpoint.send(torch.ones(2, requires_grad=True).detach().requires_grad_(), handle)
            try:
                self.CALLS[call](handle, pointer)
            except ProtocolError as error:
                refused += 1
                assert len(str(error)) < 700
                assert handle.peer.channel.lost is not None and liar.over == 1
                with pytest.raises(ProtocolError):
                    pointer.get()
            except FarpointError as error:
                # A pointer to nobody is in order, and there is nobody.
                assert isinstance(content, list) and content[0] == "pointer", error
            del pointer
            handle.close()
            liar.close()
        assert refused >= 70

    @pytest.mark.parametrize(
        "message",
        [
            None,
            5,
            [],
            [64],
            [64, 1],
            [64, 1, True, 5],
            [64, "1", True],
            [64, -1, True],
            [64, 2**40, True],
            [64, None, True],
            ["64", 1, True],
            [65, 1, None],
            [65, 1, {}],
            [65, 1, []],
            [65, 1, {"uid": 1, "kind": "X"}],
            [65, 99, {"uid": 5, "kind": "k", "text": "t", "worker": "w", "operation": "o", "evidence": {}, "orphan": False}],
            [65, 1, {"uid": "5", "kind": "k", "text": "t", "worker": "w", "operation": "o", "evidence": {}, "orphan": False}],
            [65, 1, {"uid": 5, "kind": ["k"], "text": "t", "worker": "w", "operation": "o", "evidence": {}, "orphan": False}],
            [65, 1, {"uid": 5, "kind": "k", "text": "t" * 501, "worker": "w", "operation": "o", "evidence": {}, "orphan": False}],
            [65, 1, {"uid": 5, "kind": "k", "text": "t", "worker": "w", "operation": "o", "evidence": [], "orphan": False}],
            b"",
            b"\xc1",
            b"\x94\x00\x01\x00\x90",
        ],
        ids=lambda message: f"{message!r}"[:40],
    )
    def test_messages(self, message: Any, honest: Any) -> None:
        liar, handle = self.connect(lambda number, command: [message])
        pointer = farpoint.send(torch.ones(2), handle)
        with pytest.raises(ProtocolError, match=f"{liar.name} broke the protocol"):
            pointer.get()
        assert liar.over == 1
        del pointer
        handle.close()
        liar.close()

    def test_a_failure_of_any_class_is_an_error_of_ours(self, honest: Any) -> None:
        kinds = ["FarpointError", "TypeError", "SystemExit", "PointerSpentError", "QuotaError", "__import__", "", "MalformedMessageError"]
        for kind in kinds:
            failure = {"uid": next(numbers) + 1, "kind": kind, "text": "t", "worker": "w", "operation": "o", "evidence": {}, "orphan": False}
            liar, handle = self.connect(lambda number, command, failure=failure: [[int(Kind.FAILURE), number, failure]])
            pointer = farpoint.send(torch.ones(2), handle)
            with pytest.raises(FarpointError) as raised:
                pointer.get()
            assert not isinstance(raised.value, TypeError) and str(raised.value)
            del pointer
            handle.close()
            liar.close()

    def test_unknown_kinds_and_answers_nobody_waits_for_are_passed_over(self, honest: Any) -> None:
        def answer(number: int, message: list[Any]) -> list[Any]:
            good = ["tensor", torch.ones(2), False, [], ""]
            noise = [[99, 1, 2], [int(Kind.RUN), 0, []], [int(Kind.ANSWER), 1, good]]
            return [*noise, [int(Kind.ANSWER), number, good]] if message[0] == Kind.FETCH else noise

        liar, handle = self.connect(answer)
        pointer: Any = farpoint.send(torch.zeros(2), handle)
        assert pointer.get().tolist() == [1, 1]
        handle.close()
        liar.close()

    def test_errors_are_not_kept_without_end(self, honest: Any) -> None:
        def answer(number: int, message: list[Any]) -> list[Any]:
            failure = {"kind": "X", "text": "t", "worker": "w", "operation": "o", "evidence": {}, "orphan": True}
            return [[int(Kind.FAILURE), number, {**failure, "uid": uid}] for uid in range(next(numbers) * 6000 + 1, 2**62)[:6000]]

        kept = dict(farpoint.me().failures)
        liar, handle = self.connect(answer)
        farpoint.send(torch.ones(2), handle)
        handle.flush()
        assert len(farpoint.me().failures) <= DEFAULT_LIMITS.failures
        assert len(handle.peer.answers.orphans) <= DEFAULT_LIMITS.failures
        farpoint.me().failures.clear()
        farpoint.me().failures.update(kept)
        handle.peer.answers.orphans.clear()
        handle.close()
        liar.close()
